//! How a step's clip is decided: from the step itself, or from the norms of the steps before. On the device by the last
//! block of the measurement (`kernels/policy.cuh`, the same operations), so that no policy makes the host wait.

use crate::{Error, Histogram, Record, StepOutputs};

/// What the gradients are clipped to. Policies that look back learn only from steps that are finite and not skipped; a
/// step that is not finite is clipped, if at all, by what was learnt before.
///
/// [`Config::max_norm`](crate::Config::max_norm) caps the global norm under `GlobalNorm`, `Percentile` and `ZScore`, and
/// is the clip of the warm-up under `TensorEma`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum ClipPolicy {
    /// All tensors together to the norm `Config::max_norm`, by torch's rule (Pascanu et al. 2013, arXiv 1211.5063);
    /// no clip without it.
    #[default]
    GlobalNorm,
    /// Every element to [-max_abs, max_abs]: torch's `clip_grad_value_`. NaN stays NaN.
    Value {
        /// Finite, above 0.
        max_abs: f32,
    },
    /// Every element to ±the quantile of |x| over all finite elements of the step: the clamp at a percentile that
    /// tutorials call adaptive clipping. By [`Histogram::quantile_estimate`], so within its bin, a quarter of an octave
    /// at most. Counted in a launch of its own before the measurement: gradients are read twice. Where the quantile
    /// is 0, as it is when that many elements are, nothing is clipped.
    Quantile {
        /// Above 0, at most 1; there 0.9.
        quantile: f64,
    },
    /// Every tensor to this norm of its own: burn's `GradientClipping::Norm`.
    TensorNorm {
        /// Finite, above 0.
        max_norm: f64,
    },
    /// All tensors together to a percentile of the global norms so far, this step's included: AutoClip (Seetharaman
    /// et al. 2020, arXiv 2007.14469; there 10, over all steps), interpolated as numpy does.
    Percentile {
        /// From 0 to 100.
        percentile: f64,
        /// Steps that are remembered, 2 to 1024.
        history: u32,
    },
    /// All tensors together where the global norm is an outlier: ZClip (Kumar et al. 2025, arXiv 2504.02507), with its
    /// adaptive scaling. Mean μ and variance σ² are those of the norms of the warm-up, then moving averages of the
    /// clipped norms. A norm with z = (norm - μ) / (σ + 1e-6) above the threshold z' is clipped to μ + z'²σ / z.
    ZScore {
        /// Of the moving averages, at least 0 and below 1; there 0.97.
        smoothing: f64,
        /// z', above 0; there 2.5.
        threshold: f64,
        /// Steps before the first clip, at least 2; there 25.
        warmup: u32,
    },
    /// Every tensor to a multiple of a moving average γ of its own clipped norms: AdaGC (Wang et al. 2025, arXiv
    /// 2502.11034). During the warm-up the clip is that of `GlobalNorm`, and γ the least of the tensor's norms after it
    /// that is not 0 (a tensor whose gradient is 0 for a step would otherwise stay clipped to 0).
    TensorEma {
        /// β of the average, at least 0 and below 1; there 0.98.
        smoothing: f64,
        /// λ, the multiple, finite and at least 1; there 1.05.
        threshold: f64,
        /// Steps of the warm-up, at least 1; there 100.
        warmup: u32,
    },
}

impl ClipPolicy {
    /// The most steps that [`ClipPolicy::Percentile`] remembers.
    pub const MAX_HISTORY: u32 = 1024;

    /// # Errors
    /// [`Error::InvalidConfig`] for a value outside its range.
    pub(crate) fn check(&self, max_norm: Option<f64>) -> Result<(), Error> {
        let require = |holds: bool, option: &'static str, expected: &'static str, value: &dyn ToString| {
            if holds { Ok(()) } else { Err(Error::InvalidConfig { option, expected, value: value.to_string() }) }
        };
        let of_its_own =
            || require(max_norm.is_none(), "max_norm", "unset beside a clip of elements or tensors", &"set");
        let smooth = |smoothing: f64| {
            require((0.0..1.0).contains(&smoothing), "smoothing", "at least 0 and below 1", &smoothing)
        };
        match *self {
            Self::GlobalNorm => Ok(()),
            Self::Value { max_abs } => {
                of_its_own()?;
                require(max_abs.is_finite() && max_abs > 0.0, "max_abs", "finite and above 0", &max_abs)
            }
            Self::TensorNorm { max_norm } => {
                of_its_own()?;
                require(max_norm.is_finite() && max_norm > 0.0, "max_norm", "finite and above 0", &max_norm)
            }
            Self::Quantile { quantile } => {
                of_its_own()?;
                require(quantile > 0.0 && quantile <= 1.0, "quantile", "above 0 and at most 1", &quantile)
            }
            Self::Percentile { percentile, history } => {
                require((0.0..=100.0).contains(&percentile), "percentile", "from 0 to 100", &percentile)?;
                require((2..=Self::MAX_HISTORY).contains(&history), "history", "from 2 to 1024", &history)
            }
            Self::ZScore { smoothing, threshold, warmup } => {
                smooth(smoothing)?;
                require(threshold.is_finite() && threshold > 0.0, "threshold", "finite and above 0", &threshold)?;
                require(warmup >= 2, "warmup", "at least 2", &warmup)
            }
            Self::TensorEma { smoothing, threshold, warmup } => {
                smooth(smoothing)?;
                require(threshold.is_finite() && threshold >= 1.0, "threshold", "finite and at least 1", &threshold)?;
                require(warmup >= 1, "warmup", "at least 1", &warmup)
            }
        }
    }

    /// The code by which kernels know the policy.
    pub(crate) fn code(&self) -> u32 {
        match self {
            Self::GlobalNorm => 0,
            Self::Value { .. } => 1,
            Self::TensorNorm { .. } => 2,
            Self::Percentile { .. } => 4,
            Self::ZScore { .. } => 8,
            Self::TensorEma { .. } => 16,
            Self::Quantile { .. } => 32,
        }
    }

    /// What kernels are told of it: threshold, smoothing, steps.
    pub(crate) fn parameters(&self) -> (f64, f64, u32) {
        match *self {
            Self::GlobalNorm => (0.0, 0.0, 0),
            Self::Value { max_abs } => (f64::from(max_abs), 0.0, 0),
            Self::TensorNorm { max_norm } => (max_norm, 0.0, 0),
            Self::Quantile { quantile } => (quantile, 0.0, 0),
            Self::Percentile { percentile, history } => (percentile, 0.0, history),
            Self::ZScore { smoothing, threshold, warmup } | Self::TensorEma { smoothing, threshold, warmup } => {
                (threshold, smoothing, warmup)
            }
        }
    }

    /// 8-byte words of state that it keeps from step to step: a header of four, then a history twice, in the order of
    /// the steps and sorted, or an average a tensor, or a histogram of all elements.
    pub(crate) fn state_words(&self, tensors: usize) -> usize {
        let more = match *self {
            Self::Percentile { history, .. } => 2 * history as usize,
            Self::TensorEma { .. } => tensors,
            Self::Quantile { .. } => size_of::<Histogram>() / size_of::<u64>(),
            _ => 0,
        };
        4 + more
    }

    /// Whether tensors have coefficients of their own.
    pub(crate) fn is_by_tensor(&self) -> bool {
        matches!(self, Self::TensorNorm { .. } | Self::TensorEma { .. })
    }

    /// Whether it needs a histogram of the step's elements.
    pub(crate) fn needs_histogram(&self) -> bool {
        matches!(self, Self::Quantile { .. })
    }

    /// Whether it may clip anything.
    pub(crate) fn may_clip(&self, max_norm: Option<f64>) -> bool {
        *self != Self::GlobalNorm || max_norm.is_some()
    }
}

/// A step as a policy sees it.
pub(crate) struct Norms {
    /// The norm that a clip is measured by.
    pub norm: f64,
    /// Whether all elements are finite: only then is anything learnt.
    pub finite: bool,
    /// Whether the step is left as it is.
    pub skip: bool,
    /// The loss scale: what the coefficients of tensors are divided by, and the histogram's elements.
    pub divisor: f64,
}

/// What a policy decided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Decision {
    /// Of all tensors; 1 where tensors or elements are clipped on their own.
    pub coefficient: f64,
    /// Tensors or elements are clipped on their own, some of them at least.
    pub clips_parts: bool,
    /// The norm is an outlier by [`ClipPolicy::ZScore`].
    pub spike: bool,
}

/// torch's coefficient.
fn torch_rule(max_norm: f64, norm: f64) -> f64 {
    let ratio = max_norm / (norm + 1e-6);
    // Not `min`, which would drop a NaN; and NaN without payload, whatever arithmetic made of it.
    if ratio.is_nan() {
        f64::NAN
    } else if ratio > 1.0 {
        1.0
    } else {
        ratio
    }
}

/// The same for limits that norms meet exactly: such a norm is left as it is.
fn rule(limit: f64, norm: f64) -> f64 {
    if norm <= limit { 1.0 } else { torch_rule(limit, norm) }
}

/// What is kept from step to step, on the CPU.
#[derive(Clone, Debug)]
pub(crate) struct ClipState {
    policy: ClipPolicy,
    max_norm: Option<f64>,
    /// Steps that were learnt from.
    steps: u64,
    /// Of the norms.
    mean: f64,
    variance: f64,
    history: Vec<f64>,
    sorted: Vec<f64>,
    averages: Vec<f64>,
    /// Where elements are brought, under a policy that clips them on their own.
    limit: f32,
    /// One a tensor, of the last step.
    pub coefficients: Vec<f32>,
}

impl ClipState {
    pub(crate) fn new(policy: ClipPolicy, max_norm: Option<f64>, tensors: usize) -> Self {
        let by_tensor = if policy.is_by_tensor() { tensors } else { 0 };
        Self {
            policy,
            max_norm,
            steps: 0,
            mean: 0.0,
            variance: 0.0,
            history: Vec::new(),
            sorted: Vec::new(),
            averages: vec![0.0; by_tensor],
            limit: f32::INFINITY,
            coefficients: vec![1.0; by_tensor],
        }
    }

    /// Decides a step's clip, and learns from it. `histogram` is that of all elements, for a policy that needs it.
    pub(crate) fn decide(&mut self, records: &[Record], step: &Norms, histogram: Option<&Histogram>) -> Decision {
        let none = Decision { coefficient: 1.0, clips_parts: false, spike: false };
        if step.skip {
            self.coefficients.fill(1.0);
            return none;
        }
        let decision = match self.policy {
            ClipPolicy::GlobalNorm => none,
            ClipPolicy::Value { max_abs } => self.clamp(records, max_abs),
            ClipPolicy::Quantile { quantile } => {
                let limit = histogram.and_then(|histogram| histogram.quantile_estimate(quantile));
                let limit =
                    limit.map(|limit| crate::outputs::narrow(limit / step.divisor)).filter(|&limit| limit > 0.0);
                self.clamp(records, limit.unwrap_or(f32::INFINITY))
            }
            ClipPolicy::TensorNorm { max_norm } => {
                let coefficient = |r: &Record| torch_rule(max_norm, tensor_norm(r, step));
                self.set_coefficients(&records.iter().map(coefficient).collect::<Vec<_>>(), step.divisor)
            }
            ClipPolicy::Percentile { percentile, history } => {
                if step.finite {
                    self.remember(step.norm, history as usize);
                }
                match percentile_of(&self.sorted, percentile) {
                    Some(limit) => Decision { coefficient: rule(limit, step.norm), ..none },
                    None => none,
                }
            }
            ClipPolicy::ZScore { smoothing, threshold, warmup } => self.z_score(step, smoothing, threshold, warmup),
            ClipPolicy::TensorEma { smoothing, threshold, warmup } => {
                self.tensor_averages(records, step, smoothing, threshold, warmup)
            }
        };
        let cap = match self.max_norm {
            // In the warm-up of the averages it is part of the tensors' coefficients.
            Some(max_norm) if !self.policy.is_by_tensor() => torch_rule(max_norm, step.norm),
            _ => 1.0,
        };
        if step.finite {
            self.steps += 1;
        }
        // NaN, if any, stays.
        Decision {
            coefficient: if cap < decision.coefficient || cap.is_nan() { cap } else { decision.coefficient },
            ..decision
        }
    }

    /// The bit of [`StepOutputs::action`] where tensors or elements are clipped on their own.
    pub(crate) fn action_on_parts(&self) -> u32 {
        if self.policy.is_by_tensor() { StepOutputs::ACTION_SCALE_TENSORS } else { StepOutputs::ACTION_CLAMP }
    }

    /// Where elements are brought, under a policy that clips them on their own.
    pub(crate) fn limit(&self) -> f32 {
        self.limit
    }

    fn clamp(&mut self, records: &[Record], limit: f32) -> Decision {
        self.limit = limit;
        let outside = |r: &Record| r.inf_count > 0 || r.max_abs_or_zero > limit;
        let clips_parts = limit < f32::INFINITY && records.iter().any(outside);
        Decision { coefficient: 1.0, clips_parts, spike: false }
    }

    fn set_coefficients(&mut self, coefficients: &[f64], divisor: f64) -> Decision {
        self.coefficients = coefficients.iter().map(|c| crate::outputs::narrow(c / divisor)).collect();
        let clips_parts = coefficients.iter().any(|&c| crate::outputs::narrow(c) != 1.0);
        Decision { coefficient: 1.0, clips_parts, spike: false }
    }

    /// Adds a norm to the history, in place of the oldest when that is full.
    fn remember(&mut self, norm: f64, capacity: usize) {
        if self.history.len() < capacity {
            self.history.push(norm);
        } else {
            #[expect(clippy::cast_possible_truncation, reason = "below the capacity")]
            let place = (self.steps % capacity as u64) as usize;
            let oldest = std::mem::replace(&mut self.history[place], norm);
            self.sorted.remove(self.sorted.partition_point(|&x| x < oldest));
        }
        self.sorted.insert(self.sorted.partition_point(|&x| x < norm), norm);
    }

    fn z_score(&mut self, step: &Norms, smoothing: f64, threshold: f64, warmup: u32) -> Decision {
        let none = Decision { coefficient: 1.0, clips_parts: false, spike: false };
        if self.steps < u64::from(warmup) {
            if step.finite {
                // Welford, as the mean and the population variance of the warm-up.
                #[expect(clippy::cast_precision_loss, reason = "below 2^32")]
                let steps = (self.steps + 1) as f64;
                let gap = step.norm - self.mean;
                self.mean += gap / steps;
                self.variance += (gap * (step.norm - self.mean) - self.variance) / steps;
            }
            return Decision { coefficient: rule(f64::INFINITY, step.norm), ..none };
        }
        let std = self.variance.sqrt();
        let z = (step.norm - self.mean) / (std + 1e-6);
        let spike = z > threshold;
        let limit = if spike { self.mean + threshold * std / (z / threshold) } else { step.norm };
        if step.finite {
            self.mean = smoothing * self.mean + (1.0 - smoothing) * limit;
            let gap = limit - self.mean;
            self.variance = smoothing * self.variance + (1.0 - smoothing) * (gap * gap);
        }
        Decision { coefficient: rule(limit, step.norm), spike, ..none }
    }

    fn tensor_averages(
        &mut self,
        records: &[Record],
        step: &Norms,
        smoothing: f64,
        threshold: f64,
        warmup: u32,
    ) -> Decision {
        let global = self.max_norm.map_or(1.0, |max_norm| torch_rule(max_norm, step.norm));
        let warm = self.steps < u64::from(warmup);
        let coefficients = records.iter().zip(&mut self.averages).map(|(record, average)| {
            let norm = tensor_norm(record, step);
            // A tensor that has never had a gradient has no average to be measured by.
            let known = *average > 0.0;
            let coefficient = if warm || !known { global } else { rule(threshold * *average, norm) };
            let clipped = coefficient * norm;
            if step.finite && clipped > 0.0 {
                *average = if !known || warm && clipped < *average {
                    clipped
                } else if warm {
                    *average
                } else {
                    smoothing * *average + (1.0 - smoothing) * clipped
                };
            }
            coefficient
        });
        let coefficients: Vec<f64> = coefficients.collect();
        self.set_coefficients(&coefficients, step.divisor)
    }
}

/// The norm that a tensor's clip is measured by.
fn tensor_norm(record: &Record, step: &Norms) -> f64 {
    // What is not finite is zeroed where the step's own norm is finite nevertheless.
    if step.norm.is_finite() { record.finite_l2_norm() } else { record.l2_norm() }
}

/// numpy's linear interpolation.
pub(crate) fn percentile_of(sorted: &[f64], percentile: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    #[expect(clippy::cast_precision_loss, reason = "at most 1023")]
    let place = percentile / 100.0 * last as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 1023")]
    let low = place as usize;
    let high = (low + 1).min(last);
    #[expect(clippy::cast_precision_loss, reason = "at most 1023")]
    let share = place - low as f64;
    Some(sorted[low] + (sorted[high] - sorted[low]) * share)
}
