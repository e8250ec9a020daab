//! The CPU's device with something of it altered.

#![allow(unsafe_code, reason = "implements a device, which addresses are trusted of")]

use gradprobe::{
    Cpu, Error,
    device::{Buffer, Device, Kernel, Read},
    tensor::Place,
};

/// What is altered; the rest is the CPU's.
///
/// # Safety
/// As of [`Device`].
pub unsafe trait Altered: Send + 'static {
    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        Cpu.allocate(bytes)
    }
    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        Cpu.read(bytes)
    }
}

pub struct OnCpu<A>(pub A);

// SAFETY: the CPU's device keeps the promise, and so does what is altered.
unsafe impl<A: Altered> Device for OnCpu<A> {
    fn name(&self) -> &'static str {
        Cpu.name()
    }
    fn place(&self) -> Place {
        Cpu.place()
    }
    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        self.0.allocate(bytes)
    }
    fn upload(&self, bytes: &[u8], to: &Buffer) -> Result<(), Error> {
        Cpu.upload(bytes, to)
    }
    fn clear(&self, buffer: &Buffer) -> Result<(), Error> {
        Cpu.clear(buffer)
    }
    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        self.0.read(bytes)
    }
    unsafe fn launch(&self, kernel: Kernel, blocks: u32, arguments: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's promise is the same.
        unsafe { Cpu.launch(kernel, blocks, arguments) }
    }
    fn resident_blocks(&self, kernel: Kernel) -> u32 {
        Cpu.resident_blocks(kernel)
    }
    fn is_capturing(&self) -> Result<bool, Error> {
        Cpu.is_capturing()
    }
}
