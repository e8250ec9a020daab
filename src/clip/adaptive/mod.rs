//! Adaptive gradient clipping: each unit of a tensor to a share of the norm of its own weights.

pub(crate) mod cpu;
pub(crate) mod room;

pub use room::AdaptiveUnits;

use crate::{
    Error, NonFinitePolicy, Plan,
    measure::{narrow, printable, width_of},
};
use bytemuck::{Pod, Zeroable};
use std::fmt;

/// Clips each unit of a tensor by the norm of its weights: adaptive gradient clipping (AGC; Brock et al. 2021, arXiv
/// 2102.06171, equation 3).
///
/// A unit is the weights of one output: a row of `[out, in]`, `[in, kh, kw]` of a convolution's `[out, in, kh, kw]`,
/// the whole of a bias or gain. Where the norm of its gradient is above λ·max(‖w‖, ε), w being its weights, the
/// gradient is scaled down to that norm; other units keep their bits. Norms are sums in f64; a weight's is that of its
/// finite elements.
///
/// A step that the last measurement said to skip is left as it is. Under
/// [`NonFinitePolicy::Propagate`](crate::NonFinitePolicy::Propagate) a unit with a NaN or Inf becomes NaN. Under
/// [`ZeroNonFinite`](crate::NonFinitePolicy::ZeroNonFinite) those elements become 0 and the norm of the others decides.
#[derive(Clone, Debug, PartialEq)]
pub struct AdaptiveClip {
    /// `None` takes the units from the plan's shapes.
    unit_lengths: Option<Vec<u64>>,
    clipping: f64,
    epsilon: f64,
}

impl AdaptiveClip {
    /// Clips by this λ, with ε = 0.001 and the units of the paper, by the shapes of [`Plan::with_shapes`]. The paper's
    /// λ is 0.01, and more for its largest batches. A unit is all behind the first dimension of a tensor of two or
    /// more, and the whole of a vector or a scalar, as in the authors' program and timm's. So a row of an embedding is
    /// a unit. The paper leaves the last linear layer alone: see [`new`](Self::new).
    ///
    /// ```
    /// use gradprobe::{Config, Cpu, DType, Plan, Probe, clip::AdaptiveClip};
    /// let plan = Plan::new([("weight", DType::F32, 4), ("bias", DType::F32, 2)])?.with_shapes([vec![2, 2], vec![2]])?;
    /// let mut probe = Probe::new(Cpu, plan, Config::new().adaptive_clip(AdaptiveClip::agc(0.01)))?;
    /// let (mut gradient, mut of_bias, weight, bias) = ([3.0f32, 4.0, 0.0, 0.01], [0.0f32; 2], [1.0f32; 4], [0.0f32; 2]);
    /// probe.measure(&[&gradient, &of_bias])?;
    /// probe.adaptive_clip()?.clip(&mut [&mut gradient, &mut of_bias], &[&weight, &bias])?;
    /// // To a hundredth of the norm √2 of the row's weights; the other row is below it.
    /// assert!((gradient[0] - 0.00849).abs() < 1e-5 && gradient[3] == 0.01);
    /// # Ok::<(), gradprobe::Error>(())
    /// ```
    pub const fn agc(clipping: f64) -> Self {
        Self { unit_lengths: None, clipping, epsilon: 1e-3 }
    }

    /// Clips by the paper's λ = 0.01 and ε = 0.001, in units of so many elements: one number a tensor of the plan. 0
    /// leaves a tensor alone, as the paper does with the last linear layer; a loss scale and
    /// [`ZeroNonFinite`](crate::NonFinitePolicy::ZeroNonFinite) still act on it. A block of threads handles one unit at
    /// a time: a few units of many million elements each would be slow.
    pub fn new(unit_lengths: impl IntoIterator<Item = u64>) -> Self {
        Self { unit_lengths: Some(unit_lengths.into_iter().collect()), clipping: 0.01, epsilon: 1e-3 }
    }

    /// Sets λ: finite, above 0.
    #[must_use]
    pub fn clipping(self, clipping: f64) -> Self {
        Self { clipping, ..self }
    }

    /// Sets ε, the least norm of weights in the limit: finite, not negative. Without it, weights that begin at 0 would
    /// stay there.
    #[must_use]
    pub fn epsilon(self, epsilon: f64) -> Self {
        Self { epsilon, ..self }
    }

    /// Gives the units of a plan's tensors.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for λ or ε, [`Error::TensorCount`], [`Error::UnitLength`], and [`Error::WithoutShapes`].
    pub(crate) fn of(&self, plan: &Plan) -> Result<Units, Error> {
        let require = |holds: bool, option: &'static str, expected: &'static str, value: f64| {
            if holds { Ok(()) } else { Err(Error::InvalidConfig { option, expected, value: value.to_string() }) }
        };
        require(self.clipping.is_finite() && self.clipping > 0.0, "clipping", "finite and above 0", self.clipping)?;
        require(self.epsilon.is_finite() && self.epsilon >= 0.0, "epsilon", "finite and not negative", self.epsilon)?;
        let lengths = match &self.unit_lengths {
            Some(lengths) => lengths.clone(),
            None => plan.shapes().ok_or(Error::WithoutShapes)?.iter().map(|shape| unit_length(shape)).collect(),
        };
        plan.check_count(lengths.len())?;
        let mut counts = Vec::with_capacity(lengths.len());
        for (tensor, &unit) in plan.tensors().iter().zip(&lengths) {
            if unit > 0 && !tensor.len.is_multiple_of(unit) {
                return Err(Error::UnitLength { name: tensor.name.clone(), length: tensor.len, unit });
            }
            counts.push(tensor.len.checked_div(unit).unwrap_or(0));
        }
        Ok(Units { lengths, counts, clipping: self.clipping, epsilon: self.epsilon })
    }
}

/// Gives the elements of a unit, for a tensor of this shape.
fn unit_length(shape: &[u64]) -> u64 {
    let of_unit = match shape {
        [_, rest @ ..] if !rest.is_empty() => rest,
        vector => vector,
    };
    // Beside a dimension of 0 others may be of any length.
    of_unit.iter().fold(1, |product: u64, &length| product.saturating_mul(length))
}

/// An [`AdaptiveClip`] that fits a plan.
#[derive(Clone, Debug)]
pub(crate) struct Units {
    /// Elements of a unit of each tensor, or 0.
    pub lengths: Vec<u64>,
    /// Units of each tensor.
    pub counts: Vec<u64>,
    pub clipping: f64,
    pub epsilon: f64,
}

/// Gives the coefficient of a unit, from its norm, that of its weights, and whether its gradient has non-finite
/// elements.
pub(crate) fn coefficient(
    (clipping, epsilon): (f64, f64),
    norm: f64,
    weight: f64,
    nonfinite: bool,
    policy: NonFinitePolicy,
) -> f32 {
    if nonfinite && policy != NonFinitePolicy::ZeroNonFinite {
        return f32::NAN;
    }
    let limit = clipping * if weight > epsilon { weight } else { epsilon };
    if norm > limit { narrow(limit / norm) } else { 1.0 }
}

/// Holds the result of an adaptive clip of one tensor (24 bytes, the same on the device).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct AdaptiveRecord {
    /// Units that were scaled down.
    pub clipped: u64,
    /// Units whose gradient has a NaN or Inf.
    pub nonfinite: u64,
    /// The bits of 1 less those of the smallest coefficient, as f32; see
    /// [`smallest_coefficient`](Self::smallest_coefficient).
    pub reduction: u32,
    /// Unused; 0.
    pub reserved: u32,
}
// The other side is in kernels/adaptive.cu.
const _: () = assert!(size_of::<AdaptiveRecord>() == 24);

impl AdaptiveRecord {
    /// The smallest coefficient of its units; 1 when none was clipped.
    pub fn smallest_coefficient(&self) -> f32 {
        f32::from_bits(1f32.to_bits() - self.reduction)
    }

    /// Counts a unit.
    pub(crate) fn count(&mut self, nonfinite: bool, coefficient: f32) {
        self.nonfinite += u64::from(nonfinite);
        if coefficient < 1.0 {
            self.clipped += 1;
            self.reduction = self.reduction.max(1f32.to_bits() - coefficient.to_bits());
        }
    }

    /// Gives the record of the units of both.
    pub(crate) fn merge(&self, other: &Self) -> Self {
        Self {
            clipped: self.clipped + other.clipped,
            nonfinite: self.nonfinite + other.nonfinite,
            reduction: self.reduction.max(other.reduction),
            reserved: 0,
        }
    }
}

/// Holds the results of an adaptive clip of a plan's tensors. `Display` prints a table.
#[derive(Clone, Debug)]
pub struct AdaptiveClipReport {
    plan: Plan,
    counts: Vec<u64>,
    records: Vec<AdaptiveRecord>,
}

impl AdaptiveClipReport {
    pub(crate) fn new(plan: Plan, units: &Units, records: Vec<AdaptiveRecord>) -> Self {
        debug_assert_eq!(plan.tensors().len(), records.len());
        Self { plan, counts: units.counts.clone(), records }
    }

    /// One record a tensor, in the plan's order.
    pub fn records(&self) -> &[AdaptiveRecord] {
        &self.records
    }

    /// Units of the tensor at `index` of the plan.
    ///
    /// # Panics
    /// When the plan has no such tensor.
    pub fn units(&self, index: usize) -> u64 {
        self.counts[index]
    }

    /// Share of all units that were clipped, 0 to 1; `None` without units.
    #[expect(clippy::cast_precision_loss, reason = "counts stay below 2^53")]
    pub fn clipped_fraction(&self) -> Option<f64> {
        let units: u64 = self.counts.iter().sum();
        let clipped: u64 = self.records.iter().map(|record| record.clipped).sum();
        (units > 0).then(|| clipped as f64 / units as f64)
    }
}

impl fmt::Display for AdaptiveClipReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.plan.tensors().iter().map(|tensor| printable(&tensor.name)).collect();
        let width = width_of(&names, "tensor");
        writeln!(f, "{:width$} {:>10} {:>10} {:>12} {:>12}", "tensor", "units", "clipped", "not finite", "smallest")?;
        for ((name, units), record) in names.iter().zip(&self.counts).zip(&self.records) {
            let AdaptiveRecord { clipped, nonfinite, .. } = record;
            let smallest = record.smallest_coefficient();
            writeln!(f, "{name:width$} {units:>10} {clipped:>10} {nonfinite:>12} {smallest:>12.4e}")?;
        }
        Ok(())
    }
}
