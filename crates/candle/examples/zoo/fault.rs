//! What goes wrong in a training, and what may rightly be said of it.

/// A single fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// The learning rate, times this.
    LearningRate(f64),
    /// All first weights, times this, which is more than 1.
    LargeWeights(f32),
    /// All first weights, times this, which is less than 1.
    SmallWeights(f32),
    /// Sigmoids without residuals, of which each lets a quarter of the gradient through at best.
    Sigmoids,
    /// A bias so far below 0 that the first layer's ReLU lets nothing through.
    DeadRelu,
    /// What a module gives is cut from the graph.
    Detached,
    /// Parameters that take no gradient.
    Frozen,
    /// A root of 0, at one step.
    Nan,
    /// A loss scale that overflows f16: every step is skipped.
    Overflow,
    /// Inputs times this, at one step.
    CorruptedBatch(f64),
    /// The loss times 10 000, from a step on.
    LossFactor,
    /// The highest bit of the exponent of one element of this parameter's gradient, at one step.
    BitFlip(&'static str),
    /// Ids are taken modulo 4, so that other rows of the table are never trained.
    Index,
    /// Both factors of LoRA begin at 0: each is the other's gradient.
    ZeroFactors,
}

impl Fault {
    pub fn label(self) -> &'static str {
        match self {
            Self::LearningRate(_) => "lr-too-high",
            Self::LargeWeights(_) => "init-too-large",
            Self::SmallWeights(_) => "init-too-small",
            Self::Sigmoids => "deep-sigmoid",
            Self::DeadRelu => "dead-relu",
            Self::Detached => "detached",
            Self::Frozen => "frozen",
            Self::Nan => "nan",
            Self::Overflow => "f16-overflow",
            Self::CorruptedBatch(_) => "corrupted-batch",
            Self::LossFactor => "loss-times-1e4",
            Self::BitFlip(_) => "bit-flip",
            Self::Index => "embedding-index-bug",
            Self::ZeroFactors => "zero-init-both",
        }
    }

    /// The verdicts that are right.
    pub fn verdicts(self) -> &'static [&'static str] {
        match self {
            Self::Nan | Self::Overflow => &["critical"],
            _ => &["warning", "critical"],
        }
    }

    /// The kinds of finding any of which is right.
    pub fn kinds(self) -> &'static [&'static str] {
        match self {
            Self::LearningRate(_) | Self::LargeWeights(_) => {
                &["exploding", "ratio", "unstable", "spike", "spread", "flow", "nan", "inf"]
            }
            Self::SmallWeights(_) | Self::Sigmoids => {
                &["vanishing", "flow", "spread", "ratio", "dead", "zeros", "underflow"]
            }
            Self::DeadRelu | Self::Detached | Self::Frozen | Self::ZeroFactors => &["zeros", "dead", "vanishing"],
            Self::Nan => &["nan"],
            Self::Overflow => &["inf", "nan"],
            Self::CorruptedBatch(_) => &["spike", "unstable", "exploding", "ratio"],
            Self::LossFactor => &["spike", "unstable", "exploding", "ratio", "spread"],
            Self::BitFlip(_) => &["spike", "unstable", "exploding", "ratio", "spread", "inf", "nan"],
            Self::Index => &["dead", "zeros"],
        }
    }

    /// The factor of the learning rate.
    pub fn of_learning_rate(self) -> f64 {
        if let Self::LearningRate(factor) = self { factor } else { 1.0 }
    }

    /// The factor of the first weights.
    pub fn of_weights(self) -> f32 {
        if let Self::LargeWeights(factor) | Self::SmallWeights(factor) = self { factor } else { 1.0 }
    }
}
