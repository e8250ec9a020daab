//! What has been told already: a finding that goes on is told once.

use crate::{Finding, FindingKind, Verdict};
use std::collections::BTreeSet;

/// Looks without a finding after which it counts as gone: one that comes and goes would be told again and again.
const PATIENCE: u32 = 10;

/// The findings that have been told and go on.
#[derive(Clone, Debug, Default)]
#[cfg_attr(feature = "checkpoint", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct Told(Vec<Known>);

/// One of them.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "checkpoint", derive(serde::Serialize, serde::Deserialize))]
struct Known {
    kind: FindingKind,
    rule: String,
    severity: Verdict,
    tensors: BTreeSet<String>,
    /// For how many looks it has not been found.
    missing: u32,
}

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
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes in what was found now.
    pub fn update<'a>(&mut self, found: impl IntoIterator<Item = &'a Finding>) -> Change {
        let had_any = !self.0.is_empty();
        self.0.iter_mut().for_each(|known| known.missing += 1);
        let mut is_new = false;
        for finding in found {
            match self.0.iter_mut().find(|known| known.tells(finding)) {
                Some(known) => known.missing = 0,
                None => {
                    is_new = true;
                    self.0.push(Known::of(finding));
                }
            }
        }
        self.0.retain(|known| known.missing <= PATIENCE);
        match (is_new, had_any && self.0.is_empty()) {
            (true, _) => Change::New,
            (false, true) => Change::Over,
            (false, false) => Change::None,
        }
    }
}

impl Known {
    fn of(finding: &Finding) -> Self {
        let tensors = finding.tensors().map(str::to_owned).collect();
        Self { kind: finding.kind, rule: finding.rule.to_owned(), severity: finding.severity, tensors, missing: 0 }
    }

    /// Whether who knows this knows the finding: of the same rule and kind, no worse, of no other tensors.
    fn tells(&self, finding: &Finding) -> bool {
        (self.kind, &*self.rule) == (finding.kind, finding.rule)
            && self.severity >= finding.severity
            && self.tensors.is_empty() == finding.tensor.is_none()
            && finding.tensors().all(|tensor| self.tensors.contains(tensor))
    }
}
