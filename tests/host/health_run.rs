//! What is said of several steps of a run: spikes, persistence, clips, what healthy steps taught, the frontier of NaN;
//! when to look, and how two runs compare.

use crate::models::{golden, host::OnHost, kinds, measure, measure_with, named};
use gradprobe::{
    Clip, Config, Cpu, DType, Error, Finding, FindingKind, HostTensor, NonFinitePolicy, Plan, Probe, Verdict,
    health::{
        Baseline, Cadence, Comparison, Diagnosis, Health, Limits, NormChange, Preset, Rules, RunSummary, Statistic,
        ThresholdRule, backward_order, suggested_clip,
    },
};

const WARNING: Verdict = Verdict::Warning;
const CRITICAL: Verdict = Verdict::Critical;

/// Diagnoses steps of two tensors.
struct Run {
    probe: Probe,
    health: Health,
}

impl Run {
    fn new(rules: Rules, config: Config) -> Self {
        let plan = Plan::new([("a", DType::F32, 1), ("b", DType::F32, 1)]).unwrap();
        Self { health: Health::new(&plan, rules).unwrap(), probe: Probe::new(Cpu, plan, config).unwrap() }
    }

    fn step(&mut self, a: f32, b: f32) -> Diagnosis {
        let report = self.probe.measure_host(&[HostTensor::F32(&[a]), HostTensor::F32(&[b])]).unwrap();
        self.health.diagnose(&report).unwrap()
    }
}

#[test]
fn change_is_measured_from_the_last_clean_step() {
    let rules = Rules::default().with(ThresholdRule::above(Statistic::Change, FindingKind::Unstable, 2.0, 50.0));
    let mut run = Run::new(rules, Config::default());
    assert_eq!(kinds(&run.step(3e-3, 4e-3)), []);
    let nan = run.step(f32::NAN, 0.9);
    // Of the finite tensor in the bad step too.
    assert_eq!(kinds(&nan), [(FindingKind::Nan, CRITICAL), (FindingKind::Unstable, CRITICAL)]);
    let after = run.step(3e-3, 9e-3);
    let [finding] = after.findings() else { panic!("{after}") };
    assert_eq!((finding.rule, finding.tensor.as_deref(), finding.severity), ("change", Some("b"), WARNING));
    assert!((finding.value - 2.25).abs() < 1e-6);
    let risen = run.step(0.3, 0.0);
    let of_a = risen.findings().iter().find(|finding| finding.tensor.as_deref() == Some("a")).unwrap();
    assert_eq!((of_a.rule, of_a.severity, of_a.threshold), ("change", CRITICAL, 50.0));
    // After a norm of 0 there is no change.
    assert!(run.step(0.3, 0.3).findings().iter().all(|finding| finding.tensor.as_deref() != Some("b")));
    run.health.reset();
    assert_eq!(kinds(&run.step(1e-6, 1e-6)), []);
}

#[test]
fn an_explosion_is_found_before_its_nan() {
    let reports: Vec<_> = (0..4).map(|step| golden(&format!("exploding-step{step}"))).collect();
    let mut health = Health::new(reports[0].plan(), Rules::default()).unwrap();
    let found: Vec<_> = reports.iter().map(|report| kinds(&health.diagnose(report).unwrap())).collect();
    assert_eq!(found[0], []);
    // 0.49, then 11.6, then 635.
    assert_eq!(found[1], [(FindingKind::Spike, WARNING)]);
    assert_eq!(found[2], [(FindingKind::Spike, WARNING)]);
    assert_eq!(found[3][0], (FindingKind::Nan, CRITICAL));
}

#[test]
fn a_spike_is_an_outlier_of_the_logarithm_and_names_who_rose() {
    let mut run = Run::new(Rules::default(), Config::default());
    for step in 0..40 {
        let noise = named(1, step);
        assert_eq!(run.step(1e-3 * (1.0 + 0.2 * noise), 1e-4).verdict(), Verdict::Healthy, "{step}");
        if step % 5 == 0 {
            assert_eq!(run.step(f32::INFINITY, 1.0).verdict(), Verdict::Critical);
        }
    }
    let before = run.health.clone();
    let spike = run.step(1.1e-3, 6e-3);
    let [finding] = spike.findings() else { panic!("{spike}") };
    assert_eq!((finding.kind, finding.severity, finding.rule), (FindingKind::Spike, WARNING, "spike"));
    // ln(6.1 / 1.1) over a deviation that counts as 0.375 at least.
    assert!((4.4..4.8).contains(&finding.value), "{finding:?}");
    assert_eq!(finding.tensor.as_deref(), Some("b"));
    assert!(finding.message.contains("the 40 steps before") && finding.message.contains("b (100 %)"), "{finding:?}");
    assert!(finding.message.ends_with("its largest element has 100 % of its square"), "{finding:?}");
    let jump = |a: f32| {
        let mut run = Run { health: before.clone(), probe: Run::new(Rules::default(), Config::default()).probe };
        kinds(&run.step(a, 1e-4))
    };
    assert_eq!(jump(4.8e-3), []);
    assert_eq!(jump(0.2), [(FindingKind::Spike, CRITICAL)]);
    // To a twentieth at once.
    assert_eq!(jump(0.0), []);
    let mut run = Run { health: before, probe: Run::new(Rules::default(), Config::default()).probe };
    assert_eq!(kinds(&run.step(3e-5, 1e-5)), [(FindingKind::Unstable, WARNING)]);
}

#[test]
fn a_drift_is_no_spike_and_noisy_steps_need_more() {
    let mut run = Run::new(Rules::default(), Config::default());
    for step in 0..30 {
        let norm = 1.3f32.powi(step);
        assert_eq!(kinds(&run.step(norm, norm)), [], "{step}");
    }
    // Of a batch of one sample: a factor of e in either direction is usual.
    let mut run = Run::new(Rules::default(), Config::default());
    for step in 0..200 {
        let norm = (2.0 * named(7, step) - 1.0).exp();
        assert_eq!(kinds(&run.step(norm, norm)), [], "{step}");
    }
    assert_eq!(kinds(&run.step(6.0, 6.0)), []);
    assert_eq!(kinds(&run.step(60.0, 60.0)), [(FindingKind::Spike, WARNING)]);
}

#[test]
fn norms_that_vary_by_more_than_their_mean_are_unstable() {
    let rules = Rules::preset(Preset::LrScaled).learning_rate(1e-3);
    let mut run = Run::new(rules, Config::default());
    for step in 1..=32 {
        // One large norm in eight: a deviation of √7 times its eighth over a mean of an eighth.
        let found = kinds(&run.step(if step % 8 == 0 { 1.0 } else { 1e-4 }, 0.0));
        let unstable: &[_] = if step < 16 { &[] } else { &[(FindingKind::Unstable, WARNING)] };
        let of_norms: Vec<_> = found.into_iter().filter(|(kind, _)| *kind != FindingKind::Vanishing).collect();
        assert_eq!(of_norms, unstable, "{step}");
    }
}

#[test]
fn what_vanishes_for_several_steps_is_critical() {
    let rules = Rules::preset(Preset::Transformer);
    let mut run = Run::new(rules, Config::default());
    assert_eq!(kinds(&run.step(1e-8, 1.0)), [(FindingKind::Vanishing, WARNING)]);
    assert_eq!(kinds(&run.step(1e-8, 1.0)), [(FindingKind::Vanishing, WARNING)]);
    // A bad step neither counts nor interrupts.
    assert_eq!(kinds(&run.step(1e-8, f32::NAN)), [(FindingKind::Nan, CRITICAL), (FindingKind::Vanishing, WARNING)]);
    let third = run.step(1e-8, 1.0);
    assert_eq!(kinds(&third), [(FindingKind::Vanishing, CRITICAL)]);
    assert_eq!(third.findings()[0].message, "norm 1.000e-8, below 1.000e-7, for 3 steps");
    assert_eq!(third.verdicts(), [Verdict::Critical, Verdict::Healthy]);
    // The word is of the step alone.
    assert_eq!(third.tensor_words(), [1 << FindingKind::Vanishing as u32, 0]);
    assert_eq!(kinds(&run.step(1e-3, 1.0)), []);
    assert_eq!(kinds(&run.step(1e-8, 1.0)), [(FindingKind::Vanishing, WARNING)]);
}

#[test]
fn a_clip_that_is_always_there_or_too_tight_is_found() {
    let clipped = |norm: f32, max_norm: f64, steps: u32| {
        let mut run = Run::new(Rules::default(), Config::default().clip(Clip::global_norm(max_norm)));
        (0..steps)
            .map(|_| kinds(&run.step(norm, 0.0)))
            .last()
            .unwrap()
            .into_iter()
            .filter(|(kind, _)| *kind != FindingKind::Zeros)
            .collect::<Vec<_>>()
    };
    assert_eq!(clipped(0.5, 1.0, 20), []);
    assert_eq!(clipped(0.5, 0.4, 15), []);
    // Always, but lightly, as in many a training; a cut by 20; the source's example, a cut by 50, and a little more.
    assert_eq!(clipped(0.5, 0.4, 16), []);
    assert_eq!(clipped(0.5, 0.025, 16), []);
    assert_eq!(clipped(0.5, 0.0099, 16), [(FindingKind::Clipped, WARNING)]);
}

#[test]
fn the_frontier_is_the_first_bad_tensor_in_backward_order_and_stays() {
    let names = ["embed.weight", "blocks.0.weight", "none", "blocks.1.weight", "head.weight"];
    let step = |bad: &[usize]| {
        let nan = [0.5, f32::NAN];
        let tensors: Vec<(&str, &[f32])> = (names.iter().enumerate())
            .map(|(t, name)| {
                (
                    *name,
                    if t == 2 {
                        &[][..]
                    } else if bad.contains(&t) {
                        &nan
                    } else {
                        &[0.5, 0.5]
                    },
                )
            })
            .collect();
        measure_with(Config::default().non_finite(NonFinitePolicy::Propagate), &tensors)
    };
    let plan = step(&[]).plan().clone();
    let mut health = Health::new(&plan, Rules::default()).unwrap();
    assert_eq!(health.diagnose(&step(&[])).unwrap().frontier(), None);
    let first = health.diagnose(&step(&[0, 1])).unwrap();
    let frontier = first.frontier().unwrap();
    assert_eq!((frontier.tensor.as_str(), frontier.index, frontier.element), ("blocks.0.weight", 1, 1));
    // The empty tensor between them is neither clean nor bad.
    assert_eq!((frontier.last_clean.as_deref(), frontier.kind), (Some("blocks.1.weight"), FindingKind::Nan));
    // The flood after it, and the clean step after that.
    assert_eq!(health.diagnose(&step(&[0, 1, 3, 4])).unwrap().frontier(), Some(frontier));
    assert_eq!(health.diagnose(&step(&[])).unwrap().frontier(), Some(frontier));
    health.reset();
    let flood = health.diagnose(&step(&[0, 1, 3, 4])).unwrap();
    let frontier = flood.frontier().unwrap();
    assert_eq!((frontier.tensor.as_str(), &frontier.last_clean), ("head.weight", &None));
    // In an order of the user's own.
    let mut other = Health::new(&plan, Rules::default()).unwrap().backward_order(vec![3, 2, 0, 1, 4]).unwrap();
    let frontier = other.diagnose(&step(&[0, 1])).unwrap().frontier().unwrap().clone();
    assert_eq!((frontier.index, frontier.last_clean.as_deref()), (0, Some("blocks.1.weight")));
    for order in [vec![0, 1], vec![0, 1, 2, 3, 3], vec![1, 2, 3, 4, 5]] {
        let refused = Health::new(&plan, Rules::default()).unwrap().backward_order(order);
        assert!(matches!(refused, Err(Error::InvalidConfig { option: "backward_order", .. })));
    }
    // Names that sorting has put out of order tell it as well.
    let sorted = ["blocks.0.attn.w", "blocks.0.mlp.w", "blocks.10.mlp.w", "blocks.2.mlp.w", "embed", "head", "norm"];
    let plan = Plan::new(sorted.map(|name| (name, DType::F32, 1))).unwrap();
    let order: Vec<&str> = backward_order(&plan).into_iter().map(|index| sorted[index]).collect();
    let expected = ["head", "norm", "blocks.10.mlp.w", "blocks.2.mlp.w", "blocks.0.mlp.w", "blocks.0.attn.w", "embed"];
    assert_eq!(order, expected);
}

#[test]
fn healthy_steps_teach_limits_that_are_kept_as_text() {
    let name = "odd\tname\\with\nlines\r";
    let of = |a: f32, b: f32| measure(&[(name, &[a]), ("b", &[b])]);
    // A step that is not finite and odd ones, which the median does not follow; a tensor without a gradient in some.
    let steps =
        [(0.1, 0.0), (0.3, 2e-8), (f32::NAN, 100.0), (0.2, 1e-8), (0.2, 4e-8), (7e3, 2e-8), (0.2, 2e-8), (0.1, 2e-8)];
    let reports = steps.map(|(a, b)| of(a, b));
    let plan = reports[0].plan().clone();
    let baseline = Baseline::of_reports(&plan, &reports).unwrap().at_learning_rate(1e-3);
    let usual: Vec<_> = baseline.tensors().map(|(_, usual)| usual).collect();
    assert_eq!((usual[0].steps, usual[1].steps), (7, 6));
    assert!((usual[0].median / 0.2 - 1.0).abs() < 1e-6 && (usual[1].median / 2e-8 - 1.0).abs() < 1e-6, "{usual:?}");
    // ln 1.5, of 0, 0, 0.41, 0.69, 0.69 and more.
    assert!((usual[0].deviation / (1.4826 * 1.5f64.ln()) - 1.0).abs() < 1e-6, "{usual:?}");
    let text = baseline.to_string();
    assert_eq!(text.lines().count(), 5);
    assert_eq!(text.parse::<Baseline>().unwrap(), baseline);
    let empty = Baseline::of_reports(&plan, []).unwrap();
    assert_eq!(empty.to_string().parse::<Baseline>().unwrap(), empty);

    let rules = |rate: f64| {
        let rules = Rules::preset(Preset::Doctor).without(FindingKind::Vanishing).without(FindingKind::Exploding);
        let limits = Limits::new(1e300, 1e300);
        let mut rules = rules.learning_rate(rate).without(FindingKind::Vanishing).without(FindingKind::Exploding);
        rules.spike = limits;
        rules.baseline(text.parse().unwrap())
    };
    let diagnose = |rate: f64, a: f32, b: f32| Health::new(&plan, rules(rate)).unwrap().diagnose(&of(a, b)).unwrap();
    let found = |a: f32, b: f32| {
        let diagnosis = diagnose(1e-3, a, b);
        diagnosis.findings().iter().map(|f| (f.kind, f.severity, f.tensor.clone())).collect::<Vec<_>>()
    };
    // Six deviations of 0.375 are a factor of 9.5, twelve of 90.
    assert_eq!(found(0.2, 2e-8), []);
    assert_eq!(found(0.2, 1.8e-7), []);
    assert_eq!(found(0.2, 2e-7), [(FindingKind::Exploding, WARNING, Some("b".to_owned()))]);
    assert_eq!(found(0.2, 2e-6), [(FindingKind::Exploding, CRITICAL, Some("b".to_owned()))]);
    assert_eq!(found(0.2, 2e-9), [(FindingKind::Vanishing, WARNING, Some("b".to_owned()))]);
    assert_eq!(found(0.2, 0.0), []);
    // Under another learning rate, and from too few steps, it cannot tell.
    assert_eq!(kinds(&diagnose(1.9e-3, 0.2, 2e-6)), [(FindingKind::Exploding, CRITICAL)]);
    let other = diagnose(2.1e-3, 0.2, 2e-6);
    assert_eq!(
        (kinds(&other), other.undecided()[0].needs.as_str()),
        (vec![], "a baseline at a learning rate near 2.1e-3; this one is of 1e-3")
    );
    let few = Baseline::of_reports(&plan, &reports[..5]).unwrap();
    let few = Health::new(&plan, Rules::default().baseline(few)).unwrap().diagnose(&of(0.2, 2e-6)).unwrap();
    assert_eq!((kinds(&few), few.undecided()[0].needs.as_str()), (vec![], "a baseline of 6 steps"));

    // From a run's own last steps, the first of them left out.
    let mut probe = Probe::new(Cpu, plan.clone(), Config::new().history(8)).unwrap();
    for (a, b) in steps {
        probe.measure_host(&[HostTensor::F32(&[a]), HostTensor::F32(&[b])]).unwrap();
    }
    let history = probe.history_report().unwrap();
    assert_eq!(Baseline::of_history(&history, 1).at_learning_rate(1e-3), baseline);
    assert_eq!(Baseline::of_history(&history, 3), Baseline::of_reports(&plan, &reports[2..]).unwrap());

    // Of another model, or no baseline at all.
    let refused = |tensors: &[(&str, u64)]| {
        let plan = Plan::new(tensors.iter().map(|&(name, len)| (name, DType::F32, len))).unwrap();
        let error = Health::new(&plan, Rules::default().baseline(baseline.clone())).unwrap_err();
        assert!(matches!(error, Error::BaselineOfAnotherModel { .. }));
        error.to_string()
    };
    let of_another = r#"the baseline is of another model: tensor "#;
    assert_eq!(refused(&[(name, 1), ("c", 1)]), format!(r#"{of_another}"c": it has "b" in its place"#));
    assert_eq!(
        refused(&[(name, 1), ("b", 2)]),
        format!(r#"{of_another}"b": it has 1 elements there, 2 elements here"#)
    );
    assert_eq!(refused(&[(name, 1)]), format!(r#"{of_another}"b": only it has that tensor"#));
    assert!(refused(&[(name, 1), ("b", 1), ("c", 1)]).contains("it does not have that tensor"));
    assert!(Baseline::of_reports(&plan, [&measure(&[("a", &[1.0])])]).is_err());
    for broken in [
        String::new(),
        "something else\n".to_owned(),
        text.replacen("7\t", "x\t", 1),
        text.replacen("1e-3", "0", 1),
        text.replace("\tb\n", "\n"),
        text.replace(r"\t", r"\x"),
        text.lines().next().unwrap().to_owned(),
        text.replace("1\t7\t", "1\t7\tNaN\t"),
        text.replace("1\t6\t", "1\t6\t-"),
    ] {
        let error = broken.parse::<Baseline>().unwrap_err().to_string();
        assert!(error.starts_with("baseline must be ") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn a_report_of_another_plan_is_refused_and_bad_rules_change_nothing() {
    let mut run = Run::new(Rules::default(), Config::default());
    run.step(1e-3, 1e-3);
    let refused = run.health.diagnose(&measure(&[("a", &[1.0])])).unwrap_err();
    assert!(matches!(refused, Error::ReportOfAnotherPlan { .. }), "{refused}");
    let mut bad = Rules::default();
    bad.spike = Limits::new(f64::NAN, f64::NAN);
    assert!(run.health.set_rules(bad).is_err());
    // The step before is still known.
    run.health.set_rules(Rules::preset(Preset::Transformer)).unwrap();
    assert_eq!(kinds(&run.step(1.0, 1.0)), [(FindingKind::Unstable, WARNING)]);
}

#[test]
fn cadence_chooses_steps_and_tensors() {
    let every = Cadence::every(3).unwrap();
    assert_eq!((0..10).filter(|&step| every.includes(step)).collect::<Vec<_>>(), [0, 3, 6, 9]);
    let windows = Cadence::every(2).unwrap().window(3, 6).unwrap().window(9, 10).unwrap();
    assert_eq!((0..14).filter(|&step| windows.includes(step)).collect::<Vec<_>>(), [4, 6, 10]);
    assert!(windows.is_due(5, Verdict::Warning) && !windows.is_due(5, Verdict::Healthy));
    assert!(Cadence::every(0).is_err() && Cadence::every(1).unwrap().window(2, 1).is_err());
    let plan = Plan::new(["h.0.w", "h.1.w", "head"].map(|name| (name, DType::F32, 1))).unwrap();
    let select = |patterns: &[&str]| Cadence::every(1).unwrap().tensors(patterns.iter().copied()).select(&plan);
    assert_eq!(select(&[]).unwrap(), [0, 1, 2]);
    assert_eq!(select(&["head", "h.?.w"]).unwrap(), [0, 1, 2]);
    assert_eq!(select(&["h.1.*"]).unwrap(), [1]);
    assert_eq!(select(&["h.1.*", "h.2.*"]), Err(Error::NoSuchTensor { pattern: "h.2.*".to_owned() }));
}

#[test]
fn two_runs_compare_by_mean_and_deviation() {
    let of = |steps: &[[f32; 3]]| -> Vec<_> {
        steps.iter().map(|[a, b, c]| measure(&[("a\n", &[*a]), ("b", &[*b]), ("c", &[*c])])).collect()
    };
    let before = of(&[[1.0, 1.0, 1.0], [3.0, 3.0, 3.0], [f32::NAN, 1.0, 1.0]]);
    let after = of(&[[30.0, 0.1, 1.6], [30.0, 0.1, 2.4]]);
    let (before, after) = (RunSummary::of_reports(&before).unwrap(), RunSummary::of_reports(&after).unwrap());
    let (name, a) = before.tensors().next().unwrap();
    assert_eq!((name, a.steps, a.mean, a.std, before.left_out), ("a\n", 2, 2.0, 1.0, 1));
    let comparison = Comparison::new(&before, &after);
    let changes: Vec<NormChange> = comparison.lines.iter().map(|line| line.change).collect();
    assert_eq!(changes[1..], [NormChange::RoseTenfold, NormChange::FellTenfold, NormChange::Steadied]);
    let text = comparison.to_string();
    assert!(text.contains(r"a\n") && text.contains("rose more than tenfold") && text.contains("1, then 0"), "{text}");
    assert!(Comparison::new(&before, &before).lines.iter().all(|line| line.change == NormChange::Alike));

    let other = RunSummary::of_reports(&[measure(&[("b", &[1.0]), ("d", &[1.0])])]).unwrap();
    assert_eq!(Comparison::new(&before, &other).unmatched, ["a\n", "c", "d"]);
    let mixed = [measure(&[("b", &[1.0])]), measure(&[("d", &[1.0])])];
    let refused = RunSummary::of_reports(&mixed).unwrap_err();
    assert_eq!(refused.to_string(), r#"the report is of another plan: tensor "b": it has "d" in its place"#);
    let plan = measure(&[("a", &[1.0])]).plan().clone();
    let mut probe = Probe::new(Cpu, plan, Config::new().history(4)).unwrap();
    let reports: Vec<_> =
        [1.0, 2.0, f32::INFINITY].map(|x| probe.measure_host(&[HostTensor::F32(&[x])]).unwrap()).into();
    let history = RunSummary::of_history(&probe.history_report().unwrap());
    assert_eq!(history, RunSummary::of_reports(&reports).unwrap());
}

#[test]
fn a_clip_is_suggested_by_a_percentile_of_the_clean_norms() {
    let config = Config::new().clip(Clip::global_norm(0.5)).history(8);
    let mut probe = Probe::new(Cpu, measure(&[("a", &[1.0])]).plan().clone(), config).unwrap();
    assert_eq!(suggested_clip(&probe.history_report().unwrap(), 95.0), Ok(None));
    for x in [3.0, 1.0, f32::NAN, 2.0] {
        probe.measure_host(&[HostTensor::F32(&[x])]).unwrap();
    }
    let history = probe.history_report().unwrap();
    let suggested = [0.0, 50.0, 75.0, 100.0].map(|percentile| suggested_clip(&history, percentile).unwrap());
    assert_eq!(suggested, [Some(1.0), Some(2.0), Some(2.5), Some(3.0)]);
    assert!([-1.0, 101.0, f64::NAN].iter().all(|&percentile| suggested_clip(&history, percentile).is_err()));
}

/// Whatever the elements: every bit of a word has its finding, every finding its verdict, and no number is made up.
#[test]
fn words_findings_and_verdicts_agree_on_any_input() {
    let edges = [0.0, -0.0, 1e-45, -1e-38, 1e-20, 1e-9, 1e-3, 1.0, -7.0, 1e5, f32::MAX, f32::INFINITY, f32::NAN];
    let names = ["embed.weight", "h.0.weight", "h.0.k_proj.bias", "h.1.weight", "h.2.weight", "empty", "head\n\"x\""];
    let plan = Plan::new(names.map(|name| (name, DType::F32, if name == "empty" { 0 } else { 3 }))).unwrap();
    for preset in Preset::ALL {
        let mut health = Health::new(&plan, Rules::preset(preset).learning_rate(0.1)).unwrap();
        let mut probe = Probe::new(Cpu, plan.clone(), Config::default().clip(Clip::global_norm(1.0))).unwrap();
        for step in 0..300 {
            // Each step from a few neighbours among the values, so that many are finite.
            let element = |i: usize| {
                let place = 11.0 * named(1, step) + 2.9 * named(2 + step, i as u64);
                edges.iter().enumerate().rfind(|(edge, _)| *edge as f32 <= place).map_or(0.0, |(_, value)| *value)
            };
            let elements: Vec<f32> = (0..21).map(element).collect();
            let views: Vec<HostTensor> = (0..names.len())
                .map(|t| HostTensor::F32(if names[t] == "empty" { &[] } else { &elements[3 * t..3 * t + 3] }))
                .collect();
            let norms: Vec<f64> = (0..names.len()).map(|t| f64::from(element(t)).abs()).collect();
            let report = probe.measure_host(&views).unwrap().with_param_norms(&norms).unwrap();
            let diagnosis = health.diagnose(&report).unwrap();
            let of = |name: &str| {
                let concerns = |f: &&Finding| f.tensors().any(|tensor| tensor == name);
                diagnosis.findings().iter().filter(concerns).collect::<Vec<_>>()
            };
            for ((name, verdict), &word) in diagnosis.tensors().zip(diagnosis.tensor_words()) {
                let found = of(name);
                let worst = found.iter().map(|finding| finding.severity).max().unwrap_or_default();
                assert_eq!(verdict, worst, "{preset:?} {step} {name}: {word:x} {found:?}");
                let vanishes = found.iter().any(|finding| finding.kind == FindingKind::Vanishing);
                for &kind in &FindingKind::ALL[..16] {
                    let bits = (word >> kind as u32 & 1, word >> (16 + kind as u32) & 1);
                    let finding = found.iter().find(|finding| finding.kind == kind);
                    if bits != (0, 0) && !(kind == FindingKind::Dead && vanishes) {
                        let severity = if bits.1 == 1 { CRITICAL } else { WARNING };
                        assert!(
                            finding.is_some_and(|finding| finding.severity >= severity),
                            "{name} {kind}: {found:?}"
                        );
                    }
                }
            }
            let worst = diagnosis.findings().iter().map(|finding| finding.severity).max();
            assert_eq!(diagnosis.verdict(), worst.unwrap_or_default());
            assert!(diagnosis.findings().is_sorted_by(|a, b| a.severity >= b.severity));
            for finding in diagnosis.findings() {
                assert!(finding.value.is_finite() && finding.threshold.is_finite(), "{finding:?}");
                assert!(!finding.advice.is_empty() && !finding.message.contains('\n'), "{finding:?}");
            }
            assert!(diagnosis.to_string().chars().all(|c| c == '\n' || !c.is_control()));
        }
    }
}
