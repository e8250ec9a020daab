//! The limits of the presets, each with its source.
//!
//! Sources, as the documentation of `health` names them: S0 "Probing Gradients", S1 a course's "Gradient Statistics", S3
//! "Gradient Flow", S4 "Debugging Transformer Gradients".

use super::{
    FindingKind::{self, Dead, Exploding, Ratio, Spike, Spread, Stalled, Unstable, Vanishing, Zeros},
    FlowMeasure, FlowRule, Limits, Preset, Rules, Statistic, ThresholdRule, UnderflowRule,
};
use crate::histogram::Format;

const NEVER: f64 = f64::INFINITY;
/// The default's limit of a gradient's norm over its weight's, unless the learning rate makes it less.
pub(super) const RATIO: f64 = 100.0;
const NEVER_BELOW: f64 = f64::NEG_INFINITY;

pub(super) fn rules(preset: Preset) -> Rules {
    match preset {
        Preset::Default => default(),
        Preset::LrScaled => lr_scaled(),
        Preset::Course => course(),
        Preset::Doctor => doctor(),
        Preset::Transformer => transformer(),
    }
}

const fn above(statistic: Statistic, kind: FindingKind, warning: f64, critical: f64) -> ThresholdRule {
    ThresholdRule::above(statistic, kind, warning, critical)
}

const fn below(statistic: Statistic, kind: FindingKind, warning: f64, critical: f64) -> ThresholdRule {
    ThresholdRule::below(statistic, kind, warning, critical)
}

fn default() -> Rules {
    let thresholds = vec![
        // √f32::MAX: beyond it the square overflows, so that Adam's second moment is infinite and the element never moves again.
        // One flipped bit of an exponent does that.
        above(Statistic::MaxAbs, Exploding, 1.844_674_3e19, 1.844_674_3e19),
        // Healthy trainings with a loss that is a sum, not a mean, have up to 19; initialisations that are too large
        // from 140 on.
        above(Statistic::Ratio, Ratio, RATIO, NEVER),
    ];
    let mut rules = Rules::none(Preset::Default, thresholds);
    // An expert that gets no token.
    rules = rules.exempt_if_any("*expert*", &[Dead, Zeros, Vanishing, Stalled, Spike]);
    // Rows of words that do not occur, and positions beyond the longest text.
    for pattern in ["*embed*", "*emb.*", "*wte*", "*wpe*"] {
        rules = rules.exempt_if_any(pattern, &[Stalled]);
    }
    for pattern in ["*wpe*", "*pos_emb*", "*position*", "*.pos", "pos"] {
        rules = rules.exempt_if_any(pattern, &[Dead]);
    }
    // A bias of the keys adds the same to all scores of a query, which softmax takes out: its gradient is rounding.
    for pattern in ["*k_proj.bias", "*key.bias", "*key_proj.bias"] {
        rules = rules.exempt_if_any(pattern, &[Dead, Zeros]);
    }
    // A head that is trained on one batch of four has no gradient in the other three.
    rules.silence = 5;
    // The healthy weights measured have 7e-4 of the largest one's and more; behind 14 sigmoids it is 1e-12.
    rules.beside_largest = Limits::warning_below(1e-5);
    // S1's text calls half of the units severe; a healthy convolution had 75 % that never fired in six steps.
    rules.inactive = Limits::warning_above(0.9);
    // Indices taken modulo 4 leave two thirds of twelve rows.
    rules.inactive_rows = Limits::warning_above(0.6);
    // Twice He's gain. The trainings measured had a median of 0.3 to 1.4, and up to 2.9 in single weights that are
    // tables.
    rules.gain_above = Limits::warning_above(3.0);
    // GPT-2's initialisation of 0.02 has it at six inputs.
    rules.gain_below = Limits::warning_below(0.05);
    // A fitted line, which one odd layer does not bend, that falls by three orders of magnitude over the depth, or
    // rises by four: S3's spread. A healthy model of ten layers may reach S4's factor of 100. At six orders the first
    // layers' gradient is rounding beside the last ones', and cannot recover.
    rules.flow = Some(FlowRule {
        measure: FlowMeasure::Slope,
        below: Limits::new(1e-3, 1e-6),
        above: Limits::warning_above(1e4),
    });
    // Four deviations, as ZClip has 2.5 of a longer memory; twelve are a factor of ninety.
    rules.spike = Limits::new(4.0, 12.0);
    // By a factor of twenty: the rest of a network whose units are off after a step that was too large.
    rules.fall = Limits::warning_above(8.0);
    // In no healthy weight measured it rose by more than 4.2 deviations.
    rules.share = Limits::warning_above(5.0);
    // You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (2017): an update as large as its weight may
    // diverge. A hundred times CS231n's 1e-3 is worth a look.
    rules.update_ratio = Limits::new(0.1, 1.0);
    // In the same paper's table of AlexNet at its first step, gradients over weights lie 233 apart. This is the slowest
    // beside the median.
    rules.stalled = Limits::warning_below(1e-3);
    // Zamirai et al., "Revisiting BFloat16 Training" (2020): updates lost to rounding do the harm. Half.
    rules.update_lost = Limits::warning_above(0.5);
    // S3's example calls a clip 50 times below the typical norm critical. Adam cancels a constant factor: a warning.
    rules.mean_coefficient = Limits::warning_below(0.02);
    rules.underflow = [Format::F16, Format::BF16]
        .map(|format| UnderflowRule { format, scale: None, above: Limits::new(0.1, 0.5) })
        .into();
    rules
}

/// S0. The rules on the norm come with the learning rate.
fn lr_scaled() -> Rules {
    let mut rules = Rules::none(Preset::LrScaled, Vec::new());
    rules.gsnr_median = Limits::warning_below(1.0);
    rules.variation = Limits::warning_above(1.0);
    rules
}

/// S1.
fn course() -> Rules {
    let thresholds = vec![
        above(Statistic::TotalNorm, Exploding, 10.0, 100.0),
        below(Statistic::TotalNorm, Vanishing, 0.1, 1e-7),
        // `is_healthy`.
        above(Statistic::Norm, Exploding, 1e3, 1e3),
        below(Statistic::Norm, Vanishing, 1e-8, 1e-8),
        // The table has 5 % and 20 % of zeros; the text 20 % and 50 % of dead elements.
        above(Statistic::ZeroFraction, Zeros, 0.05, 0.2),
        above(Statistic::DeadFraction, Dead, 0.2, 0.5),
        above(Statistic::Ratio, Ratio, 1.0, NEVER),
        below(Statistic::Ratio, Ratio, 1e-6, NEVER_BELOW),
        above(Statistic::Spread, Spread, 10.0, 100.0),
    ];
    Rules::none(Preset::Course, thresholds)
}

/// S3's `GradientDoctor`, which only warns.
fn doctor() -> Rules {
    let thresholds =
        vec![below(Statistic::Norm, Vanishing, 1e-7, NEVER_BELOW), above(Statistic::Norm, Exploding, 1e4, NEVER)];
    Rules::none(Preset::Doctor, thresholds)
}

/// S4.
fn transformer() -> Rules {
    let thresholds = vec![
        below(Statistic::Norm, Vanishing, 1e-7, NEVER_BELOW),
        above(Statistic::Norm, Exploding, 100.0, 100.0),
        above(Statistic::TotalChange, Unstable, 10.0, NEVER),
    ];
    let mut rules = Rules::none(Preset::Transformer, thresholds);
    rules.flow = Some(FlowRule {
        measure: FlowMeasure::Thirds,
        below: Limits::warning_below(1e-2),
        above: Limits::warning_above(1e2),
    });
    // "For several consecutive steps."
    rules.persistence = 3;
    rules
}
