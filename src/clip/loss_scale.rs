//! The loss scale of mixed precision. The loss is multiplied by it, and statistics are in units of the unscaled loss.

use crate::{
    Config, Error, Probe, Record,
    device::Device,
    features::{Feature, Saved},
    probe::{Core, ReadBack, outside_capture},
};
use bytemuck::{Pod, Zeroable};

/// Scales the loss before `backward`, so that gradients in f16 neither become 0 nor overflow. With it in the
/// [`Config`](crate::Config), a step is measured **in unscaled units**: norms, means, magnitudes and the dead threshold
/// are those of x / scale. [`StepOutputs::coefficient`](crate::StepOutputs::coefficient) unscales the gradients in the
/// same multiplication that clips them.
///
/// The scale is in device memory, where the kernel that begins `backward` reads it. The measurement adapts it there as
/// torch's `GradScaler` does: a step with NaN or Inf multiplies it by `backoff_factor`, `growth_interval` steps in a
/// row without multiply it by `growth_factor`. The host takes no part. The optimizer is to leave out steps with NaN or
/// Inf, by [`StepOutputs::skip`](crate::StepOutputs::skip).
///
/// ```
/// use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe, clip::LossScale};
///
/// let plan = Plan::new([("weight", DType::F32, 2)])?;
/// let config = Config::new().clip(Clip::global_norm(1.0)).loss_scale(LossScale::fixed(1024.0));
/// let mut probe = Probe::new(Cpu, plan, config)?;
/// let mut gradient = [3.0f32 * 1024.0, 4.0 * 1024.0]; // of a loss times 1024
/// probe.step(&mut [&mut gradient])?;
/// assert_eq!(probe.wait()?.outputs().total_norm, 5.0);
/// assert!((gradient[0] - 0.6).abs() < 1e-6); // unscaled and clipped
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LossScale {
    /// The first step's scale; finite, above 0.
    pub initial: f32,
    /// Finite, at least 1. The scale stays where growth would pass the range of f32.
    pub growth_factor: f32,
    /// Above 0, at most 1. The scale stays where the factor would bring it below the normal numbers.
    pub backoff_factor: f32,
    /// Steps without NaN or Inf, at least 1.
    pub growth_interval: u32,
}

impl LossScale {
    /// Makes a scale that stays until it is set to another.
    pub const fn fixed(scale: f32) -> Self {
        Self { initial: scale, growth_factor: 1.0, backoff_factor: 1.0, growth_interval: 1 }
    }

    /// Makes a scale that adapts, with the parameters of torch's `GradScaler`: it starts at 65536, doubles after 2000
    /// steps, and halves at a NaN or Inf.
    pub const fn dynamic() -> Self {
        Self { initial: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }

    /// Sets the first scale.
    #[must_use]
    pub const fn initial(self, initial: f32) -> Self {
        Self { initial, ..self }
    }

    /// Sets the growth and backoff factors.
    #[must_use]
    pub const fn factors(self, growth_factor: f32, backoff_factor: f32) -> Self {
        Self { growth_factor, backoff_factor, ..self }
    }

    /// Sets the steps before growth.
    #[must_use]
    pub const fn growth_interval(self, growth_interval: u32) -> Self {
        Self { growth_interval, ..self }
    }

    /// # Errors
    /// [`Error::InvalidConfig`] for a value outside its range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check_scale(self.initial)?;
        let require = |holds: bool, option: &'static str, expected: &'static str, value: &dyn ToString| {
            if holds { Ok(()) } else { Err(Error::InvalidConfig { option, expected, value: value.to_string() }) }
        };
        let Self { growth_factor, backoff_factor, growth_interval, .. } = *self;
        let grows = growth_factor.is_finite() && growth_factor >= 1.0;
        require(grows, "growth_factor", "finite and at least 1", &growth_factor)?;
        let backs_off = backoff_factor > 0.0 && backoff_factor <= 1.0;
        require(backs_off, "backoff_factor", "above 0 and at most 1", &backoff_factor)?;
        require(growth_interval >= 1, "growth_interval", "at least 1", &growth_interval)
    }
}

/// # Errors
/// [`Error::InvalidConfig`] for a scale that is not finite and above 0.
fn check_scale(scale: f32) -> Result<(), Error> {
    if is_usable(scale) {
        return Ok(());
    }
    Err(Error::InvalidConfig { option: "loss_scale", expected: "finite and above 0", value: scale.to_string() })
}

/// Whether gradients can have been scaled by it.
pub(crate) fn is_usable(scale: f32) -> bool {
    scale.is_finite() && scale > 0.0
}

/// The scale and the rule it follows, in the layout of the kernels (`kernels/arguments.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct LossScaleState {
    pub scale: f32,
    /// Steps without NaN or Inf since it last changed.
    pub growth_tracker: u32,
    growth_factor: f32,
    backoff_factor: f32,
    growth_interval: u32,
    /// [`Config::dead_threshold`]; the threshold in scaled units depends on the scale.
    pub dead_threshold: f32,
    reserved: [u32; 2],
}

// The other side is in kernels/arguments.cuh.
const _: () = assert!(size_of::<LossScaleState>() == 32);

impl LossScaleState {
    /// The state that changes and is the same on all ranks, as a word.
    pub fn word(&self) -> u64 {
        u64::from(self.scale.to_bits()) << 32 | u64::from(self.growth_tracker)
    }

    pub fn new(rule: &LossScale, dead_threshold: f32) -> Self {
        Self {
            scale: rule.initial,
            growth_tracker: 0,
            growth_factor: rule.growth_factor,
            backoff_factor: rule.backoff_factor,
            growth_interval: rule.growth_interval,
            dead_threshold,
            reserved: [0; 2],
        }
    }

    /// Adapts the scale to a step, as `_amp_update_scale_` of torch.
    pub fn step(&mut self, found_nonfinite: bool) {
        if found_nonfinite {
            let scale = self.scale * self.backoff_factor;
            if scale >= f32::MIN_POSITIVE {
                self.scale = scale;
            }
            self.growth_tracker = 0;
        } else if self.growth_tracker + 1 >= self.growth_interval {
            let scale = self.scale * self.growth_factor;
            if scale.is_finite() {
                self.scale = scale;
            }
            self.growth_tracker = 0;
        } else {
            self.growth_tracker += 1;
        }
    }
}

/// The scale in device memory, where the kernels adapt it.
pub(crate) struct LossScaleMemory {
    /// The initial state.
    state: LossScaleState,
    memory: ReadBack,
}

impl Feature<LossScale> for LossScaleMemory {
    fn new(core: &mut Core, rule: LossScale) -> Result<Self, Error> {
        let state = LossScaleState::new(&rule, core.config.dead_threshold);
        let memory = ReadBack::holding(&*core.device, bytemuck::bytes_of(&state))?;
        core.step.loss_scale = memory.address();
        Ok(Self { state, memory })
    }
}

impl LossScaleMemory {
    /// Goes on from this state. With a count beyond the interval the scale grows at the next clean step.
    pub fn set(&self, device: &dyn Device, scale: f32, growth_tracker: u32) -> Result<(), Error> {
        let growth_tracker = growth_tracker.min(self.state.growth_interval - 1);
        let state = LossScaleState { scale, growth_tracker, ..self.state };
        device.upload(bytemuck::bytes_of(&state), self.memory.buffer())
    }
}

impl Saved for LossScaleMemory {
    const DECLARE: &'static str = "Config::loss_scale";
    /// The scale, and the steps since it last changed.
    type State = (f32, u32);

    fn state(&mut self, core: &Core) -> Result<(f32, u32), Error> {
        let state: LossScaleState = bytemuck::pod_read_unaligned(self.memory.wait(&*core.device)?);
        Ok((state.scale, state.growth_tracker))
    }

    fn check(&self, _: &Core, &(scale, _): &(f32, u32)) -> Result<(), Error> {
        check_scale(scale)
    }

    fn restore(&mut self, core: &Core, &(scale, growth_tracker): &(f32, u32)) -> Result<(), Error> {
        self.set(&*core.device, scale, growth_tracker)
    }
}

impl Config {
    /// Declares that gradients are of a loss multiplied by this scale.
    #[must_use]
    pub fn loss_scale(mut self, loss_scale: LossScale) -> Self {
        self.features.loss_scale = Some(loss_scale);
        self
    }
}

impl Probe {
    /// Sets the loss scale of the next step, and of later ones until it adapts: one upload.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::loss_scale`], [`Error::InvalidConfig`] unless
    /// finite and above 0, [`Error::UploadInCapture`], or the device's.
    pub fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        check_scale(scale)?;
        let declare = LossScaleMemory::DECLARE;
        let memory = self.rooms.loss_scale.as_ref().ok_or(Error::NotDeclared { declare })?;
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        memory.set(&*self.core.device, scale, 0)
    }
}

/// Gives the divisor of scaled gradients; 1 for a scale that is not usable.
pub(crate) fn divisor(scale: f32) -> f64 {
    if is_usable(scale) { f64::from(scale) } else { 1.0 }
}

impl Record {
    /// Gives the record of the same elements over `divisor`, an f32 that is finite and above 0. Non-zero magnitudes
    /// stay non-zero and finite: they are rounded to the nearest such f32.
    pub(crate) fn over(&self, divisor: f64) -> Record {
        if divisor == 1.0 {
            return *self;
        }
        Record {
            mean_or_zero: self.mean_or_zero / divisor,
            sum_squared_deviations: self.sum_squared_deviations / divisor / divisor,
            sum_abs: self.sum_abs / divisor,
            max_abs_or_zero: magnitude_over(self.max_abs_or_zero, divisor),
            min_nonzero_abs_or_infinity: magnitude_over(self.min_nonzero_abs_or_infinity, divisor),
            ..*self
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
pub(crate) fn magnitude_over(magnitude: f32, divisor: f64) -> f32 {
    if magnitude == 0.0 || magnitude == f32::INFINITY {
        return magnitude;
    }
    // Rounded twice, which for a quotient of two f32 is as good as once: f64 has more than twice their digits.
    let nearest = (f64::from(magnitude) / divisor) as f32;
    if nearest == 0.0 {
        f32::from_bits(1)
    } else if nearest == f32::INFINITY {
        f32::MAX
    } else {
        nearest
    }
}
