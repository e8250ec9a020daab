//! What every number should be, worked out another way: in exact integer arithmetic, from the definitions alone.
//!
//! Nothing here calls the library's arithmetic. An element is taken apart into sign, integer and exponent as its
//! format defines it; integers of one exponent are added in one bucket, and the buckets make one wide integer. So Σx,
//! Σ|x| and Σx² are exact, and n·Σx² − (Σx)² cannot cancel; the only roundings are those of the last step to f64.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // Exact by range.

use gradprobe::{Clip, Config, DType, NonFinitePolicy};
use std::cmp::Ordering;

/// A binary floating-point format of IEEE 754's shape.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    exponent_bits: u32,
    fraction_bits: u32,
}

/// An element taken apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    Nan,
    Infinite {
        negative: bool,
    },
    /// ±integer · 2^exponent.
    Finite {
        negative: bool,
        integer: u32,
        exponent: i32,
    },
}

impl Format {
    pub const F32: Format = Format { exponent_bits: 8, fraction_bits: 23 };
    pub const F16: Format = Format { exponent_bits: 5, fraction_bits: 10 };
    pub const BF16: Format = Format { exponent_bits: 8, fraction_bits: 7 };

    pub const fn of(dtype: DType) -> Format {
        match dtype {
            DType::F32 => Format::F32,
            DType::F16 => Format::F16,
            DType::BF16 => Format::BF16,
        }
    }

    /// Bits of +Inf.
    pub const fn infinity(self) -> u32 {
        ((1 << self.exponent_bits) - 1) << self.fraction_bits
    }

    /// Bits of the quiet NaN with no payload and no sign.
    pub const fn nan(self) -> u32 {
        self.infinity() | 1 << (self.fraction_bits - 1)
    }

    /// The sign bit.
    pub const fn sign(self) -> u32 {
        1 << (self.exponent_bits + self.fraction_bits)
    }

    /// Exponent of the smallest normal number.
    const fn lowest_exponent(self) -> i32 {
        2 - (1 << (self.exponent_bits - 1))
    }

    pub fn decode(self, bits: u32) -> Number {
        let negative = bits & self.sign() != 0;
        let magnitude = bits & (self.sign() - 1);
        match magnitude.cmp(&self.infinity()) {
            Ordering::Greater => return Number::Nan,
            Ordering::Equal => return Number::Infinite { negative },
            Ordering::Less => {}
        }
        let exponent_field = magnitude >> self.fraction_bits;
        let fraction = magnitude & ((1 << self.fraction_bits) - 1);
        let hidden = if exponent_field == 0 { 0 } else { 1 << self.fraction_bits };
        let above_lowest = exponent_field.saturating_sub(1) as i32;
        let exponent = self.lowest_exponent() - self.fraction_bits as i32 + above_lowest;
        Number::Finite { negative, integer: fraction | hidden, exponent }
    }

    /// Bits of the nearest number of this format, ties to even; any NaN becomes [`Format::nan`].
    pub fn encode(self, value: f64) -> u32 {
        if value.is_nan() {
            return self.nan();
        }
        let sign = if value.is_sign_negative() { self.sign() } else { 0 };
        let magnitude = value.abs();
        if magnitude == f64::INFINITY {
            return sign | self.infinity();
        }
        let own_exponent = (magnitude.to_bits() >> 52) as i32 - 1023;
        let exponent = own_exponent.max(self.lowest_exponent());
        // In units of the last place the number is an integer once rounded; a carry into the next exponent, and from
        // the last exponent into Inf, is the same carry in the bit pattern.
        let units = (magnitude / power_of_two(exponent - self.fraction_bits as i32)).round_ties_even() as u64;
        let base = ((exponent - self.lowest_exponent()) as u64) << self.fraction_bits;
        sign | (base + units).min(u64::from(self.infinity())) as u32
    }

    /// The exact value; a NaN has no payload.
    pub fn value(self, bits: u32) -> f64 {
        match self.decode(bits) {
            Number::Nan => f64::NAN,
            Number::Infinite { negative } => signed(negative, f64::INFINITY),
            Number::Finite { negative, integer, exponent } => {
                signed(negative, f64::from(integer) * power_of_two(exponent))
            }
        }
    }
}

fn signed(negative: bool, magnitude: f64) -> f64 {
    if negative { -magnitude } else { magnitude }
}

/// 2^exponent, a normal f64.
pub fn power_of_two(exponent: i32) -> f64 {
    assert!((-1022..=1023).contains(&exponent), "2^{exponent} is not a normal f64");
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

const LIMBS: usize = 12;

/// A non-negative integer below 2^768. Passing that is a panic, not a wrong number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wide([u64; LIMBS]);

impl Wide {
    pub const ZERO: Wide = Wide([0; LIMBS]);

    /// `value` · 2^`shift`.
    pub fn shifted(value: u128, shift: u32) -> Wide {
        let (limb, bit) = ((shift / 64) as usize, shift % 64);
        let low = value << bit;
        let high = if bit == 0 { 0 } else { value >> (128 - bit) };
        let mut wide = Wide::ZERO;
        for (place, part) in [low as u64, (low >> 64) as u64, high as u64].into_iter().enumerate() {
            match wide.0.get_mut(limb + place) {
                Some(slot) => *slot = part,
                None => assert_eq!(part, 0, "2^768 is passed"),
            }
        }
        wide
    }

    #[must_use]
    pub fn plus(mut self, other: &Wide) -> Wide {
        let mut carry = false;
        for (a, b) in self.0.iter_mut().zip(other.0) {
            let (sum, first) = a.overflowing_add(b);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            (*a, carry) = (sum, first | second);
        }
        assert!(!carry, "2^768 is passed");
        self
    }

    /// `self` − `other`, which must not be larger.
    #[must_use]
    pub fn minus(mut self, other: &Wide) -> Wide {
        let mut borrow = false;
        for (a, b) in self.0.iter_mut().zip(other.0) {
            let (rest, first) = a.overflowing_sub(b);
            let (rest, second) = rest.overflowing_sub(u64::from(borrow));
            (*a, borrow) = (rest, first | second);
        }
        assert!(!borrow, "a difference below zero");
        self
    }

    #[must_use]
    pub fn times(&self, other: &Wide) -> Wide {
        let mut product = Wide::ZERO;
        for (i, &a) in self.0.iter().enumerate().filter(|&(_, &a)| a != 0) {
            let mut carry = 0u128;
            for (j, &b) in other.0.iter().enumerate() {
                let Some(slot) = product.0.get_mut(i + j) else {
                    assert!(b == 0 && carry == 0, "2^768 is passed");
                    continue;
                };
                let sum = u128::from(a) * u128::from(b) + u128::from(*slot) + carry;
                (*slot, carry) = (sum as u64, sum >> 64);
            }
            assert_eq!(carry, 0, "2^768 is passed");
        }
        product
    }

    pub fn is_zero(&self) -> bool {
        *self == Wide::ZERO
    }

    /// The nearest f64, ties to even.
    pub fn to_f64(self) -> f64 {
        let Some(top) = self.0.iter().rposition(|&limb| limb != 0) else { return 0.0 };
        if top == 0 {
            return self.0[0] as f64;
        }
        // The upper 64 significant bits, with a bit set below them if anything non-zero was cut off: 64 bits are
        // enough more than 53 for that bit to decide ties and nothing else.
        let gap = self.0[top].leading_zeros();
        let pair = (u128::from(self.0[top]) << 64 | u128::from(self.0[top - 1])) << gap;
        let cut_off = pair as u64 != 0 || self.0[..top - 1].iter().any(|&limb| limb != 0);
        let head = (pair >> 64) as u64 | u64::from(cut_off);
        head as f64 * power_of_two(64 * top as i32 - gap as i32)
    }
}

impl PartialOrd for Wide {
    fn partial_cmp(&self, other: &Wide) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Wide {
    fn cmp(&self, other: &Wide) -> Ordering {
        self.0.iter().rev().cmp(other.0.iter().rev())
    }
}

/// Exponent of the unit in which sums are held: that of the smallest f32.
const UNIT: i32 = -149;
/// Exponents from [`UNIT`] to 120, that of the largest bf16: 8 bits below 2^128.
const BUCKETS: usize = 270;

/// Statistics of a growing run of elements, exact.
#[derive(Clone)]
pub struct Exact {
    format: Format,
    dead_threshold: f64,
    count: u64,
    nan_count: u64,
    inf_count: u64,
    zero_count: u64,
    dead_count: u64,
    first_nonfinite: Option<u64>,
    max_bits: Option<u32>,
    min_nonzero_bits: Option<u32>,
    /// Sums of the integers of positive and of negative elements, by exponent: below 2^24 · 2^33 elements.
    positive: Box<[u64; BUCKETS]>,
    negative: Box<[u64; BUCKETS]>,
    /// Sums of their squares.
    squares: Box<[u128; BUCKETS]>,
}

/// What the statistics of one tensor are.
#[derive(Clone, Debug)]
pub struct Truth {
    pub count: u64,
    pub nan_count: u64,
    pub inf_count: u64,
    pub zero_count: u64,
    pub dead_count: u64,
    pub first_nonfinite: Option<u64>,
    pub max_abs: Option<f32>,
    pub min_nonzero_abs: Option<f32>,
    pub finite_l2_norm: f64,
    pub mean: Option<f64>,
    pub mean_abs: Option<f64>,
    /// ddof 0. Exactly 0 if and only if all finite elements are equal.
    pub variance: Option<f64>,
    /// Σx² in units of 2^-298, for the sum over tensors; of the elements as they are, whatever the loss scale.
    pub sum_squares: Wide,
}

impl Truth {
    pub fn finite_count(&self) -> u64 {
        self.count - self.nan_count - self.inf_count
    }
}

impl Exact {
    pub fn new(dtype: DType, dead_threshold: f32) -> Exact {
        Exact {
            format: Format::of(dtype),
            dead_threshold: f64::from(dead_threshold),
            count: 0,
            nan_count: 0,
            inf_count: 0,
            zero_count: 0,
            dead_count: 0,
            first_nonfinite: None,
            max_bits: None,
            min_nonzero_bits: None,
            positive: Box::new([0; BUCKETS]),
            negative: Box::new([0; BUCKETS]),
            squares: Box::new([0; BUCKETS]),
        }
    }

    /// Appends the element with these bits.
    pub fn push(&mut self, bits: u32) {
        self.push_run(bits, 1);
    }

    /// Appends `length` equal elements.
    pub fn push_run(&mut self, bits: u32, length: u64) {
        if length == 0 {
            return;
        }
        let number = self.format.decode(bits);
        if !matches!(number, Number::Finite { .. }) && self.first_nonfinite.is_none() {
            self.first_nonfinite = Some(self.count);
        }
        self.count += length;
        assert!(self.count <= 1 << 33, "the buckets hold 2^33 elements");
        match number {
            Number::Nan => self.nan_count += length,
            Number::Infinite { .. } => self.inf_count += length,
            Number::Finite { negative, integer, exponent } => {
                let magnitude = bits & !self.format.sign();
                self.max_bits = Some(self.max_bits.map_or(magnitude, |max| max.max(magnitude)));
                if integer == 0 {
                    self.zero_count += length;
                } else {
                    self.min_nonzero_bits = Some(self.min_nonzero_bits.map_or(magnitude, |min| min.min(magnitude)));
                }
                if f64::from(integer) * power_of_two(exponent) < self.dead_threshold {
                    self.dead_count += length;
                }
                let bucket = (exponent - UNIT) as usize;
                let side = if negative { &mut self.negative } else { &mut self.positive };
                side[bucket] += u64::from(integer) * length;
                self.squares[bucket] += u128::from(integer) * u128::from(integer) * u128::from(length);
            }
        }
    }

    pub fn truth(&self) -> Truth {
        let total = |buckets: &[u64; BUCKETS]| {
            (0u32..).zip(buckets).fold(Wide::ZERO, |sum, (b, &n)| sum.plus(&Wide::shifted(n.into(), b)))
        };
        let (positive, negative) = (total(&self.positive), total(&self.negative));
        let sum_squares =
            (0u32..).zip(&*self.squares).fold(Wide::ZERO, |sum, (b, &n)| sum.plus(&Wide::shifted(n, 2 * b)));
        let below_zero = negative > positive;
        let sum = if below_zero { negative.minus(&positive) } else { positive.minus(&negative) };
        let finite = self.count - self.nan_count - self.inf_count;
        // n²·variance, with no rounding: never negative, by Cauchy and Schwarz.
        let spread = sum_squares.times(&Wide::shifted(finite.into(), 0)).minus(&sum.times(&sum));
        let (unit, m) = (power_of_two(UNIT), finite as f64);
        let of_finite = |value: f64| (finite > 0).then_some(value);
        let magnitude = |bits: u32| self.format.value(bits) as f32;
        Truth {
            count: self.count,
            nan_count: self.nan_count,
            inf_count: self.inf_count,
            zero_count: self.zero_count,
            dead_count: self.dead_count,
            first_nonfinite: self.first_nonfinite,
            max_abs: self.max_bits.map(magnitude),
            min_nonzero_abs: self.min_nonzero_bits.map(magnitude),
            finite_l2_norm: norm_of(&sum_squares),
            mean: of_finite(signed(below_zero, sum.to_f64() * unit / m)),
            mean_abs: of_finite(positive.plus(&negative).to_f64() * unit / m),
            variance: of_finite(spread.to_f64() * unit * unit / m / m),
            sum_squares,
        }
    }
}

/// The root of Σx² given in units of 2^-298.
fn norm_of(sum_squares: &Wide) -> f64 {
    (sum_squares.to_f64() * power_of_two(2 * UNIT)).sqrt()
}

/// The statistics of the elements with these bits.
pub fn truth(dtype: DType, dead_threshold: f32, bits: impl IntoIterator<Item = u32>) -> Truth {
    let mut exact = Exact::new(dtype, dead_threshold);
    bits.into_iter().for_each(|bits| exact.push(bits));
    exact.truth()
}

/// What the loss is scaled by under a config, which for tests of a single step is what it starts from.
pub fn loss_scale(config: &Config) -> f64 {
    config.features.loss_scale.map_or(1.0, |rule| f64::from(rule.initial))
}

/// The statistics of the elements with these bits under a config, in units of the loss before it is scaled.
pub fn truth_under(config: &Config, dtype: DType, bits: impl IntoIterator<Item = u32>) -> Truth {
    let scale = loss_scale(config);
    let mut exact = Exact::new(dtype, config.dead_threshold);
    // Exact: 24 by 24 bits.
    exact.dead_threshold *= scale;
    bits.into_iter().for_each(|bits| exact.push(bits));
    let truth = exact.truth();
    // A quotient of two f32 rounded to f64 and then to f32 is rounded right; what is finite and not 0 stays so.
    let magnitude = |m: f32| {
        if m == 0.0 { m } else { ((f64::from(m) / scale) as f32).clamp(f32::from_bits(1), f32::MAX) }
    };
    Truth {
        max_abs: truth.max_abs.map(magnitude),
        min_nonzero_abs: truth.min_nonzero_abs.map(magnitude),
        finite_l2_norm: truth.finite_l2_norm / scale,
        mean: truth.mean.map(|mean| mean / scale),
        mean_abs: truth.mean_abs.map(|mean_abs| mean_abs / scale),
        variance: truth.variance.map(|variance| variance / scale / scale),
        ..truth
    }
}

/// The norm over the finite elements of all tensors as they are, whatever the loss scale.
pub fn finite_total_norm(truths: &[Truth]) -> f64 {
    norm_of(&truths.iter().fold(Wide::ZERO, |sum, t| sum.plus(&t.sum_squares)))
}

/// A norm with its non-finite elements let in: NaN before Inf before the number.
pub fn propagate(nan_count: u64, inf_count: u64, finite: f64) -> f64 {
    if nan_count > 0 {
        f64::NAN
    } else if inf_count > 0 {
        f64::INFINITY
    } else {
        finite
    }
}

/// What follows from a step's norm and counts.
#[derive(Clone, Copy, Debug)]
pub struct Decision {
    pub total_norm: f64,
    pub coefficient: f64,
    pub found: bool,
    pub skip: bool,
    /// Non-finite elements are to become 0.
    pub zero_nonfinite: bool,
    /// The f32 coefficient is not 1.
    pub clipped: bool,
}

/// The norm that a config clips all tensors to, whatever else it does.
fn max_norm(config: &Config) -> Option<f64> {
    match config.clip {
        Clip::GlobalNorm { max_norm } => Some(max_norm),
        Clip::Percentile { max_norm, .. } | Clip::ZScore { max_norm, .. } | Clip::TensorEma { max_norm, .. } => {
            max_norm
        }
        _ => None,
    }
}

/// torch's rule under the chosen policy. Takes the finite norm as reported, so that what follows from it can be
/// demanded to the bit.
pub fn decide(config: &Config, nan_count: u64, inf_count: u64, finite_total_norm: f64) -> Decision {
    let total_norm = propagate(nan_count, inf_count, finite_total_norm);
    let found = nan_count + inf_count > 0;
    let skip = found && config.non_finite == NonFinitePolicy::Skip;
    let zero_nonfinite = found && config.non_finite == NonFinitePolicy::ZeroNonFinite;
    let norm = if zero_nonfinite { finite_total_norm } else { total_norm };
    let coefficient = match max_norm(config) {
        _ if skip => 1.0,
        None => 1.0,
        Some(_) if norm.is_nan() => f64::NAN,
        Some(max_norm) => f64::min(1.0, max_norm / (norm + 1e-6)),
    };
    let clipped = Format::F32.encode(coefficient) != Format::F32.encode(1.0);
    Decision { total_norm, coefficient, found, skip, zero_nonfinite, clipped }
}

/// Bits of a clipped element: its exact product with the f32 coefficient, rounded to f32 and from there to its type.
pub fn clip(dtype: DType, bits: u32, coefficient: f32, zero_nonfinite: bool) -> u32 {
    let format = Format::of(dtype);
    if zero_nonfinite && !matches!(format.decode(bits), Number::Finite { .. }) {
        return 0;
    }
    // 24 by 24 bits: the product of two f32 is exact in f64.
    let product = format.value(bits) * Format::F32.value(coefficient.to_bits());
    format.encode(Format::F32.value(Format::F32.encode(product)))
}
