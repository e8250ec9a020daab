//! Micro-batches on a device: a list of records each.

use super::{Accumulation, MicroBatchReport};
use crate::{
    Config, Error, Probe, Record, Tensor,
    features::Feature,
    probe::{Common, Core, Planned, ReadBack, Room, StepArguments, values},
};

/// Room for the records of micro-batches: [`Config::micro_batches`],
/// [`Probe::micro_batches`].
pub struct MicroBatches {
    accumulation: Accumulation,
    lists: ReadBack,
}

impl Feature<u32> for MicroBatches {
    fn new(core: &mut Core, count: u32) -> Result<Self, Error> {
        let accumulation = Accumulation::new(count)?;
        let length = accumulation.count().saturating_mul(core.plan.tensors().len());
        let too_much = |_| Error::OutOfMemory { bytes: (length as u64).saturating_mul(size_of::<Record>() as u64) };
        let mut lists = Vec::new();
        lists.try_reserve_exact(length).map_err(too_much)?;
        lists.resize(length, Record::EMPTY);
        Ok(Self { accumulation, lists: ReadBack::holding(&*core.device, bytemuck::cast_slice(&lists))? })
    }
}

impl MicroBatches {
    /// Notes that a step was measured.
    pub(crate) fn close(&mut self) {
        self.accumulation.close();
    }
}

impl Config {
    /// Declares that so many micro-batches of an accumulation, at least 1, are measured on their own: a [`Record`] a
    /// micro-batch and tensor.
    #[must_use]
    pub fn micro_batches(mut self, count: u32) -> Self {
        self.features.micro_batches = Some(count);
        self
    }
}

impl Probe {
    /// Gives the micro-batches of a gradient accumulation.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::micro_batches`].
    pub fn micro_batches(&mut self) -> Result<Room<'_, MicroBatches>, Error> {
        Room::new(&mut self.core, &mut self.rooms.micro_batches, "Config::micro_batches")
    }
}

impl Room<'_, MicroBatches> {
    /// Launches the measurement of the gradients of the next micro-batch, before they are added to the sum. This is no
    /// step, and does not change the clip. The measurement of a step, that of the sum, ends an accumulation. Captured
    /// in a graph, micro-batches keep the places that they have in the capture.
    ///
    /// # Errors
    /// [`Error::TooManyMicroBatches`], and those of [`Probe::measure`].
    pub fn measure(&mut self, tensors: &[&dyn Tensor]) -> Result<(), Error> {
        let Self { core, memory } = self;
        let place = core.device.place();
        let tensors = core.read(&place, tensors, Planned::Gradients)?;
        core.place(&tensors, None)?;
        let mut accumulation = memory.accumulation;
        let first = accumulation.next()? * core.plan.tensors().len() * size_of::<Record>();
        let common = Common { records: memory.lists.address() + first as u64, ..core.step.common };
        core.launch_chunks(&StepArguments { common, is_part: 1, sums: 0, ..core.step })?;
        // Only now: its place would hold the records of another.
        memory.accumulation = accumulation;
        tensors.finish()
    }

    /// Gives the micro-batches of the accumulation under way, or of the last one. Waits for them.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] before the first, [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self) -> Result<MicroBatchReport, Error> {
        let (taken, tensors) = (self.memory.accumulation.taken()?, self.core.plan.tensors().len());
        let all: Vec<Record> = values(self.memory.lists.wait(&*self.core.device)?);
        let records = (0..taken).map(|place| all[place * tensors..(place + 1) * tensors].to_vec()).collect();
        Ok(MicroBatchReport::new(self.core.plan.clone(), records))
    }
}
