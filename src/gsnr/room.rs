//! Tensors tracked across steps on a device: state, launches and read-out.

use super::{BINS, GsnrConfig, GsnrRecord, GsnrReport, Layout, Track};
use crate::{
    Config, Error, Probe,
    device::Buffer,
    features::{Feature, Saved},
    probe::{Common, Core, ReadBack, Room, copied, differs, outside_capture, parts, set_parts, uploaded, values},
};
use bytemuck::{Pod, Zeroable};

/// The arguments of [`Kernel::Update`](crate::device::Kernel::Update).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct UpdateArguments {
    pub common: Common,
    /// The progress of each tensor: [`Track`].
    pub tracks: u64,
    /// f32 means of the tracked elements.
    pub means: u64,
    /// Their summed squared deviations, f32.
    pub deviations: u64,
    /// Steps after which tracking starts anew, or 0.
    pub window: u32,
    reserved: u32,
}

/// The arguments of [`Kernel::Gsnr`](crate::device::Kernel::Gsnr).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct GsnrArguments {
    pub common: Common,
    /// As in [`UpdateArguments`], and the next two.
    pub tracks: u64,
    pub means: u64,
    pub deviations: u64,
    /// One [`GsnrRecord`] a tracked tensor: a result.
    pub gsnr_records: u64,
    /// Bins of each tracked tensor: workspace.
    bins: u64,
}
// The other side is in kernels/update.cu and kernels/gsnr.cu.
const _: () = assert!(size_of::<UpdateArguments>() == 104 && size_of::<GsnrArguments>() == 112);

/// Tracks tensors across steps: [`Config::tracking`], [`Probe::gsnr`].
pub struct Tracking {
    /// Tracks before the first step.
    fresh: Vec<Track>,
    tracks: Buffer,
    /// Means and deviations.
    state: [Buffer; 2],
    window: u32,
    reduction: Reduction,
}

/// The memory in which a kernel reduces elements to one [`GsnrRecord`] a tensor.
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

    /// Waits for the records whose copy was begun, of the tensors that have one.
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
    /// Launches the merge of the last measured step.
    pub(crate) fn launch_update(&self, core: &Core) -> Result<(), Error> {
        let (common, [means, deviations]) = (core.step.common, self.state.each_ref().map(Buffer::address));
        let (tracks, window) = (self.tracks.address(), self.window);
        core.launch_chunks(&UpdateArguments { common, tracks, means, deviations, window, reserved: 0 })
    }
}

/// The state of the tracking, one a tensor of the plan.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct TrackingState {
    window: u32,
    tensors: Vec<Option<TrackState>>,
}

/// One tensor, as of [`Track`].
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct TrackState {
    steps: u32,
    skipped: u32,
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bits"))]
    norm_mean: f64,
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bits"))]
    norm_deviations: f64,
    /// Means of each element; empty before the first step.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    means: Vec<f32>,
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    deviations: Vec<f32>,
}

/// The most steps of a tensor; behind them their count would wrap.
const MOST: u32 = 1 << 31;

impl Saved for Tracking {
    const DECLARE: &'static str = "Config::tracking";
    type State = TrackingState;

    fn state(&mut self, core: &Core) -> Result<TrackingState, Error> {
        let device = &*core.device;
        let tracks: Vec<Track> = values(copied(device, &self.tracks)?.wait()?);
        let lengths = || core.plan.tensors().iter().map(|spec| spec.len);
        // Before the first step there is no state.
        let place = |(track, len): (&Track, u64)| (track.offset, if track.steps > 0 { len } else { 0 });
        let places = || tracks.iter().zip(lengths()).map(place);
        let [means, deviations] = &self.state;
        let of_elements = parts(device, means, places())?.into_iter().zip(parts(device, deviations, places())?);
        let tensors = tracks.iter().zip(of_elements).map(|(track, (means, deviations))| {
            let Track { steps, skipped, norm_mean, norm_deviations, .. } = *track;
            let state = TrackState { steps, skipped, norm_mean, norm_deviations, means, deviations };
            track.is_tracked().then_some(state)
        });
        Ok(TrackingState { window: self.window, tensors: tensors.collect() })
    }

    fn check(&self, core: &Core, TrackingState { window, tensors }: &TrackingState) -> Result<(), Error> {
        let specs = core.plan.tensors();
        if *window != self.window {
            return differs(format!("it is tracked over a window of {window} steps, and here of {}", self.window));
        }
        if tensors.len() != specs.len() {
            return differs(format!("{} tensors are tracked or not, of {}", tensors.len(), specs.len()));
        }
        for ((spec, fresh), state) in specs.iter().zip(&self.fresh).zip(tensors) {
            let name = &spec.name;
            let Some(state) = state.as_ref().filter(|_| fresh.is_tracked()) else {
                match (state.is_some(), fresh.is_tracked()) {
                    (false, false) => continue,
                    (true, _) => return differs(format!("tensor {name:?} was tracked, and is not here")),
                    (_, true) => return differs(format!("tensor {name:?} is tracked here, and was not")),
                }
            };
            let expected = if state.steps > 0 { spec.len } else { 0 };
            let given = [&state.means, &state.deviations].map(|list| list.len() as u64);
            let is_past = state.steps > MOST || state.skipped > MOST || *window != 0 && state.steps > *window;
            if given != [expected; 2] || is_past {
                let [means, deviations] = given;
                let steps = state.steps;
                return differs(format!(
                    "tensor {name:?} has {means} means and {deviations} deviations of {steps} steps"
                ));
            }
        }
        Ok(())
    }

    fn restore(&mut self, core: &Core, state: &TrackingState) -> Result<(), Error> {
        let of_tensors = || self.fresh.iter().zip(&state.tensors);
        let of_elements = |of: fn(&TrackState) -> &[f32]| {
            of_tensors().map(move |(fresh, state)| (fresh.offset, state.as_ref().map_or(&[][..], of)))
        };
        let [means, deviations] = &self.state;
        set_parts(&*core.device, means, of_elements(|state| &state.means))?;
        set_parts(&*core.device, deviations, of_elements(|state| &state.deviations))?;
        let tracks = of_tensors().map(|(fresh, state)| match *state {
            Some(TrackState { steps, skipped, norm_mean, norm_deviations, .. }) => {
                Track { steps, skipped, norm_mean, norm_deviations, ..*fresh }
            }
            None => *fresh,
        });
        core.device.upload(bytemuck::cast_slice(&tracks.collect::<Vec<_>>()), &self.tracks)
    }
}

impl Config {
    /// Declares tracking: mean and variance of every element of these tensors across steps. Takes
    /// [`GsnrConfig::bytes`].
    #[must_use]
    pub fn tracking(mut self, tensors: GsnrConfig) -> Self {
        self.features.tracking = Some(tensors);
        self
    }
}

impl Probe {
    /// Gives the tracking, with signal and noise of each tracked tensor across steps.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::tracking`].
    pub fn gsnr(&mut self) -> Result<Room<'_, Tracking>, Error> {
        Room::new(&mut self.core, &mut self.rooms.tracking, Tracking::DECLARE)
    }
}

impl Room<'_, Tracking> {
    /// The device address of one [`GsnrRecord`] a tracked tensor.
    pub fn address(&self) -> u64 {
        self.memory.reduction.records.address()
    }

    /// Launches the reduction of the tracked tensors, which leaves one [`GsnrRecord`] a tensor at
    /// [`address`](Self::address), for kernels that read them; does not wait.
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

    /// Does as [`launch`](Self::launch), and begins to copy the records to the host; does not wait.
    /// [`finish`](Self::finish) gives them.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn start(&mut self) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        self.launch()?;
        self.memory.reduction.records.start(&*self.core.device)
    }

    /// Waits for the last [start](Self::start), and gives signal and noise up to then.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] before the first start, [`Error::TooFewSteps`] before the second step, or the device's.
    pub fn finish(&mut self) -> Result<GsnrReport, Error> {
        let Tracking { fresh, reduction, .. } = &*self.memory;
        reduction.report(self.core, |index| fresh[index].is_tracked())
    }

    /// Gives signal and noise of the tracked tensors up to the last step. Waits for them.
    ///
    /// # Errors
    /// Those of [`start`](Self::start) and [`finish`](Self::finish).
    pub fn report(&mut self) -> Result<GsnrReport, Error> {
        self.start()?;
        self.finish()
    }

    /// Forgets all tracked steps: one upload.
    ///
    /// # Errors
    /// [`Error::UploadInCapture`], or the device's.
    pub fn reset(&mut self) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        self.core.device.upload(bytemuck::cast_slice(&self.memory.fresh), &self.memory.tracks)
    }
}
