//! The adaptive clip: sums of a unit's squares in the order of the kernel, then its coefficient, then the clip.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::{
    AdaptiveRecord, coefficient,
    room::{AdaptiveArguments, TensorUnits},
};
use crate::{
    Element, HostTensor, HostTensorMut, NonFinitePolicy, StepOutputs,
    clip::{
        cpu::{Clipping, clip},
        divisor,
    },
    device::cpu::{
        dispatch::{self, InstructionSet, Work},
        memory::{Tables, tensor, tensors_mut},
    },
    measure::narrow,
    spec::{self, CHUNK, LANES, PACKET},
    tensor::with_elements,
};
use rayon::prelude::*;

/// Does as `gradprobe_adaptive`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn run(a: &AdaptiveArguments) {
    let count = a.common.tensor_count as usize;
    // SAFETY: the caller's promise.
    let (outputs, units, records): (&[StepOutputs], &[TensorUnits], &mut [AdaptiveRecord]) =
        unsafe { Tables::at(((a.common.outputs, 1), (a.units, count), (a.adaptive_records, count))) };
    let outputs = &outputs[0];
    if outputs.skip != 0 {
        return;
    }
    let (policy, divisor) = (NonFinitePolicy::of(a.policy), divisor(outputs.loss_scale));
    // SAFETY: the caller's promise.
    let (mut tensors, entries) = unsafe { tensors_mut(&a.common) };
    let work = tensors.par_iter_mut().zip(entries).zip(units).zip(records);
    work.for_each(|(((gradient, entry), units), record)| {
        if units.limited == 0 || units.address == 0 {
            return unscale(gradient, policy, divisor);
        }
        // SAFETY: the weights have the lengths of their gradients, and share no memory with them.
        let weight = unsafe { tensor(units.address, entry.length, units.dtype) };
        let length = usize::try_from(units.length).unwrap_or(usize::MAX);
        *record = clip_tensor((a.clipping, a.epsilon), length, gradient, weight, policy, divisor);
    });
}

/// Divides a tensor that is not clipped by the loss scale, and zeroes non-finite elements under that policy.
fn unscale(gradient: &mut HostTensorMut<'_>, policy: NonFinitePolicy, divisor: f64) {
    let zero_nonfinite = policy == NonFinitePolicy::ZeroNonFinite;
    let how = Clipping { coefficient: narrow(1.0 / divisor), limit: f32::INFINITY, zero_nonfinite };
    if how.coefficient != 1.0 || zero_nonfinite {
        with_elements!(HostTensorMut, gradient, gradient => {
            gradient.par_chunks_mut(CHUNK).for_each(|chunk| clip(chunk, how));
        });
    }
}

/// Clips units of so many elements of a tensor, at least one, and divides all by the loss scale.
fn clip_tensor(
    limits: (f64, f64),
    length: usize,
    gradient: &mut HostTensorMut<'_>,
    weight: HostTensor<'_>,
    policy: NonFinitePolicy,
    divisor: f64,
) -> AdaptiveRecord {
    with_elements!(HostTensorMut, gradient, gradient => with_elements!(HostTensor, weight, weight => {
        let pairs = gradient.par_chunks_exact_mut(length).zip(weight.par_chunks_exact(length));
        let records = pairs.map(|(gradient, weight)| {
            let (g, w) = (dispatch::run(Squares(&*gradient)), dispatch::run(Squares(weight)));
            let nonfinite = g.1 > 0;
            let coefficient = coefficient(limits, g.0.sqrt() / divisor, w.0.sqrt(), nonfinite, policy);
            let product = narrow(f64::from(coefficient) / divisor);
            if product != 1.0 || nonfinite {
                let zero_nonfinite = policy == NonFinitePolicy::ZeroNonFinite;
                let how = Clipping { coefficient: product, limit: f32::INFINITY, zero_nonfinite };
                gradient.par_chunks_mut(CHUNK).for_each(|chunk| clip(chunk, how));
            }
            let mut record = AdaptiveRecord::default();
            record.count(nonfinite, coefficient);
            record
        });
        records.reduce(AdaptiveRecord::default, |a, b| a.merge(&b))
    }))
}

/// Gives Σx² over the finite elements of a unit, and the number of non-finite ones.
struct Squares<'a, E>(&'a [E]);

impl<E: Element> Work for Squares<'_, E> {
    type Output = (f64, u64);

    #[inline(always)]
    fn run(self, set: impl InstructionSet) -> (f64, u64) {
        // Element i is slot i % PACKET of lane i / PACKET % LANES.
        let mut sums = [0f64; LANES * PACKET];
        let mut nonfinite = 0u64;
        let mut wide = [0.0; LANES * PACKET];
        for elements in self.0.chunks(sums.len()) {
            let wide = &mut wide[..elements.len()];
            E::widen(elements, wide, set);
            for (sum, &x) in sums.iter_mut().zip(&*wide) {
                let finite = x.is_finite();
                let x = f64::from(if finite { x } else { 0.0 });
                *sum = x.mul_add(x, *sum);
                nonfinite += u64::from(!finite);
            }
        }
        let lane = |lane: usize| {
            let s = &sums[lane * PACKET..][..PACKET];
            ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
        };
        (spec::fold_lanes(std::array::from_fn(lane)), nonfinite)
    }
}
