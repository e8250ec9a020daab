//! The end of a step of many ranks on the CPU.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::{MergeArguments, whole};
use crate::{device::cpu::memory::Tables, measure};

/// Does as `gradprobe_merge`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn run(a: &MergeArguments) {
    let tensors = a.step.common.tensor_count as usize;
    // SAFETY: the caller's promise.
    let slots: &[u32] = unsafe { Tables::at((a.slots, tensors)) };
    if !slots.is_empty() {
        let (of_model, of_plan) = ((a.model_count as usize) << a.step.weights, tensors << a.step.weights);
        // SAFETY: the caller's promise.
        let (sums, maxima, records) = unsafe {
            Tables::at(((a.model_sums, of_model), (a.model_maxima, of_model), (a.step.common.records, of_plan)))
        };
        whole::merge(slots, sums, maxima, records);
    }
    // SAFETY: the caller's promise; the references made above are no longer used.
    unsafe { measure::cpu::finish(&a.step) };
}
