//! The ring of the last steps on the CPU.

use super::{HistoryStep, HistoryTensor};
use crate::{Record, StepOutputs};

/// The last steps, each at its number modulo their count; 0 where there is none yet.
pub(crate) struct Ring<'a> {
    pub steps: &'a mut [HistoryStep],
    /// Tensors of each step, one a tensor.
    pub tensors: &'a mut [HistoryTensor],
    /// The tag of the batch.
    pub tag: u64,
}

impl Ring<'_> {
    /// Keeps a step in place of the oldest.
    pub fn keep(&mut self, outputs: &StepOutputs, records: &[Record]) {
        #[expect(clippy::cast_possible_truncation, reason = "below the number of steps")]
        let place = ((outputs.step - 1) % self.steps.len() as u64) as usize;
        self.steps[place] = HistoryStep { outputs: *outputs, tag: self.tag, reserved: 0 };
        let line = &mut self.tensors[place * records.len()..(place + 1) * records.len()];
        line.iter_mut().zip(records).for_each(|(kept, record)| *kept = HistoryTensor::new(record));
    }
}
