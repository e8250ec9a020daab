//! Counts elements by magnitude: by exponent, with four bins to an octave. From the counts follow quantiles, dead
//! elements, losses in another number format, and the loss scale that avoids them.

pub(crate) mod cpu;
mod room;

pub use room::Histograms;

pub(crate) use room::HistogramArguments;

pub(crate) use room::launch_of_all;

use crate::{
    Error, Plan, Record, Report,
    clip::{divisor, magnitude_over},
    measure::{printable, width_of},
};
use bytemuck::{Pod, Zeroable};
use std::fmt;

/// Bits of an f32 magnitude below those that make its bin.
const SHIFT: u32 = 21;

/// Bounds a number: it is at least `low` and at most `high`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// The lower bound.
    pub low: f64,
    /// The upper bound.
    pub high: f64,
}

/// A number format that gradients may be cast to. Casts round to the nearest, ties to even, and do not saturate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    BF16,
    /// E4M3 of the OCP 8-bit Floating Point Specification: no infinity, largest number 448.
    E4M3,
    /// E5M2 of the same: largest number 57344.
    E5M2,
}

/// The magnitudes at which the result of a cast changes.
struct Limits {
    /// At most this becomes 0: half the smallest subnormal, which ties with 0.
    vanishes: f64,
    /// From here on the result is normal: half a unit below the smallest normal number, with which it ties.
    normal: f64,
    /// Half a unit above the largest number.
    overflows: f64,
    /// Whether that tie goes to the number that does not exist.
    tie_overflows: bool,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 4] = [Format::F16, Format::BF16, Format::E4M3, Format::E5M2];

    /// `f16`, `bf16`, `e4m3` or `e5m2`.
    pub const fn name(self) -> &'static str {
        match self {
            Format::F16 => "f16",
            Format::BF16 => "bf16",
            Format::E4M3 => "e4m3",
            Format::E5M2 => "e5m2",
        }
    }

    fn limits(self) -> Limits {
        // Fraction bits, exponent of the smallest normal number, largest number, and the exponent of its unit.
        let (fraction_bits, lowest, largest, unit) = match self {
            Format::F16 => (10, -14, 65_504.0, 5),
            Format::BF16 => (7, -126, f64::from(f32::from_bits(0x7f7f_0000)), 120),
            Format::E4M3 => (3, -6, 448.0, 5),
            Format::E5M2 => (2, -14, 57_344.0, 13),
        };
        let half_subnormal = 2f64.powi(lowest - fraction_bits - 1);
        Limits {
            vanishes: half_subnormal,
            normal: 2f64.powi(lowest) - half_subnormal,
            overflows: largest + 2f64.powi(unit - 1),
            // The fraction of 448 is even, that of the others' largest odd.
            tie_overflows: self != Format::E4M3,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Holds the effects of a cast to another format, as shares, 0 to 1, of the finite elements that are not 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FormatShares {
    /// Become 0.
    pub underflow: Bounds,
    /// Become subnormal: they keep fewer bits than the format has.
    pub subnormal: Bounds,
    /// Become infinite, or NaN in E4M3.
    pub overflow: Bounds,
}

/// Counts the elements of a tensor by the upper bits of |x| as f32: 8 of the exponent and 2 of the fraction (8192
/// bytes, the same on the device). All counts are exact.
///
/// Bin b holds the magnitudes from [`lowest_of`](Self::lowest_of) to [`highest_of`](Self::highest_of): a quarter of an
/// octave's numbers, so that the highest is at most 1.25 times the lowest. Bins 0 to 3 share f32's subnormals, a quarter
/// of 2^-126 each.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, histogram::Format};
///
/// let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 4)])?, Config::new().histogram())?;
/// let report = probe.histogram()?.measure(&[&[1e-9f32, 1e-3, 1e-3, 1e-2]])?;
/// let histogram = &report.histograms()[0];
/// assert!(histogram.quantile(0.5).unwrap().low <= 1e-3);
/// assert_eq!(histogram.shares(Format::F16, 0).unwrap().underflow.low, 0.25); // 1e-9 becomes 0
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Histogram {
    /// Finite elements that are not 0, by their bins.
    pub bins: [u64; Histogram::BINS],
    /// Elements that are +Inf or −Inf.
    pub inf_count: u64,
    /// Elements that are NaN.
    pub nan_count: u64,
    /// Elements equal to 0; −0 counts.
    pub zero_count: u64,
    /// Unused; 0.
    pub reserved: u64,
}

// The other side of these numbers is in kernels/histogram.cu.
const _: () = {
    assert!(size_of::<Histogram>() == 8 << (31 - SHIFT));
    assert!(Histogram::BINS == 0x7f80_0000 >> SHIFT);
    assert!(std::mem::offset_of!(Histogram, inf_count) == 8 * Histogram::BINS);
    assert!(std::mem::offset_of!(Histogram, nan_count) == 8 * (Histogram::BINS + 1));
    assert!(std::mem::offset_of!(Histogram, zero_count) == 8 * (Histogram::BINS + 2));
};

impl Default for Histogram {
    fn default() -> Self {
        Self::zeroed()
    }
}

/// The bins that are not empty.
impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bins = self.occupied().map(|(bin, count)| (Self::lowest_of(bin), count));
        f.debug_map()
            .entries(bins)
            .entry(&"zero", &self.zero_count)
            .entry(&"inf", &self.inf_count)
            .entry(&"nan", &self.nan_count)
            .finish()
    }
}

impl Histogram {
    /// Bins of the finite numbers.
    pub const BINS: usize = 1020;
    /// Octaves that [`loss_scale`](Self::loss_scale) leaves between the largest element and the format's end.
    pub const MARGIN: u32 = 2;

    /// Gives the bytes that a plan's histograms take where the gradients are: 8 KiB a tensor.
    pub fn bytes(plan: &Plan) -> u64 {
        (plan.tensors().len() * size_of::<Self>()) as u64
    }

    /// Gives the bin of a finite number; 0 has none, and gives the first.
    pub fn bin_of(x: f32) -> usize {
        (x.abs().to_bits() >> SHIFT) as usize
    }

    /// Gives the smallest magnitude in a bin, which must be below [`BINS`](Self::BINS). 0 is in none.
    pub fn lowest_of(bin: usize) -> f32 {
        if bin == 0 { f32::from_bits(1) } else { Self::at_edge(bin, 0) }
    }

    /// Gives the largest magnitude in a bin, which must be below [`BINS`](Self::BINS).
    pub fn highest_of(bin: usize) -> f32 {
        Self::at_edge(bin + 1, 1)
    }

    /// Gives the f32 as many places below the lower edge of a bin.
    #[expect(clippy::cast_possible_truncation, reason = "a bin has ten bits")]
    fn at_edge(bin: usize, places_below: u32) -> f32 {
        f32::from_bits(((bin as u32) << SHIFT) - places_below)
    }

    /// Adds the counts of both: of shards, micro-batches, ranks or tensors.
    #[must_use]
    pub fn merge(&self, other: &Self) -> Self {
        let mut sum = *self;
        sum.bins.iter_mut().zip(&other.bins).for_each(|(count, more)| *count += more);
        sum.inf_count += other.inf_count;
        sum.nan_count += other.nan_count;
        sum.zero_count += other.zero_count;
        sum
    }

    /// Elements, finite or not.
    pub fn count(&self) -> u64 {
        self.finite_count() + self.inf_count + self.nan_count
    }

    /// Elements that are neither NaN nor ±Inf.
    pub fn finite_count(&self) -> u64 {
        self.nonzero_count() + self.zero_count
    }

    /// Finite elements that are not 0.
    pub fn nonzero_count(&self) -> u64 {
        self.bins.iter().sum()
    }

    /// Bins that have elements, with their counts.
    pub(crate) fn occupied(&self) -> impl DoubleEndedIterator<Item = (usize, u64)> {
        self.bins.iter().copied().enumerate().filter(|&(_, count)| count > 0)
    }

    /// Gives the q-quantile of |x| over the m finite elements: the ⌈q·m⌉th smallest, the smallest for q = 0. Bounds are
    /// the ends of its bin, so `high` is at most 1.25 · `low` from 2^-126 on, and below within 2^-128; a 0 is exact.
    /// `None` when nothing is finite or q is not in 0 ..= 1.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 2^40")]
    pub fn quantile(&self, q: f64) -> Option<Bounds> {
        let finite = self.finite_count();
        if finite == 0 || !(0.0..=1.0).contains(&q) {
            return None;
        }
        let rank = ((q * to_f64(finite)).ceil() as u64).clamp(1, finite);
        let mut reached = self.zero_count;
        if rank <= reached {
            return Some(Bounds { low: 0.0, high: 0.0 });
        }
        let (bin, _) = self.occupied().find(|&(_, count)| {
            reached += count;
            rank <= reached
        })?;
        Some(Bounds { low: Self::lowest_of(bin).into(), high: Self::highest_of(bin).into() })
    }

    /// Estimates the q-quantile of |x| over the m finite elements, as one number: the ⌈q·m⌉th smallest, if those of its
    /// bin lay evenly spread in it. `None` where [`quantile`](Self::quantile) is, which gives the bounds.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 2^40")]
    pub fn quantile_estimate(&self, q: f64) -> Option<f64> {
        let finite = self.finite_count();
        if finite == 0 || !(0.0..=1.0).contains(&q) {
            return None;
        }
        let rank = ((q * to_f64(finite)).ceil() as u64).clamp(1, finite);
        let mut below = self.zero_count;
        if rank <= below {
            return Some(0.0);
        }
        for (bin, count) in self.occupied() {
            if rank <= below + count {
                let (low, high) = (f64::from(Self::at_edge(bin, 0)), f64::from(Self::upper_edge(bin)));
                return Some(low + (high - low) * (to_f64(rank - below) / to_f64(count)));
            }
            below += count;
        }
        None
    }

    /// Gives the upper edge of a bin, where the next begins; of the last, the largest f32.
    fn upper_edge(bin: usize) -> f32 {
        if bin + 1 < Self::BINS { Self::at_edge(bin + 1, 0) } else { f32::MAX }
    }

    /// Gives the share of all elements that are finite with |x| < `threshold`, zeros included: the dead elements, as
    /// [`Record::dead_fraction`](crate::Record::dead_fraction) counts them. Exact where the threshold is the lower end
    /// of a bin – a power of two times 1, 1.25, 1.5 or 1.75 –; else the bounds differ by the share of its bin. `None`
    /// for an empty tensor and a NaN.
    pub fn fraction_below(&self, threshold: f32) -> Option<Bounds> {
        if self.count() == 0 || threshold.is_nan() {
            return None;
        }
        let zeros = if threshold > 0.0 { self.zero_count } else { 0 };
        let (low, high) = self.count_below(threshold.into(), false);
        Some(share_of(zeros + low, zeros + high, self.count()))
    }

    /// Gives the smallest |x| over the finite elements that are not 0 (`low`, a lower bound) and the largest (`high`,
    /// an upper bound): both within their bins. `None` when there are none.
    pub fn range(&self) -> Option<Bounds> {
        let (first, _) = self.occupied().next()?;
        let (last, _) = self.occupied().next_back()?;
        Some(Bounds { low: Self::lowest_of(first).into(), high: Self::highest_of(last).into() })
    }

    /// Gives the dynamic range: octaves from the smallest to the largest |x| over the finite elements that are not 0,
    /// log2 of their quotient. The bounds differ by the width of two bins, 0.64 at most unless the smallest is below
    /// 2^-126.
    pub fn octaves(&self) -> Option<Bounds> {
        let (first, _) = self.occupied().next()?;
        let (last, _) = self.occupied().next_back()?;
        let octaves = |from: f32, to: f32| (f64::from(to) / f64::from(from)).log2().max(0.0);
        Some(Bounds {
            low: octaves(Self::highest_of(first), Self::lowest_of(last)),
            high: octaves(Self::lowest_of(first), Self::highest_of(last)),
        })
    }

    /// Gives the effects of a cast of x · 2^`k` to `format`, as shares of the finite elements that are not 0; `None`
    /// when there are none.
    ///
    /// With p fraction bits and 2^e the smallest normal number, x becomes 0 when |x|·2^k ≤ 2^(e-p-1), subnormal when it
    /// is between that and 2^e − 2^(e-p-1), and overflows from half a unit above the largest number on: 65520 for f16,
    /// 61440 for E5M2, above 464 for E4M3. Each bound is off by no more than the share of the bin its limit lies in.
    pub fn shares(&self, format: Format, k: i32) -> Option<FormatShares> {
        let nonzeros = self.nonzero_count();
        if nonzeros == 0 {
            return None;
        }
        let limits = format.limits();
        let (zero_low, zero_high) = self.count_below(unscaled(limits.vanishes, k), true);
        let (small_low, small_high) = self.count_below(unscaled(limits.normal, k), false);
        let (fits_low, fits_high) = self.count_below(unscaled(limits.overflows, k), !limits.tie_overflows);
        Some(FormatShares {
            underflow: share_of(zero_low, zero_high, nonzeros),
            subnormal: share_of(small_low.saturating_sub(zero_high), small_high - zero_low, nonzeros),
            overflow: share_of(nonzeros - fits_high, nonzeros - fits_low, nonzeros),
        })
    }

    /// Recommends the loss scale 2^k: the largest k at which no finite element can overflow in `format`, less
    /// [`MARGIN`](Self::MARGIN) octaves. `None` when nothing is finite and not 0.
    pub fn loss_scale(&self, format: Format) -> Option<i32> {
        self.loss_scale_with_margin(format, Self::MARGIN)
    }

    /// Does as [`loss_scale`](Self::loss_scale) with another margin, in octaves. Goes by the upper end of the largest
    /// element's bin: the k of the element itself may be 1 more.
    pub fn loss_scale_with_margin(&self, format: Format, margin: u32) -> Option<i32> {
        let highest = self.range()?.high;
        let limits = format.limits();
        let fits = |k: i32| {
            let limit = unscaled(limits.overflows, k);
            highest < limit || (highest == limit && !limits.tie_overflows)
        };
        // The quotient is at least 2^near, up to a rounding, and below twice that; a tie may not fit.
        #[expect(clippy::cast_possible_truncation, reason = "within the exponents of f32")]
        let near = (limits.overflows / highest).log2().floor() as i32;
        let largest = (near - 1..=near + 1).rev().find(|&k| fits(k))?;
        i32::try_from(i64::from(largest) - i64::from(margin)).ok()
    }

    /// Recommends the loss scale for gradients of a loss that was scaled by `current`, 1 for none:
    /// [`loss_scale`](Self::loss_scale) times that. Kept within the normal numbers of f32; `None` when nothing is
    /// finite and not 0.
    #[expect(clippy::cast_possible_truncation, reason = "kept within f32, and a power of two times an f32")]
    pub fn recommended_loss_scale(&self, current: f32, format: Format) -> Option<f32> {
        let scale = f64::from(current) * f64::from(self.loss_scale(format)?).exp2();
        Some(scale.clamp(f64::from(f32::MIN_POSITIVE), 2f64.powi(127)) as f32)
    }

    /// Describes how it contradicts a record, whose elements are divided by `divisor`; `None` if it does not.
    fn difference(&self, record: &Record, divisor: f64) -> Option<String> {
        let counts = [
            ("elements", self.count(), record.count),
            ("NaN", self.nan_count, record.nan_count),
            ("infinite elements", self.inf_count, record.inf_count),
            ("zeros", self.zero_count, record.zero_count),
        ];
        if let Some((of, own, records)) = counts.into_iter().find(|(_, own, records)| own != records) {
            return Some(format!("{own} {of} in the histogram, {records} in the report"));
        }
        let extremes = [
            ("smallest", self.occupied().next(), record.min_nonzero_abs_or_infinity),
            ("largest", self.occupied().next_back(), record.max_abs_or_zero),
        ];
        extremes.into_iter().find_map(|(which, bin, of_record)| {
            // As a record has them: rounding leaves their order.
            let [low, high] = [Self::lowest_of(bin?.0), Self::highest_of(bin?.0)].map(|x| magnitude_over(x, divisor));
            let differs = !(low..=high).contains(&of_record);
            differs.then(|| {
                format!(
                    "{which} magnitude from {low:.3e} to {high:.3e} in the histogram, {of_record:.3e} in the report"
                )
            })
        })
    }

    /// Counts the finite elements that are not 0 with |x| < `limit`, or ≤ with `or_equal`: the least, and the most.
    fn count_below(&self, limit: f64, or_equal: bool) -> (u64, u64) {
        let below = |x: f32| f64::from(x) < limit || (or_equal && f64::from(x) == limit);
        let (mut low, mut high) = (0, 0);
        for (bin, count) in self.occupied() {
            low += if below(Self::highest_of(bin)) { count } else { 0 };
            high += if below(Self::lowest_of(bin)) { count } else { 0 };
        }
        (low, high)
    }
}

fn share_of(low: u64, high: u64, whole: u64) -> Bounds {
    Bounds { low: to_f64(low) / to_f64(whole), high: to_f64(high) / to_f64(whole) }
}

/// Gives the x for which x · 2^k is `limit`: exact, as long as it is a normal f64, and beyond f32 otherwise.
fn unscaled(limit: f64, k: i32) -> f64 {
    limit * 2f64.powi(k.saturating_neg().clamp(-800, 800))
}

/// Counts stay below 2^53, so the conversion is exact.
#[expect(clippy::cast_precision_loss, reason = "a plan holds at most 2^40 elements")]
fn to_f64(count: u64) -> f64 {
    count as f64
}

/// Holds the histograms of a plan's tensors. `Display` prints a table.
#[derive(Clone, Debug)]
pub struct HistogramReport {
    plan: Plan,
    histograms: Vec<Histogram>,
}

impl HistogramReport {
    pub(crate) fn new(plan: Plan, histograms: Vec<Histogram>) -> Self {
        debug_assert_eq!(plan.tensors().len(), histograms.len());
        Self { plan, histograms }
    }

    /// The plan of the tensors.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Fails unless it can be of the gradients of this report, which has the same plan: the counts are the same, and
    /// the extremes lie in the outermost bins.
    ///
    /// # Errors
    /// [`Error::HistogramOfOtherGradients`], which names the first tensor that differs.
    pub(crate) fn check(&self, report: &Report) -> Result<(), Error> {
        let divisor = divisor(report.outputs().loss_scale);
        let mut pairs = self.tensors().zip(report.records());
        let found = pairs.find_map(|((name, histogram), record)| Some((name, histogram.difference(record, divisor)?)));
        let differs = |(name, what): (&str, _)| Err(Error::HistogramOfOtherGradients { name: name.to_owned(), what });
        found.map_or(Ok(()), differs)
    }

    /// One histogram a tensor, in the plan's order.
    pub fn histograms(&self) -> &[Histogram] {
        &self.histograms
    }

    /// Names and histograms, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &Histogram)> {
        self.plan.tensors().iter().map(|tensor| tensor.name.as_str()).zip(&self.histograms)
    }

    /// The counts of all tensors together.
    pub fn total(&self) -> Histogram {
        self.histograms.iter().fold(Histogram::default(), |sum, histogram| sum.merge(histogram))
    }
}

impl fmt::Display for HistogramReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.tensors().map(|(name, _)| printable(name)).collect();
        let width = width_of(&names, "all tensors");
        write!(f, "{:width$} {:>12} {:>10} {:>10} {:>8}", "tensor", "elements", "median |x|", "99.9 %", "octaves")?;
        for format in Format::ALL {
            write!(f, " {:>7} {:>6}", format!("{format} 0"), "scale")?;
        }
        writeln!(f)?;
        let total = self.total();
        let all = names.iter().map(String::as_str).zip(&self.histograms).chain([("all tensors", &total)]);
        let dash = || "–".to_owned();
        for (name, histogram) in all {
            let quantile = |q| histogram.quantile(q).map_or_else(dash, |bounds| format!("{:.3e}", bounds.high));
            let octaves = histogram.octaves().map_or_else(dash, |bounds| format!("{:.1}", bounds.high));
            write!(
                f,
                "{name:width$} {:>12} {:>10} {:>10} {octaves:>8}",
                histogram.count(),
                quantile(0.5),
                quantile(0.999)
            )?;
            for format in Format::ALL {
                let lost =
                    histogram.shares(format, 0).map_or_else(dash, |s| format!("{:.2} %", 100.0 * s.underflow.high));
                let scale = histogram.loss_scale(format).map_or_else(dash, |k| format!("2^{k}"));
                write!(f, " {lost:>7} {scale:>6}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_are_neighbours_and_cover_all_finite_numbers() {
        assert_eq!(Histogram::lowest_of(0), f32::from_bits(1));
        for bin in 0..Histogram::BINS {
            let (low, high) = (Histogram::lowest_of(bin), Histogram::highest_of(bin));
            assert_eq!((Histogram::bin_of(low), Histogram::bin_of(-high)), (bin, bin));
            assert!(bin < 4 || high < 1.25 * low, "{bin}: {low:e} to {high:e}");
            if bin + 1 < Histogram::BINS {
                assert_eq!(high.next_up(), Histogram::lowest_of(bin + 1));
            }
        }
        assert_eq!(Histogram::highest_of(Histogram::BINS - 1), f32::MAX);
    }

    #[test]
    fn kernels_have_the_same_constants() {
        let kernel = include_str!("../../kernels/quantile.cuh");
        for (name, value) in [
            ("SLOTS", size_of::<Histogram>() / 8),
            ("SLOT_SHIFT", SHIFT as usize),
            ("INF_SLOT", std::mem::offset_of!(Histogram, inf_count) / 8),
            ("NAN_SLOT", std::mem::offset_of!(Histogram, nan_count) / 8),
            ("ZERO_SLOT", std::mem::offset_of!(Histogram, zero_count) / 8),
        ] {
            assert!(kernel.contains(&format!("constexpr u32 {name} = {value};")), "{name} is not {value}");
        }
    }
}
