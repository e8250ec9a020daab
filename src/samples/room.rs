//! Sampled elements on a device: their table and ring, the launch that copies them, and the read-out.

use super::{SampleConfig, SamplePlace, SampleReport};
use crate::{
    Config, Error, Probe, Tensor,
    device::{Buffer, Kernel},
    features::Feature,
    probe::{Common, Core, Planned, ReadBack, Room, uploaded, values},
};
use bytemuck::{Pod, Zeroable};

/// Of [`Kernel::Sample`].
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct SampleArguments {
    pub common: Common,
    /// [`SamplePlace`]s.
    pub places: u64,
    /// u64 numbers of the steps in the ring.
    pub numbers: u64,
    /// Their values, f32.
    pub ring: u64,
    pub count: u32,
    pub steps: u32,
}
// The other side is in kernels/sample.cu.
const _: () = assert!(size_of::<SampleArguments>() == 104);

/// A few elements of the last steps: [`Config::samples`], [`Probe::samples`].
pub struct Samples {
    places: Vec<SamplePlace>,
    /// The places on the device.
    table: Buffer,
    steps: usize,
    /// Numbers of the steps, then their values.
    ring: ReadBack,
}

impl Feature<SampleConfig> for Samples {
    fn new(core: &mut Core, config: SampleConfig) -> Result<Self, Error> {
        let places = config.places(&core.plan)?;
        let (device, steps, count) = (&*core.device, config.steps() as usize, places.len());
        let of_numbers = steps * size_of::<u64>();
        let of_values = steps.checked_mul(count * size_of::<f32>()).ok_or(Error::OutOfMemory { bytes: u64::MAX })?;
        let table = uploaded(device, bytemuck::cast_slice(&places))?;
        let ring = ReadBack::zeroed(device, of_numbers + of_values)?;
        Ok(Self { places, table, steps, ring })
    }
}

impl Config {
    /// With a few elements kept of each step.
    #[must_use]
    pub fn samples(mut self, samples: SampleConfig) -> Self {
        self.features.samples = Some(samples);
        self
    }
}

impl Probe {
    /// A few elements of the last steps.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::samples`].
    pub fn samples(&mut self) -> Result<Room<'_, Samples>, Error> {
        Room::new(&mut self.core, &mut self.rooms.samples, "Config::samples")
    }
}

impl Room<'_, Samples> {
    /// Launches the copy of these tensors' sampled elements into the ring, as those of the step that was measured last.
    /// Does not wait.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], and those of [`Probe::measure`].
    pub fn take(&mut self, tensors: &[&dyn Tensor]) -> Result<(), Error> {
        let Self { core, memory } = self;
        let place = core.device.place();
        let tensors = core.read(&place, tensors, Planned::Gradients)?;
        if !core.measured {
            return Err(Error::NotMeasured);
        }
        core.place(&tensors, None)?;
        let pieces = u32::try_from(memory.places.len().div_ceil(Kernel::Sample.threads() as usize)).unwrap_or(u32::MAX);
        let numbers = memory.ring.address();
        let arguments = SampleArguments {
            common: core.step.common,
            places: memory.table.address(),
            numbers,
            ring: numbers + (memory.steps * size_of::<u64>()) as u64,
            count: u32::try_from(memory.places.len()).unwrap_or(u32::MAX),
            steps: u32::try_from(memory.steps).unwrap_or(u32::MAX),
        };
        core.launch(pieces, &arguments)?;
        tensors.finish()
    }

    /// The sampled elements of the last steps. Waits for them.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self) -> Result<SampleReport, Error> {
        let bytes = self.memory.ring.wait(&*self.core.device)?;
        let (numbers, ring) = bytes.split_at(self.memory.steps * size_of::<u64>());
        let (places, numbering) = (self.memory.places.clone(), &self.core.numbering);
        Ok(SampleReport::new(places, &values::<u64>(numbers), &values::<f32>(ring), numbering))
    }
}
