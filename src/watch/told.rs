//! What has been told already: a finding that goes on is told once.

use crate::Finding;
use std::collections::HashSet;

/// Looks without a finding after which it counts as gone: one that comes and goes would be told again and again.
const PATIENCE: u32 = 10;

/// The findings that have been told and go on, and for how many looks each has not been found.
#[derive(Clone, Debug, Default)]
pub(super) struct Told(Vec<(Finding, u32)>);

/// What a look has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    /// There is something that has not been told.
    New,
    /// All that was told is gone.
    Over,
}

impl Told {
    /// Takes in what was found now.
    pub fn update<'a>(&mut self, found: impl IntoIterator<Item = &'a Finding>) -> Change {
        let had_any = !self.0.is_empty();
        self.0.iter_mut().for_each(|(_, missing)| *missing += 1);
        let mut is_new = false;
        for finding in found {
            match self.0.iter_mut().find(|(told, _)| tells(told, finding)) {
                Some((_, missing)) => *missing = 0,
                None => {
                    is_new = true;
                    self.0.push((finding.clone(), 0));
                }
            }
        }
        self.0.retain(|(_, missing)| *missing <= PATIENCE);
        match (is_new, had_any && self.0.is_empty()) {
            (true, _) => Change::New,
            (false, true) => Change::Over,
            (false, false) => Change::None,
        }
    }
}

/// Whether who knows the first finding knows the second: of the same rule and kind, no worse, of no other tensors.
fn tells(told: &Finding, finding: &Finding) -> bool {
    if (told.kind, told.rule) != (finding.kind, finding.rule) || told.severity < finding.severity {
        return false;
    }
    let known: HashSet<&str> = told.tensors().collect();
    known.is_empty() == finding.tensor.is_none() && finding.tensors().all(|tensor| known.contains(tensor))
}
