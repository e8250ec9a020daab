//! The CPU as a device: the default where there is no GPU, and the reference whose bits the kernels must equal.
//!
//! Each kernel is a function over slices in the room of its feature. Chunks are spread over rayon's threads. Within
//! one, the compiler vectorises loops over fixed-size arrays for the best instruction set of the machine (`dispatch`).
//! Neither changes a bit. kernels/TUNING.md has the measurements.

pub(crate) mod dispatch;
pub(crate) mod memory;

use super::{Buffer, Device, HostMemory, HostRead, Kernel, Read};
use crate::{Error, tensor::Place};

/// Runs everything on the CPU. All work is done when a call returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu;

impl Cpu {
    /// Names the instruction set of its loops: `avx512`, `avx2` or `portable` on x86-64, elsewhere the architecture.
    /// The environment variable `GRADPROBE_CPU`, read at the first use, lowers it to one of these; the bits stay the
    /// same.
    pub fn instruction_set(self) -> &'static str {
        dispatch::name()
    }
}

// SAFETY: buffers are memory of the host, and nothing is queued.
#[allow(unsafe_code, reason = "implements a trait that addresses are trusted of")]
unsafe impl Device for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn place(&self) -> Place {
        Place::Host
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        let memory = HostMemory::new(bytes)?;
        // SAFETY: the memory is there until its owner is dropped.
        Ok(unsafe { Buffer::new(memory.address(), bytes, memory) })
    }

    fn upload(&self, bytes: &[u8], to: &Buffer) -> Result<(), Error> {
        // SAFETY: this device made the buffer, and runs nothing while it copies.
        unsafe { HostMemory::upload(bytes, to) };
        Ok(())
    }

    fn clear(&self, buffer: &Buffer) -> Result<(), Error> {
        // SAFETY: as in `upload`.
        unsafe { HostMemory::fill(0, buffer) };
        Ok(())
    }

    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        Ok(Box::new(HostRead::new(bytes)?))
    }

    unsafe fn launch(&self, kernel: Kernel, _: u32, arguments: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's promise is the same.
        unsafe { kernel.run(arguments) };
        Ok(())
    }

    fn resident_blocks(&self, _: Kernel) -> u32 {
        1
    }

    fn is_capturing(&self) -> Result<bool, Error> {
        Ok(false)
    }
}
