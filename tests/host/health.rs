//! Each rule of each preset on data whose statistics are known, and the models of `tests/data`: what is said of one step
//! by itself. `tests/host/health_run.rs` is about what is said of several.

use crate::models::{golden, host::OnHost, kinds, measure, named};
use gradprobe::{
    Config, Cpu, DType, Error, FindingKind, HostTensor, Plan, Probe, Report, Verdict,
    gsnr::GsnrConfig,
    health::{
        Diagnosis, Flow, FlowMeasure, FlowRule, Groups, Health, Limits, Preset, Rules, Statistic, TensorType,
        ThresholdRule, UnderflowRule, advice, backward_order, risen, table, top_contributors, verdict_of,
    },
};

fn diagnose_by(rules: Rules, report: &Report) -> Diagnosis {
    Health::new(report.plan(), rules).unwrap().diagnose(report).unwrap()
}

/// Kinds and severities that these rules find in one step.
fn found(rules: Rules, tensors: &[(&str, &[f32])]) -> Vec<(FindingKind, Verdict)> {
    kinds(&diagnose_by(rules, &measure(tensors)))
}

const WARNING: Verdict = Verdict::Warning;
const CRITICAL: Verdict = Verdict::Critical;

#[test]
fn doctor_warns_outside_1e_7_and_1e4() {
    for (norm, expected) in [
        (0.9e-7, vec![(FindingKind::Vanishing, WARNING)]),
        (0.0, vec![(FindingKind::Vanishing, WARNING)]),
        (1.1e-7, vec![]),
        (1e4, vec![]),
        (1.1e4, vec![(FindingKind::Exploding, WARNING)]),
        (f32::NAN, vec![(FindingKind::Nan, CRITICAL)]),
    ] {
        assert_eq!(found(Rules::preset(Preset::Doctor), &[("a", &[norm])]), expected, "{norm}");
    }
}

#[test]
fn the_transformer_preset_is_critical_above_100() {
    let rules = || Rules::preset(Preset::Transformer);
    assert_eq!(found(rules(), &[("a", &[100.0])]), []);
    assert_eq!(found(rules(), &[("a", &[101.0])]), [(FindingKind::Exploding, CRITICAL)]);
    assert_eq!(found(rules(), &[("a", &[0.9e-7])]), [(FindingKind::Vanishing, WARNING)]);
    assert_eq!(found(rules(), &[("a", &[1.1e-7])]), []);
    // Early thirds at less than 0.01, or more than 100 times, of the late ones.
    let layers = |factor: f32| {
        let norms: Vec<f32> = (0..6).map(|layer| 0.1 * factor.powi(layer)).collect();
        let names: Vec<String> = (0..6).map(|layer| format!("h.{layer}.weight")).collect();
        let tensors: Vec<(&str, &[f32])> =
            names.iter().zip(&norms).map(|(name, norm)| (name.as_str(), std::slice::from_ref(norm))).collect();
        found(rules(), &tensors)
    };
    assert_eq!(layers(2.9), []);
    assert_eq!(layers(3.2), [(FindingKind::Flow, WARNING)]);
    assert_eq!(layers(1.0 / 2.9), []);
    assert_eq!(layers(1.0 / 3.3), [(FindingKind::Flow, WARNING)]);
}

#[test]
fn the_course_preset_has_the_course_s_table() {
    let rules = || Rules::preset(Preset::Course);
    let of_norm = |norm: f32| found(rules(), &[("a", &[norm])]);
    assert_eq!(of_norm(0.05), [(FindingKind::Vanishing, WARNING)]);
    assert_eq!(of_norm(0.9e-7), [(FindingKind::Vanishing, CRITICAL)]);
    assert_eq!(of_norm(1.0), []);
    assert_eq!(of_norm(9.9), []);
    assert_eq!(of_norm(50.0), [(FindingKind::Exploding, WARNING)]);
    assert_eq!(of_norm(101.0), [(FindingKind::Exploding, CRITICAL)]);
    // `is_healthy`, of a tensor: 1e-8 and 1000.
    let of_tensor = |norm: f32| {
        let report = measure(&[("a", &[norm]), ("b", &[1.0])]);
        diagnose_by(rules().without(FindingKind::Spread), &report).verdicts()[0]
    };
    assert_eq!(of_tensor(0.9e-8), Verdict::Critical);
    assert_eq!(of_tensor(1.1e-8), Verdict::Healthy);
    assert_eq!(of_tensor(999.0), Verdict::Healthy);
    assert_eq!(of_tensor(1001.0), Verdict::Critical);
    // Zeros, which are dead as well.
    let zeros = |count: usize| {
        let elements: Vec<f32> = (0..100).map(|i| if i < count { 0.0 } else { 0.1 }).collect();
        found(rules(), &[("a", &elements)])
    };
    assert_eq!(zeros(5), []);
    assert_eq!(zeros(6), [(FindingKind::Zeros, WARNING)]);
    assert_eq!(zeros(20), [(FindingKind::Zeros, WARNING)]);
    assert_eq!(zeros(21), [(FindingKind::Zeros, CRITICAL), (FindingKind::Dead, WARNING)]);
    assert_eq!(zeros(51), [(FindingKind::Dead, CRITICAL), (FindingKind::Zeros, CRITICAL)]);
    let spread = |factor: f32| found(rules(), &[("a", &[1.0]), ("b", &[1.0 / factor]), ("zero", &[])]);
    assert_eq!(spread(9.9), []);
    assert_eq!(spread(11.0), [(FindingKind::Spread, WARNING)]);
    assert_eq!(spread(101.0), [(FindingKind::Spread, CRITICAL)]);
    let ratio = |norm: f64| {
        let report = measure(&[("a", &[1.0])]).with_param_norms(&[norm]).unwrap();
        kinds(&diagnose_by(rules(), &report))
    };
    for (norm, expected) in [
        (1.0, vec![]),
        (0.9, vec![(FindingKind::Ratio, WARNING)]),
        (1e6, vec![]),
        (1.1e6, vec![(FindingKind::Ratio, WARNING)]),
        // Of no weight, or one that is not finite, there is no ratio.
        (0.0, vec![]),
        (f64::NAN, vec![]),
        (f64::INFINITY, vec![]),
    ] {
        assert_eq!(ratio(norm), expected, "{norm}");
    }
}

#[test]
fn the_learning_rate_sets_the_limits_of_norms() {
    let of = |rules: Rules, norm: f32| found(rules, &[("a", &[norm])]);
    let scaled = || Rules::preset(Preset::LrScaled).learning_rate(0.01);
    assert_eq!(of(scaled(), 0.9e-8), [(FindingKind::Vanishing, CRITICAL)]);
    assert_eq!(of(scaled(), 1.1e-8), []);
    assert_eq!(of(scaled(), 99.0), []);
    assert_eq!(of(scaled(), 101.0), [(FindingKind::Exploding, CRITICAL)]);
    // The last call counts, and any preset can have it.
    assert_eq!(of(scaled().learning_rate(0.001), 101.0), []);
    assert_eq!(of(Rules::preset(Preset::Doctor).learning_rate(0.01), 101.0), [(FindingKind::Exploding, CRITICAL)]);
    let missing = Rules::preset(Preset::LrScaled).check().unwrap_err().to_string();
    assert_eq!(missing, "learning_rate must be given for the preset lr-scaled, not unset");
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-300] {
        let refused = Rules::default().learning_rate(rate).check().unwrap_err();
        assert!(refused.to_string().starts_with("learning_rate must be finite and at least 1e-290"), "{refused}");
    }
}

#[test]
fn the_default_has_limits_that_no_healthy_training_meets() {
    // Whatever the size of gradients: a loss may be a sum, a mean, or in cents.
    for value in [1e-12, 1e-3, 1e5] {
        assert_eq!(found(Rules::default(), &[("a", &[value; 8]), ("b", &[value; 3])]), [], "{value}");
    }
    // √f32::MAX, beyond which Adam's second moment is infinite.
    assert_eq!(found(Rules::default(), &[("a", &[1.0, 1.8e19])]), []);
    assert_eq!(found(Rules::default(), &[("a", &[1.0, 1.9e19])]), [(FindingKind::Exploding, CRITICAL)]);
    let of_weights = |rules: Rules, name: &str, dtype: DType, norm: f64| {
        let plan = Plan::new([(name, dtype, 4), ("other.weight", DType::F32, 4)]).unwrap();
        let plan = plan.with_shapes([vec![2, 2], vec![2, 2]]).unwrap();
        let mut probe = Probe::new(Cpu, plan, Config::new()).unwrap();
        let halves = [half::f16::from_f32(0.5); 4];
        let first = if dtype == DType::F16 { HostTensor::F16(&halves) } else { HostTensor::F32(&[0.5; 4]) };
        let report = probe.measure_host(&[first, HostTensor::F32(&[0.5; 4])]).unwrap();
        kinds(&diagnose_by(rules, &report.with_param_norms(&[norm, 1.0]).unwrap()))
    };
    let default = |dtype, norm| of_weights(Rules::default(), "a.weight", dtype, norm);
    assert_eq!(default(DType::F32, 0.011), []);
    assert_eq!(default(DType::F32, 0.009), [(FindingKind::Ratio, WARNING)]);
    // The loss scale is in gradients of f16.
    assert_eq!(default(DType::F16, 0.009), []);
    // With the learning rate: a step that would replace the weight.
    let with_rate = |norm| of_weights(Rules::default().learning_rate(0.1), "a.weight", DType::F32, norm);
    assert_eq!(with_rate(0.11), []);
    assert_eq!(with_rate(0.09), [(FindingKind::Ratio, WARNING)]);
    // Biases begin at 0.
    let report = measure(&[("a.bias", &[0.5]), ("a.weight", &[0.5; 4])]).with_param_norms(&[1e-9, 1.0]).unwrap();
    assert_eq!(kinds(&diagnose_by(Rules::default(), &report)), []);
}

#[test]
fn what_is_not_finite_is_found_first_and_alone() {
    let nan_and_inf: &[f32] = &[1e9, f32::NAN, f32::NEG_INFINITY, f32::NAN];
    let report =
        measure(&[("healthy", &[1e-3; 8]), ("bad", nan_and_inf), ("large", &[1e20]), ("inf", &[f32::INFINITY])]);
    for preset in Preset::ALL {
        let rules = Rules::preset(preset).learning_rate(0.1);
        let diagnosis = diagnose_by(rules, &report);
        assert_eq!(diagnosis.verdict(), Verdict::Critical);
        let words = diagnosis.tensor_words();
        assert_eq!((words[0], words[1], words[3]), (0, 0b11 << 16, 0b10 << 16), "{preset:?}");
        // A finite tensor is judged nevertheless, the step as a whole is not.
        assert_ne!(words[2], 0, "{preset:?}");
        assert_eq!(diagnosis.step_word(), words.iter().fold(0, |all, word| all | word));
        let [nan, inf] = &diagnosis.findings()[..2] else { panic!("{diagnosis}") };
        assert_eq!((nan.kind, nan.value, nan.tensor.as_deref()), (FindingKind::Nan, 2.0, Some("bad")));
        // One finding of both tensors, named by the one that the backward pass reaches first.
        assert_eq!((inf.kind, inf.value, inf.tensor.as_deref()), (FindingKind::Inf, 1.0, Some("inf")));
        assert_eq!(inf.others, ["bad"]);
        assert_eq!(nan.message, "2 of 4 elements are NaN; the first that is not finite is 1");
        assert_eq!((nan.severity, nan.step, nan.threshold, nan.rule), (CRITICAL, 1, 0.0, "nonfinite"));
        assert_eq!(diagnosis.verdicts()[0], Verdict::Healthy);
    }
}

#[test]
fn words_have_one_bit_a_kind() {
    let rules = Rules::preset(Preset::Course);
    let diagnosis = diagnose_by(rules, &measure(&[("a", &[0.0; 4]), ("b", &[50.0]), ("c", &[])]));
    let bit = |kind: FindingKind, severity| 1u32 << (kind as u32 + if severity == CRITICAL { 16 } else { 0 });
    let zero =
        bit(FindingKind::Zeros, CRITICAL) | bit(FindingKind::Dead, CRITICAL) | bit(FindingKind::Vanishing, CRITICAL);
    assert_eq!(diagnosis.tensor_words(), [zero, 0, 0]);
    assert_eq!(diagnosis.step_word(), zero | bit(FindingKind::Exploding, WARNING));
    assert_eq!([0, 1 << 3, 1 << 3 | 1 << 20].map(verdict_of), [Verdict::Healthy, Verdict::Warning, Verdict::Critical]);
    let rule = ThresholdRule::below(Statistic::Rms, FindingKind::Vanishing, 2.0, 1.0);
    assert_eq!([3.0, 2.0, 1.5, 1.0, 0.5].map(|value| rule.bit(value)), [0, 0, 4, 4, 4 << 16]);
    let rule = ThresholdRule::above(Statistic::Rms, FindingKind::Exploding, 1.0, f64::INFINITY);
    assert_eq!([1.0, 1.5, f64::MAX].map(|value| rule.bit(value)), [0, 8, 8]);
}

#[test]
fn any_statistic_can_have_limits_of_any_kind() {
    let elements: &[f32] = &[3.0, -4.0, 0.0, 1e-11];
    let report = measure(&[("a", elements), ("b", &[1.0])]).with_param_norms(&[10.0, 0.0]).unwrap();
    let norm = (25.0 + f64::from(1e-11f32).powi(2)).sqrt();
    for (statistic, value) in [
        (Statistic::Norm, norm),
        (Statistic::Rms, norm / 2.0),
        (Statistic::MaxAbs, 4.0),
        (Statistic::ZeroFraction, 0.25),
        (Statistic::DeadFraction, 0.5),
        (Statistic::Ratio, norm / 10.0),
        (Statistic::TotalNorm, (norm * norm + 1.0).sqrt()),
        (Statistic::Spread, norm),
    ] {
        let doctor = || Rules::preset(Preset::Doctor);
        let at = |limit: f64| doctor().with(ThresholdRule::above(statistic, FindingKind::Dead, limit, f64::INFINITY));
        let just_below = diagnose_by(at(value * (1.0 - 1e-9)), &report);
        let finding = &just_below.findings()[0];
        assert!((finding.value / value - 1.0).abs() < 1e-12, "{statistic:?}: {finding:?}");
        assert_eq!((finding.rule, finding.kind), (statistic.name(), FindingKind::Dead));
        assert_eq!(finding.tensor.is_none(), statistic.is_of_step());
        assert_eq!(kinds(&diagnose_by(at(value * (1.0 + 1e-9)), &report)), []);
        // A later rule replaces the first, and an exemption makes it mute.
        assert_eq!(
            kinds(&diagnose_by(at(value / 2.0).with(at(1.0).thresholds()[2]), &report)).len(),
            usize::from(value > 1.0)
        );
        if !statistic.is_of_step() {
            assert_eq!(
                kinds(&diagnose_by(
                    at(value / 2.0).exempt("a", &[FindingKind::Dead]).exempt("b", &[FindingKind::Dead]),
                    &report
                )),
                []
            );
        }
    }
}

#[test]
fn unhealthy_limits_are_refused() {
    let with = |rule: ThresholdRule| Rules::default().with(rule).check().unwrap_err().to_string();
    let above = |warning, critical| ThresholdRule::above(Statistic::Rms, FindingKind::Exploding, warning, critical);
    let below = |warning, critical| ThresholdRule::below(Statistic::Norm, FindingKind::Vanishing, warning, critical);
    assert_eq!(with(above(f64::NAN, 1.0)), "rms must be a limit that is a number, not NaN");
    assert_eq!(with(above(2.0, 1.0)), "rms must be limited by a warning that is not past critical, not 2e0 and 1e0");
    assert_eq!(with(below(1.0, 2.0)), "norm must be limited by a warning that is not past critical, not 1e0 and 2e0");
    assert_eq!(with(above(-1.0, 1.0)), "rms must be limited from above by something not below 0, not -1");
    assert_eq!(with(below(0.0, 0.0)), "norm must be limited from below by something finite and above 0, not 0");
    let share = ThresholdRule::above(Statistic::DeadFraction, FindingKind::Dead, 0.5, 20.0);
    assert_eq!(with(share), "dead_fraction must be limited from above by something from 0 to 1, not 20");
    for change in [
        |rules: &mut Rules| rules.spike = Limits::new(f64::NAN, 1.0),
        |rules: &mut Rules| rules.variation = Limits::new(2.0, 1.0),
        |rules: &mut Rules| rules.clipped_fraction = Limits::new(0.5, 2.0),
        |rules: &mut Rules| rules.mean_coefficient = Limits::new(0.1, 0.2),
        |rules: &mut Rules| rules.gsnr_median = Limits::new(-1.0, -1.0),
        |rules: &mut Rules| rules.signal = Limits::new(f64::NAN, f64::NAN),
        |rules: &mut Rules| rules.learned = Limits::new(2.0, 0.5),
        |rules: &mut Rules| rules.window = 1,
        |rules: &mut Rules| rules.window = 1 << 20,
        |rules: &mut Rules| rules.least_steps = 0,
        |rules: &mut Rules| rules.underflow[0].above = Limits::new(0.5, 0.1),
        |rules: &mut Rules| {
            let (below, above) = (Limits::new(1e-6, 1e-2), Limits::new(1.0, 2.0));
            rules.flow = Some(FlowRule { measure: FlowMeasure::Slope, below, above });
        },
    ] {
        let mut rules = Rules::default();
        change(&mut rules);
        assert!(matches!(rules.check(), Err(Error::InvalidConfig { .. })), "{rules:?}");
        let plan = Plan::new([("a", DType::F32, 1)]).unwrap();
        assert!(Health::new(&plan, rules).is_err());
    }
    let plan = Plan::new([("a", DType::F32, 1)]).unwrap();
    let refused = Health::new(&plan, Rules::default().exempt("b*", &[FindingKind::Dead])).unwrap_err();
    assert_eq!(refused, Error::NoSuchTensor { pattern: "b*".to_owned() });
    for preset in Preset::ALL {
        Rules::preset(preset).learning_rate(1e-3).check().unwrap();
        assert_eq!(preset.name().parse::<Preset>().unwrap(), preset);
    }
    assert_eq!(
        "gpt\n".parse::<Preset>().unwrap_err().to_string(),
        r#"preset must be one of default, lr-scaled, course, doctor, transformer, not "gpt\n""#
    );
}

#[test]
fn the_models_in_tests_data_are_what_they_are() {
    for step in 0..8 {
        assert_eq!(kinds(&diagnose_by(Rules::default(), &golden(&format!("gpt-bf16-step{step}")))), []);
    }
    assert_eq!(kinds(&diagnose_by(Rules::default(), &golden("gpt-mixed-step0"))), []);

    let vanishing = diagnose_by(Rules::default(), &golden("vanishing"));
    let flow = vanishing.flow().unwrap();
    assert_eq!(flow.layers().len(), 21);
    assert!((6.0..8.0).contains(&flow.factor()), "{}", flow.factor());
    let [finding] = vanishing.findings() else { panic!("{vanishing}") };
    assert_eq!((finding.kind, finding.tensor.as_deref()), (FindingKind::Flow, Some("0.weight")));

    // Three quarters of the units are off in this step; one step cannot tell whether they are in others.
    assert_eq!(kinds(&diagnose_by(Rules::default(), &golden("dead"))), []);
    let dead = diagnose_by(Rules::preset(Preset::Course), &golden("dead"));
    let of_dead: Vec<_> = dead.findings().iter().filter(|finding| finding.kind == FindingKind::Dead).collect();
    let [finding] = of_dead[..] else { panic!("{dead}") };
    assert_eq!(
        (finding.tensor.as_deref(), &finding.others[..]),
        (Some("2.weight"), &["0.weight", "0.bias"].map(str::to_owned)[..])
    );

    let report = golden("exploding-step3");
    let order = backward_order(report.plan());
    let mut health = Health::new(report.plan(), Rules::default()).unwrap().backward_order(order).unwrap();
    let diagnosis = health.diagnose(&report).unwrap();
    let frontier = diagnosis.frontier().unwrap();
    assert_eq!((frontier.tensor.as_str(), frontier.element), ("blocks.0.attn.qkv.weight", 576));
    assert_eq!(frontier.last_clean.as_deref(), Some("blocks.0.attn.proj.bias"));
}

#[test]
fn a_flow_is_the_slope_that_one_odd_layer_does_not_bend() {
    let flow_of = |layers: &[(String, f32)]| {
        let tensors: Vec<(&str, &[f32])> =
            layers.iter().map(|(name, norm)| (name.as_str(), std::slice::from_ref(norm))).collect();
        diagnose_by(Rules::default(), &measure(&tensors)).flow().cloned()
    };
    // Sorted as text, so that `10` is before `2`: the numbers decide.
    let mut layers: Vec<(String, f32)> = (0..12).map(|l| (format!("blocks.{l}.weight"), 2f32.powi(-l))).collect();
    layers[5].1 = 1e-6;
    layers.sort_by(|a, b| a.0.cmp(&b.0));
    // Neither a bias nor an embedding is part of it.
    layers.push(("blocks.3.bias".to_owned(), 100.0));
    layers.push(("embed.weight".to_owned(), 100.0));
    let flow: Flow = flow_of(&layers).unwrap();
    assert!((flow.factor() - 0.5).abs() < 1e-6, "{}", flow.factor());
    assert!((flow.fitted_ratio() / 2048.0 - 1.0).abs() < 1e-5);
    assert!((flow.first_over_last() - 2048.0).abs() < 1e-9);
    let early = 1.0 + 0.5 + 0.25 + 0.125;
    assert!((flow.early_over_late() / (early / (early / 256.0)) - 1.0).abs() < 1e-9);
    assert!((flow.spread() / 1e6 - 1.0).abs() < 1e-6);
    let names: Vec<&str> = flow.layers().map(|(name, _)| name).collect();
    assert_eq!((names[2], names[10], names.len()), ("blocks.2", "blocks.10", 12));
    // A layer of zeros is left out; two are no depth.
    layers.iter_mut().filter(|(name, _)| name.starts_with("blocks.3.")).for_each(|(_, norm)| *norm = 0.0);
    assert_eq!(flow_of(&layers).unwrap().layers().len(), 11);
    assert_eq!(flow_of(&layers[..2]), None);
    // Without numbers, every tensor in the plan's order; and more than the 64 that the slope is fitted to.
    let plain: Vec<(String, f32)> = (0..130u8)
        .map(|l| (char::from(b'!' + l % 90).to_string().repeat(1 + usize::from(l / 90)), 1.1f32.powi(i32::from(l))))
        .filter(|(name, _)| !name.contains(|c: char| c.is_ascii_digit()))
        .collect();
    let flow = flow_of(&plain).unwrap();
    assert_eq!(flow.layers().len(), plain.len());
    assert!((1.09..1.16).contains(&flow.factor()), "{}", flow.factor());
}

#[test]
fn groups_add_up_by_part_layer_block_and_pattern() {
    let report = measure(&[
        ("embed.weight", &[6.0]),
        ("h.0.attn.qkv.weight", &[3.0]),
        ("h.0.attn.qkv.bias", &[4.0]),
        ("h.1.mlp.fc1.weight", &[1.0, f32::NAN]),
        ("h.1.ln_1.weight", &[1.0]),
        ("lm_head.weight", &[0.0]),
    ]);
    let plan = report.plan();
    let names = |groups: &Groups| groups.names().to_vec();
    let types = Groups::by_type(plan);
    let of: Vec<usize> = types.of_tensors().iter().map(|group| group.unwrap()).collect();
    assert_eq!(of, [2, 0, 0, 1, 3, 4]);
    let norms = types.norms(&report).unwrap();
    assert_eq!((norms[0].name, norms[0].tensors, norms[0].elements, norms[0].norm), ("attention", 2, 2, 5.0));
    assert_eq!((norms[0].share, norms[2].share, norms[5].share), (Some(25.0 / 63.0), Some(36.0 / 63.0), Some(0.0)));
    assert_eq!((norms[1].nonfinite, norms[5].tensors), (1, 0));
    assert_eq!(names(&Groups::by_block(plan)), ["embed", "h.0", "h.1", "lm_head"]);
    assert_eq!(names(&Groups::by_layer(plan)).len(), 5);
    let other =
        Plan::new(["conv/weight", "conv/bias", "list.0", "list.1", "a"].map(|name| (name, DType::F32, 1))).unwrap();
    assert_eq!(names(&Groups::by_layer(&other)), ["conv", "list.0", "list.1", "a"]);
    let own = Groups::by_patterns(plan, [("first", "h.0.*"), ("rest", "h.*"), ("first", "embed*")]).unwrap();
    assert_eq!(own.of_tensors(), [Some(0), Some(0), Some(0), Some(1), Some(1), None]);
    let refused = Groups::by_patterns(plan, [("first", "h.7.*")]);
    assert_eq!(refused, Err(Error::NoSuchTensor { pattern: "h.7.*".to_owned() }));
    let diagnosis = diagnose_by(Rules::preset(Preset::Course), &report);
    assert_eq!(types.offenders(&diagnosis).unwrap(), [("mlp", 1), ("head", 1)]);

    let top = top_contributors(&report, 2);
    assert_eq!((top[0].tensor, top[0].share, top[1].tensor), ("embed.weight", 36.0 / 63.0, "h.0.attn.qkv.bias"));
    let other = measure(&[("a", &[1.0])]);
    let (name, what) = ("embed.weight".to_owned(), "it has \"a\" in its place".to_owned());
    let refused = Error::ReportOfAnotherPlan { name, what };
    assert_eq!(types.norms(&other), Err(refused.clone()));
    assert_eq!(risen(&report, &other, 3), Err(refused));
    let [before, after] =
        [[1.0, 2.0, 5.0], [2.0, 4.0, 1.0]].map(|x| measure(&[("a", &x[..1]), ("b", &x[1..2]), ("c", &x[2..])]));
    let rise = risen(&before, &after, 5).unwrap();
    assert_eq!(rise.iter().map(|part| (part.tensor, part.squared_norm)).collect::<Vec<_>>(), [("b", 12.0), ("a", 3.0)]);
    assert_eq!(rise[0].share, 0.8);
    for (name, expected) in [
        ("model.layers.3.self_attn.q_proj.weight", TensorType::Attention),
        ("model.layers.3.input_layernorm.weight", TensorType::Norm),
        ("model.layers.3.mlp.gate_proj.weight", TensorType::Mlp),
        ("transformer.h.0.ln_1.bias", TensorType::Norm),
        ("transformer.wpe.weight", TensorType::Embedding),
        ("classifier.weight", TensorType::Head),
        ("encoder.layer.0.output.dense.weight", TensorType::Mlp),
        ("encoder.layer.0.attention.output.dense.weight", TensorType::Attention),
        ("output.weight", TensorType::Head),
        ("unembed.weight", TensorType::Head),
        ("fc1.weight", TensorType::Mlp),
        ("conv1.weight", TensorType::Other),
    ] {
        assert_eq!(TensorType::of(name), expected, "{name}");
    }
}

#[test]
fn noise_and_underflow_are_found_across_steps_and_in_histograms() {
    // Eight steps of pure noise beside eight of a signal, in 4096 elements each.
    let noise = |seed: u64, i: u64| named(seed, i) - 0.5;
    let plan = Plan::new([("noise", DType::F32, 4096), ("signal", DType::F32, 4096)]).unwrap();
    let mut probe = Probe::new(Cpu, plan.clone(), Config::new().tracking(GsnrConfig::new())).unwrap();
    let mut rules = Rules::default();
    rules.signal = Limits::new(0.01, f64::NEG_INFINITY);
    let mut health = Health::new(&plan, rules).unwrap();
    for step in 0..8 {
        let noise: Vec<f32> = (0..4096).map(|i| 1e-3 * noise(step, i)).collect();
        let signal: Vec<f32> = noise.iter().map(|x| x + 1e-3).collect();
        health.diagnose(&probe.measure_host(&[HostTensor::F32(&noise), HostTensor::F32(&signal)]).unwrap()).unwrap();
    }
    let report = probe.gsnr_report().unwrap();
    let findings = health.diagnose_gsnr(&report).unwrap();
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!((finding.kind, finding.tensor.as_deref(), finding.step), (FindingKind::Noisy, Some("noise"), 8));
    assert!(table(&findings).to_string().contains("noisy     noise: squared gradient over its variance"));
    health.set_rules(Rules::preset(Preset::LrScaled).learning_rate(1e-3)).unwrap();
    let findings = health.diagnose_gsnr(&report).unwrap();
    assert_eq!((findings.len(), findings[0].rule, findings[0].threshold), (1, "gsnr_median", 1.0));

    // A fifth of the elements is 2^-60 of the largest: beyond what f16 spans, not bf16.
    let elements: Vec<f32> = (0..100).map(|i| if i % 5 == 0 { 2f32.powi(-60) } else { 1.0 }).collect();
    let plan = Plan::new([("a", DType::F32, 100)]).unwrap();
    let mut probe = Probe::new(Cpu, plan.clone(), Config::new().histogram()).unwrap();
    let report = probe.histogram_host(&[HostTensor::F32(&elements)]).unwrap();
    let findings = Health::new(&plan, Rules::default()).unwrap().diagnose_histogram(&report).unwrap();
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!((finding.kind, finding.value, finding.threshold), (FindingKind::Underflow, 0.2, 0.1));
    assert_eq!(
        finding.message,
        "20 % of the elements that are not 0 become 0 in f16 at a loss scale of 2^13, limit 10 %"
    );
    let mut rules = Rules::default();
    rules.underflow = vec![UnderflowRule {
        format: gradprobe::histogram::Format::E4M3,
        scale: Some(0),
        above: Limits::new(0.0, 0.1),
    }];
    let findings = Health::new(&plan, rules).unwrap().diagnose_histogram(&report).unwrap();
    assert_eq!((findings.len(), findings[0].severity), (1, CRITICAL));
}

#[test]
fn a_diagnosis_reads_at_a_glance_whatever_the_names() {
    let name = "a \"quoted\"\nname\u{1b}[2J\t/";
    let report = measure(&[(name, &[f32::NAN, 1.0]), ("b", &[1e20; 4]), ("c", &[1e21; 4])]);
    let diagnosis = diagnose_by(Rules::default(), &report);
    let text = diagnosis.to_string();
    assert!(text.starts_with("step 1: critical (3 of 3 tensors)\n"), "{text}");
    assert!(text.contains(r#"nan       a "quoted"\nname\u{1b}[2J\t/: 1 of 2 elements are NaN"#), "{text}");
    assert!(text.contains("exploding c and 1 more: largest |x| 1.000e21"), "{text}");
    assert!(text.contains("began at step 1 in a"), "{text}");
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
    let remedies = diagnosis.advice();
    assert_eq!(remedies[0], advice(FindingKind::Nan)[0]);
    let mut sorted = remedies.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), remedies.len());
    assert!(diagnosis.findings()[1].advice.iter().all(|remedy| remedies.contains(remedy)));
    assert!(FindingKind::ALL.iter().all(|&kind| !advice(kind).is_empty()));
}
