//! The ring of sampled elements on the CPU.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::{NONFINITE, SampleArguments, SamplePlace};
use crate::{
    HostTensor, StepOutputs,
    device::cpu::memory::{Tables, tensors},
    dtype::sealed::Bits,
    tensor::with_elements,
};

/// Does as `gradprobe_sample`: keeps the elements of the last measured step.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
#[expect(clippy::cast_possible_truncation, reason = "below the number of steps, and of elements")]
pub(crate) unsafe fn run(a: &SampleArguments) {
    let (count, steps) = (a.count as usize, a.steps as usize);
    // SAFETY: the caller's promise.
    let (tensors, _) = unsafe { tensors(&a.common) };
    // SAFETY: the caller's promise.
    let (outputs, places, numbers, ring): (&[StepOutputs], &[SamplePlace], &mut [u64], &mut [f32]) =
        unsafe { Tables::at(((a.common.outputs, 1), (a.places, count), (a.numbers, steps), (a.ring, steps * count))) };
    let outputs = &outputs[0];
    // As on a GPU, also where a state was restored of no step.
    let slot = (outputs.step.wrapping_sub(1) % u64::from(a.steps)) as usize;
    numbers[slot] = if outputs.found_inf == 0.0 { outputs.step } else { outputs.step | NONFINITE };
    for (value, place) in ring[slot * count..].iter_mut().zip(places) {
        let index = place.index as usize;
        // For an absent tensor.
        let mut wide = [f32::NAN];
        with_elements!(HostTensor, tensors[place.tensor as usize], elements => {
            if let Some(element) = elements.get(index..=index) {
                Bits::widen_slice(element, &mut wide);
            }
        });
        [*value] = wide;
    }
}
