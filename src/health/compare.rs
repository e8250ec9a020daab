//! Compares two runs, or one before and after a fix.

use crate::{
    Error, Report,
    clip::percentile_of,
    history::HistoryReport,
    measure::{printable, width_of},
};
use std::{collections::HashMap, fmt};

/// Mean and deviation of norms over steps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NormSummary {
    /// Finite steps that were not skipped.
    pub steps: u64,
    /// Mean of the norm; 0 without steps.
    pub mean: f64,
    /// Its standard deviation (ddof 0); 0 without steps.
    pub std: f64,
}

impl NormSummary {
    /// Welford's update.
    #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
    fn add(&mut self, norm: f64) {
        let before = self.steps as f64;
        self.steps += 1;
        let after = self.steps as f64;
        let gap = norm - self.mean;
        self.mean += gap / after;
        self.std = ((self.std * self.std * before + gap * (norm - self.mean)) / after).sqrt();
    }
}

/// Holds the norms of a run, to be compared with another's. Steps that are not finite or skipped are counted and left
/// out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunSummary {
    /// The norm of all tensors together.
    pub total: NormSummary,
    /// Steps left out.
    pub left_out: u64,
    /// The norm of each tensor, by name.
    tensors: Vec<(String, NormSummary)>,
}

impl RunSummary {
    /// Summarises the last steps of a run.
    pub fn of_history(history: &HistoryReport) -> Self {
        let mut run = Self::default();
        for (step, tensors) in history.steps() {
            let clean = step.outputs.found_inf == 0.0 && step.outputs.skip == 0;
            let norms = history.plan().tensors().iter().zip(tensors);
            let norms = norms.map(|(spec, tensor)| (spec.name.as_str(), tensor.finite_l2_norm));
            run.add(clean, step.outputs.finite_total_norm, norms);
        }
        run
    }

    /// Summarises these steps, which must be of one plan.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`] when they are not.
    pub fn of_reports<'a>(reports: impl IntoIterator<Item = &'a Report>) -> Result<Self, Error> {
        let mut run = Self::default();
        let mut plan = None;
        for report in reports {
            let first = *plan.get_or_insert_with(|| report.plan());
            first.check_report(report.plan())?;
            let outputs = report.outputs();
            let clean = outputs.found_inf == 0.0 && outputs.skip == 0;
            let norms = report.tensors().map(|tensor| (tensor.name, tensor.record.finite_l2_norm()));
            run.add(clean, outputs.finite_total_norm, norms);
        }
        Ok(run)
    }

    /// Adds a step: whether it is finite and not skipped, the norm of its finite elements, and the norm of each tensor,
    /// by name.
    pub fn add<'a>(&mut self, clean: bool, total: f64, norms: impl IntoIterator<Item = (&'a str, f64)>) {
        for (index, (name, norm)) in norms.into_iter().enumerate() {
            let is_named = |(known, _): &(String, NormSummary)| known == name;
            // A tensor is usually at the same place in every step.
            let place = Some(index).filter(|&index| self.tensors.get(index).is_some_and(is_named));
            let place = place.or_else(|| self.tensors.iter().position(is_named)).unwrap_or_else(|| {
                self.tensors.push((name.to_owned(), NormSummary::default()));
                self.tensors.len() - 1
            });
            if clean {
                self.tensors[place].1.add(norm);
            }
        }
        if clean { self.total.add(total) } else { self.left_out += 1 }
    }

    /// Names and norms of the tensors, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &NormSummary)> {
        self.tensors.iter().map(|(name, summary)| (name.as_str(), summary))
    }
}

/// Suggests a norm to clip to: this percentile, from 0 to 100, of the total norms of the last steps, measured before
/// the clip. 95 to 99 is usual. Steps that are not finite or skipped are left out; `None` without any.
/// [`Clip::Percentile`](crate::Clip::Percentile) does the same at every step.
///
/// # Errors
/// [`Error::InvalidConfig`] for a percentile outside 0 to 100.
pub fn suggested_clip(history: &HistoryReport, percentile: f64) -> Result<Option<f64>, Error> {
    if !(0.0..=100.0).contains(&percentile) {
        let value = percentile.to_string();
        return Err(Error::InvalidConfig { option: "percentile", expected: "from 0 to 100", value });
    }
    let clean = history.steps().map(|(step, _)| &step.outputs).filter(|step| step.found_inf == 0.0 && step.skip == 0);
    let mut norms: Vec<f64> = clean.map(|outputs| outputs.finite_total_norm).collect();
    norms.sort_by(f64::total_cmp);
    Ok(percentile_of(&norms, percentile))
}

/// The change of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormChange {
    /// The mean is more than 10 times the one before: vanishing gradients that came back, or an explosion.
    RoseTenfold,
    /// The mean is below a tenth of the one before.
    FellTenfold,
    /// Neither, but the standard deviation is below half of the one before: a steadier run.
    Steadied,
    /// None of these.
    Alike,
}

impl NormChange {
    fn of(before: &NormSummary, after: &NormSummary) -> Self {
        if after.mean > 10.0 * before.mean {
            Self::RoseTenfold
        } else if 10.0 * after.mean < before.mean {
            Self::FellTenfold
        } else if after.std < 0.5 * before.std {
            Self::Steadied
        } else {
            Self::Alike
        }
    }

    /// The change in words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RoseTenfold => "rose more than tenfold",
            Self::FellTenfold => "fell below a tenth",
            Self::Steadied => "deviation halved",
            Self::Alike => "alike",
        }
    }
}

/// One line of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    /// The tensor; `None` for all of them together.
    pub tensor: Option<String>,
    /// In the first run.
    pub before: NormSummary,
    /// In the second.
    pub after: NormSummary,
    /// The change.
    pub change: NormChange,
}

/// Compares two runs. `Display` prints the lines that changed.
///
/// ```
/// use gradprobe::health::{Comparison, NormChange, RunSummary};
///
/// let (mut before, mut after) = (RunSummary::default(), RunSummary::default()); // or `of_history`, `of_reports`
/// before.add(true, 5.0, [("weight", 5.0)]);
/// after.add(true, 0.1, [("weight", 0.1)]);
/// let comparison = Comparison::new(&before, &after);
/// assert_eq!(comparison.lines[0].change, NormChange::FellTenfold);
/// println!("{comparison}");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// All tensors together first, then those that both runs have, in the first one's order.
    pub lines: Vec<Compared>,
    /// Steps left out of each run, as not finite or skipped.
    pub left_out: (u64, u64),
    /// Tensors that only one of the runs has.
    pub unmatched: Vec<String>,
}

impl Comparison {
    /// Compares the run `after` with the run `before`.
    pub fn new(before: &RunSummary, after: &RunSummary) -> Self {
        let line = |tensor: Option<&str>, before: &NormSummary, after: &NormSummary| Compared {
            tensor: tensor.map(str::to_owned),
            before: *before,
            after: *after,
            change: NormChange::of(before, after),
        };
        let mut later: HashMap<&str, &NormSummary> = after.tensors().collect();
        let mut lines = vec![line(None, &before.total, &after.total)];
        let mut unmatched = Vec::new();
        for (name, summary) in before.tensors() {
            match later.remove(name) {
                Some(after) => lines.push(line(Some(name), summary, after)),
                None => unmatched.push(name.to_owned()),
            }
        }
        unmatched.extend(after.tensors().filter(|(name, _)| later.contains_key(name)).map(|(name, _)| name.to_owned()));
        Self { lines, left_out: (before.left_out, after.left_out), unmatched }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |line: &Compared| line.tensor.as_deref().map_or_else(|| "all tensors".to_owned(), printable);
        let shown = || self.lines.iter().filter(|line| line.tensor.is_none() || line.change != NormChange::Alike);
        let width = width_of(shown().map(name), "");
        writeln!(f, "{:width$} {:>10} {:>10} {:>10} {:>10}", "norm", "mean", "std", "mean", "std")?;
        for line in shown() {
            let (before, after) = (&line.before, &line.after);
            writeln!(
                f,
                "{:width$} {:>10.3e} {:>10.3e} {:>10.3e} {:>10.3e}  {}",
                name(line),
                before.mean,
                before.std,
                after.mean,
                after.std,
                line.change.name()
            )?;
        }
        let alike = self.lines.len() - shown().count();
        writeln!(
            f,
            "{} steps, then {}; {alike} tensors alike; left out as not finite or skipped: {}, then {}",
            self.lines[0].before.steps, self.lines[0].after.steps, self.left_out.0, self.left_out.1
        )?;
        for name in &self.unmatched {
            writeln!(f, "only in one of the runs: {}", printable(name))?;
        }
        Ok(())
    }
}
