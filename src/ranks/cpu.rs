//! The merge of the ranks' records on the CPU.

use super::{Run, merged};
use crate::{
    device::cpu::{Memory, Own},
    measure,
};

/// What `gradprobe_merge` does.
pub(crate) fn run(memory: &mut Memory<'_>) {
    let Memory { own: Own::Ranks { lists, length, placements, ranks }, records, .. } = memory else { return };
    let (length, count) = (*length, lists.len() / (*length).max(1));
    let mut differing = 0;
    for (index, record) in records.iter_mut().enumerate() {
        let placement: Run = placements[index % placements.len()];
        let differs;
        (*record, differs) = merged(placement, ranks, |rank| lists[rank * length + index], count);
        differing += u32::from(differs);
    }
    measure::cpu::finish(memory, differing);
}
