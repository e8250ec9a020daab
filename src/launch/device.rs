//! The kernels, and what it takes to run them.

use super::Arguments;
#[cfg(doc)]
use crate::GsnrRecord;
use crate::{Error, spec::LANES};

/// The kernels, by the names they are compiled under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// `gradprobe_measure`: all statistics of all tensors, norms, coefficient and flags.
    Measure,
    /// `gradprobe_clip`: scales in place what [`Kernel::Measure`] decided to scale.
    Clip,
    /// `gradprobe_update`: merges the step that [`Kernel::Measure`] measured into what is tracked across steps.
    Update,
    /// `gradprobe_gsnr`: reduces what is tracked to one [`GsnrRecord`] a tensor.
    Gsnr,
    /// `gradprobe_adam`: reduces Adam's moments to one [`GsnrRecord`] a tensor.
    Adam,
    /// `gradprobe_histogram`: counts elements by their magnitudes.
    Histogram,
    /// `gradprobe_dot`: dot products of two lists of tensors.
    Dot,
    /// `gradprobe_adaptive`: scales units in place by the norms of their weights.
    Adaptive,
    /// `gradprobe_sample`: copies a few elements into a ring of steps.
    Sample,
    /// `gradprobe_merge`: merges the records of many ranks, and finishes the step that [`Kernel::Measure`] left open.
    Merge,
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Kernel; 10] = [
        Kernel::Measure,
        Kernel::Clip,
        Kernel::Update,
        Kernel::Gsnr,
        Kernel::Adam,
        Kernel::Histogram,
        Kernel::Dot,
        Kernel::Adaptive,
        Kernel::Sample,
        Kernel::Merge,
    ];
    /// Threads of a block, for each of them.
    #[expect(clippy::cast_possible_truncation, reason = "a block has at most 1024 threads")]
    pub const THREADS: u32 = LANES as u32;

    /// The name of the kernel's entry point.
    pub const fn entry(self) -> &'static str {
        match self {
            Kernel::Measure => "gradprobe_measure",
            Kernel::Clip => "gradprobe_clip",
            Kernel::Update => "gradprobe_update",
            Kernel::Gsnr => "gradprobe_gsnr",
            Kernel::Histogram => "gradprobe_histogram",
            Kernel::Dot => "gradprobe_dot",
            Kernel::Adaptive => "gradprobe_adaptive",
            Kernel::Sample => "gradprobe_sample",
            Kernel::Adam => "gradprobe_adam",
            Kernel::Merge => "gradprobe_merge",
        }
    }
}

/// The kernels as one source without includes, for NVRTC and for anyone who compiles them elsewhere.
pub const SOURCE: &str = include_str!(concat!(env!("OUT_DIR"), "/gradprobe.cu"));

/// `gradprobe.h`, which declares [`StepOutputs`](crate::StepOutputs) and [`Record`](crate::Record) for C, C++ and CUDA: for
/// kernels that a program has NVRTC compile, in place of the line that includes it. NVRTC would look for it in a folder.
pub const HEADER: &str = include_str!("../../kernels/include/gradprobe.h");

/// Something that runs the kernels: memory, copies and launches, all ordered as on one CUDA stream.
pub trait Device {
    /// Memory of the device, freed when dropped.
    type Buffer;
    /// Host memory and what tells when a copy of device memory has arrived there.
    type Read;

    /// Memory of this many bytes, aligned to 256, content undefined. Called only when a probe is made.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Self::Buffer, Error>;

    /// The address kernels know the memory by.
    fn address(&self, buffer: &Self::Buffer) -> u64;

    /// Copies into the start of `to`, ordered before what is launched later. `bytes` may change once this returns.
    ///
    /// # Errors
    /// When the device fails.
    fn upload(&self, bytes: &[u8], to: &mut Self::Buffer) -> Result<(), Error>;

    /// Sets all of `buffer` to 0, ordered before what is launched later.
    ///
    /// # Errors
    /// When the device fails.
    fn clear(&self, buffer: &mut Self::Buffer) -> Result<(), Error>;

    /// Runs a kernel with `blocks` blocks of [`Kernel::THREADS`] threads and `arguments` as its one parameter.
    ///
    /// # Errors
    /// When the device fails.
    fn launch(&self, kernel: Kernel, blocks: u32, arguments: &Arguments) -> Result<(), Error>;

    /// Blocks that fill the device; more are never launched.
    fn resident_blocks(&self, kernel: Kernel) -> u32;

    /// Whether work is being recorded for later rather than run.
    ///
    /// # Errors
    /// When the device fails.
    fn is_capturing(&self) -> Result<bool, Error>;

    /// Host memory for reads of this many bytes. Called only when a probe is made.
    ///
    /// # Errors
    /// When there is not enough.
    fn prepare_read(&self, bytes: usize) -> Result<Self::Read, Error>;

    /// Starts to copy the start of `from`, ordered after what was launched before. Reads complete in order.
    ///
    /// # Errors
    /// When the device fails.
    fn start_read(&self, from: &Self::Buffer, read: &mut Self::Read) -> Result<(), Error>;

    /// Whether the copy has arrived; never waits.
    ///
    /// # Errors
    /// When the device fails.
    fn is_complete(&self, read: &Self::Read) -> Result<bool, Error>;

    /// Waits for the copy and gives its bytes.
    ///
    /// # Errors
    /// When the device fails.
    fn complete<'a>(&self, read: &'a Self::Read) -> Result<&'a [u8], Error>;
}
