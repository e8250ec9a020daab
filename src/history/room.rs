//! The last steps in a device's memory.

use super::{HistoryReport, HistoryStep, bytes};
use crate::{
    Config, Error, Probe,
    device::Buffer,
    features::Feature,
    probe::{Core, ReadBack, Room, StepArguments, outside_capture, uploaded, values},
};

/// The last steps of a probe: [`Config::history`], [`Probe::history`].
pub struct History {
    steps: usize,
    ring: ReadBack,
    tag: Buffer,
}

impl Feature<u32> for History {
    fn new(core: &mut Core, steps: u32) -> Result<Self, Error> {
        let device = &*core.device;
        let ring = ReadBack::zeroed(device, bytes(steps, core.plan.tensors().len())?)?;
        let tag = uploaded(device, &[0; size_of::<u64>()])?;
        core.step = StepArguments {
            history_steps: steps,
            history: ring.address(),
            history_tensors: ring.address() + u64::from(steps) * size_of::<HistoryStep>() as u64,
            tag: tag.address(),
            ..core.step
        };
        Ok(Self { steps: steps as usize, ring, tag })
    }
}

impl Config {
    /// With the last steps kept on the device, at least 1: 112 bytes a step and 24 a step and tensor.
    #[must_use]
    pub fn history(mut self, steps: u32) -> Self {
        self.features.history = Some(steps);
        self
    }
}

impl Probe {
    /// The last steps that are kept.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::history`].
    pub fn history(&mut self) -> Result<Room<'_, History>, Error> {
        Room::new(&mut self.core, &mut self.rooms.history, "Config::history")
    }
}

impl Room<'_, History> {
    /// Names the batch of the measurements that follow: one upload of 8 bytes. Replayed graphs see it too.
    ///
    /// # Errors
    /// [`Error::UploadInCapture`], or the device's.
    pub fn tag(&mut self, tag: u64) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        self.core.device.upload(bytemuck::bytes_of(&tag), &self.memory.tag)
    }

    /// The steps. Waits for them; nothing of them is copied before.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self) -> Result<HistoryReport, Error> {
        let bytes = self.memory.ring.wait(&*self.core.device)?;
        let (steps, tensors) = bytes.split_at(self.memory.steps * size_of::<HistoryStep>());
        let (plan, numbering) = (self.core.plan.clone(), &self.core.numbering);
        Ok(HistoryReport::new(plan, &values::<HistoryStep>(steps), &values(tensors), numbering))
    }
}
