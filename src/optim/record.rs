//! The update of a tensor by a step.

use super::Optimizer;
use crate::gsnr::AdamStep;
use bytemuck::{Pod, Zeroable};

/// Holds how far a step has moved one tensor (80 bytes, the same on the device). All 0 where the step has moved
/// nothing: the tensor was absent, or the step skipped.
///
/// Squares are f32 through 8 additions, and f64 beyond: norms are within 5e-7 relative, the dot product within 1e-6 of the
/// product of both norms. Squares below 2^-126 count as 0, above 2^128 as infinite; of directions, moments and weights that
/// is 1e-19 and 1.8e19.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct UpdateRecord {
    /// Elements.
    pub count: u64,
    /// Elements that did not move although they should have: rounding lost their update. For weights with f32 masters,
    /// the masters that did not move.
    pub lost: u64,
    /// Weights that are NaN or infinite after the step.
    pub nonfinite_count: u64,
    /// The measurement that moved the tensor, [`StepOutputs::step`](crate::StepOutputs::step).
    pub step: u64,
    /// Updates of this tensor so far, this one included.
    pub steps: u32,
    /// Unused; 0.
    pub reserved: u32,
    /// Σ u²: u is the amount subtracted from a weight, decay included, before rounding.
    pub update_squares: f64,
    /// Σ w² of the weights after the step, in their own type.
    pub weight_squares: f64,
    /// Σ u·g: g is the measured gradient, in units of the loss, and not clipped.
    pub dot: f64,
    /// Σ m² of the first moment, under AdamW.
    pub first_squares: f64,
    /// Σ v of the second moment, under AdamW.
    pub second_sum: f64,
}

// The other side of these numbers is in kernels/optimizer.cu.
const _: () = {
    assert!(size_of::<UpdateRecord>() == 80);
    assert!(std::mem::offset_of!(UpdateRecord, update_squares) == 40);
};

impl UpdateRecord {
    /// Gives the sums of both; step and steps are the first's.
    #[must_use]
    pub(crate) fn merge(&self, other: &Self) -> Self {
        Self {
            count: self.count + other.count,
            lost: self.lost + other.lost,
            nonfinite_count: self.nonfinite_count + other.nonfinite_count,
            update_squares: self.update_squares + other.update_squares,
            weight_squares: self.weight_squares + other.weight_squares,
            dot: self.dot + other.dot,
            first_squares: self.first_squares + other.first_squares,
            second_sum: self.second_sum + other.second_sum,
            ..*self
        }
    }

    /// L2 norm of the update.
    pub fn update_norm(&self) -> f64 {
        self.update_squares.sqrt()
    }

    /// L2 norm of the weights after the step.
    pub fn weight_norm(&self) -> f64 {
        self.weight_squares.sqrt()
    }

    /// Norm of the update over that of the weights; `None` where the latter is 0. Near 1e-3 is the rule of thumb for a
    /// healthy training (Karpathy, CS231n, "Ratio of weights:updates").
    pub fn ratio(&self) -> Option<f64> {
        let norm = self.weight_norm();
        (norm != 0.0).then(|| self.update_norm() / norm)
    }

    /// Share of the elements whose update was lost in rounding; `None` without elements.
    #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
    pub fn lost_fraction(&self) -> Option<f64> {
        (self.count > 0).then(|| self.lost as f64 / self.count as f64)
    }

    /// Cosine of update and gradient: 1 where the step goes straight down. `gradient_norm` is
    /// [`finite_l2_norm`](crate::Record::finite_l2_norm) of the same step's record. `None` where either norm is 0 or
    /// not finite.
    pub fn cosine(&self, gradient_norm: f64) -> Option<f64> {
        let norms = self.update_norm() * gradient_norm;
        (norms > 0.0 && norms < f64::INFINITY).then(|| (self.dot / norms).clamp(-1.0, 1.0))
    }

    /// Signal over noise of the tensor's gradients, from the moments as in [`AdamStep`], by the sums over all elements:
    /// (Σ m̂² − c Σ σ̂²) / Σ σ̂². Only for AdamW, from the second step on; `None` without noise.
    pub fn gsnr(&self, optimizer: &Optimizer) -> Option<f64> {
        let [beta1, beta2] = optimizer.adam_betas()?;
        let adam = AdamStep { step: self.steps, beta1, beta2 }.check().ok()?;
        let (signal, noise) = adam.signal_and_noise(self.first_squares, self.second_sum);
        (noise > 0.0).then(|| signal / noise)
    }
}
