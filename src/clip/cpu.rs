//! The clip: each element times a coefficient, or between two limits, rounded to its type; non-finite elements zeroed if
//! so decided.

use crate::{
    Element, HostTensorMut, StepOutputs,
    device::cpu::{Memory, Own},
    dtype::sealed::Bits,
    spec::{CHUNK, TILE},
    tensor::with_elements,
};
use rayon::prelude::*;

/// What is done to each element of a tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clipping {
    pub coefficient: f32,
    /// Of magnitudes, or infinite.
    pub limit: f32,
    /// NaN and Inf become 0.
    pub zero_nonfinite: bool,
}

/// Clips in place. A product that is NaN is written as the quiet NaN with no payload, so that the bits do not depend on
/// the machine.
pub(crate) fn clip<E: Element>(elements: &mut [E], how: Clipping) {
    for elements in elements.chunks_mut(TILE) {
        let mut buffer = [0.0; TILE];
        let wide = &mut buffer[..elements.len()];
        Bits::widen_slice(elements, wide);
        for x in wide.iter_mut() {
            let mut product = if how.zero_nonfinite && !x.is_finite() { 0.0 } else { *x * how.coefficient };
            // Not `clamp`: a NaN passes both comparisons.
            if product > how.limit {
                product = how.limit;
            }
            if product < -how.limit {
                product = -how.limit;
            }
            *x = if product.is_nan() { f32::NAN } else { product };
        }
        Bits::narrow_slice(wide, elements);
    }
}

/// What `gradprobe_clip` does.
pub(crate) fn run(memory: &mut Memory<'_>) {
    let Memory { own: Own::Changed(tensors, _), outputs, clip: state, .. } = memory else { return };
    let does = |bit: u32| outputs.action & bit != 0;
    if outputs.action == 0 {
        return;
    }
    let limit = if does(StepOutputs::ACTION_CLAMP) { state.header.limit } else { f32::INFINITY };
    let zero_nonfinite = does(StepOutputs::ACTION_ZERO_NONFINITE);
    let by_tensor = does(StepOutputs::ACTION_SCALE_TENSORS).then_some(&*state.coefficients);
    tensors.par_iter_mut().enumerate().for_each(|(index, tensor)| {
        let coefficient = by_tensor.map_or(outputs.coefficient, |coefficients| coefficients[index]);
        let how = Clipping { coefficient, limit, zero_nonfinite };
        if by_tensor.is_some() && coefficient == 1.0 && !zero_nonfinite {
            return;
        }
        with_elements!(HostTensorMut, tensor, elements => {
            elements.par_chunks_mut(CHUNK).for_each(|chunk| clip(chunk, how));
        });
    });
}
