//! The size of the weights: whether it lets signals through. It shows an initialisation that is too large or too small,
//! and weights after too high a learning rate.
//!
//! The gain of a weight is the root mean square of its elements times the root of the inputs it sums over: the factor
//! by which it enlarges a signal. He's initialisation has 1.41, Glorot's 1, PyTorch's layers 0.58 (He et al., "Delving
//! Deep into Rectifiers", 2015; Glorot and Bengio, 2010). Tables of embeddings sum over nothing and have none.

use super::{
    FindingKind, Limits, Rules, Verdict,
    found::{Found, Seen},
    run::Run,
    structure::Structure,
    threshold::count_to_f64,
};
use crate::Report;

/// One of this many weights must be too large, and two where there are two: a model may have one that is meant to be.
const SHARE: usize = 4;

/// The state from step to step.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct Weights {
    large: Run,
    small: Run,
    /// Of each tensor, whether it was once 0: it has no initialisation to judge.
    was_zero: Vec<bool>,
}

impl Weights {
    pub fn new(tensors: usize) -> Self {
        Self { large: Run::default(), small: Run::default(), was_zero: vec![false; tensors] }
    }

    /// Whether it has as many tensors.
    pub fn is_as_long_as(&self, other: &Self) -> bool {
        self.was_zero.len() == other.was_zero.len()
    }

    /// Judges the weights of a step, if their norms and shapes are known.
    pub fn judge(&mut self, report: &Report, structure: &Structure, rules: &Rules, found: &mut Found<'_>) {
        let was_zero = &mut self.was_zero;
        let gain = |(index, tensor): (usize, crate::TensorReport<'_>)| {
            let (norm, root) = (tensor.param_norm?, structure.fan_in_roots[index]?);
            was_zero[index] |= norm == 0.0;
            // Rows without a gradient are those of a table, which sums over nothing. Of ranks' parts, the norm is of
            // the whole.
            let is_table = structure.is_alone(index) && tensor.record.zero_count > 0;
            if was_zero[index] || is_table || tensor.record.count != tensor.len {
                return None;
            }
            let gain = norm / count_to_f64(tensor.len).sqrt() * root;
            (gain > 0.0 && gain.is_finite()).then_some((index, gain))
        };
        let mut gains: Vec<(usize, f64)> = report.tensors().enumerate().filter_map(gain).collect();
        gains.sort_by(|a, b| a.1.total_cmp(&b.1));
        let count = gains.len();
        if count == 0 {
            return;
        }
        let is_large = |limit: f64| {
            let large = count - gains.partition_point(|&(_, gain)| gain <= limit);
            large >= count.min(2) && SHARE * large >= count
        };
        let median = gains[count / 2].1;
        let large = level(rules.gain_above, is_large);
        let small = level(rules.gain_below, |limit| count > 1 && median < limit);
        let step = report.step();
        self.large.count(large.is_some(), step);
        self.small.count(small.is_some(), step);
        let mut tell = |kind, (severity, limit), (size, value): (&str, f64), since, tensors: Vec<usize>| {
            let usual = "an initialisation by He has 1.4, PyTorch's 0.6";
            found.push(Seen {
                index: tensors.first().copied(),
                others: tensors[1..].to_vec(),
                since: Some(since),
                message: format!("the weights are too {size} {value:.3e}, limit {limit}; {usual}"),
                ..Seen::new(kind, severity, (value, limit), "gain")
            });
        };
        let tensors_of = |gains: &[(usize, f64)]| gains.iter().map(|&(index, _)| index).collect::<Vec<_>>();
        if let Some(passed) = large {
            let above = gains.partition_point(|&(_, gain)| gain <= passed.1);
            let mut tensors = tensors_of(&gains[above..]);
            tensors.reverse();
            tell(FindingKind::Exploding, passed, ("large: gain", gains[count - 1].1), self.large.since, tensors);
        }
        if let Some(passed) = small {
            let below = gains.partition_point(|&(_, gain)| gain < passed.1);
            tell(
                FindingKind::Vanishing,
                passed,
                ("small: median gain", median),
                self.small.since,
                tensors_of(&gains[..below]),
            );
        }
    }
}

/// The worst of the limits that is passed.
fn level(limits: Limits, is_past: impl Fn(f64) -> bool) -> Option<(Verdict, f64)> {
    [(Verdict::Critical, limits.critical), (Verdict::Warning, limits.warning)]
        .into_iter()
        .find(|&(_, limit)| is_past(limit))
}
