//! One chunk: from elements to a record.
//!
//! A chunk is first read as though all elements were finite, of ordinary size and centred. If they are not, it is read
//! again with the bad elements left out, the rest scaled by a power of two, and around its mean. `spec` says when, and
//! why the result is exact enough.

use super::{
    scan::Scan,
    sums::{Sums, sums},
};
use crate::{
    Element, Record,
    device::cpu::dispatch::{InstructionSet, Work},
    spec::{CENTRED_SHARE, TILE, scale_of},
};

/// The record of at most one chunk of elements.
pub(super) struct Measure<'a, E: Element> {
    pub elements: &'a [E],
    /// The dead threshold as a magnitude of this type.
    pub dead_bits: E::Word,
}

impl<E: Element> Work for Measure<'_, E> {
    type Output = Record;

    #[inline(always)]
    fn run(self, set: impl InstructionSet) -> Record {
        chunk(self.elements, self.dead_bits, set)
    }
}

#[inline(always)]
fn chunk<E: Element>(elements: &[E], dead_bits: E::Word, set: impl InstructionSet) -> Record {
    let mut scan = Scan::new();
    let sums = sums(elements, E::zeroed(), |x| x, |tile, next| scan.add_tile(tile, next, dead_bits, set), set);
    let max = scan.max.into();
    if max >= E::INFINITY {
        return with_nonfinite(elements, dead_bits, set);
    }
    let mut record = scan.record::<E>(elements.len());
    let scale = scale_of(record.max_abs_or_zero);
    let sums = if scale == 1.0 { sums } else { careful_sums(elements, scale, 0.0, set) };
    set_moments(&mut record, elements, scale, sums, set);
    record
}

/// Does as [`chunk`] where some elements are NaN or Inf.
#[inline(always)]
fn with_nonfinite<E: Element>(elements: &[E], dead_bits: E::Word, set: impl InstructionSet) -> Record {
    let nonfinite = || elements.iter().map(|x| x.magnitude().into()).filter(|&bits: &u32| bits >= E::INFINITY);
    let inf_count = nonfinite().filter(|&bits| bits == E::INFINITY).count() as u64;
    let nan_count = nonfinite().count() as u64 - inf_count;
    let mut scan = Scan::new();
    for tile in elements.chunks(TILE) {
        let (mut finite, mut count) = ([E::zeroed(); TILE], 0);
        for x in tile.iter().filter(|x| x.magnitude().into() < E::INFINITY) {
            finite[count] = *x;
            count += 1;
        }
        scan.add(&finite[..count], dead_bits);
    }
    let mut record = Record {
        nan_count,
        inf_count,
        first_nonfinite_index: elements
            .iter()
            .position(|x| x.magnitude().into() >= E::INFINITY)
            .map_or(Record::NONE, |index| index as u64),
        ..scan.record::<E>(elements.len())
    };
    let scale = scale_of(record.max_abs_or_zero);
    set_moments(&mut record, elements, scale, careful_sums(elements, scale, 0.0, set), set);
    record
}

/// The sums of x·scale − shift over the finite elements.
#[inline(always)]
fn careful_sums<E: Element>(elements: &[E], scale: f32, shift: f32, set: impl InstructionSet) -> Sums {
    let value = |x: f32| if x.is_finite() { x * scale - shift } else { 0.0 };
    sums(elements, E::NAN, value, |_, _| (), set)
}

/// Mean, deviations and Σ|x| from the sums of the scaled elements, read again around the mean where it is too large.
#[inline(always)]
fn set_moments<E: Element>(record: &mut Record, elements: &[E], scale: f32, sums: Sums, set: impl InstructionSet) {
    if record.finite_count() == 0 {
        return;
    }
    #[expect(clippy::cast_precision_loss, reason = "at most one chunk of elements")]
    let count = record.finite_count() as f64;
    let (mut mean, mut deviations) = centred(&sums, count);
    if sums.sum * mean > CENTRED_SHARE * deviations {
        #[expect(clippy::cast_possible_truncation, reason = "any shift near the mean will do")]
        let shift = mean as f32;
        let (rest_of_mean, around_mean) = centred(&careful_sums(elements, scale, shift, set), count);
        mean = f64::from(shift) + rest_of_mean;
        deviations = around_mean;
    }
    let unscale = 1.0 / f64::from(scale);
    record.mean_or_zero = mean * unscale;
    record.sum_squared_deviations = deviations.max(0.0) * unscale * unscale;
    record.sum_abs = sums.magnitude * unscale;
}

/// Mean and sum of squared deviations of values with these sums.
#[inline(always)]
fn centred(sums: &Sums, count: f64) -> (f64, f64) {
    let mean = sums.sum / count;
    (mean, (-sums.sum).mul_add(mean, sums.squares))
}
