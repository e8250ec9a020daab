//! The record of one read of a tensor. It can be merged, and gives every statistic.

use bytemuck::{Pod, Zeroable};

/// Holds the statistics of a run of elements: counts, and extremes and moments over the finite ones.
///
/// The kernels write this very struct (`kernels/include/gradprobe.h`), one per tensor, and an optimizer's kernel may
/// read it there. The fields can be merged; the methods give the statistics.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe};
///
/// let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 4)])?, Config::new())?;
/// probe.measure(&[&[3.0f32, f32::NAN, 0.0, 4.0]])?;
/// let record = probe.wait()?.records()[0];
/// assert_eq!((record.nan_count, record.first_nonfinite(), record.zero_count), (1, Some(1), 1));
/// assert!((record.finite_l2_norm() - 5.0).abs() < 5e-7 * 5.0);
/// assert_eq!(record.max_abs(), Some(4.0));
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Record {
    /// Elements, finite or not.
    pub count: u64,
    /// Elements that are NaN.
    pub nan_count: u64,
    /// Elements that are +Inf or −Inf.
    pub inf_count: u64,
    /// Finite elements equal to 0; −0 counts.
    pub zero_count: u64,
    /// Finite elements with |x| below the dead threshold; zeros count.
    pub dead_count: u64,
    /// Smallest index of a NaN or Inf, or [`Record::NONE`]. [`Record::first_nonfinite`] gives an `Option`.
    pub first_nonfinite_index: u64,
    /// Mean of the finite elements; 0 when there are none.
    pub mean_or_zero: f64,
    /// Sum of squared deviations from the mean over the finite elements.
    pub sum_squared_deviations: f64,
    /// Sum of |x| over the finite elements.
    pub sum_abs: f64,
    /// Largest |x| over the finite elements; 0 when there are none.
    pub max_abs_or_zero: f32,
    /// Smallest non-zero |x| over the finite elements; +Inf when there are none.
    pub min_nonzero_abs_or_infinity: f32,
}

// The other side of these numbers is in kernels/include/gradprobe.h.
const _: () = {
    assert!(size_of::<Record>() == 80);
    assert!(std::mem::offset_of!(Record, first_nonfinite_index) == 40);
    assert!(std::mem::offset_of!(Record, mean_or_zero) == 48);
    assert!(std::mem::offset_of!(Record, max_abs_or_zero) == 72);
    assert!(std::mem::offset_of!(Record, min_nonzero_abs_or_infinity) == 76);
};

impl Default for Record {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl Record {
    /// `first_nonfinite_index` of a record without a non-finite element.
    pub const NONE: u64 = u64::MAX;

    /// The record of no elements: merging it changes no bit.
    pub const EMPTY: Record = Record {
        count: 0,
        nan_count: 0,
        inf_count: 0,
        zero_count: 0,
        dead_count: 0,
        first_nonfinite_index: Self::NONE,
        mean_or_zero: 0.0,
        sum_squared_deviations: 0.0,
        sum_abs: 0.0,
        max_abs_or_zero: 0.0,
        min_nonzero_abs_or_infinity: f32::INFINITY,
    };

    /// Gives the record of `self`'s elements followed by `next`'s: of a tensor's shards, of micro-batches, of ranks.
    ///
    /// Counts, extremes and the first non-finite index are exact in any order. The moments follow Chan, Golub and
    /// LeVeque (1979), in f64: `merge` is a fixed sequence of IEEE operations, and the kernels call the same one. So
    /// the same records merged in the same order give the same bits on every machine. Another order or grouping may
    /// differ in the last bits of f64.
    #[must_use]
    pub fn merge(&self, next: &Record) -> Record {
        let first_nonfinite_index = if self.first_nonfinite_index != Self::NONE {
            self.first_nonfinite_index
        } else if next.first_nonfinite_index != Self::NONE {
            self.count + next.first_nonfinite_index
        } else {
            Self::NONE
        };
        let (mean_or_zero, sum_squared_deviations) = self.merge_moments(next);
        Record {
            count: self.count + next.count,
            nan_count: self.nan_count + next.nan_count,
            inf_count: self.inf_count + next.inf_count,
            zero_count: self.zero_count + next.zero_count,
            dead_count: self.dead_count + next.dead_count,
            first_nonfinite_index,
            mean_or_zero,
            sum_squared_deviations,
            sum_abs: self.sum_abs + next.sum_abs,
            max_abs_or_zero: self.max_abs_or_zero.max(next.max_abs_or_zero),
            min_nonzero_abs_or_infinity: self.min_nonzero_abs_or_infinity.min(next.min_nonzero_abs_or_infinity),
        }
    }

    /// Says in a few words where to look first; empty when nothing stands out. These are facts, no diagnosis:
    /// non-finite elements and where they begin, a tensor that is all zero, and a dead share of at least a tenth.
    pub fn remarks(&self) -> String {
        let mut remarks = Vec::new();
        for (count, what) in [(self.nan_count, "NaN"), (self.inf_count, "Inf")] {
            if count > 0 {
                remarks.push(format!("{count} {what}"));
            }
        }
        if let Some(index) = self.first_nonfinite() {
            remarks.push(format!("first at {index}"));
        }
        if self.finite_count() > 0 && self.zero_count == self.finite_count() {
            remarks.push("all zero".to_owned());
        } else if let Some(dead) = self.dead_fraction().filter(|&dead| dead >= 0.1) {
            remarks.push(format!("{:.0} % dead", 100.0 * dead));
        }
        remarks.join(", ")
    }

    fn merge_moments(&self, next: &Record) -> (f64, f64) {
        let (own, others) = (to_f64(self.finite_count()), to_f64(next.finite_count()));
        if others == 0.0 {
            return (self.mean_or_zero, self.sum_squared_deviations);
        }
        if own == 0.0 {
            return (next.mean_or_zero, next.sum_squared_deviations);
        }
        let (own_weight, others_weight) = (own / (own + others), others / (own + others));
        let gap = next.mean_or_zero - self.mean_or_zero;
        let within = self.sum_squared_deviations + next.sum_squared_deviations;
        // From the mean of the larger side. From that of one element before 10^12 zeros, rounding would leave 2e-5.
        let mean = if own < others {
            (-gap).mul_add(own_weight, next.mean_or_zero)
        } else {
            gap.mul_add(others_weight, self.mean_or_zero)
        };
        (mean, (gap * gap).mul_add(own * others_weight, within))
    }

    /// Elements that are neither NaN nor ±Inf.
    pub fn finite_count(&self) -> u64 {
        self.count.saturating_sub(self.nan_count).saturating_sub(self.inf_count)
    }

    /// Whether any element is NaN or ±Inf.
    pub fn has_nonfinite(&self) -> bool {
        self.nan_count + self.inf_count > 0
    }

    /// Σ x² over the finite elements.
    pub fn finite_sum_squares(&self) -> f64 {
        let sum = to_f64(self.finite_count()) * self.mean_or_zero;
        sum.mul_add(self.mean_or_zero, self.sum_squared_deviations)
    }

    /// √(Σ x²) over the finite elements; 0 when there are none.
    pub fn finite_l2_norm(&self) -> f64 {
        self.finite_sum_squares().sqrt()
    }

    /// The norm as `torch.linalg.vector_norm` gives it: NaN if there is a NaN, else +Inf if there is an Inf, else
    /// [`finite_l2_norm`](Self::finite_l2_norm).
    pub fn l2_norm(&self) -> f64 {
        propagate(self.nan_count, self.inf_count, self.finite_l2_norm())
    }

    /// Largest |x| over the finite elements.
    pub fn max_abs(&self) -> Option<f32> {
        (self.finite_count() > 0).then_some(self.max_abs_or_zero)
    }

    /// Smallest |x| over the finite elements that are not 0.
    pub fn min_nonzero_abs(&self) -> Option<f32> {
        (self.finite_count() > self.zero_count).then_some(self.min_nonzero_abs_or_infinity)
    }

    /// Mean over the finite elements.
    pub fn mean(&self) -> Option<f64> {
        (self.finite_count() > 0).then_some(self.mean_or_zero)
    }

    /// Mean of |x| over the finite elements.
    pub fn mean_abs(&self) -> Option<f64> {
        (self.finite_count() > 0).then(|| self.sum_abs / to_f64(self.finite_count()))
    }

    /// Population variance (ddof 0) over the finite elements.
    pub fn variance(&self) -> Option<f64> {
        self.variance_ddof(0)
    }

    /// Σ(x − mean)² / (m − `ddof`) over the m finite elements; `None` unless m > `ddof`.
    pub fn variance_ddof(&self, ddof: u64) -> Option<f64> {
        (self.finite_count() > ddof).then(|| self.sum_squared_deviations / to_f64(self.finite_count() - ddof))
    }

    /// Root of the population variance.
    pub fn std(&self) -> Option<f64> {
        self.variance().map(f64::sqrt)
    }

    /// Root mean square of the finite elements.
    pub fn rms(&self) -> Option<f64> {
        (self.finite_count() > 0).then(|| (self.finite_sum_squares() / to_f64(self.finite_count())).sqrt())
    }

    /// Smallest index of a NaN or Inf.
    pub fn first_nonfinite(&self) -> Option<u64> {
        (self.first_nonfinite_index != Self::NONE).then_some(self.first_nonfinite_index)
    }

    /// Share of all elements that are zero, 0 to 1; `None` for an empty tensor.
    pub fn zero_fraction(&self) -> Option<f64> {
        self.fraction(self.zero_count)
    }

    /// Share of all elements that are dead, 0 to 1; `None` for an empty tensor.
    pub fn dead_fraction(&self) -> Option<f64> {
        self.fraction(self.dead_count)
    }

    /// Share of all elements that are NaN, 0 to 1; `None` for an empty tensor.
    pub fn nan_fraction(&self) -> Option<f64> {
        self.fraction(self.nan_count)
    }

    fn fraction(&self, part: u64) -> Option<f64> {
        (self.count > 0).then(|| to_f64(part) / to_f64(self.count))
    }
}

/// NaN and Inf win over a finite norm, in that order.
pub(crate) fn propagate(nan_count: u64, inf_count: u64, finite: f64) -> f64 {
    if nan_count > 0 {
        f64::NAN
    } else if inf_count > 0 {
        f64::INFINITY
    } else {
        finite
    }
}

/// Counts stay below 2^53, so the conversion is exact.
#[expect(clippy::cast_precision_loss, reason = "a plan holds at most 2^40 elements")]
pub(crate) fn to_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_is_the_identity_to_the_bit() {
        let mut some = Record { count: 7, nan_count: 1, mean_or_zero: -0.0, sum_abs: 0.3, ..Record::EMPTY };
        some.first_nonfinite_index = 4;
        assert_eq!(bytemuck::bytes_of(&Record::EMPTY.merge(&some)), bytemuck::bytes_of(&some));
        assert_eq!(bytemuck::bytes_of(&some.merge(&Record::EMPTY)), bytemuck::bytes_of(&some));
    }

    #[test]
    fn merge_places_the_first_nonfinite_behind_the_elements_before_it() {
        let clean = Record { count: 10, ..Record::EMPTY };
        let bad = Record { count: 5, inf_count: 1, first_nonfinite_index: 3, ..Record::EMPTY };
        assert_eq!(clean.merge(&bad).first_nonfinite(), Some(13));
        assert_eq!(bad.merge(&bad).first_nonfinite(), Some(3));
    }

    #[test]
    fn a_large_record_does_not_drown_a_small_one_before_it() {
        let one = Record { count: 1, mean_or_zero: 1.0, sum_abs: 1.0, ..Record::EMPTY };
        let zeros = Record { count: 1_000_000_000_000, zero_count: 1_000_000_000_000, ..Record::EMPTY };
        for merged in [one.merge(&zeros), zeros.merge(&one)] {
            assert!((merged.mean().unwrap() / 1e-12 - 1.0).abs() < 2e-12, "{merged:?}");
        }
    }

    #[test]
    fn nothing_finite_gives_none() {
        let nan = Record { count: 2, nan_count: 2, first_nonfinite_index: 0, ..Record::EMPTY };
        assert!(nan.l2_norm().is_nan());
        assert_eq!(nan.finite_l2_norm(), 0.0);
        assert_eq!((nan.max_abs(), nan.min_nonzero_abs(), nan.mean(), nan.variance()), (None, None, None, None));
        assert_eq!((nan.nan_fraction(), Record::EMPTY.zero_fraction()), (Some(1.0), None));
    }
}
