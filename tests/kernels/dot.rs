//! Dot products: against exact sums over the table of cases, with second lists of every dtype, on the CPU and, to the
//! bit, in the kernels on the host.
#![allow(unsafe_code, reason = "gives the probe bare addresses, good and bad")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

use crate::common::{
    Placed, Prepared,
    cases::{CHUNK, Data, Tensor, cases, normal, others},
    demand_none,
    host::{OnHost, plan_of},
    oracle::{Format, Number, Wide, power_of_two},
    placed, short, tensors,
};
use gradprobe::{
    Absent, Config, Cpu, DType, Error, HostTensor, Plan, Probe, RawTensor,
    dot::{Dot, DotReport},
};
use gradprobe_simt::{Schedule, Simt};
use half::bf16;
use rayon::prelude::*;

/// What is promised of each sum, in units of the sum of its terms' magnitudes.
const BOUND: f64 = 1e-12;

/// The exact sums over the pairs in which both are finite.
struct Exact {
    nonfinite_count: u64,
    dot: f64,
    magnitudes: f64,
    a_squares: f64,
    b_squares: f64,
}

impl Exact {
    fn of(a: &Data, b: &Data) -> Self {
        // In units of 2^-298, the smallest product of two f32.
        let (mut positive, mut negative, mut squares) = (Wide::ZERO, Wide::ZERO, [Wide::ZERO; 2]);
        let mut nonfinite_count = 0;
        let formats = [a, b].map(|data| Format::of(data.dtype()));
        for (x, y) in a.bits().zip(b.bits()) {
            let (
                Number::Finite { negative: x_negative, integer: x, exponent: x_exponent },
                Number::Finite { negative: y_negative, integer: y, exponent: y_exponent },
            ) = (formats[0].decode(x), formats[1].decode(y))
            else {
                nonfinite_count += 1;
                continue;
            };
            let product = |x: u32, y: u32, exponent: i32| {
                Wide::shifted(u128::from(x) * u128::from(y), (exponent + 298).cast_unsigned())
            };
            let sum = if x_negative == y_negative { &mut positive } else { &mut negative };
            *sum = sum.plus(&product(x, y, x_exponent + y_exponent));
            squares[0] = squares[0].plus(&product(x, x, 2 * x_exponent));
            squares[1] = squares[1].plus(&product(y, y, 2 * y_exponent));
        }
        let unit = power_of_two(-298);
        let dot =
            if positive < negative { -negative.minus(&positive).to_f64() } else { positive.minus(&negative).to_f64() };
        Self {
            nonfinite_count,
            dot: dot * unit,
            magnitudes: positive.plus(&negative).to_f64() * unit,
            a_squares: squares[0].to_f64() * unit,
            b_squares: squares[1].to_f64() * unit,
        }
    }

    fn check(&self, name: &str, count: usize, seen: &Dot) -> Vec<String> {
        let mut complaints = Vec::new();
        let counts = (seen.count, seen.nonfinite_count, seen.reserved);
        if counts != (count as u64, self.nonfinite_count, 0) {
            complaints.push(format!("{name}: {counts:?} of {count} pairs, {} not finite", self.nonfinite_count));
        }
        for (what, seen, exact, scale) in [
            ("dot", seen.dot, self.dot, self.magnitudes),
            ("a²", seen.a_squares, self.a_squares, self.a_squares),
            ("b²", seen.b_squares, self.b_squares, self.b_squares),
        ] {
            let error = (seen - exact).abs();
            if error.is_nan() || error > BOUND * scale {
                complaints.push(format!("{name}: {what} {seen:e}, should be {exact:e}"));
            }
        }
        let norms = (self.a_squares.sqrt(), self.b_squares.sqrt());
        let cosine = (norms.0 > 0.0 && norms.1 > 0.0).then(|| self.dot / norms.0 / norms.1);
        let same = match (seen.cosine(), cosine) {
            (Some(seen), Some(exact)) => (seen - exact).abs() <= 1e-6 && seen.abs() <= 1.0,
            (seen, exact) => seen.is_none() && exact.is_none(),
        };
        if !same {
            complaints.push(format!("{name}: cosine {:?}, should be {cosine:?}", seen.cosine()));
        }
        complaints
    }
}

/// The dot products of a case, both lists placed at misalignments of their own.
fn run(probe: &mut Probe, a: &[Data], b: &[Data], offset: usize) -> DotReport {
    let (a, b) = (placed(a, offset, 1), placed(b, offset, offset));
    let (a, b): (Vec<_>, Vec<_>) = (a.iter().map(Placed::tensor).collect(), b.iter().map(Placed::tensor).collect());
    probe.dot_host(&a, &b).unwrap()
}

fn cpu(prepared: &Prepared) -> Probe {
    Probe::new(Cpu, prepared.plan(), Config::new().dot()).unwrap()
}

/// A probe on the CPU, and one on the kernels.
fn probes(plan: &Plan, config: &Config) -> [Probe; 2] {
    let on_cpu = Probe::new(Cpu, plan.clone(), config.clone()).unwrap();
    [on_cpu, Probe::new(Simt::default(), plan.clone(), config.clone()).unwrap()]
}

fn bytes(report: &DotReport) -> &[u8] {
    bytemuck::cast_slice(report.records())
}

#[test]
fn every_case_is_within_the_bounds_and_the_kernels_have_the_same_bits() {
    let mut complaints = Vec::new();
    for case in cases().iter().filter(|case| !case.large) {
        let prepared = Prepared::new(case);
        let b = others(case);
        let expected = cpu(&prepared).dot_host(&tensors(&prepared.data), &tensors(&b)).unwrap();
        let exact: Vec<Exact> = prepared.data.par_iter().zip(&b).map(|(a, b)| Exact::of(a, b)).collect();
        let mut found = Vec::new();
        for (((name, a), seen), exact) in prepared.names.iter().zip(&prepared.data).zip(expected.records()).zip(&exact)
        {
            found.extend(exact.check(name, a.len(), seen));
        }
        let mut simt = Probe::new(Simt::default(), prepared.plan(), Config::new().dot()).unwrap();
        let offsets: &[usize] = if short() { &[1] } else { &[0, 1, 8] };
        for &offset in offsets {
            let seen =
                [run(&mut simt, &prepared.data, &b, offset), run(&mut cpu(&prepared), &prepared.data, &b, offset)];
            for (seen, name) in seen.iter().zip(["simt", "cpu"]) {
                if bytes(seen) != bytes(&expected) {
                    found.push(format!("{name} has other bits at offset {offset}"));
                }
            }
        }
        complaints.extend(found.into_iter().map(|c| format!("{}: {c}", case.name)));
    }
    demand_none(&complaints);
}

#[test]
fn no_order_and_no_grid_changes_a_bit() {
    let schedules = [Schedule::Reverse].into_iter().chain((0..6).map(Schedule::Shuffled));
    // Some hundred chunks, so that spans merge too.
    let long = |dtype: DType, seed| Tensor::of_values(dtype, 129 * CHUNK + 77, move |i| normal(seed, i)).data();
    let a = [
        long(DType::BF16, 1),
        Data::of_bits(DType::F32, [1.0f32, -2.0, 3.0].map(f32::to_bits).into_iter()),
        long(DType::F32, 2),
    ];
    let b = [long(DType::F32, 3), Data::of_bits(DType::F16, (0..3).map(|_| 0x3c00)), long(DType::F16, 4)];
    let plan = plan_of(["x", "y", "z"].into_iter().zip(tensors(&a))).unwrap();
    let config = Config::new().dot();
    let mut probe = Probe::new(Cpu, plan.clone(), config.clone()).unwrap();
    let expected = probe.dot_host(&tensors(&a), &tensors(&b)).unwrap();
    for (schedule, blocks) in schedules.zip([1, 2, 3, 64, 5, 1000, 7]) {
        let mut simt = Probe::new(Simt { schedule, blocks, ..Simt::default() }, plan.clone(), config.clone()).unwrap();
        for call in 0..2 {
            let seen = run(&mut simt, &a, &b, call);
            assert_eq!(bytes(&seen), bytes(&expected), "{schedule:?}, {blocks} blocks, call {call}");
        }
        // What measures shares the counters with it.
        simt.measure_host(&tensors(&a)).unwrap();
        assert_eq!(bytes(&run(&mut simt, &a, &b, 0)), bytes(&expected));
    }
}

#[test]
fn known_answers() {
    let (x, y) =
        ([3.0f32, 0.0, -4.0, f32::NAN, 1e38], [bf16::from_f32(2.0), bf16::ONE, bf16::ONE, bf16::ONE, bf16::INFINITY]);
    let plan = || Plan::new([("x", DType::F32, 5), ("none", DType::F16, 0)]).unwrap();
    let mut probe = Probe::new(Cpu, plan(), Config::new().dot()).unwrap();
    let lists = |b| ([HostTensor::F32(&x), HostTensor::F16(&[])], [b, HostTensor::BF16(&[])]);
    let (a, b) = lists(HostTensor::BF16(&y));
    let report = probe.dot_host(&a, &b).unwrap();
    let dot = report.records()[0];
    assert_eq!((dot.count, dot.nonfinite_count, dot.dot), (5, 2, 2.0));
    assert_eq!((dot.a_norm(), dot.b_norm()), (5.0, 6f64.sqrt()));
    assert_eq!(dot.cosine(), Some(2.0 / (5.0 * 6f64.sqrt())));
    assert_eq!((report.records()[1], report.records()[1].cosine()), (Dot::default(), None));
    assert_eq!(report.total(), dot);
    let text = report.to_string();
    assert_eq!(text.lines().count(), 4, "{text}");
    assert!(text.lines().nth(1).unwrap().contains(" 0.1633 "), "{text}");
    // The same memory twice: cosine 1; scaled by -1: -1.
    let (a, b) = lists(HostTensor::F32(&x));
    assert!((probe.dot_host(&a, &b).unwrap().total().cosine().unwrap() - 1.0).abs() < 1e-12);
    let minus = x.map(|x| -x);
    let (a, b) = lists(HostTensor::F32(&minus));
    assert!((probe.dot_host(&a, &b).unwrap().total().cosine().unwrap() + 1.0).abs() < 1e-12);
    let bytes = |config: Config| config.bytes(&plan()).unwrap();
    assert_eq!(bytes(Config::new().dot()) - bytes(Config::new()), 48 + 2 * 64);
}

#[test]
fn what_cannot_be_right_is_an_error_that_names_the_tensor() {
    let plan = || Plan::new([("first", DType::F32, 3), ("second", DType::BF16, 2)]).unwrap();
    let (three, two, two_f32) = ([1.0f32; 3], [bf16::ONE; 2], [2.0f32; 2]);
    let good = [HostTensor::F32(&three), HostTensor::BF16(&two)];
    for mut probe in probes(&plan(), &Config::new()) {
        let undeclared = probe.dot_host(&good, &good).map(drop);
        assert_eq!(undeclared, Err(Error::NotDeclared { declare: "Config::dot" }));
    }
    for mut probe in probes(&plan(), &Config::new().dot()) {
        for lists in [(&good[..], &good[..1]), (&good[..1], &good[..])] {
            let refused = probe.dot_host(lists.0, lists.1).map(drop);
            assert_eq!(refused, Err(Error::TensorCount { planned: 2, given: 1, first: Some("second".to_owned()) }));
        }
        let wide = [good[0], HostTensor::F32(&two_f32)];
        let refused = probe.dot_host(&wide, &good).map(drop);
        assert!(matches!(refused, Err(Error::TensorMismatch { name, .. }) if name == "second"), "dtypes of the first");
        let long = [good[0], HostTensor::F32(&three)];
        let refused = probe.dot_host(&good, &long).map(drop);
        assert!(
            matches!(refused, Err(Error::TensorMismatch { name, .. }) if name == "second"),
            "lengths of the second"
        );
        assert_eq!(probe.dot_host(&good, &wide).unwrap().total().dot, 3.0 + 4.0);
        assert_eq!(probe.measure_host(&good).unwrap().step(), 1, "a dot product is no step");
    }
    for mut probe in probes(&plan(), &Config::new().dot()) {
        let mut dot = probe.dot().unwrap();
        let raw = |tensor: HostTensor<'_>| {
            let address = tensor.as_bytes().as_ptr() as u64;
            // SAFETY: the tensors live, and may be read as often as one likes.
            unsafe { RawTensor::new(address, tensor.len() as u64, tensor.dtype()) }
        };
        let (a, name) = (good.map(raw), || "second".to_owned());
        let odd = a[1].address() + 1;
        for (address, expected) in [
            (0, Error::NullPointer { name: name() }),
            (odd, Error::MisalignedPointer { name: name(), address: odd, size: 2 }),
            (u64::MAX - 1, Error::AddressOverflow { name: name(), address: u64::MAX - 1, length: 2 }),
        ] {
            // SAFETY: it is refused, so nothing is read.
            let wrong = unsafe { RawTensor::new(address, 2, DType::BF16) };
            assert_eq!(dot.measure(&[&a[0], &a[1]], &[&a[0], &wrong]).map(drop), Err(expected.clone()));
            assert_eq!(dot.measure(&[&a[0], &wrong], &[&a[0], &a[1]]).map(drop), Err(expected));
        }
        let same = dot.measure(&[&a[0], &a[1]], &[&a[0], &a[1]]).unwrap();
        assert_eq!(same.records()[0].dot, 3.0);
    }
}

/// Of two tensors where either is absent there is nothing, and the other tensors have what they had.
#[test]
fn a_tensor_that_is_absent_in_either_list_has_an_empty_record() {
    let (a, b) = ([1.0f32, 2.0, f32::NAN], vec![bf16::ONE; 40_000]);
    let plan = Plan::new([("a", DType::F32, 3), ("b", DType::BF16, 40_000)]).unwrap();
    for mut probe in probes(&plan, &Config::new().dot()) {
        let mut dot = probe.dot().unwrap();
        let both = dot.measure(&[&a, &b], &[&a, &b]).unwrap();
        let [of_a, of_b] = *both.records() else { panic!("{both}") };
        assert_eq!((of_a.dot, of_b.dot), (5.0, 40_000.0));
        let none = Dot::default();
        for (report, expected) in [
            (dot.measure(&[&a, &Absent], &[&a, &b]), [of_a, none]),
            (dot.measure(&[&a, &b], &[&a, &b]), [of_a, of_b]),
            (dot.measure(&[&a, &b], &[&a, &None::<Vec<bf16>>]), [of_a, none]),
            (dot.measure(&[&Absent, &b], &[&Some(a), &b]), [none, of_b]),
            (dot.measure(&[&a, &Absent], &[&Absent, &b]), [none, none]),
            (dot.measure(&[&a, &b], &[&Absent, &Absent]), [none, none]),
            (dot.measure(&[&a, &b], &[&a, &b]), [of_a, of_b]),
        ] {
            let report = report.unwrap();
            assert_eq!(bytes(&report), bytemuck::cast_slice::<_, u8>(&expected), "{report}");
            assert_eq!(report.total(), expected[0].merge(&expected[1]));
        }
        assert_eq!(dot.measure(&[&Absent, &Absent], &[&a, &b]).map(drop), Err(Error::AllAbsent));
    }
}
