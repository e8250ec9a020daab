//! Steps in a row.

/// A run of steps that meet a condition, and the first of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct Run {
    pub steps: u32,
    pub since: u64,
}

impl Run {
    /// Counts a step that meets the condition, or ends the run.
    pub fn count(&mut self, is_so: bool, step: u64) {
        *self = match (is_so, self.steps) {
            (false, _) => Self::default(),
            (true, 0) => Self { steps: 1, since: step },
            (true, steps) => Self { steps: steps.saturating_add(1), since: self.since },
        };
    }
}
