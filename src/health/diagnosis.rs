//! The diagnosis of one step.

use super::{Finding, FindingKind, Flow, Frontier, Verdict};
use crate::{Plan, measure::printable};
use std::fmt;

/// What is wrong with a step. `Display` prints it for a terminal.
#[derive(Clone, Debug)]
pub struct Diagnosis {
    pub(super) plan: Plan,
    pub(super) step: u64,
    pub(super) verdict: Verdict,
    pub(super) findings: Vec<Finding>,
    pub(super) words: Vec<u32>,
    pub(super) step_word: u32,
    pub(super) verdicts: Vec<Verdict>,
    pub(super) frontier: Option<Frontier>,
    pub(super) flow: Option<Flow>,
}

impl Diagnosis {
    /// The measurement it is of, as [`Report::step`](crate::Report::step).
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The worst there is.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// What is wrong, most severe first; of the same severity by kind, then what concerns all tensors, then tensors in
    /// the plan's order.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Names and verdicts of the tensors, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, Verdict)> {
        self.plan.tensors().iter().map(|tensor| tensor.name.as_str()).zip(self.verdicts.iter().copied())
    }

    /// The verdicts of the tensors, in the plan's order.
    pub fn verdicts(&self) -> &[Verdict] {
        &self.verdicts
    }

    /// The word of each tensor, by the threshold rules alone: what a device writes for the same step.
    pub fn tensor_words(&self) -> &[u32] {
        &self.words
    }

    /// The word of the step, by the threshold rules alone: what a device writes for the same step.
    pub fn step_word(&self) -> u32 {
        self.step_word
    }

    /// Where NaN or Inf began: in this step or, kept until [`Health::reset`](super::Health::reset), in an earlier one.
    pub fn frontier(&self) -> Option<&Frontier> {
        self.frontier.as_ref()
    }

    /// How norms go with depth. `None` in a step that is not finite, and without layers enough.
    pub fn flow(&self) -> Option<&Flow> {
        self.flow.as_ref()
    }

    /// The remedies for all findings, each once, those for the worst first.
    pub fn advice(&self) -> Vec<&'static str> {
        let mut advice = Vec::new();
        for remedy in self.findings.iter().flat_map(|finding| finding.advice) {
            if !advice.contains(remedy) {
                advice.push(*remedy);
            }
        }
        advice
    }
}

/// Lines of one kind that are printed before the rest is counted.
const SHOWN: usize = 4;
/// Remedies that are printed.
const REMEDIES: usize = 5;

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_tensors = self.verdicts.iter().filter(|&&verdict| verdict != Verdict::Healthy).count();
        write!(f, "step {}: {}", self.step, self.verdict)?;
        if of_tensors > 0 {
            write!(f, " ({of_tensors} of {} tensors)", self.verdicts.len())?;
        }
        writeln!(f)?;
        write_findings(f, &self.findings)?;
        if let Some(frontier) = &self.frontier {
            write!(f, "  began at step {} in {}", frontier.step, printable(&frontier.tensor))?;
            write!(f, ", element {} ({})", frontier.element, frontier.kind)?;
            match &frontier.last_clean {
                Some(clean) => writeln!(f, "; the last clean one before it is {}", printable(clean))?,
                None => writeln!(f, "; nothing before it is clean")?,
            }
        }
        write_advice(f, &self.advice())
    }
}

/// Findings as lines for a terminal, as in a [`Diagnosis`]: of [`Health::diagnose_gsnr`](super::Health::diagnose_gsnr),
/// say.
pub fn table(findings: &[Finding]) -> impl fmt::Display + '_ {
    struct Table<'a>(&'a [Finding]);
    impl fmt::Display for Table<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_findings(f, self.0)
        }
    }
    Table(findings)
}

/// Those of one severity and kind together.
fn write_findings(f: &mut fmt::Formatter<'_>, findings: &[Finding]) -> fmt::Result {
    let of = |finding: &Finding| (finding.severity, finding.kind);
    for same in findings.chunk_by(|a, b| of(a) == of(b)) {
        let mark = if same[0].severity == Verdict::Critical { "✖" } else { "▲" };
        for finding in &same[..same.len().min(SHOWN)] {
            let name = finding.tensor.as_deref().map_or_else(|| "all tensors".to_owned(), printable);
            writeln!(f, "  {mark} {:9} {name}: {}", finding.kind, finding.message)?;
        }
        if same.len() > SHOWN {
            writeln!(f, "  {mark} {:9} and {} more", same[0].kind, same.len() - SHOWN)?;
        }
    }
    Ok(())
}

fn write_advice(f: &mut fmt::Formatter<'_>, advice: &[&str]) -> fmt::Result {
    for (index, remedy) in advice.iter().take(REMEDIES).enumerate() {
        writeln!(f, "  {} {remedy}", if index == 0 { "try:" } else { "    " })?;
    }
    Ok(())
}

/// Orders findings as [`Diagnosis::findings`] has them; those of one kind keep their order.
pub(super) fn sort(findings: &mut [Finding]) {
    findings.sort_by_key(|finding| (std::cmp::Reverse(finding.severity), finding.kind, finding.tensor.is_some()));
}

/// The worst verdict of these findings.
pub(super) fn worst<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Verdict {
    findings.into_iter().map(|finding| finding.severity).max().unwrap_or_default()
}

/// A finding with the advice for its kind.
pub(super) fn finding(
    severity: Verdict,
    kind: FindingKind,
    step: u64,
    tensor: Option<&str>,
    (value, threshold): (f64, f64),
    rule: &'static str,
    message: String,
) -> Finding {
    let advice = super::advice(kind);
    Finding { severity, kind, step, tensor: tensor.map(str::to_owned), value, threshold, rule, message, advice }
}
