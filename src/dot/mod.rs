//! Compares two lists of tensors by dot products and cosines: this step's gradients and the last one's, or gradients
//! and weights.

pub(crate) mod cpu;
mod room;

pub use room::Dots;

pub(crate) use room::DotArguments;

use crate::{
    Plan,
    measure::{printable, width_of},
    spec,
};
use bytemuck::{Pod, Zeroable};
use std::fmt;

/// Holds sums over the pairs of elements of two tensors in which both are finite (48 bytes, the same on the device).
///
/// Products of f32 are exact in f64, and sums are in f64 throughout: nothing overflows or vanishes, and each sum is
/// within 1e-12 of the sum of its terms' magnitudes, for any finite input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Dot {
    /// Pairs, finite or not.
    pub count: u64,
    /// Pairs left out because either element is NaN or ±Inf.
    pub nonfinite_count: u64,
    /// Σ a·b.
    pub dot: f64,
    /// Σ a².
    pub a_squares: f64,
    /// Σ b².
    pub b_squares: f64,
    /// Unused; 0.
    pub reserved: u64,
}

// The other side of these numbers is in kernels/dot.cu.
const _: () = {
    assert!(size_of::<Dot>() == 48);
    assert!(std::mem::offset_of!(Dot, dot) == 16);
};

impl Dot {
    /// Gives the sums of both: of shards, chunks or tensors. The same records merged in the same order give the same
    /// bits.
    #[must_use]
    pub fn merge(&self, other: &Self) -> Self {
        Self {
            count: self.count + other.count,
            nonfinite_count: self.nonfinite_count + other.nonfinite_count,
            dot: self.dot + other.dot,
            a_squares: self.a_squares + other.a_squares,
            b_squares: self.b_squares + other.b_squares,
            reserved: 0,
        }
    }

    /// L2 norm of a, over the pairs.
    pub fn a_norm(&self) -> f64 {
        self.a_squares.sqrt()
    }

    /// L2 norm of b, over the pairs.
    pub fn b_norm(&self) -> f64 {
        self.b_squares.sqrt()
    }

    /// Σ a·b / (‖a‖ ‖b‖), from −1 to 1 and within 1e-12. `None` where a norm is 0: there is no direction.
    pub fn cosine(&self) -> Option<f64> {
        let norms = self.a_norm() * self.b_norm();
        (norms > 0.0).then(|| (self.dot / norms).clamp(-1.0, 1.0))
    }
}

/// Holds the dot products of a plan's tensors. `Display` prints a table.
#[derive(Clone, Debug)]
pub struct DotReport {
    plan: Plan,
    records: Vec<Dot>,
}

impl DotReport {
    pub(crate) fn new(plan: Plan, records: Vec<Dot>) -> Self {
        debug_assert_eq!(plan.tensors().len(), records.len());
        Self { plan, records }
    }

    /// One record a tensor, in the plan's order.
    pub fn records(&self) -> &[Dot] {
        &self.records
    }

    /// Names and records, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &Dot)> {
        self.plan.tensors().iter().map(|tensor| tensor.name.as_str()).zip(&self.records)
    }

    /// Gives the sums over all tensors: of the two lists as two long vectors.
    pub fn total(&self) -> Dot {
        spec::fold(self.records.len(), |t| self.records[t], Dot::merge).unwrap_or_default()
    }
}

impl fmt::Display for DotReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.tensors().map(|(name, _)| printable(name)).collect();
        let width = width_of(&names, "all tensors");
        writeln!(
            f,
            "{:width$} {:>12} {:>10} {:>8} {:>11} {:>10} {:>10}",
            "tensor", "pairs", "left out", "cosine", "a · b", "norm a", "norm b"
        )?;
        let total = self.total();
        for (name, dot) in names.iter().map(String::as_str).zip(&self.records).chain([("all tensors", &total)]) {
            writeln!(
                f,
                "{name:width$} {:>12} {:>10} {:>8} {:>11.3e} {:>10.3e} {:>10.3e}",
                dot.count,
                dot.nonfinite_count,
                dot.cosine().map_or_else(|| "–".to_owned(), |cosine| format!("{cosine:.4}")),
                dot.dot,
                dot.a_norm(),
                dot.b_norm()
            )?;
        }
        Ok(())
    }
}
