//! What a probe is told once: the dead threshold, the clip, and what to do when a gradient is not finite.

use crate::{ClipPolicy, Error, LossScale};

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

/// Settings of a probe.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// |x| below which an element counts as dead. Finite, not negative. Default 1e-10.
    pub dead_threshold: f32,
    /// Norm to which the gradients are clipped together; without it and under the default policy the coefficient is 1.
    /// Finite, above 0.
    pub max_norm: Option<f64>,
    /// What decides the clip.
    pub clip: ClipPolicy,
    /// What a NaN or Inf does to the clip.
    pub non_finite: NonFinitePolicy,
    /// What the loss is multiplied by before `backward`; nothing by default.
    pub loss_scale: Option<LossScale>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dead_threshold: 1e-10,
            max_norm: None,
            clip: ClipPolicy::GlobalNorm,
            non_finite: NonFinitePolicy::Skip,
            loss_scale: None,
        }
    }
}

impl Config {
    /// With this dead threshold.
    #[must_use]
    pub fn dead_threshold(self, dead_threshold: f32) -> Self {
        Self { dead_threshold, ..self }
    }

    /// With the gradients clipped together to this norm.
    #[must_use]
    pub fn max_norm(self, max_norm: f64) -> Self {
        Self { max_norm: Some(max_norm), ..self }
    }

    /// With the clip decided by this policy.
    #[must_use]
    pub fn clip(self, clip: ClipPolicy) -> Self {
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

    /// # Errors
    /// [`Error::InvalidConfig`] for a value outside its range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if !(self.dead_threshold.is_finite() && self.dead_threshold >= 0.0) {
            let value = self.dead_threshold.to_string();
            return Err(Error::InvalidConfig { option: "dead_threshold", expected: "finite and not negative", value });
        }
        if let Some(loss_scale) = &self.loss_scale {
            loss_scale.check()?;
        }
        match self.max_norm {
            Some(x) if !(x.is_finite() && x > 0.0) => {
                Err(Error::InvalidConfig { option: "max_norm", expected: "finite and above 0", value: x.to_string() })
            }
            _ => self.clip.check(self.max_norm),
        }
    }
}
