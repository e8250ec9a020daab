//! Gradients of a scaled loss: everything is decided as it would be without the scale, on the CPU and in the kernels on
//! the host; and the scale adapts as torch's does. What a single step's statistics are is in the table of cases.
#![allow(unsafe_code, reason = "writes the scale where a kernel would")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

use crate::common::{
    cases::normal,
    host::{OnHost, loss_scale},
};
use gradprobe::{
    Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, NonFinitePolicy, Plan, Probe, Report, StepOutputs,
    clip::{AdaptiveClip, LossScale},
    gsnr::GsnrConfig,
    histogram::Format,
};
use gradprobe_simt::{Schedule, Simt};

const LENGTHS: [usize; 3] = [40_000, 9, 0];

/// The tensors of one step, f32 so that a power of two scales them exactly.
type Step = [Vec<f32>; 3];

fn plan() -> Plan {
    Plan::new(["large", "small", "none"].into_iter().zip(LENGTHS).map(|(n, len)| (n, DType::F32, len as u64))).unwrap()
}

fn step(seed: u64) -> Step {
    let size = [3e-3, 0.3, 0.0].map(|size| size * (1.0 + (seed % 5) as f64));
    [0, 1, 2].map(|t| (0..LENGTHS[t]).map(|i| (size[t] * normal(10 * seed + t as u64, i)) as f32).collect())
}

fn scaled(step: &Step, scale: f32) -> Step {
    step.clone().map(|tensor| tensor.into_iter().map(|x| x * scale).collect())
}

fn tensors(step: &Step) -> [HostTensor<'_>; 3] {
    step.each_ref().map(|tensor| HostTensor::F32(tensor))
}

fn tensors_mut(step: &mut Step) -> [HostTensorMut<'_>; 3] {
    step.each_mut().map(|tensor| HostTensorMut::F32(tensor))
}

fn simt(schedule: Schedule, config: Config) -> Probe {
    Probe::new(Simt { schedule, blocks: 3, ..Simt::default() }, plan(), config).unwrap()
}

fn cpu(config: Config) -> Probe {
    Probe::new(Cpu, plan(), config.clone()).unwrap()
}

/// Measures and clips.
fn one(probe: &mut Probe, step: &Step) -> (Report, Step) {
    let report = probe.measure_host(&tensors(step)).unwrap();
    let mut clipped = step.clone();
    probe.clip_host(&mut tensors_mut(&mut clipped)).unwrap();
    (report, clipped)
}

fn near(a: f64, b: f64) -> bool {
    a == b || (a / b - 1.0).abs() < 2e-6
}

const POLICIES: [Clip; 8] = [
    Clip::None,
    Clip::Value { max_abs: 0.02 },
    Clip::TensorNorm { max_norm: 0.9 },
    Clip::Quantile { quantile: 0.9 },
    Clip::Percentile { percentile: 40.0, history: 16, max_norm: None },
    Clip::ZScore { smoothing: 0.9, threshold: 0.5, warmup: 3, max_norm: None },
    Clip::TensorEma { smoothing: 0.98, threshold: 1.05, warmup: 3, max_norm: None },
    Clip::TensorNorm { max_norm: 1e9 },
];

fn configs() -> Vec<Config> {
    let capped = Config::default().clip(Clip::global_norm(0.8));
    POLICIES.map(|policy| Config::default().clip(policy)).into_iter().chain([capped]).collect()
}

/// A power of two changes no digit: every policy decides the same and leaves the same gradients, unscaled, whatever the
/// scale of a step.
#[test]
fn a_power_of_two_changes_nothing_but_the_units() {
    for config in configs() {
        let mut plain = cpu(config.clone());
        let mut probe = cpu(config.clone().loss_scale(LossScale::fixed(1.0)));
        let mut clipped_once =
            config.clip == Clip::None || matches!(config.clip, Clip::TensorNorm { max_norm } if max_norm > 1.0);
        for seed in 0..20 {
            let (step, scale) = (step(seed), 2f32.powi((seed as i32 * 7) % 31 - 10));
            probe.set_loss_scale(scale).unwrap();
            assert_eq!(loss_scale(&probe), Some(scale));
            let (expected, unscaled) = one(&mut plain, &step);
            let (seen, left) = one(&mut probe, &scaled(&step, scale));
            let (outputs, expected) = (seen.outputs(), expected.outputs());
            assert!(near(outputs.total_norm, expected.total_norm), "{config:?}: {outputs:?}");
            assert!(near(outputs.coefficient_f64, expected.coefficient_f64), "{config:?}: {outputs:?}");
            assert!(near(f64::from(outputs.coefficient * scale), expected.coefficient.into()), "{outputs:?}");
            assert!(near(f64::from(outputs.inverse_coefficient / scale), expected.inverse_coefficient.into()));
            assert_eq!((outputs.flags, outputs.loss_scale), (expected.flags, scale), "{config:?}");
            clipped_once |= outputs.flags & StepOutputs::FLAG_CLIPPED != 0;
            // The limit of a quantile is interpolated in its bin, of which a scaled histogram has the same.
            for (t, (a, b)) in left.iter().zip(&unscaled).enumerate() {
                let far = a.iter().zip(b).position(|(a, b)| !near((*a).into(), (*b).into()));
                assert_eq!(far, None, "{config:?}, step {seed}, tensor {t}");
            }
        }
        assert!(clipped_once, "{config:?} clips nothing");
    }
}

/// The kernels, with a scale that adapts, in several orders of threads and blocks.
#[test]
fn the_kernels_equal_the_cpu() {
    let rule = LossScale::dynamic().initial(768.0).growth_interval(2);
    for config in configs() {
        for non_finite in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
            let config = config.clone().non_finite(non_finite).loss_scale(rule);
            let config = config.tracking(GsnrConfig::default()).history(4);
            for schedule in [Schedule::Forward, Schedule::Shuffled(1), Schedule::Shuffled(2)] {
                let (mut probe, mut reference) = (simt(schedule, config.clone()), cpu(config.clone()));
                for seed in 0..12 {
                    let mut step = scaled(&step(seed), loss_scale(&reference).unwrap());
                    if seed % 5 == 3 {
                        step[(seed % 2) as usize][seed as usize % 9] =
                            if seed % 2 == 0 { f32::NAN } else { f32::INFINITY };
                    }
                    let ((seen, left), (expected, expected_left)) =
                        (one(&mut probe, &step), one(&mut reference, &step));
                    let bytes = |report: &Report| {
                        let outputs = bytemuck::bytes_of(report.outputs());
                        [outputs, bytemuck::cast_slice(report.records())].concat()
                    };
                    assert_eq!(bytes(&seen), bytes(&expected), "{config:?}, {schedule:?}, step {seed}");
                    let bits = |step: &Step| step.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(bits(&left) == bits(&expected_left), "{config:?}, {schedule:?}, step {seed}");
                }
                let (seen, expected) = (probe.gsnr_report().unwrap(), reference.gsnr_report().unwrap());
                assert_eq!(format!("{seen:?}"), format!("{expected:?}"), "{config:?}");
                let (seen, expected) = (probe.history_report().unwrap(), reference.history_report().unwrap());
                assert_eq!(format!("{seen:?}"), format!("{expected:?}"), "{config:?}");
            }
        }
    }
}

/// `_amp_update_scale_` of torch, in its own words.
fn torchs_rule(rule: &LossScale, found: bool, scale: &mut f32, tracker: &mut u32) {
    if found {
        *scale *= rule.backoff_factor;
        *tracker = 0;
    } else {
        let successful = *tracker + 1;
        if successful == rule.growth_interval {
            let new_scale = *scale * rule.growth_factor;
            if new_scale.is_finite() {
                *scale = new_scale;
            }
            *tracker = 0;
        } else {
            *tracker = successful;
        }
    }
}

#[test]
fn the_scale_adapts_as_torchs_does() {
    let plan = || Plan::new([("x", DType::F32, 3)]).unwrap();
    for rule in [
        LossScale::dynamic().growth_interval(3),
        LossScale::dynamic().growth_interval(1).initial(1e37),
        LossScale::fixed(77.0),
        LossScale::dynamic().factors(1.5, 0.3).growth_interval(2).initial(0.1),
    ] {
        let config = Config::default().loss_scale(rule);
        let mut cpu = Probe::new(Cpu, plan(), config.clone()).unwrap();
        let mut simt = Probe::new(Simt::default(), plan(), config.clone()).unwrap();
        let (mut scale, mut tracker) = (rule.initial, 0);
        for step in 0..60u32 {
            let found = step % 7 == 5 || step % 11 == 1;
            let x = [1.0, if found { f32::INFINITY } else { 0.0 }, 2.0];
            for probe in [&mut cpu as &mut Probe, &mut simt] {
                let report = probe.measure_host(&[HostTensor::F32(&x)]).unwrap();
                let outputs = report.outputs();
                assert_eq!((outputs.loss_scale, outputs.found_inf), (scale, f32::from(found)), "{rule:?}, step {step}");
                let (mut scale, mut tracker) = (scale, tracker);
                torchs_rule(&rule, found, &mut scale, &mut tracker);
                assert_eq!(outputs.next_loss_scale, scale, "{rule:?}, step {step}");
            }
            torchs_rule(&rule, found, &mut scale, &mut tracker);
        }
        assert_eq!((loss_scale(&cpu), loss_scale(&simt)), (Some(scale), Some(scale)));
    }
    // Where torch would go down to 0, and all gradients with it.
    let config = Config::default().loss_scale(LossScale::dynamic().initial(2.0 * f32::MIN_POSITIVE));
    for mut probe in
        [Probe::new(Cpu, plan(), config.clone()).unwrap(), Probe::new(Simt::default(), plan(), config.clone()).unwrap()]
    {
        let mut next = || probe.measure_host(&[HostTensor::F32(&[f32::NAN; 3])]).unwrap().outputs().next_loss_scale;
        assert_eq!([next(), next()], [f32::MIN_POSITIVE; 2]);
    }
}

/// The state of tracked elements is in unscaled units: a scale that changes in between leaves no trace.
#[test]
fn a_changing_scale_does_not_disturb_what_is_tracked() {
    let config = Config::new().tracking(GsnrConfig::new());
    let (mut plain, mut probe) = (cpu(config.clone()), cpu(config.loss_scale(LossScale::fixed(1.0))));
    for seed in 0..8 {
        let (step, scale) = (step(seed), 2f32.powi(3 * seed as i32 - 4));
        plain.measure_host(&tensors(&step)).unwrap();
        probe.set_loss_scale(scale).unwrap();
        probe.measure_host(&tensors(&scaled(&step, scale))).unwrap();
    }
    let (plain, probe) = (plain.gsnr_report().unwrap(), probe.gsnr_report().unwrap());
    for ((_, a), (_, b)) in plain.tensors().zip(probe.tensors()) {
        let exact =
            |r: &gradprobe::gsnr::GsnrRecord| (r.defined, r.constant, r.sum_variance, r.sum_squared_mean, r.sum_ratio);
        assert_eq!(exact(a), exact(b));
        assert!(near(a.norm_mean, b.norm_mean));
    }
}

#[test]
fn the_adaptive_clip_unscales() {
    let weights: Step = step(99);
    let scale = 4096.0;
    let policies = [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite];
    // What is left alone is unscaled as well, more than a chunk or less.
    for (policy, units) in
        policies.into_iter().flat_map(|policy| [[100, 3, 0], [100, 0, 0], [0, 3, 0]].map(|u| (policy, u)))
    {
        let clip = AdaptiveClip::new(units);
        let mut gradients = scaled(&step(1), 0.025);
        if policy != NonFinitePolicy::Skip {
            gradients[0][150] = f32::NAN;
        }
        let plain = Config::default().non_finite(policy).adaptive_clip(clip.clone());
        let with_scale = plain.clone().loss_scale(LossScale::fixed(scale));
        let run = |probe: &mut Probe, mut gradients: Step| {
            probe.measure_host(&tensors(&gradients)).unwrap();
            let report = probe.clip_adaptively_host(&mut tensors_mut(&mut gradients), &tensors(&weights)).unwrap();
            (report.records().to_vec(), gradients.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        let expected = run(&mut cpu(plain), gradients.clone());
        let clipped: u64 = expected.0.iter().map(|record| record.clipped).sum();
        assert!(clipped > 0 && clipped < 400, "{:?}", expected.0);
        assert!(run(&mut cpu(with_scale.clone()), scaled(&gradients, scale)) == expected, "{policy:?}");
        assert!(run(&mut simt(Schedule::Shuffled(5), with_scale), scaled(&gradients, scale)) == expected, "{policy:?}");
    }
}

/// A kernel of a trainer's may write anything where the scale is.
#[test]
fn a_scale_that_is_none_is_a_step_to_skip() {
    for non_finite in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
        let config =
            Config::default().clip(Clip::global_norm(0.1)).non_finite(non_finite).loss_scale(LossScale::dynamic());
        let mut probe = simt(Schedule::Shuffled(1), config);
        for bad in [0.0, -0.0, -1.0, f32::INFINITY, f32::NAN] {
            let place = probe.addresses().loss_scale.unwrap() as *mut f32;
            // SAFETY: the device's memory is the host's, and no kernel runs.
            unsafe { place.write(bad) };
            let mut step = step(3);
            step[0][7] = f32::NAN;
            let (report, left) = one(&mut probe, &step);
            let outputs = report.outputs();
            assert_eq!(
                (outputs.skip, outputs.found_inf, outputs.action, outputs.coefficient),
                (1, 1.0, 0, 1.0),
                "{bad}"
            );
            let flags = StepOutputs::FLAG_LOSS_SCALE | StepOutputs::FLAG_SKIP | StepOutputs::FLAG_NAN;
            assert_eq!((outputs.flags, outputs.loss_scale.to_bits()), (flags, bad.to_bits()), "{bad}");
            assert_eq!(left[0][8..], step[0][8..], "{bad}");
            assert!(near(report.records()[1].finite_l2_norm(), plain_norm(&step[1])), "{bad}");
        }
        // One that is, is taken from then on.
        probe.set_loss_scale(8.0).unwrap();
        let (report, _) = one(&mut probe, &step(3));
        assert_eq!((report.outputs().skip, report.outputs().loss_scale), (0, 8.0));
        assert!(near(report.records()[1].finite_l2_norm(), plain_norm(&step(3)[1]) / 8.0));
    }
}

fn plain_norm(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// Weights are scaled by nothing.
#[test]
fn weights_stay_as_they_are() {
    let config = Config::default().loss_scale(LossScale::fixed(1024.0)).dead_threshold(0.01);
    let plan = || plan().with_weights([DType::F32; 3]).unwrap();
    let (gradients, weights) = (scaled(&step(1), 1024.0), step(2));
    let alone = cpu(Config::default().dead_threshold(0.01)).measure_host(&tensors(&weights)).unwrap();
    for mut probe in
        [Probe::new(Cpu, plan(), config.clone()).unwrap(), Probe::new(Simt::default(), plan(), config.clone()).unwrap()]
    {
        let report = probe.measure_host_with_weights(&tensors(&gradients), &tensors(&weights)).unwrap();
        assert_eq!(report.weights().unwrap(), alone.records());
        let gradient = report.records()[0];
        assert!(near(gradient.finite_l2_norm(), plain_norm(&step(1)[0])), "{gradient:?}");
        assert_eq!(gradient.dead_count, step(1)[0].iter().filter(|x| x.abs() < 0.01).count() as u64);
    }
}

/// What the histogram of scaled gradients recommends brings the largest of them where it leaves the margin.
#[test]
fn the_histogram_recommends_the_next_scale() {
    let mut probe = cpu(Config::new().histogram());
    let gradients = step(1);
    let mut total = |step: &Step| probe.histogram_host(&tensors(step)).unwrap().total();
    let from_plain = total(&gradients).recommended_loss_scale(1.0, Format::F16).unwrap();
    for scale in [1.0, 512.0, 2f32.powi(-20), 2f32.powi(40)] {
        let recommended = total(&scaled(&gradients, scale)).recommended_loss_scale(scale, Format::F16).unwrap();
        assert_eq!(recommended, from_plain, "from {scale}");
    }
    let largest = gradients.concat().iter().fold(0f32, |max, x| max.max(x.abs())) * from_plain;
    // Two octaves below the largest f16, one for the next power of two, and a bin of a quarter.
    assert!((65504.0 / 4.0 / 2.0 / 1.25..=65504.0 / 4.0).contains(&largest), "{largest}");
    // Beyond f32 there is none; and nothing is recommended of nothing.
    let tiny = total(&scaled(&gradients, 2f32.powi(-120)));
    assert_eq!(tiny.recommended_loss_scale(1.0, Format::F16), Some(2f32.powi(127)));
    assert_eq!(total(&scaled(&gradients, 0.0)).recommended_loss_scale(1.0, Format::F16), None);
}

#[test]
fn what_is_no_scale_is_refused() {
    let refused = |rule: LossScale, option: &str| {
        let config = Config::default().loss_scale(rule);
        for error in [Probe::new(Cpu, plan(), config.clone()).err(), Probe::new(Simt::default(), plan(), config).err()]
        {
            assert!(matches!(&error, Some(Error::InvalidConfig { option: of, .. }) if *of == option), "{error:?}");
        }
    };
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused(LossScale::fixed(bad), "loss_scale");
        refused(LossScale::dynamic().factors(2.0, bad), "backoff_factor");
        refused(LossScale::dynamic().factors(bad, 0.5), "growth_factor");
    }
    refused(LossScale::dynamic().factors(0.9, 0.5), "growth_factor");
    refused(LossScale::dynamic().factors(2.0, 1.1), "backoff_factor");
    refused(LossScale::dynamic().growth_interval(0), "growth_interval");
    let scaled = Config::default().loss_scale(LossScale::dynamic());
    for (config, scale, message) in [
        (Config::default(), 2.0, "this probe was made without it: declare it with `Config::loss_scale`"),
        (scaled.clone(), f32::NAN, "loss_scale must be finite and above 0, not NaN"),
        (scaled, 0.0, "loss_scale must be finite and above 0, not 0"),
    ] {
        let mut probes = [cpu(config.clone()), Probe::new(Simt::default(), plan(), config.clone()).unwrap()];
        for probe in &mut probes {
            assert_eq!(probe.set_loss_scale(scale).unwrap_err().to_string(), message);
        }
    }
    assert_eq!(loss_scale(&cpu(Config::default())), None);
    assert_eq!(simt(Schedule::Forward, Config::default()).addresses().loss_scale, None);
}
