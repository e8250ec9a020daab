//! What a probe is told once: everything.

use crate::{
    Error, GsnrConfig, LossScale, SampleConfig,
    clip::{AdaptiveClip, Clip},
    health::Rules,
    ranks::Ranks,
};

/// What a step does when a gradient holds NaN or Inf. Decided on the device, with no branch on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum NonFinitePolicy {
    /// Gradients stay untouched, the coefficient is 1 and the skip flag is raised for the optimizer to branch on.
    #[default]
    Skip = 0,
    /// What torch does: a NaN norm makes every gradient NaN, an infinite one makes the finite ones 0.
    Propagate = 1,
    /// Non-finite elements become 0 and the clip uses the norm of the finite ones.
    ZeroNonFinite = 2,
}

/// Everything that a probe does, declared when it is made. [`Config::bytes`] says what that takes on the device.
///
/// ```
/// use gradprobe::{Clip, Config, health::Rules};
/// let config = Config::new().clip(Clip::global_norm(1.0)).history(64).rules(Rules::default());
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// |x| below which an element counts as dead. Finite, not negative. Default 1e-10.
    pub dead_threshold: f32,
    /// What decides the clip; nothing is clipped by default.
    pub clip: Clip,
    /// What a NaN or Inf does to the clip.
    pub non_finite: NonFinitePolicy,
    /// What the loss is multiplied by before `backward`; nothing by default.
    pub loss_scale: Option<LossScale>,
    /// Steps that are kept on the device.
    pub history: Option<u32>,
    /// Tensors that are tracked across steps.
    pub tracking: Option<GsnrConfig>,
    /// Whether moments of Adam's are reduced.
    pub moments: bool,
    /// Whether elements are counted by their magnitudes.
    pub histogram: bool,
    /// Whether dot products are taken.
    pub dot: bool,
    /// Elements that are kept of each step.
    pub samples: Option<SampleConfig>,
    /// The clip of each unit by the norm of its weights.
    pub adaptive_clip: Option<AdaptiveClip>,
    /// Micro-batches of an accumulation that are measured before they are added up.
    pub micro_batches: Option<u32>,
    /// The other ranks, and where elements are.
    pub ranks: Option<Ranks>,
    /// By which each step is diagnosed.
    pub rules: Option<Rules>,
    /// In which a backward pass reaches the tensors.
    pub backward_order: Option<Vec<usize>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dead_threshold: 1e-10,
            clip: Clip::None,
            non_finite: NonFinitePolicy::Skip,
            loss_scale: None,
            history: None,
            tracking: None,
            moments: false,
            histogram: false,
            dot: false,
            samples: None,
            adaptive_clip: None,
            micro_batches: None,
            ranks: None,
            rules: None,
            backward_order: None,
        }
    }
}

impl Config {
    /// Statistics and norms, and nothing else.
    pub fn new() -> Self {
        Self::default()
    }

    /// With this dead threshold.
    #[must_use]
    pub fn dead_threshold(self, dead_threshold: f32) -> Self {
        Self { dead_threshold, ..self }
    }

    /// With the clip decided by this rule.
    #[must_use]
    pub fn clip(self, clip: Clip) -> Self {
        Self { clip, ..self }
    }

    /// With this policy for NaN and Inf.
    #[must_use]
    pub fn non_finite(self, non_finite: NonFinitePolicy) -> Self {
        Self { non_finite, ..self }
    }

    /// With gradients of a loss that is multiplied by this scale.
    #[must_use]
    pub fn loss_scale(self, loss_scale: LossScale) -> Self {
        Self { loss_scale: Some(loss_scale), ..self }
    }

    /// With the last steps kept on the device, at least 1: 112 bytes a step and 24 a step and tensor.
    #[must_use]
    pub fn history(self, steps: u32) -> Self {
        Self { history: Some(steps), ..self }
    }

    /// With mean and variance of every element of these tensors kept across steps: [`GsnrConfig::bytes`].
    #[must_use]
    pub fn tracking(self, tensors: GsnrConfig) -> Self {
        Self { tracking: Some(tensors), ..self }
    }

    /// With the moments of Adam's that a trainer has reduced to signal and noise: 16 KiB and 120 bytes a tensor.
    #[must_use]
    pub fn moments(self) -> Self {
        Self { moments: true, ..self }
    }

    /// With histograms of the magnitudes: 8 KiB a tensor.
    #[must_use]
    pub fn histogram(self) -> Self {
        Self { histogram: true, ..self }
    }

    /// With dot products of two lists of tensors: 48 bytes a chunk of 32 Ki elements and 64 a tensor.
    #[must_use]
    pub fn dot(self) -> Self {
        Self { dot: true, ..self }
    }

    /// With a few elements kept of each step.
    #[must_use]
    pub fn samples(self, samples: SampleConfig) -> Self {
        Self { samples: Some(samples), ..self }
    }

    /// With units of tensors clipped by the norms of their weights: 56 bytes a tensor.
    #[must_use]
    pub fn adaptive_clip(self, clip: AdaptiveClip) -> Self {
        Self { adaptive_clip: Some(clip), ..self }
    }

    /// With so many micro-batches of an accumulation measured on their own, at least 1: 80 bytes a micro-batch and tensor.
    #[must_use]
    pub fn micro_batches(self, count: u32) -> Self {
        Self { micro_batches: Some(count), ..self }
    }

    /// With every measurement gathered from all ranks and merged before the step is decided, as [`ranks`](crate::ranks)
    /// describes: 80 bytes a tensor and rank, twice that in a plan with weights.
    #[must_use]
    pub fn ranks(self, ranks: Ranks) -> Self {
        Self { ranks: Some(ranks), ..self }
    }

    /// With each step diagnosed by these rules, where its report is read, and judged by those of them that are thresholds on
    /// the device: one word for the step, [`StepOutputs::health`](crate::StepOutputs::health), and one a tensor. 2 KiB and 12
    /// bytes a tensor.
    #[must_use]
    pub fn rules(self, rules: Rules) -> Self {
        Self { rules: Some(rules), ..self }
    }

    /// With the tensors' places in the plan in the order in which a backward pass reaches them, for the diagnosis; without
    /// it, the reverse of the plan's. [`backward_order`](crate::health::backward_order) reads one from the names.
    #[must_use]
    pub fn backward_order(self, order: Vec<usize>) -> Self {
        Self { backward_order: Some(order), ..self }
    }

    /// # Errors
    /// [`Error::InvalidConfig`] for a value outside its range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if !(self.dead_threshold.is_finite() && self.dead_threshold >= 0.0) {
            let value = self.dead_threshold.to_string();
            return Err(Error::InvalidConfig { option: "dead_threshold", expected: "finite and not negative", value });
        }
        if self.backward_order.is_some() && self.rules.is_none() {
            let (expected, value) = ("given beside `Config::rules`", "an order".to_owned());
            return Err(Error::InvalidConfig { option: "backward_order", expected, value });
        }
        self.loss_scale.map_or(Ok(()), |loss_scale| loss_scale.check())?;
        self.clip.check()
    }
}
