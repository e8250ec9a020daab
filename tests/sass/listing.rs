//! Machine code as `cuobjdump -sass` lists it: instructions, loops, and paths through them.

use std::{cmp::Ordering, ops::Range};

/// One instruction.
#[derive(Debug)]
pub struct Instruction {
    pub address: u64,
    /// With its modifiers: `LDG.E.128.CONSTANT`.
    pub opcode: String,
    operands: Vec<String>,
    /// Runs only where a predicate holds.
    guarded: bool,
}

impl Instruction {
    /// From a line such as `/*0050*/  @!P0 BRA P1, 0x7e0 ;  /* … */`; `None` for any other line.
    fn parse(line: &str) -> Option<Self> {
        let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
        let address = u64::from_str_radix(address, 16).ok()?;
        let mut text = rest.split(';').next()?.trim();
        let guarded = text.starts_with('@');
        if guarded {
            text = text.split_once(' ')?.1.trim_start();
        }
        let (opcode, operands) = text.split_once(' ').unwrap_or((text, ""));
        let operands = operands.split(',').map(|operand| operand.trim().to_owned()).filter(|o| !o.is_empty()).collect();
        Some(Self { address, opcode: opcode.to_owned(), operands, guarded })
    }

    /// Whether the opcode is this one, with these modifiers among its own.
    pub fn is(&self, opcode: &str) -> bool {
        let mut wanted = opcode.split('.');
        let mut parts = self.opcode.split('.');
        parts.next() == wanted.next() && wanted.all(|modifier| parts.clone().any(|part| part == modifier))
    }

    /// A load from global memory.
    pub fn is_load(&self) -> bool {
        self.is("LDG") || self.is("LD")
    }

    /// Whether it runs in some lanes alone, or not at all.
    pub fn is_guarded(&self) -> bool {
        self.guarded
    }

    /// A load of 16 bytes from global memory.
    pub fn is_vector_load(&self) -> bool {
        self.is("LDG.128") || self.is("LD.128")
    }

    /// A store of 16 bytes to global memory.
    pub fn is_vector_store(&self) -> bool {
        self.is("STG.128") || self.is("ST.128")
    }

    /// Occupies the unit for f64: arithmetic, comparisons, conversions from and to f64, and their seeds.
    pub fn is_fp64(&self) -> bool {
        let mut parts = self.opcode.split('.');
        let arithmetic = ["DADD", "DMUL", "DFMA", "DSETP", "DSET", "DMNMX", "DMMA"];
        parts.next().is_some_and(|opcode| arithmetic.contains(&opcode))
            || parts.any(|part| part == "F64" || part.ends_with("64H"))
    }

    /// Whether nothing waits for what it gives, as with an atomic whose destination is no register.
    pub fn has_no_result(&self) -> bool {
        self.operands.first().is_some_and(|destination| destination == "RZ")
    }

    /// The selector of a permutation of bytes, where it is written in the instruction.
    pub fn byte_selector(&self) -> Option<u32> {
        let selector = self.operands.get(2).filter(|_| self.is("PRMT"))?;
        u32::from_str_radix(selector.strip_prefix("0x")?, 16).ok()
    }

    /// The general registers it names, each by its number.
    fn registers(&self) -> impl Iterator<Item = u32> {
        self.operands.iter().flat_map(|operand| operand.split(|c: char| !c.is_ascii_alphanumeric())).filter_map(
            |word| {
                let number = word.strip_prefix('R')?;
                number.parse().ok()
            },
        )
    }

    /// Where it branches or calls, if that is written in it.
    fn target(&self) -> Option<u64> {
        if !self.is("BRA") && !self.is("CALL") {
            return None;
        }
        let target = self.operands.last().and_then(|operand| operand.strip_prefix("0x"));
        let target = target.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        Some(target.unwrap_or_else(|| panic!("{:#x}: no target in {:?}", self.address, self.operands)))
    }

    /// Jumps to an address out of a register, by a table that a listing does not show: the `switch` over clipping's policies
    /// on sm_100 and sm_120.
    fn jumps_anywhere(&self) -> bool {
        self.is("BRX") || self.is("BRXU") || self.is("JMX") || self.is("JMXU")
    }

    /// A fence whose writes another block of the GPU may be waiting for; those of a block alone cost next to nothing.
    pub fn is_fence(&self) -> bool {
        self.is("MEMBAR") && !self.is("MEMBAR.CTA")
    }

    /// The first step of an integer division or remainder: the divisor to a float, rounded up.
    fn is_division_seed(&self) -> bool {
        self.is("I2F.RP") || self.is("UI2F.RP")
    }

    /// Of 64 bits.
    fn is_wide_division_seed(&self) -> bool {
        self.is_division_seed() && (self.is("I2F.U64") || self.is("I2F.S64"))
    }

    /// Whether it never continues at the next instruction.
    fn ends(&self) -> bool {
        let conditional = self.guarded || self.is("BRA.DIV") || (self.is("BRA") && self.operands.len() > 1);
        !conditional && (self.is("BRA") || self.is("EXIT") || self.is("RET") || self.jumps_anywhere())
    }
}

/// The instructions of a kernel, in the order of their addresses.
#[derive(Debug)]
pub struct Listing(Vec<Instruction>);

/// What paths from one instruction to another cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Barriers of the block, on the paths with the fewest.
    pub barriers: usize,
    /// Times that L1 is emptied, as after a fence that acquires, on those of these paths with the fewest.
    pub acquires: usize,
    /// f64 instructions on the one of those paths that has the fewest.
    pub least_fp64: usize,
    /// And on the one that has the most.
    pub most_fp64: usize,
    /// Fences for the whole GPU, on the one that has the fewest, and on the one that has the most.
    pub least_fences: usize,
    pub most_fences: usize,
    /// The waits for errors of earlier writes that go with fences, on the one that has the most.
    pub most_error_barriers: usize,
}

impl Cost {
    /// After one more instruction.
    fn with(self, instruction: &Instruction) -> Self {
        let one = |is: bool| usize::from(is);
        let fp64 = instruction.is_fp64();
        Self {
            barriers: self.barriers + one(instruction.is("BAR.SYNC")),
            acquires: self.acquires + one(instruction.is("CCTL.IVALL")),
            least_fp64: self.least_fp64 + one(fp64 && !instruction.guarded),
            most_fp64: self.most_fp64 + one(fp64),
            least_fences: self.least_fences + one(instruction.is_fence()),
            most_fences: self.most_fences + one(instruction.is_fence()),
            most_error_barriers: self.most_error_barriers + one(instruction.is("ERRBAR")),
        }
    }

    /// Of two ways to the same instruction.
    fn or(self, other: Self) -> Self {
        match (self.barriers, self.acquires).cmp(&(other.barriers, other.acquires)) {
            Ordering::Less => self,
            Ordering::Greater => other,
            Ordering::Equal => Self {
                least_fp64: self.least_fp64.min(other.least_fp64),
                most_fp64: self.most_fp64.max(other.most_fp64),
                least_fences: self.least_fences.min(other.least_fences),
                most_fences: self.most_fences.max(other.most_fences),
                most_error_barriers: self.most_error_barriers.max(other.most_error_barriers),
                ..self
            },
        }
    }
}

impl Listing {
    /// A kernel's code out of the output of `cuobjdump -sass`.
    pub fn of(kernel: &str, output: &str) -> Self {
        let function = |line: &str| line.trim().strip_prefix("Function : ").map(str::to_owned);
        let lines = output.lines().skip_while(|line| function(line).as_deref() != Some(kernel)).skip(1);
        let code = lines.take_while(|line| function(line).is_none()).filter_map(Instruction::parse).collect();
        Self(code)
    }

    pub fn instructions(&self) -> &[Instruction] {
        &self.0
    }

    /// How many instructions of a span are of some kind.
    pub fn count(&self, span: &Range<usize>, kind: impl Fn(&Instruction) -> bool) -> usize {
        self.0[span.clone()].iter().filter(|instruction| kind(instruction)).count()
    }

    fn index(&self, address: u64) -> Option<usize> {
        self.0.binary_search_by_key(&address, |instruction| instruction.address).ok()
    }

    /// The spans that a branch back closes; the longest of those that start at one instruction.
    pub fn loops(&self) -> Vec<Range<usize>> {
        let mut loops: Vec<Range<usize>> = Vec::new();
        for (end, instruction) in self.0.iter().enumerate() {
            let back = instruction.target().filter(|_| instruction.is("BRA"));
            let start = back.and_then(|address| self.index(address)).filter(|&start| start < end);
            let Some(start) = start else { continue };
            match loops.iter_mut().find(|known| known.start == start) {
                Some(known) => known.end = end + 1,
                None => loops.push(start..end + 1),
            }
        }
        loops
    }

    /// The loops of which `kind` holds and that lie in no other of which it does, by address.
    pub fn outermost(&self, kind: impl Fn(&Range<usize>) -> bool) -> Vec<Range<usize>> {
        let loops: Vec<_> = self.loops().into_iter().filter(kind).collect();
        let mut outermost: Vec<_> =
            loops.iter().filter(|inner| !loops.iter().any(|outer| lies_in(inner, outer))).cloned().collect();
        outermost.sort_by_key(|span| span.start);
        outermost
    }

    /// The 16-byte loads of a span that are issued before any of their results is used.
    pub fn loads_in_flight(&self, span: &Range<usize>) -> usize {
        let mut loaded: Vec<Range<u32>> = Vec::new();
        for instruction in &self.0[span.clone()] {
            let mut registers = instruction.registers();
            if instruction.is_vector_load() {
                let first = registers.next().expect("a load has a destination");
                loaded.push(first..first + 4);
            } else if registers.any(|register| loaded.iter().any(|quad| quad.contains(&register))) {
                break;
            }
        }
        loaded.len()
    }

    /// What the paths from one instruction to a later one cost that pass the fewest barriers, of those the ones that
    /// acquire least, and that go through each loop at most once. `None` if there is no path. Calls return; `BRA.DIV`, by
    /// which lanes that have lost each other do the same elsewhere, is not taken.
    pub fn straight_path(&self, from: usize, to: usize) -> Option<Cost> {
        let mut costs: Vec<Option<Cost>> = vec![None; to - from + 1];
        costs[0] = Some(Cost::default());
        for index in from..to {
            let Some(cost) = costs[index - from] else { continue };
            let instruction = &self.0[index];
            assert!(!instruction.jumps_anywhere(), "{:#x}: where this jumps is not known", instruction.address);
            let cost = cost.with(instruction);
            for successor in self.successors(index).filter(|&successor| successor > index && successor <= to) {
                let known = &mut costs[successor - from];
                *known = Some(known.map_or(cost, |known| known.or(cost)));
            }
        }
        costs.pop().flatten()
    }

    /// Where paths go on behind an instruction: calls return, but for those that are a way to the kernel's own code.
    fn successors(&self, index: usize) -> impl Iterator<Item = usize> {
        let instruction = &self.0[index];
        let is_call = instruction.is("CALL") && self.called(instruction).is_some();
        let taken = !is_call && !instruction.is("BRA.DIV");
        let jump = instruction.target().filter(|_| taken).and_then(|address| self.index(address));
        let next = (!instruction.ends()).then_some(index + 1);
        jump.into_iter().chain(next)
    }

    /// Instructions that are executed once round a loop, and once through each loop in it, by the shortest way that comes by an
    /// instruction of `some` kind and by none that is barred: of those by each such instruction the longest.
    pub fn once_round(
        &self,
        span: &Range<usize>,
        some: impl Fn(&Instruction) -> bool,
        is_barred: impl Fn(&Instruction) -> bool,
    ) -> Option<usize> {
        let last = span.len() - 1;
        let open: Vec<_> = self.0[span.clone()].iter().map(|code| !is_barred(code)).collect();
        let (mut after, mut before) = (vec![Vec::new(); span.len()], vec![Vec::new(); span.len()]);
        for index in (0..last).filter(|&index| open[index]) {
            let inside = self.successors(span.start + index).filter(|next| span.contains(next) && *next != span.start);
            for next in inside.map(|next| next - span.start).filter(|&next| open[next] || next == last) {
                after[index].push(next);
                before[next].push(index);
            }
        }
        let (to, from) = (steps(&after, 0), steps(&before, last));
        let by_one = (0..span.len()).filter(|&index| some(&self.0[span.start + index]));
        by_one.filter_map(|by| Some(to[by]? + from[by]? + 1)).max()
    }

    /// The innermost loops with a barrier of the block: the steps of a fold, if the kernel has folds. Not those that only what is
    /// behind `BRA.DIV`, at the end of the code, goes back by.
    pub fn loops_by_barriers(&self) -> Vec<Range<usize>> {
        let waits = |span: &Range<usize>| self.count(span, |code| code.is("BAR.SYNC")) > 0 && self.goes_round(span);
        let loops: Vec<_> = self.loops().into_iter().filter(waits).collect();
        loops.iter().filter(|outer| !loops.iter().any(|inner| lies_in(inner, outer))).cloned().collect()
    }

    /// Whether a path within a loop leads from its start to the branch back.
    fn goes_round(&self, span: &Range<usize>) -> bool {
        let (mut reached, mut seen) = (vec![span.start], vec![false; span.len()]);
        while let Some(index) = reached.pop() {
            if !std::mem::replace(&mut seen[index - span.start], true) {
                reached.extend(self.successors(index).filter(|next| span.contains(next)));
            }
        }
        seen.last() == Some(&true)
    }

    /// The function that an instruction calls: up to its first return. A call may also be a way back into the kernel's own
    /// code, which has no return before its end.
    fn called(&self, instruction: &Instruction) -> Option<Range<usize>> {
        let start = instruction.target().filter(|_| instruction.is("CALL")).and_then(|address| self.index(address))?;
        let length = self.0[start..].iter().position(|code| code.is("RET") || code.is("EXIT"))?;
        self.0[start + length].is("RET").then_some(start..start + length)
    }

    /// Integer divisions and remainders of a span by what is not known when it is compiled. Those of 64 bits call a
    /// function, and mostly have one of 32 bits beside it, for where these are enough.
    pub fn divisions(&self, span: &Range<usize>) -> usize {
        let called: Vec<_> = self.0.iter().filter_map(|code| self.called(code)).collect();
        let divides = |function: &Range<usize>| self.count(function, Instruction::is_wide_division_seed) > 0;
        let calls = self.count(span, |code| self.called(code).is_some_and(|function| divides(&function)));
        let in_place = span.clone().filter(|index| {
            self.0[*index].is_wide_division_seed() && !called.iter().any(|function| function.contains(index))
        });
        let narrow = self.count(span, |code| code.is_division_seed() && !code.is_wide_division_seed());
        narrow.max(calls + in_place.count())
    }
}

/// By how many edges each node can be reached from one.
fn steps(edges: &[Vec<usize>], from: usize) -> Vec<Option<usize>> {
    let mut steps = vec![None; edges.len()];
    steps[from] = Some(0);
    let mut reached = vec![from];
    for index in 0.. {
        let Some(&node) = reached.get(index) else { break };
        for &next in &edges[node] {
            if steps[next].is_none() {
                steps[next] = steps[node].map(|steps: usize| steps + 1);
                reached.push(next);
            }
        }
    }
    steps
}

/// Whether a span lies in another that is not the same.
pub fn lies_in(inner: &Range<usize>, outer: &Range<usize>) -> bool {
    inner != outer && outer.start <= inner.start && inner.end <= outer.end
}

/// The loops within another.
pub fn loops_in(code: &Listing, span: &Range<usize>) -> Vec<Range<usize>> {
    code.loops().into_iter().filter(|inner| lies_in(inner, span)).collect()
}
