//! The end of a step of many ranks on the CPU.

use super::{MergeArguments, whole};
use crate::{device::cpu::Memory, measure};

/// What `gradprobe_merge` does.
pub(crate) fn run(memory: &Memory, a: &MergeArguments) {
    let tensors = a.step.common.tensor_count as usize;
    let slots: &[u32] = memory.slice(a.slots, tensors);
    if !slots.is_empty() {
        let records = memory.slice_mut(a.step.common.records, tensors << a.step.weights);
        whole::merge(memory, slots, (a.model_sums, a.model_maxima, a.model_count as usize), records);
    }
    measure::cpu::finish(memory, &a.step);
}
