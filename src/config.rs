//! What a probe is told once: everything.

use crate::{Error, Rules, clip::Clip, features::Features, gsnr::GsnrConfig};

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

impl NonFinitePolicy {
    /// The policy of this number.
    pub(crate) fn of(code: u32) -> Self {
        match code {
            0 => Self::Skip,
            1 => Self::Propagate,
            _ => Self::ZeroNonFinite,
        }
    }
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
    /// What else it does: what the methods below have declared.
    #[doc(hidden)]
    pub features: Features,
    /// In which a backward pass reaches the tensors.
    pub backward_order: Option<Vec<usize>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dead_threshold: 1e-10,
            clip: Clip::None,
            non_finite: NonFinitePolicy::Skip,
            features: Features::default(),
            backward_order: None,
        }
    }
}

impl Config {
    /// Statistics and norms, and nothing else.
    pub fn new() -> Self {
        Self::default()
    }

    /// Statistics and norms, a diagnosis by the default rules, histograms, and signal and noise of every element over windows of 100
    /// steps: all that [`Watch`](crate::Watch) looks at. Tracking takes 8 bytes an element and a pass over memory each step; without it,
    /// declare [`rules`](Self::rules) and [`histogram`](Self::histogram) alone.
    pub fn full() -> Self {
        Self::new().rules(Rules::default()).histogram().tracking(GsnrConfig::new().window(100))
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
        if self.backward_order.is_some() && self.features.rules.is_none() {
            let (expected, value) = ("given beside `Config::rules`", "an order".to_owned());
            return Err(Error::InvalidConfig { option: "backward_order", expected, value });
        }
        self.features.loss_scale.map_or(Ok(()), |loss_scale| loss_scale.check())?;
        self.features.optimizer.as_ref().map_or(Ok(()), |optimizer| optimizer.check())?;
        self.clip.check()
    }
}
