//! The findings of a step while it is being diagnosed: a name for each passed limit, and one finding a cause.

use super::{
    Finding, FindingKind, Limits, Statistic, ThresholdRule, Verdict, advice::advice_for, diagnosis::Undecided,
    threshold::count_to_f64,
};
use crate::{Plan, Record};

/// The findings of a step so far.
pub(super) struct Found<'a> {
    plan: &'a Plan,
    step: u64,
    /// Of each tensor, the bits k of the kinds that it is exempt from.
    exempt: &'a [u32],
    seen: Vec<Seen>,
    undecided: Vec<Undecided>,
}

/// A finding before it is named.
#[derive(Debug)]
pub(super) struct Seen {
    pub kind: FindingKind,
    pub severity: Verdict,
    pub value: f64,
    pub limit: f64,
    pub rule: &'static str,
    /// Its tensor; `None` where it is about all of them.
    pub index: Option<usize>,
    /// The other tensors concerned.
    pub others: Vec<usize>,
    /// The step in which it began; `None` for this one.
    pub since: Option<u64>,
    pub message: String,
}

impl Seen {
    /// Makes a finding of this step, about all tensors, without a message.
    pub fn new(kind: FindingKind, severity: Verdict, (value, limit): (f64, f64), rule: &'static str) -> Self {
        let (index, others, since, message) = (None, Vec::new(), None, String::new());
        Self { kind, severity, value, limit, rule, index, others, since, message }
    }

    /// Gives how far past its limit it is.
    fn excess(&self) -> f64 {
        if self.limit == 0.0 { 0.0 } else { (self.value / self.limit).ln().abs() }
    }
}

impl<'a> Found<'a> {
    pub(super) fn new(plan: &'a Plan, step: u64, exempt: &'a [u32]) -> Self {
        Self { plan, step, exempt, seen: Vec::new(), undecided: Vec::new() }
    }

    pub(super) fn name(&self, index: usize) -> &'a str {
        &self.plan.tensors()[index].name
    }

    pub(super) fn step(&self) -> u64 {
        self.step
    }

    pub(super) fn is_exempt(&self, index: usize, kind: FindingKind) -> bool {
        self.exempt[index] & 1 << kind as u32 != 0
    }

    /// Whether there is a finding of these kinds.
    pub(super) fn has(&self, kinds: &[FindingKind]) -> bool {
        self.seen.iter().any(|seen| kinds.contains(&seen.kind))
    }

    /// Adds a finding, without the tensors that are exempt from its kind.
    pub(super) fn push(&mut self, mut seen: Seen) {
        if let Some(first) = seen.index {
            let concerned = |&index: &usize| !self.is_exempt(index, seen.kind);
            let mut left = std::iter::once(first).chain(seen.others).filter(concerned);
            let Some(first) = left.next() else { return };
            (seen.index, seen.others) = (Some(first), left.collect());
        }
        self.seen.push(seen);
    }

    /// Whether gradients explode in this step, at least this severely. Weights that are too large are no event of a
    /// step.
    pub(super) fn explodes(&self, severity: Verdict) -> bool {
        let is_explosion = |seen: &Seen| {
            matches!(seen.kind, FindingKind::Exploding | FindingKind::Ratio)
                && seen.rule != "gain"
                && seen.severity >= severity
        };
        self.seen.iter().any(is_explosion)
    }

    /// Adds a suspicion of a tensor, or of all, with the information that it lacks. A tensor that is exempt gets none.
    pub(super) fn undecided(&mut self, kind: FindingKind, index: impl Into<Option<usize>>, needs: String) {
        let index = index.into();
        if index.is_none_or(|index| !self.is_exempt(index, kind)) {
            let tensor = index.map(|index| self.name(index).to_owned());
            self.undecided.push(Undecided { kind, tensor, needs });
        }
    }

    /// Adds the finding of a tensor that is not finite.
    pub(super) fn nonfinite(&mut self, index: usize, record: &Record) {
        let first = record.first_nonfinite_index;
        for (kind, count, what) in
            [(FindingKind::Nan, record.nan_count, "NaN"), (FindingKind::Inf, record.inf_count, "infinite")]
        {
            if count > 0 {
                let message =
                    format!("{count} of {} elements are {what}; the first that is not finite is {first}", record.count);
                let values = (count_to_f64(count), 0.0);
                let seen = Seen::new(kind, Verdict::Critical, values, "nonfinite");
                self.push(Seen { index: Some(index), message, ..seen });
            }
        }
    }

    /// Adds a rule whose limit `value` passes, by this bit of the word. `more` ends the message. It began in the step
    /// `since`.
    pub(super) fn threshold(
        &mut self,
        (index, since): (Option<usize>, u64),
        rule: &ThresholdRule,
        (value, bit): (f64, u32),
        more: &str,
    ) {
        let (Some(statistic), Some(kind)) = (rule.statistic(), rule.kind()) else { return };
        let severity = if bit >> 16 != 0 { Verdict::Critical } else { Verdict::Warning };
        // A value that does not pass the critical limit passes the warning alone, even if another rule set the bit.
        let passed_critical = rule.bit(value) >> 16 != 0;
        let limit = if passed_critical { rule.critical } else { rule.warning };
        let side = if rule.is_below() { "below" } else { "above" };
        let what = match statistic {
            Statistic::Norm => "norm",
            Statistic::Rms => "root mean square",
            Statistic::MaxAbs => "largest |x|",
            Statistic::ZeroFraction => "zeros",
            Statistic::DeadFraction => "dead elements",
            Statistic::Ratio => "norm over that of the weight",
            Statistic::Change => "norm over that of the step before",
            Statistic::TotalNorm => "total norm",
            Statistic::TotalChange => "total norm over that of the step before",
            Statistic::Spread => "largest norm of a tensor over the smallest",
        };
        let share = matches!(statistic, Statistic::ZeroFraction | Statistic::DeadFraction);
        let message = if share {
            format!("{what} {} %, {side} {} %{more}", percent(value), percent(limit))
        } else {
            format!("{what} {value:.3e}, {side} {limit:.3e}{more}")
        };
        let seen = Seen::new(kind, severity, (value, limit), statistic.name());
        self.push(Seen { index, since: Some(since), message, ..seen });
    }

    /// Gives one finding a cause, in the order of [`Diagnosis::findings`](super::Diagnosis::findings), and raises the
    /// tensors' verdicts by them. `order` is that of the backward pass.
    ///
    /// The worst of each tensor and kind counts. The elements of a vanishing tensor are dead as well; that is no
    /// finding of its own, since its units are not the cause. A step that explodes is no spike besides. Findings of one
    /// kind, rule and severity become one, named by the tensor furthest past its limit, or else by the first that the
    /// backward pass reaches.
    pub(super) fn finish(self, order: &[usize], verdicts: &mut [Verdict]) -> (Vec<Finding>, Vec<Undecided>) {
        let explodes = [Verdict::Warning, Verdict::Critical].map(|severity| self.explodes(severity));
        let mut seen = self.seen;
        seen.sort_by_key(|seen| (seen.index, seen.kind, std::cmp::Reverse(seen.severity)));
        // A loss in one format is not a loss in another.
        let is_one =
            |seen: &Seen| (seen.index, seen.kind, if seen.kind == FindingKind::Underflow { seen.rule } else { "" });
        seen.dedup_by(|b, a| is_one(a) == is_one(b) && a.others.is_empty() && b.others.is_empty());
        let vanishing: Vec<usize> =
            seen.iter().filter(|seen| seen.kind == FindingKind::Vanishing).filter_map(|seen| seen.index).collect();
        seen.retain(|seen| {
            let follows = match seen.kind {
                FindingKind::Dead => seen.index.is_some_and(|index| vanishing.binary_search(&index).is_ok()),
                FindingKind::Spike => explodes[usize::from(seen.severity == Verdict::Critical)],
                _ => false,
            };
            !follows
        });
        for seen in &seen {
            for index in seen.index.iter().chain(&seen.others) {
                verdicts[*index] = verdicts[*index].max(seen.severity);
            }
        }
        let mut places = vec![0; order.len()];
        order.iter().enumerate().for_each(|(place, &index)| places[index] = place);
        let place = |seen: &Seen| seen.index.map(|index| places[index]);
        seen.sort_by(|a, b| {
            let cause = |seen: &Seen| (std::cmp::Reverse(seen.severity), seen.kind, seen.index.is_some(), seen.rule);
            let of_one_limit = cause(a).cmp(&cause(b)).then(a.limit.total_cmp(&b.limit));
            of_one_limit.then(b.excess().total_cmp(&a.excess())).then(place(a).cmp(&place(b)))
        });
        let mut findings: Vec<Finding> = Vec::new();
        for seen in seen {
            let name = |index: usize| self.plan.tensors()[index].name.clone();
            let alike = |last: &&mut Finding| {
                let of_tensors = last.tensor.is_some() && seen.index.is_some();
                let is_one = (last.severity, last.kind, last.rule) == (seen.severity, seen.kind, seen.rule);
                of_tensors && is_one && last.threshold.total_cmp(&seen.limit).is_eq()
            };
            let others = seen.others.iter().copied().map(name);
            let since = seen.since.unwrap_or(self.step);
            if let Some(last) = findings.last_mut().filter(alike) {
                last.others.extend(seen.index.map(name).into_iter().chain(others));
                last.since = last.since.min(since);
                continue;
            }
            findings.push(Finding {
                severity: seen.severity,
                kind: seen.kind,
                step: self.step,
                since,
                tensor: seen.index.map(name),
                others: others.collect(),
                value: seen.value,
                threshold: seen.limit,
                rule: seen.rule,
                message: seen.message,
                advice: advice_for(seen.kind, seen.rule),
            });
        }
        (findings, self.undecided)
    }
}

/// Gives the severity of a value above its limits, and the limit that it passed.
pub(super) fn past_above(limits: Limits, value: f64) -> Option<(Verdict, f64)> {
    if value > limits.critical {
        Some((Verdict::Critical, limits.critical))
    } else {
        (value > limits.warning).then_some((Verdict::Warning, limits.warning))
    }
}

/// Does the same below.
pub(super) fn past_below(limits: Limits, value: f64) -> Option<(Verdict, f64)> {
    if value < limits.critical {
        Some((Verdict::Critical, limits.critical))
    } else {
        (value < limits.warning).then_some((Verdict::Warning, limits.warning))
    }
}

/// Writes a share in percent, with as many digits as it needs and at most two behind the point.
pub(super) fn percent(share: f64) -> String {
    let text = format!("{:.2}", 100.0 * share);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
