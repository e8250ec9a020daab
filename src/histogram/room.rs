//! Histograms on a device: their memory, the launch that counts, and the read-out.

use super::{Histogram, HistogramReport};
use crate::{
    Config, Error, Probe, Tensor,
    clip::ClipHeader,
    features::Feature,
    probe::{Common, Core, Planned, ReadBack, Room, outside_capture, values},
    ranks::RankMemory,
};
use bytemuck::{Pod, Zeroable};

/// The arguments of [`Kernel::Histogram`](crate::device::Kernel::Histogram).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct HistogramArguments {
    pub common: Common,
    /// One [`Histogram`] a tensor, cleared.
    pub histograms: u64,
    /// Whether there is one histogram, of all tensors.
    pub one_histogram: u32,
    reserved: u32,
}
// The other side is in kernels/histogram.cu.
const _: () = assert!(size_of::<HistogramArguments>() == 88);

/// Room for a histogram a tensor: [`Config::histogram`], [`Probe::histogram`].
pub struct Histograms(ReadBack);

impl Feature<()> for Histograms {
    fn new(core: &mut Core, (): ()) -> Result<Self, Error> {
        let memory = ReadBack::zeroed(&*core.device, core.plan.tensors().len() * size_of::<Histogram>())?;
        Ok(Self(memory))
    }
}

impl Config {
    /// Declares histograms of the magnitudes: 8 KiB a tensor.
    #[must_use]
    pub fn histogram(mut self) -> Self {
        self.features.histogram = Some(());
        self
    }
}

impl Probe {
    /// Gives the histograms, which count elements by their magnitudes. This is no step, and does not change the clip.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::histogram`].
    pub fn histogram(&mut self) -> Result<Room<'_, Histograms>, Error> {
        Room::new(&mut self.core, &mut self.rooms.histogram, "Config::histogram")
    }
}

impl Room<'_, Histograms> {
    /// The device address of one [`Histogram`] a tensor.
    pub fn address(&self) -> u64 {
        self.memory.0.address()
    }

    /// Counts the elements of these tensors, in the plan's order: clears the histograms and launches one kernel. They
    /// are then at [`address`](Self::address), for kernels that read them; does not wait.
    ///
    /// # Errors
    /// Those of [`Probe::measure`].
    pub fn launch(&mut self, tensors: &[&dyn Tensor]) -> Result<(), Error> {
        let Self { core, memory } = self;
        let place = core.device.place();
        let tensors = core.read(&place, tensors, Planned::Gradients)?;
        core.place(&tensors, None)?;
        core.device.clear(memory.0.buffer())?;
        let (common, histograms) = (core.step.common, memory.0.address());
        core.launch_chunks(&HistogramArguments { common, histograms, one_histogram: 0, reserved: 0 })?;
        tensors.finish()
    }

    /// Does as [`launch`](Self::launch), and begins to copy the histograms to the host; does not wait.
    /// [`finish`](Self::finish) gives them.
    ///
    /// # Errors
    /// Those of [`Probe::measure`], and [`Error::WaitInCapture`].
    pub fn start(&mut self, tensors: &[&dyn Tensor]) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        self.launch(tensors)?;
        self.memory.0.start(&*self.core.device)
    }

    /// Waits for the histograms of the last [start](Self::start).
    ///
    /// # Errors
    /// [`Error::NotMeasured`] before the first start, and the device's.
    pub fn finish(&mut self) -> Result<HistogramReport, Error> {
        let histograms = values(self.memory.0.finish()?);
        Ok(HistogramReport::new(self.core.plan.clone(), histograms))
    }

    /// Gives the histograms of these tensors, in the plan's order. Waits for them.
    ///
    /// # Errors
    /// Those of [`start`](Self::start).
    pub fn measure(&mut self, tensors: &[&dyn Tensor]) -> Result<HistogramReport, Error> {
        self.start(tensors)?;
        self.finish()
    }
}

/// Counts all tensors, of all ranks, in one histogram for a clip by a quantile, behind the header of the clip's state.
pub(crate) fn launch_of_all(core: &Core, ranks: Option<&RankMemory>) -> Result<(), Error> {
    core.clear_clip_state()?;
    let (common, histograms) = (core.step.common, core.step.clip_state + size_of::<ClipHeader>() as u64);
    core.launch_chunks(&HistogramArguments { common, histograms, one_histogram: 1, reserved: 0 })?;
    ranks.map_or(Ok(()), |ranks| ranks.add_histogram(histograms, size_of::<Histogram>()))
}
