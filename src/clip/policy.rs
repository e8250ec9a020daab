//! The rules of the clip: from the step itself, or from the norms of earlier steps. The last block of the measurement
//! decides on the device (`kernels/policy.cuh`, the same operations), so that no rule makes the host wait.

use crate::{Error, Record, StepOutputs, histogram::Histogram, measure::narrow};
use bytemuck::{Pod, Zeroable};

/// Chooses the rule of the clip and its limit. Rules that look back learn only from steps that are finite and not
/// skipped. If a step that is not finite is clipped at all, its limit comes from earlier steps.
///
/// ```
/// use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe};
///
/// let plan = Plan::new([("weight", DType::F32, 2)])?;
/// let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::Value { max_abs: 1.0 }))?;
/// let mut gradient = [-3.0f32, 0.5];
/// probe.step(&mut [&mut gradient])?;
/// assert_eq!(gradient, [-1.0, 0.5]);
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Clip {
    /// Clips nothing.
    #[default]
    None,
    /// Clips all tensors together to this norm, by torch's rule (Pascanu et al. 2013, arXiv 1211.5063).
    GlobalNorm {
        /// Finite, above 0.
        max_norm: f64,
    },
    /// Clips every element to [-max_abs, max_abs]: torch's `clip_grad_value_`. NaN stays NaN.
    Value {
        /// Finite, above 0.
        max_abs: f32,
    },
    /// Clips every element to ±the quantile of |x| over all finite elements of the step: the clamp at a percentile that
    /// tutorials call adaptive clipping. The quantile is [`Histogram::quantile_estimate`], so within its bin, a quarter
    /// of an octave at most. A launch of its own counts before the measurement: gradients are read twice. Where the
    /// quantile is 0, because that many elements are, nothing is clipped.
    Quantile {
        /// Above 0, at most 1; in tutorials 0.9.
        quantile: f64,
    },
    /// Clips every tensor to this norm of its own: burn's `GradientClipping::Norm`.
    TensorNorm {
        /// Finite, above 0.
        max_norm: f64,
    },
    /// Clips all tensors together to a percentile of the global norms so far, this step's included: AutoClip
    /// (Seetharaman et al. 2020, arXiv 2007.14469), interpolated as numpy does. The paper takes the 10th over all
    /// steps.
    Percentile {
        /// From 0 to 100.
        percentile: f64,
        /// The number of last steps that count, 2 to 1024.
        history: u32,
        /// A limit of the global norm besides; finite, above 0.
        max_norm: Option<f64>,
    },
    /// Clips all tensors together where the global norm is an outlier: ZClip (Kumar et al. 2025, arXiv 2504.02507),
    /// with its adaptive scaling. Mean μ and variance σ² are those of the norms of the warm-up, then moving averages of
    /// the clipped norms. A norm with z = (norm - μ) / (σ + 1e-6) above the threshold z' is clipped to μ + z'²σ / z.
    ZScore {
        /// Of the moving averages, at least 0 and below 1; in the paper 0.97.
        smoothing: f64,
        /// z', above 0; in the paper 2.5.
        threshold: f64,
        /// Steps before the first clip, at least 2; in the paper 25.
        warmup: u32,
        /// A limit of the global norm besides; finite, above 0.
        max_norm: Option<f64>,
    },
    /// Clips every tensor to a multiple of a moving average γ of its own clipped norms: AdaGC (Wang et al. 2025, arXiv
    /// 2502.11034). The warm-up clips all tensors together to `max_norm`, and γ is the least of the tensor's norms
    /// after that clip that is not 0. (A tensor whose gradient is 0 for a step would otherwise stay clipped to 0.)
    TensorEma {
        /// β of the average, at least 0 and below 1; in the paper 0.98.
        smoothing: f64,
        /// λ, the multiple, finite and at least 1; in the paper 1.05.
        threshold: f64,
        /// Steps of the warm-up, at least 1; in the paper 100.
        warmup: u32,
        /// The limit of the global norm in the warm-up; finite, above 0.
        max_norm: Option<f64>,
    },
}

impl Clip {
    /// The most steps that [`Clip::Percentile`] remembers.
    pub const MAX_HISTORY: u32 = 1024;

    /// Gives [`Clip::GlobalNorm`] with this norm.
    pub const fn global_norm(max_norm: f64) -> Self {
        Self::GlobalNorm { max_norm }
    }

    /// Gives AutoClip, [`Clip::Percentile`], as in the paper (arXiv 2007.14469): the 10th percentile of the norms so
    /// far. It remembers the last 1024 steps, the most there is room for; the paper remembers all.
    ///
    /// ```
    /// use gradprobe::{Clip, Config};
    /// let config = Config::new().clip(Clip::auto_clip());
    /// assert_eq!(config.clip, Clip::Percentile { percentile: 10.0, history: 1024, max_norm: None });
    /// ```
    pub const fn auto_clip() -> Self {
        Self::Percentile { percentile: 10.0, history: Self::MAX_HISTORY, max_norm: None }
    }

    /// Gives ZClip, [`Clip::ZScore`], as in the paper (arXiv 2504.02507). The 25 steps of the warm-up clip nothing. The
    /// authors' program caps the norm at 1 there and after: a `max_norm` of 1.
    ///
    /// ```
    /// use gradprobe::{Clip, Config};
    /// let config = Config::new().clip(Clip::zclip());
    /// assert_eq!(config.clip, Clip::ZScore { smoothing: 0.97, threshold: 2.5, warmup: 25, max_norm: None });
    /// ```
    pub const fn zclip() -> Self {
        Self::ZScore { smoothing: 0.97, threshold: 2.5, warmup: 25, max_norm: None }
    }

    /// Gives AdaGC, [`Clip::TensorEma`], as in the paper (arXiv 2502.11034): every tensor to 1.05 times the average of
    /// its own norms, after 100 steps that clip all together to the norm 1.
    ///
    /// ```
    /// use gradprobe::{Clip, Config};
    /// let config = Config::new().clip(Clip::ada_gc());
    /// assert_eq!(config.clip, Clip::TensorEma { smoothing: 0.98, threshold: 1.05, warmup: 100, max_norm: Some(1.0) });
    /// ```
    pub const fn ada_gc() -> Self {
        Self::TensorEma { smoothing: 0.98, threshold: 1.05, warmup: 100, max_norm: Some(1.0) }
    }

    /// # Errors
    /// [`Error::InvalidConfig`] for a value outside its range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let require = |holds: bool, option: &'static str, expected: &'static str, value: &dyn ToString| {
            if holds { Ok(()) } else { Err(Error::InvalidConfig { option, expected, value: value.to_string() }) }
        };
        let smooth = |smoothing: f64| {
            require((0.0..1.0).contains(&smoothing), "smoothing", "at least 0 and below 1", &smoothing)
        };
        if let Some(max_norm) = self.max_norm() {
            require(max_norm.is_finite() && max_norm > 0.0, "max_norm", "finite and above 0", &max_norm)?;
        }
        match *self {
            Self::None | Self::GlobalNorm { .. } => Ok(()),
            Self::Value { max_abs } => {
                require(max_abs.is_finite() && max_abs > 0.0, "max_abs", "finite and above 0", &max_abs)
            }
            Self::TensorNorm { max_norm } => {
                require(max_norm.is_finite() && max_norm > 0.0, "max_norm", "finite and above 0", &max_norm)
            }
            Self::Quantile { quantile } => {
                require(quantile > 0.0 && quantile <= 1.0, "quantile", "above 0 and at most 1", &quantile)
            }
            Self::Percentile { percentile, history, .. } => {
                require((0.0..=100.0).contains(&percentile), "percentile", "from 0 to 100", &percentile)?;
                require((2..=Self::MAX_HISTORY).contains(&history), "history", "from 2 to 1024", &history)
            }
            Self::ZScore { smoothing, threshold, warmup, .. } => {
                smooth(smoothing)?;
                require(threshold.is_finite() && threshold > 0.0, "threshold", "finite and above 0", &threshold)?;
                require(warmup >= 2, "warmup", "at least 2", &warmup)
            }
            Self::TensorEma { smoothing, threshold, warmup, .. } => {
                smooth(smoothing)?;
                require(threshold.is_finite() && threshold >= 1.0, "threshold", "finite and at least 1", &threshold)?;
                require(warmup >= 1, "warmup", "at least 1", &warmup)
            }
        }
    }

    /// Gives the norm to which all tensors are clipped together: by the rule, beside it, or in its warm-up.
    pub(crate) fn max_norm(&self) -> Option<f64> {
        match *self {
            Self::GlobalNorm { max_norm } => Some(max_norm),
            Self::Percentile { max_norm, .. } | Self::ZScore { max_norm, .. } | Self::TensorEma { max_norm, .. } => {
                max_norm
            }
            _ => None,
        }
    }

    /// Gives the rule that kernels know by this code and these parameters; 0 is no norm.
    pub(crate) fn of_parameters(code: u32, (threshold, smoothing, steps): (f64, f64, u32), max_norm: f64) -> Self {
        let max_norm = (max_norm > 0.0).then_some(max_norm);
        match code {
            #[expect(clippy::cast_possible_truncation, reason = "it was an f32")]
            1 => Self::Value { max_abs: threshold as f32 },
            2 => Self::TensorNorm { max_norm: threshold },
            4 => Self::Percentile { percentile: threshold, history: steps, max_norm },
            8 => Self::ZScore { smoothing, threshold, warmup: steps, max_norm },
            16 => Self::TensorEma { smoothing, threshold, warmup: steps, max_norm },
            32 => Self::Quantile { quantile: threshold },
            _ => max_norm.map_or(Self::None, Self::global_norm),
        }
    }

    /// The rule's code in the kernels.
    pub(crate) fn code(&self) -> u32 {
        match self {
            Self::None | Self::GlobalNorm { .. } => 0,
            Self::Value { .. } => 1,
            Self::TensorNorm { .. } => 2,
            Self::Percentile { .. } => 4,
            Self::ZScore { .. } => 8,
            Self::TensorEma { .. } => 16,
            Self::Quantile { .. } => 32,
        }
    }

    /// The rule's parameters in the kernels: threshold, smoothing, steps.
    pub(crate) fn parameters(&self) -> (f64, f64, u32) {
        match *self {
            Self::None | Self::GlobalNorm { .. } => (0.0, 0.0, 0),
            Self::Value { max_abs } => (f64::from(max_abs), 0.0, 0),
            Self::TensorNorm { max_norm } => (max_norm, 0.0, 0),
            Self::Quantile { quantile } => (quantile, 0.0, 0),
            Self::Percentile { percentile, history, .. } => (percentile, 0.0, history),
            Self::ZScore { smoothing, threshold, warmup, .. }
            | Self::TensorEma { smoothing, threshold, warmup, .. } => (threshold, smoothing, warmup),
        }
    }

    /// 8-byte words of state from step to step: a header of four, then a history twice, in the order of the steps and
    /// sorted, or an average a tensor, or a histogram of all elements.
    pub(crate) fn state_words(&self, tensors: usize) -> usize {
        let more = match *self {
            Self::Percentile { history, .. } => 2 * history as usize,
            Self::TensorEma { .. } => tensors,
            Self::Quantile { .. } => size_of::<Histogram>() / size_of::<u64>(),
            _ => 0,
        };
        4 + more
    }

    /// Whether these words may be its state: the right number, and a sorted history.
    pub(crate) fn is_state(&self, tensors: usize, words: &[u64]) -> bool {
        if words.len() != self.state_words(tensors) {
            return false;
        }
        let Self::Percentile { history, .. } = *self else { return true };
        let (kept, sorted) = words[4..].split_at(history as usize);
        let count = usize::try_from(words[0]).unwrap_or(usize::MAX).min(kept.len());
        let mut norms = kept[..count].to_vec();
        // The bits of positive numbers are in the order of the numbers.
        norms.sort_unstable();
        norms.iter().all(|&bits| bits <= f64::INFINITY.to_bits()) && norms == sorted[..count]
    }

    /// Words of the state that are the same on all ranks: all but averages of a rank's own tensors, and counts of its
    /// own elements.
    pub(crate) fn words_of_all_ranks(&self) -> u32 {
        match *self {
            Self::Percentile { history, .. } => 4 + 2 * history,
            _ => 4,
        }
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
    pub(crate) fn may_clip(&self) -> bool {
        *self != Self::None
    }
}

/// The norms of a step, for a rule.
pub(crate) struct Norms {
    /// The norm that the clip compares with its limit.
    pub norm: f64,
    /// Whether all elements are finite: only then does a rule learn.
    pub finite: bool,
    /// Whether the step is left as it is.
    pub skip: bool,
    /// The loss scale: the divisor of the tensors' coefficients, and of the histogram's elements.
    pub divisor: f64,
}

/// The decision of a rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Decision {
    /// The coefficient of all tensors; 1 where tensors or elements are clipped on their own.
    pub coefficient: f64,
    /// Whether some tensors or elements are clipped on their own.
    pub clips_parts: bool,
    /// Whether the norm is an outlier by [`Clip::ZScore`].
    pub spike: bool,
}

/// torch's coefficient.
fn torch_rule(max_norm: f64, norm: f64) -> f64 {
    let ratio = max_norm / (norm + 1e-6);
    // Not `min`, which would drop a NaN; and NaN without payload, on any arithmetic.
    if ratio.is_nan() {
        f64::NAN
    } else if ratio > 1.0 {
        1.0
    } else {
        ratio
    }
}

/// The same for a limit that a norm may meet exactly: such a norm is left as it is.
fn rule(limit: f64, norm: f64) -> f64 {
    if norm <= limit { 1.0 } else { torch_rule(limit, norm) }
}

/// The state of a rule before its history, averages or histogram (`kernels/arguments.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct ClipHeader {
    /// Steps it has learnt from.
    pub steps: u64,
    /// Mean of the norms.
    pub mean: f64,
    pub variance: f64,
    /// The limit of elements, under a rule that clips them on their own.
    pub limit: f32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<ClipHeader>() == 32);

/// A rule and its state, in the memory of the CPU.
pub(crate) struct ClipState<'a> {
    pub rule: Clip,
    pub header: &'a mut ClipHeader,
    /// A history twice, in the order of the steps and sorted, or an average a tensor, or a histogram of all elements.
    pub words: &'a mut [u64],
    /// One coefficient a tensor, of the last step.
    pub coefficients: &'a mut [f32],
}

impl ClipState<'_> {
    /// Decides a step's clip, and learns from it.
    pub(crate) fn decide(&mut self, records: &[Record], step: &Norms) -> Decision {
        let none = Decision { coefficient: 1.0, clips_parts: false, spike: false };
        if step.skip {
            if self.rule.is_by_tensor() {
                self.coefficients.fill(1.0);
            }
            return none;
        }
        let decision = match self.rule {
            Clip::None | Clip::GlobalNorm { .. } => none,
            Clip::Value { max_abs } => self.clamp(records, max_abs),
            Clip::Quantile { quantile } => {
                let histogram: &Histogram = bytemuck::from_bytes(bytemuck::cast_slice(self.words));
                let limit = histogram.quantile_estimate(quantile);
                let limit = limit.map(|limit| narrow(limit / step.divisor)).filter(|&limit| limit > 0.0);
                self.clamp(records, limit.unwrap_or(f32::INFINITY))
            }
            Clip::TensorNorm { max_norm } => {
                let coefficient = |r: &Record| torch_rule(max_norm, tensor_norm(r, step));
                self.set_coefficients(&records.iter().map(coefficient).collect::<Vec<_>>(), step.divisor)
            }
            Clip::Percentile { percentile, history, .. } => {
                let history = history as usize;
                if step.finite {
                    self.remember(step.norm, history);
                }
                let count = self.remembered(history, step.finite);
                match percentile_of(&self.norms()[history..history + count], percentile) {
                    Some(limit) => Decision { coefficient: rule(limit, step.norm), ..none },
                    None => none,
                }
            }
            Clip::ZScore { smoothing, threshold, warmup, .. } => self.z_score(step, smoothing, threshold, warmup),
            Clip::TensorEma { smoothing, threshold, warmup, .. } => {
                self.tensor_averages(records, step, smoothing, threshold, warmup)
            }
        };
        let cap = match self.rule.max_norm() {
            // In the warm-up of the averages it is part of the tensors' coefficients.
            Some(max_norm) if !self.rule.is_by_tensor() => torch_rule(max_norm, step.norm),
            _ => 1.0,
        };
        if step.finite {
            self.header.steps += 1;
        }
        // NaN, if any, stays.
        Decision {
            coefficient: if cap < decision.coefficient || cap.is_nan() { cap } else { decision.coefficient },
            ..decision
        }
    }

    /// The bit of [`StepOutputs::action`] where tensors or elements are clipped on their own.
    pub(crate) fn action_on_parts(&self) -> u32 {
        if self.rule.is_by_tensor() { StepOutputs::ACTION_SCALE_TENSORS } else { StepOutputs::ACTION_CLAMP }
    }

    /// History and averages, as numbers.
    fn norms(&mut self) -> &mut [f64] {
        bytemuck::cast_slice_mut(self.words)
    }

    /// Norms in the history, with this step's if it is learnt.
    fn remembered(&self, capacity: usize, learnt: bool) -> usize {
        usize::try_from(self.header.steps + u64::from(learnt)).unwrap_or(capacity).min(capacity)
    }

    fn clamp(&mut self, records: &[Record], limit: f32) -> Decision {
        self.header.limit = limit;
        let outside = |r: &Record| r.inf_count > 0 || r.max_abs_or_zero > limit;
        let clips_parts = limit < f32::INFINITY && records.iter().any(outside);
        Decision { coefficient: 1.0, clips_parts, spike: false }
    }

    fn set_coefficients(&mut self, coefficients: &[f64], divisor: f64) -> Decision {
        self.coefficients.iter_mut().zip(coefficients).for_each(|(to, c)| *to = narrow(c / divisor));
        let clips_parts = coefficients.iter().any(|&c| narrow(c) != 1.0);
        Decision { coefficient: 1.0, clips_parts, spike: false }
    }

    /// Adds a norm to the history. In a full history it replaces the oldest.
    fn remember(&mut self, norm: f64, capacity: usize) {
        let mut count = self.remembered(capacity, false);
        #[expect(clippy::cast_possible_truncation, reason = "below the capacity")]
        let place = (self.header.steps % capacity as u64) as usize;
        let (history, sorted) = self.norms().split_at_mut(capacity);
        if count == capacity {
            let gone = sorted[..count].partition_point(|&x| x < history[place]);
            sorted.copy_within(gone + 1..count, gone);
            count -= 1;
        }
        history[place] = norm;
        let to = sorted[..count].partition_point(|&x| x < norm);
        sorted.copy_within(to..count, to + 1);
        sorted[to] = norm;
    }

    fn z_score(&mut self, step: &Norms, smoothing: f64, threshold: f64, warmup: u32) -> Decision {
        let none = Decision { coefficient: 1.0, clips_parts: false, spike: false };
        let state = &mut *self.header;
        if state.steps < u64::from(warmup) {
            if step.finite {
                // Welford, as the mean and the population variance of the warm-up.
                #[expect(clippy::cast_precision_loss, reason = "below 2^32")]
                let steps = (state.steps + 1) as f64;
                let gap = step.norm - state.mean;
                state.mean += gap / steps;
                state.variance += (gap * (step.norm - state.mean) - state.variance) / steps;
            }
            return Decision { coefficient: rule(f64::INFINITY, step.norm), ..none };
        }
        let std = state.variance.sqrt();
        let z = (step.norm - state.mean) / (std + 1e-6);
        let spike = z > threshold;
        let limit = if spike { state.mean + threshold * std / (z / threshold) } else { step.norm };
        if step.finite {
            state.mean = smoothing * state.mean + (1.0 - smoothing) * limit;
            let gap = limit - state.mean;
            state.variance = smoothing * state.variance + (1.0 - smoothing) * (gap * gap);
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
        let global = self.rule.max_norm().map_or(1.0, |max_norm| torch_rule(max_norm, step.norm));
        let warm = self.header.steps < u64::from(warmup);
        let coefficients = records.iter().zip(self.norms()).map(|(record, average)| {
            let norm = tensor_norm(record, step);
            // A tensor that has never had a gradient has no average to compare with.
            let known = *average > 0.0;
            let coefficient = match (record.count, warm || !known) {
                // Nothing to clip.
                (0, _) => 1.0,
                (_, true) => global,
                (_, false) => rule(threshold * *average, norm),
            };
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

/// The norm that a tensor's clip compares with its limit.
fn tensor_norm(record: &Record, step: &Norms) -> f64 {
    // Where the step's own norm is finite although an element is not, that element becomes 0.
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
