//! The clip: each element times a coefficient, or between two limits, rounded to its type; non-finite elements zeroed if
//! so decided.

use crate::{Element, dtype::sealed::Bits, spec::TILE};

/// What is done to each element of a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clipping {
    pub coefficient: f32,
    /// Of magnitudes, or infinite.
    pub limit: f32,
    /// NaN and Inf become 0.
    pub zero_nonfinite: bool,
}

/// Clips in place. A product that is NaN is written as the quiet NaN with no payload, so that the bits do not depend on
/// the machine.
pub(super) fn clip<E: Element>(elements: &mut [E], how: Clipping) {
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
