//! The oracle is what every other test believes, so it is tested itself: against sums known in closed form, against
//! the hardware and the `half` crate, under permutation, and against sums in double-double.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // Small numbers.

use crate::common::cases::{Data, cauchy, hash, lognormal, normal, random_bits, random_finite_bits};
use crate::common::oracle::{self, Exact, Format, Number, Truth, Wide, power_of_two};
use gradprobe::{Clip, Config, DType, NonFinitePolicy};
use half::{bf16, f16};

fn near(seen: f64, expected: f64) -> bool {
    (seen - expected).abs() <= 4.0 * f64::EPSILON * expected.abs()
}

fn truth_of(values: &[f32]) -> Truth {
    oracle::truth(DType::F32, 1e-10, values.iter().map(|x| x.to_bits()))
}

#[test]
fn every_16_bit_pattern_decodes_as_half_does() {
    for bits in 0..=u16::MAX {
        let expected = [f16::from_bits(bits).to_f64(), bf16::from_bits(bits).to_f64()];
        for (format, expected) in [Format::F16, Format::BF16].into_iter().zip(expected) {
            let seen = format.value(bits.into());
            assert!(seen.to_bits() == expected.to_bits() || seen.is_nan() && expected.is_nan(), "{format:?} {bits:#x}");
        }
    }
}

#[test]
fn f32_patterns_decode_as_the_hardware_does() {
    let edges = (0..=255u32).flat_map(|e| [0, 1, 0x3f_ffff, 0x40_0000, 0x7f_ffff].map(|fraction| e << 23 | fraction));
    let random = (0..100_000).map(|i| hash(1, i) as u32);
    for bits in edges.flat_map(|b| [b, b | 1 << 31]).chain(random) {
        let (seen, expected) = (Format::F32.value(bits), f64::from(f32::from_bits(bits)));
        assert!(seen.to_bits() == expected.to_bits() || seen.is_nan() && expected.is_nan(), "{bits:#x}");
    }
}

#[test]
fn numbers_come_apart_as_their_format_says() {
    let finite = |negative, integer, exponent| Number::Finite { negative, integer, exponent };
    assert_eq!(Format::F32.decode(1), finite(false, 1, -149));
    assert_eq!(Format::F16.decode(0x8001), finite(true, 1, -24));
    assert_eq!(Format::BF16.decode(1), finite(false, 1, -133));
    assert_eq!(Format::F32.decode(f32::MAX.to_bits()), finite(false, 0xff_ffff, 104));
    assert_eq!(Format::F16.decode(0x7bff), finite(false, 0x7ff, 5));
    assert_eq!(Format::BF16.decode(0xff7f), finite(true, 0xff, 120));
    assert_eq!((Format::F32.infinity(), Format::F32.nan(), Format::F32.sign()), (0x7f80_0000, 0x7fc0_0000, 1 << 31));
    assert_eq!((Format::F16.infinity(), Format::F16.nan(), Format::F16.sign()), (0x7c00, 0x7e00, 0x8000));
    assert_eq!((Format::BF16.infinity(), Format::BF16.nan(), Format::BF16.sign()), (0x7f80, 0x7fc0, 0x8000));
    assert_eq!(Format::BF16.decode(0xff80), Number::Infinite { negative: true });
    assert_eq!(Format::BF16.decode(0xff81), Number::Nan);
}

/// At, just below and just above the middle of neighbours, for every pair of a 16-bit format and many of f32.
#[test]
fn encoding_rounds_to_nearest_with_ties_to_even() {
    let all_16 = |format: Format| (0..format.infinity()).map(move |bits| (format, bits));
    let some_32 = (0..100_000).map(|i| (Format::F32, (hash(2, i) % u64::from(Format::F32.infinity())) as u32));
    for (format, bits) in all_16(Format::F16).chain(all_16(Format::BF16)).chain(some_32) {
        let below = format.value(bits);
        // The neighbour of the largest number is where the next would be: rounding there gives Inf.
        let above =
            if bits + 1 == format.infinity() { 2.0 * below - format.value(bits - 1) } else { format.value(bits + 1) };
        let middle = f64::midpoint(below, above);
        let even = bits + (bits & 1);
        for (value, expected) in
            [(below, bits), (middle.next_down(), bits), (middle, even), (middle.next_up(), bits + 1), (above, bits + 1)]
        {
            assert_eq!(format.encode(value), expected, "{format:?} {value:e}");
            assert_eq!(format.encode(-value), expected | format.sign(), "{format:?} -{value:e}");
        }
    }
    for format in [Format::F32, Format::F16, Format::BF16] {
        for (value, expected) in [
            (f64::INFINITY, format.infinity()),
            (f64::NEG_INFINITY, format.sign() | format.infinity()),
            (f64::MAX, format.infinity()),
            (f64::from_bits(1), 0),
            (-f64::from_bits(1), format.sign()),
            (f64::NAN, format.nan()),
            (-f64::NAN, format.nan()),
        ] {
            assert_eq!(format.encode(value), expected, "{format:?} {value:e}");
        }
    }
}

#[test]
fn encoding_agrees_with_the_hardware_and_with_half() {
    for i in 0..300_000 {
        let wide = f64::from_bits(hash(3, i));
        if !wide.is_nan() {
            assert_eq!(Format::F32.encode(wide), (wide as f32).to_bits(), "{wide:e}");
        }
        let single = f32::from_bits(hash(4, i) as u32);
        if !single.is_nan() {
            let value = f64::from(single);
            assert_eq!(Format::F16.encode(value), u32::from(f16::from_f32(single).to_bits()), "{value:e}");
            assert_eq!(Format::BF16.encode(value), u32::from(bf16::from_f32(single).to_bits()), "{value:e}");
        }
    }
}

#[test]
fn wide_integers_calculate() {
    let number = |i: usize| (u128::from(hash(5, i)) << 64 | u128::from(hash(6, i))) >> (hash(7, i) % 128);
    for i in 0..2000 {
        let (a, b) = (number(2 * i), number(2 * i + 1));
        let (low, high) = (a.min(b), a.max(b));
        let wide = |value| Wide::shifted(value, 0);
        assert_eq!(wide(high >> 1).plus(&wide(low >> 1)), wide((high >> 1) + (low >> 1)));
        assert_eq!(wide(high).minus(&wide(low)), wide(high - low));
        assert_eq!(wide(a >> 64).times(&wide(b >> 64)), wide((a >> 64) * (b >> 64)));
        assert_eq!(wide(low).cmp(&wide(high)), low.cmp(&high));
        assert_eq!(wide(a).to_f64().to_bits(), (a as f64).to_bits(), "{a}");
        // (a + b)(a − b) = a² − b², far beyond 128 bits.
        let (shift, a, b) = ((hash(8, i) % 250) as u32, Wide::shifted(high, 0), Wide::shifted(low, 0));
        let (a, b) = (a.times(&Wide::shifted(1, shift)), b.times(&Wide::shifted(1, shift)));
        assert_eq!(a, Wide::shifted(high, shift));
        assert_eq!(a.plus(&b).times(&a.minus(&b)), a.times(&a).minus(&b.times(&b)));
        assert_eq!(a.to_f64(), high as f64 * power_of_two(shift as i32));
    }
    // A tie of 53 bits, decided by a bit 500 places further down.
    let tie = Wide::shifted((1 << 53) + 1, 600);
    assert_eq!(tie.to_f64(), power_of_two(653));
    assert_eq!(tie.plus(&Wide::shifted(1, 100)).to_f64(), power_of_two(653) + power_of_two(601));
    assert!(Wide::ZERO.is_zero() && !Wide::shifted(1, 767).is_zero());
}

#[test]
#[should_panic(expected = "2^768 is passed")]
fn wide_sums_do_not_wrap() {
    let _ = Wide::shifted(1, 767).plus(&Wide::shifted(1, 767));
}

#[test]
#[should_panic(expected = "2^768 is passed")]
fn wide_products_do_not_wrap() {
    let _ = Wide::shifted(1, 400).times(&Wide::shifted(1, 368));
}

#[test]
#[should_panic(expected = "below zero")]
fn wide_differences_do_not_wrap() {
    let _ = Wide::shifted(1, 5).minus(&Wide::shifted(1, 6));
}

/// 1, 2, … n times a power of two: mean (n + 1)/2, Σx² = n(n + 1)(2n + 1)/6, variance (n² − 1)/12.
#[test]
fn integers_from_one_have_their_closed_forms() {
    for n in [1u32, 2, 3, 100, 65_537] {
        for scale in [-149, -74, 0, 63, 111] {
            let unit = power_of_two(scale);
            let values: Vec<f32> = (1..=n).map(|i| (f64::from(i) * unit) as f32).collect();
            let (n, truth) = (f64::from(n), truth_of(&values));
            assert!(near(truth.mean.unwrap(), (n + 1.0) / 2.0 * unit), "mean, {n} at 2^{scale}");
            assert!(near(truth.mean_abs.unwrap(), (n + 1.0) / 2.0 * unit), "mean_abs, {n} at 2^{scale}");
            let norm = (n * (n + 1.0) * (2.0 * n + 1.0) / 6.0).sqrt() * unit;
            assert!(near(truth.finite_l2_norm, norm), "norm, {n} at 2^{scale}");
            let variance = (n * n - 1.0) / 12.0 * unit * unit;
            assert!(near(truth.variance.unwrap(), variance), "variance, {n} at 2^{scale}");
            assert_eq!(truth.max_abs, values.last().copied());
            assert_eq!(truth.min_nonzero_abs, values.first().copied());

            let negated: Vec<f32> = values.iter().map(|x| -x).collect();
            let minus = truth_of(&negated);
            assert_eq!(minus.mean.unwrap(), -truth.mean.unwrap());
            assert_eq!((minus.mean_abs, minus.variance), (truth.mean_abs, truth.variance));
            assert_eq!(minus.finite_l2_norm, truth.finite_l2_norm);

            let both = truth_of(&[values, negated].concat());
            assert_eq!(both.mean, Some(0.0));
            assert!(near(both.variance.unwrap(), norm * norm / n));
        }
    }
}

/// Ones with a share p of the next number: variance p(1 − p)·ulp², at mean/std up to 10^9 and beyond.
#[test]
fn variance_survives_any_mean() {
    for (at, n, k) in
        [(1.0f32, 100, 1), (1.0, 1_000_003, 1), (-3e38, 4097, 17), (1e-30, 1000, 500), (16_777_215.0, 9, 4)]
    {
        let next = f32::from_bits(at.to_bits() + 1);
        let mut exact = Exact::new(DType::F32, 0.0);
        exact.push_run(at.to_bits(), n - k);
        exact.push_run(next.to_bits(), k);
        let truth = exact.truth();
        let (p, ulp) = (k as f64 / n as f64, f64::from(next) - f64::from(at));
        assert!(near(truth.variance.unwrap(), p * (1.0 - p) * ulp * ulp), "{k} of {n} at {at:e}");
        assert!(near(truth.mean.unwrap(), f64::from(at) + p * ulp));
    }
    for at in [0.1f32, -3.4e38, 1e-45, 0.0] {
        assert_eq!(truth_of(&[at; 1001]).variance, Some(0.0), "all {at:e}");
        assert_ne!(truth_of(&[at, f32::from_bits(at.to_bits() + 1)]).variance, Some(0.0), "{at:e} and its neighbour");
    }
}

#[test]
fn extremes_of_every_format_are_exact() {
    for (dtype, least, most) in [
        (DType::F32, power_of_two(-149), f64::from(f32::MAX)),
        (DType::F16, power_of_two(-24), 65_504.0),
        (DType::BF16, power_of_two(-133), bf16::MAX.to_f64()),
    ] {
        let format = Format::of(dtype);
        for n in [1u32, 7, 4096] {
            for (bits, value) in [(1, least), (format.infinity() - 1, most)] {
                let mut exact = Exact::new(dtype, 0.0);
                exact.push_run(bits | format.sign(), n.into());
                let truth = exact.truth();
                let n = f64::from(n);
                assert!(near(truth.finite_l2_norm, n.sqrt() * value), "{dtype} {value:e}");
                assert_eq!((truth.mean, truth.mean_abs), (Some(-value), Some(value)), "{dtype}");
                assert_eq!((truth.max_abs, truth.min_nonzero_abs), (Some(value as f32), Some(value as f32)));
                assert_eq!((truth.variance, truth.dead_count, truth.zero_count), (Some(0.0), 0, 0));
            }
        }
        // The largest and the smallest together: the smallest is lost in f64 and not before.
        let mut exact = Exact::new(dtype, 0.0);
        [1, format.infinity() - 1, format.sign() | (format.infinity() - 1)].into_iter().for_each(|b| exact.push(b));
        assert!(near(exact.truth().mean.unwrap(), least / 3.0), "{dtype}: the large ones cancel, the small one stays");
    }
}

#[test]
fn counts_follow_the_definitions() {
    let nan = f32::from_bits(0xff80_0001);
    let values = [0.0, -0.0, 1e-11, -1e-10, 1e-10, 2.0, f32::INFINITY, nan, f32::NEG_INFINITY, -3.0, f32::NAN];
    let truth = truth_of(&values);
    assert_eq!((truth.count, truth.nan_count, truth.inf_count, truth.finite_count()), (11, 2, 2, 7));
    // |x| < τ: the two at the threshold itself are alive.
    assert_eq!((truth.zero_count, truth.dead_count, truth.first_nonfinite), (2, 3, Some(6)));
    assert_eq!((truth.max_abs, truth.min_nonzero_abs), (Some(3.0), Some(1e-11)));
    assert!(near(truth.mean.unwrap(), -1.0 / 7.0 + f64::from(1e-11f32) / 7.0));

    let empty = truth_of(&[]);
    assert_eq!((empty.count, empty.finite_l2_norm, empty.max_abs, empty.min_nonzero_abs), (0, 0.0, None, None));
    assert_eq!((empty.mean, empty.mean_abs, empty.variance, empty.first_nonfinite), (None, None, None, None));
    let nothing_finite = truth_of(&[f32::INFINITY, nan]);
    assert_eq!((nothing_finite.mean, nothing_finite.max_abs, nothing_finite.finite_l2_norm), (None, None, 0.0));
    let zeros = truth_of(&[-0.0; 3]);
    assert_eq!((zeros.max_abs, zeros.min_nonzero_abs, zeros.zero_count), (Some(0.0), None, 3));
    let none_dead = oracle::truth(DType::F32, 0.0, [0, 1]);
    assert_eq!((none_dead.zero_count, none_dead.dead_count), (1, 0), "nothing is below a threshold of 0");
}

#[test]
fn order_does_not_matter_and_runs_are_repetition() {
    for dtype in DType::ALL {
        let mut bits: Vec<u32> = (0..5000).map(|i| random_bits(dtype, 9, i)).collect();
        let forward = oracle::truth(dtype, 1e-5, bits.iter().copied());
        // A Fisher–Yates shuffle.
        for i in (1..bits.len()).rev() {
            bits.swap(i, hash(10, i) as usize % (i + 1));
        }
        let mut shuffled = oracle::truth(dtype, 1e-5, bits.iter().copied());
        assert_ne!(forward.first_nonfinite, shuffled.first_nonfinite);
        shuffled.first_nonfinite = forward.first_nonfinite;
        assert_eq!(format!("{forward:?}"), format!("{shuffled:?}"));

        let (mut runs, mut single) = (Exact::new(dtype, 1e-5), Exact::new(dtype, 1e-5));
        for (i, &bits) in bits[..300].iter().enumerate() {
            let length = hash(11, i) % 5;
            runs.push_run(bits, length);
            (0..length).for_each(|_| single.push(bits));
        }
        assert_eq!(format!("{:?}", runs.truth()), format!("{:?}", single.truth()));
    }
}

/// A sum of f64 kept as two, with 106 bits.
#[derive(Clone, Copy, Default)]
struct DoubleDouble(f64, f64);

impl DoubleDouble {
    fn add(self, x: f64, rest: f64) -> Self {
        let sum = self.0 + x;
        let back = sum - self.0;
        let error = (self.0 - (sum - back)) + (x - back);
        let low = self.1 + (error + rest);
        let high = sum + low;
        Self(high, low - (high - sum))
    }

    fn value(self) -> f64 {
        self.0 + self.1
    }
}

/// The same statistics another way again: deviations from the mean in double-double.
#[test]
fn double_double_agrees() {
    for (name, draw) in [
        ("normal", (|i| normal(12, i)) as fn(usize) -> f64),
        ("lognormal", |i| lognormal(13, i, 10.0)),
        ("cauchy", |i| 1e-5 * cauchy(14, i)),
        ("far from zero", |i| 1e6 + normal(15, i)),
        ("bits", |i| Format::F32.value(random_finite_bits(DType::F32, 16, i))),
    ] {
        for n in [1usize, 2, 1000, 50_001] {
            let values: Vec<f32> = (0..n).map(|i| draw(i) as f32).collect();
            let truth = truth_of(&values);
            let sum = |f: &dyn Fn(f64) -> (f64, f64)| {
                let add = |sum: DoubleDouble, &x: &f32| {
                    let (high, low) = f(x.into());
                    sum.add(high, low)
                };
                values.iter().fold(DoubleDouble::default(), add).value()
            };
            let mean_abs = sum(&|x| (x.abs(), 0.0)) / n as f64;
            assert!(near(truth.mean_abs.unwrap(), mean_abs), "mean_abs of {n} {name}");
            let total = values.iter().fold(DoubleDouble::default(), |s, &x| s.add(x.into(), 0.0));
            let mean = total.value() / n as f64;
            assert!((truth.mean.unwrap() - mean).abs() <= 1e-15 * mean_abs, "mean of {n} {name}");
            // Squares of f32 are exact in f64.
            assert!(near(truth.finite_l2_norm, sum(&|x| (x * x, 0.0)).sqrt()), "norm of {n} {name}");
            // Around the mean as f64, less what that misses: n·(mean' − mean)², below 1e-32·mean²·n.
            let square = |x: f64| {
                let deviation = x - mean;
                (deviation * deviation, deviation.mul_add(deviation, -(deviation * deviation)))
            };
            let variance = sum(&square) / n as f64;
            let seen = truth.variance.unwrap();
            assert!((seen - variance).abs() <= 1e-9 * variance + 1e-30 * mean * mean, "variance of {n} {name}");
        }
    }
}

#[test]
fn totals_add_squares_over_tensors() {
    let tensors = [truth_of(&[3.0]), truth_of(&[]), truth_of(&[4.0, f32::NAN]), truth_of(&[12.0; 1])];
    assert_eq!(oracle::finite_total_norm(&tensors), 13.0);
    assert_eq!(oracle::finite_total_norm(&[]), 0.0);
    let huge = [truth_of(&[f32::MAX; 4]), truth_of(&[f32::from_bits(1)])];
    assert_eq!(oracle::finite_total_norm(&huge), 2.0 * f64::from(f32::MAX));
}

#[test]
fn decisions_follow_the_policies() {
    use NonFinitePolicy::{Propagate, Skip, ZeroNonFinite};
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    // (policy, max_norm, NaN, Inf, finite norm) → (total norm, coefficient, skip, zero, clipped)
    for ((policy, max_norm, nans, infs, norm), expected) in [
        ((Skip, None, 0, 0, 8.0), (8.0, 1.0, false, false, false)),
        ((Skip, Some(4.0), 0, 0, 8.0 - 1e-6), (8.0 - 1e-6, 0.5, false, false, true)),
        ((Skip, Some(9.0), 0, 0, 8.0), (8.0, 1.0, false, false, false)),
        ((Skip, Some(4.0), 1, 0, 8.0), (nan, 1.0, true, false, false)),
        ((Skip, Some(4.0), 0, 1, 8.0), (inf, 1.0, true, false, false)),
        ((Propagate, Some(4.0), 1, 1, 8.0), (nan, nan, false, false, true)),
        ((Propagate, Some(4.0), 0, 2, 8.0), (inf, 0.0, false, false, true)),
        ((Propagate, None, 0, 2, 8.0), (inf, 1.0, false, false, false)),
        ((ZeroNonFinite, Some(4.0), 1, 0, 8.0 - 1e-6), (nan, 0.5, false, true, true)),
        ((ZeroNonFinite, None, 0, 1, 8.0), (inf, 1.0, false, true, false)),
        ((ZeroNonFinite, Some(1.0), 0, 0, 0.0), (0.0, 1.0, false, false, false)),
        // Below 1 in f64 but 1 in f32: nothing to multiply.
        ((Skip, Some(1.0), 0, 0, 1.0 - 1e-6 + 1e-9), (1.0 - 1e-6 + 1e-9, 1.0 / (1.0 + 1e-9), false, false, false)),
    ] {
        let config =
            max_norm.map_or(Config::default(), |x| Config::default().clip(Clip::global_norm(x))).non_finite(policy);
        let seen = oracle::decide(&config, nans, infs, norm);
        let same = |a: f64, b: f64| a.is_nan() && b.is_nan() || a == b || near(a, b);
        let what = format!("{policy:?} {max_norm:?} {nans} {infs} {norm}: {seen:?}");
        assert!(same(seen.total_norm, expected.0) && same(seen.coefficient, expected.1), "{what}");
        assert_eq!((seen.skip, seen.zero_nonfinite, seen.clipped), (expected.2, expected.3, expected.4), "{what}");
        assert_eq!(seen.found, nans + infs > 0, "{what}");
    }
}

/// The exact product, rounded twice by the oracle's own rounding, against the hardware's product and `half`.
#[test]
fn clip_is_the_f32_product_rounded_to_the_dtype() {
    for i in 0..200_000 {
        let coefficient = [uniform_coefficient(i), 0.5, f32::from_bits(1), 0.0, 1.0][i % 5];
        for dtype in DType::ALL {
            let bits = random_bits(dtype, 19, i);
            let product = Format::of(dtype).value(bits) as f32 * coefficient;
            let narrowed = match dtype {
                DType::F32 => product.to_bits(),
                DType::F16 => f16::from_f32(product).to_bits().into(),
                DType::BF16 => bf16::from_f32(product).to_bits().into(),
            };
            let expected = if product.is_nan() { Format::of(dtype).nan() } else { narrowed };
            assert_eq!(oracle::clip(dtype, bits, coefficient, false), expected, "{dtype} {bits:#x} {coefficient:e}");
            let finite = Format::of(dtype).value(bits).is_finite();
            let zeroed = if finite { expected } else { 0 };
            assert_eq!(oracle::clip(dtype, bits, coefficient, true), zeroed, "{dtype} {bits:#x} {coefficient:e}");
        }
    }
    for dtype in DType::ALL {
        let format = Format::of(dtype);
        assert_eq!(oracle::clip(dtype, format.infinity(), 0.0, false), format.nan());
        assert_eq!(oracle::clip(dtype, format.encode(-1.0), f32::NAN, false), format.nan());
        assert_eq!(oracle::clip(dtype, format.encode(-1.0), 0.0, false), format.sign(), "−1 · 0 is −0");
        assert_eq!(oracle::clip(dtype, format.sign() | format.infinity(), 0.5, true), 0, "−Inf becomes +0");
        assert_eq!(oracle::clip(dtype, 3, 0.5, false), 2, "1.5 units in the last place go to the even one");
        assert_eq!(oracle::clip(dtype, 1, 0.5, false), 0);
    }
}

/// Random in bits, from subnormal to 1.
fn uniform_coefficient(index: usize) -> f32 {
    f32::from_bits((hash(20, index) % u64::from(1.0f32.to_bits())) as u32)
}

#[test]
fn data_widen_without_change() {
    for dtype in DType::ALL {
        let bits = || (0..4000).map(|i| random_finite_bits(dtype, 21, i));
        let data = Data::of_bits(dtype, bits());
        let wide = data.widened();
        assert_eq!(data.bits().collect::<Vec<_>>(), bits().collect::<Vec<_>>());
        let values = |data: &Data| data.bits().map(|b| Format::of(data.dtype()).value(b).to_bits()).collect::<Vec<_>>();
        assert_eq!(values(&data), values(&wide));
        assert_eq!(wide.dtype(), DType::F32);
    }
}
