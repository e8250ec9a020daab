//! What must hold of a report: the bounds of the contract against the oracle, and equality of bits between devices.
//!
//! A checker returns complaints, each naming the tensor, the field and both values; none means that all is well. They
//! look at numbers through [`Seen`], so that a test can falsify any one of them and demand a complaint.

#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // Rounding to f32 and counts below 2^53.

use super::oracle::{self, Decision, Format, Truth};
use gradprobe::{Config, Record, StepOutputs};
use std::fmt::{Debug, LowerExp};

/// Promised relative error of `finite_l2_norm` and `mean_abs`, and of `mean` in units of `mean_abs`.
pub const SUM_BOUND: f64 = 5e-7;
/// Promised |variance| of a constant tensor in units of mean².
pub const CONSTANT_VARIANCE_BOUND: f64 = 1e-13;

/// Promised relative error of the variance of a tensor that is not constant.
pub fn variance_bound(mean: f64, variance: f64) -> f64 {
    1e-6 + 1e-7 * mean.abs() / variance.sqrt()
}

/// The statistics of one tensor as the accessors of [`Record`] give them.
#[derive(Clone, Debug)]
pub struct Seen {
    pub count: u64,
    pub nan_count: u64,
    pub inf_count: u64,
    pub zero_count: u64,
    pub dead_count: u64,
    pub finite_count: u64,
    pub first_nonfinite: Option<u64>,
    pub max_abs: Option<f32>,
    pub min_nonzero_abs: Option<f32>,
    pub finite_l2_norm: f64,
    pub l2_norm: f64,
    pub mean: Option<f64>,
    pub mean_abs: Option<f64>,
    pub variance: Option<f64>,
    pub sample_variance: Option<f64>,
    pub std: Option<f64>,
    pub rms: Option<f64>,
    pub zero_fraction: Option<f64>,
    pub dead_fraction: Option<f64>,
    pub nan_fraction: Option<f64>,
}

impl Seen {
    pub fn of(record: &Record) -> Seen {
        Seen {
            count: record.count,
            nan_count: record.nan_count,
            inf_count: record.inf_count,
            zero_count: record.zero_count,
            dead_count: record.dead_count,
            finite_count: record.finite_count(),
            first_nonfinite: record.first_nonfinite(),
            max_abs: record.max_abs(),
            min_nonzero_abs: record.min_nonzero_abs(),
            finite_l2_norm: record.finite_l2_norm(),
            l2_norm: record.l2_norm(),
            mean: record.mean(),
            mean_abs: record.mean_abs(),
            variance: record.variance(),
            sample_variance: record.variance_ddof(1),
            std: record.std(),
            rms: record.rms(),
            zero_fraction: record.zero_fraction(),
            dead_fraction: record.dead_fraction(),
            nan_fraction: record.nan_fraction(),
        }
    }
}

/// How far the statistics of one tensor are from the truth, each in the unit of its bound; NaN where there is nothing
/// to be wrong about, infinite where a number is missing or not finite.
#[derive(Clone, Copy, Debug)]
pub struct Errors {
    /// |error| / true norm.
    pub norm: f64,
    /// |error| / true mean_abs.
    pub mean_abs: f64,
    /// |error| / true mean_abs.
    pub mean: f64,
    /// |error| / true variance, of a tensor that is not constant.
    pub variance: f64,
    /// The same divided by its bound.
    pub variance_of_bound: f64,
    /// |variance| / mean² of a constant tensor.
    pub constant_variance: f64,
}

impl Errors {
    pub const NONE: Errors = Errors {
        norm: f64::NAN,
        mean_abs: f64::NAN,
        mean: f64::NAN,
        variance: f64::NAN,
        variance_of_bound: f64::NAN,
        constant_variance: f64::NAN,
    };

    pub fn of(seen: &Seen, truth: &Truth) -> Errors {
        let mut errors =
            Errors { norm: error(seen.finite_l2_norm, truth.finite_l2_norm, truth.finite_l2_norm), ..Self::NONE };
        let (Some(mean), Some(mean_abs), Some(variance)) = (truth.mean, truth.mean_abs, truth.variance) else {
            return errors;
        };
        let seen_or_nan = |value: Option<f64>| value.unwrap_or(f64::NAN);
        errors.mean_abs = error(seen_or_nan(seen.mean_abs), mean_abs, mean_abs);
        errors.mean = error(seen_or_nan(seen.mean), mean, mean_abs);
        let seen_variance = seen_or_nan(seen.variance);
        if variance == 0.0 {
            errors.constant_variance = error(seen_variance, 0.0, mean * mean);
        } else {
            errors.variance = error(seen_variance, variance, variance);
            errors.variance_of_bound = errors.variance / variance_bound(mean, variance);
        }
        errors
    }

    /// The larger of each.
    #[must_use]
    pub fn worst(&self, other: &Errors) -> Errors {
        // `f64::max` prefers a number to NaN, which here means that there was nothing to compare.
        Errors {
            norm: self.norm.max(other.norm),
            mean_abs: self.mean_abs.max(other.mean_abs),
            mean: self.mean.max(other.mean),
            variance: self.variance.max(other.variance),
            variance_of_bound: self.variance_of_bound.max(other.variance_of_bound),
            constant_variance: self.constant_variance.max(other.constant_variance),
        }
    }
}

/// |seen − true| in units of `unit`: 0 when equal, infinite when seen is NaN or the unit is 0.
pub fn error(seen: f64, truth: f64, unit: f64) -> f64 {
    let difference = (seen - truth).abs();
    if difference == 0.0 {
        0.0
    } else if difference.is_nan() || unit == 0.0 {
        f64::INFINITY
    } else {
        difference / unit
    }
}

/// Collects complaints about one thing.
pub struct Complaints {
    about: String,
    pub list: Vec<String>,
}

impl Complaints {
    pub fn new(about: impl Into<String>) -> Self {
        Self { about: about.into(), list: Vec::new() }
    }

    pub fn add(&mut self, what: &str) {
        self.list.push(format!("{}: {what}", self.about));
    }

    pub fn equal<T: PartialEq + Debug>(&mut self, field: &str, seen: T, expected: T) {
        if seen != expected {
            self.add(&format!("{field} is {seen:?}, should be {expected:?}"));
        }
    }

    /// Equal as bits, so that −0 is not 0 and a NaN is itself.
    pub fn same_f64(&mut self, field: &str, seen: f64, expected: f64) {
        self.same_bits(field, (seen, seen.to_bits()), (expected, expected.to_bits()));
    }

    /// See [`same_f64`](Self::same_f64).
    fn same_f32(&mut self, field: &str, seen: f32, expected: f32) {
        self.same_bits(field, (seen, seen.to_bits().into()), (expected, expected.to_bits().into()));
    }

    fn same_bits<T: LowerExp>(&mut self, field: &str, seen: (T, u64), expected: (T, u64)) {
        if seen.1 != expected.1 {
            let (seen, seen_bits) = seen;
            let (expected, expected_bits) = expected;
            self.add(&format!("{field} is {seen:e} ({seen_bits:#x}), should be {expected:e} ({expected_bits:#x})"));
        }
    }

    fn same_option(&mut self, field: &str, seen: Option<f64>, expected: Option<f64>) {
        match (seen, expected) {
            (Some(seen), Some(expected)) => self.same_f64(field, seen, expected),
            _ => self.equal(field, seen, expected),
        }
    }

    /// `error` is at most `bound`; a NaN error is none at all.
    pub fn bounded(&mut self, field: &str, error: f64, bound: f64, seen: impl Debug, truth: impl Debug) {
        if error > bound {
            self.add(&format!("{field} is {seen:?}, should be {truth:?}: error {error:.3e}, bound {bound:.3e}"));
        }
    }
}

/// The statistics of one tensor against the exact ones.
pub fn check_tensor(name: &str, seen: &Seen, truth: &Truth) -> Vec<String> {
    let mut complaints = Complaints::new(name);
    let c = &mut complaints;
    c.equal("count", seen.count, truth.count);
    c.equal("nan_count", seen.nan_count, truth.nan_count);
    c.equal("inf_count", seen.inf_count, truth.inf_count);
    c.equal("zero_count", seen.zero_count, truth.zero_count);
    c.equal("dead_count", seen.dead_count, truth.dead_count);
    c.equal("finite_count", seen.finite_count, truth.finite_count());
    c.equal("first_nonfinite", seen.first_nonfinite, truth.first_nonfinite);
    c.same_option("max_abs", seen.max_abs.map(f64::from), truth.max_abs.map(f64::from));
    c.same_option("min_nonzero_abs", seen.min_nonzero_abs.map(f64::from), truth.min_nonzero_abs.map(f64::from));

    for (field, seen, truth) in [
        ("mean", seen.mean, truth.mean),
        ("mean_abs", seen.mean_abs, truth.mean_abs),
        ("variance", seen.variance, truth.variance),
    ] {
        c.equal(&format!("whether there is a {field}"), seen.is_some(), truth.is_some());
    }
    let errors = Errors::of(seen, truth);
    c.bounded("finite_l2_norm", errors.norm, SUM_BOUND, seen.finite_l2_norm, truth.finite_l2_norm);
    c.bounded("mean_abs", errors.mean_abs, SUM_BOUND, seen.mean_abs, truth.mean_abs);
    c.bounded("mean", errors.mean, SUM_BOUND, seen.mean, truth.mean);
    c.bounded("variance", errors.variance_of_bound, 1.0, seen.variance, truth.variance);
    c.bounded("variance", errors.constant_variance, CONSTANT_VARIANCE_BOUND, seen.variance, truth.variance);
    if seen.variance.is_some_and(|v| v < 0.0) {
        c.add(&format!("variance is negative: {:?}", seen.variance));
    }
    if seen.finite_l2_norm.is_sign_negative() {
        c.add(&format!("finite_l2_norm is negative: {:?}", seen.finite_l2_norm));
    }

    // What is derived from the numbers above, up to a few roundings.
    let m = truth.finite_count() as f64;
    let near = |seen: Option<f64>, expected: Option<f64>| match (seen, expected) {
        (Some(a), Some(b)) => (a - b).abs() <= 4.0 * f64::EPSILON * b.abs(),
        (a, b) => a == b,
    };
    let sample = seen.variance.filter(|_| m > 1.0).map(|v| v * m / (m - 1.0));
    let fraction = |part: u64| (truth.count > 0).then(|| part as f64 / truth.count as f64);
    for (field, seen, expected) in [
        ("variance_ddof(1)", seen.sample_variance, sample),
        ("std", seen.std, seen.variance.map(f64::sqrt)),
        ("rms", seen.rms, (m > 0.0).then(|| seen.finite_l2_norm / m.sqrt())),
        ("zero_fraction", seen.zero_fraction, fraction(truth.zero_count)),
        ("dead_fraction", seen.dead_fraction, fraction(truth.dead_count)),
        ("nan_fraction", seen.nan_fraction, fraction(truth.nan_count)),
    ] {
        if !near(seen, expected) {
            c.add(&format!("{field} is {seen:?}, should be {expected:?}"));
        }
    }
    c.same_f64("l2_norm", seen.l2_norm, oracle::propagate(truth.nan_count, truth.inf_count, seen.finite_l2_norm));
    complaints.list
}

/// The fields that hold a value also where the accessors give none, as their documentation says.
pub fn check_fields(name: &str, record: &Record, truth: &Truth) -> Vec<String> {
    let mut complaints = Complaints::new(name);
    let c = &mut complaints;
    c.equal("first_nonfinite_index", record.first_nonfinite_index, truth.first_nonfinite.unwrap_or(u64::MAX));
    c.same_f32("max_abs_or_zero", record.max_abs_or_zero, truth.max_abs.unwrap_or(0.0));
    let least = truth.min_nonzero_abs.unwrap_or(f32::INFINITY);
    c.same_f32("min_nonzero_abs_or_infinity", record.min_nonzero_abs_or_infinity, least);
    if truth.finite_count() == 0 {
        c.same_f64("mean_or_zero", record.mean_or_zero, 0.0);
        c.same_f64("sum_squared_deviations", record.sum_squared_deviations, 0.0);
        c.same_f64("sum_abs", record.sum_abs, 0.0);
    }
    complaints.list
}

/// The step's scalars against the exact norm and against each other.
pub fn check_outputs(outputs: &StepOutputs, step: u64, truths: &[Truth], config: &Config) -> Vec<String> {
    let mut complaints = Complaints::new("step");
    let c = &mut complaints;
    let nan_count = truths.iter().map(|t| t.nan_count).sum();
    let inf_count = truths.iter().map(|t| t.inf_count).sum();
    c.equal("step", outputs.step, step);
    c.equal("nan_count", outputs.nan_count, nan_count);
    c.equal("inf_count", outputs.inf_count, inf_count);
    let (seen, truth) = (outputs.finite_total_norm, oracle::finite_total_norm(truths) / oracle::loss_scale(config));
    c.bounded("finite_total_norm", error(seen, truth, truth), SUM_BOUND, seen, truth);

    let f32_of = |value: f64| Format::F32.value(Format::F32.encode(value)) as f32;
    let Decision { total_norm, coefficient, found, skip, zero_nonfinite, clipped } =
        oracle::decide(config, nan_count, inf_count, seen);
    c.same_f64("total_norm", outputs.total_norm, total_norm);
    c.same_f32("total_norm_f32", outputs.total_norm_f32, f32_of(total_norm));
    c.same_f64("coefficient_f64", outputs.coefficient_f64, coefficient);
    let scale = oracle::loss_scale(config);
    let (multiplier, divisor) = if skip { (1.0, 1.0) } else { (coefficient / scale, scale / coefficient) };
    c.same_f32("coefficient", outputs.coefficient, f32_of(multiplier));
    c.same_f32("inverse_coefficient", outputs.inverse_coefficient, f32_of(divisor));
    c.same_f32("found_inf", outputs.found_inf, f32::from(found));
    c.equal("skip", outputs.skip, i32::from(skip));
    let scales = f32_of(multiplier) != 1.0;
    let action = [(zero_nonfinite, StepOutputs::ACTION_ZERO_NONFINITE), (scales, StepOutputs::ACTION_SCALE)];
    let action = action.into_iter().filter(|(holds, _)| *holds).fold(0, |bits, (_, bit)| bits | bit);
    c.equal("action", outputs.action, action);
    let flags = [
        (nan_count > 0, StepOutputs::FLAG_NAN),
        (inf_count > 0, StepOutputs::FLAG_INF),
        (clipped, StepOutputs::FLAG_CLIPPED),
        (skip, StepOutputs::FLAG_SKIP),
    ];
    let flags = flags.into_iter().filter(|(holds, _)| *holds).fold(0, |bits, (_, bit)| bits | bit);
    c.equal("flags", outputs.flags, flags);
    c.equal("weights", outputs.weights, 0);
    c.same_f32("loss_scale", outputs.loss_scale, scale as f32);
    // Under the rules that the table has.
    c.same_f32("next_loss_scale", outputs.next_loss_scale, scale as f32);
    c.equal("health, and what is reserved", (outputs.health, outputs.reserved), (0, 0));
    complaints.list
}

/// A whole step against the exact one.
pub fn check_step(
    names: &[String],
    records: &[Record],
    outputs: &StepOutputs,
    step: u64,
    truths: &[Truth],
    config: &Config,
) -> Vec<String> {
    let mut complaints = check_outputs(outputs, step, truths, config);
    if records.len() != truths.len() {
        complaints.push(format!("{} records for {} tensors", records.len(), truths.len()));
    }
    for ((name, record), truth) in names.iter().zip(records).zip(truths) {
        complaints.extend(check_tensor(name, &Seen::of(record), truth));
        complaints.extend(check_fields(name, record, truth));
    }
    complaints
}

/// Two records byte by byte.
pub fn same_record(name: &str, seen: &Record, expected: &Record) -> Vec<String> {
    let mut complaints = Complaints::new(name);
    let c = &mut complaints;
    c.equal("count", seen.count, expected.count);
    c.equal("nan_count", seen.nan_count, expected.nan_count);
    c.equal("inf_count", seen.inf_count, expected.inf_count);
    c.equal("zero_count", seen.zero_count, expected.zero_count);
    c.equal("dead_count", seen.dead_count, expected.dead_count);
    c.equal("first_nonfinite_index", seen.first_nonfinite_index, expected.first_nonfinite_index);
    c.same_f64("mean_or_zero", seen.mean_or_zero, expected.mean_or_zero);
    c.same_f64("sum_squared_deviations", seen.sum_squared_deviations, expected.sum_squared_deviations);
    c.same_f64("sum_abs", seen.sum_abs, expected.sum_abs);
    c.same_f32("max_abs_or_zero", seen.max_abs_or_zero, expected.max_abs_or_zero);
    c.same_f32("min_nonzero_abs_or_infinity", seen.min_nonzero_abs_or_infinity, expected.min_nonzero_abs_or_infinity);
    same_bytes(c, seen, expected);
    complaints.list
}

/// The scalars of two steps byte by byte.
pub fn same_outputs(seen: &StepOutputs, expected: &StepOutputs) -> Vec<String> {
    let mut complaints = Complaints::new("step");
    let c = &mut complaints;
    c.same_f64("total_norm", seen.total_norm, expected.total_norm);
    c.same_f64("finite_total_norm", seen.finite_total_norm, expected.finite_total_norm);
    c.same_f64("coefficient_f64", seen.coefficient_f64, expected.coefficient_f64);
    c.same_f32("total_norm_f32", seen.total_norm_f32, expected.total_norm_f32);
    c.same_f32("coefficient", seen.coefficient, expected.coefficient);
    c.same_f32("inverse_coefficient", seen.inverse_coefficient, expected.inverse_coefficient);
    c.same_f32("found_inf", seen.found_inf, expected.found_inf);
    c.equal("skip", seen.skip, expected.skip);
    c.equal("action", seen.action, expected.action);
    c.equal("flags", seen.flags, expected.flags);
    c.equal("step", seen.step, expected.step);
    c.equal("nan_count", seen.nan_count, expected.nan_count);
    c.equal("inf_count", seen.inf_count, expected.inf_count);
    same_bytes(c, seen, expected);
    complaints.list
}

/// Catches the byte that no named field accounts for.
pub fn same_bytes<T: bytemuck::Pod>(complaints: &mut Complaints, seen: &T, expected: &T) {
    let (seen, expected) = (bytemuck::bytes_of(seen), bytemuck::bytes_of(expected));
    if complaints.list.is_empty()
        && let Some(at) = seen.iter().zip(expected).position(|(a, b)| a != b)
    {
        complaints.add(&format!("byte {at} is {:#04x}, should be {:#04x}", seen[at], expected[at]));
    }
}

/// Two whole steps byte by byte.
pub fn same_step(
    names: &[String],
    seen: (&[Record], &StepOutputs),
    expected: (&[Record], &StepOutputs),
) -> Vec<String> {
    let mut complaints = same_outputs(seen.1, expected.1);
    if seen.0.len() != expected.0.len() {
        complaints.push(format!("{} records, should be {}", seen.0.len(), expected.0.len()));
    }
    for ((name, seen), expected) in names.iter().zip(seen.0).zip(expected.0) {
        complaints.extend(same_record(name, seen, expected));
    }
    complaints
}

/// The elements of two tensors bit by bit, `size` bytes each.
pub fn same_elements(name: &str, size: usize, seen: &[u8], expected: &[u8]) -> Vec<String> {
    if seen.len() != expected.len() {
        return vec![format!("{name}: {} bytes, should be {}", seen.len(), expected.len())];
    }
    if seen == expected {
        return Vec::new();
    }
    let pattern = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte));
    let wrong: Vec<_> = seen.chunks(size).zip(expected.chunks(size)).enumerate().filter(|(_, (a, b))| a != b).collect();
    let (index, (a, b)) = wrong[0];
    let (a, b, width) = (pattern(a), pattern(b), 2 + 2 * size);
    vec![format!("{name}: element {index} is {a:#0width$x}, should be {b:#0width$x}; {} differ", wrong.len())]
}

/// All copies of `pod` with one bit flipped.
pub fn flipped<T: bytemuck::Pod>(pod: T) -> impl Iterator<Item = (usize, T)> {
    (0..8 * size_of::<T>()).map(move |bit| {
        let mut copy = pod;
        bytemuck::bytes_of_mut(&mut copy)[bit / 8] ^= 1 << (bit % 8);
        (bit, copy)
    })
}
