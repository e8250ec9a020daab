//! What the default rules say of what gets no gradient and of the size of weights: on runs made for it. How well they fit real
//! trainings is `tests/zoo`'s.

use crate::models::{host::OnHost, kinds, named};
use gradprobe::{
    Absent, Config, Cpu, DType, Error, FindingKind, HostTensor, Plan, Probe, Report, Tensor, Verdict,
    gsnr::GsnrConfig,
    health::{Diagnosis, Health, Rules},
};

const WARNING: Verdict = Verdict::Warning;
const CRITICAL: Verdict = Verdict::Critical;

/// A run of weights and biases by their shapes.
struct Run {
    probe: Probe,
    health: Health,
    lengths: Vec<usize>,
    step: u64,
}

impl Run {
    fn new(tensors: &[(&str, &[u64])]) -> Self {
        let plan = plan(tensors);
        let lengths = plan.tensors().iter().map(|tensor| usize::try_from(tensor.len).unwrap()).collect();
        let health = Health::new(&plan, Rules::default()).unwrap();
        let probe = Probe::new(Cpu, plan, Config::new().tracking(GsnrConfig::new())).unwrap();
        Self { probe, health, lengths, step: 0 }
    }

    /// Noise of these sizes, 0 for no gradient.
    fn noise(&mut self, sizes: &[f32]) -> Vec<Vec<f32>> {
        self.step += 1;
        let of = |(tensor, (&length, &size)): (usize, (&usize, &f32))| {
            (0..length as u64).map(|i| size * (named(100 * self.step + tensor as u64, i) + 0.5)).collect()
        };
        self.lengths.iter().zip(sizes).enumerate().map(of).collect()
    }

    fn measure(&mut self, gradients: &[Vec<f32>]) -> Report {
        let views: Vec<HostTensor> = gradients.iter().map(|gradient| HostTensor::F32(gradient)).collect();
        self.probe.measure_host(&views).unwrap()
    }

    fn step(&mut self, sizes: &[f32]) -> Diagnosis {
        let gradients = self.noise(sizes);
        let report = self.measure(&gradients);
        self.health.diagnose(&report).unwrap()
    }
}

fn plan(tensors: &[(&str, &[u64])]) -> Plan {
    let plan = Plan::new(tensors.iter().map(|(name, shape)| (*name, DType::F32, shape.iter().product())));
    plan.unwrap().with_shapes(tensors.iter().map(|(_, shape)| shape.to_vec())).unwrap()
}

const TWO_LAYERS: [(&str, &[u64]); 4] =
    [("0.weight", &[4, 3]), ("0.bias", &[4]), ("1.weight", &[2, 4]), ("1.bias", &[2])];

#[test]
fn tensors_without_a_gradient_are_one_finding_after_five_steps() {
    let mut run = Run::new(&TWO_LAYERS);
    for step in 1..5 {
        let diagnosis = run.step(&[0.0, 0.0, 1.0, 1.0]);
        assert_eq!(kinds(&diagnosis), [], "{step}");
        let needs = format!("{} more steps without a gradient", 5 - step);
        assert_eq!(diagnosis.undecided().len(), 2);
        assert_eq!(diagnosis.undecided()[0].needs, needs);
        let line = format!("? zeros     0.bias and 1 more: cannot tell yet; that takes {needs}");
        assert!(diagnosis.to_string().contains(&line), "{diagnosis}");
    }
    let diagnosis = run.step(&[0.0, 0.0, 1.0, 1.0]);
    let [finding] = diagnosis.findings() else { panic!("{diagnosis}") };
    assert_eq!((finding.kind, finding.severity, finding.since, finding.step), (FindingKind::Zeros, WARNING, 1, 5));
    // The backward pass comes to the bias first.
    assert_eq!((finding.tensor.as_deref(), &finding.others[..]), (Some("0.bias"), &["0.weight".to_owned()][..]));
    assert_eq!(finding.message, "no gradient for 5 steps; it never had one; 1.weight above it has one");
    assert_eq!(diagnosis.verdicts(), [WARNING, WARNING, Verdict::Healthy, Verdict::Healthy]);
    assert!(diagnosis.to_string().contains("zeros     0.bias and 1 more, since step 1: no gradient"), "{diagnosis}");
    // It had one: the run begins anew.
    assert_eq!(kinds(&run.step(&[1.0; 4])), []);
    for step in 0..4 {
        assert_eq!(kinds(&run.step(&[0.0, 0.0, 1.0, 1.0])), [], "{step}");
    }
}

#[test]
fn experts_that_come_and_go_and_biases_that_cancel_are_healthy() {
    // Of three alike, one is used in a step: each comes back.
    let names = ["part.0.weight", "part.1.weight", "part.2.weight", "head.weight"];
    let mut run = Run::new(&names.map(|name| (name, &[2, 2][..])));
    for step in 0..12usize {
        let sizes: Vec<f32> = (0..4).map(|part| f32::from(u8::from(part == 3 || part == step % 2))).collect();
        // The third is never used; the others tell that such parts come and go.
        assert_eq!(kinds(&run.step(&sizes)), [], "{step}");
    }
    // The last bias of a critic: the loss is a difference, in which it cancels.
    let mut run = Run::new(&TWO_LAYERS);
    for step in 0..12 {
        assert_eq!(kinds(&run.step(&[1.0, 1.0, 1.0, 0.0])), [], "{step}");
    }
    // An expert by name.
    let mut run = Run::new(&[("moe.experts.0.weight", &[2, 2]), ("head.weight", &[2, 2])]);
    for step in 0..12 {
        assert_eq!(kinds(&run.step(&[0.0, 1.0])), [], "{step}");
    }
}

#[test]
fn no_gradient_at_all_is_critical_after_three_steps() {
    let mut run = Run::new(&TWO_LAYERS);
    assert_eq!(kinds(&run.step(&[0.0; 4])), [(FindingKind::Vanishing, WARNING)]);
    assert_eq!(kinds(&run.step(&[0.0; 4])), [(FindingKind::Vanishing, WARNING)]);
    let third = run.step(&[0.0; 4]);
    assert_eq!(kinds(&third), [(FindingKind::Vanishing, CRITICAL)]);
    let finding = &third.findings()[0];
    assert_eq!((finding.since, finding.tensor.as_deref(), finding.others.len()), (1, Some("1.bias"), 3));
    assert_eq!(kinds(&run.step(&[1.0; 4])), []);
    // A batch without a loss, as of a hinge.
    let diagnosis = run.step(&[0.0; 4]);
    assert_eq!((kinds(&diagnosis), diagnosis.undecided().len()), (vec![], 1));
    // Nor does it make a model of parts that come and go: with it these are five steps.
    for _ in 0..3 {
        assert_eq!(kinds(&run.step(&[0.0, 0.0, 1.0, 1.0])), []);
    }
    assert_eq!(kinds(&run.step(&[0.0, 0.0, 1.0, 1.0])), [(FindingKind::Zeros, WARNING)]);
}

#[test]
fn a_weight_with_nothing_beside_the_largest_vanishes_and_a_bias_does_not() {
    // In front of a normalisation a bias has rounding for a gradient.
    let mut run = Run::new(&TWO_LAYERS);
    for step in 0..6 {
        assert_eq!(kinds(&run.step(&[1.0, 1e-8, 1.0, 1.0])), [], "{step}");
    }
    // Behind a branch that begins at 0 it is little at first, and grows.
    let mut run = Run::new(&TWO_LAYERS);
    for (step, size) in [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3].into_iter().enumerate() {
        assert_eq!(kinds(&run.step(&[size, size, 1.0, 1.0])), [], "{step}");
    }
    let mut run = Run::new(&TWO_LAYERS);
    assert_eq!(kinds(&run.step(&[1e-8, 1e-8, 1.0, 1.0])), []);
    assert_eq!(kinds(&run.step(&[1e-8, 1e-8, 1.0, 1.0])), []);
    let third = run.step(&[1e-8, 1e-8, 1.0, 1.0]);
    let [finding] = third.findings() else { panic!("{third}") };
    assert_eq!((finding.kind, finding.severity, finding.since), (FindingKind::Vanishing, WARNING, 1));
    assert_eq!((finding.tensor.as_deref(), finding.others.len()), (Some("0.weight"), 0));
}

#[test]
fn units_that_never_fire_are_dead_and_those_of_one_batch_are_not() {
    let layer: [(&str, &[u64]); 2] = [("a.weight", &[40, 3]), ("a.bias", &[40])];
    let dead_in = |fires: &dyn Fn(u64, usize) -> bool| {
        let mut run = Run::new(&layer);
        let mut findings = Vec::new();
        for _ in 0..6 {
            let mut gradients = run.noise(&[1.0, 1.0]);
            for unit in 0..40 {
                if !fires(run.step, unit) {
                    gradients[1][unit] = 0.0;
                    gradients[0][3 * unit..3 * unit + 3].fill(0.0);
                }
            }
            let report = run.measure(&gradients);
            findings = run.health.diagnose(&report).unwrap().findings().to_vec();
            assert!(run.step > 4 || findings.is_empty(), "{findings:?}");
        }
        findings
    };
    // Two of 40 fire, always the same.
    let findings = dead_in(&|_, unit| unit < 2);
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!((finding.kind, finding.severity, finding.value), (FindingKind::Dead, WARNING, 0.95));
    assert_eq!((finding.tensor.as_deref(), finding.since, finding.step), (Some("a.bias"), 1, 6));
    // Other ones in every step, as in batches of one sample, are not as many.
    assert_eq!(dead_in(&|step, unit| unit < 2 * usize::try_from(step % 2).unwrap() + 1), []);
    // Nine tenths are as many as a healthy layer may have.
    assert_eq!(dead_in(&|_, unit| unit < 4), []);
}

#[test]
fn a_table_whose_rows_are_the_same_few_in_every_step_is_found() {
    let rows_of = |name: &str, row: &dyn Fn(u64, u64) -> u64| {
        let mut run = Run::new(&[(name, &[50, 2]), ("head.weight", &[3, 2])]);
        let config = Config::new().tracking(GsnrConfig::new()).rules(Rules::default());
        run.probe = Probe::new(Cpu, run.health.plan().clone(), config).unwrap();
        for _ in 0..6 {
            let mut gradients = run.noise(&[0.0, 1.0]);
            for sample in 0..16 {
                let row = usize::try_from(row(run.step, sample)).unwrap();
                gradients[0][2 * row] = named(run.step, sample);
                gradients[0][2 * row + 1] = 1.0;
            }
            assert_eq!(run.measure(&gradients).diagnosis().unwrap().verdict(), Verdict::Healthy);
        }
        let report = run.probe.gsnr_report().unwrap();
        let findings = run.probe.health().unwrap().diagnose_gsnr(&report).unwrap();
        findings.iter().map(|finding| (finding.kind, finding.severity)).collect::<Vec<_>>()
    };
    assert_eq!(rows_of("wte.weight", &|_, sample| sample % 4), [(FindingKind::Dead, WARNING)]);
    // Words as they come: most rows are without a gradient in all six steps, but the four of one are others in the next.
    assert_eq!(rows_of("wte.weight", &|step, sample| step * 3 + sample % 4), []);
    // Positions beyond the text.
    assert_eq!(rows_of("wpe.weight", &|_, sample| sample), []);
}

#[test]
fn a_weight_whose_share_of_the_norm_jumps_is_named() {
    let mut run = Run::new(&TWO_LAYERS);
    for step in 0..20 {
        assert_eq!(kinds(&run.step(&[0.1, 0.1, 1.0, 1.0])), [], "{step}");
    }
    // By 1 of the others' 4 the total hardly moves.
    let diagnosis = run.step(&[1.0, 0.1, 1.0, 1.0]);
    let [finding] = diagnosis.findings() else { panic!("{diagnosis}") };
    assert_eq!((finding.kind, finding.severity, finding.rule), (FindingKind::Spike, WARNING, "share"));
    assert_eq!((finding.tensor.as_deref(), finding.others.len()), (Some("0.weight"), 0));
    // A bias may.
    assert_eq!(kinds(&run.step(&[0.1, 1.0, 1.0, 1.0])), []);
}

#[test]
fn a_finding_leaves_out_the_tensors_that_are_exempt_and_no_more() {
    let mut run = Run::new(&TWO_LAYERS);
    let rules = Rules::default().exempt("*bias", &[FindingKind::Vanishing, FindingKind::Zeros]);
    run.health.set_rules(rules).unwrap();
    let diagnosis = run.step(&[0.0; 4]);
    let [finding] = diagnosis.findings() else { panic!("{diagnosis}") };
    // The backward pass comes to a bias first.
    assert_eq!(finding.tensors().collect::<Vec<_>>(), ["1.weight", "0.weight"]);
    assert_eq!(diagnosis.verdicts()[1], Verdict::Healthy);
}

#[test]
fn a_tensor_that_is_absent_says_nothing() {
    for size in [0.0, 1e-8] {
        let mut run = Run::new(&TWO_LAYERS);
        let found = |run: &mut Run| {
            let gradients = run.noise(&[size, size, 1.0, 1.0]);
            run.probe.measure(&[&Absent as &dyn Tensor, &Absent, &gradients[2], &gradients[3]]).unwrap();
            let diagnosis = run.health.diagnose(&run.probe.wait().unwrap()).unwrap();
            (kinds(&diagnosis), diagnosis.undecided().len())
        };
        for steps in [2, 6] {
            for _ in 0..steps {
                run.step(&[size, size, 1.0, 1.0]);
            }
            for _ in 0..6 {
                assert_eq!(found(&mut run), (vec![], 0), "{size} after {steps} steps");
            }
        }
    }
}

#[test]
fn one_return_from_silence_may_be_an_accident() {
    let mut run = Run::new(&[("0.weight", &[2, 2]), ("1.weight", &[2, 2]), ("2.weight", &[2, 2])]);
    run.step(&[1.0, 1.0, 1.0]);
    run.step(&[1.0, 1.0, 0.0]);
    for _ in 0..5 {
        assert_eq!(kinds(&run.step(&[1.0, 1.0, 1.0])), []);
    }
    for step in 1..=5 {
        let found = kinds(&run.step(&[0.0, 1.0, 1.0]));
        assert_eq!(found.len(), usize::from(step == 5), "{step}");
    }
}

#[test]
fn a_weight_that_never_varies_is_no_table_of_dead_rows() {
    let mut run = Run::new(&[("head.weight", &[4, 2])]);
    let gradients = run.noise(&[1.0]);
    for _ in 0..6 {
        let report = run.measure(&gradients);
        run.health.diagnose(&report).unwrap();
    }
    let report = run.probe.gsnr_report().unwrap();
    assert_eq!(run.health.diagnose_gsnr(&report).unwrap(), []);
}

#[test]
fn a_batch_is_a_spike_though_weights_were_too_large_before() {
    let mut run = Run::new(&[("0.weight", &[4, 4]), ("1.weight", &[4, 4])]);
    let mut step = |size: f32| {
        let gradients = run.noise(&[size, size]);
        let report = run.measure(&gradients).with_param_norms(&[100.0, 100.0]).unwrap();
        kinds(&run.health.diagnose(&report).unwrap())
    };
    for _ in 0..10 {
        assert_eq!(step(1e-3), [(FindingKind::Exploding, WARNING)]);
    }
    assert_eq!(step(10.0), [(FindingKind::Spike, CRITICAL), (FindingKind::Exploding, WARNING)]);
}

#[test]
fn steps_may_be_missing_in_between() {
    let mut run = Run::new(&TWO_LAYERS);
    for step in 0..60 {
        let gradients = run.noise(&[0.1, 0.1, 1.0, 0.0]);
        let report = run.measure(&gradients);
        if step % 10 == 0 {
            assert_eq!(kinds(&run.health.diagnose(&report).unwrap()), [], "{step}");
        }
    }
}

#[test]
fn weights_of_no_initialisation_are_told_by_their_gain() {
    let model: [(&str, &[u64]); 5] = [
        ("embed.weight", &[9, 16]),
        ("0.weight", &[25, 16]),
        ("0.bias", &[25]),
        ("1.weight", &[4, 25]),
        ("1.bias", &[4]),
    ];
    // By the gains of the three weights; biases of any size.
    let of = |table: f64, first: f64, second: f64| {
        let mut run = Run::new(&model);
        let gradients = run.noise(&[1e-3; 5]);
        // √(elements / inputs): 12/4, 20/4, 10/5.
        let norms = [table * 3.0, first * 5.0, 100.0, second * 2.0, 100.0];
        let report = run.measure(&gradients).with_param_norms(&norms).unwrap();
        run.health.diagnose(&report).unwrap()
    };
    // Tables are looked up in: a normal distribution of variance 1 is usual.
    assert_eq!(kinds(&of(4.0, 0.58, 1.4)), []);
    assert_eq!(kinds(&of(4.0, 0.58, 3.1)), []);
    let large = of(1.0, 3.5, 3.1);
    let [finding] = large.findings() else { panic!("{large}") };
    assert_eq!((finding.kind, finding.severity, finding.rule), (FindingKind::Exploding, WARNING, "gain"));
    assert_eq!((finding.tensor.as_deref(), &finding.others[..]), (Some("0.weight"), &["1.weight".to_owned()][..]));
    let small = of(1.0, 0.01, 0.04);
    let [finding] = small.findings() else { panic!("{small}") };
    assert_eq!((finding.kind, finding.tensor.as_deref()), (FindingKind::Vanishing, Some("0.weight")));
    // A zero-initialised weight, after a few steps: the others have its model's scale.
    assert_eq!(kinds(&of(1.0, 0.01, 0.6)), []);
    assert_eq!(kinds(&of(1.0, 0.0, f64::NAN)), []);
}

#[test]
fn what_does_not_fit_is_an_error_and_what_is_absent_is_nothing() {
    let plan_of_two = || Plan::new([("a", DType::F32, 6), ("b", DType::F32, 2)]).unwrap();
    let wrong = plan_of_two().with_shapes([vec![2, 2], vec![2]]).unwrap_err().to_string();
    assert_eq!(wrong, "shapes must be of as many elements as the plan's tensors, not [2, 2] of \"a\", which has 6");
    assert!(
        matches!(plan_of_two().with_shapes([vec![6]]), Err(Error::TensorCount { first: Some(name), .. }) if name == "b")
    );
    assert!(plan_of_two().with_shapes([vec![u64::MAX, 2], vec![2]]).is_err());
    // No element, of however long dimensions.
    let empty = Plan::new([("a", DType::F32, 0)]).unwrap().with_shapes([vec![0, 1 << 33, 1 << 33]]).unwrap();
    assert!(Health::new(&empty, Rules::default()).is_ok());
    assert_eq!(
        plan(&TWO_LAYERS),
        Plan::new(TWO_LAYERS.map(|(name, s)| (name, DType::F32, s.iter().product()))).unwrap()
    );
    assert_eq!(plan_of_two().with_shapes([vec![2, 3], vec![2]]).unwrap().shapes().unwrap()[0], [2, 3]);

    // Signal and noise of another model.
    let mut other = Run::new(&[("other.weight", &[2, 2])]);
    other.step(&[1.0]);
    other.step(&[1.0]);
    let report = other.probe.gsnr_report().unwrap();
    let health = Run::new(&TWO_LAYERS).health;
    assert!(matches!(health.diagnose_gsnr(&report), Err(Error::ReportOfAnotherPlan { .. })));

    // Absent for as long as it may be; and then a step as before. With all of them there is no step.
    let mut run = Run::new(&TWO_LAYERS);
    run.step(&[1.0; 4]);
    for _ in 0..10 {
        run.probe.measure(&[&Absent as &dyn Tensor, &Absent, &Absent, &[1.0f32, 0.5]]).unwrap();
        let diagnosis = run.health.diagnose(&run.probe.wait().unwrap()).unwrap();
        assert_eq!((kinds(&diagnosis), diagnosis.undecided().len()), (vec![], 0));
    }
    assert_eq!(run.probe.measure(&[&Absent as &dyn Tensor; 4]), Err(Error::AllAbsent));
    assert_eq!(kinds(&run.step(&[1.0; 4])), []);
}

#[test]
fn a_thousand_tensors_take_less_than_a_millisecond() {
    let names: Vec<String> = (0..500).flat_map(|i| [format!("h.{i}.weight"), format!("h.{i}.bias")]).collect();
    let shapes: Vec<(&str, &[u64])> =
        names.iter().map(|name| (name.as_str(), if name.ends_with("bias") { &[2][..] } else { &[2, 2] })).collect();
    let mut run = Run::new(&shapes);
    let mut best = f64::INFINITY;
    for step in 0..200 {
        // Half of it silent, the rest noisy: what a step costs that has something to say.
        let sizes: Vec<f32> = (0..1000).map(|i| if i < 500 && step > 50 { 0.0 } else { 1.0 }).collect();
        let gradients = run.noise(&sizes);
        let report = run.measure(&gradients).with_param_norms(&vec![1.0; 1000]).unwrap();
        let began = std::time::Instant::now();
        run.health.diagnose(&report).unwrap();
        if step > 150 {
            best = best.min(began.elapsed().as_secs_f64());
        }
    }
    // The least of fifty, so that other work of the machine counts for nothing.
    assert!(best < 1e-3, "{best} s");
}
