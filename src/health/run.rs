//! Steps in a row.

/// For how many steps in a row something has been so, and since which step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct Run {
    pub steps: u32,
    pub since: u64,
}

impl Run {
    /// Counts a step in which it is so, or ends the run.
    pub fn count(&mut self, is_so: bool, step: u64) {
        *self = match (is_so, self.steps) {
            (false, _) => Self::default(),
            (true, 0) => Self { steps: 1, since: step },
            (true, steps) => Self { steps: steps.saturating_add(1), since: self.since },
        };
    }
}
