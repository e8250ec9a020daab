//! The last steps in a device's memory.

use super::{HistoryReport, HistoryStep, bytes};
use crate::{
    Config, Error, Probe,
    device::Buffer,
    features::{Feature, Saved},
    probe::{Core, ReadBack, Room, StepArguments, copied, differs, outside_capture, uploaded, values},
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

/// The ring as it is on the device, and the tag of the next batch.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct HistoryState {
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    ring: Vec<u8>,
    tag: u64,
}

impl Saved for History {
    const DECLARE: &'static str = "Config::history";
    type State = HistoryState;

    fn state(&mut self, core: &Core) -> Result<HistoryState, Error> {
        let device = &*core.device;
        let tag = bytemuck::pod_read_unaligned(copied(device, &self.tag)?.wait()?);
        Ok(HistoryState { ring: self.ring.wait(device)?.to_vec(), tag })
    }

    fn check(&self, core: &Core, state: &HistoryState) -> Result<(), Error> {
        // Histories of one plan and other lengths have other sizes.
        let of_a_step = bytes(1, core.plan.tensors().len())?;
        let (there, here) = (state.ring.len(), self.steps * of_a_step);
        if there == here {
            return Ok(());
        }
        differs(format!("its history is of {} steps, and the probe's of {}", there / of_a_step, self.steps))
    }

    fn restore(&mut self, core: &Core, state: &HistoryState) -> Result<(), Error> {
        core.device.upload(bytemuck::bytes_of(&state.tag), &self.tag)?;
        core.device.upload(&state.ring, self.ring.buffer())
    }
}

impl Config {
    /// Declares a history of the last steps on the device, at least 1: 112 bytes a step and 24 a step and tensor.
    #[must_use]
    pub fn history(mut self, steps: u32) -> Self {
        self.features.history = Some(steps);
        self
    }
}

impl Probe {
    /// Gives the last steps.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::history`].
    pub fn history(&mut self) -> Result<Room<'_, History>, Error> {
        Room::new(&mut self.core, &mut self.rooms.history, History::DECLARE)
    }
}

impl Room<'_, History> {
    /// Tags the batch of the following measurements: one upload of 8 bytes. Replayed graphs see it too.
    ///
    /// # Errors
    /// [`Error::UploadInCapture`], or the device's.
    pub fn tag(&mut self, tag: u64) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        self.core.device.upload(bytemuck::bytes_of(&tag), &self.memory.tag)
    }

    /// Gives the steps. Waits for them; nothing of them is copied before.
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
