//! A norm that jumps.
//!
//! It is compared with the steps before by the median and the median deviation of the norms' logarithms, which one odd
//! step does not move. With few steps, the deviation is taken to be at least half of the largest one so far.

use super::robust::{NORMAL, median_and_deviation};
use std::f64::consts::SQRT_2;

/// The least deviation of the logarithm of norms: at the default limit of 4, norms must rise by 4.5. Half of the healthy trainings
/// measured have a deviation of 0.13 to 0.4 from step to step.
pub(super) const LEAST_DEVIATION: f64 = 0.375;
/// Steps from which the median deviation is taken.
const MEDIAN_FROM: usize = 6;
/// The least change of a norm since the last step: a drift is no jump.
const AT_ONCE: f64 = 2.0;

/// The place of a norm among those before it.
pub(super) struct Jump {
    /// Deviations of the logarithm above the median; below 0 under it.
    pub deviations: f64,
    /// The median of those before.
    pub median: f64,
    /// Whether it has changed by much since the last step.
    pub at_once: bool,
}

/// Compares a norm with these; all of them above 0. `None` before the second.
pub(super) fn jump(before: &[f64], norm: f64) -> Option<Jump> {
    let last = *before.last()?;
    let mut logarithms: Vec<f64> = before.iter().map(|norm| norm.ln()).collect();
    let (middle, deviation) = median_and_deviation(&mut logarithms);
    // The deviations replace the logarithms.
    let deviation = match logarithms.len() {
        // Both steps vary.
        1 => LEAST_DEVIATION * SQRT_2,
        2..MEDIAN_FROM => logarithms.iter().copied().fold(0.0, f64::max) / 2.0,
        _ => NORMAL * deviation,
    };
    let deviations = (norm.ln() - middle) / deviation.max(LEAST_DEVIATION);
    let at_once = norm > AT_ONCE * last || last > AT_ONCE * norm;
    Some(Jump { deviations, median: middle.exp(), at_once })
}
