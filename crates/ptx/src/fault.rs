//! What is wrong with a launch, and where.

use std::fmt;
use thiserror::Error;

/// PTX that is not understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("line {line} of the PTX: {what}")]
pub struct SourceError {
    /// Counted from 1.
    pub line: u32,
    /// In words.
    pub what: String,
}

impl SourceError {
    pub(crate) fn new(line: u32, what: impl Into<String>) -> Self {
        Self { line, what: what.into() }
    }
}

/// Why a launch did not end well.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The module has no kernel of this name.
    #[error("there is no kernel {name:?} in the PTX, which has {}", known.join(", "))]
    NoEntry {
        /// The name asked for.
        name: String,
        /// Those that are there.
        known: Vec<String>,
    },
    /// Not the parameters of the kernel.
    #[error("{kernel} takes parameters of {expected:?} bytes, not {given:?}")]
    Parameters {
        /// Its name.
        kernel: String,
        /// The bytes of each parameter.
        expected: Vec<u64>,
        /// And those given.
        given: Vec<u64>,
    },
    /// More threads than the kernel allows, or none.
    #[error("{kernel} cannot run with {threads} threads a block: it has 1 to {limit}")]
    Threads {
        /// Its name.
        kernel: String,
        /// Threads asked for.
        threads: u32,
        /// At most.
        limit: u32,
    },
    /// Something that no kernel may do.
    #[error(transparent)]
    Fault(Box<Fault>),
}

/// Something that no kernel may do, and where it was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kernel's name.
    pub kernel: String,
    /// In the PTX, counted from 1; 0 where no line is to blame.
    pub line: u32,
    /// The block.
    pub block: u32,
    /// The first of its threads that did it; `None` where no thread is to blame.
    pub thread: Option<u32>,
    /// What it was.
    pub kind: FaultKind,
    /// Of the launch: with it the same happens again.
    pub seed: u64,
}

impl std::error::Error for Fault {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, line, block, thread, kind, seed } = self;
        write!(f, "{kernel}, ")?;
        if *line > 0 {
            write!(f, "line {line}, ")?;
        }
        write!(f, "block {block}")?;
        if let Some(thread) = thread {
            write!(f, ", thread {thread}")?;
        }
        write!(f, ": {kind} (seed {seed})")
    }
}

/// The thread of a race, or several.
fn threads(thread: u16) -> String {
    if thread == crate::order::SEVERAL { "several threads".to_owned() } else { format!("thread {thread}") }
}

/// What no kernel may do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FaultKind {
    /// Memory that is no allocation's, or reaches over its end.
    #[error("out of bounds: {bytes} bytes at {address:#x} are in no allocation")]
    OutOfBounds {
        /// The first byte.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// An address that is no multiple of what is accessed there.
    #[error("misaligned: {bytes} bytes at {address:#x}")]
    Misaligned {
        /// The first byte.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// Memory that was never written.
    #[error("uninitialised: {bytes} bytes at {address:#x} have no value")]
    Uninitialised {
        /// The first byte.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// A register that was never written.
    #[error("uninitialised: the register {name} has no value")]
    UninitialisedRegister {
        /// Its name.
        name: String,
    },
    /// A store to memory that was lent for reading.
    #[error("not writable: {address:#x} was lent for reading")]
    NotWritable {
        /// Where.
        address: u64,
    },
    /// Read through the read-only path (`ld.global.nc`) and written in one launch (PTX ISA, "ld.global.nc": "the memory … is
    /// read-only for the duration of the kernel").
    #[error("read-only memory written: {address:#x} is read by ld.global.nc and written in the same launch")]
    ReadOnlyWritten {
        /// Where.
        address: u64,
    },
    /// Two accesses to shared memory between two barriers, of which one writes.
    #[error("race in shared memory: {now} at {address:#x} and {before} of {} with no barrier between", threads(*thread))]
    SharedRace {
        /// The place in shared memory.
        address: u64,
        /// What is done now.
        now: &'static str,
        /// What was done.
        before: &'static str,
        /// By whom; 65535 stands for several.
        thread: u16,
    },
    /// Two accesses to global memory that nothing orders, of which one writes.
    #[error(
        "race in global memory: {now} at {address:#x} and {before} of {} of block {block}, which nothing orders",
        threads(*thread)
    )]
    GlobalRace {
        /// Where.
        address: u64,
        /// What is done now.
        now: &'static str,
        /// What was done.
        before: &'static str,
        /// By which block.
        block: u32,
        /// And thread; 65535 stands for several.
        thread: u16,
    },
    /// Not all threads of a warp come to a barrier or shuffle together, or some of a block never come.
    #[error("divergent: {waits}")]
    Divergent {
        /// Who waits where.
        waits: String,
    },
    /// A shuffle whose mask does not hold those who run it, or that reads a lane outside of it (PTX ISA, "shfl.sync":
    /// "the behavior is undefined").
    #[error("shuffle: {what}")]
    Shuffle {
        /// In words.
        what: String,
    },
    /// What a releasing atomic operation counted up was not set back.
    #[error("a counter, {address:#x}, was {before} before the launch and is {after} after it")]
    Counter {
        /// Where.
        address: u64,
        /// Before.
        before: u64,
        /// After.
        after: u64,
    },
    /// The launch took more instructions than it was given.
    #[error("it does not end: after {instructions} instructions of warps, {waits}")]
    NeverEnds {
        /// Of warps.
        instructions: u64,
        /// Where its threads are.
        waits: String,
    },
}
