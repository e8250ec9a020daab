//! Findings on gradients, as data.

use std::{collections::HashSet, fmt};

/// Says how healthy a tensor, a step or a run is, or how severe a finding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub enum Verdict {
    /// Nothing stands out.
    #[default]
    Healthy,
    /// Worth a look.
    Warning,
    /// Training will not succeed like this.
    Critical,
}

/// The kind of a finding. A number below 16 is that of its bit in the health words that a device writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[repr(u32)]
pub enum FindingKind {
    /// An element is NaN.
    Nan = 0,
    /// An element is infinite.
    Inf = 1,
    /// A gradient too small to move its weights, or weights too small to let one through.
    Vanishing = 2,
    /// A gradient so large that a step destroys its weights, or weights so large that it will be.
    Exploding = 3,
    /// Elements below the dead threshold, units that are off, rows that are never looked up.
    Dead = 4,
    /// Elements that are 0.
    Zeros = 5,
    /// A gradient out of proportion to its weights.
    Ratio = 6,
    /// Tensors whose norms lie too far apart.
    Spread = 7,
    /// Norms that shrink or grow with depth.
    Flow = 8,
    /// A norm far above those of the steps before.
    Spike = 9,
    /// Norms that jump from step to step, or that fall at once.
    Unstable = 10,
    /// More noise than signal across steps.
    Noisy = 11,
    /// Elements that a narrower type would lose.
    Underflow = 12,
    /// A clip that acts too often, or too hard.
    Clipped = 13,
    /// An update out of proportion to its weights, or that leaves them NaN or infinite.
    UpdateTooLarge = 14,
    /// Updates lost to rounding: the weights stay as they are.
    UpdateLost = 15,
    /// A tensor that hardly moves, beside the others.
    Stalled = 16,
    /// Ranks that hold other replicas, or have come to a step in another state.
    RanksDiffer = 17,
}

/// Describes one problem of a step or a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// The severity: a warning, or critical.
    pub severity: Verdict,
    /// The kind.
    pub kind: FindingKind,
    /// The step in which it was found, as [`Report::step`](crate::Report::step).
    pub step: u64,
    /// The step in which it began: this one, or an earlier one where a rule needs several.
    pub since: u64,
    /// The tensor to look at first; `None` where the finding is about all of them.
    pub tensor: Option<String>,
    /// The other tensors concerned.
    pub others: Vec<String>,
    /// The measured value, of `tensor` or of all; 1 or 0 for a missing gradient.
    pub value: f64,
    /// The limit that the value passed.
    pub threshold: f64,
    /// The name of the rule, the same from version to version.
    pub rule: &'static str,
    /// The observation in a sentence, beside the usual value.
    pub message: String,
    /// The usual remedies, most promising first.
    pub advice: &'static [&'static str],
}

impl Finding {
    /// The tensors concerned, the one to look at first before the others; none where the finding is about all of them.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.tensor.iter().chain(&self.others).map(String::as_str)
    }

    /// Whether it continues this finding of an earlier step: with the same rule, beginning and tensors.
    pub fn is_of_same_cause(&self, earlier: &Self) -> bool {
        let is_one = (self.since, self.severity, self.kind, self.rule)
            == (earlier.since, earlier.severity, earlier.kind, earlier.rule);
        let known: HashSet<&str> = if is_one { earlier.tensors().collect() } else { HashSet::new() };
        is_one && self.tensors().all(|tensor| known.contains(tensor))
    }
}

impl FindingKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [FindingKind; 18] = [
        Self::Nan,
        Self::Inf,
        Self::Vanishing,
        Self::Exploding,
        Self::Dead,
        Self::Zeros,
        Self::Ratio,
        Self::Spread,
        Self::Flow,
        Self::Spike,
        Self::Unstable,
        Self::Noisy,
        Self::Underflow,
        Self::Clipped,
        Self::UpdateTooLarge,
        Self::UpdateLost,
        Self::Stalled,
        Self::RanksDiffer,
    ];

    /// The bits k of the kinds in a health word: those that a rule on one step may find.
    pub(super) const OF_WORDS: u32 = 0xffff;

    /// Its name in reports: lower-case words with hyphens between.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nan => "nan",
            Self::Inf => "inf",
            Self::Vanishing => "vanishing",
            Self::Exploding => "exploding",
            Self::Dead => "dead",
            Self::Zeros => "zeros",
            Self::Ratio => "ratio",
            Self::Spread => "spread",
            Self::Flow => "flow",
            Self::Spike => "spike",
            Self::Unstable => "unstable",
            Self::Noisy => "noisy",
            Self::Underflow => "underflow",
            Self::Clipped => "clipped",
            Self::UpdateTooLarge => "update-too-large",
            Self::UpdateLost => "update-lost",
            Self::Stalled => "stalled",
            Self::RanksDiffer => "ranks-differ",
        }
    }
}

impl Verdict {
    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
