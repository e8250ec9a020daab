//! The clip: each element times a coefficient, or between two limits, rounded to its type. Non-finite elements become 0
//! under that policy.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::ClipHeader;
use crate::{
    Element, HostTensorMut, StepOutputs,
    device::cpu::{
        dispatch::{self, InstructionSet, Work},
        memory::{Tables, tensors_mut},
    },
    probe::Common,
    spec::{CHUNK, TILE},
    tensor::with_elements,
};
use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

/// The arguments of [`Kernel::Clip`](crate::device::Kernel::Clip).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct ClipArguments {
    /// The common part.
    pub common: Common,
    /// The rule's state from step to step.
    pub clip_state: u64,
    /// One f32 a tensor, under a rule that clips each tensor on its own.
    pub coefficients: u64,
}
// The other side is in kernels/clip.cu.
const _: () = assert!(size_of::<ClipArguments>() == 88);

/// The change of each element of a tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clipping {
    pub coefficient: f32,
    /// The limit of magnitudes, or infinite.
    pub limit: f32,
    /// Whether NaN and Inf become 0.
    pub zero_nonfinite: bool,
}

impl Clipping {
    /// Takes a step's decision, but for the coefficients of tensors on their own. `state` is the clip's.
    pub fn of(outputs: &StepOutputs, state: &[ClipHeader]) -> Self {
        let clamp = outputs.action & StepOutputs::ACTION_CLAMP != 0;
        Self {
            coefficient: outputs.coefficient,
            limit: if clamp { state[0].limit } else { f32::INFINITY },
            zero_nonfinite: outputs.action & StepOutputs::ACTION_ZERO_NONFINITE != 0,
        }
    }

    /// Clips an element. Not by `clamp`: a NaN passes both comparisons.
    #[inline(always)]
    pub fn taken(&self, x: f32) -> f32 {
        let mut product = if self.zero_nonfinite && !x.is_finite() { 0.0 } else { x * self.coefficient };
        if product > self.limit {
            product = self.limit;
        }
        if product < -self.limit {
            product = -self.limit;
        }
        product
    }

    /// Gives the clip of a tensor with this coefficient, where each has one.
    pub fn of_tensor(self, outputs: &StepOutputs, coefficient: f32) -> Self {
        let by_tensor = outputs.action & StepOutputs::ACTION_SCALE_TENSORS != 0;
        if by_tensor { Self { coefficient, ..self } } else { self }
    }
}

/// Clips in place. A NaN product is written as the quiet NaN without payload, so that the bits do not depend on the
/// machine.
pub(crate) fn clip<E: Element>(elements: &mut [E], how: Clipping) {
    dispatch::run(Clip { elements, how });
}

struct Clip<'a, E> {
    elements: &'a mut [E],
    how: Clipping,
}

impl<E: Element> Work for Clip<'_, E> {
    type Output = ();

    /// Works on a part at a time, while the one a tile behind is on its way from memory. Products of finite numbers are
    /// no NaN: looking for other elements first took 0.12 ns an element for bf16 in L2 under AVX2, looking at each
    /// product 0.17.
    #[inline(always)]
    fn run(self, set: impl InstructionSet) {
        /// Asking for a whole tile at once took a third longer for bf16.
        const PART: usize = TILE / 4;
        let how = self.how;
        let Clipping { coefficient, limit, .. } = how;
        let value = |x: f32| {
            let product = how.taken(x);
            if product.is_nan() { f32::NAN } else { product }
        };
        let may_scale = coefficient.is_finite() && limit == f32::INFINITY;
        let mut rest = self.elements;
        while !rest.is_empty() {
            let (part, after) = rest.split_at_mut(PART.min(rest.len()));
            set.prefetch(after.get(TILE - PART..TILE).unwrap_or_default());
            let largest = || part.iter().fold(E::Word::default(), |largest, x| largest.max(x.magnitude()));
            if may_scale && largest().into() < E::INFINITY {
                E::change(part, |x| x * coefficient, set);
            } else {
                E::change(part, value, set);
            }
            rest = after;
        }
    }
}

/// Does as `gradprobe_clip`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn run(a: &ClipArguments) {
    let count = a.common.tensor_count as usize;
    // SAFETY: the caller's promise.
    let (outputs, state, coefficients): (&[StepOutputs], &[ClipHeader], &[f32]) =
        unsafe { Tables::at(((a.common.outputs, 1), (a.clip_state, 1), (a.coefficients, count))) };
    let outputs = &outputs[0];
    if outputs.action == 0 {
        return;
    }
    let how = Clipping::of(outputs, state);
    // SAFETY: the caller's promise.
    let (mut tensors, _) = unsafe { tensors_mut(&a.common) };
    tensors.par_iter_mut().zip(coefficients).for_each(|(tensor, coefficient)| {
        let how = how.of_tensor(outputs, *coefficient);
        if how.coefficient == 1.0 && how.limit == f32::INFINITY && !how.zero_nonfinite {
            return;
        }
        with_elements!(HostTensorMut, tensor, elements => {
            elements.par_chunks_mut(CHUNK).for_each(|chunk| clip(chunk, how));
        });
    });
}
