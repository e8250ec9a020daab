//! What a step decides for all the tensors together: norms, coefficient, flags. The deferred clip.

use crate::{Config, NonFinitePolicy, Record, record::propagate, spec};
use bytemuck::{Pod, Zeroable};

/// The step's scalars, in the layout kernels read on the device (80 bytes, `kernels/outputs.cuh`).
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
    /// min(1, max_norm / (norm + 1e-6)), the rule of `torch.nn.utils.clip_grad_norm_`; 1 without a clip.
    pub coefficient_f64: f64,
    /// `total_norm` in f32.
    pub total_norm_f32: f32,
    /// `coefficient_f64` in f32: what gradients are multiplied by.
    pub coefficient: f32,
    /// 1 / coefficient: for optimizers that divide.
    pub inverse_coefficient: f32,
    /// 1.0 if any element is NaN or infinite, else 0.0.
    pub found_inf: f32,
    /// 1 if the optimizer should leave this step out ([`NonFinitePolicy::Skip`] and a non-finite element), else 0.
    pub skip: i32,
    /// What the clip kernel has to do, [`StepOutputs::ACTION_NONE`] and its neighbours.
    pub action: u32,
    /// Bits of [`StepOutputs::VERDICT_NAN`] and its neighbours; 0 is a clean, unclipped step.
    pub verdict: u32,
    /// Unused; 0.
    pub reserved: u32,
    /// Steps measured by this probe, this one included.
    pub step: u64,
    /// NaN elements of all tensors.
    pub nan_count: u64,
    /// Infinite elements of all tensors.
    pub inf_count: u64,
}

// The other side of these numbers is in kernels/outputs.cuh.
const _: () = {
    assert!(size_of::<StepOutputs>() == 80);
    assert!(std::mem::offset_of!(StepOutputs, total_norm_f32) == 24);
    assert!(std::mem::offset_of!(StepOutputs, skip) == 40);
    assert!(std::mem::offset_of!(StepOutputs, step) == 56);
};

impl StepOutputs {
    /// `action`: the clip returns after one load.
    pub const ACTION_NONE: u32 = 0;
    /// `action`: every element is multiplied by the coefficient.
    pub const ACTION_SCALE: u32 = 1;
    /// `action`: non-finite elements become 0, the others are multiplied by the coefficient.
    pub const ACTION_ZERO_AND_SCALE: u32 = 2;

    /// `verdict`: some element is NaN.
    pub const VERDICT_NAN: u32 = 1;
    /// `verdict`: some element is infinite.
    pub const VERDICT_INF: u32 = 2;
    /// `verdict`: the coefficient is not 1.
    pub const VERDICT_CLIPPED: u32 = 4;
    /// `verdict`: the step should be skipped.
    pub const VERDICT_SKIP: u32 = 8;

    /// The outputs of a step from its records: what the last block of the measure kernel does.
    pub(crate) fn finish(records: &[Record], config: &Config, step: u64) -> Self {
        let squares = spec::fold(records.len(), |t| records[t].finite_sum_squares(), |a, b| a + b).unwrap_or(0.0);
        let nan_count = records.iter().map(|r| r.nan_count).sum();
        let inf_count = records.iter().map(|r| r.inf_count).sum();
        let found = nan_count + inf_count > 0;
        let finite_total_norm = squares.sqrt();
        let total_norm = propagate(nan_count, inf_count, finite_total_norm);
        let skip = found && config.non_finite == NonFinitePolicy::Skip;
        let zero = found && config.non_finite == NonFinitePolicy::ZeroNonFinite;
        let coefficient_f64 = match config.max_norm {
            Some(max_norm) if !skip => {
                let ratio = max_norm / (if zero { finite_total_norm } else { total_norm } + 1e-6);
                // Not `min`, which would drop a NaN; and NaN without payload, whatever arithmetic made of it.
                if ratio.is_nan() {
                    f64::NAN
                } else if ratio > 1.0 {
                    1.0
                } else {
                    ratio
                }
            }
            _ => 1.0,
        };
        let coefficient = narrow(coefficient_f64);
        let clipped = coefficient != 1.0;
        let flag = |condition: bool, bit: u32| if condition { bit } else { 0 };
        Self {
            total_norm,
            finite_total_norm,
            coefficient_f64,
            total_norm_f32: narrow(total_norm),
            coefficient,
            inverse_coefficient: narrow(1.0 / coefficient_f64),
            found_inf: if found { 1.0 } else { 0.0 },
            skip: i32::from(skip),
            action: match (zero, clipped) {
                (true, _) => Self::ACTION_ZERO_AND_SCALE,
                (false, true) => Self::ACTION_SCALE,
                (false, false) => Self::ACTION_NONE,
            },
            verdict: flag(nan_count > 0, Self::VERDICT_NAN)
                | flag(inf_count > 0, Self::VERDICT_INF)
                | flag(clipped, Self::VERDICT_CLIPPED)
                | flag(skip, Self::VERDICT_SKIP),
            reserved: 0,
            step,
            nan_count,
            inf_count,
        }
    }
}

/// The nearest f32; NaN without payload.
#[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
fn narrow(value: f64) -> f32 {
    if value.is_nan() { f32::NAN } else { value as f32 }
}
