//! The host side of the kernels: tables, arguments, checks and read-out, written once for every device that runs them.
//!
//! [`DeviceProbe`] drives `kernels/*.cu` through the small trait [`Device`]; CUDA implements it, and so does the
//! emulation that runs the same kernels on the host. Implement it to run them elsewhere.

use crate::{
    Config, DType, Error, NonFinitePolicy, Plan, Record, StepOutputs, TensorSpec, loss_scale::LossScaleState,
    spec::CHUNK,
};
use adaptive::AdaptiveMemory;
use arguments::TensorEntry;
use bytemuck::{Pod, Zeroable};
use dot::DotMemory;
use health::HealthMemory;
use histogram::HistogramMemory;
use history::History;
use micro_batches::MicroBatchMemory;
use ranks::RankMemory;
use samples::SampleMemory;
use std::{collections::VecDeque, sync::Arc};
use tracking::{Reduction, Tracking};

mod adaptive;
mod arguments;
mod device;
mod dot;
mod health;
mod histogram;
mod history;
mod loss_scale;
mod micro_batches;
mod ranks;
mod reports;
mod samples;
mod tracking;

pub use arguments::Arguments;
pub use device::{Device, HEADER, Kernel, SOURCE};
pub use tracking::RawMoments;

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

/// Reports on their way to the host at one time; beyond, steps are measured but not reported.
const READS: usize = 4;

/// Measures and clips tensors in a device's memory. Made once; a step launches, and neither
/// allocates device memory nor waits.
pub struct DeviceProbe<D: Device> {
    device: D,
    plan: Arc<Plan>,
    config: Config,
    arguments: Arguments,
    addresses: D::Buffer,
    /// Outputs, then records, then verdict words: what a report is read from.
    results: D::Buffer,
    /// Tables and workspace, kept alive for the kernels.
    _workspace: [D::Buffer; 5],
    clip_state: D::Buffer,
    tracking: Option<Tracking<D>>,
    history: Option<History<D>>,
    histogram: Option<HistogramMemory<D>>,
    dot: Option<DotMemory<D>>,
    health: Option<HealthMemory<D>>,
    samples: Option<SampleMemory<D>>,
    adaptive: Option<AdaptiveMemory<D>>,
    ranks: Option<RankMemory<D>>,
    micro_batches: Option<MicroBatchMemory<D>>,
    /// As it was made, and where it is.
    loss_scale: Option<(LossScaleState, D::Buffer)>,
    /// For Adam's moments; made when the first of those come.
    adam: Option<(Reduction<D>, D::Buffer)>,
    /// The addresses in the device's table.
    current: Vec<u64>,
    /// Whether `current` was found free of overlaps.
    disjoint: bool,
    /// Whether a clip could change anything.
    may_change: bool,
    /// Whether its policy needs a histogram of each step.
    needs_histogram: bool,
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
        let gradients = plan.tensors().iter().map(|tensor| tensor.dtype);
        let dtypes: Vec<DType> = gradients.chain(plan.weights().unwrap_or(&[]).iter().copied()).collect();
        let lists = if plan.weights().is_some() { 2 } else { 1 };
        let (all_tensors, all_chunks) = (dtypes.len(), lists * chunk_count);
        if u32::try_from(all_tensors + all_chunks).is_err() {
            return Err(Error::OutOfMemory { bytes: (all_tensors + all_chunks) * size_of::<Record>() });
        }
        let mut entries = Vec::with_capacity(all_tensors);
        let mut chunk_tensors = Vec::with_capacity(all_chunks);
        for (index, &dtype) in dtypes.iter().enumerate() {
            let (list, tensor) = if index < tensor_count { (0, index) } else { (1, index - tensor_count) };
            let chunks = plan.chunks_of(tensor);
            entries.push(TensorEntry {
                length: plan.tensors()[tensor].len,
                first_chunk: (list * chunk_count + chunks.start) as u32,
                chunk_count: chunks.len() as u32,
                dtype: dtype.code(),
                dead_bits: dtype.threshold_bits(f64::from(config.dead_threshold)),
            });
            chunk_tensors.extend(chunks.map(|_| index as u32));
        }

        let upload = |bytes: &[u8]| uploaded(&device, bytes);
        let addresses = upload(bytemuck::cast_slice(&vec![0u64; all_tensors]))?;
        let mut results = bytemuck::bytes_of(&StepOutputs::default()).to_vec();
        results.extend_from_slice(bytemuck::cast_slice(&vec![Record::EMPTY; all_tensors]));
        results.resize(results.len() + tensor_count * size_of::<u32>(), 0);
        let read_bytes = results.len();
        let results = upload(&results)?;
        let workspace = [
            upload(bytemuck::cast_slice(&entries))?,
            upload(bytemuck::cast_slice(&chunk_tensors))?,
            device.allocate((all_chunks * size_of::<Record>()).max(1))?,
            upload(bytemuck::cast_slice(&vec![0u32; all_chunks + all_tensors + 1]))?,
            upload(bytemuck::cast_slice(&vec![1f32; tensor_count]))?,
        ];
        let clip_state = upload(bytemuck::cast_slice(&vec![0u64; config.clip.state_words(tensor_count)]))?;
        let [tensors, chunk_tensors, chunk_parts, chunks_done, coefficients] =
            workspace.each_ref().map(|buffer| device.address(buffer));
        let loss_scale = config.loss_scale.map(|rule| {
            let state = LossScaleState::new(&rule, config.dead_threshold);
            upload(bytemuck::bytes_of(&state)).map(|buffer| (state, buffer))
        });
        let loss_scale = loss_scale.transpose()?;
        let (clip_threshold, clip_smoothing, clip_steps) = config.clip.parameters();
        let outputs = device.address(&results);
        let arguments = Arguments {
            addresses: device.address(&addresses),
            tensors,
            chunk_tensors,
            chunk_parts,
            records: outputs + size_of::<StepOutputs>() as u64,
            outputs,
            health_words: outputs + (read_bytes - tensor_count * size_of::<u32>()) as u64,
            chunks_done,
            tensors_done: chunks_done + (all_chunks * size_of::<u32>()) as u64,
            max_norm: config.max_norm.unwrap_or(0.0),
            chunk_count: chunk_count as u32,
            tensor_count: tensor_count as u32,
            busy_tensors: plan.tensors().iter().filter(|tensor| tensor.len > 0).count() as u32,
            policy: config.non_finite as u32,
            clip: config.clip.code(),
            clip_threshold,
            clip_smoothing,
            clip_state: device.address(&clip_state),
            coefficients,
            clip_steps,
            loss_scale: loss_scale.as_ref().map_or(0, |(_, buffer)| device.address(buffer)),
            ..Arguments::zeroed()
        };
        const { assert!(NonFinitePolicy::Skip as u32 == 0 && NonFinitePolicy::ZeroNonFinite as u32 == 2) };
        Ok(Self {
            current: vec![0; all_tensors],
            disjoint: false,
            may_change: config.clip.may_clip(config.max_norm)
                || config.non_finite == NonFinitePolicy::ZeroNonFinite
                || config.loss_scale.is_some(),
            measured: false,
            unread: false,
            reads: VecDeque::with_capacity(READS),
            idle: (0..READS).map(|_| device.prepare_read(read_bytes)).collect::<Result<_, _>>()?,
            reported: 0,
            plan: Arc::new(plan),
            config,
            arguments,
            addresses,
            results,
            _workspace: workspace,
            clip_state,
            needs_histogram: config.clip.needs_histogram(),
            tracking: None,
            history: None,
            histogram: None,
            dot: None,
            health: None,
            samples: None,
            adaptive: None,
            loss_scale,
            ranks: None,
            micro_batches: None,
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

    /// Device address of one [`Record`] a tensor, in the plan's order, and behind them one a weight in a plan with
    /// weights; valid as long as the probe.
    pub fn records_address(&self) -> u64 {
        self.arguments.records
    }

    /// Device address of one f32 coefficient a tensor, in the plan's order, under a
    /// [`ClipPolicy`](crate::ClipPolicy) that clips tensors on their own: for optimizers that apply them.
    pub fn coefficients_address(&self) -> u64 {
        self.arguments.coefficients
    }

    /// Brings the device's address table up to date, if it is not: one upload of 8 bytes a tensor (16 with weights). Measuring and
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
        self.place(tensors, &[])
    }

    /// [`bind_raw`](Self::bind_raw) for the weights as well.
    ///
    /// # Safety
    /// As there, for both lists.
    ///
    /// # Errors
    /// As there, for either list, and [`Error::NoWeights`].
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn bind_with_weights_raw(&mut self, tensors: &[RawTensor], weights: &[RawTensor]) -> Result<(), Error> {
        self.plan.check(tensors.iter().map(|t| (t.dtype, t.len)))?;
        self.plan.check_weights(weights.iter().map(|t| (t.dtype, t.len)))?;
        self.place(tensors, weights)
    }

    /// Brings the address table up to date: all of the tensors, and the weights that are given.
    fn place(&mut self, tensors: &[RawTensor], weights: &[RawTensor]) -> Result<(), Error> {
        let given = || tensors.iter().chain(weights);
        if self.current.iter().zip(given()).all(|(&address, tensor)| address == tensor.address) {
            return Ok(());
        }
        self.check_addresses(tensors)?;
        self.check_addresses(weights)?;
        if self.device.is_capturing()? {
            return Err(Error::AddressesChangedInCapture);
        }
        for (current, tensor) in self.current.iter_mut().zip(given()) {
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
        self.launch_step(false)
    }

    /// Launches the measurement of these tensors and, in the same launch, of the weights whose gradients they are, both
    /// in the plan's order. The weights' records are behind the tensors' on the device.
    ///
    /// # Safety
    /// As for [`measure_raw`](Self::measure_raw), of both lists.
    ///
    /// # Errors
    /// Those of [`bind_with_weights_raw`](Self::bind_with_weights_raw), and the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn measure_with_weights_raw(
        &mut self,
        tensors: &[RawTensor],
        weights: &[RawTensor],
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.bind_with_weights_raw(tensors, weights) }?;
        self.launch_step(true)
    }

    fn launch_step(&mut self, weights: bool) -> Result<(), Error> {
        if self.needs_histogram {
            self.launch_histogram_of_all()?;
        }
        let lists = 1 + u32::from(weights);
        let arguments = Arguments {
            weights: u32::from(weights),
            busy_tensors: lists * self.arguments.busy_tensors,
            ..self.arguments
        };
        let chunks = lists * self.arguments.chunk_count;
        self.launch_measure(self.blocks(Kernel::Measure, chunks), &arguments)?;
        if self.tracking.is_some() {
            self.launch(Kernel::Update)?;
        }
        if let Some(memory) = &mut self.micro_batches {
            memory.accumulation.close();
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
        // SAFETY: the caller's promise includes this one.
        unsafe { self.bind_to_change(tensors) }?;
        if self.may_change { self.launch(Kernel::Clip) } else { Ok(()) }
    }

    /// [`bind_raw`](Self::bind_raw) before what changes the tensors by the last measurement.
    ///
    /// # Safety
    /// As there.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    unsafe fn bind_to_change(&mut self, tensors: &[RawTensor]) -> Result<(), Error> {
        self.plan.check(tensors.iter().map(|t| (t.dtype, t.len)))?;
        if !self.measured {
            return Err(Error::NotMeasured);
        }
        // SAFETY: the caller's promise is the same.
        unsafe { self.bind_raw(tensors) }?;
        if !self.disjoint {
            self.check_overlaps()?;
            self.disjoint = true;
        }
        Ok(())
    }

    /// Blocks of a launch: no more than fill the device.
    fn blocks(&self, kernel: Kernel, chunks: u32) -> u32 {
        chunks.clamp(1, self.device.resident_blocks(kernel).max(1))
    }

    fn launch(&self, kernel: Kernel) -> Result<(), Error> {
        self.device.launch(kernel, self.blocks(kernel, self.arguments.chunk_count), &self.arguments)
    }

    /// An in-place clip would scale shared memory twice.
    fn check_overlaps(&self) -> Result<(), Error> {
        match self.ranges().windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => Err(Error::Overlap { first: pair[0].2.to_owned(), second: pair[1].2.to_owned() }),
            None => Ok(()),
        }
    }

    /// Where the tensors that have elements begin and end, with their names, from the lowest address on.
    fn ranges(&self) -> Vec<(u64, u64, &str)> {
        let tensors = self.plan.tensors().iter().zip(&self.current).filter(|(tensor, _)| tensor.len > 0);
        let range = |(tensor, &start): (&'_ TensorSpec, &u64)| (start, start + tensor.len * tensor.dtype.size() as u64);
        let mut ranges: Vec<_> = tensors.map(|of| (range(of).0, range(of).1, of.0.name.as_str())).collect();
        ranges.sort_unstable();
        ranges
    }

    /// Fails if a weight shares memory with a gradient that is to be changed; the gradients share none.
    fn check_apart(&self, weights: &[RawTensor]) -> Result<(), Error> {
        let ranges = self.ranges();
        for (weight, spec) in weights.iter().zip(self.plan.tensors()).filter(|(weight, _)| weight.len > 0) {
            let end = weight.address + weight.len * weight.dtype.size() as u64;
            let next = ranges.partition_point(|range| range.1 <= weight.address);
            if let Some(range) = ranges.get(next).filter(|range| range.0 < end) {
                return Err(Error::Overlap { first: range.2.to_owned(), second: format!("weight of {}", spec.name) });
            }
        }
        Ok(())
    }
}

/// What was read from the device, value by value.
fn values<T: Pod>(bytes: &[u8]) -> impl Iterator<Item = T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned)
}

/// Fails while work is being recorded.
fn outside_capture(device: &impl Device, error: Error) -> Result<(), Error> {
    if device.is_capturing()? { Err(error) } else { Ok(()) }
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
