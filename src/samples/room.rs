//! Sampled elements on a device: their table and ring, the launch that copies them, and the read-out.

use super::{SampleConfig, SamplePlace, SampleReport};
use crate::{
    Error, Probe, Tensor,
    device::{Buffer, Kernel},
    probe::{Arguments, Core, Planned, ReadBack, Room, uploaded, values},
};
use bytemuck::{Pod, Zeroable};

/// What the kernel is told (`kernels/arguments.cuh`).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Table {
    pub places: u64,
    pub numbers: u64,
    pub ring: u64,
    pub count: u32,
    pub steps: u32,
}
const _: () = assert!(size_of::<Table>() == 32);

/// A few elements of the last steps: [`Config::samples`](crate::Config::samples), [`Probe::samples`].
pub struct Samples {
    places: Vec<SamplePlace>,
    steps: usize,
    /// Numbers of the steps, then their values.
    ring: ReadBack,
    _tables: [Buffer; 2],
}

impl Samples {
    pub(crate) fn new(core: &mut Core, config: SampleConfig) -> Result<Self, Error> {
        let places = config.places(&core.plan)?;
        let (device, steps, count) = (&*core.device, config.steps() as usize, places.len());
        let of_numbers = steps * size_of::<u64>();
        let of_values = steps.checked_mul(count * size_of::<f32>()).ok_or(Error::OutOfMemory { bytes: u64::MAX })?;
        let of_places = uploaded(device, bytemuck::cast_slice(&places))?;
        let ring = ReadBack::zeroed(device, of_numbers + of_values)?;
        let table = Table {
            places: of_places.address(),
            numbers: ring.address(),
            ring: ring.address() + of_numbers as u64,
            count: u32::try_from(count).unwrap_or(u32::MAX),
            steps: config.steps(),
        };
        let table = uploaded(device, bytemuck::bytes_of(&table))?;
        core.arguments = Arguments { samples: table.address(), ..core.arguments };
        Ok(Self { places, steps, ring, _tables: [table, of_places] })
    }
}

impl Probe {
    /// A few elements of the last steps.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::samples`](crate::Config::samples).
    pub fn samples(&mut self) -> Result<Room<'_, Samples>, Error> {
        Room::new(&mut self.core, &mut self.samples, "Config::samples")
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
        let pieces = u32::try_from(memory.places.len().div_ceil(Kernel::THREADS as usize)).unwrap_or(u32::MAX);
        core.launch(Kernel::Sample, pieces, &core.arguments)?;
        tensors.finish()
    }

    /// The sampled elements of the last steps. Waits for them.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self) -> Result<SampleReport, Error> {
        let bytes = self.memory.ring.wait(&*self.core.device)?;
        let (numbers, ring) = bytes.split_at(self.memory.steps * size_of::<u64>());
        Ok(SampleReport::new(self.memory.places.clone(), &values::<u64>(numbers), &values::<f32>(ring)))
    }
}
