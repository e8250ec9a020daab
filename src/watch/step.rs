//! What a step's report says to a trainer.

use crate::{Diagnosis, Finding, Report, health, write::Entry};
use std::{
    fmt::{self, Write},
    sync::Arc,
};

/// A step as its report has it.
#[derive(Clone, Debug)]
pub struct WatchedStep {
    pub(super) entry: Arc<Entry>,
    pub(super) changed: Option<String>,
}

impl WatchedStep {
    /// Its number.
    pub fn step(&self) -> u64 {
        self.entry.step()
    }

    /// L2 norm of all gradients, before the clip: NaN if an element is, else +Inf if one is infinite.
    pub fn norm(&self) -> f64 {
        self.report().outputs().total_norm
    }

    /// By what the clip multiplies all gradients: 1 where it leaves them as they are.
    pub fn coefficient(&self) -> f64 {
        self.report().outputs().coefficient_f64
    }

    /// Whether the optimizer should leave the step out: [`Report::skip`].
    pub fn skip(&self) -> bool {
        self.report().skip()
    }

    /// What is wrong, where something is that was not told before, and a line where all that was is over: as it went to standard error.
    pub fn changed(&self) -> Option<&str> {
        self.changed.as_deref()
    }

    /// The report, with the diagnosis.
    pub fn report(&self) -> &Report {
        self.entry.report()
    }

    /// All there is of the step, as it is written.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// `step 12: norm 2.579, clip 0.388`, with the scalars.
impl fmt::Display for WatchedStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}:", self.step())?;
        self.entry.scalars().iter().try_for_each(|(name, value)| write!(f, " {name} {value:.4e},"))?;
        write!(f, " norm {:.4e}, clip {:.4}", self.norm(), self.coefficient())?;
        if self.skip() { write!(f, ", to be skipped") } else { Ok(()) }
    }
}

/// Findings of a step that have not been told, and those of what was looked at beside it.
pub(super) fn words(step: u64, diagnosis: Option<&Diagnosis>, beside: &[Finding]) -> String {
    let mut words = diagnosis.map_or_else(String::new, Diagnosis::to_string);
    if !beside.is_empty() {
        write!(words, "step {step}: over the last steps\n{}", health::table(beside)).expect("a string takes all");
    }
    words
}

/// That all is over that was told.
pub(super) fn over(step: u64) -> String {
    format!("step {step}: healthy again\n")
}
