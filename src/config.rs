//! The configuration of a probe.

use crate::{Error, Rules, clip::Clip, features::Features, gsnr::GsnrConfig};

/// Chooses how a step treats NaN and Inf in a gradient. The device decides, with no branch on the host.
///
/// ```
/// use gradprobe::{Clip, Config, Cpu, DType, NonFinitePolicy, Plan, Probe};
///
/// let plan = Plan::new([("weight", DType::F32, 3)])?;
/// let config = Config::new().clip(Clip::global_norm(1.0)).non_finite(NonFinitePolicy::ZeroNonFinite);
/// let mut probe = Probe::new(Cpu, plan, config)?;
/// let mut gradient = [3.0f32, f32::NAN, 4.0];
/// probe.step(&mut [&mut gradient])?;
/// assert!((gradient[0] - 0.6).abs() < 1e-6 && gradient[1] == 0.0); // of a norm of 5
/// assert!(!probe.wait()?.skip());
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum NonFinitePolicy {
    /// Leaves the gradients untouched, with a coefficient of 1, and raises the skip flag for the optimizer to branch
    /// on.
    #[default]
    Skip = 0,
    /// Behaves as PyTorch: a NaN norm makes every gradient NaN, an infinite one makes the finite ones 0.
    Propagate = 1,
    /// Sets non-finite elements to 0, and clips by the norm of the finite ones.
    ZeroNonFinite = 2,
}

impl NonFinitePolicy {
    /// Gives the policy of this number.
    pub(crate) fn of(code: u32) -> Self {
        match code {
            0 => Self::Skip,
            1 => Self::Propagate,
            _ => Self::ZeroNonFinite,
        }
    }
}

/// Declares everything that a probe does. It is fixed when the probe is made. [`Config::bytes`] gives the device memory
/// it takes.
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
    /// The rule of the clip. By default nothing is clipped.
    pub clip: Clip,
    /// How NaN and Inf affect the clip.
    pub non_finite: NonFinitePolicy,
    /// The features that the methods below declare.
    #[doc(hidden)]
    pub features: Features,
    /// The order in which a backward pass reaches the tensors.
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
    /// Measures statistics and norms, and nothing else.
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares all that [`Watch`](crate::Watch) uses: statistics and norms, a diagnosis by the default rules,
    /// histograms, and signal and noise of every element over windows of 100 steps. Tracking takes 8 bytes an element
    /// and a pass over memory each step; to do without it, declare [`rules`](Self::rules) and
    /// [`histogram`](Self::histogram) alone.
    pub fn full() -> Self {
        Self::new().rules(Rules::default()).histogram().tracking(GsnrConfig::new().window(100))
    }

    /// Sets the dead threshold.
    #[must_use]
    pub fn dead_threshold(self, dead_threshold: f32) -> Self {
        Self { dead_threshold, ..self }
    }

    /// Sets the rule of the clip.
    #[must_use]
    pub fn clip(self, clip: Clip) -> Self {
        Self { clip, ..self }
    }

    /// Sets the policy for NaN and Inf.
    #[must_use]
    pub fn non_finite(self, non_finite: NonFinitePolicy) -> Self {
        Self { non_finite, ..self }
    }

    /// Sets the order in which a backward pass reaches the tensors, as their places in the plan. The diagnosis uses it.
    /// The default is the reverse of the plan's order. [`backward_order`](crate::health::backward_order) derives one
    /// from the names.
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
