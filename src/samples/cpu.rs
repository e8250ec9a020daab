//! The ring of sampled elements on the CPU.

use super::{NONFINITE, SampleArguments, SamplePlace};
use crate::{HostTensor, StepOutputs, device::cpu::Memory, dtype::sealed::Bits, tensor::with_elements};

/// What `gradprobe_sample` does: keeps the elements of the step that was measured last.
#[expect(clippy::cast_possible_truncation, reason = "below the number of steps, and of elements")]
pub(crate) fn run(memory: &Memory, a: &SampleArguments) {
    let (count, steps) = (a.count as usize, a.steps as usize);
    let (tensors, outputs) = (memory.tensors(&a.common), &memory.slice::<StepOutputs>(a.common.outputs, 1)[0]);
    let (places, numbers) = (memory.slice::<SamplePlace>(a.places, count), memory.slice_mut(a.numbers, steps));
    let slot = ((outputs.step - 1) % u64::from(a.steps)) as usize;
    numbers[slot] = if outputs.found_inf == 0.0 { outputs.step } else { outputs.step | NONFINITE };
    let values: &mut [f32] = &mut memory.slice_mut(a.ring, steps * count)[slot * count..];
    for (value, place) in values.iter_mut().zip(places) {
        let index = place.index as usize;
        // Of a tensor that is absent.
        let mut wide = [f32::NAN];
        with_elements!(HostTensor, tensors[place.tensor as usize], elements => {
            if let Some(element) = elements.get(index..=index) {
                Bits::widen_slice(element, &mut wide);
            }
        });
        [*value] = wide;
    }
}
