//! The table of rules and their limits: presets to begin with, and every limit can be changed.

use super::{Baseline, FindingKind, Statistic, ThresholdRule, presets};
use crate::{Error, Plan, histogram::Format};
use std::str::FromStr;
use wildmatch::WildMatch;

/// Names a table of rules. The literature's limits contradict each other ("exploding" is 10, 100, 1000, 1e4 or 1/lr),
/// so each source has a preset of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Limits measured on healthy trainings and on faulty ones. None is on a norm by itself; see the documentation of
    /// [`health`](crate::health).
    #[default]
    Default,
    /// A norm is vanishing below 1e-10/lr and exploding above 1/lr: the change of the weights, lr·g, counts. Needs
    /// [`Rules::learning_rate`].
    LrScaled,
    /// A total norm of 0.1–10 is healthy, 10–100 a warning, above 100 critical; 5 % zeros a warning, 20 % critical.
    Course,
    /// A tensor's norm below 1e-7 or above 1e4 is a warning.
    Doctor,
    /// A tensor's norm below 1e-7 is vanishing, above 100 exploding; a total that grows tenfold in a step is unstable;
    /// early layers at 0.01 or 100 times the norm of the late ones are a flow.
    Transformer,
}

impl Preset {
    /// Every one.
    pub const ALL: [Preset; 5] = [Self::Default, Self::LrScaled, Self::Course, Self::Doctor, Self::Transformer];

    /// Its name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::LrScaled => "lr-scaled",
            Self::Course => "course",
            Self::Doctor => "doctor",
            Self::Transformer => "transformer",
        }
    }
}

impl FromStr for Preset {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidConfig`] for an unknown name.
    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|preset| preset.name() == name).ok_or_else(|| Error::InvalidConfig {
            option: "preset",
            expected: "one of default, lr-scaled, course, doctor, transformer",
            value: format!("{name:?}"),
        })
    }
}

/// Two limits on one number. An infinite limit that is never passed stands for none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Past this limit a value is a warning.
    pub warning: f64,
    /// Past this limit a value is critical.
    pub critical: f64,
}

impl Limits {
    /// Makes these two limits.
    pub const fn new(warning: f64, critical: f64) -> Self {
        Self { warning, critical }
    }

    /// A warning above or below this limit, and never critical.
    pub(crate) const fn warning_above(warning: f64) -> Self {
        Self::new(warning, f64::INFINITY)
    }

    pub(crate) const fn warning_below(warning: f64) -> Self {
        Self::new(warning, f64::NEG_INFINITY)
    }
}

/// The measure of the flow over the depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowMeasure {
    /// By the robust slope: the norm of the first layer over that of the last, as the fitted line has them.
    Slope,
    /// By the mean norm of the first third of the layers over that of the last third.
    Thirds,
}

/// Limits of norms over the depth: the quotient of early over late layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlowRule {
    /// The quotient.
    pub measure: FlowMeasure,
    /// Gradients that shrink on their way to the first layers.
    pub below: Limits,
    /// Gradients that grow on their way.
    pub above: Limits,
}

/// Limits of the part of a gradient that a narrower format loses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UnderflowRule {
    /// The format.
    pub format: Format,
    /// The loss scale 2^k before the cast; `None` for the one that the histogram of all tensors recommends.
    pub scale: Option<i32>,
    /// Limits of the share of the finite non-zero elements that become 0.
    pub above: Limits,
}

/// Tensors that are exempt from some kinds.
#[derive(Clone, Debug, PartialEq)]
struct Exemption {
    pattern: String,
    /// Bit k of kind number k.
    kinds: u32,
    /// Whether a plan must have such a tensor.
    must_match: bool,
}

impl Exemption {
    fn is_of(&self, name: &str) -> bool {
        WildMatch::new(&self.pattern).matches(name)
    }
}

/// Sets the rules of a diagnosis. Begin with a [`Preset`], and change it by the methods or in the public fields.
///
/// ```
/// use gradprobe::health::{FindingKind, Limits, Preset, Rules, Statistic, ThresholdRule};
/// let rules = Rules::preset(Preset::Doctor)
///     .with(ThresholdRule::above(Statistic::Rms, FindingKind::Exploding, 1.0, 100.0))
///     .exempt("*bias", &[FindingKind::Vanishing]);
/// rules.check()?;
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rules {
    preset: Preset,
    thresholds: Vec<ThresholdRule>,
    learning_rate: Option<f64>,
    exemptions: Vec<Exemption>,
    /// Last steps that count; at least 2.
    pub window: usize,
    /// Clean steps before a finding on the window; at least 2.
    pub least_steps: usize,
    /// Steps in a row for which a tensor must be vanishing before that is critical; 0 for never. (The literature says
    /// "for several consecutive steps".)
    pub persistence: u32,
    /// Limits of the rise of the total norm at once, in deviations of the logarithm above the median of the window: a
    /// spike above these. The deviation is the median absolute one, and at least 0.375; with fewer than six steps, half
    /// of the largest.
    pub spike: Limits,
    /// Limits of the fall of the total norm in the same way: unstable above these.
    pub fall: Limits,
    /// Limits of the rise of a weight's share of the total norm in the same way, over its last eight steps: a spike
    /// above these.
    pub share: Limits,
    /// Limits of the norm of a weight's gradient over the largest weight's: vanishing below these, for three steps in a
    /// row without growing fourfold.
    pub beside_largest: Limits,
    /// Limits of the share of a bias's elements without a gradient: dead units above these, for five steps and as many
    /// in each.
    pub inactive: Limits,
    /// Limits of the share of rows that are never looked up: dead above these. They are elements of a weight without a
    /// bias, such as a table, that have no gradient in any tracked step, while the others are the same in each
    /// ([`Health::diagnose_gsnr`](super::Health::diagnose_gsnr)).
    pub inactive_rows: Limits,
    /// Limits of the gain of the weights, the root mean square of their elements times the root of the inputs they sum
    /// over: too large where that of a quarter of them is above these. Needs shapes ([`Plan::with_shapes`]) and the
    /// weights' norms.
    pub gain_above: Limits,
    /// Limits of the median gain of the weights: too small below these.
    pub gain_below: Limits,
    /// Steps in a row without a gradient before a tensor is a warning. If all tensors have none, three are critical,
    /// and the first of a run is a warning. 0 turns both off.
    pub silence: u32,
    /// Limits of the coefficient of variation of the total norm over the window, and of a tensor's over tracked steps.
    pub variation: Limits,
    /// Limits of early over late layers.
    pub flow: Option<FlowRule>,
    /// Limits of the norm of a layer's update over that of its weights before it: too large above these in three steps
    /// in a row, or once above three times the critical one. Not before the step 4 / limit², until which weights that
    /// began at 0 may still be small. Layers are those of [`Groups::by_layer`](super::Groups::by_layer), and exempt
    /// where their largest tensor is.
    pub update_ratio: Limits,
    /// Limits of the same ratio over the median layer's: stalled below these, for [`least_steps`](Self::least_steps) in
    /// a row.
    pub stalled: Limits,
    /// Limits of the share of a layer's elements with a gradient that did not move: lost above these, for
    /// [`least_steps`](Self::least_steps) in a row. Not when the median layer moves by a hundredth of its most: a
    /// schedule has ended.
    pub update_lost: Limits,
    /// Limits of the share of the window's steps that were clipped.
    pub clipped_fraction: Limits,
    /// Limits of the geometric mean of the clip's coefficients over the window, by which the clip cuts the learning
    /// rate.
    pub mean_coefficient: Limits,
    /// Limits of the median over a tensor's elements of the gradient's signal-to-noise ratio: noisy below these.
    pub gsnr_median: Limits,
    /// Limits of |G|² / tr Σ of a tensor, the inverse of its noise scale in steps: noisy below these.
    pub signal: Limits,
    /// Limits of the loss in narrower formats.
    pub underflow: Vec<UnderflowRule>,
    /// Limits of the distance of a norm from the usual one of the [`Baseline`], if one is set, in deviations of the
    /// logarithm: exploding above these, vanishing as far below. A deviation counts for at least 0.375.
    pub learned: Limits,
    baseline: Option<Baseline>,
}

impl Default for Rules {
    fn default() -> Self {
        Self::preset(Preset::Default)
    }
}

impl Rules {
    /// Gives the rules of a preset; the `health` documentation lists each limit with its source.
    pub fn preset(preset: Preset) -> Self {
        presets::rules(preset)
    }

    /// Makes rules without any limit, for presets to begin with.
    pub(crate) fn none(preset: Preset, thresholds: Vec<ThresholdRule>) -> Self {
        Self {
            preset,
            thresholds,
            learning_rate: None,
            exemptions: Vec::new(),
            window: 128,
            least_steps: 16,
            persistence: 0,
            spike: Limits::warning_above(f64::INFINITY),
            fall: Limits::warning_above(f64::INFINITY),
            share: Limits::warning_above(f64::INFINITY),
            beside_largest: Limits::warning_below(f64::NEG_INFINITY),
            inactive: Limits::warning_above(f64::INFINITY),
            inactive_rows: Limits::warning_above(f64::INFINITY),
            gain_above: Limits::warning_above(f64::INFINITY),
            gain_below: Limits::warning_below(f64::NEG_INFINITY),
            silence: 0,
            variation: Limits::warning_above(f64::INFINITY),
            flow: None,
            update_ratio: Limits::warning_above(f64::INFINITY),
            stalled: Limits::warning_below(f64::NEG_INFINITY),
            update_lost: Limits::warning_above(f64::INFINITY),
            clipped_fraction: Limits::warning_above(f64::INFINITY),
            mean_coefficient: Limits::warning_below(f64::NEG_INFINITY),
            gsnr_median: Limits::warning_below(f64::NEG_INFINITY),
            signal: Limits::warning_below(f64::NEG_INFINITY),
            underflow: Vec::new(),
            learned: Limits::new(6.0, 12.0),
            baseline: None,
        }
    }

    /// Adds this rule. It replaces one on the same statistic of the same kind and direction.
    #[must_use]
    pub fn with(mut self, rule: ThresholdRule) -> Self {
        let same = |other: &ThresholdRule| {
            (other.statistic, other.kind, other.is_below()) == (rule.statistic, rule.kind, rule.is_below())
        };
        match self.thresholds.iter_mut().find(|other| same(other)) {
            Some(other) => *other = rule,
            None => self.thresholds.push(rule),
        }
        self
    }

    /// Removes the threshold rules of this kind.
    #[must_use]
    pub fn without(mut self, kind: FindingKind) -> Self {
        self.thresholds.retain(|rule| rule.kind != kind as u32);
        self
    }

    /// Leaves tensors whose names match (`*` stands for any characters, `?` for one) out of findings of these kinds.
    /// NaN and Inf are always found. [`Health::new`](super::Health::new) refuses a pattern that matches no tensor.
    #[must_use]
    pub fn exempt(self, pattern: impl Into<String>, kinds: &[FindingKind]) -> Self {
        self.with_exemption(pattern.into(), kinds, true)
    }

    /// Does the same where there are such tensors.
    pub(crate) fn exempt_if_any(self, pattern: &str, kinds: &[FindingKind]) -> Self {
        self.with_exemption(pattern.to_owned(), kinds, false)
    }

    fn with_exemption(mut self, pattern: String, kinds: &[FindingKind], must_match: bool) -> Self {
        let kinds =
            kinds.iter().filter(|&&kind| kind > FindingKind::Inf).fold(0, |bits, &kind| bits | 1 << kind as u32);
        self.exemptions.push(Exemption { pattern, kinds, must_match });
        self
    }

    /// Sets the optimizer's learning rate, finite and at least 1e-290. Call it anew when a schedule changes the rate.
    /// With the default preset, a gradient is then out of proportion to its weight where a step of SGD would replace
    /// the weight, so lr · norm is above the weight's norm, if that limit is less than 100 times the weight's norm. In
    /// the others, a tensor's norm below 1e-10/lr is vanishing and one above 1/lr exploding, both critical.
    #[must_use]
    pub fn learning_rate(self, learning_rate: f64) -> Self {
        if self.preset == Preset::Default {
            let high = (1.0 / learning_rate).min(presets::RATIO);
            let mut rules = self.with(ThresholdRule::above(Statistic::Ratio, FindingKind::Ratio, high, f64::INFINITY));
            rules.learning_rate = Some(learning_rate);
            return rules;
        }
        let (low, high) = (1e-10 / learning_rate, 1.0 / learning_rate);
        let mut rules = self
            .with(ThresholdRule::below(Statistic::Norm, FindingKind::Vanishing, low, low))
            .with(ThresholdRule::above(Statistic::Norm, FindingKind::Exploding, high, high));
        rules.learning_rate = Some(learning_rate);
        rules
    }

    /// Whether a learning rate changes only its own rules.
    pub(crate) fn follows_learning_rate(&self) -> bool {
        self.preset == Preset::Default || self.learning_rate.is_some()
    }

    /// Sets the usual norms of healthy steps. Norms far from them are found, by [`learned`](Self::learned).
    #[must_use]
    pub fn baseline(mut self, baseline: Baseline) -> Self {
        self.baseline = Some(baseline);
        self
    }

    /// The rules that need one step alone, which a device evaluates as well.
    pub fn thresholds(&self) -> &[ThresholdRule] {
        &self.thresholds
    }

    /// Whether the ratio is of weights alone, whose scale is known: not of biases, and not of f16, whose loss scale is
    /// in the gradients.
    pub(super) fn knows_weights(&self) -> bool {
        self.preset == Preset::Default
    }

    /// The learning rate, if it was given.
    pub(super) fn rate(&self) -> Option<f64> {
        self.learning_rate
    }

    pub(crate) fn learned_from(&self) -> Option<&Baseline> {
        self.baseline.as_ref()
    }

    /// The bits k of the kinds that a tensor of this name is exempt from.
    pub fn exemptions_of(&self, name: &str) -> u32 {
        self.exemptions
            .iter()
            .filter(|exemption| exemption.is_of(name))
            .fold(0, |bits, exemption| bits | exemption.kinds)
    }

    /// # Errors
    /// [`Error::NoSuchTensor`] for a pattern of the user's that matches no tensor.
    pub(super) fn check_patterns(&self, plan: &Plan) -> Result<(), Error> {
        let unused = |exemption: &&Exemption| !plan.tensors().iter().any(|tensor| exemption.is_of(&tensor.name));
        match self.exemptions.iter().filter(|exemption| exemption.must_match).find(unused) {
            Some(Exemption { pattern, .. }) => Err(Error::NoSuchTensor { pattern: pattern.clone() }),
            None => Ok(()),
        }
    }

    /// # Errors
    /// [`Error::InvalidConfig`], which names the rule: for a limit that is NaN, impossible for the number (below 0, a
    /// share above 1) or out of order (a warning past critical), and for `lr-scaled` without a learning rate.
    pub fn check(&self) -> Result<(), Error> {
        match self.learning_rate {
            // Below this, 1e-10/lr leaves f64.
            Some(x) if !(x.is_finite() && x >= 1e-290) => {
                return Err(invalid("learning_rate", "finite and at least 1e-290", x));
            }
            None if self.preset == Preset::LrScaled => {
                let value = "unset".to_owned();
                let expected = "given for the preset lr-scaled";
                return Err(Error::InvalidConfig { option: "learning_rate", expected, value });
            }
            _ => {}
        }
        for rule in &self.thresholds {
            let of_words = rule.kind().is_some_and(|kind| 1 << kind as u32 & FindingKind::OF_WORDS != 0);
            let Some(statistic) = rule.statistic().filter(|_| of_words) else {
                let (expected, value) = ("made by above or below, of any kind but stalled", format!("{rule:?}"));
                return Err(Error::InvalidConfig { option: "rule", expected, value });
            };
            let share = matches!(statistic, Statistic::ZeroFraction | Statistic::DeadFraction);
            check_limits(
                statistic.name(),
                Limits::new(rule.warning, rule.critical),
                rule.is_below(),
                if share { 1.0 } else { f64::INFINITY },
            )?;
        }
        let above = f64::INFINITY;
        check_limits("spike", self.spike, false, above)?;
        check_limits("fall", self.fall, false, above)?;
        check_limits("share", self.share, false, above)?;
        check_limits("beside_largest", self.beside_largest, true, 1.0)?;
        check_limits("inactive", self.inactive, false, 1.0)?;
        check_limits("inactive_rows", self.inactive_rows, false, 1.0)?;
        check_limits("gain_above", self.gain_above, false, above)?;
        check_limits("gain_below", self.gain_below, true, above)?;
        check_limits("variation", self.variation, false, above)?;
        check_limits("update_ratio", self.update_ratio, false, above)?;
        check_limits("stalled", self.stalled, true, 1.0)?;
        check_limits("update_lost", self.update_lost, false, 1.0)?;
        check_limits("clipped_fraction", self.clipped_fraction, false, 1.0)?;
        check_limits("mean_coefficient", self.mean_coefficient, true, 1.0)?;
        check_limits("gsnr_median", self.gsnr_median, true, above)?;
        check_limits("signal", self.signal, true, above)?;
        check_limits("learned", self.learned, false, above)?;
        for rule in &self.underflow {
            check_limits("underflow", rule.above, false, 1.0)?;
        }
        if let Some(flow) = self.flow {
            check_limits("flow", flow.below, true, above)?;
            check_limits("flow", flow.above, false, above)?;
        }
        for (option, value) in [("window", self.window), ("least_steps", self.least_steps)] {
            if value < 2 {
                return Err(Error::InvalidConfig { option, expected: "at least 2", value: value.to_string() });
            }
        }
        if self.window > Self::MAX_WINDOW {
            let value = self.window.to_string();
            return Err(Error::InvalidConfig { option: "window", expected: "at most 65536", value });
        }
        Ok(())
    }

    /// The most steps of a window.
    pub const MAX_WINDOW: usize = 65_536;
}

fn invalid(option: &'static str, expected: &'static str, value: f64) -> Error {
    Error::InvalidConfig { option, expected, value: value.to_string() }
}

/// A number that is never below 0 is at most `largest`.
fn check_limits(option: &'static str, limits: Limits, below: bool, largest: f64) -> Result<(), Error> {
    let Limits { warning, critical } = limits;
    let none = if below { f64::NEG_INFINITY } else { f64::INFINITY };
    for limit in [warning, critical] {
        if limit.is_nan() {
            return Err(invalid(option, "a limit that is a number", limit));
        }
        let possible = if below { limit > 0.0 && limit.is_finite() } else { limit >= 0.0 };
        if limit != none && !(possible && limit <= largest) {
            let expected = match (below, largest < f64::INFINITY) {
                (true, false) => "limited from below by something finite and above 0",
                (true, true) => "limited from below by something above 0 and at most 1",
                (false, false) => "limited from above by something not below 0",
                (false, true) => "limited from above by something from 0 to 1",
            };
            return Err(invalid(option, expected, limit));
        }
    }
    let ordered = if below { critical <= warning } else { warning <= critical };
    if ordered {
        return Ok(());
    }
    let value = format!("{warning:e} and {critical:e}");
    Err(Error::InvalidConfig { option, expected: "limited by a warning that is not past critical", value })
}
