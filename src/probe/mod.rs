//! The probe: tables, checks and launches, written once for every device.

mod arguments;
mod given;
mod memory;
mod numbering;
mod reports;
#[cfg(feature = "serde")]
mod serialize;
mod state;

pub(crate) use arguments::Other;
pub use arguments::{Arguments, Common, StepArguments, TensorEntry};
pub(crate) use given::{Given, Located, Planned, check_address, weight_of};
pub(crate) use numbering::Numbering;
pub use state::ProbeState;

pub(crate) use memory::{Mirrored, ReadBack, copied, outside_capture, parts, set_parts, uploaded, values};
#[cfg(feature = "serde")]
pub(crate) use serialize::{bits, bytes};
pub(crate) use state::differs;
#[cfg(feature = "checkpoint")]
pub(crate) use state::{load, save};

use crate::{
    Config, DType, Error, NonFinitePolicy, Plan, Record, Tensor, TensorMut,
    clip::ClipArguments,
    device::{Buffer, Device, Read, counting::Counting},
    features::{Features, Rooms},
    measure::StepSums,
    ranks::Ranks,
    spec::{CHUNK, TILE},
};
use bytemuck::Zeroable;
use reports::Reports;
use std::sync::atomic::Ordering;

/// Measures gradients in device memory, and clips them.
///
/// A probe is made once, for the tensors of a [`Plan`] and the features of a [`Config`]. It allocates all its device
/// memory then, and keeps it until it is dropped. A step launches kernels and waits for nothing; its report comes by
/// [`poll`](Self::poll) or [`wait`](Self::wait). A step looks the same on every device:
///
/// ```
/// use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe};
///
/// let (mut weight, mut bias) = (vec![0.3f32; 4096], vec![half::bf16::from_f32(-4.0); 64]);
/// let plan = Plan::new([("weight", DType::F32, 4096), ("bias", DType::BF16, 64)])?;
/// let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::global_norm(1.0)))?;
/// // every step:
/// probe.step(&mut [&mut weight, &mut bias])?;
/// if let Some(report) = probe.poll()? {
///     println!("{report}");
/// }
/// # Ok::<(), gradprobe::Error>(())
/// ```
pub struct Probe {
    reports: Reports,
    pub(crate) rooms: Rooms,
    pub(crate) core: Core,
}

/// The part of a probe that every room works with.
pub(crate) struct Core {
    pub plan: Plan,
    pub config: Config,
    /// The arguments of a measurement; every kernel gets the common part.
    pub step: StepArguments,
    /// Addresses of the tensors, and behind them of the weights.
    addresses: Mirrored<u64>,
    /// The tensor of each chunk, as the kernels have it.
    pub chunk_tensors: Vec<u32>,
    /// Whether the tensors were found free of overlaps.
    disjoint: bool,
    /// Whether they were found free of overlaps with the weights that an optimizer moves, and those weights with one
    /// another.
    pub apart: bool,
    /// One [`UpdateRecord`](crate::optim::UpdateRecord) a tensor, where an optimizer is declared.
    pub updates: u64,
    /// Whether a step has been launched.
    pub measured: bool,
    pub numbering: Numbering,
    /// Of each gradient, whether it has been multiplied by the coefficient of that step.
    pub clipped: Vec<bool>,
    /// Whether the caller has vouched for graphs; see [`Probe::bind`].
    promised: bool,
    clip_state: Buffer,
    clip_read: Box<dyn Read>,
    /// Tables and workspace, kept for the kernels.
    _workspace: Vec<Buffer>,
    /// Dropped last: it knows when memory may be freed.
    pub device: Box<dyn Device>,
}

/// A feature of a probe: [`Config`] declares it, and a method of [`Probe`] gives it.
pub struct Room<'p, M> {
    pub(crate) core: &'p mut Core,
    pub(crate) memory: &'p mut M,
}

impl<'p, M> Room<'p, M> {
    /// # Errors
    /// [`Error::NotDeclared`], which names the call that declares it.
    pub(crate) fn new(core: &'p mut Core, memory: &'p mut Option<M>, declare: &'static str) -> Result<Self, Error> {
        memory.as_mut().map(|memory| Self { core, memory }).ok_or(Error::NotDeclared { declare })
    }
}

/// Where a probe's results are in device memory, for kernels that read them. The addresses hold as long as the probe
/// lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Addresses {
    /// Address of the [`StepOutputs`](crate::StepOutputs).
    pub outputs: u64,
    /// Address of one [`Record`] a tensor, in the plan's order. In a plan with weights, one a weight follows.
    pub records: u64,
    /// Address of one f32 coefficient a tensor, under a [`Clip`](crate::Clip) that clips each tensor on its own.
    pub coefficients: u64,
    /// Address of the f32 loss scale of the next step. The kernel that begins `backward` multiplies by it. A kernel of
    /// your own that runs before the measurement may set it.
    pub loss_scale: Option<u64>,
    /// Address of one u32 word a tensor, by the declared rules.
    pub health_words: Option<u64>,
}

impl Probe {
    /// Makes a probe on this device: [`Cpu`](crate::Cpu) or [`Cuda`](crate::cuda::Cuda). Allocates all that is
    /// declared. With [`Config::ranks`] this is a collective call.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] and its like for an invalid declaration. [`Error::OutOfMemory`], with the bytes of the
    /// whole probe; none of them stay allocated. Those of [`Config::ranks`], and the device's.
    pub fn new(device: impl Device + 'static, plan: Plan, config: Config) -> Result<Self, Error> {
        let bytes = config.bytes(&plan);
        let made = match config.features.ranks.clone() {
            Some(ranks) => Self::among(device, plan, config, &ranks, bytes.clone().map(drop)),
            None => bytes.clone().and_then(|_| {
                outside_capture(&device, Error::UploadInCapture)?;
                Self::build(Box::new(device), plan, config).map_err(|(error, _)| error)
            }),
        };
        made.map_err(|error| match (error, bytes) {
            (Error::OutOfMemory { .. }, Ok(bytes)) => Error::OutOfMemory { bytes },
            (other, _) => other,
        })
    }

    /// Makes one of several, of which all succeed or none; `possible` says whether this one can.
    fn among(
        device: impl Device + 'static,
        plan: Plan,
        config: Config,
        ranks: &Ranks,
        possible: Result<(), Error>,
    ) -> Result<Self, Error> {
        ranks.reaches(&device)?;
        ranks.all_or_none(&device, possible)?;
        let joined = ranks.join(&device, &plan, &config)?;
        let config = config.ranks(joined);
        match Self::build(Box::new(device), plan, config) {
            Ok(probe) => ranks.all_or_none(&*probe.core.device, Ok(())).map(|()| probe),
            // Always an error, since there is no probe.
            Err((error, device)) => ranks.all_or_none(&*device, Err(error)),
        }
    }

    /// Makes a probe, or gives the error and the device.
    fn build(device: Box<dyn Device>, plan: Plan, config: Config) -> Result<Self, (Error, Box<dyn Device>)> {
        let mut core = Core::new(device, plan, config)?;
        let made = Reports::new(&mut core).and_then(|reports| Ok((reports, Rooms::new(&mut core)?)));
        match made {
            Ok((reports, rooms)) => Ok(Self { reports, rooms, core }),
            Err(error) => Err((error, core.device)),
        }
    }

    /// The plan this probe was made for.
    pub fn plan(&self) -> &Plan {
        &self.core.plan
    }

    /// Whether [`Config::histogram`] was declared.
    pub(crate) fn declares_histogram(&self) -> bool {
        self.rooms.histogram.is_some()
    }

    /// Whether [`Config::tracking`] was declared.
    pub(crate) fn declares_tracking(&self) -> bool {
        self.rooms.tracking.is_some()
    }

    /// The name of the device: `cpu`, `cuda`, or the emulation's own.
    pub fn device(&self) -> &'static str {
        self.core.device.name()
    }

    /// Where the results are on the device.
    pub fn addresses(&self) -> Addresses {
        let StepArguments { common, coefficients, loss_scale, health_words, .. } = self.core.step;
        Addresses {
            outputs: common.outputs,
            records: common.records,
            coefficients,
            loss_scale: (loss_scale != 0).then_some(loss_scale),
            health_words: self.rooms.rules.is_some().then_some(health_words),
        }
    }

    /// Tells the device the addresses of the tensors, and of the weights if there are any, without a launch. Call it
    /// before capturing a graph, which is refused without it, and before replaying a graph on other tensors. Uploads 8
    /// bytes a tensor if they have moved.
    ///
    /// # Safety
    /// As long as a graph captured after this call can be replayed, the probe is not dropped. The tensors of captured
    /// calls, and of the last call before a replay, are as the maker of a [`RawTensor`](crate::RawTensor) promises.
    /// With other ranks, such graphs are destroyed before the probe is dropped: NCCL waits for that.
    ///
    /// # Errors
    /// When the tensors are not the plan's, for a null or misaligned address, and [`Error::AddressesChangedInCapture`].
    #[allow(unsafe_code, reason = "a graph keeps what no borrow of ours outlives")]
    pub unsafe fn bind(&mut self, tensors: &[&dyn Tensor], weights: &[&dyn Tensor]) -> Result<(), Error> {
        let place = self.core.device.place();
        let tensors = self.core.read(&place, tensors, Planned::Gradients)?;
        let weights = match weights {
            [] => None,
            weights => Some(self.core.read(&place, weights, Planned::Weights)?),
        };
        self.core.place(&tensors, weights.as_ref())?;
        self.core.device.expect_graphs()?;
        self.core.promised = true;
        weights.map_or(Ok(()), Given::finish)?;
        tensors.finish()
    }

    /// Sets the number of the next step to the trainer's. It may begin anywhere and leave numbers out. By default the
    /// first step is 1 and each is one more than the last. Reports, findings and history use it.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless it is above the last, and after [`bind`](Self::bind): the host does not see the measurements of a
    /// replayed graph, whose steps count on by one.
    pub fn set_step(&mut self, step: u64) -> Result<(), Error> {
        if self.core.promised {
            let expected = "left to a probe whose measurements a graph replays";
            return Err(Error::InvalidConfig { option: "step", expected, value: step.to_string() });
        }
        let Features { history, samples, .. } = &self.core.config.features;
        let kept = history.unwrap_or(0).max(samples.map_or(0, |samples| samples.steps()));
        let oldest = self.core.numbering.measured().saturating_sub(kept.into()).min(self.reports.reported());
        self.core.numbering.set_next(step, oldest)
    }

    /// The number of the last step that was measured.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn last_step(&self) -> u64 {
        self.core.numbering.of(self.core.numbering.measured())
    }

    /// Launches the measurement of these tensors: the plan's, in its order.
    ///
    /// # Errors
    /// [`Error::TensorCount`] or [`Error::TensorMismatch`] when they are not the plan's, [`Error::AllAbsent`],
    /// [`Error::WrongDevice`], and the device's. Nothing is launched then.
    pub fn measure(&mut self, tensors: &[&dyn Tensor]) -> Result<(), Error> {
        let place = self.core.device.place();
        let tensors = self.core.read(&place, tensors, Planned::Gradients)?;
        self.core.place(&tensors, None)?;
        self.launch_step(false)?;
        tensors.finish()
    }

    /// Launches the measurement of these gradients and, in the same launch, of their weights. Adds the norms of the
    /// weights, and the ratio of both norms, to all that [`measure`](Self::measure) finds. The plan must be made
    /// [`with_weights`](Plan::with_weights). Steps with and without weights may alternate.
    ///
    /// # Errors
    /// [`Error::NotDeclared`], and those of [`measure`](Self::measure) for either list.
    pub fn measure_with_weights(&mut self, tensors: &[&dyn Tensor], weights: &[&dyn Tensor]) -> Result<(), Error> {
        let place = self.core.device.place();
        let tensors = self.core.read(&place, tensors, Planned::Gradients)?;
        let weights = self.core.read(&place, weights, Planned::Weights)?;
        self.core.place(&tensors, Some(&weights))?;
        self.launch_step(true)?;
        weights.finish()?;
        tensors.finish()
    }

    /// Launches the clip of these tensors, in place, as the last measurement decided. Call it once a measurement and tensor. Where
    /// the configuration leaves nothing to change, nothing is launched, and it may be called any number of times.
    ///
    /// # Errors
    /// [`Error::NotMeasured`]. [`Error::AlreadyClipped`], unless [`bind`](Self::bind) was called: a replay may have
    /// measured since. [`Error::Overlap`], and those of [`measure`](Self::measure).
    pub fn clip(&mut self, tensors: &mut [&mut dyn TensorMut]) -> Result<(), Error> {
        let place = self.core.device.place();
        let tensors = self.core.write(&place, tensors, Planned::Gradients)?;
        self.core.check_unclipped(&tensors)?;
        self.core.place_to_change(&tensors)?;
        self.launch_clip(&tensors)?;
        tensors.finish()
    }

    /// Measures these tensors and clips them in place: two launches, without waiting.
    ///
    /// # Errors
    /// Those of [`measure`](Self::measure) and [`clip`](Self::clip).
    pub fn step(&mut self, tensors: &mut [&mut dyn TensorMut]) -> Result<(), Error> {
        let place = self.core.device.place();
        let tensors = self.core.write(&place, tensors, Planned::Gradients)?;
        self.core.place(&tensors, None)?;
        self.core.check_overlaps(&tensors)?;
        self.launch_step(false)?;
        self.launch_clip(&tensors)?;
        tensors.finish()
    }

    pub(crate) fn launch_step(&mut self, weights: bool) -> Result<(), Error> {
        let Self { core, .. } = self;
        core.check_promise()?;
        if core.config.clip.needs_histogram() {
            crate::histogram::launch_of_all(core, self.rooms.ranks.as_ref())?;
        }
        let lists = 1 + u32::from(weights);
        let step = StepArguments { weights: u32::from(weights), ..core.step };
        let chunks = lists * step.common.chunk_count;
        match &mut self.rooms.ranks {
            Some(ranks) => ranks.launch_measure(core, chunks, step)?,
            None => core.launch(chunks, &step)?,
        }
        // The step is reported even where the work after it fails.
        core.measured = true;
        core.clipped.fill(false);
        core.numbering.launched();
        self.reports.step_launched();
        if let Some(tracking) = &self.rooms.tracking {
            tracking.launch_update(core)?;
        }
        if let Some(micro_batches) = &mut self.rooms.micro_batches {
            micro_batches.close();
        }
        Ok(())
    }

    fn launch_clip(&mut self, tensors: &Given<'_>) -> Result<(), Error> {
        let Self { core, .. } = self;
        let config = &core.config;
        let may_change = config.clip.may_clip()
            || config.non_finite == NonFinitePolicy::ZeroNonFinite
            || config.features.loss_scale.is_some();
        if !may_change {
            return Ok(());
        }
        let StepArguments { common, clip_state, coefficients, .. } = core.step;
        core.launch_chunks(&ClipArguments { common, clip_state, coefficients })?;
        core.set_clipped(tensors);
        Ok(())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(ranks) = &mut self.rooms.ranks {
            ranks.settle(&*self.core.device);
        }
    }
}

impl Config {
    /// Gives the bytes of device memory that a probe for this plan takes with all that is declared here.
    ///
    /// # Errors
    /// Those of [`Probe::new`] for an invalid declaration.
    pub fn bytes(&self, plan: &Plan) -> Result<u64, Error> {
        self.check()?;
        self.features.ranks.as_ref().map_or(Ok(()), |ranks| ranks.check(plan, self))?;
        let device = Counting::default();
        Probe::build(Box::new(device.clone()), plan.clone(), self.clone()).map_err(|(error, _)| error)?;
        Ok(device.0.load(Ordering::Relaxed))
    }
}

/// The device memory of a probe, before that of its features.
struct Tables {
    step: StepArguments,
    addresses: Mirrored<u64>,
    chunk_tensors: Vec<u32>,
    clip_state: Buffer,
    clip_read: Box<dyn Read>,
    workspace: Vec<Buffer>,
}

impl Tables {
    #[expect(clippy::cast_possible_truncation, reason = "2^40 elements are 2^25 chunks; tensors are checked")]
    fn new(device: &dyn Device, plan: &Plan, config: &Config) -> Result<Self, Error> {
        let tensor_count = plan.tensors().len();
        let chunk_count = plan.chunks();
        let gradients = plan.tensors().iter().map(|tensor| tensor.dtype);
        let dtypes: Vec<DType> = gradients.chain(plan.weights().unwrap_or(&[]).iter().copied()).collect();
        let lists = if plan.weights().is_some() { 2 } else { 1 };
        let (all_tensors, all_chunks) = (dtypes.len(), lists * chunk_count);
        if u32::try_from(all_tensors + all_chunks).is_err() {
            return Err(Error::OutOfMemory { bytes: u64::MAX });
        }
        let ranks = config.features.ranks.as_ref();
        let is_uncounted = |index| ranks.is_some_and(|ranks| ranks.is_uncounted(index));
        let mut entries = Vec::with_capacity(all_tensors);
        let mut chunk_tensors = Vec::with_capacity(all_chunks);
        for (index, &dtype) in dtypes.iter().enumerate() {
            let len = plan.tensors()[index % tensor_count].len;
            entries.push(TensorEntry {
                length: len,
                first_chunk: 0,
                chunk_count: len.div_ceil(CHUNK as u64) as u32,
                dtype: dtype as u16,
                is_uncounted: u16::from(is_uncounted(index % tensor_count)),
                dead_bits: dtype.threshold_bits(f64::from(config.dead_threshold)),
            });
        }
        // In each list the chunks of small tensors come last.
        let is_small = |entry: &TensorEntry| entry.length <= TILE as u64;
        for (list, members) in entries.chunks_mut(tensor_count.max(1)).enumerate() {
            for small in [false, true] {
                for (index, entry) in members.iter_mut().enumerate().filter(|(_, entry)| is_small(entry) == small) {
                    entry.first_chunk = chunk_tensors.len() as u32;
                    let tensor = (list * tensor_count + index) as u32;
                    chunk_tensors.extend((0..entry.chunk_count).map(|_| tensor));
                }
            }
        }
        let large = entries[..tensor_count].iter().filter(|entry| !is_small(entry));
        let large_chunks = large.map(|entry| entry.chunk_count).sum();

        let upload = |bytes: &[u8]| uploaded(device, bytes);
        let addresses = Mirrored::new(device, all_tensors)?;
        let workspace = vec![
            upload(bytemuck::cast_slice(&entries))?,
            upload(bytemuck::cast_slice(&chunk_tensors))?,
            device.allocate((all_chunks * size_of::<Record>()).max(1))?,
            upload(bytemuck::cast_slice(&vec![0u32; all_chunks + all_tensors + 1]))?,
            upload(bytemuck::cast_slice(&vec![1f32; tensor_count]))?,
            upload(bytemuck::bytes_of(&StepSums::default()))?,
        ];
        let clip_state = upload(bytemuck::cast_slice(&vec![0u64; config.clip.state_words(tensor_count)]))?;
        let address = |index: usize| workspace[index].address();
        let (clip_threshold, clip_smoothing, clip_steps) = config.clip.parameters();
        const { assert!(NonFinitePolicy::Skip as u32 == 0 && NonFinitePolicy::ZeroNonFinite as u32 == 2) };
        let common = Common {
            addresses: addresses.address(),
            tensors: address(0),
            chunk_tensors: address(1),
            chunk_parts: address(2),
            chunks_done: address(3),
            tensors_done: address(3) + (all_chunks * size_of::<u32>()) as u64,
            chunk_count: chunk_count as u32,
            tensor_count: tensor_count as u32,
            ..Common::zeroed()
        };
        let step = StepArguments {
            common,
            max_norm: config.clip.max_norm().unwrap_or(0.0),
            large_chunks,
            policy: config.non_finite as u32,
            clip: config.clip.code(),
            clip_threshold,
            clip_smoothing,
            clip_steps,
            clip_state: clip_state.address(),
            coefficients: address(4),
            sums: address(5),
            ..StepArguments::zeroed()
        };
        let clip_read = device.read(clip_state.bytes())?;
        Ok(Self { step, addresses, chunk_tensors, clip_state, clip_read, workspace })
    }
}

impl Core {
    fn new(device: Box<dyn Device>, plan: Plan, config: Config) -> Result<Self, (Error, Box<dyn Device>)> {
        match Tables::new(&*device, &plan, &config) {
            Ok(Tables { step, addresses, chunk_tensors, clip_state, clip_read, workspace }) => Ok(Self {
                clipped: vec![false; plan.tensors().len()],
                plan,
                config,
                step,
                addresses,
                chunk_tensors,
                disjoint: false,
                apart: false,
                updates: 0,
                measured: false,
                numbering: Numbering::default(),
                promised: false,
                clip_state,
                clip_read,
                _workspace: workspace,
                device,
            }),
            Err(error) => Err((error, device)),
        }
    }

    /// Launches a kernel for all chunks of the plan.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch).
    pub fn launch_chunks(&self, arguments: &impl Arguments) -> Result<(), Error> {
        self.launch(self.step.common.chunk_count, arguments)
    }

    /// Fails in a capture that the caller has not vouched for. Nothing is queued then.
    ///
    /// # Errors
    /// [`Error::NotBound`], and the device's.
    fn check_promise(&self) -> Result<(), Error> {
        if self.promised { Ok(()) } else { outside_capture(&*self.device, Error::NotBound) }
    }

    /// Launches a kernel for so many chunks or other pieces of work, with no more blocks than fill the device.
    ///
    /// # Errors
    /// [`Error::NotBound`], and the device's.
    pub fn launch<A: Arguments>(&self, pieces: u32, arguments: &A) -> Result<(), Error> {
        self.check_promise()?;
        let blocks = pieces.clamp(1, self.device.resident_blocks(A::KERNEL).max(1));
        // SAFETY: the arguments are those of this probe's buffers, in the layout of the kernel; the call that launches
        // has borrowed the tensors.
        #[allow(unsafe_code, reason = "the one place where kernels are launched")]
        unsafe {
            self.device.launch(A::KERNEL, blocks, bytemuck::bytes_of(arguments))
        }
    }

    /// Clears the state that a clip by a quantile has from the last step.
    pub fn clear_clip_state(&self) -> Result<(), Error> {
        self.device.clear(&self.clip_state)
    }

    /// Records of this rank: of the tensors and, in a plan with weights, of the weights.
    pub fn record_count(&self) -> usize {
        self.plan.tensors().len() * if self.plan.weights().is_some() { 2 } else { 1 }
    }
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe")
            .field("device", &self.device())
            .field("plan", &self.core.plan)
            .field("config", &self.core.config)
            .finish_non_exhaustive()
    }
}

/// Chunks are counted in u32 on the device: 2^40 elements are 2^25 of them.
const _: () = assert!(Plan::MAX_ELEMENTS / CHUNK as u64 <= 1 << 25 || cfg!(miri));
