//! A weight whose share of the norm jumps: the sign of a fault in one place, while the total hardly moves.
//!
//! Of 158 healthy trainings none had a share that rose by more than 4.2 deviations within six steps.

use super::{
    FindingKind, Rules, Verdict,
    found::{Found, Seen, past_above},
    jump::jump,
    structure::Structure,
};
use crate::Record;

/// Steps that a share is compared with: few, so that a thousand weights cost a tenth of a millisecond.
const WINDOW: usize = 8;

/// The least share that counts. One that was almost 0, as behind a branch that begins at 0, grows by more than a jump.
const LEAST: f64 = 0.01;
/// The least rise of the norm itself since the last step: a share rises as well where the others fall.
const RISES: f64 = 2.0;

/// The state of the clean steps so far.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct Shares {
    tensors: Vec<Last>,
    /// Elements of the tensors that had a gradient.
    elements: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Last {
    /// Shares above 0.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    shares: Vec<f64>,
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bits"))]
    norm: f64,
}

impl Shares {
    pub fn new(tensors: usize) -> Self {
        Self { tensors: vec![Last::default(); tensors], elements: 0 }
    }

    /// Forgets all steps.
    pub fn clear(&mut self) {
        self.tensors.fill_with(Last::default);
    }

    /// Whether it has as many tensors, and no more shares of each than are kept.
    pub fn is_as_long_as(&self, other: &Self) -> bool {
        self.tensors.len() == other.tensors.len() && self.tensors.iter().all(|last| last.shares.len() <= WINDOW)
    }

    /// Judges the next clean step, with this total norm.
    pub fn judge(
        &mut self,
        (records, total): (&[Record], f64),
        (structure, rules): (&Structure, &Rules),
        found: &mut Found<'_>,
    ) {
        if total <= 0.0 {
            return;
        }
        // Shares of other tensors are no comparison.
        let elements = records.iter().map(|record| record.count).sum();
        if std::mem::replace(&mut self.elements, elements) != elements {
            self.clear();
        }
        // A finding names the cause already.
        let is_told = found.explodes(Verdict::Warning) || found.has(&[FindingKind::Spike]);
        for (index, (last, record)) in self.tensors.iter_mut().zip(records).enumerate() {
            let norm = record.finite_l2_norm();
            let share = norm / total;
            if !structure.is_weight[index] || share <= 0.0 {
                continue;
            }
            let rises = norm >= RISES * std::mem::replace(&mut last.norm, norm) && share >= LEAST && !is_told;
            let jump = if rises { jump(&last.shares, share) } else { None };
            if let Some(jump) = jump
                && let Some((severity, limit)) = past_above(rules.share, jump.deviations)
            {
                let message = format!(
                    "its norm is {share:.3e} of the total, {:.3e} times its usual share, {:.1} deviations above it, limit {limit}",
                    share / jump.median,
                    jump.deviations
                );
                let seen = Seen::new(FindingKind::Spike, severity, (jump.deviations, limit), "share");
                found.push(Seen { index: Some(index), message, ..seen });
            }
            if last.shares.len() == WINDOW {
                last.shares.remove(0);
            }
            last.shares.push(share);
        }
    }
}
