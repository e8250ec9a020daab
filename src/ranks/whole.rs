//! Whole tensors: the records of the parts that ranks count, as integers that all ranks add up, and the records from
//! those sums.
//!
//! The f64 of each part are added exactly ([`ExactSum`]): of Σx, Σ|x|, Σ m·mean² and the squared deviations within the
//! parts. The squared deviations around the mean of the whole are then the two last less (Σx)²/m. A part's own are
//! within the bounds of one tensor; this adds a rounding of each product, 2^-53 of m·mean². Counts add up, and of
//! extremes and places the largest is taken. So nothing depends on the order or the number of ranks, except where they
//! cut.

use crate::{
    Record,
    device::cpu::memory::Tables,
    measure::{ExactSum, to_f64},
    probe::{Common, TensorEntry},
};
use bytemuck::{Pod, Zeroable};

/// The sums of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct TensorSums {
    sum: ExactSum,
    sum_abs: ExactSum,
    mean_squares: ExactSum,
    deviations: ExactSum,
    count: u64,
    nan_count: u64,
    inf_count: u64,
    zero_count: u64,
    dead_count: u64,
}

/// Its maxima, 0 where there is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct TensorMaxima {
    max_abs: u64,
    /// The bits of Inf less its own.
    min_nonzero_abs: u64,
    /// [`Record::NONE`] less its place.
    first_nonfinite: u64,
}

/// The arguments of [`Kernel::Contribute`](crate::device::Kernel::Contribute).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct ContributeArguments {
    pub common: Common,
    /// The tensor of the plan for each of the model, or [`NOWHERE`].
    pub owners: u64,
    /// The place of each of the plan's parts in its tensor.
    pub firsts: u64,
    /// [`TensorSums`] of the model's tensors, and behind them of their weights.
    pub sums: u64,
    /// [`TensorMaxima`] in the same way.
    pub maxima: u64,
    /// Tensors of the model.
    pub model_count: u32,
    /// Whether the weights' records are given too.
    pub weights: u32,
}
// The other side is in kernels/whole.cuh and kernels/contribute.cu.
const _: () = assert!(size_of::<TensorSums>() == 89 * 8 && size_of::<TensorMaxima>() == 24);
const _: () = assert!(size_of::<ContributeArguments>() == 112);

/// Stands for a tensor that a rank does not have.
pub(super) const NOWHERE: u32 = u32::MAX;

impl TensorSums {
    fn of(r: &Record) -> Self {
        let mut sums = Self {
            count: r.count,
            nan_count: r.nan_count,
            inf_count: r.inf_count,
            zero_count: r.zero_count,
            dead_count: r.dead_count,
            ..Self::default()
        };
        let sum = to_f64(r.finite_count()) * r.mean_or_zero;
        sums.sum.add(sum);
        sums.sum_abs.add(r.sum_abs);
        sums.mean_squares.add(sum * r.mean_or_zero);
        sums.deviations.add(r.sum_squared_deviations);
        sums
    }

    pub(super) fn whole(&self, maxima: &TensorMaxima) -> Record {
        let bits = |word: u64| f32::from_bits(u32::try_from(word).unwrap_or(u32::MAX));
        let mut r = Record {
            count: self.count,
            nan_count: self.nan_count,
            inf_count: self.inf_count,
            zero_count: self.zero_count,
            dead_count: self.dead_count,
            first_nonfinite_index: Record::NONE - maxima.first_nonfinite,
            max_abs_or_zero: bits(maxima.max_abs),
            min_nonzero_abs_or_infinity: bits(INFINITE - maxima.min_nonzero_abs),
            sum_abs: self.sum_abs.rounded(),
            ..Record::EMPTY
        };
        let (finite, sum) = (to_f64(r.finite_count()), self.sum.rounded_signed());
        r.mean_or_zero = if finite > 0.0 { sum / finite } else { 0.0 };
        let between = (-sum).mul_add(r.mean_or_zero, self.mean_squares.rounded());
        let deviations = between + self.deviations.rounded();
        r.sum_squared_deviations = if deviations > 0.0 { deviations } else { 0.0 };
        r
    }
}

const INFINITE: u64 = 0x7f80_0000;

impl TensorMaxima {
    fn of(r: &Record, first: u64) -> Self {
        let bits = |magnitude: f32| u64::from(magnitude.to_bits());
        Self {
            max_abs: bits(r.max_abs_or_zero),
            min_nonzero_abs: INFINITE - bits(r.min_nonzero_abs_or_infinity),
            first_nonfinite: r.first_nonfinite().map_or(0, |index| Record::NONE - (first + index)),
        }
    }
}

/// Does as `gradprobe_contribute`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
#[allow(unsafe_code, reason = "finds what a launch names by its addresses")]
pub(crate) unsafe fn contribute(a: &ContributeArguments) {
    let (model, tensors) = (a.model_count as usize, a.common.tensor_count as usize);
    // SAFETY: the caller's promise.
    let (owners, firsts, entries, records): (&[u32], &[u64], &[TensorEntry], &[Record]) = unsafe {
        Tables::at((
            (a.owners, model),
            (a.firsts, tensors),
            (a.common.tensors, tensors),
            (a.common.records, tensors << a.weights),
        ))
    };
    // SAFETY: the caller's promise.
    let (sums, maxima): (&mut [TensorSums], &mut [TensorMaxima]) =
        unsafe { Tables::at(((a.sums, model << a.weights), (a.maxima, model << a.weights))) };
    for (slot, (sums, maxima)) in sums.iter_mut().zip(maxima).enumerate() {
        let owner = Some(owners[slot % model]).filter(|&owner| owner != NOWHERE).map(|owner| owner as usize);
        let counted = owner.filter(|&owner| entries[owner].is_uncounted == 0 && entries[owner].length > 0);
        (*sums, *maxima) = counted.map_or_else(Default::default, |owner| {
            let record = &records[slot / model * tensors + owner];
            (TensorSums::of(record), TensorMaxima::of(record, firsts[owner]))
        });
    }
}

/// Gives the records of the plan's tensors, and of their weights, from those sums.
pub(super) fn merge(slots: &[u32], sums: &[TensorSums], maxima: &[TensorMaxima], records: &mut [Record]) {
    let count = sums.len() / records.len().div_ceil(slots.len().max(1)).max(1);
    for (index, record) in records.iter_mut().enumerate() {
        let slot = slots[index % slots.len()] as usize + index / slots.len() * count;
        *record = sums[slot].whole(&maxima[slot]);
    }
}
