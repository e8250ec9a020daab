//! The health of a run: it turns each step's report into a diagnosis, and keeps the state that this needs.

use super::{
    Diagnosis, Finding, FindingKind, Flow, FlowMeasure, FlowRule, Frontier, Rules, StepNorms, UsualNorm, Verdict,
    activity::Activity,
    diagnosis,
    flow::Layers,
    found::{Found, Seen, past_above, past_below, percent},
    frontier,
    groups::largest,
    jump::{Jump, LEAST_DEVIATION, jump},
    run::Run,
    shares::Shares,
    structure::Structure,
    threshold::{NONFINITE, count_to_f64, step_word, tensor_word, verdict_of},
    updates::Updates,
    weights::Weights,
};
use crate::{
    DType, Error, Plan, Record, Report, StepOutputs, TensorSpec,
    gsnr::GsnrReport,
    histogram::{Format, HistogramReport},
    measure::printable,
    ranks::RankCheck,
};
use std::collections::VecDeque;

/// Diagnoses the steps of one run, in their order.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, Verdict};
/// use gradprobe::health::{Health, Rules};
///
/// let plan = Plan::new([("0.weight", DType::F32, 3), ("1.weight", DType::F32, 2)])?;
/// let mut health = Health::new(&plan, Rules::default())?;
/// let mut probe = Probe::new(Cpu, plan, Config::new())?;
/// probe.measure(&[&[1e-3f32, 2e-3, 1e-3], &[f32::NAN, 0.1]])?;
/// let diagnosis = health.diagnose(&probe.wait()?)?;
/// assert_eq!(diagnosis.verdict(), Verdict::Critical);
/// assert_eq!(diagnosis.frontier().unwrap().tensor, "1.weight");
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Health {
    plan: Plan,
    rules: Rules,
    /// Of each tensor, the kinds that it is exempt from.
    exempt: Vec<u32>,
    /// The order in which a backward pass reaches the tensors.
    order: Vec<usize>,
    layers: Layers,
    structure: Structure,
    state: State,
}

/// The state from step to step. Only clean steps, which are finite and not skipped, change it.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct State {
    step: u64,
    /// Norms in the last clean step, 0 before it.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    norms: Vec<f64>,
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bits"))]
    total: f64,
    /// Clean steps in a row in which a tensor was vanishing by a threshold.
    vanishing: Vec<Run>,
    activity: Activity,
    shares: Shares,
    weights: Weights,
    updates: Updates,
    window: VecDeque<Past>,
    frontier: Option<Frontier>,
}

/// A clean step of the window.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Past {
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bits"))]
    norm: f64,
    /// Elements with a gradient: a step of other tensors is no comparison.
    elements: u64,
    clipped: bool,
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bits"))]
    log_coefficient: f64,
}

impl State {
    fn new(plan: &Plan, structure: &Structure) -> Self {
        let tensors = plan.tensors().len();
        Self {
            step: 0,
            norms: vec![0.0; tensors],
            total: 0.0,
            vanishing: vec![Run::default(); tensors],
            activity: Activity::new(structure),
            shares: Shares::new(tensors),
            weights: Weights::new(tensors),
            updates: Updates::new(structure),
            window: VecDeque::new(),
            frontier: None,
        }
    }
}

/// The least share of a rise by one tensor at which the spike counts as its own.
const ALONE: f64 = 0.9;
/// The fewest steps of a baseline.
const LEAST_LEARNED: u64 = 6;
/// The most tensors in a spike's message.
const NAMED: usize = 3;

impl Health {
    /// Follows a run with these tensors, by these rules.
    ///
    /// # Errors
    /// Those of [`Rules::check`], [`Error::NoSuchTensor`] for a pattern of [`Rules::exempt`] that matches no tensor, and
    /// [`Error::BaselineOfAnotherModel`].
    pub fn new(plan: &Plan, rules: Rules) -> Result<Self, Error> {
        rules.check()?;
        rules.check_patterns(plan)?;
        rules.learned_from().map_or(Ok(()), |baseline| baseline.check(plan))?;
        let structure = Structure::of(plan);
        let exempt_from = |(index, tensor): (usize, &TensorSpec)| {
            let has_ratio = !rules.knows_weights() || (structure.is_weight[index] && tensor.dtype != DType::F16);
            let ratio = if has_ratio { 0 } else { 1 << FindingKind::Ratio as u32 };
            rules.exemptions_of(&tensor.name) | ratio
        };
        let exempt: Vec<u32> = plan.tensors().iter().enumerate().map(exempt_from).collect();
        let layers = Layers::of(plan, |index| exempt[index] & 1 << FindingKind::Flow as u32 != 0);
        let tensors = exempt.len();
        Ok(Self {
            plan: plan.clone(),
            rules,
            exempt,
            order: (0..tensors).rev().collect(),
            layers,
            state: State::new(plan, &structure),
            structure,
        })
    }

    /// Sets the order in which a backward pass reaches the tensors, as their places in the plan, for the frontier. The
    /// default is the reverse of the plan's order. [`backward_order`](super::backward_order) derives one from the
    /// names.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless each place is there once.
    pub fn backward_order(self, order: Vec<usize>) -> Result<Self, Error> {
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..self.exempt.len()) {
            let value = format!("{} places", order.len());
            let expected = "every tensor's place in the plan, once";
            return Err(Error::InvalidConfig { option: "backward_order", expected, value });
        }
        Ok(Self { order, ..self })
    }

    /// The plan of the run.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Changes the rules from the next step on, and keeps the state. Only where the learning rates differ by more than
    /// a factor of 2, the norms of the window are dropped.
    ///
    /// # Errors
    /// Those of [`new`](Self::new); the rules then stay.
    pub fn set_rules(&mut self, rules: Rules) -> Result<(), Error> {
        let Self { rules, exempt, layers, .. } = Self::new(&self.plan, rules)?;
        // Norms under another rate are no comparison.
        if rules.rate().zip(self.rules.rate()).is_some_and(|(now, then)| are_apart(now, then)) {
            self.state.window.clear();
            self.state.shares.clear();
        }
        (self.rules, self.exempt, self.layers) = (rules, exempt, layers);
        Ok(())
    }

    /// For each tensor the bits k of the kinds that it is exempt from.
    pub fn exemptions(&self) -> &[u32] {
        &self.exempt
    }

    /// Forgets all steps and the frontier.
    pub fn reset(&mut self) {
        self.state = State::new(&self.plan, &self.structure);
    }

    /// The state from step to step.
    pub(super) fn state(&self) -> &State {
        &self.state
    }

    /// Whether this may be a state of these tensors.
    pub(super) fn is_state(&self, state: &State) -> bool {
        let is_of_plan = |frontier: &Frontier| {
            let spec = self.plan.tensors().get(frontier.index);
            spec.is_some_and(|spec| spec.name == frontier.tensor)
                && matches!(frontier.kind, FindingKind::Nan | FindingKind::Inf)
        };
        let own = &self.state;
        (state.norms.len(), state.vanishing.len()) == (own.norms.len(), own.vanishing.len())
            && state.activity.is_as_long_as(&own.activity)
            && state.shares.is_as_long_as(&own.shares)
            && state.weights.is_as_long_as(&own.weights)
            && state.updates.is_as_long_as(&own.updates)
            && state.frontier.as_ref().is_none_or(is_of_plan)
    }

    /// Goes on from this state.
    pub(super) fn restore(&mut self, state: &State) {
        self.state.clone_from(state);
    }

    /// Diagnoses the next step.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`].
    pub fn diagnose(&mut self, report: &Report) -> Result<Diagnosis, Error> {
        self.plan.check_report(report.plan())?;
        let (outputs, records) = (report.outputs(), report.records());
        let clean = outputs.found_inf == 0.0 && outputs.skip == 0;
        let (words, norms) = self.tensor_words(report);
        let united = words.iter().fold(0, |united, word| united | word);
        let step_word = step_word(self.rules.thresholds(), united, &norms);
        if clean {
            self.state.count_vanishing(&words, report);
        } else if self.state.frontier.is_none() {
            self.state.frontier = frontier::find(&self.plan, records, &self.order, outputs.step);
        }
        let flow = if clean { self.layers.flow(records) } else { None };

        let mut found = Found::new(&self.plan, outputs.step, &self.exempt);
        for (index, record) in report.records().iter().enumerate().filter(|&(index, _)| words[index] != 0) {
            if words[index] & NONFINITE != 0 {
                found.nonfinite(index, record);
            } else {
                self.of_tensor(index, record, report.param_norm_before(index), clean, &mut found);
            }
        }
        if united & NONFINITE == 0 && norms.has_elements {
            for rule in self.rules.thresholds() {
                if let Some((value, bit)) = rule.of_step(&norms).filter(|&(_, bit)| bit != 0) {
                    found.threshold((None, outputs.step), rule, (value, bit), "");
                }
            }
        }
        if let Some(flow) = &flow {
            self.of_flow(flow, &mut found);
        }
        if let Some(check) = report.rank_check() {
            self.of_ranks(check, &mut found);
        }
        if outputs.skip == 0 {
            self.state.updates.judge(report, &self.structure, &self.rules, &mut found);
        }
        if clean {
            self.state.weights.judge(report, &self.structure, &self.rules, &mut found);
            let context = (&self.structure, &self.rules, &self.order[..]);
            self.state.activity.judge((outputs.step, records), context, &mut found);
            self.of_jump(outputs.finite_total_norm, records, &mut found);
            let step = (records, outputs.finite_total_norm);
            self.state.shares.judge(step, (&self.structure, &self.rules), &mut found);
            self.state.remember(outputs, records, self.rules.window);
            self.of_window(&mut found);
            self.of_baseline(outputs.finite_total_norm, records, &mut found);
        }
        self.state.step = outputs.step;

        let mut verdicts: Vec<Verdict> = words.iter().map(|&word| verdict_of(word)).collect();
        let (findings, undecided) = found.finish(&self.order, &mut verdicts);
        Ok(Diagnosis {
            plan: self.plan.clone(),
            step: outputs.step,
            verdict: diagnosis::worst(&findings).max(verdict_of(step_word)),
            findings,
            undecided,
            words,
            step_word,
            verdicts,
            frontier: self.state.frontier.clone(),
            flow,
        })
    }

    /// Gives the words of the tensors, and the norms for the rules on the step.
    fn tensor_words(&self, report: &Report) -> (Vec<u32>, StepNorms) {
        let mut norms = StepNorms::new(report.outputs().finite_total_norm, self.state.total);
        let of_tensors = report.records().iter().zip(&self.exempt).zip(&self.state.norms).enumerate();
        let words = of_tensors.map(|(index, ((record, &exempt), &last))| {
            norms.add(record, exempt);
            let param_norm = report.param_norm_before(index).unwrap_or(0.0);
            tensor_word(self.rules.thresholds(), record, param_norm, last, exempt)
        });
        let words = words.collect();
        (words, norms)
    }

    fn of_tensor(&self, index: usize, record: &Record, param_norm: Option<f64>, clean: bool, found: &mut Found<'_>) {
        let (exempt, param_norm) = (self.exempt[index] & FindingKind::OF_WORDS, param_norm.unwrap_or(0.0));
        for rule in self.rules.thresholds() {
            let Some((value, bit)) = rule.of_tensor(record, param_norm, self.state.norms[index]) else { continue };
            if bit & !(exempt | exempt << 16) == 0 {
                continue;
            }
            let Run { steps, since } = self.state.vanishing[index];
            let persists = clean
                && self.rules.persistence > 0
                && steps >= self.rules.persistence
                && rule.kind() == Some(FindingKind::Vanishing);
            if persists {
                found.threshold((Some(index), since), rule, (value, 1 << 16), &format!(", for {steps} steps"));
            } else {
                found.threshold((Some(index), found.step()), rule, (value, bit), "");
            }
        }
    }

    fn of_flow(&self, flow: &Flow, found: &mut Found<'_>) {
        // The slope needs a depth; an order of names will do for the others.
        let is_told = |rule: &FlowRule| self.layers.are_numbered || rule.measure != FlowMeasure::Slope;
        let Some(rule) = self.rules.flow.filter(is_told) else { return };
        let ratio = flow.measure(rule.measure);
        let (change, passed) = match (past_below(rule.below, ratio), past_above(rule.above, ratio)) {
            (Some(passed), _) => ("shrink", passed),
            (_, Some(passed)) => ("grow", passed),
            _ => return,
        };
        let what = match rule.measure {
            FlowMeasure::Slope => "on the fitted line the first layer's norm is",
            FlowMeasure::Thirds => "the mean norm of the first third is",
        };
        let (factor, limit) = (flow.factor(), passed.1);
        let message = format!(
            "gradients {change} towards the input: {what} {ratio:.3e} times the last one's, limit {limit:.3e}; from one \
             layer to the next it is {factor:.3} times as large"
        );
        let index = flow.first_tensor();
        found.push(Seen {
            index: Some(index),
            message,
            ..Seen::new(FindingKind::Flow, passed.0, (ratio, passed.1), "flow")
        });
    }

    /// Finds ranks that differ, which will not become equal by themselves.
    fn of_ranks(&self, check: &RankCheck, found: &mut Found<'_>) {
        for (what, differing) in [("replicas differ", &check.replicas), ("the state differs", &check.state)] {
            let Some(differing) = differing else { continue };
            let is_named = |spec: &TensorSpec| Some(&spec.name) == differing.tensor.as_ref();
            let index = self.plan.tensors().iter().position(is_named);
            let message = format!("{what} in step {} {differing}", check.step);
            let seen = Seen::new(FindingKind::RanksDiffer, Verdict::Critical, (1.0, 0.0), "rank_check");
            found.push(Seen { index, message, ..seen });
        }
    }

    /// Compares the norm with the steps before it.
    fn of_jump(&self, norm: f64, records: &[Record], found: &mut Found<'_>) {
        let elements = elements_of(records);
        let is_alike = |past: &&Past| past.norm > 0.0 && past.elements == elements;
        let before: Vec<f64> = self.state.window.iter().filter(is_alike).map(|past| past.norm).collect();
        let Some(jump) = jump(&before, norm).filter(|jump| norm > 0.0 && jump.at_once) else { return };
        if let Some((severity, limit)) = past_above(self.rules.fall, -jump.deviations) {
            let message = format!("norm {norm:.3e}, {}", beside(&jump, norm, before.len(), limit));
            found.push(Seen {
                message,
                ..Seen::new(FindingKind::Unstable, severity, (-jump.deviations, limit), "fall")
            });
        }
        let Some((severity, limit)) = past_above(self.rules.spike, jump.deviations) else { return };
        let rise = |(index, record): (usize, &Record)| {
            let before = self.state.norms[index];
            (self.plan.tensors()[index].name.as_str(), record.finite_sum_squares() - before * before)
        };
        let risen =
            largest(records.iter().enumerate().filter(|(_, record)| record.count > 0).map(rise).collect(), NAMED);
        let alone = risen.first().filter(|part| part.share > ALONE);
        let is_alone = |spec: &TensorSpec| alone.is_some_and(|part| part.tensor == spec.name);
        let index = self.plan.tensors().iter().position(is_alone);
        let risen: Vec<String> =
            risen.iter().map(|part| format!("{} ({:.0} %)", printable(part.tensor), 100.0 * part.share)).collect();
        // A single element, as after a flipped bit.
        let of_elements = index.map_or_else(String::new, |index| {
            let largest = f64::from(records[index].max_abs_or_zero);
            let share = largest * largest / records[index].finite_sum_squares();
            format!("; its largest element has {:.0} % of its square", 100.0 * share)
        });
        let risen = if risen.is_empty() { String::new() } else { format!("; most of the rise: {}", risen.join(", ")) };
        let message = format!("norm {norm:.3e}, {}{risen}{of_elements}", beside(&jump, norm, before.len(), limit));
        let seen = Seen::new(FindingKind::Spike, severity, (jump.deviations, limit), "spike");
        found.push(Seen { index, message, ..seen });
    }

    /// Judges the window, the step included.
    fn of_window(&self, found: &mut Found<'_>) {
        let window = &self.state.window;
        let count = window.len();
        if count < self.rules.least_steps {
            return;
        }
        let mean_of = |value: &dyn Fn(&Past) -> f64| window.iter().map(value).sum::<f64>() / to_f64(count);
        let mean = mean_of(&|past| past.norm);
        let variation = mean_of(&|past| (past.norm - mean).powi(2)).sqrt() / mean;
        if let Some((severity, limit)) = past_above(self.rules.variation, variation) {
            let message = format!("the norm varies by {variation:.2} of its mean over {count} steps, limit {limit}");
            let seen = Seen::new(FindingKind::Unstable, severity, (variation, limit), "variation");
            found.push(Seen { message, ..seen });
        }
        let clipped = mean_of(&|past| f64::from(u8::from(past.clipped)));
        if let Some((severity, limit)) = past_above(self.rules.clipped_fraction, clipped) {
            let message = format!("{} % of {count} steps were clipped, limit {} %", percent(clipped), percent(limit));
            let seen = Seen::new(FindingKind::Clipped, severity, (clipped, limit), "clipped_fraction");
            found.push(Seen { message, ..seen });
        }
        let coefficient = mean_of(&|past| past.log_coefficient).exp();
        if let Some((severity, limit)) = past_below(self.rules.mean_coefficient, coefficient) {
            let message = format!(
                "the clip cuts gradients, and so the learning rate, to {coefficient:.3e} on average, limit {limit}"
            );
            let seen = Seen::new(FindingKind::Clipped, severity, (coefficient, limit), "mean_coefficient");
            found.push(Seen { message, ..seen });
        }
    }

    fn of_baseline(&self, total: f64, records: &[Record], found: &mut Found<'_>) {
        let Some(baseline) = self.rules.learned_from() else { return };
        let rates = self.rules.rate().zip(baseline.learning_rate());
        let needs = match rates.filter(|&(now, then)| are_apart(now, then)) {
            Some((now, then)) => Some(format!("a baseline at a learning rate near {now:e}; this one is of {then:e}")),
            None if baseline.total().steps < LEAST_LEARNED => Some(format!("a baseline of {LEAST_LEARNED} steps")),
            None => None,
        };
        if let Some(needs) = needs {
            found.undecided(FindingKind::Exploding, None, needs);
            return;
        }
        let mut judge = |index: Option<usize>, norm: f64, usual: &UsualNorm| {
            // A tensor that never had a gradient taught nothing; one without a gradient is found elsewhere.
            if usual.steps < LEAST_LEARNED || norm <= 0.0 {
                return;
            }
            let deviations = usual.deviations(norm, LEAST_DEVIATION);
            let Some((severity, limit)) = past_above(self.rules.learned, deviations.abs()) else { return };
            let kind = if deviations > 0.0 { FindingKind::Exploding } else { FindingKind::Vanishing };
            let message = format!(
                "norm {norm:.3e}, {:.1} deviations from the usual {:.3e} of {} healthy steps, limit {limit}",
                deviations.abs(),
                usual.median,
                usual.steps
            );
            let seen = Seen::new(kind, severity, (deviations.abs(), limit), "learned");
            found.push(Seen { index, message, ..seen });
        };
        judge(None, total, &baseline.total());
        for (index, record) in records.iter().enumerate().filter(|(_, record)| record.count > 0) {
            judge(Some(index), record.finite_l2_norm(), baseline.usual_of(index));
        }
    }

    /// Gives the findings of tracked steps: noise, norms that jump, and rows that are never looked up. They are of the
    /// step diagnosed last.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`].
    pub fn diagnose_gsnr(&self, report: &GsnrReport) -> Result<Vec<Finding>, Error> {
        self.plan.check_report(report.plan())?;
        let mut found = Found::new(&self.plan, self.state.step, &self.exempt);
        for (index, record) in report.records() {
            let mut add = |kind, (severity, limit): (Verdict, f64), value: f64, rule, what: &str| {
                let message = format!("{what} {value:.3e} over {} steps, limit {limit}", record.steps);
                found.push(Seen { index: Some(*index), message, ..Seen::new(kind, severity, (value, limit), rule) });
            };
            let median = record.median().and_then(|median| Some((past_below(self.rules.gsnr_median, median)?, median)));
            // Pure noise of n elements has a signal of 0 ± √(2/n)/k: only one that cannot be that far off counts.
            let signal = record.squared_gradient().filter(|_| record.sum_variance > 0.0).and_then(|squared| {
                let signal = squared / record.sum_variance;
                let error = (2.0 / count_to_f64(record.defined)).sqrt() / f64::from(record.steps);
                past_below(self.rules.signal, signal + 2.0 * error).map(|passed| (passed, signal))
            });
            if let Some((passed, median)) = median {
                add(FindingKind::Noisy, passed, median, "gsnr_median", "median signal to noise");
            } else if let Some((passed, signal)) = signal {
                add(FindingKind::Noisy, passed, signal, "signal", "squared gradient over its variance");
            }
            if let Some(variation) = record.norm_cv()
                && let Some(passed) = past_above(self.rules.variation, variation)
            {
                add(FindingKind::Unstable, passed, variation, "variation", "std over mean of the norm");
            }
        }
        self.state.activity.of_rows(report, &self.structure, &self.rules, &mut found);
        Ok(self.finished(found))
    }

    fn finished(&self, found: Found<'_>) -> Vec<Finding> {
        found.finish(&self.order, &mut vec![Verdict::Healthy; self.exempt.len()]).0
    }

    /// Gives the losses of these gradients in narrower formats, as findings of the step diagnosed last.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`].
    pub fn diagnose_histogram(&self, report: &HistogramReport) -> Result<Vec<Finding>, Error> {
        self.plan.check_report(report.plan())?;
        let mut found = Found::new(&self.plan, self.state.step, &self.exempt);
        let total = report.total();
        for rule in &self.rules.underflow {
            let Some(scale) = rule.scale.or_else(|| total.loss_scale(rule.format)) else { continue };
            for (index, histogram) in report.histograms().iter().enumerate() {
                // The lower bound: the certain part.
                let Some(lost) = histogram.shares(rule.format, scale).map(|shares| shares.underflow.low) else {
                    continue;
                };
                if let Some((severity, limit)) = past_above(rule.above, lost) {
                    let message = format!(
                        "{} % of the elements that are not 0 become 0 in {} at a loss scale of 2^{scale}, limit {} %",
                        percent(lost),
                        rule.format,
                        percent(limit)
                    );
                    let seen = Seen::new(FindingKind::Underflow, severity, (lost, limit), rule_of(rule.format));
                    found.push(Seen { index: Some(index), message, ..seen });
                }
            }
        }
        Ok(self.finished(found))
    }
}

/// The name of the rule on losses in a format.
fn rule_of(format: Format) -> &'static str {
    match format {
        Format::F16 => "underflow_f16",
        Format::BF16 => "underflow_bf16",
        Format::E4M3 => "underflow_e4m3",
        Format::E5M2 => "underflow_e5m2",
    }
}

/// Whether two learning rates are more than a factor of 2 apart.
fn are_apart(a: f64, b: f64) -> bool {
    a > 2.0 * b || b > 2.0 * a
}

fn elements_of(records: &[Record]) -> u64 {
    records.iter().map(|record| record.count).sum()
}

/// Puts a jump into words.
fn beside(jump: &Jump, norm: f64, steps: usize, limit: f64) -> String {
    let (times, deviations) = (norm / jump.median, jump.deviations.abs());
    let side = if jump.deviations > 0.0 { "above" } else { "below" };
    let before =
        if steps == 1 { "norm of the step before".to_owned() } else { format!("median of the {steps} steps before") };
    format!("{times:.3e} times the {before}, {deviations:.1} deviations {side} it, limit {limit}")
}

impl State {
    fn count_vanishing(&mut self, words: &[u32], report: &Report) {
        let bits = 1 << FindingKind::Vanishing as u32 | 1 << (16 + FindingKind::Vanishing as u32);
        for ((run, word), record) in self.vanishing.iter_mut().zip(words).zip(report.records()) {
            if record.count > 0 {
                run.count(word & bits != 0, report.step());
            }
        }
    }

    fn remember(&mut self, outputs: &StepOutputs, records: &[Record], window: usize) {
        // An absent tensor keeps its last norm.
        let present = self.norms.iter_mut().zip(records).filter(|(_, record)| record.count > 0);
        present.for_each(|(norm, record)| *norm = record.finite_l2_norm());
        self.total = outputs.finite_total_norm;
        while self.window.len() >= window {
            self.window.pop_front();
        }
        self.window.push_back(Past {
            norm: outputs.finite_total_norm,
            elements: elements_of(records),
            clipped: outputs.flags & StepOutputs::FLAG_CLIPPED != 0,
            log_coefficient: outputs.coefficient_f64.ln(),
        });
    }
}

#[expect(clippy::cast_precision_loss, reason = "a few steps")]
fn to_f64(count: usize) -> f64 {
    count as f64
}
