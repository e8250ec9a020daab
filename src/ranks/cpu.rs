//! The merge of the ranks' records on the CPU.

use super::{MergeArguments, Run, merged};
use crate::{Record, device::cpu::Memory, measure};

/// What `gradprobe_merge` does.
pub(crate) fn run(memory: &Memory, a: &MergeArguments) {
    let (tensors, ranks, length) = (a.step.common.tensor_count as usize, a.list_count as usize, a.list_length as usize);
    let placements: &[Run] = memory.slice(a.placements, tensors);
    let end = placements.iter().filter_map(Run::end).max().unwrap_or(0);
    let table = memory.slice(a.placements + size_of_val(placements) as u64, end);
    let lists: &[Record] = memory.slice(a.lists, ranks * length);
    let records: &mut [Record] = memory.slice_mut(a.step.common.records, tensors << a.step.weights);
    let mut differing = 0;
    for (index, record) in records.iter_mut().enumerate() {
        let differs;
        (*record, differs) = merged(placements[index % tensors], table, |rank| lists[rank * length + index], ranks);
        differing += u32::from(differs);
    }
    measure::cpu::finish(memory, &a.step, differing);
}
