//! Tensors tracked across steps on a device: state, launches and read-out.

use super::{BINS, GsnrConfig, GsnrRecord, GsnrReport, Layout, Track};
use crate::{
    Config, Error, Probe,
    device::Buffer,
    features::Feature,
    probe::{Common, Core, ReadBack, Room, outside_capture, uploaded, values},
};
use bytemuck::{Pod, Zeroable};

/// Of [`Kernel::Update`](crate::device::Kernel::Update).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct UpdateArguments {
    pub common: Common,
    /// How far each tensor has been tracked: [`Track`].
    pub tracks: u64,
    /// f32 means of the tracked elements.
    pub means: u64,
    /// Their summed squared deviations, f32.
    pub deviations: u64,
    /// Steps after which tracking starts anew, or 0.
    pub window: u32,
    reserved: u32,
}

/// Of [`Kernel::Gsnr`](crate::device::Kernel::Gsnr).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct GsnrArguments {
    pub common: Common,
    /// As of [`UpdateArguments`], and the next two.
    pub tracks: u64,
    pub means: u64,
    pub deviations: u64,
    /// One [`GsnrRecord`] a tensor: a result, of the tracked ones.
    pub gsnr_records: u64,
    /// Bins of each tracked tensor: workspace.
    bins: u64,
}
// The other side is in kernels/update.cu and kernels/gsnr.cu.
const _: () = assert!(size_of::<UpdateArguments>() == 104 && size_of::<GsnrArguments>() == 112);

/// Tensors that are tracked across steps: [`Config::tracking`], [`Probe::gsnr`].
pub struct Tracking {
    /// The tracks of no step.
    fresh: Vec<Track>,
    tracks: Buffer,
    /// Means and deviations.
    state: [Buffer; 2],
    window: u32,
    reduction: Reduction,
}

/// Where a kernel reduces elements to one [`GsnrRecord`] a tensor.
pub(super) struct Reduction {
    pub records: ReadBack,
    /// [`BINS`] a tensor, 0 between launches.
    pub bins: Buffer,
}

impl Reduction {
    pub fn new(core: &Core, tensors: usize) -> Result<Self, Error> {
        let records = ReadBack::zeroed(&*core.device, core.plan.tensors().len() * size_of::<GsnrRecord>())?;
        let bins = core.device.allocate((tensors * BINS * size_of::<u32>()).max(1))?;
        core.device.clear(&bins)?;
        Ok(Self { records, bins })
    }

    /// Waits for the records of those tensors that have one, whose copy was begun.
    pub fn report(&self, core: &Core, has_one: impl Fn(usize) -> bool) -> Result<GsnrReport, Error> {
        let records = values::<GsnrRecord>(self.records.finish()?).into_iter().enumerate();
        GsnrReport::new(core.plan.clone(), records.filter(|(index, _)| has_one(*index)).collect())
    }
}

impl Feature<GsnrConfig> for Tracking {
    fn new(core: &mut Core, config: GsnrConfig) -> Result<Self, Error> {
        let Layout { tracks: fresh, elements, bins } = config.layout(&core.plan)?;
        let bytes = usize::try_from(elements * 4).map_err(|_| Error::OutOfMemory { bytes: u64::MAX })?;
        let device = &*core.device;
        // The first step writes the state before any reads it.
        let state = [device.allocate(bytes.max(1))?, device.allocate(bytes.max(1))?];
        let tracks = uploaded(device, bytemuck::cast_slice(&fresh))?;
        let reduction = Reduction::new(core, bins / BINS)?;
        Ok(Self { fresh, tracks, state, window: config.steps_of_window(), reduction })
    }
}

impl Tracking {
    /// Launches the merge of the step that was measured last.
    pub(crate) fn launch_update(&self, core: &Core) -> Result<(), Error> {
        let (common, [means, deviations]) = (core.step.common, self.state.each_ref().map(Buffer::address));
        let (tracks, window) = (self.tracks.address(), self.window);
        core.launch_chunks(&UpdateArguments { common, tracks, means, deviations, window, reserved: 0 })
    }
}

impl Config {
    /// With mean and variance of every element of these tensors kept across steps: [`GsnrConfig::bytes`].
    #[must_use]
    pub fn tracking(mut self, tensors: GsnrConfig) -> Self {
        self.features.tracking = Some(tensors);
        self
    }
}

impl Probe {
    /// Signal and noise of each tracked tensor across steps.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::tracking`].
    pub fn gsnr(&mut self) -> Result<Room<'_, Tracking>, Error> {
        Room::new(&mut self.core, &mut self.rooms.tracking, "Config::tracking")
    }
}

impl Room<'_, Tracking> {
    /// The device address of one [`GsnrRecord`] a tensor, of the tracked ones.
    pub fn address(&self) -> u64 {
        self.memory.reduction.records.address()
    }

    /// Launches the reduction of what is tracked, which leaves one [`GsnrRecord`] a tensor at
    /// [`address`](Self::address), for those who read them on the device; does not wait.
    ///
    /// # Errors
    /// The device's.
    pub fn launch(&mut self) -> Result<(), Error> {
        let Tracking { tracks, state, reduction: Reduction { records, bins }, .. } = &*self.memory;
        let [means, deviations] = state.each_ref().map(Buffer::address);
        self.core.launch_chunks(&GsnrArguments {
            common: self.core.step.common,
            tracks: tracks.address(),
            means,
            deviations,
            gsnr_records: records.address(),
            bins: bins.address(),
        })
    }

    /// [`launch`](Self::launch), and begins to copy the records to the host; does not wait. [`finish`](Self::finish) gives them.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn start(&mut self) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        self.launch()?;
        self.memory.reduction.records.start(&*self.core.device)
    }

    /// Waits for what was [started](Self::start) last: signal and noise up to then.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] before the first start, [`Error::TooFewSteps`] before the second step, or the device's.
    pub fn finish(&mut self) -> Result<GsnrReport, Error> {
        let Tracking { fresh, reduction, .. } = &*self.memory;
        reduction.report(self.core, |index| fresh[index].is_tracked())
    }

    /// Signal and noise of the tracked tensors up to the last step. Waits for them.
    ///
    /// # Errors
    /// Those of [`start`](Self::start) and [`finish`](Self::finish).
    pub fn report(&mut self) -> Result<GsnrReport, Error> {
        self.start()?;
        self.finish()
    }

    /// Forgets all steps that were tracked: one upload.
    ///
    /// # Errors
    /// [`Error::UploadInCapture`], or the device's.
    pub fn reset(&mut self) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        self.core.device.upload(bytemuck::cast_slice(&self.memory.fresh), &self.memory.tracks)
    }
}
