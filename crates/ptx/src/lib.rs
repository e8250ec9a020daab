//! Runs PTX on the host: what a CUDA compiler made of a kernel, rather than what a C++ compiler makes of its source.
//!
//! Memory is that of the process. A launch is checked while it runs: accesses outside of allocations, misaligned, to what
//! has no value; races in shared memory between barriers and in global memory that no release and acquire order; barriers
//! and shuffles that not all threads reach; counters that are not set back; and it ends with an error at the first of them,
//! which names kernel, line, block and thread. Memory is adversarial (see [`Options::is_adversarial`]): nothing that the
//! ISA leaves open happens in the friendliest way. Blocks and warps run in turns by a seed; results must not depend on it.
//!
//! It is stricter than the ISA where that is silent or leaves a result open, and nobody should rely on it:
//!
//! * Threads that have ended do not count at a barrier ("barrier" counts those "in the CTA").
//! * A prefetch must be of memory that is there ("prefetch" is a hint).
//! * What a releasing operation counts up must be set back by the end of the launch.
//! * A register or byte may be loaded without a value, but nothing done with it; one may be packed with a register before it, of
//!   which alone is taken again.
//! * What several threads of a block read, or changed atomically, between two barriers comes before another access only by
//!   what orders all of them: a barrier. Atomic operations at the scope of a block order nothing.
//! * A shuffle, and a barrier of a warp, takes one mask of all its lanes, none of which has ended; such a barrier orders no
//!   accesses to memory.
//!
//! It is laxer in two things. Of a vector that is loaded whole nvcc says by `.pragma "used_bytes_mask"` which bytes it wants,
//! and the others may have no value. And types are not held against the registers' declarations, which ptxas does.
//!
//! It shows nothing of what the assembler makes of the PTX, nor of time: machine code may keep fewer promises than PTX if
//! the assembler is wrong, and only a GPU shows how it runs. Local memory, functions that call others, textures and
//! asynchronous copies are not understood: a kernel that has them is an error that names the line.
#![allow(unsafe_code, reason = "kernels name memory by its address")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "registers are bits; an instruction reads as many as it says"
)]

mod arithmetic;
mod calls;
pub mod fatbin;
mod fault;
mod global;
mod instruction;
mod launch;
mod line;
pub mod memory;
mod order;
mod parse;
mod shared;
mod warp;

pub use fault::{Error, Fault, FaultKind, SourceError};
pub use instruction::Kernel;
pub use launch::{Options, Statistics, total};

/// The kernels of a text of PTX.
#[derive(Debug)]
pub struct Module {
    kernels: Vec<Kernel>,
}

impl Module {
    /// Reads PTX.
    ///
    /// # Errors
    /// What is not understood, with its line.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        Ok(Self { kernels: instruction::kernels(text)? })
    }

    /// All of them, in the order of the text.
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// [`Error::NoEntry`].
    pub fn kernel(&self, name: &str) -> Result<&Kernel, Error> {
        self.kernels.iter().find(|kernel| kernel.name() == name).ok_or_else(|| Error::NoEntry {
            name: name.to_owned(),
            known: self.kernels.iter().map(|kernel| kernel.name().to_owned()).collect(),
        })
    }
}
