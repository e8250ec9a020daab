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
    AdaptiveClip, AdaptiveClipReport, Backend, Config, DotReport, Error, GsnrConfig, GsnrReport, HistogramReport,
    HistoryReport, HostTensor, HostTensorMut, Plan, Report, SampleConfig, SampleReport,
    health::Health,
    launch::{Arguments, Device, DeviceProbe, Kernel, RawTensor},
};
use gradprobe_ptx::{Module, Options, memory::Lent};
use std::{env, fs, sync::OnceLock};

pub use block::{Entry, Schedule, UserKernel, launch, launch_user};
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

/// Lets the kernels that this thread launches use these tensors, until what is returned is dropped: for calls with bare
/// addresses. The emulation proper does not ask; PTX may use no other memory than a device's own and what is lent.
pub fn lend(tensors: &[RawTensor], writable: bool) -> Lent {
    ptx::memory::lend(tensors.iter().map(|tensor| (tensor.address, tensor.len * tensor.dtype.size() as u64, writable)))
}

/// 256 bytes with that alignment.
#[derive(Clone)]
#[repr(align(256))]
struct Line([u8; 256]);

/// Host memory that plays device memory.
pub struct Buffer(Vec<Line>);

impl Drop for Buffer {
    fn drop(&mut self) {
        ptx::memory::freed(self.0.as_ptr() as u64);
    }
}

impl Device for Simt {
    type Buffer = Buffer;
    type Read = Vec<u8>;

    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        let lines = bytes.div_ceil(256);
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(lines).map_err(|_| Error::OutOfMemory { bytes })?;
        buffer.resize(lines, Line([0xff; 256]));
        ptx::memory::allocated(buffer.as_ptr() as u64, bytes);
        Ok(Buffer(buffer))
    }

    fn address(&self, buffer: &Buffer) -> u64 {
        buffer.0.as_ptr() as u64
    }

    fn upload(&self, bytes: &[u8], to: &mut Buffer) -> Result<(), Error> {
        for (line, bytes) in to.0.iter_mut().zip(bytes.chunks(256)) {
            line.0[..bytes.len()].copy_from_slice(bytes);
        }
        ptx::memory::written(self.address(to), bytes.len());
        Ok(())
    }

    fn clear(&self, buffer: &mut Buffer) -> Result<(), Error> {
        buffer.0.fill(Line([0; 256]));
        ptx::memory::written(self.address(buffer), buffer.0.len() * size_of::<Line>());
        Ok(())
    }

    fn launch(&self, kernel: Kernel, blocks: u32, arguments: &Arguments) -> Result<(), Error> {
        if let Some(Compiled { module, options }) = self.ptx {
            // Another for each kernel and plan, and the same whenever a test is run.
            let shape = u64::from(arguments.chunk_count) << 20 ^ u64::from(arguments.tensor_count) << 8 ^ kernel as u64;
            let options = Options { seed: options.seed ^ self.schedule.seed() << 48 ^ shape, ..options };
            // SAFETY: as below; and an address that is none of this device's or the lent tensors' is refused.
            let ran = module.kernel(kernel.entry()).and_then(|found| unsafe {
                found.launch(blocks, Kernel::THREADS, &[bytemuck::bytes_of(arguments)], options)
            });
            return ran.map(drop).map_err(|fault| Error::Driver { call: kernel.entry(), code: fault.to_string() });
        }
        let entry = match kernel {
            Kernel::Measure => Entry::MEASURE,
            Kernel::Clip => Entry::CLIP,
            Kernel::Update => Entry::UPDATE,
            Kernel::Gsnr => Entry::GSNR,
            Kernel::Histogram => Entry::HISTOGRAM,
            Kernel::Dot => Entry::DOT,
            Kernel::Adam => Entry::ADAM,
            Kernel::Adaptive => Entry::ADAPTIVE,
            Kernel::Sample => Entry::SAMPLE,
            Kernel::Merge => Entry::MERGE,
        };
        // SAFETY: DeviceProbe's tables and workspace are the kernels' own, and its callers vouch for the tensors.
        unsafe { launch(entry, blocks, arguments, self.schedule) }
            .map_err(|fault| Error::Driver { call: kernel.entry(), code: fault })
    }

    fn resident_blocks(&self, _: Kernel) -> u32 {
        if self.blocks == 0 { 7 } else { self.blocks }
    }

    fn is_capturing(&self) -> Result<bool, Error> {
        Ok(false)
    }

    fn prepare_read(&self, bytes: usize) -> Result<Vec<u8>, Error> {
        Ok(vec![0xff; bytes])
    }

    fn start_read(&self, from: &Buffer, read: &mut Vec<u8>) -> Result<(), Error> {
        for (line, bytes) in from.0.iter().zip(read.chunks_mut(256)) {
            bytes.copy_from_slice(&line.0[..bytes.len()]);
        }
        Ok(())
    }

    fn is_complete(&self, _: &Vec<u8>) -> Result<bool, Error> {
        Ok(true)
    }

    fn complete<'a>(&self, read: &'a Vec<u8>) -> Result<&'a [u8], Error> {
        Ok(read)
    }
}

/// Measures and clips host tensors with the kernels.
#[derive(Debug)]
pub struct SimtProbe(DeviceProbe<Simt>, &'static str);

impl SimtProbe {
    /// A probe in the default order.
    ///
    /// # Errors
    /// Those of [`DeviceProbe::with_device`].
    pub fn new(plan: Plan, config: Config) -> Result<Self, Error> {
        Self::with(Simt::default(), plan, config)
    }

    /// A probe on this device.
    ///
    /// # Errors
    /// Those of [`DeviceProbe::with_device`].
    pub fn with(device: Simt, plan: Plan, config: Config) -> Result<Self, Error> {
        let name = if device.ptx.is_some() { "ptx" } else { "simt" };
        DeviceProbe::with_device(device, plan, config).map(|probe| Self(probe, name))
    }

    /// The probe that drives the kernels, for calls with addresses.
    pub fn inner(&mut self) -> &mut DeviceProbe<Simt> {
        &mut self.0
    }
}

impl Backend for SimtProbe {
    fn name(&self) -> &'static str {
        self.1
    }

    fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        let (tensors, _lent) = all(tensors);
        // SAFETY: each is a slice that lives through the launch, which has run on return.
        unsafe { self.0.measure_raw(&tensors) }?;
        self.0.wait()
    }

    fn measure_host_with_weights(
        &mut self,
        tensors: &[HostTensor<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<Report, Error> {
        let ((tensors, _lent), (weights, _weights_lent)) = (all(tensors), all(weights));
        // SAFETY: as in `measure_host`.
        unsafe { self.0.measure_with_weights_raw(&tensors, &weights) }?;
        self.0.wait()
    }

    fn clip_host(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
        let (raw, _lent) = all_mut(tensors);
        // SAFETY: each is a mutable slice that lives through the launch, which has run on return.
        unsafe { self.0.clip_raw(&raw) }
    }

    fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        self.0.set_loss_scale(scale)
    }

    fn enable_samples(&mut self, config: &SampleConfig) -> Result<(), Error> {
        self.0.enable_samples(config)
    }

    fn sample_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error> {
        let (tensors, _lent) = all(tensors);
        // SAFETY: as in `measure_host`.
        unsafe { self.0.sample_raw(&tensors) }
    }

    fn samples(&mut self) -> Result<SampleReport, Error> {
        self.0.samples()
    }

    fn judge_by(&mut self, health: &Health) -> Result<(), Error> {
        self.0.judge_by(health)
    }

    fn enable_adaptive_clip(&mut self, clip: &AdaptiveClip) -> Result<(), Error> {
        self.0.enable_adaptive_clip(clip)
    }

    fn clip_adaptively_host(
        &mut self,
        tensors: &mut [HostTensorMut<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<AdaptiveClipReport, Error> {
        let ((tensors, _lent), (weights, _weights_lent)) = (all_mut(tensors), all(weights));
        // SAFETY: as in `clip_host`, and the weights are slices that live as long.
        unsafe { self.0.clip_adaptively_raw(&tensors, &weights) }?;
        self.0.adaptive_clip()
    }

    fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        self.0.track(config)
    }

    fn reset_tracking(&mut self) -> Result<(), Error> {
        self.0.reset_tracking()
    }

    fn gsnr(&mut self) -> Result<GsnrReport, Error> {
        self.0.gsnr()
    }

    fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        self.0.keep_history(steps)
    }

    fn tag(&mut self, tag: u64) -> Result<(), Error> {
        self.0.tag(tag)
    }

    fn history(&mut self) -> Result<HistoryReport, Error> {
        self.0.history()
    }

    fn enable_histogram(&mut self) -> Result<(), Error> {
        self.0.enable_histogram()
    }

    fn histogram_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<HistogramReport, Error> {
        let (tensors, _lent) = all(tensors);
        // SAFETY: as in `measure_host`.
        unsafe { self.0.histogram_raw(&tensors) }
    }

    fn enable_dot(&mut self) -> Result<(), Error> {
        self.0.enable_dot()
    }

    fn dot_host(&mut self, a: &[HostTensor<'_>], b: &[HostTensor<'_>]) -> Result<DotReport, Error> {
        let ((a, _a_lent), (b, _b_lent)) = (all(a), all(b));
        // SAFETY: as in `measure_host`.
        unsafe { self.0.dot_raw(&a, &b) }
    }
}

/// Tensors by their addresses, lent for writing.
fn all_mut(tensors: &mut [HostTensorMut<'_>]) -> (Vec<RawTensor>, Lent) {
    let of = |tensor: &mut HostTensorMut<'_>| {
        let address = tensor.as_bytes_mut().as_mut_ptr();
        raw(&tensor.as_ref(), address)
    };
    let all: Vec<RawTensor> = tensors.iter_mut().map(of).collect();
    let lent = lend(&all, true);
    (all, lent)
}

/// Tensors by their addresses, lent for reading.
fn all(tensors: &[HostTensor<'_>]) -> (Vec<RawTensor>, Lent) {
    let all: Vec<RawTensor> = tensors.iter().map(|tensor| raw(tensor, tensor.as_bytes().as_ptr())).collect();
    let lent = lend(&all, false);
    (all, lent)
}

fn raw(tensor: &HostTensor<'_>, address: *const u8) -> RawTensor {
    RawTensor { address: address as u64, len: tensor.len() as u64, dtype: tensor.dtype() }
}
