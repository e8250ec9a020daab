//! The outputs of a step over all tensors: norms, coefficient, flags. An optimizer can apply the clip from them.

use super::{Record, StepSums, propagate};
use crate::{
    NonFinitePolicy,
    clip::{ClipState, Decision, LossScaleState, Norms, divisor, is_usable},
};
use bytemuck::{Pod, Zeroable};

/// Holds the step's scalars, in the layout that kernels read on the device (96 bytes, `kernels/include/gradprobe.h`).
///
/// An optimizer that multiplies gradients by `coefficient` (or divides by `inverse_coefficient`, PyTorch's
/// `grad_scale`) and returns early on `skip` (or on `found_inf`) needs no clip pass at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct StepOutputs {
    /// L2 norm over all tensors: NaN if any element is NaN, else +Inf if any is infinite.
    pub total_norm: f64,
    /// L2 norm over the finite elements of all tensors.
    pub finite_total_norm: f64,
    /// Coefficient for all tensors together: min(1, max_norm / (norm + 1e-6)), the rule of
    /// `torch.nn.utils.clip_grad_norm_`, or another [`Clip`](crate::Clip)'s. 1 without a clip, and where tensors or
    /// elements are clipped on their own.
    pub coefficient_f64: f64,
    /// `total_norm` in f32.
    pub total_norm_f32: f32,
    /// The factor of the gradients: `coefficient_f64` in f32, divided by `loss_scale` where they are scaled by one. 1
    /// in a step to skip.
    pub coefficient: f32,
    /// loss_scale / coefficient_f64: for optimizers that divide.
    pub inverse_coefficient: f32,
    /// 1.0 if any element is NaN or infinite, on any rank that the step waits for; if the loss scale is not usable; or
    /// if the step is to be skipped because ranks differ. Else 0.0.
    pub found_inf: f32,
    /// 1 if the optimizer should leave this step out, else 0. That is so for a non-finite element under
    /// [`NonFinitePolicy::Skip`], a loss scale that is not usable, and ranks that differ where the check is
    /// [strict](crate::ranks::ReplicaCheck::Strict).
    pub skip: i32,
    /// The work of the clip kernel: bits of [`StepOutputs::ACTION_SCALE`] and its neighbours; 0 is none.
    pub action: u32,
    /// Bits of [`StepOutputs::FLAG_NAN`] and its neighbours; 0 is a clean, unclipped step.
    pub flags: u32,
    /// 1 if the step measured the weights too, else 0.
    pub weights: u32,
    /// Steps measured by this probe, this one included.
    pub step: u64,
    /// NaN elements of all tensors.
    pub nan_count: u64,
    /// Infinite elements of all tensors.
    pub inf_count: u64,
    /// The step's health word by [`Config::rules`](crate::Config::rules), 0 without them. [`health`](crate::health)
    /// lists its bits, and [`verdict_of`](crate::health::verdict_of) gives the verdict.
    pub health: u32,
    /// The factor of the loss, and so of this step's gradients: 1 without a [`LossScale`](crate::clip::LossScale).
    pub loss_scale: f32,
    /// The loss scale of the next step.
    pub next_loss_scale: f32,
    /// 0.
    #[doc(hidden)]
    pub reserved: u32,
}

// The other side of these numbers is in kernels/include/gradprobe.h.
const _: () = {
    assert!(size_of::<StepOutputs>() == 96);
    assert!(std::mem::offset_of!(StepOutputs, total_norm_f32) == 24);
    assert!(std::mem::offset_of!(StepOutputs, skip) == 40);
    assert!(std::mem::offset_of!(StepOutputs, step) == 56);
};

impl StepOutputs {
    /// Bit of `action`: every element is multiplied by the coefficient.
    pub const ACTION_SCALE: u32 = 1;
    /// Bit of `action`: non-finite elements become 0.
    pub const ACTION_ZERO_NONFINITE: u32 = 2;
    /// Bit of `action`: the elements of each tensor are multiplied by its own coefficient.
    pub const ACTION_SCALE_TENSORS: u32 = 4;
    /// Bit of `action`: elements are brought between the limits of [`Clip::Value`](crate::Clip::Value) or
    /// [`Clip::Quantile`](crate::Clip::Quantile).
    pub const ACTION_CLAMP: u32 = 8;

    /// `flags`: some element is NaN.
    pub const FLAG_NAN: u32 = 1;
    /// `flags`: some element is infinite.
    pub const FLAG_INF: u32 = 2;
    /// `flags`: some elements are clipped.
    pub const FLAG_CLIPPED: u32 = 4;
    /// `flags`: the step should be skipped.
    pub const FLAG_SKIP: u32 = 8;
    /// `flags`: the norm is an outlier by [`Clip::ZScore`](crate::Clip::ZScore).
    pub const FLAG_SPIKE: u32 = 16;
    /// `flags`: the loss scale is not a finite number above 0. Only a kernel of your own can set such a scale. The step
    /// should be skipped under any policy, and its numbers are those of the gradients as they are.
    pub const FLAG_LOSS_SCALE: u32 = 32;
    /// `flags`: ranks that should be replicas hold other bits of a tensor. [`ranks`](crate::ranks) says of which step.
    pub const FLAG_REPLICAS: u32 = 64;
    /// `flags`: ranks have come to this step, or the one before, with another step number, loss scale or state of the
    /// clip.
    pub const FLAG_STATE: u32 = 128;

    /// Gives the outputs of a step from its sums and records, as the last block of the measure kernel does; `refused`
    /// if ranks differ. The caller adds the step's number and the other measurements.
    pub(crate) fn finish(
        &StepSums { squares, nan_count, inf_count, nonfinite }: &StepSums,
        records: &[Record],
        non_finite: NonFinitePolicy,
        refused: bool,
        clip: &mut ClipState<'_>,
        mut loss_scale: Option<&mut LossScaleState>,
    ) -> Self {
        let scale = loss_scale.as_ref().map_or(1.0, |state| state.scale);
        let (usable, divisor) = (is_usable(scale), divisor(scale));
        let found = nonfinite > 0 || !usable;
        let finite_total_norm = squares.rounded().sqrt() / divisor;
        let total_norm = propagate(nan_count, inf_count, finite_total_norm);
        let skip = found && (non_finite == NonFinitePolicy::Skip || !usable) || refused;
        let zero = found && non_finite == NonFinitePolicy::ZeroNonFinite && !skip;
        let norms = Norms {
            norm: if zero { finite_total_norm } else { total_norm },
            finite: !(found || refused),
            skip,
            divisor,
        };
        let Decision { coefficient: coefficient_f64, clips_parts, spike } = clip.decide(records, &norms);
        let coefficient = if skip { 1.0 } else { narrow(coefficient_f64 / divisor) };
        let clips = narrow(coefficient_f64) != 1.0 || clips_parts;
        if let Some(state) = &mut loss_scale {
            state.step(found);
        }
        let flag = |condition: bool, bit: u32| if condition { bit } else { 0 };
        Self {
            total_norm,
            finite_total_norm,
            coefficient_f64,
            total_norm_f32: narrow(total_norm),
            coefficient,
            inverse_coefficient: if skip { 1.0 } else { narrow(divisor / coefficient_f64) },
            found_inf: if found || refused { 1.0 } else { 0.0 },
            skip: i32::from(skip),
            action: flag(coefficient != 1.0, Self::ACTION_SCALE)
                | flag(clips_parts, clip.action_on_parts())
                | flag(zero, Self::ACTION_ZERO_NONFINITE),
            flags: flag(nan_count > 0, Self::FLAG_NAN)
                | flag(inf_count > 0, Self::FLAG_INF)
                | flag(clips, Self::FLAG_CLIPPED)
                | flag(skip, Self::FLAG_SKIP)
                | flag(spike, Self::FLAG_SPIKE)
                | flag(!usable, Self::FLAG_LOSS_SCALE),
            weights: 0,
            step: 0,
            nan_count,
            inf_count,
            health: 0,
            loss_scale: scale,
            next_loss_scale: loss_scale.map_or(1.0, |state| state.scale),
            reserved: 0,
        }
    }
}

/// The nearest f32; NaN without payload.
#[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
pub(crate) fn narrow(value: f64) -> f32 {
    if value.is_nan() { f32::NAN } else { value as f32 }
}
