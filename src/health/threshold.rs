//! Rules that one step decides by itself, as plain data: the same table is evaluated on the host and, by the same
//! operations, on a device.
//!
//! **One tensor.** A tensor with a NaN or an Inf has the bits of `Nan` and `Inf` as critical and no other: a comparison
//! with NaN is false, so a norm that is NaN would pass every limit. A tensor without elements has the word 0. Otherwise
//! every rule on a statistic of a tensor adds its bit, and the bits of kinds that the tensor is exempt from are cleared.
//!
//! **The step.** Its word is the union of its tensors' words and, when no tensor has a NaN or an Inf and some tensor has
//! an element, of the rules on statistics of the step.
//!
//! **A word.** Bit k (0 to 15) is a warning of the [`FindingKind`] number k, bit 16 + k says that it is critical. A
//! critical finding has the upper bit alone.
//!
//! **Same bits.** Statistics take +, ·, /, √, fma and comparisons in f64, each correctly rounded, in the order written
//! here; nothing depends on the order of the tensors.

use super::{FindingKind, Verdict};
use crate::Record;
use bytemuck::{Pod, Zeroable};

/// What a rule looks at. The number of each is that in [`ThresholdRule`].
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
    /// Norm of a tensor over that of its weight. Of no tensor whose weight's norm is unknown, 0 or not finite.
    Ratio = 5,
    /// Norm of a tensor over its norm in the last clean step: one that was finite and not skipped. Of no tensor whose
    /// norm was 0 there, and not in the first step.
    Change = 6,
    /// L2 norm of all tensors, [`finite_total_norm`](crate::StepOutputs::finite_total_norm).
    TotalNorm = 7,
    /// The total norm over that of the last clean step. Not in the first step and not after a norm of 0.
    TotalChange = 8,
    /// The largest norm of a tensor over the smallest that is not 0. Tensors exempt from [`FindingKind::Spread`] are
    /// left out, and there is none without a norm above 0.
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

    /// The name rules have in findings.
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

    /// Of a finite tensor with elements. `param_norm` and `last_norm` are 0 where they are not known.
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

/// One statistic, what passing its limits means, and the limits (32 bytes, the same on a device).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct ThresholdRule {
    pub(crate) statistic: u32,
    pub(crate) kind: u32,
    pub(crate) flags: u32,
    reserved: u32,
    /// Past this it is a warning. Infinite where there is none.
    pub warning: f64,
    /// Past this it is critical. Infinite where there is none.
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
    /// Flag: does not concern a tensor, or a step, whose norm is exactly 0.
    pub const NOT_ZERO: u32 = 2;

    /// Values above the limits are bad; `critical` is not below `warning`, and infinity is no limit.
    pub const fn above(statistic: Statistic, kind: FindingKind, warning: f64, critical: f64) -> Self {
        Self { statistic: statistic as u32, kind: kind as u32, flags: 0, reserved: 0, warning, critical }
    }

    /// Values below the limits are bad; `critical` is not above `warning`, and −infinity is no limit.
    pub const fn below(statistic: Statistic, kind: FindingKind, warning: f64, critical: f64) -> Self {
        let above = Self::above(statistic, kind, warning, critical);
        Self { flags: Self::BELOW, ..above }
    }

    /// The same, but not of a norm that is exactly 0.
    #[must_use]
    pub const fn not_zero(self) -> Self {
        Self { flags: self.flags | Self::NOT_ZERO, ..self }
    }

    /// What it looks at. `None` for a number that is none, which bytes from elsewhere may hold.
    pub fn statistic(&self) -> Option<Statistic> {
        Statistic::ALL.get(self.statistic as usize).copied()
    }

    /// What passing it means. `None` as above.
    pub fn kind(&self) -> Option<FindingKind> {
        FindingKind::ALL.get(self.kind as usize).copied()
    }

    /// Whether values below the limits are bad.
    pub fn is_below(&self) -> bool {
        self.flags & Self::BELOW != 0
    }

    /// The bit of the health word that this value raises; 0 for none, and of a kind that has no bit.
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

    /// What it says of a finite tensor with elements: the value and its bit.
    pub(crate) fn of_tensor(&self, record: &Record, param_norm: f64, last_norm: f64) -> Option<(f64, u32)> {
        let value = self.statistic()?.of_tensor(record, param_norm, last_norm)?;
        self.concerns(record.finite_l2_norm()).then(|| (value, self.bit(value)))
    }

    /// What it says of a finite step with elements: the value and its bit.
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

/// The word of one tensor. `param_norm` is its weight's norm and `last_norm` its own in the last clean step, both 0
/// where there is none; `exempt` has the bits k of the kinds that do not concern it.
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

/// What the rules on a whole step look at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepNorms {
    /// L2 norm of all tensors over the finite elements.
    pub total: f64,
    /// That of the last clean step, 0 where there is none.
    pub last_total: f64,
    /// Largest norm of a tensor, 0 where none is above 0.
    pub largest: f64,
    /// Smallest norm of a tensor that is not 0; infinite where there is none.
    pub smallest: f64,
    /// Whether there is an element at all.
    pub has_elements: bool,
}

impl StepNorms {
    /// Before any tensor, in a step of this total norm and with this one the clean step before.
    pub fn new(total: f64, last_total: f64) -> Self {
        Self { total, last_total, largest: 0.0, smallest: f64::INFINITY, has_elements: false }
    }

    /// Takes a tensor in. One that is not finite has no norm to compare.
    pub fn add(&mut self, record: &Record, exempt: u32) {
        self.has_elements |= record.count > 0;
        let norm = record.finite_l2_norm();
        if norm > 0.0 && !record.has_nonfinite() && exempt & (1 << FindingKind::Spread as u32) == 0 {
            self.largest = self.largest.max(norm);
            self.smallest = self.smallest.min(norm);
        }
    }
}

/// The word of a step: of its tensors' words, united, and of the rules on the whole of it.
pub fn step_word(rules: &[ThresholdRule], tensors: u32, step: &StepNorms) -> u32 {
    if tensors & NONFINITE != 0 || !step.has_elements {
        return tensors;
    }
    let bit = |rule: &ThresholdRule| rule.of_step(step).map_or(0, |(_, bit)| bit);
    rules.iter().map(bit).fold(tensors, |word, bit| word | bit)
}

/// The bits of a word that say that something is not finite.
pub(crate) const NONFINITE: u32 = 1 << (16 + FindingKind::Nan as u32) | 1 << (16 + FindingKind::Inf as u32);

/// The verdict that a word makes.
pub fn verdict_of(word: u32) -> Verdict {
    if word >> 16 != 0 {
        Verdict::Critical
    } else if word != 0 {
        Verdict::Warning
    } else {
        Verdict::Healthy
    }
}
