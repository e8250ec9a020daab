//! The ring of the last steps.

use crate::{Error, HistoryStep, HistoryTensor, Record, StepOutputs, history};
use bytemuck::Zeroable;

/// The last steps, each at its number modulo their count; 0 where there is none yet.
#[derive(Clone, Debug)]
pub(super) struct History {
    pub(super) steps: Vec<HistoryStep>,
    /// Of each step, one a tensor.
    pub(super) tensors: Vec<HistoryTensor>,
    /// Of the batch.
    pub(super) tag: u64,
}

impl History {
    pub(super) fn new(steps: u32, tensors: usize) -> Result<Self, Error> {
        let bytes = history::bytes(steps, tensors)?;
        let out_of_memory = |_| Error::OutOfMemory { bytes };
        let count = steps as usize;
        let (mut ring, mut of_tensors) = (Vec::new(), Vec::new());
        ring.try_reserve_exact(count).map_err(out_of_memory)?;
        of_tensors.try_reserve_exact(count * tensors).map_err(out_of_memory)?;
        ring.resize(count, HistoryStep::zeroed());
        of_tensors.resize(count * tensors, HistoryTensor::zeroed());
        Ok(Self { steps: ring, tensors: of_tensors, tag: 0 })
    }

    /// Keeps a step in place of the oldest.
    pub(super) fn keep(&mut self, outputs: &StepOutputs, records: &[Record]) {
        #[expect(clippy::cast_possible_truncation, reason = "below the number of steps")]
        let place = ((outputs.step - 1) % self.steps.len() as u64) as usize;
        self.steps[place] = HistoryStep { outputs: *outputs, tag: self.tag, reserved: 0 };
        let line = &mut self.tensors[place * records.len()..(place + 1) * records.len()];
        line.iter_mut().zip(records).for_each(|(kept, record)| *kept = HistoryTensor::new(record));
    }
}
