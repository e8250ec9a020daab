//! Rules that need one step alone, as plain data: host and device evaluate the same table by the same operations.
//!
//! **One tensor.** A tensor with a NaN or an Inf has the bits of `Nan` and `Inf` as critical and no other: a comparison
//! with NaN is false, so a norm that is NaN would pass every limit. A tensor without elements has the word 0. Otherwise
//! every rule on a statistic of a tensor adds its bit, and the bits of kinds that the tensor is exempt from are
//! cleared.
//!
//! **The step.** Its word is the union of its tensors' words. When no tensor has a NaN or an Inf and some tensor has an
//! element, the rules on statistics of the step add theirs.
//!
//! **A word.** Bit k (0 to 15) is a warning of the [`FindingKind`] number k, bit 16 + k says that it is critical. A
//! critical finding has the upper bit alone.
//!
//! **Same bits.** Statistics take +, ·, /, √, fma and comparisons in f64, each correctly rounded, in the order written
//! here; nothing depends on the order of the tensors.

use super::{FindingKind, Verdict};
use crate::Record;
use bytemuck::{Pod, Zeroable};

/// The statistic of a rule. The number of each is that in [`ThresholdRule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Statistic {
    /// L2 norm of a tensor, √[`Record::finite_sum_squares`].
    Norm = 0,
    /// Root mean square of a tensor: norm / √(finite elements). Unlike the norm it does not grow with the tensor.
    Rms = 1,
    /// Largest |x| of a tensor.
    MaxAbs = 2,
    /// Share of a tensor's finite elements that are 0.
    ZeroFraction = 3,
    /// Share of a tensor's finite elements below the dead threshold.
    DeadFraction = 4,
    /// Norm of a tensor over that of its weight. None where the weight's norm is unknown, 0 or not finite.
    Ratio = 5,
    /// Norm of a tensor over its norm in the last clean step, one that was finite and not skipped. None where that norm
    /// was 0, and in the first step.
    Change = 6,
    /// L2 norm of all tensors, [`finite_total_norm`](crate::StepOutputs::finite_total_norm).
    TotalNorm = 7,
    /// The total norm over that of the last clean step. None in the first step and after a norm of 0.
    TotalChange = 8,
    /// The largest norm of a tensor over the smallest that is not 0. Leaves out tensors exempt from
    /// [`FindingKind::Spread`]. None without a norm above 0.
    Spread = 9,
}

impl Statistic {
    /// Every one, in the order of their numbers.
    pub const ALL: [Statistic; 10] = [
        Self::Norm,
        Self::Rms,
        Self::MaxAbs,
        Self::ZeroFraction,
        Self::DeadFraction,
        Self::Ratio,
        Self::Change,
        Self::TotalNorm,
        Self::TotalChange,
        Self::Spread,
    ];

    /// The rule's name in findings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::Rms => "rms",
            Self::MaxAbs => "max_abs",
            Self::ZeroFraction => "zero_fraction",
            Self::DeadFraction => "dead_fraction",
            Self::Ratio => "ratio",
            Self::Change => "change",
            Self::TotalNorm => "total_norm",
            Self::TotalChange => "total_change",
            Self::Spread => "spread",
        }
    }

    /// Whether it is of all tensors together.
    pub const fn is_of_step(self) -> bool {
        matches!(self, Self::TotalNorm | Self::TotalChange | Self::Spread)
    }

    /// Gives the value for a finite tensor with elements. `param_norm` and `last_norm` are 0 where they are unknown.
    pub(crate) fn of_tensor(self, record: &Record, param_norm: f64, last_norm: f64) -> Option<f64> {
        let norm = record.finite_l2_norm();
        let count = count_to_f64(record.finite_count());
        let over = |divisor: f64| (divisor > 0.0 && divisor < f64::INFINITY).then(|| norm / divisor);
        match self {
            Self::Norm => Some(norm),
            Self::Rms => Some(norm / count.sqrt()),
            Self::MaxAbs => Some(f64::from(record.max_abs_or_zero)),
            Self::ZeroFraction => Some(count_to_f64(record.zero_count) / count),
            Self::DeadFraction => Some(count_to_f64(record.dead_count) / count),
            Self::Ratio => over(param_norm),
            Self::Change => over(last_norm),
            Self::TotalNorm | Self::TotalChange | Self::Spread => None,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "below 2^53")]
pub(super) fn count_to_f64(count: u64) -> f64 {
    count as f64
}

/// Puts limits on a statistic, with the kind of finding past them (32 bytes, the same on a device).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct ThresholdRule {
    pub(crate) statistic: u32,
    pub(crate) kind: u32,
    pub(crate) flags: u32,
    reserved: u32,
    /// Past this a value is a warning. Infinite for none.
    pub warning: f64,
    /// Past this a value is critical. Infinite for none.
    pub critical: f64,
}

// The other side of these numbers is in kernels/.
const _: () = {
    assert!(size_of::<ThresholdRule>() == 32);
    assert!(std::mem::offset_of!(ThresholdRule, kind) == 4);
    assert!(std::mem::offset_of!(ThresholdRule, flags) == 8);
    assert!(std::mem::offset_of!(ThresholdRule, warning) == 16);
    assert!(std::mem::offset_of!(ThresholdRule, critical) == 24);
};

impl ThresholdRule {
    /// Flag: values below the limits are bad. Without it, values above.
    pub const BELOW: u32 = 1;
    /// Flag: leaves out a tensor, or a step, whose norm is exactly 0.
    pub const NOT_ZERO: u32 = 2;

    /// Makes a rule against values above the limits. `critical` is not below `warning`, and infinity is no limit.
    pub const fn above(statistic: Statistic, kind: FindingKind, warning: f64, critical: f64) -> Self {
        Self { statistic: statistic as u32, kind: kind as u32, flags: 0, reserved: 0, warning, critical }
    }

    /// Makes a rule against values below the limits. `critical` is not above `warning`, and −infinity is no limit.
    pub const fn below(statistic: Statistic, kind: FindingKind, warning: f64, critical: f64) -> Self {
        let above = Self::above(statistic, kind, warning, critical);
        Self { flags: Self::BELOW, ..above }
    }

    /// Leaves out a norm that is exactly 0.
    #[must_use]
    pub const fn not_zero(self) -> Self {
        Self { flags: self.flags | Self::NOT_ZERO, ..self }
    }

    /// The statistic. `None` for an unknown number, which bytes from elsewhere may hold.
    pub fn statistic(&self) -> Option<Statistic> {
        Statistic::ALL.get(self.statistic as usize).copied()
    }

    /// The kind of finding. `None` as above.
    pub fn kind(&self) -> Option<FindingKind> {
        FindingKind::ALL.get(self.kind as usize).copied()
    }

    /// Whether values below the limits are bad.
    pub fn is_below(&self) -> bool {
        self.flags & Self::BELOW != 0
    }

    /// The bit of the health word that this value raises; 0 for none, and for a kind without a bit.
    pub fn bit(&self, value: f64) -> u32 {
        if self.kind >= u32::BITS / 2 {
            return 0;
        }
        let past = |limit: f64| if self.is_below() { value < limit } else { value > limit };
        if past(self.critical) {
            critical_bit(self.kind)
        } else if past(self.warning) {
            1 << (self.kind & 15)
        } else {
            0
        }
    }

    fn concerns(&self, norm: f64) -> bool {
        self.flags & Self::NOT_ZERO == 0 || norm > 0.0
    }

    /// Gives the value and its bit for a finite tensor with elements.
    pub(crate) fn of_tensor(&self, record: &Record, param_norm: f64, last_norm: f64) -> Option<(f64, u32)> {
        let value = self.statistic()?.of_tensor(record, param_norm, last_norm)?;
        self.concerns(record.finite_l2_norm()).then(|| (value, self.bit(value)))
    }

    /// Gives the value and its bit for a finite step with elements.
    pub(crate) fn of_step(&self, step: &StepNorms) -> Option<(f64, u32)> {
        let value = match self.statistic()? {
            Statistic::TotalNorm => step.total,
            Statistic::TotalChange if step.last_total > 0.0 => step.total / step.last_total,
            Statistic::Spread if step.largest > 0.0 => step.largest / step.smallest,
            _ => return None,
        };
        self.concerns(step.total).then(|| (value, self.bit(value)))
    }
}

fn critical_bit(kind: u32) -> u32 {
    1 << (16 + (kind & 15))
}

/// Gives the word of one tensor. `param_norm` is its weight's norm and `last_norm` its own in the last clean step, both
/// 0 where there is none; `exempt` has the bits k of the kinds that it is exempt from.
pub fn tensor_word(rules: &[ThresholdRule], record: &Record, param_norm: f64, last_norm: f64, exempt: u32) -> u32 {
    if record.has_nonfinite() {
        let bit = |count: u64, kind: FindingKind| if count > 0 { critical_bit(kind as u32) } else { 0 };
        return bit(record.nan_count, FindingKind::Nan) | bit(record.inf_count, FindingKind::Inf);
    }
    if record.count == 0 {
        return 0;
    }
    let bit = |rule: &ThresholdRule| rule.of_tensor(record, param_norm, last_norm).map_or(0, |(_, bit)| bit);
    let exempt = exempt & FindingKind::OF_WORDS;
    rules.iter().map(bit).fold(0, |word, bit| word | bit) & !(exempt | exempt << 16)
}

/// The norms that rules on a whole step use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepNorms {
    /// L2 norm of all tensors over the finite elements.
    pub total: f64,
    /// Total norm of the last clean step, 0 where there is none.
    pub last_total: f64,
    /// Largest norm of a tensor, 0 where none is above 0.
    pub largest: f64,
    /// Smallest norm of a tensor that is not 0; infinite where there is none.
    pub smallest: f64,
    /// Whether there is any element.
    pub has_elements: bool,
}

impl StepNorms {
    /// Starts before any tensor, in a step of this total norm, with that of the clean step before.
    pub fn new(total: f64, last_total: f64) -> Self {
        Self { total, last_total, largest: 0.0, smallest: f64::INFINITY, has_elements: false }
    }

    /// Adds a tensor. One that is not finite has no norm to compare.
    pub fn add(&mut self, record: &Record, exempt: u32) {
        self.has_elements |= record.count > 0;
        let norm = record.finite_l2_norm();
        if norm > 0.0 && !record.has_nonfinite() && exempt & (1 << FindingKind::Spread as u32) == 0 {
            self.largest = self.largest.max(norm);
            self.smallest = self.smallest.min(norm);
        }
    }
}

/// Gives the word of a step: the union of its tensors' words, and the rules on the whole step.
pub fn step_word(rules: &[ThresholdRule], tensors: u32, step: &StepNorms) -> u32 {
    if tensors & NONFINITE != 0 || !step.has_elements {
        return tensors;
    }
    let bit = |rule: &ThresholdRule| rule.of_step(step).map_or(0, |(_, bit)| bit);
    rules.iter().map(bit).fold(tensors, |word, bit| word | bit)
}

/// The bits of a word for elements that are not finite.
pub(crate) const NONFINITE: u32 = 1 << (16 + FindingKind::Nan as u32) | 1 << (16 + FindingKind::Inf as u32);

/// Gives the verdict of a word.
pub fn verdict_of(word: u32) -> Verdict {
    if word >> 16 != 0 {
        Verdict::Critical
    } else if word != 0 {
        Verdict::Warning
    } else {
        Verdict::Healthy
    }
}
