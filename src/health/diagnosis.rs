//! The diagnosis of one step.

use super::{Finding, FindingKind, Flow, Frontier, Verdict};
use crate::{Plan, measure::printable};
use std::fmt;

/// Holds the findings of a step. `Display` prints them for a terminal.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, FindingKind, Plan, Probe, Rules, Verdict};
///
/// let plan = Plan::new([("head.weight", DType::F32, 3)])?;
/// let mut probe = Probe::new(Cpu, plan, Config::new().rules(Rules::default()))?;
/// probe.measure(&[&[0.1f32, f32::NAN, 0.2]])?;
/// let report = probe.wait()?;
/// let diagnosis = report.diagnosis().expect("the probe has rules");
/// assert_eq!(diagnosis.verdict(), Verdict::Critical);
/// let finding = &diagnosis.findings()[0]; // the worst
/// assert_eq!((finding.kind, finding.tensor.as_deref()), (FindingKind::Nan, Some("head.weight")));
/// println!("{}: {}; try: {}", finding.kind.name(), finding.message, finding.advice[0]);
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Diagnosis {
    pub(super) plan: Plan,
    pub(super) step: u64,
    pub(super) verdict: Verdict,
    pub(super) findings: Vec<Finding>,
    pub(super) undecided: Vec<Undecided>,
    pub(super) words: Vec<u32>,
    pub(super) step_word: u32,
    pub(super) verdicts: Vec<Verdict>,
    pub(super) frontier: Option<Frontier>,
    pub(super) flow: Option<Flow>,
}

/// A suspicion that cannot be confirmed yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undecided {
    /// The kind of finding that it may be.
    pub kind: FindingKind,
    /// The tensor it concerns; `None` where it is about all of them.
    pub tensor: Option<String>,
    /// The missing information.
    pub needs: String,
}

impl Diagnosis {
    /// The plan of the step.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The step's number, as [`Report::step`](crate::Report::step).
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The worst verdict of the findings.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// The findings, one a cause, most severe first. Those of the same severity are in the order of their kinds, those
    /// on all tensors before those on some.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Suspicions, each with the information that it lacks. They are no part of the verdict.
    pub fn undecided(&self) -> &[Undecided] {
        &self.undecided
    }

    /// Names and verdicts of the tensors, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, Verdict)> {
        self.plan.tensors().iter().map(|tensor| tensor.name.as_str()).zip(self.verdicts.iter().copied())
    }

    /// The verdicts of the tensors, in the plan's order.
    pub fn verdicts(&self) -> &[Verdict] {
        &self.verdicts
    }

    /// The word of each tensor, by the threshold rules alone: the same that a device writes.
    pub fn tensor_words(&self) -> &[u32] {
        &self.words
    }

    /// The word of the step, by the threshold rules alone: the same that a device writes.
    pub fn step_word(&self) -> u32 {
        self.step_word
    }

    /// The origin of NaN or Inf: in this step or, kept until [`Health::reset`](super::Health::reset), in an earlier
    /// one.
    pub fn frontier(&self) -> Option<&Frontier> {
        self.frontier.as_ref()
    }

    /// The norms of the layers by depth. `None` in a step that is not finite, or with too few layers.
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

/// The most remedies printed.
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
        write_undecided(f, &self.undecided)?;
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

/// Gives findings as lines for a terminal, as in a [`Diagnosis`]: those of
/// [`Health::diagnose_gsnr`](super::Health::diagnose_gsnr), say.
pub fn table(findings: &[Finding]) -> impl fmt::Display + '_ {
    struct Table<'a>(&'a [Finding]);
    impl fmt::Display for Table<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_findings(f, self.0)
        }
    }
    Table(findings)
}

fn write_findings(f: &mut fmt::Formatter<'_>, findings: &[Finding]) -> fmt::Result {
    for finding in findings {
        let mark = if finding.severity == Verdict::Critical { "✖" } else { "▲" };
        write!(f, "  {mark} {:9} {}", finding.kind, named(finding.tensor.as_deref(), finding.others.len()))?;
        if finding.since < finding.step {
            write!(f, ", since step {}", finding.since)?;
        }
        writeln!(f, ": {}", finding.message)?;
    }
    Ok(())
}

/// A tensor and how many others.
fn named(tensor: Option<&str>, others: usize) -> String {
    let name = tensor.map_or_else(|| "all tensors".to_owned(), printable);
    if others > 0 { format!("{name} and {others} more") } else { name }
}

/// Writes suspicions that lack the same information together.
fn write_undecided(f: &mut fmt::Formatter<'_>, undecided: &[Undecided]) -> fmt::Result {
    for same in undecided.chunk_by(|a, b| (a.kind, &a.needs) == (b.kind, &b.needs)) {
        let (kind, name) = (same[0].kind, named(same[0].tensor.as_deref(), same.len() - 1));
        writeln!(f, "  ? {kind:9} {name}: cannot tell yet; that takes {}", same[0].needs)?;
    }
    Ok(())
}

fn write_advice(f: &mut fmt::Formatter<'_>, advice: &[&str]) -> fmt::Result {
    for (index, remedy) in advice.iter().take(REMEDIES).enumerate() {
        writeln!(f, "  {} {remedy}", if index == 0 { "try:" } else { "    " })?;
    }
    Ok(())
}

/// The worst verdict of these findings.
pub(super) fn worst<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Verdict {
    findings.into_iter().map(|finding| finding.severity).max().unwrap_or_default()
}
