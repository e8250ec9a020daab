//! Devices: memory, copies and the kernels. The CPU is one.

pub(crate) mod counting;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod host;

pub use crate::{
    clip::ClipArguments,
    probe::{Common, StepArguments, TensorEntry},
};
pub use cpu::Cpu;
pub use host::{HostMemory, HostRead};

use crate::{
    Error,
    probe::Arguments,
    ranks::Communicator,
    spec::{LANES, STEP_THREADS},
    tensor::Place,
};
use std::{any::Any, sync::Arc};

/// Declares the kernels: name, entry point, threads of a block, arguments, and the same function on the CPU.
/// kernels/README.md describes each.
macro_rules! kernels {
    ($($kernel:ident = $entry:literal, $threads:expr, $arguments:ty, $cpu:path;)*) => {
        /// The kernels, by the names they are compiled under.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kernel {
            $($kernel,)*
        }

        impl Kernel {
            /// Every kernel.
            pub const ALL: &[Kernel] = &[$(Kernel::$kernel),*];

            /// The name of the kernel's entry point.
            pub const fn entry(self) -> &'static str {
                match self { $(Kernel::$kernel => $entry,)* }
            }

            /// Threads of a block.
            #[expect(clippy::cast_possible_truncation, reason = "a block has at most 1024 threads")]
            pub const fn threads(self) -> u32 {
                match self { $(Kernel::$kernel => $threads as u32,)* }
            }

            /// Does on the CPU the same as the kernel.
            ///
            /// # Safety
            /// As of [`Device::launch`].
            #[allow(unsafe_code, reason = "the addresses are the caller's word")]
            unsafe fn run(self, arguments: &[u8]) {
                match self {
                    // SAFETY: the caller's promise, with the kernel's arguments.
                    $(Kernel::$kernel => unsafe { $cpu(bytemuck::from_bytes(arguments)) },)*
                }
            }
        }

        $(impl Arguments for $arguments {
            const KERNEL: Kernel = Kernel::$kernel;
        })*
    };
}

kernels! {
    Measure = "gradprobe_measure", STEP_THREADS, StepArguments, crate::measure::cpu::run;
    Clip = "gradprobe_clip", LANES, crate::clip::ClipArguments, crate::clip::cpu::run;
    Update = "gradprobe_update", LANES, crate::gsnr::UpdateArguments, crate::gsnr::cpu::update;
    Gsnr = "gradprobe_gsnr", LANES, crate::gsnr::GsnrArguments, crate::gsnr::cpu::gsnr;
    Adam = "gradprobe_adam", LANES, crate::gsnr::AdamArguments, crate::gsnr::cpu::adam;
    Histogram = "gradprobe_histogram", LANES, crate::histogram::HistogramArguments, crate::histogram::cpu::run;
    Dot = "gradprobe_dot", LANES, crate::dot::DotArguments, crate::dot::cpu::run;
    Adaptive = "gradprobe_adaptive", LANES, crate::clip::AdaptiveArguments, crate::clip::adaptive::cpu::run;
    Optimizer = "gradprobe_optimizer", LANES, crate::optim::OptimizerArguments, crate::optim::cpu::run;
    Sample = "gradprobe_sample", LANES, crate::samples::SampleArguments, crate::samples::cpu::run;
    Fingerprint = "gradprobe_fingerprint", LANES, crate::ranks::FingerprintArguments, crate::ranks::fingerprint;
    Contribute = "gradprobe_contribute", LANES, crate::ranks::ContributeArguments, crate::ranks::contribute;
    Merge = "gradprobe_merge", STEP_THREADS, crate::ranks::MergeArguments, crate::ranks::cpu::run;
}

/// The kernels as one source without includes, for NVRTC.
pub const SOURCE: &str = include_str!(concat!(env!("OUT_DIR"), "/gradprobe.cu"));

/// Memory of a device, freed when dropped.
pub struct Buffer {
    address: u64,
    bytes: usize,
    _owner: Box<dyn Any + Send>,
}

impl Buffer {
    /// Makes a buffer of so many bytes at this address, which `owner` frees when it is dropped.
    ///
    /// # Safety
    /// They exist until then, for the kernels and copies of the device that makes the buffer, and for nothing else.
    #[allow(unsafe_code, reason = "the address is the caller's word")]
    pub unsafe fn new(address: u64, bytes: usize, owner: impl Any + Send) -> Self {
        Self { address, bytes, _owner: Box::new(owner) }
    }

    /// The address by which kernels know the memory.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes of the buffer.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Host memory in which a copy of device memory arrives.
pub trait Read: Send {
    /// Starts to copy the start of `from`, ordered after earlier launches. Reads complete in order.
    ///
    /// # Errors
    /// When the device fails.
    fn start(&mut self, from: &Buffer) -> Result<(), Error>;

    /// Whether the copy has arrived; never waits.
    ///
    /// # Errors
    /// When the device fails.
    fn is_complete(&self) -> Result<bool, Error>;

    /// Waits for the copy and gives its bytes.
    ///
    /// # Errors
    /// When the device fails.
    fn wait(&self) -> Result<&[u8], Error>;
}

/// Runs the kernels: memory, copies and launches, all ordered as on one CUDA stream. Made for a probe, and dropped
/// after all of its buffers.
///
/// # Safety
/// Buffers have the given bytes, apart from all other memory; uploads, clears and reads stay within them. Memory that
/// is dropped while queued work uses it stays until that has run.
#[allow(unsafe_code, reason = "the probe trusts the addresses")]
pub unsafe trait Device: Send {
    /// `cpu`, `cuda`, `simt` or `ptx`.
    fn name(&self) -> &'static str;

    /// The place where the kernels find tensors.
    fn place(&self) -> Place;

    /// Allocates this many bytes, at least 1, aligned to 256, with undefined content. Called only when a probe is made.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Buffer, Error>;

    /// Copies into the start of `to`, ordered before later launches. `bytes` may change once this returns.
    ///
    /// # Errors
    /// When the device fails.
    fn upload(&self, bytes: &[u8], to: &Buffer) -> Result<(), Error>;

    /// Sets all of `buffer` to 0, ordered before later launches.
    ///
    /// # Errors
    /// When the device fails.
    fn clear(&self, buffer: &Buffer) -> Result<(), Error>;

    /// Makes host memory for reads of this many bytes. Called only when a probe is made.
    ///
    /// # Errors
    /// When there is not enough.
    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error>;

    /// Runs a kernel with `blocks` blocks and the bytes of its one parameter, aligned to 8.
    ///
    /// # Safety
    /// They are the kernel's `Arguments`; the addresses in them are those of this device's buffers, of the sizes
    /// that the kernel needs, and of tensors that are lent until the call returns.
    ///
    /// # Errors
    /// When the device fails.
    unsafe fn launch(&self, kernel: Kernel, blocks: u32, arguments: &[u8]) -> Result<(), Error>;

    /// Blocks that fill the device; more are never launched.
    fn resident_blocks(&self, kernel: Kernel) -> u32;

    /// Whether launches are captured rather than run.
    ///
    /// # Errors
    /// When the device fails.
    fn is_capturing(&self) -> Result<bool, Error>;

    /// Tells the device, before launches are captured, that they may run again at any time without a further call.
    ///
    /// # Errors
    /// When the device fails.
    fn expect_graphs(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Tells the device of the ranks with work queued in its order. Waits for that work have their deadline, if they
    /// have one, and end with their errors.
    fn watch(&self, _ranks: &Arc<dyn Communicator>) {}

    /// Tells the device the memory, by address and bytes, of the tensors that the next launches read or change: for
    /// devices that check accesses. The result is dropped when those launches are queued.
    fn lend(&self, _tensors: &mut dyn Iterator<Item = (u64, u64)>, _changed: bool) -> Option<Box<dyn Any>> {
        None
    }
}
