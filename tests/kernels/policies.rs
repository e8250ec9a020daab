//! The clip policies: each against its source's rule written down once more from the paper or the code it comes from,
//! and on the kernels against the CPU.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

use crate::common::{
    cases::normal,
    host::{OnHost, coefficients},
};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, NonFinitePolicy, Plan, Probe, StepOutputs,
    TensorMut, histogram::Histogram,
};
use gradprobe_simt::{Schedule, Simt};
use half::bf16;

/// Elements of the three tensors of a step: more than a chunk, a few, none.
const LENGTHS: [usize; 3] = [40_000, 9, 0];

/// The tensors of one step.
#[derive(Clone, Debug, PartialEq)]
struct Step {
    large: Vec<f32>,
    small: Vec<bf16>,
}

impl Step {
    /// Gradients of some sizes.
    fn of(seed: u64, large: f64, small: f64) -> Self {
        let value = |tensor: u64, i: usize| normal(1000 * seed + tensor, i);
        Self {
            large: (0..LENGTHS[0]).map(|i| (large * value(0, i)) as f32).collect(),
            small: (0..LENGTHS[1]).map(|i| bf16::from_f64(small * value(1, i))).collect(),
        }
    }

    fn tensors(&self) -> [HostTensor<'_>; 3] {
        [HostTensor::F32(&self.large), HostTensor::BF16(&self.small), HostTensor::F16(&[])]
    }

    fn tensors_mut(&mut self) -> [HostTensorMut<'_>; 3] {
        [HostTensorMut::F32(&mut self.large), HostTensorMut::BF16(&mut self.small), HostTensorMut::F16(&mut [])]
    }

    fn norms(&self) -> [f64; 2] {
        let large = self.large.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        [large, self.small.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt()]
    }

    fn norm(&self) -> f64 {
        let [large, small] = self.norms();
        large.hypot(small)
    }
}

fn plan() -> Plan {
    Plan::new([("large", DType::F32, 40_000), ("small", DType::BF16, 9), ("none", DType::F16, 0)]).unwrap()
}

/// Norms as training has them: falling, noisy, with outliers.
fn run(steps: u64) -> Vec<Step> {
    let size = |s: u64| (1.0 + 10.0 / (1.0 + s as f64)) * (0.2 * normal(7, s as usize)).exp();
    let spike = |s: u64| if s % 13 == 11 { 30.0 } else { 1.0 };
    (0..steps)
        .map(|s| Step::of(s, 0.005 * size(s) * spike(s), 0.3 * size(s) * if s % 7 == 5 { 9.0 } else { 1.0 }))
        .collect()
}

/// What a probe says and leaves of each step.
fn through(probe: &mut Probe, steps: &[Step]) -> Vec<(StepOutputs, Step)> {
    let one = |step: &Step| {
        let report = probe.measure_host(&step.tensors()).unwrap();
        let mut clipped = step.clone();
        probe.clip_host(&mut clipped.tensors_mut()).unwrap();
        (*report.outputs(), clipped)
    };
    steps.iter().map(one).collect()
}

fn on_cpu(config: Config, steps: &[Step]) -> Vec<(StepOutputs, Step)> {
    through(&mut Probe::new(Cpu, plan(), config).unwrap(), steps)
}

/// Whether two numbers agree up to what norms are exact to.
fn near(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 2e-6
}

const AUTO_CLIP: Clip = Clip::Percentile { percentile: 60.0, history: 16, max_norm: None };
const Z_CLIP: Clip = Clip::ZScore { smoothing: 0.9, threshold: 2.5, warmup: 5, max_norm: None };
const ADA_GC: Clip = Clip::TensorEma { smoothing: 0.98, threshold: 1.05, warmup: 4, max_norm: None };

/// The same, with the global norm capped.
fn capped(mut clip: Clip, cap: f64) -> Clip {
    match &mut clip {
        Clip::Percentile { max_norm, .. } | Clip::ZScore { max_norm, .. } | Clip::TensorEma { max_norm, .. } => {
            *max_norm = Some(cap);
        }
        _ => panic!("{clip:?} has no cap"),
    }
    clip
}

/// Every policy, with parameters under which it clips some steps of [`run`] and leaves others.
fn configs() -> Vec<Config> {
    let policies = [
        Clip::Value { max_abs: 0.03 },
        Clip::TensorNorm { max_norm: 2.0 },
        Clip::Quantile { quantile: 0.9 },
        Clip::Quantile { quantile: 0.013 },
        AUTO_CLIP,
        Clip::Percentile { percentile: 0.0, history: 2, max_norm: None },
        Clip::Percentile { percentile: 100.0, history: 1024, max_norm: None },
        Z_CLIP,
        ADA_GC,
    ];
    let alone = policies.map(|policy| Config::default().clip(policy));
    let capped = [AUTO_CLIP, Z_CLIP, ADA_GC].map(|clip| Config::default().clip(capped(clip, 1.5)));
    alone.into_iter().chain(capped).collect()
}

/// With a step that is not finite every now and then: with NaN and a huge norm, or with Inf in a tensor that needs no
/// clip itself.
fn with_nonfinite(mut steps: Vec<Step>) -> Vec<Step> {
    for (s, step) in steps.iter_mut().enumerate().filter(|(s, _)| s % 5 == 3) {
        if s % 2 == 0 {
            step.large[s] = f32::NAN;
            step.large[s + 1] = 1e30;
        } else {
            step.small.fill(bf16::from_f32(1e-6));
            step.small[3] = bf16::NEG_INFINITY;
        }
    }
    steps
}

#[test]
fn the_kernels_decide_and_clip_as_the_cpu_does() {
    let schedules = [Schedule::Forward, Schedule::Reverse, Schedule::Shuffled(1), Schedule::Shuffled(2)];
    let steps = with_nonfinite(run(30));
    for config in configs() {
        for non_finite in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
            let config = config.clone().non_finite(non_finite);
            let expected = on_cpu(config.clone(), &steps);
            for schedule in schedules {
                let mut probe =
                    Probe::new(Simt { schedule, blocks: 3, ..Simt::default() }, plan(), config.clone()).unwrap();
                for (s, (seen, expected)) in through(&mut probe, &steps).iter().zip(&expected).enumerate() {
                    let outputs = |step: &(StepOutputs, Step)| bytemuck::bytes_of(&step.0).to_vec();
                    assert_eq!(outputs(seen), outputs(expected), "{config:?}, {schedule:?}, step {s}");
                    let bits = |step: &Step| {
                        let large: Vec<u32> = step.large.iter().map(|x| x.to_bits()).collect();
                        (large, step.small.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
                    };
                    assert!(bits(&seen.1) == bits(&expected.1), "{config:?}, {schedule:?}, step {s}: clipped");
                }
            }
        }
    }
}

/// What is not finite or skipped is never learnt from: without those steps the others are clipped the same.
#[test]
fn steps_that_are_not_finite_leave_no_trace() {
    let steps = with_nonfinite(run(60));
    let finite = |step: &Step| step.norm().is_finite();
    let clean: Vec<Step> = steps.iter().filter(|step| finite(step)).cloned().collect();
    assert!(clean.len() < steps.len());
    for config in configs() {
        for non_finite in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
            let config = config.clone().non_finite(non_finite);
            let all = on_cpu(config.clone(), &steps)
                .into_iter()
                .zip(&steps)
                .filter(|(_, step)| finite(step))
                .map(|(seen, _)| seen);
            for ((seen, left), (expected, expected_left)) in all.zip(on_cpu(config.clone(), &clean)) {
                assert_eq!(StepOutputs { step: 0, ..seen }, StepOutputs { step: 0, ..expected }, "{config:?}");
                assert!(left == expected_left, "{config:?}");
            }
        }
    }
}

#[test]
fn values_are_brought_between_the_limits() {
    let steps = run(12);
    let limit = 0.02;
    for ((outputs, clipped), step) in
        on_cpu(Config::default().clip(Clip::Value { max_abs: limit }), &steps).iter().zip(&steps)
    {
        let outside = step.large.iter().any(|x| x.abs() > limit) || step.small.iter().any(|x| x.to_f32().abs() > limit);
        assert_eq!(outputs.flags, if outside { StepOutputs::FLAG_CLIPPED } else { 0 });
        assert_eq!(outputs.coefficient, 1.0);
        let expected: Vec<f32> = step.large.iter().map(|x| x.clamp(-limit, limit)).collect();
        assert!(clipped.large == expected);
        let expected: Vec<bf16> = step.small.iter().map(|x| bf16::from_f32(x.to_f32().clamp(-limit, limit))).collect();
        assert!(clipped.small == expected);
    }
    // torch's clip_grad_value_ leaves NaN and brings Inf to the limit.
    let mut step = steps[0].clone();
    step.large[..3].copy_from_slice(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    let clip = Config::default().clip(Clip::Value { max_abs: limit });
    let propagated = &on_cpu(clip.clone().non_finite(NonFinitePolicy::Propagate), &[step.clone()])[0].1;
    assert!(propagated.large[0].is_nan() && propagated.large[1..3] == [limit, -limit]);
    let zeroed = &on_cpu(clip.clone().non_finite(NonFinitePolicy::ZeroNonFinite), &[step.clone()])[0].1;
    assert_eq!(zeroed.large[..3], [0.0; 3]);
    assert!(on_cpu(clip, &[step.clone()])[0].1.large[3..] == step.large[3..], "skipped");
}

#[test]
fn elements_are_brought_to_a_quantile_of_all() {
    let steps = run(8);
    for quantile in [0.9, 0.5, 0.013, 0.999] {
        let policy = Clip::Quantile { quantile };
        for ((outputs, clipped), step) in on_cpu(Config::default().clip(policy), &steps).iter().zip(&steps) {
            let magnitudes = |step: &Step| -> Vec<f32> {
                let small = step.small.iter().map(|x| x.to_f32().abs());
                step.large.iter().map(|x| x.abs()).chain(small).collect()
            };
            let (mut sorted, after) = (magnitudes(step), magnitudes(clipped));
            let limit = after[..LENGTHS[0]].iter().copied().fold(0.0, f32::max);
            sorted.sort_by(f32::total_cmp);
            let exact = sorted[(quantile * sorted.len() as f64).ceil() as usize - 1];
            // What is promised is the bin; a straight line in it is nearer, but in the tail, where the density falls.
            let bin = Histogram::bin_of(exact);
            let edges = Histogram::lowest_of(bin)..=Histogram::highest_of(bin).next_up();
            assert!(edges.contains(&limit), "{policy:?}: {limit} for {exact}");
            let error = f64::from(limit / exact) - 1.0;
            assert!(error.abs() < 0.02 || quantile > 0.99, "{policy:?}: {limit} for {exact}");
            assert_eq!((outputs.coefficient, outputs.flags), (1.0, StepOutputs::FLAG_CLIPPED));
            let expected: Vec<f32> = step.large.iter().map(|x| x.clamp(-limit, limit)).collect();
            assert!(clipped.large == expected);
            let expected: Vec<bf16> =
                step.small.iter().map(|x| bf16::from_f32(x.to_f32().clamp(-limit, limit))).collect();
            assert!(clipped.small == expected);
        }
    }
    // All of them: nothing is above, and nothing written.
    let all = Clip::Quantile { quantile: 1.0 };
    let (outputs, left) = &on_cpu(Config::default().clip(all), &steps[..1])[0];
    assert!(outputs.action == 0 && *left == steps[0]);
    // A quantile of 0 would take the gradient away.
    let mut sparse = steps[0].clone();
    sparse.large[2..].fill(0.0);
    let half = Clip::Quantile { quantile: 0.5 };
    let (outputs, left) = &on_cpu(Config::default().clip(half), std::slice::from_ref(&sparse))[0];
    assert!(outputs.action == 0 && *left == sparse);
}

#[test]
fn tensors_are_clipped_by_their_own_norms() {
    let steps = run(20);
    let mut probe = Probe::new(Cpu, plan(), Config::default().clip(Clip::TensorNorm { max_norm: 2.0 })).unwrap();
    for step in &steps {
        let (outputs, clipped) = &through(&mut probe, std::slice::from_ref(step))[0];
        for ((before, after), coefficient) in step.norms().into_iter().zip(clipped.norms()).zip(coefficients(&probe)) {
            assert!(near(f64::from(coefficient), (2.0 / before).min(1.0)), "{before} {coefficient}");
            // bf16 rounds a clipped element by up to 2^-9.
            assert!((after / before.min(2.0) - 1.0).abs() < 2e-3, "{before} became {after}");
        }
        let any = step.norms().iter().any(|&norm| norm > 2.0);
        assert_eq!(outputs.flags & StepOutputs::FLAG_CLIPPED != 0, any);
    }
    assert!(steps.iter().any(|step| step.norms()[0] > 2.0) && steps.iter().any(|step| step.norms()[0] < 2.0));
}

/// numpy.percentile by its definition: sort, and interpolate between the two nearest ranks.
#[test]
fn auto_clip_clips_to_a_percentile_of_the_norms_so_far() {
    let steps = run(50);
    let norms: Vec<f64> = steps.iter().map(Step::norm).collect();
    for (percentile, history) in [(60.0, 16), (10.0, 1024), (0.0, 2), (100.0, 7), (33.3, 3)] {
        let policy = Clip::Percentile { percentile, history, max_norm: None };
        let mut clipped = 0;
        for (s, (outputs, _)) in on_cpu(Config::default().clip(policy), &steps).iter().enumerate() {
            let mut known = norms[(s + 1).saturating_sub(history as usize)..=s].to_vec();
            known.sort_by(f64::total_cmp);
            let rank = percentile / 100.0 * (known.len() - 1) as f64;
            let (low, high) = (known[rank.floor() as usize], known[rank.ceil() as usize]);
            let limit = low + (high - low) * rank.fract();
            assert!(near(outputs.coefficient_f64, (limit / norms[s]).min(1.0)), "{policy:?} step {s}: {outputs:?}");
            clipped += u32::from(outputs.flags & StepOutputs::FLAG_CLIPPED != 0);
        }
        assert!(percentile == 100.0 || (10..49).contains(&clipped), "{policy:?}: {clipped}");
    }
}

/// ZClip as its authors' code has it.
#[test]
fn z_clip_follows_the_published_code() {
    let steps = run(60);
    let (alpha, threshold, warmup) = (0.9, 2.5, 5);
    for cap in [None, Some(1.5)] {
        let config = Config::default().clip(cap.map_or(Z_CLIP, |cap| capped(Z_CLIP, cap)));
        let (mut buffer, mut mean, mut variance, mut spikes) = (Vec::new(), 0.0, 0.0f64, 0);
        for (step, (outputs, _)) in steps.iter().zip(on_cpu(config.clone(), &steps)) {
            let norm = step.norm();
            let cap = cap.unwrap_or(f64::INFINITY);
            let mut limit = cap;
            if buffer.len() < warmup {
                buffer.push(norm);
                mean = buffer.iter().sum::<f64>() / buffer.len() as f64;
                variance = buffer.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / buffer.len() as f64;
                assert_eq!(outputs.flags & StepOutputs::FLAG_SPIKE, 0);
            } else {
                let std = variance.sqrt();
                let z = (norm - mean) / (std + 1e-6);
                let clip_value = (z > threshold).then(|| mean + threshold * std / (z / threshold));
                spikes += u32::from(clip_value.is_some());
                assert_eq!(outputs.flags & StepOutputs::FLAG_SPIKE != 0, clip_value.is_some(), "z = {z}");
                limit = clip_value.unwrap_or(norm).min(cap);
                mean = alpha * mean + (1.0 - alpha) * clip_value.unwrap_or(norm);
                variance = alpha * variance + (1.0 - alpha) * (clip_value.unwrap_or(norm) - mean).powi(2);
            }
            assert!(near(outputs.coefficient_f64, (limit / norm).min(1.0)), "{norm}: {outputs:?}");
        }
        assert!(spikes >= 3, "{spikes}");
    }
}

/// AdaGC as Algorithm 1 of the paper has it.
#[test]
fn ada_gc_follows_its_paper() {
    let steps = run(60);
    let (beta, relative, absolute, warmup) = (0.98, 1.05, 1.5, 4);
    let mut probe = Probe::new(Cpu, plan(), Config::default().clip(capped(ADA_GC, absolute))).unwrap();
    let (mut averages, mut clipped) = ([f64::INFINITY; 2], [0; 2]);
    for (s, step) in steps.iter().enumerate() {
        through(&mut probe, std::slice::from_ref(step));
        for (t, norm) in step.norms().into_iter().enumerate() {
            let (h, average);
            if s < warmup {
                h = (absolute / step.norm()).min(1.0);
                average = averages[t].min(h * norm);
            } else {
                h = (relative * averages[t] / norm).min(1.0);
                average = beta * averages[t] + (1.0 - beta) * h * norm;
            }
            averages[t] = average;
            clipped[t] += u32::from(h < 1.0);
            let coefficient = f64::from(coefficients(&probe)[t]);
            assert!(near(coefficient, h), "step {s}, tensor {t}: {coefficient}, should be {h}");
        }
    }
    assert!(clipped.iter().all(|&count| (10..60).contains(&count)), "{clipped:?}");
}

/// By the paper's rule a tensor with a gradient of 0 in the warm-up would stay clipped to 0.
#[test]
fn ada_gc_does_not_freeze_a_tensor_whose_gradient_was_zero() {
    let mut steps = run(20);
    steps[1].small.fill(bf16::ZERO);
    let after = on_cpu(Config::default().clip(ADA_GC), &steps);
    assert!(after[10..].iter().all(|(_, step)| step.norms()[1] > 0.1));
}

#[test]
fn parameters_out_of_range_are_refused_by_name() {
    let refused = |config: Config, expected: &str| match Probe::new(Cpu, plan(), config.clone()) {
        Err(Error::InvalidConfig { option, .. }) => assert_eq!(option, expected, "{config:?}"),
        other => panic!("{config:?}: {other:?}"),
    };
    let with = |policy| Config::default().clip(policy);
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(with(Clip::Value { max_abs: bad as f32 }), "max_abs");
        refused(with(Clip::TensorNorm { max_norm: bad }), "max_norm");
        refused(with(Clip::ZScore { smoothing: 0.9, threshold: bad, warmup: 2, max_norm: None }), "threshold");
        refused(with(Clip::TensorEma { smoothing: 0.9, threshold: bad, warmup: 2, max_norm: None }), "threshold");
    }
    for bad in [-0.1, 1.0, f64::NAN] {
        refused(with(Clip::ZScore { smoothing: bad, threshold: 2.0, warmup: 2, max_norm: None }), "smoothing");
        refused(with(Clip::TensorEma { smoothing: bad, threshold: 2.0, warmup: 2, max_norm: None }), "smoothing");
    }
    for bad in [-0.1, 100.1, f64::NAN] {
        refused(with(Clip::Percentile { percentile: bad, history: 2, max_norm: None }), "percentile");
    }
    for bad in [0.0, -0.1, 1.1, f64::NAN] {
        refused(with(Clip::Quantile { quantile: bad }), "quantile");
    }
    for history in [0, 1, 1025] {
        refused(with(Clip::Percentile { percentile: 1.0, history, max_norm: None }), "history");
    }
    refused(with(Clip::ZScore { smoothing: 0.9, threshold: 2.0, warmup: 1, max_norm: None }), "warmup");
    refused(with(Clip::TensorEma { smoothing: 0.9, threshold: 2.0, warmup: 0, max_norm: None }), "warmup");
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(with(Clip::global_norm(bad)), "max_norm");
        for clip in [AUTO_CLIP, Z_CLIP, ADA_GC] {
            refused(with(capped(clip, bad)), "max_norm");
        }
    }
}

/// A tensor that is absent for a step is clipped as though the step had not been, and the others as though it were not there.
#[test]
fn what_is_absent_is_not_learnt_from() {
    let steps = run(24);
    let capped = capped(ADA_GC, 1.5);
    for clip in [Clip::global_norm(1.5), Clip::TensorNorm { max_norm: 2.0 }, AUTO_CLIP, Z_CLIP, ADA_GC, capped] {
        let config = Config::new().clip(clip);
        let mut probes =
            [Probe::new(Cpu, plan(), config.clone()).unwrap(), Probe::new(Simt::default(), plan(), config).unwrap()];
        for (s, step) in steps.iter().enumerate() {
            let seen = probes.each_mut().map(|probe| {
                let mut step = step.clone();
                let (mut absent, [mut large, mut small, mut none]) = (Absent, step.tensors_mut());
                let small: &mut dyn TensorMut = if s % 3 == 1 { &mut absent } else { &mut small };
                probe.step(&mut [&mut large, small, &mut none]).unwrap();
                let report = probe.wait().unwrap();
                (bytemuck::bytes_of(report.outputs()).to_vec(), report.outputs().total_norm, coefficients(probe), step)
            });
            assert_eq!(seen[0].0, seen[1].0, "{clip:?}, step {s}");
            assert!(seen[0].3 == seen[1].3 && seen[0].2 == seen[1].2, "{clip:?}, step {s}");
            if s % 3 == 1 {
                assert!(near(seen[0].1, step.norms()[0]), "{clip:?}, step {s}");
                assert!(seen[0].3.small == step.small, "what is absent is not written");
                assert_eq!(seen[0].2[1], 1.0, "{clip:?}, step {s}");
            }
        }
    }
}

/// What has no elements has nothing to clip: whatever a step without average is clipped by, its coefficient is 1, and the step
/// is not said to be clipped for it.
#[test]
fn a_tensor_that_was_never_there_is_not_clipped() {
    let clip = Clip::TensorEma { smoothing: 0.9, threshold: 2.0, warmup: 1, max_norm: Some(1.0) };
    let plan = || Plan::new([("a", DType::F32, 2), ("b", DType::F32, 2), ("none", DType::F32, 0)]).unwrap();
    let config = Config::new().clip(clip);
    for mut probe in
        [Probe::new(Cpu, plan(), config.clone()).unwrap(), Probe::new(Simt::default(), plan(), config).unwrap()]
    {
        // To 1 in the warm-up; then to twice that at most, of which this is short.
        for (x, clipped) in [(5.0f32, true), (1.5, false), (3.0, true)] {
            let mut a = [x, 0.0];
            probe.step(&mut [&mut a, &mut Absent, &mut [0f32; 0]]).unwrap();
            let outputs = *probe.wait().unwrap().outputs();
            let seen = (outputs.flags & StepOutputs::FLAG_CLIPPED != 0, a[0] != x);
            assert_eq!(seen, (clipped, clipped), "{x} on {}: {outputs:?}", probe.device());
            assert_eq!(coefficients(&probe)[1..], [1.0; 2], "{x} on {}", probe.device());
        }
    }
}
