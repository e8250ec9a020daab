//! The size of the updates: too large, hardly any, or none.
//!
//! They are judged by layer ([`Groups::by_layer`](super::Groups::by_layer)). A bias that began at 0 moves by its own
//! size, one before a normalisation not at all, and both are healthy. Beside its weight neither counts.

use super::{
    FindingKind, Limits, Rules, Verdict,
    found::{Found, Seen, percent},
    run::Run,
    structure::Structure,
    threshold::count_to_f64,
};
use crate::{Report, TensorReport, optim::UpdateRecord};

/// Updates in a row that must be too large for a finding. (The literature says "for several consecutive steps".)
const PERSISTENCE: u32 = 3;
/// Times the critical limit at which one update is enough: it makes another model of the weights. Under `--fault lr` of
/// the example `train`, 19 layers move by 3 to 10 times their size, once; from there on they are as large as such
/// updates.
const AT_ONCE: f64 = 3.0;
/// Share of the largest ratio of the run below which a schedule has ended: losses are then intended.
const ENDED: f64 = 1e-2;

/// The state from step to step.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(super) struct Updates {
    /// Σ w² of each tensor after its last update; infinite before the first.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    weight_squares: Vec<f64>,
    runs: Vec<Runs>,
    /// The largest median ratio so far.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bits"))]
    peak: f64,
}

/// Updates in a row in which a layer has been past each limit: the warning's, and the critical one.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Runs {
    too_large: [Run; 2],
    stalled: [Run; 2],
    lost: [Run; 2],
}

/// A layer in a step.
#[derive(Clone, Copy, Default)]
struct Layer {
    update: UpdateRecord,
    /// Σ w² before the update.
    weight_squares: f64,
    /// Elements whose gradient is 0.
    zeros: u64,
    /// Its largest tensor, and that one's elements.
    largest: (usize, u64),
}

impl Updates {
    pub fn new(structure: &Structure) -> Self {
        let (tensors, layers) = (structure.modules.len(), structure.members.len());
        Self { weight_squares: vec![f64::INFINITY; tensors], runs: vec![Runs::default(); layers], peak: 0.0 }
    }

    /// Whether it has as many tensors and layers.
    pub fn is_as_long_as(&self, other: &Self) -> bool {
        (self.weight_squares.len(), self.runs.len()) == (other.weight_squares.len(), other.runs.len())
    }

    /// Judges the next step that was not skipped. Of one that is not finite, it judges only the weights after it.
    pub fn judge(&mut self, report: &Report, structure: &Structure, rules: &Rules, found: &mut Found<'_>) {
        if report.updates().is_none() {
            return;
        }
        let outputs = report.outputs();
        let mut layers = vec![Layer::default(); self.runs.len()];
        for (index, tensor) in report.tensors().enumerate() {
            let Some(update) = tensor.update else { continue };
            // Effects of a NaN in the gradients are findings of the gradients.
            let is_own = outputs.coefficient_f64.is_finite() && !tensor.record.has_nonfinite();
            if update.nonfinite_count > 0 && is_own {
                let (count, all) = (update.nonfinite_count, update.count);
                let message = format!("the update leaves {count} of {all} weights NaN or infinite");
                let (kind, values) = (FindingKind::UpdateTooLarge, (count_to_f64(count), 0.0));
                let seen = Seen::new(kind, Verdict::Critical, values, "nonfinite_weights");
                found.push(Seen { index: Some(index), message, ..seen });
            }
            let before = std::mem::replace(&mut self.weight_squares[index], update.weight_squares);
            let before = report.param_norm_before(index).map_or(before, |norm| norm * norm);
            layers[structure.modules[index]].add(index, &tensor, update, before);
        }
        if outputs.found_inf != 0.0 {
            return;
        }
        let step = report.step();
        let median = median_ratio(&layers);
        self.peak = self.peak.max(median);
        let has_ended = median < ENDED * self.peak;
        for (layer, runs) in layers.iter().zip(&mut self.runs).filter(|(layer, _)| layer.update.count > 0) {
            let index = layer.largest.0;
            let mut add = |kind: FindingKind, passed: Passed, value, rule, message: String| {
                let Run { steps, since } = passed.run;
                let for_steps = if steps > 1 { format!(", for {steps} steps") } else { String::new() };
                let (message, since) = (message + &for_steps, Some(since));
                let seen = Seen::new(kind, passed.severity, (value, passed.limit), rule);
                found.push(Seen { index: Some(index), since, message, ..seen });
            };
            // Comparisons with NaN are false.
            let of_before = layer.update.update_norm() / layer.weight_squares.sqrt();
            // Weights that began at 0 and moved at random are √steps times as large as an update; here twice that.
            let can_tell = |limit: f64| f64::from(layer.update.steps) * limit * limit >= 4.0;
            let is_past = |limit| of_before > limit && can_tell(limit);
            let least = if of_before > AT_ONCE * rules.update_ratio.critical { 1 } else { PERSISTENCE };
            if let Some(passed) = persists((&mut runs.too_large, step), least, rules.update_ratio, is_past) {
                let message =
                    format!("its layer's update has {of_before:.3e} of the weights' norm, above {:.3e}", passed.limit);
                add(FindingKind::UpdateTooLarge, passed, of_before, "update_ratio", message);
            }
            let slow = u32::try_from(rules.least_steps).unwrap_or(u32::MAX);
            let ratio = layer.ratio().unwrap_or(f64::NAN);
            let beside = if layer.zeros < layer.update.count { ratio / median } else { f64::NAN };
            if let Some(passed) = persists((&mut runs.stalled, step), slow, rules.stalled, |limit| beside < limit) {
                let message = format!(
                    "its layer moves by {ratio:.3e} of its norm, {beside:.3e} of the median layer's, below {:.3e}",
                    passed.limit
                );
                add(FindingKind::Stalled, passed, beside, "stalled", message);
            }
            let lost = if has_ended { f64::NAN } else { layer.lost_share() };
            if let Some(passed) = persists((&mut runs.lost, step), slow, rules.update_lost, |limit| lost > limit) {
                let (share, limit) = (percent(lost), percent(passed.limit));
                let message = format!("rounding leaves {share} % of its layer as it was, above {limit} %");
                add(FindingKind::UpdateLost, passed, lost, "update_lost", message);
            }
        }
    }
}

impl Layer {
    fn add(&mut self, index: usize, tensor: &TensorReport<'_>, update: &UpdateRecord, weight_squares: f64) {
        // Where ranks hold parts, the record is of all of them, and the update of this rank's.
        if tensor.record.count != update.count {
            return;
        }
        self.update = update.merge(&self.update);
        self.weight_squares += weight_squares;
        self.zeros += tensor.record.zero_count;
        if update.count > self.largest.1 {
            self.largest = (index, update.count);
        }
    }

    /// Norm of the update over that of the weights after it, of those that moved.
    fn ratio(&self) -> Option<f64> {
        self.update.ratio().filter(|&ratio| ratio > 0.0 && self.update.weight_squares < f64::INFINITY)
    }

    /// Gives the share of the elements with a gradient whose update was lost, as an upper bound. Elements without a
    /// gradient still move by their moments, ever less, until that is lost as well, which is no harm: they are taken to
    /// be the first that were lost.
    fn lost_share(&self) -> f64 {
        count_to_f64(self.update.lost.saturating_sub(self.zeros))
            / count_to_f64(self.update.count.saturating_sub(self.zeros))
    }
}

/// A limit that was passed for so many updates in a row.
struct Passed {
    severity: Verdict,
    limit: f64,
    run: Run,
}

/// Counts one more update, past each limit or not. Gives the worse of those that were passed often enough.
fn persists(
    (runs, step): (&mut [Run; 2], u64),
    least: u32,
    limits: Limits,
    is_past: impl Fn(f64) -> bool,
) -> Option<Passed> {
    let levels = [(Verdict::Warning, limits.warning), (Verdict::Critical, limits.critical)];
    let passed = levels.into_iter().zip(runs).filter_map(|((severity, limit), run)| {
        run.count(is_past(limit), step);
        (run.steps >= least).then_some(Passed { severity, limit, run: *run })
    });
    passed.last()
}

/// The median ratio of the layers that moved.
fn median_ratio(layers: &[Layer]) -> f64 {
    let mut ratios: Vec<f64> = layers.iter().filter_map(Layer::ratio).collect();
    let middle = ratios.len() / 2;
    if ratios.is_empty() { f64::NAN } else { *ratios.select_nth_unstable_by(middle, f64::total_cmp).1 }
}
