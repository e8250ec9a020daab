//! Signal and noise from the two moments that Adam keeps of each gradient, without further state.

use super::{GsnrSums, Scaling, cpu::Source};
use crate::{DType, Error, Plan, Tensor, measure::narrow};
use bytemuck::{Pod, Zeroable};

/// Turns the moments of a step of Adam, or of an optimizer with the same moments, into statistics.
///
/// After t steps with gradients g_1 … g_t, Adam (Kingma and Ba 2015, arXiv 1412.6980) has for each element
///
/// ```text
/// m = (1 − β1) Σ β1^(t−i) g_i      m̂ = m / (1 − β1^t) = Σ w_i g_i,   w_i = (1 − β1) β1^(t−i) / (1 − β1^t)
/// v = (1 − β2) Σ β2^(t−i) g_i²     v̂ = v / (1 − β2^t)
/// ```
///
/// Both are means with weights that add up to 1. Of gradients with mean μ and variance σ², independent from step to
/// step, E v̂ = μ² + σ² and E m̂² = μ² + c σ², where c is the share of the variance that the mean m̂ still has:
///
/// ```text
/// c = Σ w_i² = (1 − β1)² / (1 − β1^t)² · (1 − β1^2t) / (1 − β1²)
///            = (1 − β1) (1 + β1^t) / ((1 + β1) (1 − β1^t))             → (1 − β1) / (1 + β1)
/// 1 − c      = 2 β1 (1 − β1^(t−1)) / ((1 + β1) (1 − β1^t))
/// ```
///
/// It takes the place of 1/k after k equal steps: at β1 = 0.9 in the long run m̂ is worth 19 steps. These are without
/// bias:
///
/// ```text
/// σ̂² = (v̂ − m̂²) / (1 − c)          variance of the noise
/// m̂² − c σ̂²                        squared signal
/// r  = m̂² / σ̂² − c                 the second over the first: m̂² / (v̂ − m̂²), freed of the noise in m̂ and v̂ − m̂²
/// ```
///
/// A [`GsnrRecord`](crate::gsnr::GsnrRecord) then has `effective_steps` 1/c, `sum_squared_mean` Σ m̂², `sum_variance` Σ
/// σ̂², and the mean, median and share below 1 of the ratios r. An element whose v̂ − m̂² is not above 0 has no ratio
/// and counts as constant. It enters both sums as it is, since leaving out values that are negative by chance would
/// bias them. So where nothing varies, `sum_variance` may fall below 0 by the rounding of the moments, about 1e-7 of
/// `sum_squared_mean`.
///
/// # Conditions
///
/// * The moments must be of the gradients as the trainer gave them to Adam: clipped, scaled and with the weight decay
///   of the old Adam in them, if so. Where mean or variance drift within the 1/(1 − β2) steps that v̂ remembers, the
///   drift counts as noise.
/// * v̂ − m̂² and m̂² share the noise of m̂. Where v̂ remembers much longer than m̂, and while (1 + r)(4 r c + 2 c²) is
///   small, the mean of the ratios is too high by this and their median too low by c (1 + r). At β1 = 0.99 that is
///   little: a mean of 0.513 where r is 0.5. At β1 = 0.9 the mean means something only where all is noise: where r is
///   0.5 it came out as 2.4, carried by a few elements whose v̂ − m̂² was near 0, and where r is 3 one element in eight
///   counts as constant. Without bias at any β1 is the ratio of the sums, `squared_gradient()` over `sum_variance`.
/// * The moments are f32: v of gradients below 1e-19 is a subnormal, and below 1e-23 0. r has no meaning where it is
///   above 1e6, when v̂ − m̂² is rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep {
    /// Updates of the moments so far, t. At least 2: of one step all is mean.
    pub step: u32,
    /// Decay of `exp_avg`, above 0 and below 1. With 0 all is mean at any step.
    pub beta1: f64,
    /// Decay of `exp_avg_sq`, from 0 to below 1.
    pub beta2: f64,
}

/// The moments of one tensor, f32, by torch's names. [`Absent`](crate::Absent) moments, or moments without elements,
/// stand for none.
#[derive(Clone, Copy)]
pub struct AdamMoments<'a> {
    /// m: the decaying sum of the gradients, without bias correction.
    pub exp_avg: &'a dyn Tensor,
    /// v: the decaying sum of their squares.
    pub exp_avg_sq: &'a dyn Tensor,
}

/// The part that all tensors share, as the kernel reads it (`kernels/gsnr.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Adam {
    pub scaling: Scaling,
    /// m̂² / m², 1 / (1 − β1^t)².
    square_scale: f64,
    /// v̂ / v, 1 / (1 − β2^t), over that.
    spread_scale: f64,
    pub steps: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<Adam>() == 48);

impl Adam {
    /// Gives Σ m̂² − c Σ σ̂², and Σ σ̂², from Σ m² and Σ v.
    pub(crate) fn signal_and_noise(&self, first_squares: f64, second_sum: f64) -> (f64, f64) {
        let Scaling { degrees, ratio_shift, .. } = self.scaling;
        let noise = self.square_scale * (self.spread_scale * second_sum - first_squares) / degrees;
        (self.square_scale * first_squares - ratio_shift * noise, noise)
    }

    pub(crate) fn source(&self) -> AdamSource {
        let Self { square_scale, spread_scale, .. } = *self;
        let scale = narrow(spread_scale);
        AdamSource { square_scale, spread_scale, scale, rest: narrow(spread_scale - f64::from(scale)) }
    }
}

/// The source of v̂ − m̂² in units of `square_scale`: the difference of m² and v times `spread_scale`, each in a pair
/// of f32. The lower one holds the rounding error of the upper.
#[derive(Clone, Copy)]
pub(crate) struct AdamSource {
    square_scale: f64,
    spread_scale: f64,
    /// `spread_scale`, in a pair.
    scale: f32,
    rest: f32,
}

impl Source for AdamSource {
    #[inline(always)]
    fn deviation(&self, exp_avg: f32, exp_avg_sq: f32) -> f32 {
        let (square, spread) = (exp_avg * exp_avg, exp_avg_sq * self.scale);
        let square_rest = exp_avg.mul_add(exp_avg, -square);
        let spread_rest = exp_avg_sq.mul_add(self.rest, exp_avg_sq.mul_add(self.scale, -spread));
        spread - square + (spread_rest - square_rest)
    }

    fn whole(&self, sums: GsnrSums) -> GsnrSums {
        GsnrSums {
            spreads: self.square_scale * (self.spread_scale * sums.spreads - sums.squared_means),
            squared_means: sums.squared_means * self.square_scale,
            ..sums
        }
    }
}

impl AdamStep {
    /// # Errors
    /// [`Error::InvalidConfig`] for a β outside its range, [`Error::TooFewSteps`].
    pub(crate) fn check(&self) -> Result<Adam, Error> {
        let Self { step, beta1, beta2 } = *self;
        if !(beta1 > 0.0 && beta1 < 1.0) {
            let value = beta1.to_string();
            return Err(Error::InvalidConfig { option: "beta1", expected: "above 0 and below 1", value });
        }
        if !(0.0..1.0).contains(&beta2) {
            let value = beta2.to_string();
            return Err(Error::InvalidConfig { option: "beta2", expected: "at least 0 and below 1", value });
        }
        if step < 2 {
            return Err(Error::TooFewSteps { steps: step });
        }
        // Shares of the steps so far, 1 − β^t.
        let (seen, before) = (1.0 - power(beta1, step), 1.0 - power(beta1, step - 1));
        let noise_share = (1.0 - beta1) * (1.0 + power(beta1, step)) / ((1.0 + beta1) * seen);
        Ok(Adam {
            scaling: Scaling {
                degrees: 2.0 * beta1 * before / ((1.0 + beta1) * seen),
                effective_steps: 1.0 / noise_share,
                ratio_shift: noise_share,
            },
            square_scale: 1.0 / (seen * seen),
            spread_scale: seen * seen / (1.0 - power(beta2, step)),
            steps: step,
            reserved: 0,
        })
    }
}

/// Gives x^n by squaring: `powi` may have other bits on other machines.
fn power(mut x: f64, mut n: u32) -> f64 {
    let mut power = 1.0;
    while n > 0 {
        if n % 2 == 1 {
            power *= x;
        }
        x *= x;
        n /= 2;
    }
    power
}

/// Checks moments against the plan. Moments without elements stand for none.
pub(crate) fn check(plan: &Plan, moments: &[AdamMoments<'_>]) -> Result<(), Error> {
    plan.check_count(moments.len())?;
    for (spec, of) in plan.tensors().iter().zip(moments) {
        let shapes = [of.exp_avg.shape(), of.exp_avg_sq.shape()].map(|shape| shape.unwrap_or((DType::F32, 0)));
        if shapes.iter().all(|&(_, len)| len == 0) {
            continue;
        }
        if shapes != [(DType::F32, spec.len); 2] {
            let [(m_dtype, m_len), (v_dtype, v_len)] = shapes;
            return Err(Error::TensorMismatch {
                name: spec.name.clone(),
                planned: format!("{} elements, moments of {}", spec.len, DType::F32),
                given: format!("exp_avg with {m_len} of {m_dtype} and exp_avg_sq with {v_len} of {v_dtype}"),
            });
        }
        if u32::try_from(spec.len).is_err() {
            return Err(Error::TooLargeToTrack { name: spec.name.clone(), length: spec.len });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_the_noise_is_the_sum_of_the_squared_weights() {
        for (beta1, step) in [(0.9f64, 2i32), (0.9, 10), (0.9, 1000), (0.5, 3), (0.99, 7), (1e-9, 2), (0.999_999, 3)] {
            let weights: Vec<f64> = (0..step).map(|age| beta1.powi(age)).collect();
            let sum: f64 = weights.iter().sum();
            let share: f64 = weights.iter().map(|w| (w / sum).powi(2)).sum();
            let rest: f64 = weights.iter().map(|w| w / sum * ((sum - w) / sum)).sum();
            let step = AdamStep { step: step.unsigned_abs(), beta1, beta2: 0.5 };
            let Scaling { degrees, effective_steps, ratio_shift } = step.check().unwrap().scaling;
            assert!((ratio_shift / share - 1.0).abs() < 1e-9, "{step:?}: {ratio_shift} for {share}");
            assert!((effective_steps * share - 1.0).abs() < 1e-9, "{step:?}: {effective_steps} for 1 / {share}");
            assert!((degrees / rest - 1.0).abs() < 1e-6, "{step:?}: {degrees} for {rest}");
        }
    }
}
