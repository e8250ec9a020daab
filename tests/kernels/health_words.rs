//! Health words: what a probe writes of each step is what the diagnosis of its report says, on the CPU and, to the bit,
//! in the kernels on the host.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

use crate::common::{
    cases::{Data, Tensor, cases, lognormal, normal, random_bits, uniform},
    host::OnHost,
    tensors,
};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, FindingKind, HostTensor, NonFinitePolicy, Plan, Probe, Report, Verdict,
    health::{Health, Preset, Rules, Statistic, ThresholdRule, verdict_of},
};
use gradprobe_simt::{Schedule, Simt};

/// Rules on every statistic in both directions, with limits that steps of [`step`] lie on both sides of.
fn every_rule() -> Rules {
    let limits = [
        (Statistic::Norm, FindingKind::Exploding, 1e-2, 1.0),
        (Statistic::Rms, FindingKind::UpdateLost, 1e-3, 1e-1),
        (Statistic::MaxAbs, FindingKind::Flow, 1e-2, 1.0),
        (Statistic::ZeroFraction, FindingKind::Zeros, 0.2, 0.6),
        (Statistic::DeadFraction, FindingKind::Dead, 0.2, 0.6),
        (Statistic::Ratio, FindingKind::Ratio, 1e-3, 1e-1),
        (Statistic::Change, FindingKind::Unstable, 1.5, 4.0),
        (Statistic::TotalNorm, FindingKind::Noisy, 1.0, 10.0),
        (Statistic::TotalChange, FindingKind::Clipped, 1.1, 2.0),
        (Statistic::Spread, FindingKind::Spread, 1e2, 1e4),
    ];
    let rules =
        limits.into_iter().fold(Rules::preset(Preset::Doctor), |rules, (statistic, kind, warning, critical)| {
            let above = ThresholdRule::above(statistic, kind, warning, critical);
            let below =
                ThresholdRule::below(statistic, FindingKind::Vanishing, warning / 10.0, critical / 1e4).not_zero();
            rules.with(above).with(below)
        });
    rules.exempt("t1", &[FindingKind::Spread, FindingKind::Exploding]).exempt("t*", &[FindingKind::Flow])
}

/// Lengths of the tensors of [`step`].
const LENGTHS: [usize; 7] = [5, 40_000, 0, 1, 999, 70_001, 64];

/// Gradients of sizes that vary by tensor and step, some of them sparse; every fifth step is not finite.
fn step(number: u64) -> Vec<Data> {
    let tensor = |(t, &len): (usize, &usize)| {
        let seed = 100 * number + t as u64;
        let size = 1e-2 * lognormal(seed, 0, 6.0).abs();
        let zeros = uniform(seed, 1);
        let dtype = DType::ALL[t % 3];
        let tensor =
            Tensor::of_values(
                dtype,
                len,
                move |i| {
                    if uniform(seed ^ 7, i) < zeros { 0.0 } else { size * normal(seed, i) }
                },
            );
        if number % 5 == 3 && t == (number % 7) as usize && len > 0 {
            return tensor.with(len / 2, if number.is_multiple_of(2) { 0x7fff_ffff } else { 0xff80_0000 }).data();
        }
        tensor.data()
    };
    LENGTHS.iter().enumerate().map(tensor).collect()
}

fn plan() -> Plan {
    let tensors = LENGTHS.iter().enumerate();
    let plan = Plan::new(tensors.map(|(t, &len)| (format!("t{t}"), DType::ALL[t % 3], len as u64))).unwrap();
    plan.with_weights(LENGTHS.map(|_| DType::F32)).unwrap()
}

/// Compares what a report says with a diagnosis of it, and with that of its probe. Returns the word of the step.
#[track_caller]
fn assert_words(report: &Report, health: &mut Health) -> u32 {
    let diagnosis = health.diagnose(report).unwrap();
    assert_eq!(report.diagnosis().unwrap().to_string(), diagnosis.to_string(), "step {}", report.step());
    assert_eq!(report.health_words(), Some(diagnosis.tensor_words()), "step {}: {diagnosis}", report.step());
    assert_eq!(report.outputs().health, diagnosis.step_word(), "step {}: {diagnosis}", report.step());
    assert!(verdict_of(diagnosis.step_word()) <= diagnosis.verdict());
    diagnosis.step_word()
}

#[test]
fn a_run_is_judged_as_it_is_diagnosed() {
    let weights: Vec<Vec<f32>> = LENGTHS.map(|len| (0..len).map(|i| normal(3, i) as f32).collect()).to_vec();
    let weights: Vec<HostTensor> = weights.iter().map(|weight| HostTensor::F32(weight)).collect();
    let presets = Preset::ALL.map(|preset| Rules::preset(preset).learning_rate(0.1));
    for rules in presets.into_iter().chain([every_rule()]) {
        for non_finite in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
            let config = Config::default().clip(Clip::global_norm(1.0)).non_finite(non_finite).rules(rules.clone());
            let shuffled = Simt { schedule: Schedule::Shuffled(5), blocks: 2, ..Simt::default() };
            let health = Health::new(&plan(), rules.clone()).unwrap();
            let probes: [Probe; 3] = [
                Probe::new(Cpu, plan(), config.clone()).unwrap(),
                Probe::new(Simt::default(), plan(), config.clone()).unwrap(),
                Probe::new(shuffled, plan(), config).unwrap(),
            ];
            let mut united = 0;
            for mut probe in probes {
                let mut health = health.clone();
                for number in 0..16 {
                    let data = step(number);
                    let report = if number % 3 == 1 {
                        probe.measure_host_with_weights(&tensors(&data), &weights).unwrap()
                    } else {
                        probe.measure_host(&tensors(&data)).unwrap()
                    };
                    united |= assert_words(&report, &mut health);
                }
            }
            if rules == every_rule() {
                // No rule of one step here is of underflow, spikes or large updates, and what is exempt raises nothing.
                let bits = |kind: FindingKind| 1 << kind as u32 | 1 << (16 + kind as u32);
                let all = FindingKind::ALL[..16].iter().fold(0, |all, &kind| all | bits(kind));
                let none = [FindingKind::Underflow, FindingKind::Flow, FindingKind::Spike, FindingKind::UpdateTooLarge];
                let none = none.into_iter().fold(0, |none, kind| none | bits(kind));
                // What is not finite is always critical.
                let nonfinite = 1 << FindingKind::Nan as u32 | 1 << FindingKind::Inf as u32;
                assert_eq!(united, all & !none & !nonfinite, "{united:#010x}");
            }
        }
    }
}

#[test]
fn every_case_is_judged_as_it_is_diagnosed() {
    for case in cases().iter().filter(|case| !case.large) {
        let prepared = crate::common::Prepared::new(case);
        let mut reports = Vec::new();
        let rules = [Statistic::Norm, Statistic::Rms, Statistic::MaxAbs, Statistic::Spread];
        let rules = rules.into_iter().fold(Rules::default(), |rules, statistic| {
            rules.with(ThresholdRule::above(statistic, FindingKind::Exploding, 1e-3, 1e3))
        });
        let config = case.config.clone().rules(rules.clone());
        let probes: [Probe; 2] = [
            Probe::new(Cpu, prepared.plan(), config.clone()).unwrap(),
            Probe::new(Simt::default(), prepared.plan(), config).unwrap(),
        ];
        for mut probe in probes {
            let mut health = Health::new(&prepared.plan(), rules.clone()).unwrap();
            for _ in 0..2 {
                let report = probe.measure_host(&tensors(&prepared.data)).unwrap();
                assert_words(&report, &mut health);
                reports.push(report);
            }
        }
        let bytes = |report: &Report| bytemuck::bytes_of(report.outputs()).to_vec();
        for step in 0..2 {
            assert_eq!(bytes(&reports[step]), bytes(&reports[2 + step]), "{}", case.name);
        }
    }
}

#[test]
fn without_rules_there_are_no_words_and_new_limits_keep_what_is_remembered() {
    let plan = || Plan::new([("a", DType::F32, 2)]).unwrap();
    let rules =
        Rules::preset(Preset::Doctor).with(ThresholdRule::above(Statistic::Change, FindingKind::Unstable, 2.0, 100.0));
    let devices = |config: Config| -> [Probe; 2] {
        [Probe::new(Cpu, plan(), config.clone()).unwrap(), Probe::new(Simt::default(), plan(), config).unwrap()]
    };
    let judge = |probe: &mut Probe, x: f32| {
        let report = probe.measure_host(&[HostTensor::F32(&[x, 0.0])]).unwrap();
        (report.outputs().health, report.health_words().map(<[u32]>::to_vec))
    };
    for mut probe in devices(Config::new()) {
        assert_eq!(judge(&mut probe, 1e9), (0, None));
        assert!(probe.wait().unwrap().diagnosis().is_none());
        assert_eq!(probe.set_rules(rules.clone()), Err(Error::NotDeclared { declare: "Config::rules" }));
        assert_eq!(judge(&mut probe, 1e9), (0, None));
    }
    let many = (0..32).fold(Rules::default(), |rules, n| {
        let kind = FindingKind::ALL[n % 14];
        let statistic = [Statistic::Norm, Statistic::Rms, Statistic::Change][n / 14];
        rules
            .with(ThresholdRule::above(statistic, kind, 1e300, 1e300))
            .with(ThresholdRule::below(statistic, kind, 1e-300, 1e-300))
    });
    assert!(many.thresholds().len() > 63);
    let refused = Probe::new(Cpu, plan(), Config::new().rules(many.clone())).map(drop);
    assert!(matches!(refused, Err(Error::InvalidConfig { option: "rules", .. })), "{refused:?}");
    for mut probe in devices(Config::new().rules(rules.clone())) {
        let (exploding, unstable) = (1 << FindingKind::Exploding as u32, 1 << FindingKind::Unstable as u32);
        assert_eq!(judge(&mut probe, 1e9), (exploding, Some(vec![exploding])));
        assert_eq!(verdict_of(exploding), Verdict::Warning);
        assert_eq!(judge(&mut probe, 1.0).0, 0);
        assert_eq!(judge(&mut probe, 3.0).0, unstable);
        let refused = probe.set_rules(many.clone());
        assert!(matches!(refused, Err(Error::InvalidConfig { option: "rules", .. })), "{refused:?}");
        assert_eq!(judge(&mut probe, 9.0).0, unstable, "what is refused changes nothing");
        let higher = ThresholdRule::above(Statistic::Change, FindingKind::Unstable, 5.0, 100.0);
        probe.set_rules(Rules::preset(Preset::Doctor).with(higher)).unwrap();
        assert_eq!(judge(&mut probe, 36.0).0, 0, "four times as much");
        assert_eq!(judge(&mut probe, 216.0).0, unstable, "six times, and the norm before is known");
    }
}

/// It raises nothing, and the norm that it had is what it is compared with when it comes again.
#[test]
fn a_tensor_that_is_absent_is_not_judged() {
    let plan = || Plan::new([("a", DType::F32, 1), ("b", DType::F32, 1)]).unwrap();
    let rules = [
        ThresholdRule::above(Statistic::Change, FindingKind::Unstable, 5.0, 100.0),
        ThresholdRule::below(Statistic::Norm, FindingKind::Vanishing, 1e-3, 1e-6),
    ];
    let rules = rules.into_iter().fold(Rules::default(), Rules::with);
    let mut health = Health::new(&plan(), rules.clone()).unwrap();
    let config = Config::new().rules(rules);
    for mut probe in
        [Probe::new(Cpu, plan(), config.clone()).unwrap(), Probe::new(Simt::default(), plan(), config.clone()).unwrap()]
    {
        health.reset();
        let unstable = 1 << FindingKind::Unstable as u32;
        for (b, word) in [(Some(0.01f32), 0), (None, 0), (None, 0), (Some(0.02), 0), (None, 0), (Some(0.2), unstable)] {
            let b = b.map(|b| [b]);
            probe.measure(&[&[0.01f32], if b.is_some() { &b as _ } else { &Absent as _ }]).unwrap();
            let report = probe.wait().unwrap();
            assert_words(&report, &mut health);
            assert_eq!(report.health_words(), Some(&[0, word][..]), "{b:?}");
        }
    }
}

/// What any bits at all come to.
#[test]
fn random_bits_are_judged_as_they_are_diagnosed() {
    let plan = || Plan::new([("a", DType::F16, 300), ("b", DType::BF16, 300)]).unwrap();
    let mut health = Health::new(&plan(), Rules::default()).unwrap();
    let mut probe = Probe::new(Simt::default(), plan(), Config::new().rules(Rules::default())).unwrap();
    for seed in 0..50 {
        // A few are NaN or Inf in half of the steps.
        let bits = |dtype: DType, mask: u32| {
            let of = move |i: usize| random_bits(dtype, seed, i) & if seed % 2 == 0 { mask } else { !0 };
            Tensor::of_bits(dtype, 300, of).data()
        };
        let data = [bits(DType::F16, 0xbbff), bits(DType::BF16, 0xbfff)];
        let report = probe.measure_host(&tensors(&data)).unwrap();
        assert_words(&report, &mut health);
    }
}
