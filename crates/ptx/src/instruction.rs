//! Statements to instructions that can be run: every operand is a register by its number, every address a register and an
//! offset. Literals, special registers and the addresses of variables are registers that are set before a block begins.

use crate::{
    SourceError,
    arithmetic::{self, Function},
    parse::{self, Entry, Operand, Statement, Variable},
};
use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

/// A register by its number.
pub type Register = u32;

/// A kernel, ready to run.
#[derive(Debug)]
pub struct Kernel {
    pub(crate) name: String,
    /// The first byte of each parameter among all, and how many it has.
    pub(crate) parameters: Vec<(u64, u64)>,
    pub(crate) max_threads: u32,
    pub(crate) shared_bytes: u64,
    pub(crate) register_names: Vec<String>,
    pub(crate) constants: Vec<(Register, u64)>,
    pub(crate) special: Vec<(Register, Special)>,
    /// The lanes in which each register has a value before a block begins: all or none.
    pub(crate) defined: Vec<u32>,
    /// By which kernels are told apart.
    pub(crate) number: u64,
    pub(crate) code: Vec<Instruction>,
    pub(crate) opcodes: Vec<String>,
}

/// A register that the hardware sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Thread,
    Block,
    Threads,
    Blocks,
    Lane,
    /// The other two dimensions of threads and blocks: 0, and 1 of how many there are.
    Constant(u64),
}

#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub line: u32,
    /// Runs where this predicate is true, or false if the second says so.
    pub guard: Option<(Register, bool)>,
    pub operation: Operation,
}

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Compute {
        function: Function,
        to: Register,
        from: [Register; 3],
    },
    /// Several registers of so many bits to one, the first lowest.
    Pack {
        to: Register,
        from: Vec<Register>,
        bits: u32,
    },
    /// Takes the lower half.
    Lower {
        to: Register,
        from: Register,
    },
    Unpack {
        to: Vec<Option<Register>>,
        from: Register,
        bits: u32,
    },
    Branch {
        target: usize,
    },
    Exit,
    Load {
        access: Access,
        coherent: bool,
        to: Vec<Register>,
        used_bytes: u64,
    },
    Store {
        access: Access,
        from: Vec<Register>,
    },
    Atomic {
        access: Access,
        change: Change,
        order: Order,
        to: Option<Register>,
        by: Register,
    },
    Barrier,
    WarpBarrier {
        members: Register,
    },
    Shuffle {
        mode: Shuffle,
        to: Register,
        valid: Option<Register>,
        value: Register,
        by: Register,
        clamp: Register,
        members: Register,
    },
    /// At the scope of the device or wider.
    Fence,
    /// At the scope of the block, whose threads are ordered by barriers alone here.
    BlockFence,
    Prefetch {
        access: Access,
    },
}

impl Operation {
    /// Whether it waits for earlier writes to be seen by the whole GPU.
    pub fn is_fence(&self) -> bool {
        matches!(self, Self::Fence | Self::Atomic { order: Order { release: true, of_block: false, .. }, .. })
    }
}

/// Where and what a memory operation reads or writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub space: Space,
    pub base: Register,
    pub offset: i64,
    /// Of an element, and how many there are.
    pub width: u64,
    pub count: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    Shared,
    Parameters,
    Generic,
}

/// What an atomic operation makes of old value and operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Add,
    MinUnsigned,
    MaxUnsigned,
    MinSigned,
    MaxSigned,
    And,
    Or,
    Xor,
    Exchange,
}

/// How an atomic operation orders those around it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Order {
    pub acquire: bool,
    pub release: bool,
    /// Atomic among the threads of its block only.
    pub of_block: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// The kernels of a module.
pub fn kernels(text: &str) -> Result<Vec<Kernel>, SourceError> {
    parse::parse(text)?.iter().map(Kernel::new).collect()
}

/// Of variables in a row, each aligned as it asks for and so far from the one before it, the places and all their bytes.
fn lay_out(variables: &[Variable], gap: u64) -> (Vec<u64>, u64) {
    let mut end = 0u64;
    let places = variables.iter().map(|variable| {
        let free = if end == 0 { 0 } else { end + gap };
        let place = free.next_multiple_of(variable.align);
        end = place + variable.bytes;
        place
    });
    (places.collect(), end)
}

impl Kernel {
    fn new(entry: &Entry) -> Result<Self, SourceError> {
        let (parameter_places, _) = lay_out(&entry.parameters, 0);
        // What is read between two of them has no value.
        let (shared_places, shared_bytes) = lay_out(&entry.shared, 16);
        let mut decoder = Decoder {
            names: HashMap::new(),
            register_names: Vec::new(),
            literals: HashMap::new(),
            constants: Vec::new(),
            special: Vec::new(),
            places: HashMap::new(),
            labels: &entry.labels,
            statements: entry.statements.len(),
        };
        for (variable, &place) in
            entry.shared.iter().zip(&shared_places).chain(entry.parameters.iter().zip(&parameter_places))
        {
            decoder.places.insert(&variable.name, place);
        }
        for (name, _) in &entry.registers {
            let register = decoder.register(name.clone());
            decoder.names.insert(name, register);
        }
        let code =
            entry.statements.iter().map(|statement| decoder.instruction(statement)).collect::<Result<Vec<_>, _>>()?;
        let mut opcodes: Vec<String> = entry.statements.iter().map(|statement| statement.opcode.clone()).collect();
        opcodes.sort_unstable();
        opcodes.dedup();
        let mut defined = vec![0; decoder.register_names.len()];
        let set = decoder.constants.iter().map(|&(register, _)| register);
        for register in set.chain(decoder.special.iter().map(|&(register, _)| register)) {
            defined[register as usize] = u32::MAX;
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            defined,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            name: entry.name.clone(),
            parameters: parameter_places
                .iter()
                .zip(&entry.parameters)
                .map(|(&place, variable)| (place, variable.bytes))
                .collect(),
            max_threads: entry.max_threads.unwrap_or(1024),
            shared_bytes,
            register_names: decoder.register_names,
            constants: decoder.constants,
            special: decoder.special,
            code,
            opcodes,
        })
    }

    /// The name of its entry point.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many bytes each parameter has.
    pub fn parameter_bytes(&self) -> impl Iterator<Item = u64> {
        self.parameters.iter().map(|&(_, bytes)| bytes)
    }

    /// Its opcodes with their modifiers, each once.
    pub fn opcodes(&self) -> &[String] {
        &self.opcodes
    }
}

struct Decoder<'a> {
    names: HashMap<&'a str, Register>,
    register_names: Vec<String>,
    literals: HashMap<u64, Register>,
    constants: Vec<(Register, u64)>,
    special: Vec<(Register, Special)>,
    /// Of variables, in their state space.
    places: HashMap<&'a str, u64>,
    labels: &'a HashMap<String, usize>,
    statements: usize,
}

impl<'a> Decoder<'a> {
    fn register(&mut self, name: String) -> Register {
        self.register_names.push(name);
        self.register_names.len() as Register - 1
    }

    fn constant(&mut self, value: u64) -> Register {
        if let Some(&register) = self.literals.get(&value) {
            return register;
        }
        let register = self.register(format!("{value:#x}"));
        self.literals.insert(value, register);
        self.constants.push((register, value));
        register
    }

    /// The register of a name: declared, special, or holding a variable's address.
    fn named(&mut self, name: &str) -> Option<Register> {
        if let Some(&register) = self.names.get(name) {
            return Some(register);
        }
        if let Some(&place) = self.places.get(name) {
            return Some(self.constant(place));
        }
        let special = match name {
            "%tid.x" => Special::Thread,
            "%ctaid.x" => Special::Block,
            "%ntid.x" => Special::Threads,
            "%nctaid.x" => Special::Blocks,
            "%laneid" => Special::Lane,
            "%tid.y" | "%tid.z" | "%ctaid.y" | "%ctaid.z" => Special::Constant(0),
            "%ntid.y" | "%ntid.z" | "%nctaid.y" | "%nctaid.z" => Special::Constant(1),
            _ => return None,
        };
        if let Some(&(register, _)) = self.special.iter().find(|(_, known)| *known == special) {
            return Some(register);
        }
        let register = self.register(name.to_owned());
        self.special.push((register, special));
        Some(register)
    }

    fn instruction(&mut self, statement: &Statement) -> Result<Instruction, SourceError> {
        let wrong = |what: &str| SourceError::new(statement.line, format!("`{}` {what}", statement.opcode));
        let guard = match &statement.guard {
            Some((name, negated)) => {
                Some((self.named(name).ok_or_else(|| wrong("is guarded by an unknown name"))?, *negated))
            }
            None => None,
        };
        let operation = self.operation(statement)?.ok_or_else(|| wrong("is not understood"))?;
        Ok(Instruction { line: statement.line, guard, operation })
    }

    /// `None` when the opcode, or what it is given, is none of those known here.
    fn operation(&mut self, statement: &Statement) -> Result<Option<Operation>, SourceError> {
        let opcode = statement.opcode.as_str();
        let operands = &statement.operands[..];
        let family = opcode.split('.').next().unwrap_or_default();
        Ok(match (family, operands) {
            ("bra", [Operand::Name(label)]) if matches!(opcode, "bra" | "bra.uni") => {
                let target = self.labels.get(label).copied().filter(|&target| target < self.statements);
                Some(Operation::Branch {
                    target: target.ok_or_else(|| SourceError::new(statement.line, format!("no label {label}")))?,
                })
            }
            ("ret" | "exit", []) if matches!(opcode, "ret" | "ret.uni" | "exit") => Some(Operation::Exit),
            ("mov", [to, Operand::Vector(from)]) => self.pack(opcode, to, from),
            ("mov", [Operand::Vector(to), from]) => self.unpack(opcode, to, from),
            ("ld", [to, Operand::Address(base, offset)]) => self.load(statement, to, base.as_deref(), *offset),
            ("st", [Operand::Address(base, offset), from]) => self.store(opcode, base.as_deref(), *offset, from),
            ("atom" | "red", _) => self.atomic(opcode, operands),
            ("prefetch", [Operand::Address(base, offset)])
                if matches!(opcode, "prefetch.global.L2" | "prefetch.global.L1") =>
            {
                self.access(Space::Global, base.as_deref(), *offset, 1, 1).map(|access| Operation::Prefetch { access })
            }
            ("bar" | "barrier", [Operand::Literal(0)]) => {
                matches!(opcode, "bar.sync" | "barrier.sync.aligned").then_some(Operation::Barrier)
            }
            ("bar", [members]) if opcode == "bar.warp.sync" => {
                let members = self.source(members).map(|members| self.fitting(members, "bar.warp.sync.b32", 0));
                members.map(|members| Operation::WarpBarrier { members })
            }
            ("shfl", _) => self.shuffle(opcode, operands),
            ("fence" | "membar", []) => match opcode {
                "fence.acq_rel.gpu" | "fence.sc.gpu" | "fence.acq_rel.sys" | "fence.sc.sys" | "membar.gl"
                | "membar.sys" => Some(Operation::Fence),
                "fence.acq_rel.cta" | "fence.sc.cta" | "membar.cta" => Some(Operation::BlockFence),
                _ => None,
            },
            ("cvt", [to, from]) if opcode == "cvt.u32.u64" => {
                self.destination(to).zip(self.source(from)).map(|(to, from)| Operation::Lower { to, from })
            }
            // Of place and length, which compilers give as numbers, one source.
            ("bfi", [Operand::Name(to), a, b, Operand::Literal(place), Operand::Literal(length)]) => {
                let run = Operand::Literal(place & 0xff | (length & 0xff) << 8);
                self.compute(opcode, to, &[a.clone(), b.clone(), run])
            }
            (_, [Operand::Name(to), from @ ..]) => self.compute(opcode, to, from),
            _ => None,
        })
    }

    /// The register of an operand that is read.
    fn source(&mut self, operand: &Operand) -> Option<Register> {
        match operand {
            Operand::Name(name) => self.named(name),
            Operand::Literal(value) => Some(self.constant(*value)),
            _ => None,
        }
    }

    fn sources(&mut self, operands: &[Operand]) -> Option<Vec<Register>> {
        operands.iter().map(|operand| self.source(operand)).collect()
    }

    fn destination(&self, operand: &Operand) -> Option<Register> {
        let Operand::Name(name) = operand else { return None };
        self.names.get(name.as_str()).copied()
    }

    fn compute(&mut self, opcode: &str, to: &str, from: &[Operand]) -> Option<Operation> {
        let meaning = arithmetic::meaning(opcode)?;
        let to = *self.names.get(to)?;
        let sources = self.sources(from).filter(|sources| sources.len() == meaning.sources)?;
        let unused = sources[0];
        let at = |index: usize| sources.get(index).copied().unwrap_or(unused);
        let from = [at(0), at(1), at(2)];
        let from = [0, 1, 2].map(|operand| self.fitting(from[operand], opcode, operand));
        Some(Operation::Compute { function: meaning.function, to, from })
    }

    /// The literal -1 of a 32-bit instruction is 0xffffffff, and of a predicate true; registers stay as they are. Shift amounts
    /// are of 32 bits, and what a product is added to is twice as wide as its factors.
    fn fitting(&mut self, register: Register, opcode: &str, operand: usize) -> Register {
        let Some(&(_, value)) = self.constants.iter().find(|(known, _)| *known == register) else { return register };
        let bits = match opcode.rsplit('.').next() {
            Some("pred") => return self.constant(u64::from(value != 0)),
            _ if opcode.starts_with("sh") && operand == 1 => 32,
            Some(of) if opcode.starts_with("mad.wide") && operand == 2 => {
                parse::width(of).map_or(64, |bytes| 16 * bytes)
            }
            of => of.and_then(parse::width).map_or(64, |bytes| 8 * bytes),
        };
        if bits < 64 && !opcode.starts_with("cvt") {
            self.constant(value & (u64::MAX >> (64 - bits)))
        } else {
            register
        }
    }

    /// The bits of each of so many registers that make one of an opcode's type.
    fn parts(opcode: &str, count: usize) -> Option<u32> {
        let bytes = parse::width(opcode.strip_prefix("mov.")?)? as u32;
        let count = u32::try_from(count).ok().filter(|count| matches!(count, 2 | 4) && *count <= bytes)?;
        Some(8 * bytes / count)
    }

    fn pack(&mut self, opcode: &str, to: &Operand, from: &[Operand]) -> Option<Operation> {
        let bits = Self::parts(opcode, from.len())?;
        let (to, from) = (self.destination(to)?, self.sources(from)?);
        Some(Operation::Pack { to, from, bits })
    }

    fn unpack(&mut self, opcode: &str, to: &[Operand], from: &Operand) -> Option<Operation> {
        let bits = Self::parts(opcode, to.len())?;
        let to = to.iter().map(|operand| match operand {
            Operand::Name(name) if name == "_" => Some(None),
            other => self.destination(other).map(Some),
        });
        let to = to.collect::<Option<_>>()?;
        Some(Operation::Unpack { to, from: self.source(from)?, bits })
    }

    fn access(&mut self, space: Space, base: Option<&str>, offset: i64, width: u64, count: u64) -> Option<Access> {
        let base = match base {
            Some(name) => self.named(name)?,
            None => self.constant(0),
        };
        Some(Access { space, base, offset, width, count })
    }

    fn load(&mut self, statement: &Statement, to: &Operand, base: Option<&str>, offset: i64) -> Option<Operation> {
        let words = Words::of(&statement.opcode)?;
        // A sign would have to be extended where the register is wider, of which nothing is known here.
        if words.signed && words.width < 8 || words.ordered {
            return None;
        }
        let to = match to {
            Operand::Vector(all) => all.iter().map(|operand| self.destination(operand)).collect::<Option<Vec<_>>>()?,
            one => vec![self.destination(one)?],
        };
        if to.len() as u64 != words.count {
            return None;
        }
        let access = self.access(words.space, base, offset, words.width, words.count)?;
        Some(Operation::Load {
            access,
            coherent: !words.non_coherent,
            to,
            used_bytes: statement.used_bytes.unwrap_or(u64::MAX),
        })
    }

    fn store(&mut self, opcode: &str, base: Option<&str>, offset: i64, from: &Operand) -> Option<Operation> {
        let words = Words::of(opcode)?;
        let from = match from {
            Operand::Vector(all) => self.sources(all)?,
            one => vec![self.source(one)?],
        };
        // Two bytes of global memory share what is known of who accessed them.
        let is_too_small = words.width == 1 && words.space != Space::Shared;
        if from.len() as u64 != words.count || words.non_coherent || words.ordered || is_too_small {
            return None;
        }
        let access = self.access(words.space, base, offset, words.width, words.count)?;
        Some(Operation::Store { access, from })
    }

    /// `atom{.order}{.scope}{.space}.change.type to, [address], by`, and `red` without the first.
    fn atomic(&mut self, opcode: &str, operands: &[Operand]) -> Option<Operation> {
        let mut words = opcode.split('.').skip(1).peekable();
        let mut next_if = |known: &[&'static str]| {
            let found = known.iter().copied().find(|word| words.peek() == Some(word))?;
            words.next();
            Some(found)
        };
        let order = match next_if(&["relaxed", "acquire", "release", "acq_rel"]) {
            Some("acquire") => Order { acquire: true, ..Order::default() },
            Some("release") => Order { release: true, ..Order::default() },
            Some("acq_rel") => Order { acquire: true, release: true, of_block: false },
            _ => Order::default(),
        };
        // "If no scope is specified, the atomic operation is performed with .gpu scope." At that of a block it orders nothing
        // between blocks.
        let of_block = next_if(&["cta", "gpu", "sys"]) == Some("cta");
        let order = if of_block { Order { of_block, ..Order::default() } } else { order };
        let space = match next_if(&["global", "shared"]) {
            Some("global") => Space::Global,
            Some("shared") => Space::Shared,
            _ => Space::Generic,
        };
        let (name, of) = (words.next()?, words.next()?);
        let change = match (name, of.get(..1)?) {
            ("add", "u" | "s") => Change::Add,
            ("min", "u") => Change::MinUnsigned,
            ("max", "u") => Change::MaxUnsigned,
            ("min", "s") => Change::MinSigned,
            ("max", "s") => Change::MaxSigned,
            ("and", "b") => Change::And,
            ("or", "b") => Change::Or,
            ("xor", "b") => Change::Xor,
            ("exch", "b") => Change::Exchange,
            _ => return None,
        };
        let width = parse::width(of).filter(|&width| width >= 4 && words.next().is_none())?;
        let (to, base, offset, by) = match operands {
            [to, Operand::Address(base, offset), by] if opcode.starts_with("atom") => (Some(to), base, offset, by),
            [Operand::Address(base, offset), by] if opcode.starts_with("red") => (None, base, offset, by),
            _ => return None,
        };
        let to = match to {
            Some(Operand::Name(name)) if name == "_" => None,
            Some(to) => Some(self.destination(to)?),
            None => None,
        };
        let by = self.source(by)?;
        let access = self.access(space, base.as_deref(), *offset, width, 1)?;
        Some(Operation::Atomic { access, change, order, to, by })
    }

    /// `shfl.sync.mode.b32 to{|valid}, value, by, clamp, members`.
    fn shuffle(&mut self, opcode: &str, operands: &[Operand]) -> Option<Operation> {
        let mode = match opcode {
            "shfl.sync.up.b32" => Shuffle::Up,
            "shfl.sync.down.b32" => Shuffle::Down,
            "shfl.sync.bfly.b32" => Shuffle::Butterfly,
            "shfl.sync.idx.b32" => Shuffle::Index,
            _ => return None,
        };
        let (to, from) = operands.split_first()?;
        let (to, valid) = match to {
            Operand::Pair(to, valid) => (*self.names.get(to.as_str())?, Some(*self.names.get(valid.as_str())?)),
            to => (self.destination(to)?, None),
        };
        let [value, by, clamp, members] = self.sources(from)?.try_into().ok()?;
        let members = self.fitting(members, opcode, 4);
        Some(Operation::Shuffle { mode, to, valid, value, by, clamp, members })
    }
}

/// What the modifiers of a load or store say.
struct Words {
    space: Space,
    non_coherent: bool,
    /// More than a plain access: volatile, relaxed, acquire, release.
    ordered: bool,
    signed: bool,
    width: u64,
    count: u64,
}

impl Words {
    fn of(opcode: &str) -> Option<Self> {
        let mut of =
            Self { space: Space::Generic, non_coherent: false, ordered: false, signed: false, width: 0, count: 1 };
        for word in opcode.split('.').skip(1) {
            match word {
                "global" => of.space = Space::Global,
                "shared" => of.space = Space::Shared,
                "param" => of.space = Space::Parameters,
                "nc" => of.non_coherent = true,
                // "Cache operators are treated as performance hints only", and `weak` is what a plain access is.
                "weak" | "ca" | "cg" | "cs" | "lu" | "wb" | "wt" | "L1::evict_last" | "L1::no_allocate"
                | "L1::evict_first" => {}
                "v2" => of.count = 2,
                "v4" => of.count = 4,
                "volatile" | "relaxed" | "acquire" | "release" => of.ordered = true,
                other => {
                    of.width = parse::width(other)?;
                    of.signed = other.starts_with('s');
                }
            }
        }
        (of.width > 0 && of.width * of.count <= 16).then_some(of)
    }
}
