//! Findings while a step is being diagnosed: what a passed limit is called, one finding a tensor and kind.

use super::{Finding, FindingKind, Limits, Statistic, ThresholdRule, Verdict, diagnosis::finding};
use crate::{Plan, Record};

/// What has been found of a step so far.
pub(super) struct Found<'a> {
    plan: &'a Plan,
    step: u64,
    /// With the place of the tensor; findings of the step have the number of tensors.
    findings: Vec<(usize, Finding)>,
    tensors: usize,
}

impl<'a> Found<'a> {
    pub(super) fn new(plan: &'a Plan, step: u64, tensors: usize) -> Self {
        Self { plan, step, findings: Vec::new(), tensors }
    }

    pub(super) fn push(
        &mut self,
        index: Option<usize>,
        kind: FindingKind,
        severity: Verdict,
        values: (f64, f64),
        rule: &'static str,
        message: String,
    ) {
        let name = index.map(|index| self.plan.tensors()[index].name.as_str());
        let found = finding(severity, kind, self.step, name, values, rule, message);
        self.findings.push((index.unwrap_or(self.tensors), found));
    }

    /// A tensor that is not finite.
    pub(super) fn nonfinite(&mut self, index: usize, record: &Record) {
        let first = record.first_nonfinite_index;
        for (kind, count, what) in
            [(FindingKind::Nan, record.nan_count, "NaN"), (FindingKind::Inf, record.inf_count, "infinite")]
        {
            if count > 0 {
                let message =
                    format!("{count} of {} elements are {what}; the first that is not finite is {first}", record.count);
                #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
                let values = (count as f64, 0.0);
                self.push(Some(index), kind, Verdict::Critical, values, "nonfinite", message);
            }
        }
    }

    /// A rule whose limit `value` passes, by this bit of the word. `more` ends the message.
    pub(super) fn threshold(&mut self, index: Option<usize>, rule: &ThresholdRule, value: f64, bit: u32, more: &str) {
        let (Some(statistic), Some(kind)) = (rule.statistic(), rule.kind()) else { return };
        let severity = if bit >> 16 != 0 { Verdict::Critical } else { Verdict::Warning };
        // A warning that is raised by something else than the value has passed the warning alone.
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
        self.push(index, kind, severity, (value, limit), statistic.name(), message);
    }

    /// The worst of each kind and tensor, in the order of [`Diagnosis::findings`](super::Diagnosis::findings); the
    /// verdicts of the tensors raised by them. The elements of a vanishing tensor are dead as well, which is no finding
    /// of its own: its units are not what is wrong.
    pub(super) fn finish(self, verdicts: &mut [Verdict]) -> Vec<Finding> {
        let Self { mut findings, tensors, .. } = self;
        findings.sort_by_key(|(index, found)| (*index, found.kind, std::cmp::Reverse(found.severity)));
        findings.dedup_by_key(|(index, found)| (*index, found.kind));
        let vanishing: Vec<usize> = findings
            .iter()
            .filter(|(_, found)| found.kind == FindingKind::Vanishing)
            .map(|&(index, _)| index)
            .collect();
        findings.retain(|(index, found)| found.kind != FindingKind::Dead || vanishing.binary_search(index).is_err());
        for (index, found) in &findings {
            if let Some(verdict) = verdicts.get_mut(*index) {
                *verdict = (*verdict).max(found.severity);
            }
        }
        // What concerns all tensors comes first.
        findings
            .sort_by_key(|(index, found)| (std::cmp::Reverse(found.severity), found.kind, (index + 1) % (tensors + 1)));
        findings.into_iter().map(|(_, found)| found).collect()
    }
}

/// How far above its limits a value is, and the limit that it passed.
pub(super) fn past_above(limits: Limits, value: f64) -> Option<(Verdict, f64)> {
    if value > limits.critical {
        Some((Verdict::Critical, limits.critical))
    } else {
        (value > limits.warning).then_some((Verdict::Warning, limits.warning))
    }
}

/// The same below.
pub(super) fn past_below(limits: Limits, value: f64) -> Option<(Verdict, f64)> {
    if value < limits.critical {
        Some((Verdict::Critical, limits.critical))
    } else {
        (value < limits.warning).then_some((Verdict::Warning, limits.warning))
    }
}

/// A share, in percent with as many digits as it takes and at most two behind the point.
pub(super) fn percent(share: f64) -> String {
    let text = format!("{:.2}", 100.0 * share);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
