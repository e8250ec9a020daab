//! What is said of how far steps move the weights.

use crate::models::kinds;
use gradprobe::{
    Clip, Config, Cpu, DType, Error, FindingKind, NonFinitePolicy, Plan, Probe, Report, Tensor, TensorMut, Verdict,
    health::{Diagnosis, Limits, Rules, Statistic, ThresholdRule},
    optim::{Group, Optimizer, Sgd},
};
use half::f16;

const TOO_LARGE: FindingKind = FindingKind::UpdateTooLarge;

/// A training of f32 tensors with these names and lengths.
struct Training {
    probe: Probe,
    weights: Vec<Vec<f32>>,
}

impl Training {
    fn new(tensors: &[(&str, usize)], optimizer: impl Into<Optimizer>, rules: Rules) -> Self {
        let plan = Plan::new(tensors.iter().map(|&(name, len)| (name, DType::F32, len as u64))).unwrap();
        let config = Config::new().rules(rules).optimizer(optimizer);
        Self {
            probe: Probe::new(Cpu, plan, config).unwrap(),
            weights: tensors.iter().map(|&(_, len)| vec![1.0; len]).collect(),
        }
    }

    /// A step with this gradient in every element of each tensor.
    fn report(&mut self, gradients: &[f32]) -> Report {
        let all: Vec<Vec<f32>> = gradients.iter().zip(&self.weights).map(|(&x, w)| vec![x; w.len()]).collect();
        let all: Vec<&dyn Tensor> = all.iter().map(|x| x as &dyn Tensor).collect();
        let mut weights: Vec<&mut dyn TensorMut> = self.weights.iter_mut().map(|w| w as &mut dyn TensorMut).collect();
        self.probe.update(&all, &mut weights).unwrap();
        self.probe.wait().unwrap()
    }

    /// What is found of updates.
    fn step(&mut self, gradients: &[f32]) -> Vec<(FindingKind, Verdict)> {
        of_updates(self.report(gradients).diagnosis().unwrap())
    }
}

fn of_updates(diagnosis: &Diagnosis) -> Vec<(FindingKind, Verdict)> {
    kinds(diagnosis).into_iter().filter(|(kind, _)| *kind >= TOO_LARGE).collect()
}

#[test]
fn updates_larger_than_the_weights_are_too_large() {
    let mut training = Training::new(&[("a.weight", 100), ("b.weight", 100)], Sgd::new(1.0), Rules::default());
    // From 1 to −1.5 and back: 2.5 and 1.67 times the weights before; from the fourth step on it can be told.
    let found: Vec<_> = (0..6).map(|step| training.report(&[if step % 2 == 0 { 2.5 } else { -2.5 }, 1e-3])).collect();
    assert!(found[..5].iter().all(|report| of_updates(report.diagnosis().unwrap()).is_empty()));
    let diagnosis = found[5].diagnosis().unwrap();
    assert_eq!(of_updates(diagnosis), [(TOO_LARGE, Verdict::Critical)]);
    let finding = diagnosis.findings().iter().find(|finding| finding.kind == TOO_LARGE).unwrap();
    assert_eq!((finding.tensor.as_deref(), finding.rule, finding.threshold), (Some("a.weight"), "update_ratio", 1.0));
    assert!((finding.value - 2.5 / 1.5).abs() < 1e-6);
    assert_eq!(finding.message, "its layer's update has 1.667e0 of the weights' norm, above 1.000e0, for 3 steps");
    // A step that does not count neither ends nor adds to what lasts; one within the limit ends it.
    assert_eq!(training.step(&[f32::NAN, 1e-3]), []);
    assert_eq!(training.step(&[2.5, 1e-3]), [(TOO_LARGE, Verdict::Critical)]);
    assert_eq!(training.step(&[1e-3, 1e-3]), []);
    assert_eq!(training.step(&[-2.5, 1e-3]), []);
}

#[test]
fn one_update_that_leaves_nothing_of_the_weights_is_enough() {
    let mut training = Training::new(&[("a.weight", 100), ("b.weight", 100)], Sgd::new(1.0), Rules::default());
    assert!((0..4).all(|_| training.step(&[1e-3, 1e-3]).is_empty()));
    let report = training.report(&[30.0, 1e-3]);
    let diagnosis = report.diagnosis().unwrap();
    assert_eq!(of_updates(diagnosis), [(TOO_LARGE, Verdict::Critical)]);
    let finding = diagnosis.findings().iter().find(|finding| finding.kind == TOO_LARGE).unwrap();
    assert_eq!(finding.message, "its layer's update has 3.012e1 of the weights' norm, above 1.000e0");
    assert_eq!(training.step(&[1.0, 1e-3]), []);
}

#[test]
fn a_tenth_is_a_warning_when_weights_could_have_grown() {
    let mut training = Training::new(&[("a.weight", 100)], Sgd::new(1.0), Rules::default());
    for step in 1..=410 {
        // From 1 to 0.7 and back: 0.3 and 0.43 of the weights; from the 400th step on it can be told.
        let found = training.step(&[if step % 2 == 0 { -0.3 } else { 0.3 }]);
        let warned: &[_] = if step < 402 { &[] } else { &[(TOO_LARGE, Verdict::Warning)] };
        assert_eq!(found, warned, "{step}");
    }
}

#[test]
fn a_bias_is_judged_with_its_weight() {
    let mut rules = Rules::default();
    rules.least_steps = 2;
    let tensors = [("conv.weight", 1000), ("conv.bias", 10), ("head.weight", 1000), ("head.bias", 10)];
    let mut training = Training::new(&tensors, Sgd::new(1.0), rules);
    training.weights[3].fill(0.0);
    for step in 0..420 {
        // A bias that turns about 0, as one of a regression to a mean of 0 does, and one before a batch norm.
        let turn = if step % 2 == 0 { 0.01 } else { -0.01 };
        assert_eq!(training.step(&[1e-3 * turn, 1e-12, 1e-2 * turn, turn]), [], "{step}");
    }
}

#[test]
fn a_layer_that_hardly_moves_beside_the_others_is_stalled() {
    let tensors = [("a.weight", 100), ("b.bias", 10), ("b.weight", 100), ("c.weight", 100)];
    let slow = Sgd::new(1.0).group(Group::new("b.*").learning_rate_factor(1e-4));
    let mut training = Training::new(&tensors, slow.clone(), Rules::default());
    for step in 1..=16 {
        let report = training.report(&[1e-3; 4]);
        let diagnosis = report.diagnosis().unwrap();
        let found = of_updates(diagnosis);
        let stalled: &[_] = if step < 16 { &[] } else { &[(FindingKind::Stalled, Verdict::Warning)] };
        assert_eq!(found, stalled, "{step}");
        if step == 16 {
            let finding = diagnosis.findings().iter().find(|finding| finding.kind == FindingKind::Stalled).unwrap();
            assert_eq!(finding.tensor.as_deref(), Some("b.weight"));
            // The others have lost 16 of a thousand.
            assert!((finding.value / (1e-4 * (1.0 - 16e-3)) - 1.0).abs() < 1e-4, "{finding:?}");
        }
    }
    // Of a layer without a gradient that is no finding; nor of one that is exempt.
    let mut training = Training::new(&tensors, slow.clone(), Rules::default());
    assert!((0..32).all(|_| training.step(&[1e-3, 0.0, 0.0, 1e-3]).is_empty()));
    let mut training = Training::new(&tensors, slow, Rules::default().exempt("b.*", &[FindingKind::Stalled]));
    assert!((0..32).all(|_| training.step(&[1e-3; 4]).is_empty()));
    // Nor of one that is frozen.
    let frozen = Sgd::new(1.0).group(Group::new("b.*").learning_rate_factor(0.0));
    let mut training = Training::new(&tensors, frozen, Rules::default());
    assert!((0..32).all(|_| training.step(&[1e-3; 4]).is_empty()));
}

#[test]
fn updates_that_rounding_takes_are_lost_but_not_those_without_a_gradient() {
    let lost = [(FindingKind::UpdateLost, Verdict::Warning)];
    let mut rules = Rules::default();
    rules.least_steps = 4;
    // Half of the distance to the next f32 below 1 is 2^-25.
    let mut training = Training::new(&[("a.weight", 60), ("a.bias", 40)], Sgd::new(1.0), rules.clone());
    for step in 1..=6 {
        let found = training.step(&[2.0f32.powi(-26), 1e-3]);
        assert_eq!(found, if step < 4 { &[][..] } else { &lost }, "{step}");
    }
    assert_eq!(training.step(&[2.0f32.powi(-24), 1e-3]), []);
    // Momentum of elements without a gradient fades until it is lost, in nine tenths of the layer.
    let mut training = Training::new(&[("a.weight", 90), ("a.bias", 10)], Sgd::new(1e-3).momentum(0.5), rules);
    assert_eq!(training.step(&[1e-3, 1e-3]), []);
    for step in 0..40 {
        let report = training.report(&[0.0, 1e-3]);
        assert_eq!(of_updates(report.diagnosis().unwrap()), [], "{step}");
        assert!(step < 20 || report.updates().unwrap()[0].lost == 90);
    }
}

#[test]
fn at_the_end_of_a_schedule_nothing_is_lost() {
    let mut training = Training::new(&[("a.weight", 100)], Sgd::new(1.0), Rules::default());
    assert_eq!(training.step(&[1e-3]), []);
    training.probe.optimizer().unwrap().set_learning_rate(1e-6).unwrap();
    for step in 0..32 {
        let report = training.report(&[1e-3]);
        assert_eq!(report.updates().unwrap()[0].lost, 100);
        assert_eq!(of_updates(report.diagnosis().unwrap()), [], "{step}");
    }
}

#[test]
fn weights_that_overflow_are_critical_at_once() {
    let plan = Plan::new([("a", DType::F32, 2), ("b", DType::F32, 1)]).unwrap().with_weights([DType::F16; 2]).unwrap();
    let config = Config::new().rules(Rules::default()).optimizer(Sgd::new(1.0));
    let mut probe = Probe::new(Cpu, plan, config).unwrap();
    let (mut a, mut b) = (vec![f16::ONE; 2], vec![f16::ONE]);
    probe.update(&[&[0.0f32, -7e4], &[0.1f32]], &mut [&mut a, &mut b]).unwrap();
    let report = probe.wait().unwrap();
    let diagnosis = report.diagnosis().unwrap();
    assert_eq!(of_updates(diagnosis), [(TOO_LARGE, Verdict::Critical)]);
    let finding = diagnosis.findings().iter().find(|finding| finding.kind == TOO_LARGE).unwrap();
    assert_eq!((finding.rule, finding.tensor.as_deref(), finding.value), ("nonfinite_weights", Some("a"), 1.0));
    assert_eq!(finding.message, "the update leaves 1 of 2 weights NaN or infinite");
    // Also in a step in which another gradient has a NaN, if it is taken; that of a NaN is said of the gradient alone.
    for (policy, found) in
        [(NonFinitePolicy::ZeroNonFinite, &[(TOO_LARGE, Verdict::Critical)][..]), (NonFinitePolicy::Propagate, &[])]
    {
        let plan = Plan::new([("a", DType::F32, 1), ("b", DType::F32, 1)]).unwrap();
        let plan = plan.with_weights([DType::F16; 2]).unwrap();
        let config = Config::new().non_finite(policy).clip(Clip::global_norm(1e6)).rules(Rules::default());
        let mut probe = Probe::new(Cpu, plan, config.optimizer(Sgd::new(1.0))).unwrap();
        let (mut a, mut b) = (vec![f16::ONE], vec![f16::ONE]);
        probe.update(&[&[-7e4f32], &[f32::NAN]], &mut [&mut a, &mut b]).unwrap();
        assert_eq!(of_updates(probe.wait().unwrap().diagnosis().unwrap()), found, "{policy:?}");
    }
}

#[test]
fn words_are_those_of_the_device_though_weights_are_known_after_the_step() {
    let mut training = Training::new(&[("a.weight", 10)], Sgd::new(1e-3), Rules::default());
    training.weights[0].fill(1e-3);
    let report = training.report(&[0.5]);
    assert!(report.tensors().next().unwrap().ratio().unwrap() > 100.0);
    assert_eq!(report.health_words().unwrap(), report.diagnosis().unwrap().tensor_words());
}

#[test]
fn a_rule_on_one_step_cannot_be_of_a_kind_that_has_no_bit() {
    let rules = Rules::default().with(ThresholdRule::above(Statistic::Norm, FindingKind::Stalled, 1.0, 2.0));
    assert!(matches!(rules.check(), Err(Error::InvalidConfig { option: "rule", .. })));
    let mut rules = Rules::default();
    rules.stalled = Limits::new(2.0, 1.0);
    assert!(matches!(rules.check(), Err(Error::InvalidConfig { option: "stalled", .. })));
}

#[test]
fn a_table_may_be_of_some_tensors() {
    let mut training = Training::new(&[("a.weight", 4), ("b.weight", 4)], Sgd::new(0.1), Rules::default());
    let report = training.report(&[1.0, 2.0]);
    let table = report.table_of(&[1]).to_string();
    assert!(table.contains("\nstep 1: total norm ") && !table.contains("a.weight"), "{table}");
    assert_eq!(table.lines().nth(1), report.to_string().lines().nth(2));
}
