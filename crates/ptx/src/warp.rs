//! A warp of 32 lanes: groups of lanes that are at one instruction, which part at branches and meet again where they come
//! to the same one. The ISA promises no more: lanes that must meet wait for one another at a shuffle or a barrier.

mod execute;

use crate::{
    arithmetic::Lanes,
    fault::FaultKind,
    global::Global,
    instruction::{Instruction, Kernel, Operation, Register, Special},
    launch::Statistics,
    order::Clock,
    shared::Shared,
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
/// Ten kernels that run in turns, each on three blocks, have as many warps at a time. To make one anew takes as long as it
/// runs for a small tensor.
const SPARE_WARPS: usize = 256;

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
    pub fn run(&mut self, around: &mut Surroundings, budget: u32, work: &mut Statistics) -> Result<(), Stop> {
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
            work.lane_instructions += u64::from(lanes.count_ones());
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
}

/// Sets these lanes of a register.
fn blend(to: &mut Lanes, values: &Lanes, lanes: u32) {
    for lane in 0..LANES as usize {
        to[lane] = if lanes >> lane & 1 != 0 { values[lane] } else { to[lane] };
    }
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
