//! Adaptive gradient clipping: against the paper's rule written down once more, element by element, and in the kernels on
//! the host against the CPU.
#![allow(unsafe_code, reason = "gives the probe bare addresses")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

use crate::common::{
    Placed,
    cases::{Data, Tensor, lognormal, nearest, normal},
    host::OnHost,
    oracle::Format,
    placed,
};
use gradprobe::{
    Absent, Config, Cpu, DType, Error, HostTensor, HostTensorMut, NonFinitePolicy, Plan, Probe, RawTensor,
    clip::{AdaptiveClip, AdaptiveClipReport, AdaptiveRecord},
};
use gradprobe_simt::{Schedule, Simt};

/// Elements of a tensor, of a unit of it, and the types of gradient and weight.
const SHAPES: [(usize, usize, DType, DType); 12] = [
    (6 * 768, 768, DType::BF16, DType::F32),
    (9 * 1000, 9, DType::F32, DType::F32),
    (64, 64, DType::F32, DType::BF16),
    (0, 5, DType::F16, DType::F16),
    (5 * 1025, 1025, DType::F16, DType::BF16),
    (40, 1, DType::BF16, DType::BF16),
    (2 * 40_001, 40_001, DType::F32, DType::F32),
    (100_000, 100_000, DType::BF16, DType::F16),
    (333, 0, DType::F32, DType::F32),
    (7 * 13, 13, DType::F16, DType::F32),
    (3 * 2048, 2048, DType::BF16, DType::BF16),
    (2, 2, DType::F32, DType::F32),
];

/// Gradients and weights whose units lie on both sides of the rule.
fn lists() -> [Vec<Data>; 2] {
    let of = |t: usize, unit: usize, dtype: DType, len: usize, size: f64| {
        // Every unit has a size of its own.
        let scale = move |i: usize| size * lognormal(900 + t as u64, i / unit.max(1), 3.0).abs();
        Tensor::of_values(dtype, len, move |i| scale(i) * normal(t as u64, i)).data()
    };
    let gradients = SHAPES.iter().enumerate().map(|(t, &(len, unit, dtype, _))| of(t, unit, dtype, len, 1e-3));
    let weights = SHAPES.iter().enumerate().map(|(t, &(len, unit, _, dtype))| of(t + 50, unit, dtype, len, 0.1));
    [gradients.collect(), weights.collect()]
}

fn clip() -> AdaptiveClip {
    AdaptiveClip::new(SHAPES.map(|(_, unit, _, _)| unit as u64))
}

fn plan() -> Plan {
    Plan::new(SHAPES.iter().enumerate().map(|(t, &(len, _, dtype, _))| (format!("t{t}"), dtype, len as u64))).unwrap()
}

/// What a probe makes of the gradients, at misalignments of their own.
fn run(probe: &mut Probe, [gradients, weights]: &[Vec<Data>; 2], offset: usize) -> (Vec<Vec<u8>>, AdaptiveClipReport) {
    let (mut gradients, weights) = (placed(gradients, offset, 1), placed(weights, offset, offset));
    probe.measure_host(&gradients.iter().map(Placed::tensor).collect::<Vec<_>>()).unwrap();
    let weights: Vec<HostTensor> = weights.iter().map(Placed::tensor).collect();
    let mut views: Vec<HostTensorMut> = gradients.iter_mut().map(Placed::tensor_mut).collect();
    let report = probe.clip_adaptively_host(&mut views, &weights).unwrap();
    assert!(gradients.iter().all(Placed::guards_are_intact), "something was written beside a tensor");
    (gradients.iter().map(|placed| placed.bytes().to_vec()).collect(), report)
}

/// The same with a probe made for it.
fn on_cpu(config: Config, clip: &AdaptiveClip, lists: &[Vec<Data>; 2]) -> (Vec<Vec<u8>>, AdaptiveClipReport) {
    let mut probe = Probe::new(Cpu, plan(), config.adaptive_clip(clip.clone())).unwrap();
    run(&mut probe, lists, 0)
}

/// The coefficient of a unit by the paper: λ·max(‖w‖, ε)/‖g‖ where that is below 1.
fn by_the_paper(gradient: &[f64], weight: &[f64]) -> f64 {
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let limit = 0.01 * norm(weight).max(1e-3);
    if norm(gradient) > limit { limit / norm(gradient) } else { 1.0 }
}

#[test]
fn units_are_clipped_by_the_papers_rule() {
    let lists = lists();
    let (clipped, report) = on_cpu(Config::default(), &clip(), &lists);
    let (mut units_clipped, mut units_left) = (0, 0);
    for (t, &(len, unit, dtype, weight_dtype)) in SHAPES.iter().enumerate() {
        let format = Format::of(dtype);
        let values =
            |data: &Data, dtype: DType| -> Vec<f64> { data.bits().map(|bits| Format::of(dtype).value(bits)).collect() };
        let (g, w) = (values(&lists[0][t], dtype), values(&lists[1][t], weight_dtype));
        let after = Data::of_bits(
            dtype,
            clipped[t]
                .chunks_exact(dtype.size())
                .map(|bytes| bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte))),
        );
        if unit == 0 {
            assert_eq!(after.bytes(), lists[0][t].bytes(), "t{t} is to be left alone");
            assert_eq!(report.units(t), 0);
            continue;
        }
        assert_eq!(report.units(t), (len / unit) as u64);
        let (after, before): (Vec<u32>, Vec<u32>) = (after.bits().collect(), lists[0][t].bits().collect());
        let mut expected = AdaptiveRecord::default();
        let mut smallest = 1f64;
        for first in (0..len).step_by(unit) {
            let coefficient = by_the_paper(&g[first..first + unit], &w[first..first + unit]);
            if coefficient == 1.0 {
                units_left += 1;
                assert_eq!(after[first..first + unit], before[first..first + unit], "t{t}, unit at {first}");
                continue;
            }
            units_clipped += 1;
            expected.clipped += 1;
            smallest = smallest.min(coefficient);
            for i in first..first + unit {
                // Coefficient and product are rounded to f32, then the product to its type: a few units in the last
                // place of the coarsest, or the smallest subnormal.
                let (seen, wanted) = (format.value(after[i]), coefficient * g[i]);
                let rounding = match dtype {
                    DType::F32 => 2e-7,
                    DType::F16 => 6e-4,
                    DType::BF16 => 4.1e-3,
                };
                let least = format.value(1);
                assert!(
                    (seen - wanted).abs() <= rounding * wanted.abs() + least,
                    "t{t}[{i}]: {seen:e}, not {wanted:e}"
                );
            }
        }
        let record = report.records()[t];
        assert_eq!((record.clipped, record.nonfinite, record.reserved), (expected.clipped, 0, 0), "t{t}");
        let error = f64::from(record.smallest_coefficient()) / smallest - 1.0;
        assert!(error.abs() < 1e-6, "t{t}: {record:?}, should be {smallest}");
    }
    assert!(units_clipped > 100 && units_left > 100, "{units_clipped} clipped, {units_left} left");
    let share = f64::from(units_clipped) / f64::from(units_clipped + units_left);
    assert!((report.clipped_fraction().unwrap() - share).abs() < 1e-12);
    let text = report.to_string();
    assert_eq!(text.lines().count(), 1 + SHAPES.len(), "{text}");
}

#[test]
fn no_order_no_grid_and_no_place_changes_a_bit() {
    let lists = lists();
    let expected = on_cpu(Config::default(), &clip(), &lists);
    let schedules = [Schedule::Forward, Schedule::Reverse].into_iter().chain((0..5).map(Schedule::Shuffled));
    for ((schedule, blocks), offset) in schedules.zip([0, 1, 2, 64, 5, 2000, 7]).zip([0, 8, 3, 1, 15, 2, 6]) {
        let config = Config::new().adaptive_clip(clip());
        let mut probe = Probe::new(Simt { schedule, blocks, ..Simt::default() }, plan(), config).unwrap();
        for call in 0..2 {
            let (clipped, report) = run(&mut probe, &lists, offset + call);
            assert!(clipped == expected.0, "{schedule:?}, {blocks} blocks, call {call}");
            assert_eq!(report.records(), expected.1.records(), "{schedule:?}, {blocks} blocks, call {call}");
        }
    }
}

#[test]
fn what_is_not_finite_goes_by_the_policy() {
    let mut lists = lists();
    let edit = |data: &mut Data, index: usize, value: f32| match data {
        Data::F32(x) => x[index] = value,
        Data::F16(x) => x[index] = half::f16::from_f32(value),
        Data::BF16(x) => x[index] = half::bf16::from_f32(value),
    };
    edit(&mut lists[0][0], 770, f32::NAN);
    edit(&mut lists[0][1], 17, f32::NEG_INFINITY);
    // Of the tensor that is left alone.
    edit(&mut lists[0][8], 5, f32::NAN);
    edit(&mut lists[1][10], 3, f32::INFINITY);
    edit(&mut lists[1][11], 0, f32::NAN);
    for policy in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
        let config = Config::default().non_finite(policy);
        let (clipped, report) = on_cpu(config.clone(), &clip(), &lists);
        for schedule in [Schedule::Forward, Schedule::Shuffled(9)] {
            let config = config.clone().adaptive_clip(clip());
            let mut probe = Probe::new(Simt { schedule, blocks: 3, ..Simt::default() }, plan(), config).unwrap();
            let seen = run(&mut probe, &lists, 5);
            assert!(seen.0 == clipped && seen.1.records() == report.records(), "{policy:?}");
        }
        let bf16 = |index: usize| {
            half::bf16::from_bits(u16::from_le_bytes([clipped[0][2 * index], clipped[0][2 * index + 1]]))
        };
        let nonfinite: Vec<u64> = report.records().iter().map(|record| record.nonfinite).collect();
        match policy {
            NonFinitePolicy::Skip => {
                let before: Vec<Vec<u8>> = lists[0].iter().map(|data| data.bytes().to_vec()).collect();
                assert!(clipped == before, "a step that is skipped stays as it is");
                assert_eq!(nonfinite, [0; 12]);
            }
            NonFinitePolicy::Propagate => {
                assert_eq!(nonfinite[..3], [1, 1, 0]);
                assert!((768..2 * 768).all(|i| bf16(i).is_nan()) && !bf16(767).is_nan() && !bf16(2 * 768).is_nan());
            }
            NonFinitePolicy::ZeroNonFinite => {
                assert_eq!(nonfinite[..3], [1, 1, 0]);
                assert_eq!(bf16(770).to_f32(), 0.0);
                assert_eq!(clipped[8][20..24], [0; 4]);
                assert!((768..2 * 768).all(|i| bf16(i).is_finite()));
            }
        }
    }
}

#[test]
fn weights_of_zero_leave_room_for_a_gradient() {
    let (mut gradient, weight) = ([3.0f32, 4.0, 0.0, 1e-6], [0.0f32; 4]);
    let plan = Plan::new([("bias", DType::F32, 4)]).unwrap();
    let config = Config::new().adaptive_clip(AdaptiveClip::new([2]).clipping(0.1).epsilon(0.5));
    let mut probe = Probe::new(Cpu, plan, config).unwrap();
    probe.measure_host(&[HostTensor::F32(&gradient)]).unwrap();
    let report =
        probe.clip_adaptively_host(&mut [HostTensorMut::F32(&mut gradient)], &[HostTensor::F32(&weight)]).unwrap();
    assert!((gradient[0] - 0.03).abs() < 1e-8 && (gradient[1] - 0.04).abs() < 1e-8, "{gradient:?}");
    assert_eq!((gradient[2], gradient[3]), (0.0, 1e-6));
    assert_eq!((report.records()[0].clipped, report.clipped_fraction()), (1, Some(0.5)));
}

#[test]
fn what_cannot_be_right_is_refused_and_changes_nothing() {
    let plan = || Plan::new([("a", DType::F32, 6), ("b", DType::F16, 4)]).unwrap();
    let (a, b) = (nearest_all(DType::F32, 6), nearest_all(DType::F16, 4));
    fn devices(plan: Plan, config: Config) -> [Result<Probe, Error>; 2] {
        [Probe::new(Cpu, plan.clone(), config.clone()), Probe::new(Simt::default(), plan, config)]
    }
    for (rule, expected) in [
        (AdaptiveClip::new([3]), Error::TensorCount { planned: 2, given: 1, first: Some("b".to_owned()) }),
        (AdaptiveClip::new([3, 3]), Error::UnitLength { name: "b".to_owned(), length: 4, unit: 3 }),
    ] {
        for refused in devices(plan(), Config::new().adaptive_clip(rule)) {
            assert_eq!(refused.err(), Some(expected.clone()));
        }
    }
    for (rule, wrong) in [
        (AdaptiveClip::new([3, 4]).clipping(0.0), "clipping"),
        (AdaptiveClip::new([3, 4]).clipping(f64::NAN), "clipping"),
        (AdaptiveClip::new([3, 4]).epsilon(-1.0), "epsilon"),
        (AdaptiveClip::new([3, 4]).epsilon(f64::INFINITY), "epsilon"),
    ] {
        for refused in devices(plan(), Config::new().adaptive_clip(rule)) {
            let refused = refused.err();
            assert!(matches!(&refused, Some(Error::InvalidConfig { option, .. }) if *option == wrong), "{refused:?}");
        }
    }
    let (mut x, mut y) = (a.clone(), b.clone());
    let weights = [a.tensor(), b.tensor()];
    let mut clip = |probe: &mut Probe, weights: &[HostTensor<'_>]| {
        probe.clip_adaptively_host(&mut [x.tensor_mut(), y.tensor_mut()], weights).map(drop)
    };
    for probe in devices(plan(), Config::new()) {
        let not_declared = Error::NotDeclared { declare: "Config::adaptive_clip" };
        assert_eq!(clip(&mut probe.unwrap(), &weights), Err(not_declared));
    }
    for probe in devices(plan(), Config::new().adaptive_clip(AdaptiveClip::new([3, 4]))) {
        let mut probe = probe.unwrap();
        assert_eq!(clip(&mut probe, &weights), Err(Error::NotMeasured));
        assert!(probe.adaptive_clip().unwrap().report().is_err_and(|error| error == Error::NotMeasured));
        probe.measure_host(&weights).unwrap();
        assert_eq!(
            clip(&mut probe, &weights[..1]),
            Err(Error::TensorCount { planned: 2, given: 1, first: Some("b".to_owned()) })
        );
        let refused = clip(&mut probe, &[weights[0], weights[0]]);
        assert!(matches!(&refused, Err(Error::TensorMismatch { name, .. }) if name == "b"), "{refused:?}");
    }
    assert_eq!((x.bytes(), y.bytes()), (a.bytes(), b.bytes()));

    // Weights that share memory with a gradient, which only bare addresses can.
    let config = Config::new().adaptive_clip(AdaptiveClip::new([3, 4]));
    let mut probe = Probe::new(Simt::default(), plan(), config).unwrap();
    let raw = |data: &Data, skipped: u64| {
        let tensor = data.tensor();
        let address = tensor.as_bytes().as_ptr() as u64 + 4 * skipped;
        // SAFETY: the elements live, and where they might be written the call is refused.
        unsafe { RawTensor::new(address, tensor.len() as u64 - 2 * skipped, tensor.dtype()) }
    };
    let (wide_a, wide_b) = (a.widened(), b.widened());
    let [mut g_a, mut g_b] = [raw(&a, 0), raw(&b, 0)];
    probe.measure(&[&g_a, &g_b]).unwrap();
    let (elsewhere, shifted) = (raw(&wide_a, 0), raw(&a, 1));
    let refused = probe.adaptive_clip().unwrap().clip(&mut [&mut g_a, &mut g_b], &[&elsewhere, &shifted]);
    assert_eq!(refused, Err(Error::Overlap { first: "a".to_owned(), second: "weight of b".to_owned() }));
    drop(wide_b);
}

/// A gradient or a weight that is not given: its units are left as they are.
#[test]
fn what_is_absent_is_left_alone() {
    let plan = || Plan::new([("a", DType::F32, 4), ("b", DType::F32, 4), ("c", DType::F32, 4)]).unwrap();
    let config = Config::new().adaptive_clip(AdaptiveClip::new([2, 2, 2]));
    let results = [Probe::new(Cpu, plan(), config.clone()), Probe::new(Simt::default(), plan(), config)].map(|probe| {
        let mut probe = probe.unwrap();
        let (mut a, mut c, weight) = ([1.0f32; 4], [1.0f32; 4], [0.5f32; 4]);
        probe.measure(&[&a, &Absent, &c]).unwrap();
        let mut room = probe.adaptive_clip().unwrap();
        room.clip(&mut [&mut a, &mut Absent, &mut c], &[&weight, &weight, &Absent]).unwrap();
        (a, c, room.report().unwrap().records().to_vec())
    });
    assert_eq!(results[0], results[1]);
    let (a, c, records) = &results[0];
    assert!(a[0] < 0.01 && *c == [1.0; 4], "{a:?} {c:?}");
    assert_eq!(records.iter().map(|record| record.clipped).collect::<Vec<_>>(), [2, 0, 0]);
}

/// Some numbers.
fn nearest_all(dtype: DType, len: usize) -> Data {
    Data::of_bits(dtype, (0..len).map(|i| nearest(dtype, normal(3, i))))
}

#[test]
fn units_of_the_paper_follow_from_the_shapes() {
    let shapes: [&[u64]; 7] = [&[3, 2], &[2, 3, 2, 2], &[4], &[], &[4, 1], &[1, 4], &[0, 1 << 40, 1 << 40]];
    let lengths = shapes.map(|shape| shape.iter().fold(1u64, |product, &length| product.wrapping_mul(length)));
    let plan = Plan::new(lengths.iter().enumerate().map(|(t, &len)| (t.to_string(), DType::F32, len))).unwrap();
    let agc = AdaptiveClip::agc(0.01);
    let refused = Probe::new(Cpu, plan.clone(), Config::new().adaptive_clip(agc.clone())).map(drop).unwrap_err();
    assert_eq!(refused, Error::WithoutShapes);
    let plan = plan.with_shapes(shapes).unwrap();
    let report = |clip: AdaptiveClip| {
        let mut probe = Probe::new(Cpu, plan.clone(), Config::new().adaptive_clip(clip)).unwrap();
        let mut gradients: Vec<Vec<f32>> =
            lengths.iter().map(|&len| (0..len).map(|i| [1e-4, 1.0, 0.3][(i % 3) as usize]).collect()).collect();
        let weights: Vec<Vec<f32>> = gradients.iter().map(|list| vec![1.0; list.len()]).collect();
        let read: Vec<&dyn gradprobe::Tensor> = gradients.iter().map(|list| list as _).collect();
        probe.measure(&read).unwrap();
        let mut changed: Vec<&mut dyn gradprobe::TensorMut> = gradients.iter_mut().map(|list| list as _).collect();
        let weights: Vec<&dyn gradprobe::Tensor> = weights.iter().map(|list| list as _).collect();
        let mut room = probe.adaptive_clip().unwrap();
        room.clip(&mut changed, &weights).unwrap();
        let report = room.report().unwrap();
        let units: Vec<u64> = (0..lengths.len()).map(|t| report.units(t)).collect();
        (units, report.records().to_vec(), gradients)
    };
    let of_shapes = report(agc);
    assert_eq!(of_shapes.0, [3, 2, 1, 1, 4, 1, 0]);
    assert_eq!(of_shapes, report(AdaptiveClip::new([2, 12, 4, 1, 1, 4, 0])));
    assert_eq!(of_shapes.1[4].clipped, 2, "of elements 1e-4, 1, 0.3, 1e-4, each a unit");
    assert_ne!(of_shapes.1, report(AdaptiveClip::agc(0.5)).1);
}
