//! The simple noise scale from gradient accumulation: from norms of the running sum after each micro-batch, without a
//! copy of a gradient.

use crate::{
    Error, Plan, Report,
    measure::{printable, to_f64, width_of},
    ranks::SampleSquares,
};
use std::fmt;

/// Estimates tr Σ and |G|² of a micro-batch's gradient, per tensor and in total, from reports on the running sum.
///
/// A trainer that accumulates K micro-batches has in its gradient buffer the sum S_k of the first k gradients, each
/// with mean G and covariance Σ, independent of the others. Measured after each of them, it has
///
/// ```text
/// E ‖S_k‖² = k² |G|² + k tr Σ
/// ```
///
/// a line in two unknowns for every k. The simple noise scale tr Σ / |G|² (McCandlish et al. 2018, arXiv 1812.06162) is
/// in micro-batches. Multiply it by the examples in one to have it in examples.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, gsnr::AccumulationNoise};
///
/// let plan = Plan::new([("weight", DType::F32, 2)])?;
/// let mut noise = AccumulationNoise::new(plan.clone(), 4)?;
/// let mut probe = Probe::new(Cpu, plan, Config::new())?;
/// for step in 0..100u8 {
///     let mut sum = [0.0f32; 2];
///     for micro_batch in 1..=4u8 {
///         sum[0] += 1.0; // a gradient of (1, ±3)
///         sum[1] += if (step ^ step / 2 ^ micro_batch) % 2 == 0 { 3.0 } else { -3.0 };
///         probe.measure(&[&sum])?;
///         noise.add(micro_batch.into(), &probe.wait()?)?;
///     }
/// }
/// println!("{noise}");
/// # Ok::<(), gradprobe::Error>(())
/// ```
///
/// # The weights
///
/// ‖S_k‖² of successive k share most of their noise. Their increments z_k = ‖S_k‖² − ‖S_j‖² do not, where j is the last
/// seen before k. Write S_k = k G + N_k. The covariance of ‖N_j‖² and ‖N_k‖², j < k, is 2 j² tr Σ² for normal noise. So
/// the increments of ‖N_k‖² are uncorrelated with variance 2 (k² − j²) tr Σ². Their expectation is E z_k = (k² − j²)
/// |G|² + (k − j) tr Σ. Least squares with weights 1 / (k² − j²) are then the best linear unbiased estimate while the
/// noise outweighs the signal, ‖N_k‖ ≫ k |G|, the hard case for a noise scale. Elsewhere they are unbiased still. For
/// an accumulation with L as its last micro-batch seen, h = Σ (k − j)/(k + j) and u = Σ z_k / (k + j) give
///
/// ```text
/// |G|² = (h ‖S_L‖² − L u) / (L² (h − 1))          tr Σ = (u − ‖S_L‖² / L) / (h − 1)
/// ```
///
/// # Averages and errors
///
/// Numerator and denominator are averaged over accumulations separately, with equal weights or with
/// [`decay`](Self::decay), and divided at the end. The errors come from the differences between accumulations, and
/// assume nothing within one. That of the ratio is the linear one, towards which the jackknife over accumulations
/// tends. From three accumulations on, |G|² counts as significant when it is above Student's two-sided 95 % bound
/// (about 2.5 % of tensors without a signal pass).
///
/// # Conditions
///
/// * Where the loss of each micro-batch is divided by K, or by any other constant, the noise scale is the same; |G|² and
///   tr Σ are those of the gradients as they were added: K² times too small. A loss scale that changes must be undone
///   before the measurement.
/// * Measure the sum before it is clipped, and before gradients are averaged over ranks: after that, a micro-batch is
///   that of all ranks together.
/// * A sum kept in f16 or bf16 has rounding in it that counts as noise.
/// * A tensor with a NaN or Inf stays so until its sum starts anew. That tensor, and the total, leave out the
///   measurements from then on and count them. They use the earlier ones, if those are two micro-batches or more. The
///   same holds for a report that a trainer did not get.
#[derive(Clone, Debug)]
pub struct AccumulationNoise {
    plan: Plan,
    micro_batches: u32,
    decay: f64,
    /// The micro-batch of the last report, 0 when the next begins an accumulation, and its measurement.
    last: u32,
    last_step: u64,
    /// One a tensor, and the total's.
    series: Vec<Series>,
}

impl AccumulationNoise {
    /// Takes reports on these tensors, in accumulations of `micro_batches`, at least 2.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn new(plan: Plan, micro_batches: u32) -> Result<Self, Error> {
        if micro_batches < 2 {
            let value = micro_batches.to_string();
            return Err(Error::InvalidConfig { option: "micro_batches", expected: "at least 2", value });
        }
        let series = vec![Series::default(); plan.tensors().len() + 1];
        Ok(Self { plan, micro_batches, decay: 1.0, last: 0, last_step: 0, series })
    }

    /// Averages with weights that fall by this factor, above 0 and below 1, from each accumulation to the one before:
    /// 0.99 remembers about 100. The weights are divided by their sum, which corrects the start.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn decay(self, decay: f64) -> Result<Self, Error> {
        check_decay(decay)?;
        Ok(Self { decay, ..self })
    }

    /// Adds the report on the sum of the first `micro_batch` micro-batches, counted from 1. Reports may be missing. The
    /// last of an accumulation, or else the first of the next, completes it.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`]; [`Error::MicroBatchOrder`] for a micro-batch that is not above the last and not
    /// the first, or is beyond the accumulation, and for a measurement not after the last. Nothing is changed then.
    pub fn add(&mut self, micro_batch: u32, report: &Report) -> Result<(), Error> {
        self.plan.check_report(report.plan())?;
        let Self { last, last_step, micro_batches, .. } = *self;
        let follows = micro_batch > last || micro_batch == 1;
        if !follows || !(1..=micro_batches).contains(&micro_batch) || report.step() <= last_step {
            let (given, step, of) = (micro_batch, report.step(), micro_batches);
            return Err(Error::MicroBatchOrder { given, step, last, last_step, of });
        }
        if micro_batch <= last {
            self.complete();
        }
        let squares =
            report.records().iter().map(|r| if r.has_nonfinite() { f64::NAN } else { r.finite_sum_squares() });
        let total: f64 = squares.clone().sum();
        for (series, square) in self.series.iter_mut().zip(squares.chain([total])) {
            series.add(micro_batch.into(), square);
        }
        (self.last, self.last_step) = (micro_batch, report.step());
        if micro_batch == micro_batches {
            self.complete();
        }
        Ok(())
    }

    fn complete(&mut self) {
        self.last = 0;
        for series in &mut self.series {
            series.complete(self.decay);
        }
    }

    /// Names and estimates of the tensors, in the plan's order, from the complete accumulations.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, NoiseEstimate)> {
        self.plan.tensors().iter().zip(&self.series).map(|(spec, series)| (spec.name.as_str(), series.estimate()))
    }

    /// The estimate of all tensors together.
    pub fn total(&self) -> NoiseEstimate {
        self.series[self.plan.tensors().len()].estimate()
    }
}

/// Estimates tr Σ and |G|² of one sample's gradient from two squared norms that ranks have anyway: of all samples of a
/// step, each before they were averaged, and of their mean (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1,
/// with 1 and N samples for the two batch sizes):
///
/// ```text
/// |G|² = (N ‖ḡ‖² − mean ‖g‖²) / (N − 1)          tr Σ = (mean ‖g‖² − ‖ḡ‖²) N / (N − 1)
/// ```
///
/// Each is averaged over steps and has an error, as those of [`AccumulationNoise`]. Samples are of equal size: the batches of
/// ranks, or their micro-batches. Gradients of all are of the same loss, so that ḡ is the mean of the g.
#[derive(Clone, Copy, Debug)]
pub struct SampleNoise {
    series: Series,
    decay: f64,
}

impl Default for SampleNoise {
    fn default() -> Self {
        Self::new()
    }
}

impl SampleNoise {
    /// Starts without a step.
    pub fn new() -> Self {
        Self { series: Series::default(), decay: 1.0 }
    }

    /// Averages as [`AccumulationNoise::decay`] does.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn decay(self, decay: f64) -> Result<Self, Error> {
        check_decay(decay)?;
        Ok(Self { decay, ..self })
    }

    /// Adds a step: the squares of its samples, and the report on their mean. One that is not finite, or of a single
    /// sample, is left out and counted.
    pub fn add(&mut self, samples: &SampleSquares, mean: &Report) {
        let count = to_f64(samples.samples);
        let norm = mean.outputs().total_norm;
        // As the first of N micro-batches, and the sum of all.
        self.series.add(1.0, samples.mean);
        if samples.samples > 1 {
            self.series.add(count, if norm.is_finite() { (count * norm).powi(2) } else { f64::NAN });
        }
        self.series.complete(self.decay);
    }

    /// Gives the estimate from the steps so far.
    pub fn estimate(&self) -> NoiseEstimate {
        self.series.estimate()
    }
}

/// # Errors
/// [`Error::InvalidConfig`].
fn check_decay(decay: f64) -> Result<(), Error> {
    if decay > 0.0 && decay < 1.0 {
        return Ok(());
    }
    Err(Error::InvalidConfig { option: "decay", expected: "above 0 and below 1", value: decay.to_string() })
}

/// The running sums of one tensor.
#[derive(Clone, Copy, Debug, Default)]
struct Series {
    /// Of the accumulation under way: its last micro-batch and ‖S‖² there, Σ (k − j)/(k + j) and Σ z/(k + j).
    last: f64,
    square: f64,
    h: f64,
    u: f64,
    /// Micro-batches left out.
    skipped: u64,
    /// Accumulations in the averages, and those with too few micro-batches for them.
    accumulations: u64,
    incomplete: u64,
    /// Σ p and Σ p² of the weights p; Σ p x, Σ p² x and Σ p² x xᵀ of x = (|G|², tr Σ).
    weight: f64,
    weight2: f64,
    sum: [f64; 2],
    sum2: [f64; 2],
    products: [f64; 3],
}

impl Series {
    fn add(&mut self, k: f64, square: f64) {
        if square.is_nan() {
            self.skipped += 1;
            return;
        }
        self.h += (k - self.last) / (k + self.last);
        self.u += (square - self.square) / (k + self.last);
        (self.last, self.square) = (k, square);
    }

    /// Adds the accumulation to the averages. With one micro-batch h is 1, and there is no line.
    fn complete(&mut self, decay: f64) {
        let Self { last, square, h, u, .. } = *self;
        (self.last, self.square, self.h, self.u) = (0.0, 0.0, 0.0, 0.0);
        if h <= 1.0 {
            self.incomplete += 1;
            return;
        }
        let noise = (u - square / last) / (h - 1.0);
        let signal = (h * square - last * u) / (last * last * (h - 1.0));
        let decay2 = decay * decay;
        self.accumulations += 1;
        self.weight = self.weight * decay + 1.0;
        self.weight2 = self.weight2 * decay2 + 1.0;
        for (i, x) in [signal, noise].into_iter().enumerate() {
            self.sum[i] = self.sum[i] * decay + x;
            self.sum2[i] = self.sum2[i] * decay2 + x;
        }
        for (product, x) in self.products.iter_mut().zip([signal * signal, signal * noise, noise * noise]) {
            *product = *product * decay2 + x;
        }
    }

    fn estimate(&self) -> NoiseEstimate {
        let mean = self.sum.map(|sum| sum / self.weight);
        // The number of accumulations of equal weight that would be worth as much.
        let worth = self.weight * self.weight / self.weight2;
        let enough = self.accumulations >= 3 && worth > 2.0;
        // Covariance of the two means: Σ p² (x − mean)(x − mean)ᵀ / (Σ p)², with the usual correction for the mean.
        let covariance = |i: usize, j: usize| {
            let about_mean = self.products[i + j] - mean[i] * self.sum2[j] - mean[j] * self.sum2[i]
                + mean[i] * mean[j] * self.weight2;
            about_mean / (self.weight * self.weight) * worth / (worth - 1.0)
        };
        let error = |variance: f64| enough.then(|| variance.max(0.0).sqrt());
        let of = |i: usize| {
            let value = Estimate { value: mean[i], standard_error: error(covariance(i, i)) };
            (self.accumulations > 0).then_some(value)
        };
        let squared_gradient = of(0);
        let significant = |e: Estimate| e.standard_error.map(|error| e.value > error * student(worth - 1.0));
        let noise_scale = match squared_gradient.and_then(significant) {
            None => NoiseScale::TooFewAccumulations,
            Some(false) => NoiseScale::NotSignificant,
            Some(true) => {
                let value = mean[1] / mean[0];
                let variance = covariance(1, 1) - 2.0 * value * covariance(0, 1) + value * value * covariance(0, 0);
                NoiseScale::Significant(Estimate { value, standard_error: error(variance / (mean[0] * mean[0])) })
            }
        };
        let Self { accumulations, incomplete, skipped, .. } = *self;
        NoiseEstimate { accumulations, incomplete, skipped, squared_gradient, sum_variance: of(1), noise_scale }
    }
}

/// Student's two-sided 95 % bound, from Fisher's expansion about the normal one: within 3 % from 2 degrees on.
fn student(degrees: f64) -> f64 {
    let x = 1.0 / degrees;
    1.96 + x * (2.372 + x * (2.823 + x * 2.556))
}

/// A number and its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Its standard error; `None` below three accumulations.
    pub standard_error: Option<f64>,
}

/// tr Σ / |G|², where |G|² can be told from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NoiseScale {
    /// In micro-batches.
    Significant(Estimate),
    /// |G|² is not above 0 by more than its error: the gradient cannot be told from noise yet.
    NotSignificant,
    /// Below three accumulations there is no error to say so.
    TooFewAccumulations,
}

impl NoiseScale {
    /// The noise scale, if |G|² is significant.
    pub fn value(self) -> Option<f64> {
        match self {
            Self::Significant(estimate) => Some(estimate.value),
            Self::NotSignificant | Self::TooFewAccumulations => None,
        }
    }
}

/// The estimate for a tensor, or for all together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseEstimate {
    /// Accumulations in the estimates.
    pub accumulations: u64,
    /// Accumulations left out, with fewer than two finite micro-batches.
    pub incomplete: u64,
    /// Micro-batches left out: the sum had a NaN or Inf.
    pub skipped: u64,
    /// |G|², the squared norm of the true gradient; may be negative. `None` without an accumulation.
    pub squared_gradient: Option<Estimate>,
    /// tr Σ of one micro-batch.
    pub sum_variance: Option<Estimate>,
    /// Their ratio.
    pub noise_scale: NoiseScale,
}

impl fmt::Display for AccumulationNoise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.tensors().map(|(name, _)| printable(name)).chain(["total".to_owned()]).collect();
        let width = width_of(&names, "");
        let number = |estimate: Option<Estimate>| match estimate {
            Some(Estimate { value, standard_error: Some(error) }) => format!("{value:.3e} ± {error:.1e}"),
            Some(Estimate { value, standard_error: None }) => format!("{value:.3e}"),
            None => "–".to_owned(),
        };
        writeln!(f, "{:width$} {:>5} {:>8} {:>22} {:>22} noise scale", "tensor", "sums", "skipped", "|G|²", "tr Σ")?;
        for (estimate, name) in self.tensors().map(|(_, estimate)| estimate).chain([self.total()]).zip(&names) {
            let scale = match estimate.noise_scale {
                NoiseScale::Significant(scale) => number(Some(scale)),
                NoiseScale::NotSignificant => "not significant".to_owned(),
                NoiseScale::TooFewAccumulations => "too few".to_owned(),
            };
            writeln!(
                f,
                "{name:width$} {:>5} {:>8} {:>22} {:>22} {scale}",
                estimate.accumulations,
                estimate.skipped,
                number(estimate.squared_gradient),
                number(estimate.sum_variance),
            )?;
        }
        Ok(())
    }
}
