//! The choice of steps and tensors to look at in detail.

use super::Verdict;
use crate::{Error, Plan};
use wildmatch::WildMatch;

/// Chooses the steps that are worth the detail: every n-th, inside windows, and of chosen tensors. The health word is
/// there in every step, and a step that it calls unhealthy is always due.
///
/// ```
/// use gradprobe::{Verdict, health::Cadence};
/// // Every step of the first hundred, then one of fifty.
/// let cadence = [Cadence::every(1)?.window(1, 100)?, Cadence::every(50)?];
/// let due = |step| cadence.iter().any(|cadence| cadence.is_due(step, Verdict::Healthy));
/// assert!(due(99) && !due(101) && due(150));
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cadence {
    every: u64,
    /// First and last step of each; empty for the whole run.
    windows: Vec<(u64, u64)>,
    patterns: Vec<String>,
}

impl Cadence {
    /// Does as `every`, with a number known to be above 0.
    pub(crate) const fn each(every: u64) -> Self {
        Self { every, windows: Vec::new(), patterns: Vec::new() }
    }

    /// Includes the steps whose numbers are multiples of `every`, at least 1.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0.
    pub fn every(every: u64) -> Result<Self, Error> {
        if every == 0 {
            return Err(Error::InvalidConfig { option: "every", expected: "at least 1", value: "0".to_owned() });
        }
        Ok(Self::each(every))
    }

    /// Includes only steps from `start` to `end`, both included. With several windows, a step may be in any of them.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] when it ends before it starts.
    pub fn window(mut self, start: u64, end: u64) -> Result<Self, Error> {
        if start > end {
            let value = format!("{start} to {end}");
            return Err(Error::InvalidConfig { option: "window", expected: "a start that is not past the end", value });
        }
        self.windows.push((start, end));
        Ok(self)
    }

    /// Chooses only tensors whose names match one of these patterns: `*` stands for any characters, `?` for one.
    #[must_use]
    pub fn tensors<P: Into<String>>(mut self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.patterns.extend(patterns.into_iter().map(Into::into));
        self
    }

    /// Whether it chooses some tensors only.
    pub(crate) fn is_of_some_tensors(&self) -> bool {
        !self.patterns.is_empty()
    }

    /// Whether the step is included.
    pub fn includes(&self, step: u64) -> bool {
        let inside = self.windows.is_empty() || self.windows.iter().any(|&(start, end)| (start..=end).contains(&step));
        step.is_multiple_of(self.every) && inside
    }

    /// Whether the step is included or unhealthy.
    pub fn is_due(&self, step: u64, verdict: Verdict) -> bool {
        verdict != Verdict::Healthy || self.includes(step)
    }

    /// Gives the places of the chosen tensors in the plan, ascending; all of them without a pattern.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a pattern that matches none.
    pub fn select(&self, plan: &Plan) -> Result<Vec<usize>, Error> {
        let mut chosen = vec![self.patterns.is_empty(); plan.tensors().len()];
        for pattern in &self.patterns {
            let matcher = WildMatch::new(pattern);
            let mut used = false;
            for (tensor, chosen) in plan.tensors().iter().zip(&mut chosen) {
                let matches = matcher.matches(&tensor.name);
                used |= matches;
                *chosen |= matches;
            }
            if !used {
                return Err(Error::NoSuchTensor { pattern: pattern.clone() });
            }
        }
        Ok((0..chosen.len()).filter(|&index| chosen[index]).collect())
    }
}
