//! A clip of each kind.

use gradprobe::Clip;

/// Those that remember steps do so of few, so that a test of some goes round.
pub const CLIPS: [Clip; 8] = [
    Clip::None,
    Clip::global_norm(1.0),
    Clip::Value { max_abs: 1.0 },
    Clip::Quantile { quantile: 0.9 },
    Clip::TensorNorm { max_norm: 1.0 },
    Clip::Percentile { percentile: 50.0, history: 2, max_norm: Some(1.0) },
    Clip::ZScore { smoothing: 0.9, threshold: 2.0, warmup: 2, max_norm: None },
    Clip::TensorEma { smoothing: 0.9, threshold: 1.05, warmup: 2, max_norm: Some(1.0) },
];
