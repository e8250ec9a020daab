//! The checkers are what stands between a bug and a user, so each is given wrong numbers here, one at a time, and must
//! complain about the right one: a count off by one, −0 for +0, one unit in the last place, NaN for a number, a swapped
//! tensor. `harness.rs` does the same with the harness.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // Small counts, and f32 fields.

use crate::common::Placed;
use crate::common::cases::{Data, normal, random_bits};
use crate::common::check::{self, CONSTANT_VARIANCE_BOUND, SUM_BOUND, Seen, flipped, variance_bound};
use crate::common::host::OnHost;
use crate::common::oracle::{self, Truth};
use gradprobe::{Clip, Config, Cpu, DType, HostTensor, NonFinitePolicy, Plan, Probe, Record, StepOutputs};

/// What a perfect probe would say.
fn perfect(truth: &Truth) -> Seen {
    let m = truth.finite_count() as f64;
    let fraction = |part: u64| (truth.count > 0).then(|| part as f64 / truth.count as f64);
    Seen {
        count: truth.count,
        nan_count: truth.nan_count,
        inf_count: truth.inf_count,
        zero_count: truth.zero_count,
        dead_count: truth.dead_count,
        finite_count: truth.finite_count(),
        first_nonfinite: truth.first_nonfinite,
        max_abs: truth.max_abs,
        min_nonzero_abs: truth.min_nonzero_abs,
        finite_l2_norm: truth.finite_l2_norm,
        l2_norm: oracle::propagate(truth.nan_count, truth.inf_count, truth.finite_l2_norm),
        mean: truth.mean,
        mean_abs: truth.mean_abs,
        variance: truth.variance,
        sample_variance: truth.variance.filter(|_| m > 1.0).map(|v| v * m / (m - 1.0)),
        std: truth.variance.map(f64::sqrt),
        rms: truth.mean.map(|_| truth.finite_l2_norm / m.sqrt()),
        zero_fraction: fraction(truth.zero_count),
        dead_fraction: fraction(truth.dead_count),
        nan_fraction: fraction(truth.nan_count),
    }
}

fn truth_of(values: &[f32]) -> Truth {
    oracle::truth(DType::F32, 1e-10, values.iter().map(|x| x.to_bits()))
}

/// Normal numbers, two zeros, and a NaN and an Inf if so wished.
fn sample(nonfinite: bool) -> Vec<f32> {
    let mut values: Vec<f32> = (0..1000).map(|i| (0.1 + normal(1, i)) as f32).collect();
    (values[10], values[20]) = (0.0, -0.0);
    if nonfinite {
        (values[500], values[700]) = (f32::NAN, f32::INFINITY);
    }
    values
}

/// A number one unit in the last place larger, in whichever type.
fn next(value: Option<f32>) -> Option<f32> {
    value.map(f32::next_up)
}

fn scaled(value: Option<f64>, factor: f64) -> Option<f64> {
    value.map(|x| x * factor)
}

type Falsify = fn(&mut Seen);

/// Every way in which the statistics of an ordinary tensor may be wrong, by the field to be named.
const FALSIFIED: &[(&str, Falsify)] = &[
    ("count", |s| s.count += 1),
    ("count", |s| s.count -= 1),
    ("nan_count", |s| s.nan_count += 1),
    ("inf_count", |s| s.inf_count += 1),
    ("zero_count", |s| s.zero_count -= 1),
    ("dead_count", |s| s.dead_count += 1),
    ("finite_count", |s| s.finite_count -= 1),
    ("first_nonfinite", |s| s.first_nonfinite = Some(s.first_nonfinite.map_or(0, |i| i + 1))),
    ("max_abs", |s| s.max_abs = None),
    ("max_abs", |s| s.max_abs = next(s.max_abs)),
    ("max_abs", |s| s.max_abs = s.max_abs.map(|x| -x)),
    ("max_abs", |s| s.max_abs = Some(f32::NAN)),
    ("min_nonzero_abs", |s| s.min_nonzero_abs = None),
    ("min_nonzero_abs", |s| s.min_nonzero_abs = next(s.min_nonzero_abs)),
    ("min_nonzero_abs", |s| s.min_nonzero_abs = Some(0.0)),
    ("finite_l2_norm", |s| s.finite_l2_norm *= 1.0 + 1.01 * SUM_BOUND),
    ("finite_l2_norm", |s| s.finite_l2_norm *= 1.0 - 1.01 * SUM_BOUND),
    ("finite_l2_norm", |s| s.finite_l2_norm = f64::NAN),
    ("finite_l2_norm", |s| s.finite_l2_norm = f64::INFINITY),
    ("finite_l2_norm", |s| s.finite_l2_norm = 0.0),
    ("finite_l2_norm", |s| s.finite_l2_norm *= -1.0),
    ("l2_norm", |s| s.l2_norm = if s.l2_norm.is_nan() { f64::INFINITY } else { s.l2_norm.next_up() }),
    ("l2_norm", |s| s.l2_norm = -s.l2_norm),
    ("mean", |s| s.mean = None),
    ("mean", |s| s.mean = Some(s.mean.unwrap() + 1.01 * SUM_BOUND * s.mean_abs.unwrap())),
    ("mean", |s| s.mean = Some(s.mean.unwrap() - 1.01 * SUM_BOUND * s.mean_abs.unwrap())),
    ("mean", |s| s.mean = scaled(s.mean, -1.0)),
    ("mean", |s| s.mean = Some(f64::NAN)),
    ("mean_abs", |s| s.mean_abs = None),
    ("mean_abs", |s| s.mean_abs = scaled(s.mean_abs, 1.0 + 1.01 * SUM_BOUND)),
    ("mean_abs", |s| s.mean_abs = scaled(s.mean_abs, 1.0 - 1.01 * SUM_BOUND)),
    ("mean_abs", |s| s.mean_abs = Some(f64::NAN)),
    ("variance", |s| s.variance = None),
    ("variance", |s| s.variance = scaled(s.variance, 1.0 + 1.2e-6)),
    ("variance", |s| s.variance = scaled(s.variance, 1.0 - 1.2e-6)),
    ("variance", |s| s.variance = scaled(s.variance, -1.0)),
    ("variance", |s| s.variance = s.sample_variance),
    ("variance", |s| s.variance = Some(0.0)),
    ("variance", |s| s.variance = Some(f64::NAN)),
    ("variance_ddof(1)", |s| s.sample_variance = s.variance),
    ("variance_ddof(1)", |s| s.sample_variance = None),
    ("std", |s| s.std = s.variance),
    ("std", |s| s.std = None),
    ("rms", |s| s.rms = scaled(s.rms, 1.0 + 1e-14)),
    ("rms", |s| s.rms = None),
    ("zero_fraction", |s| s.zero_fraction = scaled(s.zero_fraction, 100.0)),
    ("dead_fraction", |s| s.dead_fraction = None),
    ("nan_fraction", |s| s.nan_fraction = Some(0.5)),
];

#[test]
fn every_wrong_statistic_is_named() {
    for nonfinite in [false, true] {
        let truth = truth_of(&sample(nonfinite));
        assert_eq!(check::check_tensor("w", &perfect(&truth), &truth), [""; 0]);
        for (turn, (field, falsify)) in FALSIFIED.iter().enumerate() {
            let mut seen = perfect(&truth);
            falsify(&mut seen);
            let complaints = check::check_tensor("w", &seen, &truth);
            let named = complaints.iter().any(|c| c.starts_with("w: ") && c.contains(field));
            assert!(named, "falsification {turn} of {field} with nonfinite = {nonfinite}: {complaints:?}");
        }
    }
}

#[test]
fn what_is_within_the_bounds_passes() {
    let truth = truth_of(&sample(true));
    let within: [Falsify; 6] = [
        |s| s.finite_l2_norm *= 1.0 + 0.9 * SUM_BOUND,
        |s| s.mean_abs = scaled(s.mean_abs, 1.0 - 0.9 * SUM_BOUND),
        |s| s.mean = Some(s.mean.unwrap() + 0.9 * SUM_BOUND * s.mean_abs.unwrap()),
        |s| s.variance = scaled(s.variance, 1.0 + 0.9e-6),
        |s| s.variance = scaled(s.variance, 1.0 - 0.9e-6),
        |_| (),
    ];
    for (turn, change) in within.into_iter().enumerate() {
        let mut seen = perfect(&truth);
        change(&mut seen);
        // What derives from the changed number changes with it.
        let m = truth.finite_count() as f64;
        seen.rms = Some(seen.finite_l2_norm / m.sqrt());
        seen.std = seen.variance.map(f64::sqrt);
        seen.sample_variance = seen.variance.map(|v| v * m / (m - 1.0));
        assert_eq!(check::check_tensor("w", &seen, &truth), [""; 0], "change {turn}");
    }
}

/// Where there is nothing finite, numbers must be absent and norms 0.
#[test]
fn numbers_from_nothing_are_named() {
    for values in [&[][..], &[f32::NAN, f32::INFINITY], &[f32::NEG_INFINITY]] {
        let truth = truth_of(values);
        assert_eq!(check::check_tensor("w", &perfect(&truth), &truth), [""; 0], "{values:?}");
        let mut falsified: Vec<(&str, Falsify)> = vec![
            ("max_abs", |s| s.max_abs = Some(0.0)),
            ("min_nonzero_abs", |s| s.min_nonzero_abs = Some(f32::INFINITY)),
            ("finite_l2_norm", |s| s.finite_l2_norm = f64::from_bits(1)),
            ("finite_l2_norm", |s| s.finite_l2_norm = -0.0),
            ("finite_l2_norm", |s| s.finite_l2_norm = f64::NAN),
            ("mean", |s| s.mean = Some(0.0)),
            ("mean_abs", |s| s.mean_abs = Some(0.0)),
            ("variance", |s| s.variance = Some(0.0)),
            ("variance_ddof(1)", |s| s.sample_variance = Some(0.0)),
            ("std", |s| s.std = Some(f64::NAN)),
            ("rms", |s| s.rms = Some(0.0)),
            ("l2_norm", |s| s.l2_norm = if s.l2_norm == 0.0 { -0.0 } else { 0.0 }),
            ("first_nonfinite", |s| s.first_nonfinite = if s.count == 0 { Some(0) } else { None }),
        ];
        if values.is_empty() {
            falsified.push(("zero_fraction", |s| s.zero_fraction = Some(0.0)));
            falsified.push(("nan_fraction", |s| s.nan_fraction = Some(f64::NAN)));
        } else {
            falsified.push(("zero_fraction", |s| s.zero_fraction = None));
        }
        for (field, falsify) in falsified {
            let mut seen = perfect(&truth);
            falsify(&mut seen);
            let complaints = check::check_tensor("w", &seen, &truth);
            assert!(complaints.iter().any(|c| c.contains(field)), "{field} of {values:?}: {complaints:?}");
        }
    }
}

/// A norm of NaN must be NaN and not Inf, and the other way round.
#[test]
fn nan_and_inf_are_told_apart() {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    for (values, right, wrong) in [
        ([1.0, f32::NAN], nan, [inf, 1.0, -nan]),
        ([1.0, f32::NEG_INFINITY], inf, [nan, 1.0, -inf]),
        ([f32::INFINITY, f32::NAN], nan, [inf, 0.0, -nan]),
        ([1.0, 0.0], 1.0, [nan, inf, -1.0]),
    ] {
        let truth = truth_of(&values);
        let mut seen = perfect(&truth);
        assert_eq!(seen.l2_norm.to_bits(), right.to_bits());
        for wrong in wrong {
            seen.l2_norm = wrong;
            assert_eq!(check::check_tensor("w", &seen, &truth).len(), 1, "{values:?}: {wrong}");
        }
    }
}

/// The bounds of the variance: wider with the mean, absolute when all elements are equal.
#[test]
fn bounds_of_the_variance_are_those_of_the_contract() {
    assert_eq!(variance_bound(0.0, 1.0), 1e-6);
    assert!((variance_bound(-300.0, 9.0) - 1.1e-5).abs() < 1e-18);

    let with_variance = |truth: &Truth, variance: f64| {
        let mut seen = perfect(truth);
        let m = truth.finite_count() as f64;
        (seen.variance, seen.std) = (Some(variance), Some(variance.sqrt()));
        seen.sample_variance = Some(variance * m / (m - 1.0));
        check::check_tensor("w", &seen, truth)
    };
    let constant = truth_of(&[3.0; 77]);
    let limit = CONSTANT_VARIANCE_BOUND * 9.0;
    assert_eq!(with_variance(&constant, 0.9 * limit), [""; 0]);
    assert_ne!(with_variance(&constant, 1.1 * limit), [""; 0]);
    assert_ne!(with_variance(&constant, -1e-300), [""; 0], "negative, however little");
    assert_ne!(with_variance(&truth_of(&[0.0; 77]), 1e-300), [""; 0], "zeros vary by nothing");

    let far: Vec<f32> = (0..1000).map(|i| (1e4 + normal(2, i)) as f32).collect();
    let far = truth_of(&far);
    let (mean, variance) = (far.mean.unwrap(), far.variance.unwrap());
    let bound = variance_bound(mean, variance);
    assert!(bound > 5e-4, "{bound}");
    assert_eq!(with_variance(&far, variance * (1.0 + 0.9 * bound)), [""; 0]);
    assert_ne!(with_variance(&far, variance * (1.0 + 1.1 * bound)), [""; 0]);
}

fn measured(values: &[f32], config: Config) -> (Record, StepOutputs) {
    let plan = Plan::new([("w", DType::F32, values.len() as u64)]).unwrap();
    let report = Probe::new(Cpu, plan, config).unwrap().measure_host(&[HostTensor::F32(values)]).unwrap();
    (report.records()[0], *report.outputs())
}

#[test]
fn no_bit_of_a_record_can_differ_unnoticed() {
    let (record, _) = measured(&sample(true), Config::default());
    for record in [record, Record::EMPTY] {
        assert_eq!(check::same_record("w", &record, &record), [""; 0]);
        for (bit, wrong) in flipped(record) {
            let complaints = check::same_record("w", &wrong, &record);
            assert!(complaints.len() == 1 && complaints[0].starts_with("w: "), "bit {bit}: {complaints:?}");
        }
    }
    let negative_zero = Record { mean_or_zero: -0.0, ..Record::EMPTY };
    let complaint = &check::same_record("head.bias", &negative_zero, &Record::EMPTY)[0];
    assert_eq!(complaint, "head.bias: mean_or_zero is -0e0 (0x8000000000000000), should be 0e0 (0x0)");
}

#[test]
fn no_bit_of_the_scalars_can_differ_unnoticed() {
    for config in
        [Config::default(), Config::default().clip(Clip::global_norm(1.0)).non_finite(NonFinitePolicy::Propagate)]
    {
        let (_, outputs) = measured(&sample(config.clip != Clip::None), config.clone());
        assert_eq!(check::same_outputs(&outputs, &outputs), [""; 0]);
        for (bit, wrong) in flipped(outputs) {
            assert_eq!(check::same_outputs(&wrong, &outputs).len(), 1, "bit {bit}");
        }
    }
}

/// Against the oracle too: the norm has a bound and not one value, but what follows from it is checked to the bit.
#[test]
fn no_bit_of_the_scalars_can_be_wrong_unnoticed() {
    let policies = [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite];
    for policy in policies {
        for nonfinite in [false, true] {
            let values = sample(nonfinite);
            let config = Config::default().clip(Clip::global_norm(0.7)).non_finite(policy);
            let (_, outputs) = measured(&values, config.clone());
            let truths = [truth_of(&values)];
            assert_eq!(check::check_outputs(&outputs, 1, &truths, &config), [""; 0]);
            for (bit, wrong) in flipped(outputs) {
                // With a non-finite element nothing need follow from the last places of the finite norm, and they are
                // within its bound.
                if nonfinite && (64..64 + 33).contains(&bit) {
                    continue;
                }
                assert_ne!(check::check_outputs(&wrong, 1, &truths, &config), [""; 0], "{policy:?}, bit {bit}");
            }
            assert_ne!(check::check_outputs(&outputs, 2, &truths, &config), [""; 0], "the step");
        }
    }
}

/// The documented values of fields whose accessors say none.
#[test]
fn fields_of_nothing_are_checked() {
    let truth = truth_of(&[f32::NAN]);
    let (record, _) = measured(&[f32::NAN], Config::default());
    assert_eq!(check::check_fields("w", &record, &truth), [""; 0]);
    for wrong in [
        Record { first_nonfinite_index: u64::MAX, ..record },
        Record { mean_or_zero: -0.0, ..record },
        Record { sum_squared_deviations: f64::NAN, ..record },
        Record { sum_abs: 1e-300, ..record },
        Record { max_abs_or_zero: -0.0, ..record },
        Record { min_nonzero_abs_or_infinity: 0.0, ..record },
    ] {
        assert_eq!(check::check_fields("w", &wrong, &truth).len(), 1, "{wrong:?}");
    }
}

#[test]
fn swapped_and_missing_tensors_are_noticed() {
    let names = ["a".to_owned(), "b".to_owned()];
    let (one, two) = (sample(false), sample(true));
    let truths = [truth_of(&one), truth_of(&two)];
    let plan = Plan::new(names.iter().map(|n| (n.as_str(), DType::F32, 1000))).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::default()).unwrap();
    let report = probe.measure_host(&[HostTensor::F32(&one), HostTensor::F32(&two)]).unwrap();
    let (records, outputs) = (report.records().to_vec(), report.outputs());
    let check = |records: &[Record]| check::check_step(&names, records, outputs, 1, &truths, &Config::default());
    let same = |seen: &[Record]| check::same_step(&names, (seen, outputs), (&records, outputs));
    assert_eq!((check(&records).len(), same(&records).len()), (0, 0));
    let swapped = [records[1], records[0]];
    for complaints in [check(&swapped), same(&swapped)] {
        for name in ["a: ", "b: "] {
            assert!(complaints.iter().any(|c| c.starts_with(name)), "{complaints:?}");
        }
    }
    for list in [&records[..1], &[records[0], records[1], records[1]]] {
        assert!(!check(list).is_empty() && !same(list).is_empty(), "{} records for 2 tensors", list.len());
    }
}

#[test]
fn no_bit_of_an_element_can_differ_unnoticed() {
    for dtype in DType::ALL {
        let data = Data::of_bits(dtype, (0..9).map(|i| random_bits(dtype, 3, i)));
        let bytes = data.bytes();
        assert_eq!(check::same_elements("w", dtype.size(), bytes, bytes), [""; 0]);
        for bit in 0..8 * bytes.len() {
            let mut wrong = bytes.to_vec();
            wrong[bit / 8] ^= 1 << (bit % 8);
            let complaints = check::same_elements("w", dtype.size(), &wrong, bytes);
            let index = bit / 8 / dtype.size();
            assert!(complaints[0].starts_with(&format!("w: element {index} is 0x")), "{complaints:?}");
        }
        assert_ne!(check::same_elements("w", dtype.size(), &bytes[dtype.size()..], bytes), [""; 0]);
    }
    let (zero, negative) = (0f32.to_le_bytes(), (-0f32).to_le_bytes());
    let complaint = check::same_elements("w", 4, &[zero, negative].concat(), &[zero, zero].concat());
    assert_eq!(complaint, ["w: element 1 is 0x80000000, should be 0x00000000; 1 differ"]);
}

#[test]
fn a_written_guard_is_noticed_at_every_byte() {
    let data = Data::of_bits(DType::BF16, (0..5).map(|i| random_bits(DType::BF16, 4, i)));
    for offset in 0..crate::common::OFFSETS {
        let mut placed = Placed::new(&data, offset);
        assert_eq!(placed.bytes(), data.bytes());
        let address = placed.bytes().as_ptr() as usize;
        assert_eq!(address % 16, 2 * offset % 16, "the tensor is not where it should be");
        let start = address - placed.surroundings().as_ptr() as usize;
        let tensor = start..start + data.bytes().len();
        assert!(tensor.start >= 32 && tensor.end + 32 <= placed.surroundings().len(), "guards on both sides");
        for byte in 0..placed.surroundings().len() {
            placed.surroundings()[byte] ^= 1;
            assert_eq!(placed.guards_are_intact(), tensor.contains(&byte), "byte {byte}");
            placed.surroundings()[byte] ^= 1;
        }
    }
}
