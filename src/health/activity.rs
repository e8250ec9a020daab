//! Missing gradients: tensors that are all 0, weights with a gradient far below the others', and elements that never
//! had one.
//!
//! One step is not enough. A branch that begins at 0 has no gradient behind it in its first step. An expert has none in
//! a step that sends it no token, a row of a table none where its word does not occur. A bias before a normalisation
//! never has more than rounding. So a tensor must be silent for several steps, in a stack whose other tensors do not
//! come and go. Only weights are compared with each other. Units are off where about as many are in every step, rows
//! where the others are the same.

use super::{
    FindingKind, Rules, Verdict,
    found::{Found, Seen, past_above, past_below, percent},
    run::Run,
    structure::Structure,
    threshold::count_to_f64,
};
use crate::{Record, gsnr::GsnrReport, measure::printable};

/// Steps in a row before a finding ("for several consecutive steps", as the literature on vanishing gradients has it).
const PERSISTENCE: u32 = 3;
/// The same for units.
const SILENCE: u32 = 5;
/// Returns in a stack before its other tensors are taken to come and go too: one may be an accident.
const RETURNS: u32 = 2;
/// A gradient that grows this much from one step to the next is on its way back.
const RECOVERS: f64 = 4.0;
/// The least share of units with a gradient, the fewest of a step over the most, at which the others may be off for
/// good. In batches of one sample their number varies.
const AS_MANY: f64 = 0.5;
/// Elements of a table with a gradient in the last step, over those that have had one: at least this where the rows are
/// always the same.
const SAME_ROWS: f64 = 0.95;
/// Tracked steps before a finding on rows.
const LEAST_TRACKED: u32 = 4;

/// The state of the clean steps so far.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct Activity {
    tensors: Vec<Tensor>,
    /// Of each stack, the times that a tensor has come back after a step without gradient.
    returns: Vec<u32>,
    nothing: Run,
    /// Whether any tensor ever had a gradient.
    alive: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Tensor {
    /// Steps without any gradient.
    silent: Run,
    /// Steps with a gradient far below the largest.
    vanishing: Run,
    alive: bool,
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bits"))]
    last_norm: f64,
    /// Steps with most units without a gradient, and about as many in each: the fewest that had one, and the most.
    idle: Run,
    active: (u64, u64),
    /// Elements with a gradient in the last step, and without.
    last_active: u64,
    last_zeros: u64,
    /// Whether it had a gradient in the last step.
    is_present: bool,
}

impl Activity {
    pub fn new(structure: &Structure) -> Self {
        let stacks = structure.stacks.iter().max().map_or(0, |last| last + 1);
        Self {
            tensors: vec![Tensor::default(); structure.stacks.len()],
            returns: vec![0; stacks],
            nothing: Run::default(),
            alive: false,
        }
    }

    /// Whether it has the same numbers of tensors and stacks.
    pub fn is_as_long_as(&self, other: &Self) -> bool {
        (self.tensors.len(), self.returns.len()) == (other.tensors.len(), other.returns.len())
    }

    /// Judges the next clean step. `order` is that of the backward pass.
    pub fn judge(
        &mut self,
        (step, records): (u64, &[Record]),
        (structure, rules, order): (&Structure, &Rules, &[usize]),
        found: &mut Found<'_>,
    ) {
        let norms: Vec<f64> = records.iter().map(Record::finite_l2_norm).collect();
        let largest = (0..norms.len()).filter(|&i| structure.is_weight[i]).map(|i| norms[i]).fold(0.0, f64::max);
        for (index, (tensor, record)) in self.tensors.iter_mut().zip(records).enumerate() {
            tensor.is_present = record.count > 0;
            if !tensor.is_present {
                continue;
            }
            let norm = norms[index];
            // Not in a step in which no tensor had a gradient.
            if norm > 0.0 && tensor.alive && tensor.silent.steps > self.nothing.steps {
                let returns = &mut self.returns[structure.stacks[index]];
                *returns = returns.saturating_add(1);
            }
            tensor.silent.count(norm == 0.0, step);
            tensor.alive |= norm > 0.0;
            let recovers = tensor.last_norm > 0.0 && norm >= RECOVERS * tensor.last_norm;
            let beside = norm / largest;
            let is_low = norm > 0.0 && structure.is_weight[index] && beside < rules.beside_largest.warning;
            tensor.vanishing.count(is_low && !recovers, step);
            tensor.last_norm = norm;
            tensor.last_zeros = record.zero_count;
            tensor.last_active = record.finite_count() - record.zero_count;
            let is_idle = structure.has_units(index) && inactive_share(record) > rules.inactive.warning;
            tensor.count_units(is_idle, step);
        }
        if records.iter().all(|record| record.count == 0) {
            return;
        }
        let is_nothing = norms.iter().all(|&norm| norm == 0.0);
        self.nothing.count(is_nothing, step);
        let was_alive = self.alive;
        self.alive |= !is_nothing;
        match (rules.silence, is_nothing) {
            (0, _) => {}
            (_, true) => return self.of_nothing(was_alive, order, found),
            (_, false) => self.of_silent((structure, rules, order), found),
        }
        self.of_units(records, rules, found);
        // If gradients explode, the others do not vanish; and a decline from layer to layer is a finding already.
        if !found.explodes(Verdict::Warning) && !found.has(&[FindingKind::Flow]) {
            self.of_vanishing(&norms, largest, rules, found);
        }
    }

    fn of_nothing(&self, was_alive: bool, order: &[usize], found: &mut Found<'_>) {
        let steps = self.nothing.steps;
        let severity = match (steps >= PERSISTENCE, was_alive) {
            (true, _) => Verdict::Critical,
            (false, false) => Verdict::Warning,
            // A batch without a loss, as a hinge loss may have it, is no fault.
            (false, true) => {
                found.undecided(FindingKind::Vanishing, None, format!("{} more steps", PERSISTENCE - steps));
                return;
            }
        };
        let mut silent = order.iter().copied();
        found.push(Seen {
            index: silent.next(),
            others: silent.collect(),
            since: Some(self.nothing.since),
            message: format!("no gradient at all, of any tensor, {}", for_steps(steps)),
            ..Seen::new(FindingKind::Vanishing, severity, (0.0, 0.0), "silent")
        });
    }

    fn of_silent(&self, (structure, rules, order): (&Structure, &Rules, &[usize]), found: &mut Found<'_>) {
        let mut silent = Vec::new();
        // The last place where the backward pass was alive.
        let mut last_alive = None;
        for &index in order {
            let tensor = &self.tensors[index];
            if silent.is_empty() && self.has_gradient(index) {
                last_alive = Some(index);
            }
            // Beside a weight with a gradient, a bias without one is cancelled out: the last of a Wasserstein critic,
            // say.
            let cancels =
                || !structure.is_weight[index] && structure.module_of(index).iter().any(|&i| self.has_gradient(i));
            let comes_and_goes = self.returns[structure.stacks[index]] >= RETURNS;
            if !tensor.is_present || tensor.silent.steps == 0 || comes_and_goes || cancels() {
                continue;
            }
            if tensor.silent.steps >= rules.silence {
                silent.extend(Some(index).filter(|&index| !found.is_exempt(index, FindingKind::Zeros)));
            } else {
                let needs = format!("{} more steps without a gradient", rules.silence - tensor.silent.steps);
                found.undecided(FindingKind::Zeros, index, needs);
            }
        }
        let Some((&first, others)) = silent.split_first() else { return };
        let Tensor { silent: Run { steps, since }, alive, .. } = self.tensors[first];
        let before = if alive { "; it had one before" } else { "; it never had one" };
        let last_alive =
            last_alive.map_or_else(String::new, |index| format!("; {} above it has one", printable(found.name(index))));
        found.push(Seen {
            index: Some(first),
            others: others.to_vec(),
            since: Some(since),
            message: format!("no gradient {}{before}{last_alive}", for_steps(steps)),
            ..Seen::new(FindingKind::Zeros, Verdict::Warning, (1.0, 0.0), "silent")
        });
    }

    /// Finds units that are off in every step. Their bias shows it: elements of a weight may lack a gradient because of
    /// their inputs.
    fn of_units(&self, records: &[Record], rules: &Rules, found: &mut Found<'_>) {
        for (index, (tensor, record)) in self.tensors.iter().zip(records).enumerate() {
            let Run { steps, since } = tensor.idle;
            let inactive = inactive_share(record);
            if !tensor.is_present {
                continue;
            }
            if (1..SILENCE).contains(&steps) {
                found.undecided(FindingKind::Dead, index, format!("{} more such steps", SILENCE - steps));
            } else if let Some((severity, limit)) = past_above(rules.inactive, inactive).filter(|_| steps > 0) {
                let message = format!(
                    "{} % of the units without a gradient, above {} %, {}, and about as many in each",
                    percent(inactive),
                    percent(limit),
                    for_steps(steps)
                );
                let seen = Seen::new(FindingKind::Dead, severity, (inactive, limit), "inactive");
                found.push(Seen { index: Some(index), since: Some(since), message, ..seen });
            }
        }
    }

    /// Finds rows of a weight without a bias, such as a table, that no tracked step looked up, where each looked up the
    /// same few.
    pub fn of_rows(&self, report: &GsnrReport, structure: &Structure, rules: &Rules, found: &mut Found<'_>) {
        for &(index, ref record) in report.records() {
            let tensor = &self.tensors[index];
            let all = record.defined + record.constant;
            let is_whole = tensor.is_present && tensor.last_active.checked_add(tensor.last_zeros) == Some(all);
            // Elements that vary have had a gradient: if there are no more than those with one now, they are always the
            // same.
            let is_same = count_to_f64(tensor.last_active) >= SAME_ROWS * count_to_f64(record.defined);
            if record.steps < LEAST_TRACKED
                || record.defined == 0
                || !structure.is_alone(index)
                || !is_whole
                || !is_same
            {
                continue;
            }
            let inactive = count_to_f64(record.constant.min(tensor.last_zeros)) / count_to_f64(all);
            let Some((severity, limit)) = past_above(rules.inactive_rows, inactive) else { continue };
            found.push(Seen {
                index: Some(index),
                since: Some(found.step().saturating_add(1).saturating_sub(u64::from(record.steps))),
                message: format!(
                    "{} % of the elements had no gradient in any of {} steps, above {} %; the others are the same in each",
                    percent(inactive),
                    record.steps,
                    percent(limit)
                ),
                ..Seen::new(FindingKind::Dead, severity, (inactive, limit), "inactive_rows")
            });
        }
    }

    fn has_gradient(&self, index: usize) -> bool {
        let tensor = &self.tensors[index];
        tensor.is_present && tensor.alive && tensor.silent.steps == 0
    }

    fn of_vanishing(&self, norms: &[f64], largest: f64, rules: &Rules, found: &mut Found<'_>) {
        let is_low = |tensor: &Tensor| tensor.is_present && tensor.vanishing.steps > 0;
        for (index, tensor) in self.tensors.iter().enumerate().filter(|(_, tensor)| is_low(tensor)) {
            let beside = norms[index] / largest;
            let Some((severity, limit)) = past_below(rules.beside_largest, beside) else { continue };
            if tensor.vanishing.steps < PERSISTENCE {
                continue;
            }
            found.push(Seen {
                index: Some(index),
                since: Some(tensor.vanishing.since),
                message: format!(
                    "norm {:.3e}, {beside:.3e} of the largest weight's, below {limit:.0e} {}",
                    norms[index],
                    for_steps(tensor.vanishing.steps)
                ),
                ..Seen::new(FindingKind::Vanishing, severity, (beside, limit), "beside_largest")
            });
        }
    }
}

impl Tensor {
    fn count_units(&mut self, is_idle: bool, step: u64) {
        let active = self.last_active;
        let (fewest, most) = (self.active.0.min(active), self.active.1.max(active));
        let goes_on = self.idle.steps > 0 && count_to_f64(fewest) >= AS_MANY * count_to_f64(most);
        if goes_on {
            self.active = (fewest, most);
        } else {
            (self.idle, self.active) = (Run::default(), (active, active));
        }
        self.idle.count(is_idle && active > 0, step);
    }
}

fn inactive_share(record: &Record) -> f64 {
    count_to_f64(record.zero_count) / count_to_f64(record.finite_count())
}

fn for_steps(steps: u32) -> String {
    if steps == 1 { "in this step".to_owned() } else { format!("for {steps} steps") }
}
