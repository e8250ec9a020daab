//! How far steps move the weights: too far, hardly, or not at all.
//!
//! Judged by layer, the tensors whose names differ in their last part: a bias that began at 0 moves by as much as it is, one
//! before a normalisation not at all, and both is as it should be. Beside its weight neither counts.

use super::{
    FindingKind, Groups, Limits, Rules, Verdict,
    found::{Found, percent},
};
use crate::{Plan, Report, optim::UpdateRecord};

/// Updates in a row that are too large before that is a finding. ("For several consecutive steps" is how the literature has it.)
const PERSISTENCE: u32 = 3;

/// What is kept of each layer from step to step.
#[derive(Clone, Debug)]
pub(super) struct Updates {
    /// The layer of each tensor.
    layers: Vec<usize>,
    runs: Vec<Runs>,
}

/// For how many updates in a row a layer has been past each limit: that of a warning, and the critical.
#[derive(Clone, Debug, Default)]
struct Runs {
    too_large: [u32; 2],
    stalled: [u32; 2],
    lost: [u32; 2],
}

/// A layer in a step.
#[derive(Clone, Copy, Default)]
struct Layer {
    update: UpdateRecord,
    /// Elements whose gradient is 0.
    zeros: u64,
    /// Its largest tensor, and that one's elements.
    largest: (usize, u64),
}

impl Updates {
    pub fn new(plan: &Plan) -> Self {
        let groups = Groups::by_layer(plan);
        let layers = groups.of_tensors().iter().flatten().copied().collect();
        Self { layers, runs: vec![Runs::default(); groups.names().len()] }
    }

    /// Judges the next clean step. `exempt` has the bits k of the kinds that do not concern a tensor.
    pub fn judge(&mut self, report: &Report, rules: &Rules, exempt: &[u32], found: &mut Found<'_>) {
        let mut layers = vec![Layer::default(); self.runs.len()];
        for ((index, tensor), layer) in report.tensors().enumerate().zip(&self.layers) {
            let Some(update) = tensor.update else { continue };
            if update.nonfinite_count > 0 {
                let (count, all) = (update.nonfinite_count, update.count);
                let message = format!("it leaves {count} of {all} weights NaN or infinite");
                let (kind, values) = (FindingKind::UpdateTooLarge, (to_f64(count), 0.0));
                found.push(Some(index), kind, Verdict::Critical, values, "nonfinite_weights", message);
            }
            layers[*layer].add(index, update, tensor.record.zero_count);
        }
        let median = median_ratio(&layers);
        for (layer, runs) in layers.iter().zip(&mut self.runs).filter(|(layer, _)| layer.update.count > 0) {
            let index = layer.largest.0;
            let mut add = |kind: FindingKind, passed: Passed, value, rule, message: String| {
                if exempt[index] & 1 << kind as u32 == 0 {
                    let (values, message) = ((value, passed.limit), format!("{message}, for {} steps", passed.steps));
                    found.push(Some(index), kind, passed.severity, values, rule, message);
                }
            };
            // Comparisons with NaN are false.
            let ratio = layer.update.ratio().unwrap_or(f64::NAN);
            let beside = if layer.zeros < layer.update.count { ratio / median } else { f64::NAN };
            let lost = layer.lost_share();
            // Weights that began at 0 and moved at random are √steps times as large as an update.
            let can_tell = |limit: f64| f64::from(layer.update.steps) * limit * limit >= 1.0;
            let is_past = |limit| ratio > limit && can_tell(limit);
            if let Some(passed) = persists(&mut runs.too_large, PERSISTENCE, rules.update_ratio, is_past) {
                let message = format!("{ratio:.3e} of its layer's norm, above {:.3e}", passed.limit);
                add(FindingKind::UpdateTooLarge, passed, ratio, "update_ratio", message);
            }
            let slow = u32::try_from(rules.least_steps).unwrap_or(u32::MAX);
            if let Some(passed) = persists(&mut runs.stalled, slow, rules.stalled, |limit| beside < limit) {
                let message = format!(
                    "its layer moves by {ratio:.3e} of its norm, {beside:.3e} of the median layer's, below {:.3e}",
                    passed.limit
                );
                add(FindingKind::Stalled, passed, beside, "stalled", message);
            }
            if let Some(passed) = persists(&mut runs.lost, slow, rules.update_lost, |limit| lost > limit) {
                let (share, limit) = (percent(lost), percent(passed.limit));
                let message = format!("rounding leaves {share} % of the layer as it was, above {limit} %");
                add(FindingKind::UpdateLost, passed, lost, "update_lost", message);
            }
        }
    }
}

impl Layer {
    fn add(&mut self, index: usize, update: &UpdateRecord, zeros: u64) {
        self.update = update.merge(&self.update);
        self.zeros += zeros;
        if update.count > self.largest.1 {
            self.largest = (index, update.count);
        }
    }

    /// Share of the elements with a gradient whose update was lost. Those without one still move by their moments, ever less,
    /// until that is lost as well, which is no harm: they are taken to be the first that were.
    fn lost_share(&self) -> f64 {
        to_f64(self.update.lost.saturating_sub(self.zeros)) / to_f64(self.update.count.saturating_sub(self.zeros))
    }
}

/// A limit that was passed for so many updates in a row.
struct Passed {
    severity: Verdict,
    limit: f64,
    steps: u32,
}

/// Counts one more update that is past each limit or not; the worse of those that were passed often enough.
fn persists(runs: &mut [u32; 2], least: u32, limits: Limits, is_past: impl Fn(f64) -> bool) -> Option<Passed> {
    let levels = [(Verdict::Warning, limits.warning), (Verdict::Critical, limits.critical)];
    let passed = levels.into_iter().zip(runs).filter_map(|((severity, limit), steps)| {
        *steps = if is_past(limit) { steps.saturating_add(1) } else { 0 };
        (*steps >= least).then_some(Passed { severity, limit, steps: *steps })
    });
    passed.last()
}

/// Of those that moved.
fn median_ratio(layers: &[Layer]) -> f64 {
    let ratios = layers.iter().filter_map(|layer| layer.update.ratio());
    let mut ratios: Vec<f64> = ratios.filter(|&ratio| ratio > 0.0).collect();
    let middle = ratios.len() / 2;
    if ratios.is_empty() { f64::NAN } else { *ratios.select_nth_unstable_by(middle, f64::total_cmp).1 }
}

#[expect(clippy::cast_precision_loss, reason = "below 2^53")]
fn to_f64(count: u64) -> f64 {
    count as f64
}
