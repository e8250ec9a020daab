//! Tensors tracked across steps on a device, and Adam's moments: state, launches and read-out.

use super::{AdamMoments, AdamStep, BINS, GsnrConfig, GsnrRecord, GsnrReport, Layout, Track, adam::Adam};
use crate::{
    DType, Error, Probe,
    device::{Buffer, Kernel},
    probe::{Arguments, Core, Located, ReadBack, Room, check_address, outside_capture, uploaded, values},
};

/// Signal and noise across steps: [`Config::tracking`](crate::Config::tracking) or
/// [`Config::moments`](crate::Config::moments), [`Probe::gsnr`].
pub struct Signal {
    tracking: Option<Tracking>,
    moments: Option<Moments>,
}

/// What is tracked across steps, in device memory.
struct Tracking {
    /// The tracks of no step.
    fresh: Vec<Track>,
    tracks: Buffer,
    reduction: Reduction,
    _state: [Buffer; 2],
}

/// Where moments of Adam's are reduced.
struct Moments {
    /// Adam's step, and behind it the addresses.
    table: Buffer,
    reduction: Reduction,
}

/// Where a kernel reduces elements to one [`GsnrRecord`] a tensor.
struct Reduction {
    records: ReadBack,
    bins: Buffer,
}

impl Reduction {
    fn new(core: &Core, bins: usize) -> Result<Self, Error> {
        let records = ReadBack::zeroed(&*core.device, core.plan.tensors().len() * size_of::<GsnrRecord>())?;
        Ok(Self { records, bins: uploaded(&*core.device, bytemuck::cast_slice(&vec![0u32; bins]))? })
    }

    /// The arguments with this in them.
    fn place(&self, arguments: Arguments) -> Arguments {
        Arguments { gsnr_records: self.records.address(), gsnr_bins: self.bins.address(), ..arguments }
    }

    /// Waits for the records of those tensors that have one.
    fn report(&mut self, core: &Core, has_one: impl Fn(usize) -> bool) -> Result<GsnrReport, Error> {
        let records = values::<GsnrRecord>(self.records.wait(&*core.device)?).into_iter().enumerate();
        GsnrReport::new(core.plan.clone(), records.filter(|(index, _)| has_one(*index)).collect())
    }
}

impl Signal {
    pub(crate) fn declared(
        core: &mut Core,
        tracking: Option<&GsnrConfig>,
        moments: bool,
    ) -> Result<Option<Self>, Error> {
        let tracking = tracking.map(|config| Tracking::new(core, config)).transpose()?;
        let moments = moments.then(|| Moments::new(core)).transpose()?;
        Ok((tracking.is_some() || moments.is_some()).then_some(Self { tracking, moments }))
    }

    /// Whether each step is merged into what is tracked.
    pub(crate) fn is_tracking(&self) -> bool {
        self.tracking.is_some()
    }
}

impl Tracking {
    fn new(core: &mut Core, config: &GsnrConfig) -> Result<Self, Error> {
        let Layout { tracks: fresh, elements, bins } = config.layout(&core.plan)?;
        let bytes = usize::try_from(elements * 4).map_err(|_| Error::OutOfMemory { bytes: u64::MAX })?;
        let device = &*core.device;
        // The first step writes the state before any reads it.
        let state = [device.allocate(bytes.max(1))?, device.allocate(bytes.max(1))?];
        let tracks = uploaded(device, bytemuck::cast_slice(&fresh))?;
        let reduction = Reduction::new(core, bins)?;
        core.arguments = Arguments {
            window: config.steps_of_window(),
            tracks: tracks.address(),
            means: state[0].address(),
            deviations: state[1].address(),
            ..reduction.place(core.arguments)
        };
        Ok(Self { fresh, tracks, reduction, _state: state })
    }
}

impl Moments {
    fn new(core: &Core) -> Result<Self, Error> {
        let tensors = core.plan.tensors().len();
        let table = core.device.allocate(size_of::<Adam>() + tensors * size_of::<[u64; 2]>())?;
        Ok(Self { table, reduction: Reduction::new(core, tensors * BINS)? })
    }
}

impl Probe {
    /// Signal and noise of each tensor across steps, from what is tracked or from Adam's moments.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::tracking`](crate::Config::tracking) or
    /// [`Config::moments`](crate::Config::moments).
    pub fn gsnr(&mut self) -> Result<Room<'_, Signal>, Error> {
        Room::new(&mut self.core, &mut self.gsnr, "Config::tracking")
    }
}

const NOT_TRACKED: Error = Error::NotDeclared { declare: "Config::tracking" };

impl Room<'_, Signal> {
    /// Launches the reduction of what is tracked, which leaves one [`GsnrRecord`] a tensor at
    /// [`Addresses::gsnr_records`](crate::Addresses::gsnr_records), for those who read them on the device; does not wait.
    ///
    /// # Errors
    /// [`Error::NotDeclared`], or the device's.
    pub fn launch(&mut self) -> Result<(), Error> {
        self.memory.tracking.as_ref().ok_or(NOT_TRACKED)?;
        self.core.launch(Kernel::Gsnr, self.core.arguments.chunk_count, &self.core.arguments)
    }

    /// Signal and noise of the tracked tensors up to the last step. Waits for them.
    ///
    /// # Errors
    /// [`Error::NotDeclared`], [`Error::TooFewSteps`] before the second step, [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self) -> Result<GsnrReport, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        self.launch()?;
        let Tracking { fresh, reduction, .. } = self.memory.tracking.as_mut().ok_or(NOT_TRACKED)?;
        reduction.report(self.core, |index| fresh[index].is_tracked())
    }

    /// Forgets all steps that were tracked: one upload.
    ///
    /// # Errors
    /// [`Error::NotDeclared`], [`Error::UploadInCapture`], or the device's.
    pub fn reset(&mut self) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        let tracking = self.memory.tracking.as_ref().ok_or(NOT_TRACKED)?;
        self.core.device.upload(bytemuck::cast_slice(&tracking.fresh), &tracking.tracks)
    }

    /// Signal and noise of the tensors whose moments are given, as [`AdamStep`] describes. `moments` are those of the
    /// plan's tensors, in its order; a tensor with none is left out. Waits for the result; nothing is kept of one call
    /// for the next.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::moments`](crate::Config::moments); those of [`AdamStep`],
    /// [`Error::TensorCount`], [`Error::TensorMismatch`], [`Error::TooLargeToTrack`], those of a null or misaligned
    /// address, [`Error::WaitInCapture`], or the device's.
    pub fn of_moments(&mut self, step: &AdamStep, moments: &[AdamMoments<'_>]) -> Result<GsnrReport, Error> {
        let declare = "Config::moments";
        let Moments { table, reduction } = self.memory.moments.as_mut().ok_or(Error::NotDeclared { declare })?;
        let core = &*self.core;
        let adam = step.check()?;
        super::adam::check(&core.plan, moments)?;
        outside_capture(&*core.device, Error::WaitInCapture)?;
        let place = core.device.place();
        let (mut lent, mut addresses, mut memory) = (Vec::new(), Vec::new(), Vec::new());
        for (of, spec) in moments.iter().zip(core.plan.tensors()) {
            let len = of.exp_avg.shape().map_or(0, |(_, len)| len);
            for moment in [of.exp_avg, of.exp_avg_sq] {
                let moment = moment.lend(&place).map_err(|error| error.named(&spec.name))?;
                let located = Located { address: if len == 0 { 0 } else { moment.address }, dtype: DType::F32, len };
                check_address(|| spec.name.clone(), &located)?;
                addresses.push(located.address);
                memory.push((located.address, len * 4));
                lent.push(moment);
            }
        }
        let _checked = core.device.lend(&mut memory.into_iter(), false);
        let mut bytes = bytemuck::bytes_of(&adam).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(&addresses));
        core.device.upload(&bytes, table)?;
        let arguments = Arguments { adam: table.address(), ..reduction.place(core.arguments) };
        core.launch(Kernel::Adam, arguments.chunk_count, &arguments)?;
        let report = reduction.report(core, |index| addresses[2 * index] != 0);
        lent.into_iter().try_for_each(crate::tensor::Lent::finish)?;
        report
    }
}
