//! The ring of sampled elements on the CPU.

use super::{NONFINITE, SamplePlace};
use crate::{
    HostTensor,
    device::cpu::{Memory, Own},
    dtype::sealed::Bits,
    tensor::with_elements,
};

/// Elements of the last steps, each step at its number modulo their count.
pub(crate) struct SampleRing<'a> {
    pub places: &'a [SamplePlace],
    pub numbers: &'a mut [u64],
    pub values: &'a mut [f32],
}

/// What `gradprobe_sample` does: keeps the elements of the step that was measured last.
#[expect(clippy::cast_possible_truncation, reason = "below the number of steps, and of elements")]
pub(crate) fn run(memory: &mut Memory<'_>) {
    let Memory { tensors, outputs, own: Own::Sampled(ring), .. } = memory else { return };
    let slot = ((outputs.step - 1) % ring.numbers.len() as u64) as usize;
    ring.numbers[slot] = if outputs.found_inf == 0.0 { outputs.step } else { outputs.step | NONFINITE };
    let values = ring.values[slot * ring.places.len()..].iter_mut();
    for (value, place) in values.zip(ring.places) {
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
