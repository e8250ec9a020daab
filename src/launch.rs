//! The host side of the kernels: tables, arguments, checks and read-out, written once for every device that runs them.
//!
//! [`DeviceProbe`] drives `kernels/*.cu` through the small trait [`Device`]; CUDA implements it, and so does the
//! emulation that runs the same kernels on the host. Implement it to run them elsewhere.

use crate::{
    AdamStep, Config, DType, Error, GsnrConfig, GsnrRecord, GsnrReport, HistoryReport, HistoryStep, NonFinitePolicy,
    Plan, Record, Report, StepOutputs, adam,
    gsnr::{BINS, Layout, Track},
    history,
    spec::{CHUNK, LANES},
};
use bytemuck::{Pod, Zeroable};
use dot::DotMemory;
use histogram::HistogramMemory;
use std::{collections::VecDeque, sync::Arc};

mod dot;
mod histogram;

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
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Kernel; 7] =
        [Kernel::Measure, Kernel::Clip, Kernel::Update, Kernel::Gsnr, Kernel::Adam, Kernel::Histogram, Kernel::Dot];
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
            Kernel::Adam => "gradprobe_adam",
        }
    }
}

/// The kernels as one source without includes, for NVRTC and for anyone who compiles them elsewhere.
pub const SOURCE: &str = include_str!(concat!(env!("OUT_DIR"), "/gradprobe.cu"));

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

/// A tensor in device memory by its bare facts: for trainers whose memory no type of ours knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTensor {
    /// Address of the first element. Not used when `len` is 0.
    pub address: u64,
    /// Number of elements.
    pub len: u64,
    /// Type of the elements.
    pub dtype: DType,
}

/// Adam's moments of one tensor in device memory, f32, by the names torch gives them. Of no elements they are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawMoments {
    /// Address of the first element of m.
    pub exp_avg: u64,
    /// Address of the first element of v.
    pub exp_avg_sq: u64,
    /// Number of elements of each.
    pub len: u64,
}

/// One tensor of the plan, as the kernels read it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct TensorEntry {
    length: u64,
    first_chunk: u32,
    chunk_count: u32,
    dtype: u32,
    dead_bits: u32,
}

/// The one parameter of every kernel: device addresses and the step's settings (`kernels/arguments.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Arguments {
    /// Table of the tensors' addresses.
    pub addresses: u64,
    /// Table of the tensors.
    pub tensors: u64,
    /// Table of each chunk's tensor.
    pub chunk_tensors: u64,
    /// What each chunk adds up to, at most as large as a [`Record`]: workspace.
    pub chunk_parts: u64,
    /// One [`Record`] a tensor: a result.
    pub records: u64,
    /// The [`StepOutputs`]: a result.
    pub outputs: u64,
    /// Counters of what is done, one a chunk, one a tensor and one more: workspace.
    pub done: u64,
    /// [`Config::max_norm`], or 0.
    pub max_norm: f64,
    /// Chunks in all.
    pub chunk_count: u32,
    /// Tensors in all.
    pub tensor_count: u32,
    /// Tensors that have elements.
    pub busy_tensors: u32,
    /// [`Config::non_finite`].
    pub policy: u32,
    /// Steps after which tracking starts anew, or 0.
    pub window: u32,
    /// [`Config::clip`], and its parameters.
    pub clip: u32,
    /// Its threshold.
    pub clip_threshold: f64,
    /// Its smoothing.
    pub clip_smoothing: f64,
    /// What it keeps from step to step.
    pub clip_state: u64,
    /// One f32 coefficient a tensor, under a policy that clips tensors on their own.
    pub coefficients: u64,
    /// Its history or warm-up.
    pub clip_steps: u32,
    /// Steps of the history.
    pub history_steps: u32,
    /// One [`HistoryStep`] a step; 0 when none are kept, as the next.
    pub history: u64,
    /// One [`HistoryTensor`](crate::HistoryTensor) a step and tensor.
    pub history_tensors: u64,
    /// The batch's tag.
    pub tag: u64,
    /// How far each tensor has been tracked; 0 when none is, as all that follow.
    pub tracks: u64,
    /// f32 means of the tracked elements.
    pub means: u64,
    /// Their summed squared deviations, f32.
    pub deviations: u64,
    /// One [`GsnrRecord`] a tensor: a result, of the tracked ones.
    pub gsnr_records: u64,
    /// Bins of each tracked tensor: workspace.
    pub gsnr_bins: u64,
    /// One [`Histogram`](crate::Histogram) a tensor: a result; 0 when there is none.
    pub histograms: u64,
    /// Table of the second list's addresses and dtypes; 0 when there is none, as the two that follow.
    pub others: u64,
    /// One [`Dot`](crate::Dot) a chunk: workspace.
    pub chunk_dots: u64,
    /// One [`Dot`](crate::Dot) a tensor: a result.
    pub dots: u64,
    /// The step of Adam and behind it the addresses of each tensor's moments; 0 but for [`Kernel::Adam`].
    pub adam: u64,
}

// The other side of these numbers is in kernels/arguments.cuh.
const _: () = assert!(size_of::<TensorEntry>() == 24 && size_of::<Arguments>() == 232);

/// Reports on their way to the host at one time; beyond, steps are measured but not reported.
const READS: usize = 4;

/// Measures and clips tensors in a device's memory. Made once; a step launches, and neither
/// allocates device memory nor waits.
pub struct DeviceProbe<D: Device> {
    device: D,
    plan: Arc<Plan>,
    arguments: Arguments,
    addresses: D::Buffer,
    /// Outputs, then records: what a report is read from.
    results: D::Buffer,
    /// Tables and workspace, kept alive for the kernels.
    _workspace: [D::Buffer; 6],
    tracking: Option<Tracking<D>>,
    history: Option<History<D>>,
    histogram: Option<HistogramMemory<D>>,
    dot: Option<DotMemory<D>>,
    /// For Adam's moments; made when the first of those come.
    adam: Option<(Reduction<D>, D::Buffer)>,
    /// The addresses in the device's table.
    current: Vec<u64>,
    /// Whether `current` was found free of overlaps.
    disjoint: bool,
    /// Whether a clip could change anything.
    may_change: bool,
    measured: bool,
    /// Whether a measurement was launched since the last read began.
    unread: bool,
    /// Reads under way, oldest first, and those that wait for use.
    reads: VecDeque<D::Read>,
    idle: Vec<D::Read>,
    reported: u64,
}

impl<D: Device> DeviceProbe<D> {
    /// A probe on `device`, its tables uploaded and its workspace allocated.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], or the device's when it has not enough memory.
    #[expect(clippy::cast_possible_truncation, reason = "2^40 elements are 2^25 chunks; tensors are checked")]
    pub fn with_device(device: D, plan: Plan, config: Config) -> Result<Self, Error> {
        config.check()?;
        let tensor_count = plan.tensors().len();
        let chunk_count = plan.chunks();
        if u32::try_from(tensor_count + chunk_count).is_err() {
            return Err(Error::OutOfMemory { bytes: (tensor_count + chunk_count) * size_of::<Record>() });
        }
        let mut entries = Vec::with_capacity(tensor_count);
        let mut chunk_tensors = Vec::with_capacity(chunk_count);
        for (index, tensor) in plan.tensors().iter().enumerate() {
            let chunks = plan.chunks_of(index);
            entries.push(TensorEntry {
                length: tensor.len,
                first_chunk: chunks.start as u32,
                chunk_count: chunks.len() as u32,
                dtype: tensor.dtype.code(),
                dead_bits: tensor.dtype.threshold_bits(config.dead_threshold),
            });
            chunk_tensors.extend(chunks.map(|_| index as u32));
        }

        let upload = |bytes: &[u8]| uploaded(&device, bytes);
        let addresses = upload(bytemuck::cast_slice(&vec![0u64; tensor_count]))?;
        let mut results = bytemuck::bytes_of(&StepOutputs::default()).to_vec();
        results.extend_from_slice(bytemuck::cast_slice(&vec![Record::EMPTY; tensor_count]));
        let results = upload(&results)?;
        let workspace = [
            upload(bytemuck::cast_slice(&entries))?,
            upload(bytemuck::cast_slice(&chunk_tensors))?,
            device.allocate((chunk_count * size_of::<Record>()).max(1))?,
            upload(bytemuck::cast_slice(&vec![0u32; chunk_count + tensor_count + 1]))?,
            upload(bytemuck::cast_slice(&vec![0u64; config.clip.state_words(tensor_count)]))?,
            upload(bytemuck::cast_slice(&vec![1f32; tensor_count]))?,
        ];
        let [tensors, chunk_tensors, chunk_parts, done, clip_state, coefficients] =
            workspace.each_ref().map(|buffer| device.address(buffer));
        let (clip_threshold, clip_smoothing, clip_steps) = config.clip.parameters();
        let outputs = device.address(&results);
        let arguments = Arguments {
            addresses: device.address(&addresses),
            tensors,
            chunk_tensors,
            chunk_parts,
            records: outputs + size_of::<StepOutputs>() as u64,
            outputs,
            done,
            max_norm: config.max_norm.unwrap_or(0.0),
            chunk_count: chunk_count as u32,
            tensor_count: tensor_count as u32,
            busy_tensors: entries.iter().filter(|e| e.length > 0).count() as u32,
            policy: config.non_finite as u32,
            clip: config.clip.code(),
            clip_threshold,
            clip_smoothing,
            clip_state,
            coefficients,
            clip_steps,
            ..Arguments::zeroed()
        };
        const { assert!(NonFinitePolicy::Skip as u32 == 0 && NonFinitePolicy::ZeroNonFinite as u32 == 2) };
        Ok(Self {
            current: vec![0; tensor_count],
            disjoint: false,
            may_change: config.clip.may_clip(config.max_norm) || config.non_finite == NonFinitePolicy::ZeroNonFinite,
            measured: false,
            unread: false,
            reads: VecDeque::with_capacity(READS),
            idle: (0..READS)
                .map(|_| device.prepare_read(size_of::<StepOutputs>() + size_of::<Record>() * tensor_count))
                .collect::<Result<_, _>>()?,
            reported: 0,
            plan: Arc::new(plan),
            arguments,
            addresses,
            results,
            _workspace: workspace,
            tracking: None,
            history: None,
            histogram: None,
            dot: None,
            adam: None,
            device,
        })
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The plan this probe was made for.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Device address of the [`StepOutputs`], written by each measurement; valid as long as the probe.
    pub fn outputs_address(&self) -> u64 {
        self.arguments.outputs
    }

    /// Device address of one [`Record`] a tensor, in the plan's order; valid as long as the probe.
    pub fn records_address(&self) -> u64 {
        self.arguments.records
    }

    /// Device address of one f32 coefficient a tensor, in the plan's order, under a
    /// [`ClipPolicy`](crate::ClipPolicy) that clips tensors on their own: for optimizers that apply them.
    pub fn coefficients_address(&self) -> u64 {
        self.arguments.coefficients
    }

    /// Brings the device's address table up to date, if it is not: one upload of 8 bytes a tensor. Measuring and
    /// clipping do so by themselves; call it before a graph capture, and before replaying a graph on new addresses.
    ///
    /// # Safety
    /// As for [`measure_raw`](Self::measure_raw), for every launch until the next call with other addresses.
    ///
    /// # Errors
    /// When the tensors are not the plan's, for a null or misaligned address, and when addresses change during a capture.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn bind_raw(&mut self, tensors: &[RawTensor]) -> Result<(), Error> {
        self.plan.check(tensors.iter().map(|t| (t.dtype, t.len)))?;
        if self.current.iter().zip(tensors).all(|(&address, tensor)| address == tensor.address) {
            return Ok(());
        }
        self.check_addresses(tensors)?;
        if self.device.is_capturing()? {
            return Err(Error::AddressesChangedInCapture);
        }
        for (current, tensor) in self.current.iter_mut().zip(tensors) {
            *current = tensor.address;
        }
        self.disjoint = false;
        let uploaded = self.device.upload(bytemuck::cast_slice(&self.current), &mut self.addresses);
        if uploaded.is_err() {
            self.current.fill(0);
        }
        uploaded
    }

    /// Whether tensors under the plan's names lie where tensors can.
    fn check_addresses(&self, tensors: &[RawTensor]) -> Result<(), Error> {
        for (&RawTensor { address, len, dtype }, spec) in tensors.iter().zip(self.plan.tensors()) {
            check_address(&spec.name, address, len, dtype)?;
        }
        Ok(())
    }

    /// Launches the measurement of these tensors, in the plan's order.
    ///
    /// # Safety
    /// Until the launch has run on the device:
    /// * each address is that of `len` initialised elements of type `dtype`, in memory this device can read from the
    ///   probe's context;
    /// * nothing writes to them that is not ordered, by the probe's stream or by events, before or after the launch;
    /// * they are not freed.
    ///
    /// # Errors
    /// Those of [`bind_raw`](Self::bind_raw), and the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn measure_raw(&mut self, tensors: &[RawTensor]) -> Result<(), Error> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.bind_raw(tensors) }?;
        self.launch(Kernel::Measure)?;
        if self.tracking.is_some() {
            self.launch(Kernel::Update)?;
        }
        self.measured = true;
        self.unread = true;
        Ok(())
    }

    /// Launches the clip of these tensors by what the last measurement decided. Without [`Config::max_norm`] and
    /// without zeroing there is nothing it could do, and nothing is launched.
    ///
    /// # Safety
    /// As for [`measure_raw`](Self::measure_raw), and the memory is writable and nothing else uses it, unordered with
    /// the launch.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], [`Error::Overlap`], and those of [`bind_raw`](Self::bind_raw).
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn clip_raw(&mut self, tensors: &[RawTensor]) -> Result<(), Error> {
        self.plan.check(tensors.iter().map(|t| (t.dtype, t.len)))?;
        if !self.measured {
            return Err(Error::NotMeasured);
        }
        // SAFETY: the caller's promise includes this one.
        unsafe { self.bind_raw(tensors) }?;
        if !self.disjoint {
            self.check_overlaps()?;
            self.disjoint = true;
        }
        if self.may_change { self.launch(Kernel::Clip) } else { Ok(()) }
    }

    /// Tracks tensors across the steps from now on; what was tracked before is forgotten. Allocates
    /// [`GsnrConfig::bytes`] of device memory; a graph captured before goes on without.
    ///
    /// # Errors
    /// Those of [`GsnrConfig::bytes`], and the device's when it has not enough memory. What was tracked before then
    /// stays.
    pub fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        let tracking = Tracking::new(&self.device, &self.plan, config)?;
        let address = |buffer: &D::Buffer| self.device.address(buffer);
        self.arguments = Arguments {
            window: config.steps_of_window(),
            tracks: address(&tracking.tracks),
            means: address(&tracking.means),
            deviations: address(&tracking.deviations),
            ..tracking.reduction.place(&self.device, self.arguments)
        };
        self.tracking = Some(tracking);
        Ok(())
    }

    /// Keeps the last steps from now on, this many; what was kept before is forgotten. Allocates 96 bytes a step and 24
    /// a step and tensor of device memory; a graph captured before goes on without.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0 steps, and the device's when it has not enough memory. What was kept before then
    /// stays.
    pub fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        let history = History::new(&self.device, steps, self.plan.tensors().len())?;
        let first = self.device.address(&history.ring);
        self.arguments = Arguments {
            history_steps: steps,
            history: first,
            history_tensors: first + u64::from(steps) * size_of::<HistoryStep>() as u64,
            tag: self.device.address(&history.tag),
            ..self.arguments
        };
        self.history = Some(history);
        Ok(())
    }

    /// Names the batch of the measurements that follow, for the history: one upload of 8 bytes. Replayed graphs see it
    /// too.
    ///
    /// # Errors
    /// [`Error::NoHistory`], or the device's.
    pub fn tag(&mut self, tag: u64) -> Result<(), Error> {
        let history = self.history.as_mut().ok_or(Error::NoHistory)?;
        self.device.upload(bytemuck::bytes_of(&tag), &mut history.tag)
    }

    /// The last steps. Waits for them; nothing of the history is copied before.
    ///
    /// # Errors
    /// [`Error::NoHistory`], [`Error::WaitInCapture`], or the device's.
    pub fn history(&mut self) -> Result<HistoryReport, Error> {
        if self.device.is_capturing()? {
            return Err(Error::WaitInCapture);
        }
        let history = self.history.as_mut().ok_or(Error::NoHistory)?;
        self.device.start_read(&history.ring, &mut history.read)?;
        let bytes = self.device.complete(&history.read)?;
        let (steps, tensors) = bytes.split_at(history.steps as usize * size_of::<HistoryStep>());
        let (steps, tensors) = (values(steps).collect::<Vec<_>>(), values(tensors).collect::<Vec<_>>());
        Ok(HistoryReport::new(Arc::clone(&self.plan), &steps, &tensors))
    }

    /// Forgets all steps that were tracked: one upload.
    ///
    /// # Errors
    /// [`Error::NotTracked`], or the device's.
    pub fn reset_tracking(&mut self) -> Result<(), Error> {
        let tracking = self.tracking.as_mut().ok_or(Error::NotTracked)?;
        self.device.upload(bytemuck::cast_slice(&tracking.fresh), &mut tracking.tracks)
    }

    /// Launches the reduction of what is tracked, which leaves one [`GsnrRecord`] a tensor at
    /// [`gsnr_records_address`](Self::gsnr_records_address). For those who read them on the device; does not wait.
    ///
    /// # Errors
    /// [`Error::NotTracked`], or the device's.
    pub fn launch_gsnr(&mut self) -> Result<(), Error> {
        if self.tracking.is_none() {
            return Err(Error::NotTracked);
        }
        self.launch(Kernel::Gsnr)
    }

    /// Device address of one [`GsnrRecord`] a tensor of the plan, set by [`launch_gsnr`](Self::launch_gsnr) for the
    /// tracked ones. `None` when none is tracked.
    pub fn gsnr_records_address(&self) -> Option<u64> {
        self.tracking.as_ref().map(|_| self.arguments.gsnr_records)
    }

    /// Signal and noise of the tracked tensors up to the last step. Waits for them.
    ///
    /// # Errors
    /// [`Error::NotTracked`], [`Error::TooFewSteps`] before the second step, [`Error::WaitInCapture`], or the device's.
    pub fn gsnr(&mut self) -> Result<GsnrReport, Error> {
        if self.device.is_capturing()? {
            return Err(Error::WaitInCapture);
        }
        self.launch_gsnr()?;
        let Some(tracking) = &mut self.tracking else { return Err(Error::NotTracked) };
        let fresh = &tracking.fresh;
        let records = tracking.reduction.read(&self.device, |index| fresh[index].is_tracked())?;
        GsnrReport::new(Arc::clone(&self.plan), records)
    }

    /// Signal and noise of the tensors whose moments are given, as [`AdamStep`] describes. `moments` are those of the
    /// plan's tensors, in its order; a tensor with none is left out. Waits for the result. The first call allocates 16
    /// KiB and 120 bytes a tensor, and nothing is kept of one call for the next.
    ///
    /// # Safety
    /// Until the call returns:
    /// * each address is that of `len` initialised f32 elements, in memory this device can read from the probe's context;
    /// * nothing writes to them that is not ordered, by the probe's stream or by events, before the call.
    ///
    /// # Errors
    /// Those of [`AdamStep`], [`Error::TensorCount`], [`Error::TensorMismatch`], [`Error::TooLargeToTrack`], those of a
    /// null or misaligned address, [`Error::WaitInCapture`], or the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn adam_gsnr_raw(&mut self, step: &AdamStep, moments: &[RawMoments]) -> Result<GsnrReport, Error> {
        let adam = step.check()?;
        adam::check(&self.plan, moments.iter().map(|of| [of.len; 2]))?;
        for (of, spec) in moments.iter().zip(self.plan.tensors()) {
            check_address(&spec.name, of.exp_avg, of.len, DType::F32)?;
            check_address(&spec.name, of.exp_avg_sq, of.len, DType::F32)?;
        }
        if self.device.is_capturing()? {
            return Err(Error::WaitInCapture);
        }
        let mut table = bytemuck::bytes_of(&adam).to_vec();
        for of in moments {
            let none = of.len == 0;
            table.extend(bytemuck::bytes_of(&if none { [0; 2] } else { [of.exp_avg, of.exp_avg_sq] }));
        }
        let blocks = self.blocks(Kernel::Adam);
        let (reduction, buffer) = match &mut self.adam {
            Some(made) => made,
            none => {
                let reduction = Reduction::new(&self.device, &self.plan, moments.len() * BINS)?;
                none.insert((reduction, self.device.allocate(table.len())?))
            }
        };
        self.device.upload(&table, buffer)?;
        let arguments = reduction.place(&self.device, self.arguments);
        let arguments = Arguments { adam: self.device.address(buffer), ..arguments };
        self.device.launch(Kernel::Adam, blocks, &arguments)?;
        GsnrReport::new(Arc::clone(&self.plan), reduction.read(&self.device, |index| moments[index].len > 0)?)
    }

    /// Blocks of a launch: no more than fill the device.
    fn blocks(&self, kernel: Kernel) -> u32 {
        self.arguments.chunk_count.clamp(1, self.device.resident_blocks(kernel).max(1))
    }

    fn launch(&self, kernel: Kernel) -> Result<(), Error> {
        self.device.launch(kernel, self.blocks(kernel), &self.arguments)
    }

    /// An in-place clip would scale shared memory twice.
    fn check_overlaps(&self) -> Result<(), Error> {
        let mut ranges: Vec<(u64, u64, &str)> = self
            .plan
            .tensors()
            .iter()
            .zip(&self.current)
            .filter(|(tensor, _)| tensor.len > 0)
            .map(|(tensor, &start)| (start, start + tensor.len * tensor.dtype.size() as u64, tensor.name.as_str()))
            .collect();
        ranges.sort_unstable();
        match ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => Err(Error::Overlap { first: pair[0].2.to_owned(), second: pair[1].2.to_owned() }),
            None => Ok(()),
        }
    }

    /// The oldest report that has arrived and was not given yet; `None` while there is none. Never waits: it starts to
    /// copy the results of the last measurement, and hands out what earlier calls started. Called every step it gives
    /// every step's report, a step or so late; when the host runs further ahead than four reports, steps are left out
    /// (their numbers tell). During a capture it does nothing.
    ///
    /// # Errors
    /// The device's.
    pub fn poll(&mut self) -> Result<Option<Report>, Error> {
        if !self.measured || self.device.is_capturing()? {
            return Ok(None);
        }
        // A replayed graph measures without our knowing: with nothing on its way there may be something new.
        if self.reads.is_empty() || self.unread {
            self.start_read()?;
        }
        while let Some(read) = self.reads.front() {
            if !self.device.is_complete(read)? {
                return Ok(None);
            }
            if let Some(report) = self.take_report()? {
                return Ok(Some(report));
            }
        }
        Ok(None)
    }

    /// Waits for the report of the last measurement.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] when there was none, [`Error::WaitInCapture`], or the device's.
    pub fn wait(&mut self) -> Result<Report, Error> {
        if !self.measured {
            return Err(Error::NotMeasured);
        }
        if self.device.is_capturing()? {
            return Err(Error::WaitInCapture);
        }
        while self.idle.is_empty() {
            self.take_report()?;
        }
        self.start_read()?;
        self.reported = 0;
        let mut last = None;
        while !self.reads.is_empty() {
            last = self.take_report()?.or(last);
        }
        last.ok_or(Error::NotMeasured)
    }

    /// Starts a read, if there is memory for one more.
    fn start_read(&mut self) -> Result<(), Error> {
        if let Some(mut read) = self.idle.pop() {
            self.device.start_read(&self.results, &mut read)?;
            self.reads.push_back(read);
            self.unread = false;
        }
        Ok(())
    }

    /// Completes the oldest read; `None` if its step was reported already.
    fn take_report(&mut self) -> Result<Option<Report>, Error> {
        let Some(read) = self.reads.pop_front() else { return Ok(None) };
        let (outputs, rest) = self.device.complete(&read)?.split_at(size_of::<StepOutputs>());
        let outputs: StepOutputs = bytemuck::pod_read_unaligned(outputs);
        let mut report = None;
        if outputs.step > self.reported {
            let mut records = vec![Record::EMPTY; self.plan.tensors().len()];
            bytemuck::cast_slice_mut(&mut records).copy_from_slice(rest);
            self.reported = outputs.step;
            report = Some(Report::new(Arc::clone(&self.plan), outputs, records));
        }
        self.idle.push(read);
        Ok(report)
    }
}

/// What was read from the device, value by value.
fn values<T: Pod>(bytes: &[u8]) -> impl Iterator<Item = T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned)
}

/// The last steps, in device memory.
struct History<D: Device> {
    steps: u32,
    ring: D::Buffer,
    tag: D::Buffer,
    read: D::Read,
}

impl<D: Device> History<D> {
    fn new(device: &D, steps: u32, tensors: usize) -> Result<Self, Error> {
        let bytes = history::bytes(steps, tensors)?;
        let mut tag = device.allocate(size_of::<u64>())?;
        device.upload(&[0; size_of::<u64>()], &mut tag)?;
        let mut ring = device.allocate(bytes)?;
        device.upload(&vec![0; bytes], &mut ring)?;
        Ok(Self { steps, ring, tag, read: device.prepare_read(bytes)? })
    }
}

/// Fails unless elements can lie there. Those of an empty tensor lie nowhere.
fn check_address(name: &str, address: u64, len: u64, dtype: DType) -> Result<(), Error> {
    let (name, size) = (|| name.to_owned(), dtype.size());
    if len == 0 {
        return Ok(());
    }
    if address == 0 {
        return Err(Error::NullPointer { name: name() });
    }
    if !address.is_multiple_of(size as u64) {
        return Err(Error::MisalignedPointer { name: name(), address, size });
    }
    match address.checked_add(len * size as u64) {
        Some(_) => Ok(()),
        None => Err(Error::AddressOverflow { name: name(), address, length: len }),
    }
}

/// A buffer that holds these bytes.
fn uploaded<D: Device>(device: &D, bytes: &[u8]) -> Result<D::Buffer, Error> {
    let mut buffer = device.allocate(bytes.len().max(1))?;
    device.upload(bytes, &mut buffer)?;
    Ok(buffer)
}

/// Where a kernel reduces elements to one [`GsnrRecord`] a tensor.
struct Reduction<D: Device> {
    records: D::Buffer,
    bins: D::Buffer,
    read: D::Read,
}

impl<D: Device> Reduction<D> {
    fn new(device: &D, plan: &Plan, bins: usize) -> Result<Self, Error> {
        let records = plan.tensors().len() * size_of::<GsnrRecord>();
        Ok(Self {
            records: device.allocate(records.max(1))?,
            bins: uploaded(device, bytemuck::cast_slice(&vec![0u32; bins]))?,
            // CUDA refuses to allocate nothing.
            read: device.prepare_read(records.max(1))?,
        })
    }

    /// The arguments with this in them.
    fn place(&self, device: &D, arguments: Arguments) -> Arguments {
        Arguments { gsnr_records: device.address(&self.records), gsnr_bins: device.address(&self.bins), ..arguments }
    }

    /// Waits for the records of those tensors that have one, with their places in the plan.
    fn read(&mut self, device: &D, has_one: impl Fn(usize) -> bool) -> Result<Vec<(usize, GsnrRecord)>, Error> {
        device.start_read(&self.records, &mut self.read)?;
        let records = values::<GsnrRecord>(device.complete(&self.read)?);
        Ok(records.enumerate().filter(|(index, _)| has_one(*index)).collect())
    }
}

/// What is tracked across steps, in device memory.
struct Tracking<D: Device> {
    /// The tracks of no step.
    fresh: Vec<Track>,
    tracks: D::Buffer,
    means: D::Buffer,
    deviations: D::Buffer,
    reduction: Reduction<D>,
}

impl<D: Device> Tracking<D> {
    fn new(device: &D, plan: &Plan, config: &GsnrConfig) -> Result<Self, Error> {
        let Layout { tracks: fresh, elements, bins } = config.layout(plan)?;
        let bytes = usize::try_from(elements * 4).map_err(|_| Error::OutOfMemory { bytes: usize::MAX })?;
        Ok(Self {
            // The first step writes the state before any reads it.
            means: device.allocate(bytes.max(1))?,
            deviations: device.allocate(bytes.max(1))?,
            tracks: uploaded(device, bytemuck::cast_slice(&fresh))?,
            reduction: Reduction::new(device, plan, bins)?,
            fresh,
        })
    }
}

impl<D: Device> std::fmt::Debug for DeviceProbe<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceProbe")
            .field("plan", &self.plan)
            .field("arguments", &self.arguments)
            .finish_non_exhaustive()
    }
}

/// Chunks are counted in u32 on the device: 2^40 elements are 2^25 of them.
const _: () = assert!(Plan::MAX_ELEMENTS / CHUNK as u64 <= 1 << 25);
