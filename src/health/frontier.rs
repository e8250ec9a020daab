//! The origin of NaN and Inf.

use super::FindingKind;
use crate::{Plan, Record};

/// Names the first tensor in backward order that was not finite, in the first bad step. The failed operation lies
/// between it and the last clean one. Later steps, in which everything is NaN, do not change it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Frontier {
    /// The step, as [`Report::step`](crate::Report::step).
    pub step: u64,
    /// The tensor.
    pub tensor: String,
    /// Its place in the plan.
    pub index: usize,
    /// The kind: NaN if it has any, else Inf.
    pub kind: FindingKind,
    /// The smallest index of an element that is not finite.
    pub element: u64,
    /// The tensor before it in backward order that has elements, all of them finite; `None` when it is the first.
    pub last_clean: Option<String>,
}

/// Finds the frontier of a step, with its tensors in this order. `None` in a finite one.
pub(super) fn find(plan: &Plan, records: &[Record], order: &[usize], step: u64) -> Option<Frontier> {
    let place = order.iter().position(|&index| records[index].has_nonfinite())?;
    let index = order[place];
    let record = &records[index];
    let name = |index: usize| plan.tensors()[index].name.clone();
    // All before the first bad one are clean.
    let last_clean = order[..place].iter().rev().copied().find(|&index| records[index].count > 0).map(name);
    let kind = if record.nan_count > 0 { FindingKind::Nan } else { FindingKind::Inf };
    Some(Frontier { step, tensor: name(index), index, kind, element: record.first_nonfinite_index, last_clean })
}
