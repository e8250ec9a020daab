//! The records of every rank, for when something is wrong and the question is where.

use super::Placement;
use crate::{Plan, Record};
use std::fmt;

/// What each rank measured in the last step, before it was merged; the same on all ranks. `Display` prints where replicas
/// differ and where elements are not finite.
#[derive(Clone, Debug)]
pub struct RankReport {
    plan: Plan,
    placements: Vec<Placement>,
    /// Of rank 0, then of rank 1, …: one a tensor, and behind them one a weight in a plan with weights.
    records: Vec<Record>,
    /// Of one rank.
    length: usize,
}

impl RankReport {
    pub(crate) fn new(plan: Plan, placements: Vec<Placement>, records: Vec<Record>) -> Self {
        let lists = if plan.weights().is_some() { 2 } else { 1 };
        let length = lists * plan.tensors().len();
        Self { plan, placements, records, length }
    }

    /// How many ranks there are; 0 for a plan of no tensors.
    #[expect(clippy::cast_possible_truncation, reason = "ranks are numbered in u32")]
    pub fn ranks(&self) -> u32 {
        self.records.len().checked_div(self.length).unwrap_or(0) as u32
    }

    /// The records of what a rank holds, in the plan's order.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn records(&self, rank: u32) -> &[Record] {
        &self.records[rank as usize * self.length..][..self.plan.tensors().len()]
    }

    /// The records of the weights that a rank holds, in a plan with weights; of the last step that measured them.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn weights(&self, rank: u32) -> Option<&[Record]> {
        self.plan.weights()?;
        Some(&self.records[rank as usize * self.length..][self.plan.tensors().len()..self.length])
    }

    /// The rank, and the place within what it holds, of the first NaN or Inf of the tensor at `index` of the plan.
    ///
    /// # Panics
    /// When the plan has no such tensor.
    pub fn first_nonfinite(&self, index: usize) -> Option<(u32, u64)> {
        let first = |rank: u32| Some((rank, self.records(rank)[index].first_nonfinite()?));
        match &self.placements[index] {
            Placement::Ranks(of) => of.iter().find_map(|&rank| first(rank)),
            Placement::Replicated | Placement::Sharded => (0..self.ranks()).find_map(first),
        }
    }

    /// The ranks whose replica of the tensor at `index` of the plan, or of its weight, is not that of rank 0.
    ///
    /// # Panics
    /// When the plan has no such tensor.
    pub fn differing(&self, index: usize) -> Vec<u32> {
        if self.placements[index] != Placement::Replicated {
            return Vec::new();
        }
        let tensors = self.plan.tensors().len();
        let records = |rank: u32| {
            let of_rank = &self.records[rank as usize * self.length..][..self.length];
            (bytemuck::bytes_of(&of_rank[index]), of_rank.get(tensors + index).map(bytemuck::bytes_of))
        };
        (1..self.ranks()).filter(|&rank| records(rank) != records(0)).collect()
    }
}

impl fmt::Display for RankReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ranks", self.ranks())?;
        for (index, spec) in self.plan.tensors().iter().enumerate() {
            let name = crate::measure::printable(&spec.name);
            if let Some((rank, place)) = self.first_nonfinite(index) {
                writeln!(f, "{name}: the first NaN or Inf is element {place} of rank {rank}")?;
            }
            let differing = self.differing(index);
            if !differing.is_empty() {
                let ranks: Vec<String> = differing.iter().map(u32::to_string).collect();
                writeln!(f, "{name}: replicas differ from that of rank 0 on rank {}", ranks.join(", "))?;
            }
        }
        Ok(())
    }
}
