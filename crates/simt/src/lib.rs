//! The kernels of `gradprobe` on the host: the same `kernels/*.cu`, compiled by the C++ compiler, driven by the same
//! host code as on CUDA, with the same bits.
//!
//! Or as a CUDA compiler made them: PTX, run by `gradprobe-ptx` ([`Simt::ptx`]).
//!
//! Compiled by the C++ compiler, every CUDA thread is a fiber. Blocks, and the threads of a block between two points where they wait for each other,
//! run in an order shuffled from a seed; shared memory and fresh device memory hold garbage; a barrier or shuffle that
//! not all threads reach is an error that names the line.
#![allow(unsafe_code, reason = "runs C++ on fibers, with host addresses as device addresses")]

mod block;

use gradprobe::{
    Error,
    device::{Buffer, Device, HostMemory, HostRead, Kernel, Read},
    tensor::Place,
};
use gradprobe_ptx::{Module, Options, memory::Lent};
use std::{any::Any, env, fs, sync::OnceLock};

pub use block::{Entry, Schedule, launch};
pub use gradprobe_ptx as ptx;

/// The host as a device. Everything has happened when a call returns.
#[derive(Clone, Copy, Debug)]
pub struct Simt {
    /// In which order threads and blocks run.
    pub schedule: Schedule,
    /// Blocks of a launch, at most; 0 takes the default of 7, so that blocks have several chunks each.
    pub blocks: u32,
    /// The kernels as PTX, which is run in place of what the C++ compiler made of them.
    pub ptx: Option<Compiled>,
}

/// PTX, and how it is run: by seeds of the schedule.
#[derive(Clone, Copy, Debug)]
pub struct Compiled {
    /// The kernels.
    pub module: &'static Module,
    /// What they are held to.
    pub options: Options,
}

impl Default for Simt {
    /// In order, with PTX where [`ptx_of_environment`] has some.
    fn default() -> Self {
        Self { schedule: Schedule::default(), blocks: 0, ptx: ptx_of_environment() }
    }
}

/// The PTX in the file that `GRADPROBE_PTX` names, read once: so the tests of the emulation run on it. `GRADPROBE_PTX_SEED` is a
/// number for other orders than those of 0.
///
/// # Panics
/// When the file cannot be read, or is not understood, or the seed is no number.
pub fn ptx_of_environment() -> Option<Compiled> {
    static MODULE: OnceLock<Option<Module>> = OnceLock::new();
    let read = || {
        let path = env::var_os("GRADPROBE_PTX")?;
        let text =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("GRADPROBE_PTX, {}: {error}", path.display()));
        Some(Module::parse(&text).unwrap_or_else(|error| panic!("GRADPROBE_PTX, {}: {error}", path.display())))
    };
    let seed =
        || env::var("GRADPROBE_PTX_SEED").map_or(0, |seed| seed.parse().expect("GRADPROBE_PTX_SEED is a number"));
    MODULE
        .get_or_init(read)
        .as_ref()
        .map(|module| Compiled { module, options: Options { seed: seed(), ..Options::default() } })
}

/// Host memory that plays device memory.
struct Memory(HostMemory);

impl Drop for Memory {
    fn drop(&mut self) {
        ptx::memory::freed(self.0.address());
    }
}

// SAFETY: buffers are memory of the host's own, and nothing is queued.
unsafe impl Device for Simt {
    fn name(&self) -> &'static str {
        if self.ptx.is_some() { "ptx" } else { "simt" }
    }

    fn place(&self) -> Place {
        Place::Host
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        let memory = HostMemory::new(bytes.next_multiple_of(256))?;
        let address = memory.address();
        // SAFETY: the memory is there until its owner is dropped.
        let buffer = unsafe { Buffer::new(address, bytes, Memory(memory)) };
        // SAFETY: as in `upload`.
        unsafe { HostMemory::fill(0xff, &buffer) };
        ptx::memory::allocated(address, bytes);
        Ok(buffer)
    }

    fn upload(&self, bytes: &[u8], to: &Buffer) -> Result<(), Error> {
        // SAFETY: this device made the buffer, and runs nothing while it copies.
        unsafe { HostMemory::upload(bytes, to) };
        ptx::memory::written(to.address(), bytes.len());
        Ok(())
    }

    fn clear(&self, buffer: &Buffer) -> Result<(), Error> {
        // SAFETY: as in `upload`.
        unsafe { HostMemory::fill(0, buffer) };
        ptx::memory::written(buffer.address(), buffer.bytes());
        Ok(())
    }

    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        Ok(Box::new(HostRead::new(bytes)?))
    }

    /// The emulation proper does not ask; PTX may use no other memory than a device's own and what is lent.
    fn lend(&self, tensors: &mut dyn Iterator<Item = (u64, u64)>, changed: bool) -> Option<Box<dyn Any>> {
        self.ptx?;
        let lent: Lent = ptx::memory::lend(tensors.map(|(address, bytes)| (address, bytes, changed)));
        Some(Box::new(lent))
    }

    unsafe fn launch(&self, kernel: Kernel, blocks: u32, arguments: &[u8]) -> Result<(), Error> {
        let failed = |code: String| Error::Driver { call: kernel.entry(), doing: "emulating it".to_owned(), code };
        let Some(Compiled { module, options }) = self.ptx else {
            let entry = Entry::find(kernel.entry()).ok_or_else(|| failed("no such kernel".to_owned()))?;
            // SAFETY: the caller's promise.
            return unsafe { launch(entry, blocks, kernel.threads(), &[arguments], self.schedule) }.map_err(failed);
        };
        // Another for each kernel and size, and the same whenever a test is run.
        let options = Options {
            seed: options.seed ^ self.schedule.seed() << 48 ^ u64::from(blocks) << 8 ^ kernel as u64,
            ..options
        };
        // SAFETY: as above; and an address that is none of this device's or the lent tensors' is refused.
        let ran = module
            .kernel(kernel.entry())
            .and_then(|found| unsafe { found.launch(blocks, kernel.threads(), &[arguments], options) });
        ran.map(drop).map_err(|fault| failed(fault.to_string()))
    }

    fn resident_blocks(&self, _: Kernel) -> u32 {
        if self.blocks == 0 { 7 } else { self.blocks }
    }

    fn is_capturing(&self) -> Result<bool, Error> {
        Ok(false)
    }
}
