//! Histograms on a device: their memory, the launch that counts, and the read-out.

use super::{Histogram, HistogramReport};
use crate::{
    Error, Probe, Tensor,
    device::Kernel,
    probe::{Arguments, Core, Planned, ReadBack, Room, outside_capture, values},
};

/// Room for a histogram a tensor: [`Config::histogram`](crate::Config::histogram), [`Probe::histogram`].
pub struct Histograms(ReadBack);

impl Histograms {
    pub(crate) fn new(core: &mut Core) -> Result<Self, Error> {
        let memory = ReadBack::zeroed(&*core.device, core.plan.tensors().len() * size_of::<Histogram>())?;
        core.arguments.histograms = memory.address();
        Ok(Self(memory))
    }
}

impl Probe {
    /// Counts of elements by their magnitudes: a measurement on the side, no step, and what the clip does is unchanged.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::histogram`](crate::Config::histogram).
    pub fn histogram(&mut self) -> Result<Room<'_, Histograms>, Error> {
        Room::new(&mut self.core, &mut self.histogram, "Config::histogram")
    }
}

impl Room<'_, Histograms> {
    /// Counts the elements of these tensors, in the plan's order: clears the histograms and launches one kernel. They are
    /// then at [`Addresses::histograms`](crate::Addresses::histograms), for those who read them on the device; does not
    /// wait.
    ///
    /// # Errors
    /// Those of [`Probe::measure`].
    pub fn launch(&mut self, tensors: &[&dyn Tensor]) -> Result<(), Error> {
        let Self { core, memory } = self;
        let place = core.device.place();
        let tensors = core.read(&place, tensors, Planned::Gradients)?;
        core.place(&tensors, None)?;
        core.device.clear(memory.0.buffer())?;
        core.launch(Kernel::Histogram, core.arguments.chunk_count, &core.arguments)?;
        tensors.finish()
    }

    /// The histograms of these tensors, in the plan's order. Waits for them.
    ///
    /// # Errors
    /// Those of [`Probe::measure`], and [`Error::WaitInCapture`].
    pub fn measure(&mut self, tensors: &[&dyn Tensor]) -> Result<HistogramReport, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        self.launch(tensors)?;
        let histograms = values(self.memory.0.wait(&*self.core.device)?);
        Ok(HistogramReport::new(self.core.plan.clone(), histograms))
    }
}

/// Bytes of a clip's state before its histogram: `ClipState` in kernels/arguments.cuh.
const CLIP_STATE_HEADER: u64 = 32;

/// Counts all tensors in one histogram, for a clip by a quantile: where that keeps it, behind a header.
pub(crate) fn launch_of_all(core: &Core) -> Result<(), Error> {
    core.clear_clip_state()?;
    let histograms = core.arguments.clip_state + CLIP_STATE_HEADER;
    let arguments = Arguments { histograms, one_histogram: 1, ..core.arguments };
    core.launch(Kernel::Histogram, arguments.chunk_count, &arguments)
}
