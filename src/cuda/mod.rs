//! The CUDA backend: the kernels on the caller's stream, over the caller's memory.
//!
//! ```no_run
//! use gradprobe::{Config, CudaProbe, DType, Plan, cuda::{DeviceTensor, DeviceTensorMut}, cudarc::driver::CudaContext};
//!
//! let stream = CudaContext::new(0)?.new_stream()?;
//! let mut weight = stream.alloc_zeros::<half::bf16>(4096)?;
//! let mut bias = stream.alloc_zeros::<f32>(64)?;
//! let plan = Plan::new([("weight", DType::BF16, 4096), ("bias", DType::F32, 64)])?;
//! let mut probe = CudaProbe::new(&stream, plan, Config::default().max_norm(1.0))?;
//! for _step in 0..100 {
//!     // backward(...), and then:
//!     probe.measure(&[&weight, &bias])?; // one launch
//!     probe.clip(&mut [&mut weight, &mut bias])?; // one launch
//!     if let Some(report) = probe.poll()? {
//!         println!("{report}"); // of this step or an earlier one; never waits
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Streams and graphs
//!
//! Everything is ordered on the stream the probe was made with. Slices and views go through cudarc's own event
//! tracking; with the unsafe calls of [`DeviceProbe`], which take bare addresses, order is the caller's matter.
//! Measuring and clipping can be captured into a graph on a stream that is not the default one: make the probe, and
//! [`bind`](CudaProbe::bind) the tensors, before the capture begins. A replay measures what the address table then
//! holds, so gradients may move between replays by another `bind`. cudarc's waits on events from before a capture are
//! not legal in it: capture with its event tracking off, or use [`DeviceProbe::measure_raw`].
//!
//! What allocates or uploads to set the probe up is refused during a capture ([`Error::SetUpInCapture`]): `track`,
//! `keep_history`, `tag`, `judge_by`, `set_loss_scale`, `join` and every `enable_…`.
//!
//! An error may stem from an earlier asynchronous call, of the caller's or of a `drop`: CUDA and cudarc report those
//! with whatever call comes next.
#![allow(unsafe_code, reason = "calls the CUDA driver")]

mod device;
mod driver;
mod host;
mod module;
#[cfg(feature = "nccl")]
mod nccl;
mod tensor;

pub use device::{Cuda, PinnedRead};
pub use module::{FATBIN, compile};
#[cfg(feature = "nccl")]
pub use nccl::NcclCommunicator;
pub use tensor::{DeviceTensor, DeviceTensorMut};

use crate::{
    AdamStep, AdaptiveClip, AdaptiveClipReport, Config, DType, DotReport, Error, GsnrConfig, GsnrReport,
    HistogramReport, HistoryReport, MicroBatchReport, Plan, RankReport, Report, SampleConfig, SampleReport,
    health::Health,
    launch::{DeviceProbe, RawMoments, RawTensor},
};
use cudarc::driver::{CudaStream, SyncOnDrop};
use host::Staging;
use std::sync::Arc;

/// Measures and clips gradients in device memory. Made once; a step is at most two launches, and nothing waits.
pub struct CudaProbe {
    probe: DeviceProbe<Cuda>,
    /// For tensors that lie on the host; made when the first of those come.
    staging: Option<Staging>,
    /// The same for the second list of a dot product.
    staging_of_others: Option<Staging>,
}

/// The moments of one tensor in device memory, slices or views of f32. Empty ones are none.
#[derive(Clone, Copy)]
pub struct DeviceMoments<'a> {
    /// m, as torch calls it.
    pub exp_avg: &'a dyn DeviceTensor,
    /// v.
    pub exp_avg_sq: &'a dyn DeviceTensor,
}

/// A step's tensors by their addresses, and cudarc's guards, to be dropped after the launch. Filled in one loop: to a
/// model of 1000 tensors, iterators that pass on pairs cost more than all else the host does.
struct Given<'a> {
    tensors: Vec<RawTensor>,
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Given<'a> {
    fn with_capacity(count: usize) -> Self {
        Self { tensors: Vec::with_capacity(count), guards: Vec::with_capacity(count) }
    }

    #[inline(always)]
    fn push(&mut self, dtype: DType, count: usize, (address, guard): (u64, SyncOnDrop<'a>)) {
        self.tensors.push(RawTensor { address, len: count as u64, dtype });
        self.guards.push(guard);
    }
}

impl CudaProbe {
    /// A probe whose work is ordered on `stream`. Loads the kernels, allocates the workspace and uploads the plan.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::KernelLoad`], or the driver's.
    pub fn new(stream: &Arc<CudaStream>, plan: Plan, config: Config) -> Result<Self, Error> {
        let probe = DeviceProbe::with_device(Cuda::new(Arc::clone(stream))?, plan, config)?;
        Ok(Self { probe, staging: None, staging_of_others: None })
    }

    /// A probe on a new stream of a device. For those who have no stream yet: it also finds out whether there is a
    /// driver, which cudarc answers with a panic.
    ///
    /// # Errors
    /// [`Error::DriverNotFound`], [`Error::DeviceNotFound`], and those of [`new`](Self::new).
    pub fn on_device(ordinal: usize, plan: Plan, config: Config) -> Result<Self, Error> {
        let stream = driver::context(ordinal)?.new_stream().map_err(driver::failed("making a stream"))?;
        Self::new(&stream, plan, config)
    }

    /// Fails if a tensor, the plan's at `index`, belongs to another context.
    fn check_context(&self, tensor: &(impl DeviceTensor + ?Sized), index: usize) -> Result<(), Error> {
        match self.plan().tensors().get(index) {
            Some(spec) if tensor.context() != self.stream().context() => {
                Err(Error::WrongContext { name: spec.name.clone() })
            }
            _ => Ok(()),
        }
    }

    fn read<'a>(&self, stream: &'a CudaStream, tensors: &'a [&dyn DeviceTensor]) -> Result<Given<'a>, Error> {
        let mut given = Given::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            self.check_context(*tensor, index)?;
            given.push(tensor.dtype(), tensor.element_count(), tensor.read_address(stream));
        }
        Ok(given)
    }

    fn write<'a>(
        &self,
        stream: &'a CudaStream,
        tensors: &'a mut [&mut dyn DeviceTensorMut],
    ) -> Result<Given<'a>, Error> {
        let mut given = Given::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter_mut().enumerate() {
            self.check_context(&**tensor, index)?;
            let (dtype, count) = (tensor.dtype(), tensor.element_count());
            given.push(dtype, count, tensor.write_address(stream));
        }
        Ok(given)
    }

    /// Tells the device where the tensors are, without a launch: before a graph capture, and when gradients have moved
    /// between replays. The memory must stay until the graph is no longer replayed.
    ///
    /// # Errors
    /// When the tensors are not the plan's, or of another context; [`Error::AddressesChangedInCapture`].
    pub fn bind(&mut self, tensors: &[&dyn DeviceTensor]) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let given = self.read(&stream, tensors)?;
        // SAFETY: the slices are of that dtype and length, in this context; only launches read them, and those that
        // this type makes bind again.
        unsafe { self.probe.bind_raw(&given.tensors) }
    }

    /// Launches the measurement of `tensors`, those of the plan in its order.
    ///
    /// # Errors
    /// When they are not, or belong to another context, or the driver fails.
    pub fn measure(&mut self, tensors: &[&dyn DeviceTensor]) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let given = self.read(&stream, tensors)?;
        // SAFETY: the slices are of that dtype and length, in this context, and borrowed until the launch is queued;
        // the guards tell cudarc about the read, and its memory is freed in the order of its stream.
        unsafe { self.probe.measure_raw(&given.tensors) }
    }

    /// Launches the measurement of `tensors` and, in the same launch, of the `weights` whose gradients they are: their
    /// norms, and the ratio of both, beside all that [`measure`](Self::measure) finds. For a plan made
    /// [`with_weights`](Plan::with_weights); steps with and without may alternate.
    ///
    /// # Errors
    /// [`Error::NoWeights`], and those of [`measure`](Self::measure) for either list.
    pub fn measure_with_weights(
        &mut self,
        tensors: &[&dyn DeviceTensor],
        weights: &[&dyn DeviceTensor],
    ) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let (tensors, weights) = (self.read(&stream, tensors)?, self.read(&stream, weights)?);
        // SAFETY: as in `measure`.
        unsafe { self.probe.measure_with_weights_raw(&tensors.tensors, &weights.tensors) }
    }

    /// [`bind`](Self::bind) for the weights as well.
    ///
    /// # Errors
    /// As there, for either list, and [`Error::NoWeights`].
    pub fn bind_with_weights(
        &mut self,
        tensors: &[&dyn DeviceTensor],
        weights: &[&dyn DeviceTensor],
    ) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let (tensors, weights) = (self.read(&stream, tensors)?, self.read(&stream, weights)?);
        // SAFETY: as in `bind`.
        unsafe { self.probe.bind_with_weights_raw(&tensors.tensors, &weights.tensors) }
    }

    /// Launches the clip of `tensors`, in place, by what the last measurement decided.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], [`Error::Overlap`], and those of [`measure`](Self::measure).
    pub fn clip(&mut self, tensors: &mut [&mut dyn DeviceTensorMut]) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let given = self.write(&stream, tensors)?;
        // SAFETY: as in `measure`, and the slices are borrowed mutably.
        unsafe { self.probe.clip_raw(&given.tensors) }
    }

    /// See [`DeviceProbe::join`]: makes this probe one of many, whose records NCCL gathers on the probe's stream. For another
    /// [`DeviceCommunicator`](crate::ranks::DeviceCommunicator), [`raw`](Self::raw) has the same call.
    ///
    /// # Errors
    /// As there, and [`Error::Communication`] for a communicator of another stream.
    #[cfg(feature = "nccl")]
    pub fn join(
        &mut self,
        communicator: NcclCommunicator,
        placements: impl IntoIterator<Item = crate::ranks::Placement>,
    ) -> Result<(), Error> {
        if communicator.stream().cu_stream() != self.stream().cu_stream() {
            let what = "NCCL's communicator is of another stream than the probe".to_owned();
            return Err(Error::Communication { what });
        }
        self.probe.join(communicator, placements)
    }

    /// See [`DeviceProbe::rank_report`]: what each rank measured. Waits.
    ///
    /// # Errors
    /// [`Error::NotJoined`], [`Error::NotMeasured`], or the driver's.
    pub fn rank_report(&mut self) -> Result<RankReport, Error> {
        self.probe.rank_report()
    }

    /// See [`DeviceProbe::enable_micro_batches`].
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0, or the driver's when there is not enough memory.
    pub fn enable_micro_batches(&mut self, count: u32) -> Result<(), Error> {
        self.probe.enable_micro_batches(count)
    }

    /// Launches the measurement of the gradients of the next micro-batch of an accumulation, before they are added to the
    /// sum. See [`DeviceProbe::measure_micro_batch_raw`].
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::TooManyMicroBatches`], and those of [`measure`](Self::measure).
    pub fn measure_micro_batch(&mut self, tensors: &[&dyn DeviceTensor]) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let given = self.read(&stream, tensors)?;
        // SAFETY: as in `measure`.
        unsafe { self.probe.measure_micro_batch_raw(&given.tensors) }
    }

    /// See [`DeviceProbe::micro_batches`]. Waits.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`] before the first, or the driver's.
    pub fn micro_batches(&mut self) -> Result<MicroBatchReport, Error> {
        self.probe.micro_batches()
    }

    /// See [`DeviceProbe::set_loss_scale`].
    ///
    /// # Errors
    /// [`Error::NoLossScale`], [`Error::InvalidConfig`], or the driver's.
    pub fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        self.probe.set_loss_scale(scale)
    }

    /// See [`DeviceProbe::enable_samples`].
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], or the driver's when there is not enough memory.
    pub fn enable_samples(&mut self, config: &SampleConfig) -> Result<(), Error> {
        self.probe.enable_samples(config)
    }

    /// Launches the copy of the sampled elements of `tensors`, as those of the step that was measured last.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], and those of [`measure`](Self::measure).
    pub fn sample(&mut self, tensors: &[&dyn DeviceTensor]) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let given = self.read(&stream, tensors)?;
        // SAFETY: as in `measure`.
        unsafe { self.probe.sample_raw(&given.tensors) }
    }

    /// See [`DeviceProbe::samples`]. Waits.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], or the driver's.
    pub fn samples(&mut self) -> Result<SampleReport, Error> {
        self.probe.samples()
    }

    /// See [`DeviceProbe::judge_by`]: verdict words by the rules of `health`, on the device.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`], [`Error::InvalidConfig`] for more than 63 rules, or the driver's.
    pub fn judge_by(&mut self, health: &Health) -> Result<(), Error> {
        self.probe.judge_by(health)
    }

    /// See [`DeviceProbe::enable_adaptive_clip`].
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::TensorCount`], [`Error::UnitLength`], or the driver's.
    pub fn enable_adaptive_clip(&mut self, clip: &AdaptiveClip) -> Result<(), Error> {
        self.probe.enable_adaptive_clip(clip)
    }

    /// Launches the adaptive clip of `tensors` in place by `weights`, of any dtypes, unless the last measurement said to
    /// skip the step. See [`AdaptiveClip`].
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], [`Error::Overlap`], and those of [`measure`](Self::measure) for
    /// either list.
    pub fn clip_adaptively(
        &mut self,
        tensors: &mut [&mut dyn DeviceTensorMut],
        weights: &[&dyn DeviceTensor],
    ) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let (tensors, weights) = (self.write(&stream, tensors)?, self.read(&stream, weights)?);
        // SAFETY: as in `clip` and `measure`.
        unsafe { self.probe.clip_adaptively_raw(&tensors.tensors, &weights.tensors) }
    }

    /// See [`DeviceProbe::adaptive_clip`]: what the last adaptive clip did. Waits.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], or the driver's.
    pub fn adaptive_clip(&mut self) -> Result<AdaptiveClipReport, Error> {
        self.probe.adaptive_clip()
    }

    /// See [`DeviceProbe::poll`]: a report that has arrived, without waiting.
    ///
    /// # Errors
    /// The driver's.
    pub fn poll(&mut self) -> Result<Option<Report>, Error> {
        self.probe.poll()
    }

    /// See [`DeviceProbe::wait`]: the report of the last measurement.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] when there was none, or the driver's.
    pub fn wait(&mut self) -> Result<Report, Error> {
        self.probe.wait()
    }

    /// See [`DeviceProbe::track`]: signal and noise of the gradients, from now on.
    ///
    /// # Errors
    /// Those of [`GsnrConfig::bytes`], or the driver's when there is not enough memory.
    pub fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        self.probe.track(config)
    }

    /// See [`DeviceProbe::reset_tracking`].
    ///
    /// # Errors
    /// [`Error::NotTracked`], or the driver's.
    pub fn reset_tracking(&mut self) -> Result<(), Error> {
        self.probe.reset_tracking()
    }

    /// See [`DeviceProbe::gsnr`]. Waits.
    ///
    /// # Errors
    /// [`Error::NotTracked`], [`Error::TooFewSteps`], or the driver's.
    pub fn gsnr(&mut self) -> Result<GsnrReport, Error> {
        self.probe.gsnr()
    }

    /// See [`DeviceProbe::keep_history`].
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], or the driver's when there is not enough memory.
    pub fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        self.probe.keep_history(steps)
    }

    /// See [`DeviceProbe::tag`].
    ///
    /// # Errors
    /// [`Error::NoHistory`], or the driver's.
    pub fn tag(&mut self, tag: u64) -> Result<(), Error> {
        self.probe.tag(tag)
    }

    /// See [`DeviceProbe::history`]. Waits.
    ///
    /// # Errors
    /// [`Error::NoHistory`], or the driver's.
    pub fn history(&mut self) -> Result<HistoryReport, Error> {
        self.probe.history()
    }

    /// See [`DeviceProbe::enable_histogram`]: room for histograms, [`Histogram::bytes`](crate::Histogram::bytes).
    ///
    /// # Errors
    /// The driver's when there is not enough memory.
    pub fn enable_histogram(&mut self) -> Result<(), Error> {
        self.probe.enable_histogram()
    }

    /// The histograms of `tensors`, those of the plan in its order. Waits for them.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::WaitInCapture`], and those of [`measure`](Self::measure).
    pub fn histogram(&mut self, tensors: &[&dyn DeviceTensor]) -> Result<HistogramReport, Error> {
        let stream = Arc::clone(self.stream());
        let given = self.read(&stream, tensors)?;
        // SAFETY: as in `measure`.
        unsafe { self.probe.histogram_raw(&given.tensors) }
    }

    /// Launches [`histogram`](Self::histogram) for those who read it on the device, at
    /// [`DeviceProbe::histograms_address`].
    ///
    /// # Errors
    /// [`Error::NotEnabled`], and those of [`measure`](Self::measure).
    pub fn launch_histogram(&mut self, tensors: &[&dyn DeviceTensor]) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let given = self.read(&stream, tensors)?;
        // SAFETY: as in `measure`.
        unsafe { self.probe.launch_histogram_raw(&given.tensors) }
    }

    /// See [`DeviceProbe::enable_dot`]: room for dot products, [`DotReport::bytes`].
    ///
    /// # Errors
    /// The driver's when there is not enough memory.
    pub fn enable_dot(&mut self) -> Result<(), Error> {
        self.probe.enable_dot()
    }

    /// The dot products of the plan's tensors `a` and the tensors `b`, which have the same lengths and any dtypes. Waits
    /// for them.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::WaitInCapture`], and those of [`measure`](Self::measure) for either list.
    pub fn dot(&mut self, a: &[&dyn DeviceTensor], b: &[&dyn DeviceTensor]) -> Result<DotReport, Error> {
        let stream = Arc::clone(self.stream());
        let (a, b) = (self.read(&stream, a)?, self.read(&stream, b)?);
        // SAFETY: as in `measure`.
        unsafe { self.probe.dot_raw(&a.tensors, &b.tensors) }
    }

    /// Launches [`dot`](Self::dot) for those who read it on the device, at [`DeviceProbe::dots_address`].
    ///
    /// # Errors
    /// [`Error::NotEnabled`], and those of [`measure`](Self::measure) for either list.
    pub fn launch_dot(&mut self, a: &[&dyn DeviceTensor], b: &[&dyn DeviceTensor]) -> Result<(), Error> {
        let stream = Arc::clone(self.stream());
        let (a, b) = (self.read(&stream, a)?, self.read(&stream, b)?);
        // SAFETY: as in `measure`.
        unsafe { self.probe.launch_dot_raw(&a.tensors, &b.tensors) }
    }

    /// See [`DeviceProbe::adam_gsnr_raw`]: signal and noise from the moments of Adam, those of the plan's tensors in its
    /// order. Waits.
    ///
    /// # Errors
    /// As there, and [`Error::TensorMismatch`] for moments that are not f32, [`Error::WrongContext`].
    pub fn adam_gsnr(&mut self, step: &AdamStep, moments: &[DeviceMoments<'_>]) -> Result<GsnrReport, Error> {
        let stream = Arc::clone(self.stream());
        let (mut raw, mut guards) = (Vec::with_capacity(moments.len()), Vec::with_capacity(2 * moments.len()));
        for (index, DeviceMoments { exp_avg, exp_avg_sq }) in moments.iter().enumerate() {
            let mut addresses = [0; 2];
            for (address, moment) in addresses.iter_mut().zip([exp_avg, exp_avg_sq]) {
                self.check_context(*moment, index)?;
                let guard;
                (*address, guard) = moment.read_address(&stream);
                guards.push(guard);
            }
            let (dtypes, lengths) =
                ([exp_avg.dtype(), exp_avg_sq.dtype()], [exp_avg.element_count(), exp_avg_sq.element_count()]);
            if let Some(spec) = self.plan().tensors().get(index)
                && (dtypes != [DType::F32; 2] || lengths[0] != lengths[1])
            {
                return Err(Error::TensorMismatch {
                    name: spec.name.clone(),
                    planned: format!("{} elements, moments of {}", spec.len, DType::F32),
                    given: format!(
                        "exp_avg with {} of {} and exp_avg_sq with {} of {}",
                        lengths[0], dtypes[0], lengths[1], dtypes[1]
                    ),
                });
            }
            raw.push(RawMoments { exp_avg: addresses[0], exp_avg_sq: addresses[1], len: lengths[0] as u64 });
        }
        // SAFETY: the slices are f32, of that length, in this context, and borrowed until the call returns; cudarc has
        // the stream wait for what other streams write to them.
        unsafe { self.probe.adam_gsnr_raw(step, &raw) }
    }

    /// The stream everything is ordered on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.probe.device().stream()
    }

    /// The plan this probe was made for.
    pub fn plan(&self) -> &Plan {
        self.probe.plan()
    }

    /// The calls that take bare addresses, and the device addresses of outputs and records.
    pub fn raw(&mut self) -> &mut DeviceProbe<Cuda> {
        &mut self.probe
    }
}
