//! Runs the blocks of a launch, some at a time, in turns that a seed decides.

use crate::{
    fault::{Error, Fault, FaultKind},
    global::Global,
    instruction::Kernel,
    order::Clock,
    shared::Shared,
    warp::{LANES, Stop, Surroundings, Warp, join},
};
use std::{cell::RefCell, collections::BTreeSet};

/// Blocks that run in turns, at most.
const RESIDENT_BLOCKS: usize = 6;

/// How a launch runs, and what it is held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which block and warp comes when, what a load finds that may find several values, and which lanes go first.
    pub seed: u64,
    /// Races, in shared and global memory, are errors.
    pub checks_races: bool,
    /// What a block stores is seen by others only after a release at the scope of the device or its end, and loads may find
    /// older values than the last. Otherwise everything is seen at once.
    pub is_adversarial: bool,
    /// Instructions of warps after which a launch is given up.
    pub limit: u64,
}

impl Default for Options {
    /// Seed 0, all checks, and time for 2^32 elements.
    fn default() -> Self {
        Self { seed: 0, checks_races: true, is_adversarial: true, limit: 1 << 34 }
    }
}

/// What launches have done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Launches.
    pub launches: u64,
    /// Different seeds among them.
    pub seeds: u64,
    /// Instructions of warps.
    pub instructions: u64,
    /// Instructions of threads: each instruction of a warp counts the lanes in which it ran.
    pub lane_instructions: u64,
    /// Times that a thread waited for its writes to be seen by the whole GPU: fences, and atomic operations that release.
    pub fences: u64,
}

thread_local! {
    static TOTAL: RefCell<(Statistics, BTreeSet<u64>)> = RefCell::default();
}

/// Of all launches of this thread until now: tests run side by side.
pub fn total() -> Statistics {
    TOTAL.with_borrow(|(total, seeds)| Statistics { seeds: seeds.len() as u64, ..*total })
}

struct Block {
    index: u32,
    warps: Vec<Warp>,
    shared: Shared,
    clock: Clock,
}

impl Kernel {
    /// Threads that a block of it may have: what it was compiled for.
    pub fn max_threads(&self) -> u32 {
        self.max_threads
    }

    /// Runs `blocks` blocks of `threads` threads, each parameter given by its bytes, and returns when all have ended.
    ///
    /// # Safety
    /// Memory that [`crate::memory`] was told of must be there, and used by nobody else while the kernel may use it.
    ///
    /// # Errors
    /// Parameters or threads that are not the kernel's; the first thing that no kernel may do.
    pub unsafe fn launch(
        &self,
        blocks: u32,
        threads: u32,
        parameters: &[&[u8]],
        options: Options,
    ) -> Result<Statistics, Error> {
        let given: Vec<u64> = parameters.iter().map(|bytes| bytes.len() as u64).collect();
        let expected: Vec<u64> = self.parameter_bytes().collect();
        if given != expected {
            return Err(Error::Parameters { kernel: self.name.clone(), expected, given });
        }
        if threads == 0 || threads > self.max_threads {
            return Err(Error::Threads { kernel: self.name.clone(), threads, limit: self.max_threads });
        }
        let end = self.parameters.last().map_or(0, |&(place, bytes)| place + bytes);
        let mut bytes = vec![0; end as usize];
        for (&(place, length), given) in self.parameters.iter().zip(parameters) {
            bytes[place as usize..(place + length) as usize].copy_from_slice(given);
        }
        let mut work = Statistics { launches: 1, seeds: 1, ..Statistics::default() };
        let result = self.run(blocks, threads, &bytes, options, &mut work);
        TOTAL.with_borrow_mut(|(total, seeds)| {
            total.launches += 1;
            seeds.insert(options.seed);
            total.instructions += work.instructions;
            total.lane_instructions += work.lane_instructions;
            total.fences += work.fences;
        });
        result.map_err(|fault| Error::Fault(Box::new(fault)))?;
        Ok(work)
    }

    fn run(
        &self,
        blocks: u32,
        threads: u32,
        parameters: &[u8],
        options: Options,
        work: &mut Statistics,
    ) -> Result<(), Fault> {
        let mut random = fastrand::Rng::with_seed(options.seed);
        let mut global = Global::new(random.u64(..), options.checks_races, options.is_adversarial);
        let stays_apart = random.bool();
        let resident = random.usize(2..=RESIDENT_BLOCKS);
        let mut waiting: Vec<u32> = (0..blocks).collect();
        random.shuffle(&mut waiting);
        let mut running: Vec<Block> = Vec::new();
        let mut spare: Vec<Shared> = Vec::new();
        loop {
            while running.len() < resident
                && let Some(index) = waiting.pop()
            {
                let mut shared = spare.pop().unwrap_or_default();
                shared.reset(self.shared_bytes, options.checks_races);
                let warps = (0..threads).step_by(LANES as usize);
                let warps = warps.map(|first| Warp::new(self, first, threads, index, blocks)).collect();
                running.push(Block { index, warps, shared, clock: Clock::new(index) });
            }
            if running.is_empty() {
                break;
            }
            let turn = random.usize(..running.len());
            let block = &mut running[turn];
            let fault = |block: &Block, first_thread: u32, stop: Stop| Fault {
                kernel: self.name.clone(),
                line: stop.line,
                block: block.index,
                thread: stop.lane.map(|lane| first_thread + lane),
                kind: stop.kind,
                seed: options.seed,
            };
            let ready = block.warps.iter().filter(|warp| warp.can_run()).count();
            if ready > 0 {
                let number = random.usize(..ready);
                let Some(index) = (0..block.warps.len()).filter(|&w| block.warps[w].can_run()).nth(number) else {
                    continue;
                };
                let budget = 1 << random.u32(..10);
                let Block { index: number, warps, shared, clock } = block;
                let mut around = Surroundings {
                    kernel: self,
                    parameters,
                    global: &mut global,
                    shared,
                    clock,
                    random: &mut random,
                    block: *number,
                    stays_apart,
                };
                let first_thread = warps[index].first_thread;
                warps[index].run(&mut around, budget, work).map_err(|stop| fault(block, first_thread, stop))?;
            } else if block.warps.iter().all(Warp::has_ended) {
                let block = running.swap_remove(turn);
                global.publish_all(block.index);
                spare.push(block.shared);
            } else if block.warps.iter().all(Warp::is_at_barrier) {
                block.clock.barrier();
                block.shared.begin(block.clock.epoch());
                block.warps.iter_mut().for_each(Warp::pass_barrier);
            } else {
                let kind = FaultKind::Divergent { waits: self.waits(block) };
                return Err(fault(block, 0, Stop { line: 0, lane: None, kind }));
            }
            if work.instructions > options.limit
                && let Some(block) = running.first()
            {
                let kind = FaultKind::NeverEnds { instructions: work.instructions, waits: self.waits(block) };
                return Err(fault(block, 0, Stop { line: 0, lane: None, kind }));
            }
        }
        match global.changed_counter() {
            Some(kind) => {
                Err(Fault { kernel: self.name.clone(), line: 0, block: 0, thread: None, kind, seed: options.seed })
            }
            None => Ok(()),
        }
    }

    fn waits(&self, block: &Block) -> String {
        join(block.warps.iter().flat_map(|warp| warp.places(self)).collect())
    }
}
