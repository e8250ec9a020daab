//! A warp of 32 lanes: groups of lanes that are at one instruction, which part at branches and meet again where they come
//! to the same one. The ISA promises no more: lanes that must meet wait for one another at a shuffle or a barrier.

use crate::{
    arithmetic::{Lanes, SHARED_WINDOW},
    fault::FaultKind,
    global::Global,
    instruction::{Access, Instruction, Kernel, Operation, Register, Shuffle, Space, Special},
    line,
    order::Clock,
    shared::{self, Shared},
};
use std::sync::{Mutex, PoisonError};

pub(crate) const LANES: u32 = 32;

/// What a warp works on beside its registers.
pub(crate) struct Surroundings<'a> {
    pub kernel: &'a Kernel,
    pub parameters: &'a [u8],
    pub global: &'a mut Global,
    pub shared: &'a mut Shared,
    pub clock: &'a mut Clock,
    pub random: &'a mut fastrand::Rng,
    pub block: u32,
    /// Whether lanes that have parted go on one group after the other, rather than with the one that is furthest behind.
    pub stays_apart: bool,
}

/// Where and why a warp cannot go on.
pub(crate) struct Stop {
    pub line: u32,
    pub lane: Option<u32>,
    pub kind: FaultKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// It can run.
    No,
    Barrier,
    /// For lanes of its warp.
    Lanes,
}

#[derive(Clone, Copy, Debug)]
struct Group {
    next: usize,
    lanes: u32,
    wait: Wait,
}

/// A register in memory of its own, so that a result becomes one without being copied.
type Stored = Box<Lanes>;

/// Registers that are not in use, with the kernel whose literals they hold: they are large, and to make them would take longer
/// than a small launch.
static SPARE: Mutex<Vec<(u64, Vec<Stored>)>> = Mutex::new(Vec::new());
/// Two kernels that run in turns have as many warps at a time.
const SPARE_WARPS: usize = 48;

pub(crate) struct Warp {
    /// Its number.
    kernel: u64,
    pub first_thread: u32,
    registers: Vec<Stored>,
    /// What an instruction computes.
    result: Stored,
    /// The lanes in which a register has a value.
    defined: Vec<u32>,
    /// Of the others, those lanes whose lower half has one: nvcc packs a pair, and takes the first of it out again.
    lower_defined: Vec<u32>,
    groups: Vec<Group>,
    /// Lanes that there are, and those that have not ended.
    all: u32,
    alive: u32,
}

impl Drop for Warp {
    fn drop(&mut self) {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() == SPARE_WARPS {
            spare.remove(0);
        }
        spare.push((self.kernel, std::mem::take(&mut self.registers)));
    }
}

/// How many instructions a warp has run, and in how many lanes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    pub instructions: u64,
    pub lanes: u64,
    pub fences: u64,
}

impl Warp {
    pub fn new(kernel: &Kernel, first_thread: u32, threads: u32, block: u32, blocks: u32) -> Self {
        let registers = {
            let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
            let own = spare.iter().rposition(|&(of, _)| of == kernel.number);
            own.map(|index| spare.swap_remove(index).1)
        };
        let mut registers = registers.unwrap_or_else(|| {
            let mut registers: Vec<Stored> =
                kernel.register_names.iter().map(|_| Box::new([0; LANES as usize])).collect();
            for &(register, value) in &kernel.constants {
                *registers[register as usize] = [value; LANES as usize];
            }
            registers
        });
        // What is left in the others has no value.
        let defined = kernel.defined.clone();
        let lower_defined = vec![0; defined.len()];
        for &(register, special) in &kernel.special {
            *registers[register as usize] = std::array::from_fn(|lane| {
                u64::from(match special {
                    Special::Thread => first_thread + lane as u32,
                    Special::Block => block,
                    Special::Threads => threads,
                    Special::Blocks => blocks,
                    Special::Lane => lane as u32,
                    Special::Constant(value) => value as u32,
                })
            });
        }
        let all = u32::MAX >> (LANES - (threads - first_thread).min(LANES));
        let groups = vec![Group { next: 0, lanes: all, wait: Wait::No }];
        Self {
            kernel: kernel.number,
            first_thread,
            registers,
            result: Box::new([0; LANES as usize]),
            defined,
            lower_defined,
            groups,
            all,
            alive: all,
        }
    }

    pub fn has_ended(&self) -> bool {
        self.alive == 0
    }

    pub fn can_run(&self) -> bool {
        self.groups.iter().any(|group| group.wait == Wait::No)
    }

    /// Whether all its lanes have come to a barrier, and none has ended.
    pub fn is_at_barrier(&self) -> bool {
        self.alive == self.all
            && matches!(self.groups[..], [Group { wait: Wait::Barrier, lanes, .. }] if lanes == self.all)
    }

    pub fn pass_barrier(&mut self) {
        self.groups[0].next += 1;
        self.groups[0].wait = Wait::No;
    }

    /// How many threads are where: for an error.
    pub fn places(&self, kernel: &Kernel) -> Vec<(String, u32)> {
        let mut places: Vec<(String, u32)> = self
            .groups
            .iter()
            .map(|group| {
                let line = kernel.code.get(group.next).map_or(0, |instruction| instruction.line);
                let place = match group.wait {
                    Wait::No => format!("are at line {line}"),
                    Wait::Barrier => format!("wait at the barrier in line {line}"),
                    Wait::Lanes => format!("wait for others of their warp in line {line}"),
                };
                (place, group.lanes.count_ones())
            })
            .collect();
        let ended = (self.all & !self.alive).count_ones();
        if ended > 0 {
            places.push(("have ended".to_owned(), ended));
        }
        places
    }

    /// The group that goes on.
    fn choose(&self, around: &mut Surroundings) -> Option<usize> {
        let mut ready = (0..self.groups.len()).filter(|&index| self.groups[index].wait == Wait::No);
        // Now and then another than the one furthest behind, which may wait for it: each makes progress.
        if around.stays_apart || (self.groups.len() > 1 && around.random.u8(..) < 16) {
            let count = ready.clone().count();
            return if count == 0 { None } else { ready.nth(around.random.usize(..count)) };
        }
        ready.min_by_key(|&index| self.groups[index].next)
    }

    /// Joins a group with others that are where it is; gives back its place.
    fn meet(&mut self, mut index: usize) -> usize {
        let mut other = 0;
        while other < self.groups.len() {
            let (here, there) = (self.groups[index], self.groups[other]);
            if other != index && here.next == there.next && here.wait == there.wait {
                self.groups[index].lanes |= there.lanes;
                // Whoever waits for more lanes looks again.
                if here.wait == Wait::Lanes {
                    self.groups[index].wait = Wait::No;
                }
                self.groups.swap_remove(other);
                if index == self.groups.len() {
                    index = other;
                }
                other = 0;
            } else {
                other += 1;
            }
        }
        index
    }

    /// Runs up to so many instructions, or until all lanes wait.
    pub fn run(&mut self, around: &mut Surroundings, budget: u32, work: &mut Work) -> Result<(), Stop> {
        let Some(mut current) = self.choose(around) else { return Ok(()) };
        for _ in 0..budget {
            let group = self.groups[current];
            let Some(instruction) = around.kernel.code.get(group.next) else {
                let line = around.kernel.code.last().map_or(0, |last| last.line);
                let what = "the code ends without `ret`".to_owned();
                return Err(Stop { line, lane: None, kind: FaultKind::Divergent { waits: what } });
            };
            work.instructions += 1;
            let stop = |(lane, kind)| Stop { line: instruction.line, lane, kind };
            let lanes = self.guarded(instruction, group.lanes, around.kernel).map_err(stop)?;
            work.lanes += u64::from(lanes.count_ones());
            if instruction.operation.is_fence() {
                work.fences += u64::from(lanes.count_ones());
            }
            let here = &mut self.groups[current];
            here.next += 1;
            let meets = matches!(
                instruction.operation,
                Operation::Barrier | Operation::WarpBarrier { .. } | Operation::Shuffle { .. }
            );
            if meets && lanes != 0 && lanes != group.lanes {
                // Those whose guard is false go on.
                here.lanes = lanes;
                let others = Group { next: here.next, lanes: group.lanes & !lanes, wait: Wait::No };
                self.groups.push(others);
            }
            let here = &mut self.groups[current];
            match &instruction.operation {
                Operation::Branch { target } => {
                    if lanes == group.lanes {
                        here.next = *target;
                    } else if lanes != 0 {
                        here.lanes = group.lanes & !lanes;
                        self.groups.push(Group { next: *target, lanes, wait: Wait::No });
                    }
                }
                Operation::Exit => {
                    here.lanes &= !lanes;
                    self.alive &= !lanes;
                    if here.lanes == 0 {
                        self.groups.swap_remove(current);
                        if self.groups.is_empty() {
                            return Ok(());
                        }
                        current = 0;
                    }
                }
                Operation::Barrier if lanes != 0 => {
                    here.next -= 1;
                    here.wait = Wait::Barrier;
                }
                operation @ (Operation::Shuffle { members, .. } | Operation::WarpBarrier { members }) if lanes != 0 => {
                    let lane = lanes.trailing_zeros();
                    let members = self.read(*members, lanes, around.kernel).map_err(stop)?[lane as usize] as u32;
                    if members & !lanes & self.alive != 0 {
                        let here = &mut self.groups[current];
                        here.next -= 1;
                        here.wait = Wait::Lanes;
                    } else {
                        self.together(operation, lanes, members, around.kernel).map_err(stop)?;
                    }
                }
                operation if lanes != 0 => self.execute(operation, lanes, around).map_err(stop)?,
                _ => {}
            }
            if self.groups.len() > 1 || self.groups[0].wait != Wait::No {
                current = self.meet(current);
                if self.groups[current].wait != Wait::No || !around.stays_apart {
                    match self.choose(around) {
                        Some(next) => current = next,
                        None if self.groups.len() == 1 && self.groups[0].wait == Wait::Barrier => return Ok(()),
                        None => {
                            let waits = join(self.places(around.kernel));
                            return Err(stop((
                                None,
                                FaultKind::Divergent {
                                    waits: format!("of the warp of thread {}, {waits}", self.first_thread),
                                },
                            )));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The lanes of a group that run a guarded instruction.
    fn guarded(&self, instruction: &Instruction, lanes: u32, kernel: &Kernel) -> Result<u32, (Option<u32>, FaultKind)> {
        let Some((register, negated)) = instruction.guard else { return Ok(lanes) };
        let values = self.read(register, lanes, kernel)?;
        let truth = values.iter().enumerate().fold(0, |all, (lane, &value)| all | (u32::from(value != 0) << lane));
        Ok(lanes & if negated { !truth } else { truth })
    }

    /// A register that must have a value in these lanes.
    fn read(&self, register: Register, lanes: u32, kernel: &Kernel) -> Result<&Lanes, (Option<u32>, FaultKind)> {
        let missing = lanes & !self.defined[register as usize];
        if missing != 0 {
            let name = kernel.register_names[register as usize].clone();
            return Err((Some(missing.trailing_zeros()), FaultKind::UninitialisedRegister { name }));
        }
        Ok(&self.registers[register as usize])
    }

    fn write(&mut self, register: Register, lanes: u32, values: &Lanes) {
        blend(&mut self.registers[register as usize], values, lanes);
        self.defined[register as usize] |= lanes;
    }

    /// Everything but what changes the way of the lanes.
    fn execute(
        &mut self,
        operation: &Operation,
        lanes: u32,
        around: &mut Surroundings,
    ) -> Result<(), (Option<u32>, FaultKind)> {
        let kernel = around.kernel;
        match operation {
            Operation::Compute { function, to, from } => {
                let [a, b, c] = from.map(|register| register as usize);
                if lanes & !(self.defined[a] & self.defined[b] & self.defined[c]) != 0 {
                    for register in from {
                        self.read(*register, lanes, kernel)?;
                    }
                }
                function(&self.registers[a], &self.registers[b], &self.registers[c], &mut self.result);
                let (number, result) = (*to as usize, &mut self.result);
                let to = &mut self.registers[number];
                if lanes == u32::MAX {
                    std::mem::swap(to, result);
                } else {
                    blend(to, result, lanes);
                }
                self.defined[number] |= lanes;
            }
            Operation::Pack { to, from, bits } => {
                let mut result = [0; LANES as usize];
                let mut without_upper = 0;
                for (index, &register) in from.iter().enumerate() {
                    if index > 0 && index + 1 == from.len() {
                        without_upper = lanes & !self.defined[register as usize];
                    } else {
                        self.read(register, lanes, kernel)?;
                    }
                    let part = &self.registers[register as usize];
                    for (result, part) in result.iter_mut().zip(part.iter()) {
                        *result |= (part & (u64::MAX >> (64 - bits))) << (*bits * index as u32);
                    }
                }
                let to = *to as usize;
                self.write(to as Register, lanes, &result);
                self.defined[to] &= !without_upper;
                self.lower_defined[to] = if from.len() == 2 { without_upper } else { 0 };
            }
            Operation::Lower { to, from } => {
                if lanes & !self.lower_defined[*from as usize] != 0 {
                    self.read(*from, lanes & !self.lower_defined[*from as usize], kernel)?;
                }
                let lower = self.registers[*from as usize].map(|whole| whole & 0xffff_ffff);
                self.write(*to, lanes, &lower);
            }
            Operation::Unpack { to, from, bits } => {
                let whole = *self.read(*from, lanes, kernel)?;
                for (index, register) in to.iter().enumerate() {
                    let Some(register) = register else { continue };
                    let part = whole.map(|whole| whole >> (*bits * index as u32) & (u64::MAX >> (64 - bits)));
                    self.write(*register, lanes, &part);
                }
            }
            Operation::Load { access, coherent, to, used_bytes } => {
                self.load(*access, *coherent, to, *used_bytes, lanes, around)?
            }
            Operation::Store { access, from } => {
                let base = *self.read(access.base, lanes, kernel)?;
                for &register in from {
                    self.read(register, lanes, kernel)?;
                }
                for lane in each(lanes) {
                    let mut bytes = [0; 16];
                    for (index, &register) in from.iter().enumerate() {
                        let value = self.registers[register as usize][lane as usize].to_le_bytes();
                        let (start, width) = (index * access.width as usize, access.width as usize);
                        bytes[start..start + width].copy_from_slice(&value[..width]);
                    }
                    let bytes = &bytes[..(access.width * access.count) as usize];
                    let thread = (self.first_thread + lane) as u16;
                    let stored = match place(*access, base[lane as usize], thread, around) {
                        Target::Global(place) => around.global.store(place, bytes, around.clock),
                        Target::Shared(place) => around.shared.store(place, bytes),
                        Target::Parameters(address) => Err(FaultKind::NotWritable { address }),
                    };
                    stored.map_err(|kind| (Some(lane), kind))?;
                }
            }
            Operation::Atomic { access, change, order, to, by } => {
                let (base, by) = (*self.read(access.base, lanes, kernel)?, *self.read(*by, lanes, kernel)?);
                let mut old = [0; LANES as usize];
                // In which order the lanes of one instruction come is nobody's promise.
                let first = around.random.u32(..LANES);
                for lane in (0..LANES).map(|lane| (lane + first) % LANES).filter(|lane| lanes >> lane & 1 != 0) {
                    let thread = (self.first_thread + lane) as u16;
                    let at = lane as usize;
                    let changed = match place(*access, base[at], thread, around) {
                        Target::Global(place) => around.global.atomic(place, *change, by[at], *order, around.clock),
                        Target::Shared(place) => {
                            around.shared.atomic(place, |old| change.of(old, by[at], access.width))
                        }
                        Target::Parameters(address) => Err(FaultKind::NotWritable { address }),
                    };
                    old[at] = changed.map_err(|kind| (Some(lane), kind))?;
                }
                if let Some(to) = to {
                    self.write(*to, lanes, &old);
                }
            }
            Operation::Fence => {
                for lane in each(lanes) {
                    around.global.fence(around.block, (self.first_thread + lane) as u16, around.clock);
                }
            }
            Operation::Prefetch { access } => {
                let base = *self.read(access.base, lanes, kernel)?;
                for lane in each(lanes) {
                    let Target::Global(place) = place(*access, base[lane as usize], 0, around) else { continue };
                    around.global.check(place).map_err(|kind| (Some(lane), kind))?;
                }
            }
            Operation::BlockFence => {}
            Operation::Branch { .. }
            | Operation::Exit
            | Operation::Barrier
            | Operation::WarpBarrier { .. }
            | Operation::Shuffle { .. } => {
                unreachable!("changes the way of the lanes")
            }
        }
        Ok(())
    }

    fn load(
        &mut self,
        access: Access,
        coherent: bool,
        to: &[Register],
        used_bytes: u64,
        lanes: u32,
        around: &mut Surroundings,
    ) -> Result<(), (Option<u32>, FaultKind)> {
        let base = *self.read(access.base, lanes, around.kernel)?;
        let total = access.width * access.count;
        let mut results = [[0; LANES as usize]; 4];
        // By lane, bytes without a value, which the kernel may carry about but not use.
        let mut missing = [0; LANES as usize];
        for lane in each(lanes) {
            let mut bytes = [0; 16];
            let bytes = &mut bytes[..total as usize];
            let thread = (self.first_thread + lane) as u16;
            let loaded = match place(access, base[lane as usize], thread, around) {
                Target::Global(place) => around.global.load(place, used_bytes, coherent, around.clock, bytes),
                Target::Shared(place) => around.shared.load(place, used_bytes, bytes),
                Target::Parameters(address) => parameter(around.parameters, address, bytes).map(|()| 0),
            };
            let without_value = loaded.map_err(|kind| (Some(lane), kind))?;
            if without_value != 0 {
                missing[lane as usize] = without_value;
            }
            for (index, element) in bytes.chunks_exact(access.width as usize).enumerate() {
                let mut word = [0; 8];
                word[..element.len()].copy_from_slice(element);
                results[index][lane as usize] = u64::from_le_bytes(word);
            }
        }
        let element = u64::MAX >> (64 - access.width);
        for (index, &register) in to.iter().enumerate() {
            self.write(register, lanes, &results[index]);
            for lane in
                each(lanes).filter(|&lane| missing[lane as usize] >> (index as u64 * access.width) & element != 0)
            {
                self.defined[register as usize] &= !(1 << lane);
                self.lower_defined[register as usize] = 0;
            }
        }
        Ok(())
    }

    /// PTX ISA, "bar.warp.sync" and "shfl.sync". All lanes of `members` are here.
    fn together(
        &mut self,
        operation: &Operation,
        lanes: u32,
        members: u32,
        kernel: &Kernel,
    ) -> Result<(), (Option<u32>, FaultKind)> {
        let (Operation::Shuffle { members: mask, .. } | Operation::WarpBarrier { members: mask }) = operation else {
            return Ok(());
        };
        let fault = |lane: u32, what: String| (Some(lane), FaultKind::Shuffle { what });
        if let Some(lane) = each(members & !lanes).next() {
            return Err(fault(lane, format!("the mask {members:#x} names lane {lane}, which does not come")));
        }
        let masks = self.read(*mask, lanes, kernel)?;
        if let Some(lane) = each(lanes).find(|&lane| masks[lane as usize] as u32 != members) {
            return Err(fault(
                lane,
                format!("lane {lane} gives the mask {:#x}, others {members:#x}", masks[lane as usize]),
            ));
        }
        if let Some(lane) = each(lanes & !members).next() {
            return Err(fault(lane, format!("lane {lane} is not in its mask {members:#x}")));
        }
        let Operation::Shuffle { mode, to, valid, value, by, clamp, .. } = operation else { return Ok(()) };
        let (values, by, clamp) =
            (self.read(*value, lanes, kernel)?, self.read(*by, lanes, kernel)?, self.read(*clamp, lanes, kernel)?);
        let (mut results, mut inside) = ([0; LANES as usize], [0; LANES as usize]);
        for lane in each(lanes) {
            let at = lane as usize;
            let (by, limit, segment) = (by[at] as u32 & 31, clamp[at] as u32 & 31, clamp[at] as u32 >> 8 & 31);
            let last = (lane & segment) | (limit & !segment);
            let first = lane & segment;
            let (source, is_inside) = match mode {
                Shuffle::Up => (lane.wrapping_sub(by), lane.cast_signed() - by.cast_signed() >= last.cast_signed()),
                Shuffle::Down => (lane + by, lane + by <= last),
                Shuffle::Butterfly => (lane ^ by, lane ^ by <= last),
                Shuffle::Index => (first | (by & !segment), first | (by & !segment) <= last),
            };
            let source = if is_inside { source } else { lane };
            if members >> source & 1 == 0 {
                return Err(fault(
                    lane,
                    format!("lane {lane} reads lane {source}, which is not in the mask {members:#x}"),
                ));
            }
            (results[at], inside[at]) = (values[source as usize], u64::from(is_inside));
        }
        let (to, valid) = (*to, *valid);
        self.write(to, lanes, &results);
        if let Some(valid) = valid {
            self.write(valid, lanes, &inside);
        }
        Ok(())
    }
}

/// Sets these lanes of a register.
fn blend(to: &mut Lanes, values: &Lanes, lanes: u32) {
    for lane in 0..LANES as usize {
        to[lane] = if lanes >> lane & 1 != 0 { values[lane] } else { to[lane] };
    }
}

/// The numbers of lanes.
fn each(mut lanes: u32) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let lane = (lanes != 0).then(|| lanes.trailing_zeros())?;
        lanes &= lanes - 1;
        Some(lane)
    })
}

/// "3 threads wait there, 29 have ended".
pub(crate) fn join(places: Vec<(String, u32)>) -> String {
    let mut all: Vec<(String, u32)> = Vec::new();
    for (place, count) in places {
        match all.iter_mut().find(|(known, _)| *known == place) {
            Some((_, total)) => *total += count,
            None => all.push((place, count)),
        }
    }
    all.iter().map(|(place, count)| format!("{count} threads {place}")).collect::<Vec<_>>().join(", ")
}

enum Target {
    Global(line::Place),
    Shared(shared::Place),
    Parameters(u64),
}

/// What a lane accesses.
fn place(access: Access, base: u64, thread: u16, around: &Surroundings) -> Target {
    let address = base.wrapping_add_signed(access.offset);
    let bytes = access.width * access.count;
    let shared = |address| Target::Shared(shared::Place { address, bytes, thread, epoch: around.clock.epoch() });
    match access.space {
        Space::Parameters => Target::Parameters(address),
        // An address of 32 bits, and the sum with an offset one as well; a generic address is none.
        Space::Shared if base <= u64::from(u32::MAX) => shared(address & 0xffff_ffff),
        Space::Shared => shared(base),
        Space::Generic if address & SHARED_WINDOW != 0 && address < SHARED_WINDOW << 1 => {
            shared(address - SHARED_WINDOW)
        }
        Space::Global | Space::Generic => Target::Global(line::Place { address, bytes, block: around.block, thread }),
    }
}

fn parameter(parameters: &[u8], address: u64, to: &mut [u8]) -> Result<(), FaultKind> {
    let bytes = to.len() as u64;
    if !address.is_multiple_of(bytes) {
        return Err(FaultKind::Misaligned { address, bytes });
    }
    let found = usize::try_from(address).ok().and_then(|start| parameters.get(start..start.checked_add(to.len())?));
    to.copy_from_slice(found.ok_or(FaultKind::OutOfBounds { address, bytes })?);
    Ok(())
}
