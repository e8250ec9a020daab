//! The clip: each element times the coefficient, rounded to its type; non-finite elements zeroed if so decided.

use crate::{Element, dtype::sealed::Bits, spec::TILE};

/// Scales in place. With `zero_nonfinite`, NaN and Inf become 0. A product that is NaN is written as the quiet NaN
/// with no payload, so that the bits do not depend on the machine.
pub(super) fn clip<E: Element>(elements: &mut [E], coefficient: f32, zero_nonfinite: bool) {
    for elements in elements.chunks_mut(TILE) {
        let mut buffer = [0.0; TILE];
        let wide = &mut buffer[..elements.len()];
        Bits::widen_slice(elements, wide);
        for x in wide.iter_mut() {
            let product = if zero_nonfinite && !x.is_finite() { 0.0 } else { *x * coefficient };
            *x = if product.is_nan() { f32::NAN } else { product };
        }
        Bits::narrow_slice(wide, elements);
    }
}
