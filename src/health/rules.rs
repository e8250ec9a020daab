//! The table of rules: which numbers are bad. Presets for those who want to start, and every limit to be changed.

use super::{Baseline, FindingKind, Statistic, ThresholdRule, presets};
use crate::{Error, Plan, histogram::Format};
use std::str::FromStr;
use wildmatch::WildMatch;

/// A named table of rules. The literature's limits contradict each other ("exploding" is 10, 100, 1000, 1e4 or 1/lr), so
/// they are kept apart by where they come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Limits measured on healthy trainings and on faulty ones, of which none is on a norm by itself; see the documentation of
    /// [`health`](crate::health).
    #[default]
    Default,
    /// A norm is vanishing below 1e-10/lr and exploding above 1/lr: the change of the weights, lr·g, is what matters.
    /// Needs [`Rules::learning_rate`].
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
    /// [`Error::InvalidConfig`] for a name that is none.
    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|preset| preset.name() == name).ok_or_else(|| Error::InvalidConfig {
            option: "preset",
            expected: "one of default, lr-scaled, course, doctor, transformer",
            value: format!("{name:?}"),
        })
    }
}

/// Two limits on one number. Infinite (of whichever sign is never passed) where there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Past this it is a warning.
    pub warning: f64,
    /// Past this it is critical.
    pub critical: f64,
}

impl Limits {
    /// These two.
    pub const fn new(warning: f64, critical: f64) -> Self {
        Self { warning, critical }
    }

    /// A warning above or below this, and never more.
    pub(crate) const fn warning_above(warning: f64) -> Self {
        Self::new(warning, f64::INFINITY)
    }

    pub(crate) const fn warning_below(warning: f64) -> Self {
        Self::new(warning, f64::NEG_INFINITY)
    }
}

/// How a flow over the depth is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowMeasure {
    /// By the robust slope: the norm of the first layer over that of the last, as the fitted line has them.
    Slope,
    /// By the mean norm of the first third of the layers over that of the last third.
    Thirds,
}

/// When norms over the depth are a finding: the quotient of early over late layers past these.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlowRule {
    /// Which quotient.
    pub measure: FlowMeasure,
    /// Gradients that shrink on their way to the first layers.
    pub below: Limits,
    /// Gradients that grow on their way.
    pub above: Limits,
}

/// How much of a gradient a narrower format may lose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UnderflowRule {
    /// The format.
    pub format: Format,
    /// The loss scale 2^k before the cast; `None` for the one that the histogram of all tensors recommends.
    pub scale: Option<i32>,
    /// On the share of the finite elements that are not 0 which become 0.
    pub above: Limits,
}

/// Tensors that some kinds do not concern.
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

/// The rules that findings are made by. Made from a [`Preset`] and changed by the methods, or in the public fields.
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
    /// Steps that are looked back upon; at least 2.
    pub window: usize,
    /// Clean steps that a statement about the window needs; at least 2.
    pub least_steps: usize,
    /// Steps in a row for which a tensor must have been vanishing before that is critical; 0 for never. ("For several
    /// consecutive steps" is how the literature has it.)
    pub persistence: u32,
    /// On how many deviations of the logarithm the total norm lies above the median of the window, and at once: a spike above
    /// these. The deviation is the median absolute one, and at least 0.375; with fewer than six steps, half of the largest.
    pub spike: Limits,
    /// The same below the median: unstable above these.
    pub fall: Limits,
    /// The same of a weight's share of the total norm, over its last eight steps: a spike above these.
    pub share: Limits,
    /// On the norm of a weight's gradient over the largest weight's, for three steps in a row without growing fourfold: vanishing below
    /// these.
    pub beside_largest: Limits,
    /// On the share of a bias's elements without a gradient, for five steps and as many in each: units that are dead above these.
    pub inactive: Limits,
    /// On the share of the elements of a weight without a bias, such as a table, that have no gradient in any tracked step, where the
    /// others are the same in each ([`Health::diagnose_gsnr`](super::Health::diagnose_gsnr)): rows that are never looked up above
    /// these.
    pub inactive_rows: Limits,
    /// On the gain of the weights, the root mean square of their elements times the root of the inputs they sum over: too large
    /// where that of a quarter of them is above these. Needs shapes ([`Plan::with_shapes`]) and the weights' norms.
    pub gain_above: Limits,
    /// On the median gain of the weights: too small below these.
    pub gain_below: Limits,
    /// For how many steps in a row a tensor must have no gradient for that to be a warning; of all tensors three are critical, and
    /// the first of a run is a warning. With 0 neither is looked for.
    pub silence: u32,
    /// On the coefficient of variation of the total norm over the window, and of a tensor's over tracked steps.
    pub variation: Limits,
    /// On early over late layers.
    pub flow: Option<FlowRule>,
    /// On the norm of a layer's update over that of its weights before it, in three steps in a row, or in one above three times the
    /// critical one: too large above these. Not before the step 4 / limit², until which weights that began at 0 may still be
    /// small. Layers are those of [`Groups::by_layer`](super::Groups::by_layer), and exempt where their largest tensor is.
    pub update_ratio: Limits,
    /// On the same over the median layer's, for [`least_steps`](Self::least_steps) in a row: stalled below these.
    pub stalled: Limits,
    /// On the share of a layer's elements with a gradient that did not move, for [`least_steps`](Self::least_steps) in a
    /// row: lost above these. Not when the median layer moves by a hundredth of the most it did: a schedule has ended.
    pub update_lost: Limits,
    /// On the share of the window's steps that were clipped.
    pub clipped_fraction: Limits,
    /// On the geometric mean of the clip's coefficients over the window, by which the clip cuts the learning rate.
    pub mean_coefficient: Limits,
    /// On the median over a tensor's elements of the gradient's signal-to-noise ratio: noisy below these.
    pub gsnr_median: Limits,
    /// On |G|² / tr Σ of a tensor, the inverse of its noise scale in steps: noisy below these.
    pub signal: Limits,
    /// On what narrower formats lose.
    pub underflow: Vec<UnderflowRule>,
    /// On how many deviations of the logarithm a norm lies from the usual one of the [`Baseline`], if one is set: exploding above
    /// these, vanishing as far below. A deviation counts for at least 0.375.
    pub learned: Limits,
    baseline: Option<Baseline>,
}

impl Default for Rules {
    fn default() -> Self {
        Self::preset(Preset::Default)
    }
}

impl Rules {
    /// The rules of a preset; the `health` documentation lists each limit with its source.
    pub fn preset(preset: Preset) -> Self {
        presets::rules(preset)
    }

    /// No limit at all, for presets to begin with.
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

    /// With this rule, in place of one on the same statistic of the same kind and direction if there is one.
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

    /// Without the threshold rules of this kind.
    #[must_use]
    pub fn without(mut self, kind: FindingKind) -> Self {
        self.thresholds.retain(|rule| rule.kind != kind as u32);
        self
    }

    /// With tensors whose names match (`*` stands for any characters, `?` for one) left out of findings of these kinds.
    /// NaN and Inf are always found. [`Health::new`](super::Health::new) refuses a pattern that matches no tensor.
    #[must_use]
    pub fn exempt(self, pattern: impl Into<String>, kinds: &[FindingKind]) -> Self {
        self.with_exemption(pattern.into(), kinds, true)
    }

    /// The same where there are such tensors.
    pub(crate) fn exempt_if_any(self, pattern: &str, kinds: &[FindingKind]) -> Self {
        self.with_exemption(pattern.to_owned(), kinds, false)
    }

    fn with_exemption(mut self, pattern: String, kinds: &[FindingKind], must_match: bool) -> Self {
        let kinds =
            kinds.iter().filter(|&&kind| kind > FindingKind::Inf).fold(0, |bits, &kind| bits | 1 << kind as u32);
        self.exemptions.push(Exemption { pattern, kinds, must_match });
        self
    }

    /// With the optimizer's learning rate, finite and at least 1e-290; to be called anew when a schedule changes it. By the default
    /// preset, a gradient is then out of proportion to its weight where a step of SGD would replace it, lr · norm above the weight's,
    /// if that is less than 100 times it.
    /// In the others, a tensor's norm below 1e-10/lr is vanishing and one above 1/lr exploding, both critical.
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

    /// Whether a learning rate changes nothing but what it is for.
    pub(crate) fn follows_learning_rate(&self) -> bool {
        self.preset == Preset::Default || self.learning_rate.is_some()
    }

    /// With what healthy steps were like, for norms far from the usual to be found: by [`learned`](Self::learned).
    #[must_use]
    pub fn baseline(mut self, baseline: Baseline) -> Self {
        self.baseline = Some(baseline);
        self
    }

    /// The rules that one step decides by itself, for a device to evaluate as well.
    pub fn thresholds(&self) -> &[ThresholdRule] {
        &self.thresholds
    }

    /// Whether the ratio is of weights alone, whose scale is known: not of biases, and not of f16, whose loss scale is in the
    /// gradients.
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

    /// The bits k of the kinds that do not concern a tensor of this name.
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
    /// [`Error::InvalidConfig`], which names the rule: for a limit that is NaN, beyond what the number can be (below 0,
    /// a share above 1) or out of order (a warning past critical), and for `lr-scaled` without a learning rate.
    pub fn check(&self) -> Result<(), Error> {
        match self.learning_rate {
            // Below, 1e-10/lr leaves f64.
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

    /// The most steps that are looked back upon.
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
