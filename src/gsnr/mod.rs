//! Measures across steps: the signal-to-noise ratio of each parameter's gradient, and the noise scale.
//!
//! Tracking keeps, for every element of a tensor, the mean and the summed squared deviations of its gradient over the
//! steps, by Welford's method, in f32, next to the gradients. A trainer reads one [`GsnrRecord`] for each tensor.

mod accumulation;
mod adam;
pub(crate) mod cpu;
mod moments;
mod room;

pub use accumulation::{AccumulationNoise, Estimate, NoiseEstimate, NoiseScale, SampleNoise};
pub use adam::{AdamMoments, AdamStep};
pub use moments::Moments;
pub use room::Tracking;

pub(crate) use moments::AdamArguments;
pub(crate) use room::{GsnrArguments, UpdateArguments};

use crate::{
    Error, Plan, Record,
    measure::{printable, width_of},
    spec,
};
use bytemuck::{Pod, Zeroable};
use std::fmt;
use wildmatch::WildMatch;

/// Chooses the tensors to track across steps, and the number of steps.
///
/// ```
/// use gradprobe::{DType, Plan, gsnr::GsnrConfig};
///
/// let plan = Plan::new([("weight", DType::F32, 4096), ("bias", DType::F32, 64)])?;
/// let weights = GsnrConfig::new().tensors(["*weight"]).window(100); // for `Config::tracking`
/// assert!(weights.bytes(&plan)? < GsnrConfig::new().bytes(&plan)?);
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GsnrConfig {
    patterns: Vec<String>,
    window: Option<u32>,
}

impl GsnrConfig {
    /// Tracks all tensors, over all steps.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tracks only the tensors whose names match one of these patterns: `*` stands for any characters, `?` for one.
    #[must_use]
    pub fn tensors<P: Into<String>>(self, patterns: impl IntoIterator<Item = P>) -> Self {
        Self { patterns: patterns.into_iter().map(Into::into).collect(), ..self }
    }

    /// Starts each tensor anew after this many steps, at least 2: the step after a full window is the first of the
    /// next.
    #[must_use]
    pub fn window(self, steps: u32) -> Self {
        Self { window: Some(steps), ..self }
    }

    /// Gives the bytes that tracking takes where the gradients are: 8 an element, and 16 KiB a tensor for the median.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::NoSuchTensor`] for a pattern that matches none, [`Error::TooLargeToTrack`].
    pub fn bytes(&self, plan: &Plan) -> Result<u64, Error> {
        let layout = self.layout(plan)?;
        let per_tensor = layout.bins * size_of::<u32>() + layout.tracks.len() * size_of::<(Track, GsnrRecord)>();
        Ok(layout.elements * 8 + per_tensor as u64)
    }

    /// 0 for no window.
    pub(crate) fn steps_of_window(&self) -> u32 {
        self.window.unwrap_or(0)
    }

    /// Places each tensor's state.
    pub(crate) fn layout(&self, plan: &Plan) -> Result<Layout, Error> {
        if let Some(window @ 0..2) = self.window {
            let value = window.to_string();
            return Err(Error::InvalidConfig { option: "window", expected: "at least 2", value });
        }
        let patterns: Vec<WildMatch> = self.patterns.iter().map(|pattern| WildMatch::new(pattern)).collect();
        let mut used = vec![false; patterns.len()];
        let (mut tracks, mut elements, mut slot) = (Vec::new(), 0, 0);
        for tensor in plan.tensors() {
            let matched: Vec<usize> = (0..patterns.len()).filter(|&p| patterns[p].matches(&tensor.name)).collect();
            matched.iter().for_each(|&p| used[p] = true);
            if !patterns.is_empty() && matched.is_empty() {
                tracks.push(Track { offset: Track::UNTRACKED, ..Track::zeroed() });
                continue;
            }
            if u32::try_from(tensor.len).is_err() {
                return Err(Error::TooLargeToTrack { name: tensor.name.clone(), length: tensor.len });
            }
            tracks.push(Track { offset: elements, slot, ..Track::zeroed() });
            slot += 1;
            // Whole groups: code that reads and writes 16 bytes at a time needs no end.
            elements += tensor.len.next_multiple_of(spec::GROUP as u64);
        }
        match used.iter().position(|&used| !used) {
            Some(unused) => Err(Error::NoSuchTensor { pattern: self.patterns[unused].clone() }),
            None => Ok(Layout { tracks, elements, bins: slot as usize * BINS }),
        }
    }
}

/// The place of each tensor's state.
pub(crate) struct Layout {
    /// One track a tensor of the plan.
    pub tracks: Vec<Track>,
    /// Elements of the state, gaps included.
    pub elements: u64,
    /// Bins of all the tracked tensors.
    pub bins: usize,
}

/// The progress of a tensor's tracking (`kernels/gsnr.cuh` has the other side).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Track {
    /// Place of its first element in the state.
    pub offset: u64,
    /// Steps in the state.
    pub steps: u32,
    /// Steps left out.
    pub skipped: u32,
    /// Its number among the tracked tensors: the place of its bins.
    pub slot: u32,
    pub reserved: u32,
    /// Mean of the tensor's norm over the steps.
    pub norm_mean: f64,
    pub norm_deviations: f64,
}
const _: () = assert!(size_of::<Track>() == 40);

impl Track {
    pub(crate) const UNTRACKED: u64 = u64::MAX;

    pub(crate) fn is_tracked(&self) -> bool {
        self.offset != Self::UNTRACKED
    }

    /// Gives the same tensor before its first step.
    pub(crate) fn fresh(&self) -> Self {
        Self { offset: self.offset, slot: self.slot, ..Self::zeroed() }
    }

    /// Gives the scaling of at least two steps.
    pub(crate) fn scaling(&self) -> Scaling {
        let steps = f64::from(self.steps);
        Scaling { degrees: steps - 1.0, effective_steps: steps, ratio_shift: 0.0 }
    }

    /// Counts a step with this record, and says whether to merge it. Leaves out elements that are not finite, or so
    /// large that squares of differences leave f32 ([`spec::LARGE`]).
    pub(crate) fn step(&mut self, record: &Record, window: u32) -> bool {
        let merge = record.nan_count + record.inf_count == 0 && record.max_abs_or_zero <= spec::LARGE;
        if !merge {
            self.skipped += 1;
            return false;
        }
        if window != 0 && self.steps == window {
            *self = self.fresh();
        }
        self.steps += 1;
        let norm = record.finite_sum_squares().sqrt();
        let gap = norm - self.norm_mean;
        self.norm_mean += gap / f64::from(self.steps);
        self.norm_deviations += gap * (norm - self.norm_mean);
        true
    }
}

/// Bins of r, by the upper bits of it as f32: 16 to an octave, each at most 1/16 wide.
pub(crate) const BINS: usize = 4096;
const BIN_SHIFT: u32 = 19;

/// The bin of a ratio.
#[inline(always)]
pub(crate) fn bin_of(ratio: f32) -> usize {
    (ratio.to_bits() >> BIN_SHIFT) as usize
}

/// Gives a number in the middle of a bin, within 3.2 % of all in it. The first bin is below 2^-133: 0.
fn middle_of(bin: usize) -> f64 {
    #[expect(clippy::cast_possible_truncation, reason = "at most 4095")]
    let low = (bin as u32) << BIN_SHIFT;
    if bin == 0 { 0.0 } else { f64::from(f32::from_bits(low | 1 << (BIN_SHIFT - 1))) }
}

/// Gives the median of the ratios in these bins, `defined` of them and at least one.
pub(crate) fn median(bins: &[u32], defined: u64) -> f64 {
    let of_rank = |rank: u64| {
        let mut below = 0;
        let bin = bins.iter().position(|&count| {
            below += u64::from(count);
            below > rank
        });
        middle_of(bin.unwrap_or(BINS - 1))
    };
    (of_rank((defined - 1) / 2) + of_rank(defined / 2)) / 2.0
}

/// The sums over the elements of a chunk, and then of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct GsnrSums {
    pub defined: u64,
    pub below_one: u64,
    pub ratios: f64,
    /// For tracked steps the squared deviations, for Adam's moments the second.
    pub spreads: f64,
    pub squared_means: f64,
    pub nonfinite: u64,
}
const _: () = assert!(size_of::<GsnrSums>() == 48);

impl GsnrSums {
    pub(crate) fn add(&self, other: &Self) -> Self {
        Self {
            defined: self.defined + other.defined,
            below_one: self.below_one + other.below_one,
            ratios: self.ratios + other.ratios,
            spreads: self.spreads + other.spreads,
            squared_means: self.squared_means + other.squared_means,
            nonfinite: self.nonfinite + other.nonfinite,
        }
    }
}

/// Makes ratios from the squared mean and the deviation of each element, and a record from their sums.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Scaling {
    /// The divisor of a deviation that gives a variance.
    pub degrees: f64,
    /// See [`GsnrRecord::effective_steps`].
    pub effective_steps: f64,
    /// See [`GsnrRecord::ratio_shift`].
    pub ratio_shift: f64,
}

/// Holds signal and noise of one tensor's elements over the steps (104 bytes, the same on the device).
///
/// With mean_j and var_j (ddof 1) of element j over k steps, r_j = mean_j² / var_j is its gradient's signal-to-noise
/// ratio (Liu et al. 2020, arXiv 2001.07384). Nothing is added to the divisor: an ε of 1e-8 would turn a ratio of 1 at
/// a gradient scale of 1e-5 into 0.0099. Elements that do not vary are counted instead.
///
/// The precision of an f32 mean and an f32 sum of deviations limits the bounds below. They hold while an element's
/// |mean| is below 1000 standard deviations, over 3000 steps, and while the differences between steps are above 1e-19.
/// Below 2e-23 these vanish, and the element counts as one that does not vary; otherwise an element counts as such only
/// if all its steps are equal. A mean that cancels to less than 2^-22 of the elements is rounding.
///
/// From Adam's moments ([`AdamStep`]) mean_j² and var_j are estimates, and r_j = mean_j² / var_j − 1 /
/// [`effective_steps`](Self::effective_steps). The noise's own part is taken off already, so that r_j may be below 0
/// where there is nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct GsnrRecord {
    /// The number of steps, k.
    pub steps: u32,
    /// Steps left out: with an element that is NaN, infinite or above 2^50 in magnitude.
    pub skipped: u32,
    /// Elements that vary.
    pub defined: u64,
    /// Elements that do not vary. From Adam's moments, those whose var_j is not above 0.
    pub constant: u64,
    /// Elements with r_j < 1.
    pub below_one: u64,
    /// Σ r_j over the elements that vary.
    pub sum_ratio: f64,
    /// Σ var_j.
    pub sum_variance: f64,
    /// Σ mean_j².
    pub sum_squared_mean: f64,
    /// See [`median`](Self::median); NaN for none.
    pub median_or_nan: f64,
    /// Mean of the tensor's L2 norm over the steps.
    pub norm_mean: f64,
    /// Sum of its squared deviations.
    pub norm_deviations: f64,
    /// The number of equal steps that would leave as much noise in the mean: an element's variance over this. It is k
    /// for tracked steps; for Adam's moments, which forget, the 1/c of [`AdamStep`]. 0 below two steps.
    pub effective_steps: f64,
    /// The number taken off each ratio: 1 / `effective_steps` for Adam's moments, 0 for tracked steps.
    pub ratio_shift: f64,
    /// Elements left out because one of their moments of Adam is NaN or infinite. 0 for tracked steps.
    pub nonfinite: u64,
}
const _: () = assert!(size_of::<GsnrRecord>() == 104);

impl GsnrRecord {
    /// Makes the record of these steps, without elements.
    pub(crate) fn of_steps(steps: u32) -> Self {
        Self { steps, median_or_nan: f64::NAN, ..Self::zeroed() }
    }

    /// Makes the record of a track. With fewer than two steps there is no variance, and nothing is defined.
    pub(crate) fn of_track(track: &Track, elements: u64, sums: &GsnrSums, bins: &[u32]) -> Self {
        let known = Self {
            skipped: track.skipped,
            norm_mean: track.norm_mean,
            norm_deviations: track.norm_deviations,
            ..Self::of_steps(track.steps)
        };
        if track.steps < 2 { known } else { known.with_sums(elements, &track.scaling(), sums, bins) }
    }

    /// Completes the record by the sums of the elements; `spreads` are their squared deviations.
    #[expect(clippy::cast_precision_loss, reason = "below 2^32")]
    pub(crate) fn with_sums(self, elements: u64, scaling: &Scaling, sums: &GsnrSums, bins: &[u32]) -> Self {
        let Scaling { degrees, effective_steps, ratio_shift } = *scaling;
        Self {
            defined: sums.defined,
            constant: elements - sums.defined - sums.nonfinite,
            nonfinite: sums.nonfinite,
            below_one: sums.below_one,
            sum_ratio: sums.ratios - ratio_shift * sums.defined as f64,
            sum_variance: sums.spreads / degrees,
            sum_squared_mean: sums.squared_means,
            median_or_nan: if sums.defined == 0 { f64::NAN } else { median(bins, sums.defined) - ratio_shift },
            effective_steps,
            ratio_shift,
            ..self
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "below 2^32")]
    fn of_defined(&self, sum: f64) -> Option<f64> {
        (self.defined > 0).then(|| sum / self.defined as f64)
    }

    /// Mean of r_j over the elements that vary, within 1e-4. For pure noise that was tracked it is about 1/k: see
    /// [`corrected_mean`](Self::corrected_mean).
    pub fn mean(&self) -> Option<f64> {
        self.of_defined(self.sum_ratio)
    }

    /// The mean of r_j without its bias, 0 for pure noise: mean·(k − 3)/(k − 1) − 1/k, from the expectation of the
    /// noncentral F distribution, which k·r_j has for normal gradients. From k = 4 on. For Adam's moments it is the
    /// mean itself.
    pub fn corrected_mean(&self) -> Option<f64> {
        if self.ratio_shift > 0.0 {
            return self.mean();
        }
        let k = f64::from(self.steps);
        self.mean().filter(|_| self.steps > 3).map(|mean| mean * (k - 3.0) / (k - 1.0) - 1.0 / k)
    }

    /// Median of r_j over the elements that vary, within 3.2 % of it before [`ratio_shift`](Self::ratio_shift) is taken
    /// off. `None` for records of [all ranks](crate::ranks), which do not exchange single elements.
    pub fn median(&self) -> Option<f64> {
        (self.defined > 0 && !self.median_or_nan.is_nan()).then_some(self.median_or_nan)
    }

    /// Share of the elements that vary with r_j < 1: more noise than signal.
    #[expect(clippy::cast_precision_loss, reason = "below 2^32")]
    pub fn fraction_below_one(&self) -> Option<f64> {
        self.of_defined(self.below_one as f64)
    }

    /// Coefficient of variation of the tensor's L2 norm over the steps: std (ddof 0) / mean. `None` without steps, and
    /// where the norm is always 0.
    pub fn norm_cv(&self) -> Option<f64> {
        let std = (self.norm_deviations / f64::from(self.steps)).sqrt();
        (self.steps > 0 && self.norm_mean > 0.0).then(|| std / self.norm_mean)
    }

    /// |G|², the squared norm of the true gradient: Σ mean_j² without the part that is noise of the mean. Negative
    /// where the noise hides it. `None` below two steps.
    pub fn squared_gradient(&self) -> Option<f64> {
        (self.steps >= 2).then(|| self.sum_squared_mean - self.sum_variance / self.effective_steps)
    }
}

/// Holds signal and noise of the tracked tensors. `Display` prints a table.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, gsnr::GsnrConfig};
///
/// let plan = Plan::new([("weight", DType::F32, 2)])?;
/// let mut probe = Probe::new(Cpu, plan, Config::new().tracking(GsnrConfig::new()))?;
/// for noise in [-3.0f32, 3.0, -3.0, 3.0] {
///     probe.measure(&[&[1.0f32, 1.0 + noise]])?; // an element without noise, and one with
/// }
/// let report = probe.gsnr()?.report()?;
/// let (name, record) = report.tensors().next().expect("one is tracked");
/// assert_eq!((name, record.constant, record.below_one), ("weight", 1, 1));
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GsnrReport {
    plan: Plan,
    /// Records of the tracked tensors, with their places in the plan.
    records: Vec<(usize, GsnrRecord)>,
}

impl GsnrReport {
    /// # Errors
    /// [`Error::TooFewSteps`] when there are tensors and none has seen two steps.
    pub(crate) fn new(plan: Plan, records: Vec<(usize, GsnrRecord)>) -> Result<Self, Error> {
        match records.iter().map(|(_, record)| record.steps + record.skipped).max() {
            Some(steps @ 0..2) => Err(Error::TooFewSteps { steps }),
            _ => Ok(Self { plan, records }),
        }
    }

    /// The plan of the tensors.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The records, with their tensors' places in the plan.
    pub(crate) fn records(&self) -> &[(usize, GsnrRecord)] {
        &self.records
    }

    /// Gives the table that `Display` prints, of these tensors alone: places among the tracked ones, in this order.
    ///
    /// # Panics
    /// When it is printed with a place that does not exist.
    pub fn table_of<'a>(&'a self, tensors: &'a [usize]) -> impl fmt::Display + 'a {
        Table(self, tensors)
    }

    /// Names and records of the tracked tensors, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &GsnrRecord)> {
        self.records.iter().map(|(index, record)| (self.plan.tensors()[*index].name.as_str(), record))
    }

    /// Gives the simple noise scale of the tracked tensors, tr Σ / |G|², in units of one step's batch (McCandlish et
    /// al. 2018, arXiv 1812.06162): above it, larger batches gain little. `None` where |G|² is not above 0: the
    /// gradient is then not significant beside its noise.
    ///
    /// Its standard error: with n elements of about the same noise, k steps and a scale N, the variance of 1/N relative
    /// to its square is about (2/(k − 1) + 4N/(k − 1) + 2N²/(k(k − 1)))/n.
    pub fn noise_scale(&self) -> Option<f64> {
        let of_two_steps = || self.records.iter().filter_map(|(_, record)| Some((record, record.squared_gradient()?)));
        let gradient: f64 = of_two_steps().map(|(_, squared)| squared).sum();
        let noise: f64 = of_two_steps().map(|(record, _)| record.sum_variance).sum();
        (gradient > 0.0).then(|| noise / gradient)
    }
}

impl fmt::Display for GsnrReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.table_of(&(0..self.records.len()).collect::<Vec<_>>()).fmt(f)
    }
}

/// A table of these tensors.
struct Table<'a>(&'a GsnrReport, &'a [usize]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(report, tensors) = *self;
        let all: Vec<(&str, &GsnrRecord)> = report.tensors().collect();
        let names: Vec<String> = tensors.iter().map(|&index| printable(all[index].0)).collect();
        let rows = || tensors.iter().map(|&index| all[index].1).zip(&names);
        let width = width_of(&names, "tensor");
        let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |x| format!("{x:.3e}"));
        let percent = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |x| format!("{:.1}", 100.0 * x));
        writeln!(
            f,
            "{:width$} {:>6} {:>8} {:>12} {:>12} {:>10} {:>9} {:>10} {:>8}",
            "tensor", "steps", "skipped", "gsnr median", "gsnr mean", "corrected", "% below 1", "constant", "norm cv"
        )?;
        for (record, name) in rows() {
            writeln!(
                f,
                "{name:width$} {:>6} {:>8} {:>12} {:>12} {:>10} {:>9} {:>10} {:>8}",
                record.steps,
                record.skipped,
                number(record.median()),
                number(record.mean()),
                number(record.corrected_mean()),
                percent(record.fraction_below_one()),
                record.constant,
                record.norm_cv().map_or_else(|| "–".to_owned(), |cv| format!("{cv:.3}")),
            )?;
        }
        for (record, name) in rows().filter(|(record, _)| record.nonfinite > 0) {
            writeln!(f, "{name}: {} elements left out, whose moments are NaN or infinite", record.nonfinite)?;
        }
        match report.noise_scale() {
            Some(scale) => writeln!(f, "noise scale {scale:.4} batches"),
            None if report.records.iter().all(|(_, record)| record.steps < 2) => {
                writeln!(f, "noise scale: no tensor has two steps")
            }
            None => writeln!(f, "noise scale: the gradient is not significant beside its noise"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_hold_what_is_near_their_middle() {
        for ratio in [1e-35f32, 3e-20, 1e-3, 0.999, 1.0, 1.0624, 7.7, 1e10, 3e38] {
            let middle = middle_of(bin_of(ratio));
            assert!((middle / f64::from(ratio) - 1.0).abs() < 0.032, "{ratio:e} in the bin of {middle:e}");
        }
        assert_eq!(middle_of(bin_of(0.0)), 0.0);
        assert!(bin_of(f32::MAX) < BINS);
    }

    #[test]
    fn a_plan_without_tensors_has_a_report_without_records() {
        let plan = Plan::new([] as [(&str, crate::DType, u64); 0]).unwrap();
        let report = GsnrReport::new(plan, Vec::new()).unwrap();
        assert_eq!((report.tensors().len(), report.noise_scale()), (0, None));
    }

    #[test]
    fn medians_are_the_mean_of_the_two_in_the_middle() {
        let mut bins = vec![0; BINS];
        for ratio in [0.1, 10.0] {
            bins[bin_of(ratio)] += 1;
        }
        assert!((median(&bins, 2) / 5.05 - 1.0).abs() < 0.032);
        bins[bin_of(0.3)] += 1;
        assert!((median(&bins, 3) / 0.3 - 1.0).abs() < 0.032);
    }
}
