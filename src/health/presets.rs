//! The limits of the presets, each with its source.
//!
//! Sources, as the documentation of `health` names them: S0 "Probing Gradients", S1 a course's "Gradient Statistics", S3
//! "Gradient Flow", S4 "Debugging Transformer Gradients".

use super::{
    FindingKind::{self, Dead, Exploding, Ratio, Spread, Stalled, Unstable, Vanishing, Zeros},
    FlowMeasure, FlowRule, Limits, Preset, Rules, Statistic, ThresholdRule, UnderflowRule,
};
use crate::histogram::Format;

const NEVER: f64 = f64::INFINITY;
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
        // Adam divides by √v + 1e-8: elements smaller than that are no longer brought to the size of a step, and an SGD
        // step of 0.1 times it is lost in the rounding of an f32 weight of 0.02. Below 1e-10 they count as dead.
        below(Statistic::Rms, Vanishing, 1e-8, 1e-10).not_zero(),
        // Weights are initialised at an RMS of 0.01 to 1. A gradient above that moves them by more than their size even
        // at a learning rate of 1, and by 100 at one of 0.01.
        above(Statistic::Rms, Exploding, 1.0, 100.0),
        // Nothing at all reaches any tensor.
        below(Statistic::TotalNorm, Vanishing, f64::MIN_POSITIVE, f64::MIN_POSITIVE),
        // A tensor that is all 0 may be an unused expert or behind a layer initialised at 0: worth a look, no more.
        above(Statistic::ZeroFraction, Zeros, 0.9999, NEVER),
        // S1's text calls half of the elements severe. A third is 0 in a healthy fused attention bias, whose keys' part
        // has no gradient.
        above(Statistic::DeadFraction, Dead, 0.5, 0.9).not_zero(),
        // S1: above 1 too large, below 1e-6 too small.
        above(Statistic::Ratio, Ratio, 1.0, 100.0),
        below(Statistic::Ratio, Ratio, 1e-6, NEVER_BELOW).not_zero(),
        // S4: more than tenfold between steps.
        above(Statistic::TotalChange, Unstable, 10.0, 100.0),
        // S3: more than 3 to 4 orders of magnitude.
        above(Statistic::Spread, Spread, 1e4, NEVER),
    ];
    let mut rules = Rules::none(Preset::Default, thresholds);
    // Rows of words that do not occur, and experts that no word went to.
    for pattern in ["*embed*", "*emb.*", "*wte*", "*wpe*", "*expert*"] {
        rules = rules.exempt_if_any(pattern, &[Dead, Zeros, Stalled]);
    }
    // A bias of the keys adds the same to all scores of a query, which softmax takes out: its gradient is rounding.
    for pattern in ["*k_proj.bias", "*key.bias", "*key_proj.bias"] {
        rules = rules.exempt_if_any(pattern, &[Vanishing, Dead, Zeros, Spread, Ratio]);
    }
    // Biases begin at 0 and are no scale to measure a gradient by.
    rules = rules.exempt_if_any("*bias", &[Ratio]);
    // Six deviations, as OLMo-core skips steps by; ten are no accident of a heavy tail.
    rules.spike = Limits::new(6.0, 20.0);
    // S0.
    rules.variation = Limits::warning_above(1.0);
    // S4's factor of 100 over the whole depth, by a slope that one layer does not bend.
    rules.flow =
        Some(FlowRule { measure: FlowMeasure::Slope, below: Limits::new(1e-2, 1e-6), above: Limits::new(1e2, 1e6) });
    // You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (2017): an update as large as its weight may
    // diverge. A hundred times CS231n's 1e-3 is worth a look.
    rules.update_ratio = Limits::new(0.1, 1.0);
    // In the same paper's table of AlexNet at its first step, gradients over weights lie 233 apart. Here the slowest beside the
    // median.
    rules.stalled = Limits::warning_below(1e-3);
    // Zamirai et al., "Revisiting BFloat16 Training" (2020): what rounding takes from small updates is what harms. Half.
    rules.update_lost = Limits::warning_above(0.5);
    // Nearly every step; and S3's example, a clip 50 times below the typical norm, is critical.
    rules.clipped_fraction = Limits::warning_above(0.9);
    rules.mean_coefficient = Limits::new(0.1, 0.02);
    // S0's median below 1 is what healthy micro-batches have (0.13 to 2.0 in a healthy transformer): it takes several
    // to see the signal. Here a hundred would not be enough.
    rules.signal = Limits::warning_below(0.01);
    rules.underflow = [Format::F16, Format::BF16]
        .map(|format| UnderflowRule { format, scale: None, above: Limits::new(0.1, 0.5) })
        .into();
    rules.persistence = 3;
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
