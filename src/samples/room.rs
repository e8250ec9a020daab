//! Sampled elements on a device: their table and ring, the launch that copies them, and the read-out.

use super::{SampleConfig, SamplePlace, SampleReport};
use crate::{
    Config, Error, Probe, Tensor,
    device::{Buffer, Kernel},
    features::{Feature, Saved},
    probe::{Common, Core, Planned, ReadBack, Room, differs, uploaded, values},
};
use bytemuck::{Pod, Zeroable};

/// The arguments of [`Kernel::Sample`].
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

/// Keeps a few elements of the last steps: [`Config::samples`], [`Probe::samples`].
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

/// Numbers of the steps, and the bits of their values: those of absent tensors are NaN, which would not equal itself.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct SampleState {
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    numbers: Vec<u64>,
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    values: Vec<u32>,
}

impl Saved for Samples {
    const DECLARE: &'static str = "Config::samples";
    type State = SampleState;

    fn state(&mut self, core: &Core) -> Result<SampleState, Error> {
        let bytes = self.ring.wait(&*core.device)?;
        let (numbers, ring) = bytes.split_at(self.steps * size_of::<u64>());
        Ok(SampleState { numbers: values(numbers), values: values(ring) })
    }

    fn check(&self, _: &Core, SampleState { numbers, values }: &SampleState) -> Result<(), Error> {
        let (steps, count) = (self.steps, self.places.len());
        if (numbers.len(), values.len()) == (steps, steps * count) {
            return Ok(());
        }
        let (there, all) = (numbers.len(), values.len());
        differs(format!("it has {all} samples of {there} steps, and the probe {} of {steps}", steps * count))
    }

    fn restore(&mut self, core: &Core, SampleState { numbers, values }: &SampleState) -> Result<(), Error> {
        let ring: [&[u8]; 2] = [bytemuck::cast_slice(numbers), bytemuck::cast_slice(values)];
        core.device.upload(&ring.concat(), self.ring.buffer())
    }
}

impl Config {
    /// Declares samples: a few elements of each step are kept.
    #[must_use]
    pub fn samples(mut self, samples: SampleConfig) -> Self {
        self.features.samples = Some(samples);
        self
    }
}

impl Probe {
    /// Gives the samples of the last steps.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::samples`].
    pub fn samples(&mut self) -> Result<Room<'_, Samples>, Error> {
        Room::new(&mut self.core, &mut self.rooms.samples, Samples::DECLARE)
    }
}

impl Room<'_, Samples> {
    /// Launches the copy of these tensors' sampled elements into the ring, as those of the last measured step. Does not
    /// wait.
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

    /// Gives the sampled elements of the last steps. Waits for them.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self) -> Result<SampleReport, Error> {
        let SampleState { numbers, values } = self.memory.state(self.core)?;
        let (places, numbering) = (self.memory.places.clone(), &self.core.numbering);
        Ok(SampleReport::new(places, &numbers, bytemuck::cast_slice(&values), numbering))
    }
}
