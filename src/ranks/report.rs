//! The result of the comparison of ranks.

use std::fmt;

/// Tells where ranks differ, in the report of a step: [`Report::rank_check`](crate::Report::rank_check).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RankCheck {
    /// The step whose replicas were compared: the report's, or the one before.
    pub step: u64,
    /// Replicas that have other bits than those of other ranks.
    pub replicas: Option<Differing>,
    /// Ranks that came to the step with another number, loss scale or state of the clip.
    pub state: Option<Differing>,
}

/// Names a rank that differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differing {
    /// The rank that differs from all others. Of only two ranks both, since nobody can tell which is right. Empty where
    /// several differ, or only ranks that hold nothing of this one's:
    /// [`Room::differing_replicas`](crate::Room::differing_replicas) finds those.
    pub ranks: Vec<u32>,
    /// The tensor, where it is one alone.
    pub tensor: Option<String>,
    /// Whether its weight differs, and not its gradient.
    pub is_weight: bool,
}

impl fmt::Display for Differing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ranks[..] {
            [] => write!(f, "on several ranks")?,
            [rank] => write!(f, "on rank {rank}")?,
            _ => {
                let ranks: Vec<String> = self.ranks.iter().map(u32::to_string).collect();
                write!(f, "on rank {}", ranks.join(" or "))?;
            }
        }
        let of = if self.is_weight { "the weight of " } else { "" };
        self.tensor.as_ref().map_or(Ok(()), |tensor| write!(f, ", in {of}{}", crate::measure::printable(tensor)))
    }
}

impl fmt::Display for RankCheck {
    /// A line for each finding.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(replicas) = &self.replicas {
            writeln!(f, "replicas differ in step {} {replicas}", self.step)?;
        }
        if let Some(state) = &self.state {
            writeln!(f, "the state differs in step {} {state}", self.step)?;
        }
        Ok(())
    }
}

/// Names a tensor whose replicas differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DifferingReplica {
    /// Its place in the plan.
    pub tensor: usize,
    /// Whether its weight differs, and not its gradient.
    pub is_weight: bool,
    /// The ranks that differ from the majority. Without a majority, all that hold the tensor.
    pub ranks: Vec<u32>,
}
