//! The norms of the gradient by depth of the model.

use super::{FlowMeasure, names, robust::median};
use crate::{Plan, Record};
use std::sync::Arc;

/// Holds the norms of the layers of one step, from the input's side on. Layers without a finite gradient above 0 are
/// left out.
///
/// A layer's norm is that of its tensors with `weight` in their names, in models that have such, and of all its tensors
/// otherwise: biases are of another size. The numbers in the names tell layers apart (`blocks.3.`, `h.0.`, `fc1.`).
/// Without two of them every tensor is a layer, in the plan's order.
#[derive(Clone, Debug, PartialEq)]
pub struct Flow {
    names: Arc<[String]>,
    /// Place in the depth and norm.
    layers: Vec<(usize, f64)>,
    slope: f64,
    /// The first tensor of the first layer that counts.
    first_tensor: usize,
}

/// The layer of each tensor; known from the plan.
#[derive(Clone, Debug)]
pub(super) struct Layers {
    /// Layers of the tensors that count.
    places: Vec<Option<usize>>,
    names: Arc<[String]>,
    /// Whether the names tell the depth; else the plan's order stands for it.
    pub are_numbered: bool,
}

impl Layers {
    /// Finds the layers of a plan. `leaves_out` tells which tensors do not count.
    pub(super) fn of(plan: &Plan, leaves_out: impl Fn(usize) -> bool) -> Self {
        let (mut places, names) = names::layers(plan);
        let is_weight = |index: usize| plan.tensors()[index].name.to_lowercase().contains("weight");
        let some_weight = (0..places.len()).any(|index| places[index].is_some() && is_weight(index));
        for (index, place) in places.iter_mut().enumerate() {
            if leaves_out(index) || (some_weight && !is_weight(index)) {
                *place = None;
            }
        }
        let are_numbered = names.first() != plan.tensors().first().map(|tensor| &tensor.name);
        Self { places, names: names.into(), are_numbered }
    }

    /// Gives the flow of a step. `None` with fewer than [`Flow::LEAST_LAYERS`] layers.
    pub(super) fn flow(&self, records: &[Record]) -> Option<Flow> {
        if self.names.len() < Flow::LEAST_LAYERS {
            return None;
        }
        let mut squares = vec![0.0; self.names.len()];
        for (place, record) in self.places.iter().zip(records) {
            if let Some(place) = *place {
                squares[place] += if record.has_nonfinite() { f64::NAN } else { record.finite_sum_squares() };
            }
        }
        let norms = squares.iter().map(|squares| squares.sqrt()).enumerate();
        let layers: Vec<(usize, f64)> = norms.filter(|&(_, norm)| norm > 0.0 && norm.is_finite()).collect();
        let slope = theil_sen(&pool(&layers));
        let first = layers.first()?.0;
        let first_tensor = self.places.iter().position(|&place| place == Some(first))?;
        (layers.len() >= Flow::LEAST_LAYERS).then(|| Flow {
            names: Arc::clone(&self.names),
            layers,
            slope,
            first_tensor,
        })
    }
}

impl Flow {
    /// The fewest layers that have a depth.
    pub const LEAST_LAYERS: usize = 3;

    /// Names and norms of the layers, from the input on.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = (&str, f64)> {
        self.layers.iter().map(|&(place, norm)| (self.names[place].as_str(), norm))
    }

    /// Gives the growth of ln(norm) from one layer to the next, towards the output: the median of the slopes between
    /// all pairs of layers (Theil 1950, Sen 1968), which up to 29 % of odd layers do not move far. Beyond 64 layers,
    /// neighbours are replaced by their geometric means.
    pub fn slope(&self) -> f64 {
        self.slope
    }

    /// Gives the factor from one layer to the next, towards the output: above 1 where gradients shrink towards the
    /// input.
    pub fn factor(&self) -> f64 {
        self.slope.exp()
    }

    /// The first layer's norm over the last one's on the fitted line.
    pub fn fitted_ratio(&self) -> f64 {
        let depth = self.layers[self.layers.len() - 1].0 - self.layers[0].0;
        (-self.slope * to_f64(depth)).exp()
    }

    /// The first layer's norm over the last one's.
    pub fn first_over_last(&self) -> f64 {
        self.layers[0].1 / self.layers[self.layers.len() - 1].1
    }

    /// The mean norm of the first third of the layers, rounded down, over that of the last third.
    pub fn early_over_late(&self) -> f64 {
        let third = self.layers.len() / 3;
        let sum = |layers: &[(usize, f64)]| layers.iter().map(|&(_, norm)| norm).sum::<f64>();
        sum(&self.layers[..third]) / sum(&self.layers[self.layers.len() - third..])
    }

    /// The largest norm of a layer over the smallest.
    pub fn spread(&self) -> f64 {
        let norms = || self.layers.iter().map(|&(_, norm)| norm);
        norms().fold(0.0, f64::max) / norms().fold(f64::INFINITY, f64::min)
    }

    pub(super) fn first_tensor(&self) -> usize {
        self.first_tensor
    }

    pub(super) fn measure(&self, measure: FlowMeasure) -> f64 {
        match measure {
            FlowMeasure::Slope => self.fitted_ratio(),
            FlowMeasure::Thirds => self.early_over_late(),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a number of layers")]
fn to_f64(count: usize) -> f64 {
    count as f64
}

/// Gives depth and ln(norm) of at most 64 points, as the means of neighbours.
fn pool(layers: &[(usize, f64)]) -> Vec<(f64, f64)> {
    let size = layers.len().div_ceil(64).max(1);
    let mean = |layers: &[(usize, f64)]| {
        let (depth, logarithm) =
            layers.iter().fold((0.0, 0.0), |(depth, sum), &(place, norm)| (depth + to_f64(place), sum + norm.ln()));
        (depth / to_f64(layers.len()), logarithm / to_f64(layers.len()))
    };
    layers.chunks(size).map(mean).collect()
}

/// Gives the median of the slopes between all pairs; 0 without a pair.
fn theil_sen(points: &[(f64, f64)]) -> f64 {
    let mut slopes = Vec::with_capacity(points.len() * points.len().saturating_sub(1) / 2);
    for (index, &(depth, logarithm)) in points.iter().enumerate() {
        slopes.extend(points[..index].iter().map(|&(d, l)| (logarithm - l) / (depth - d)));
    }
    median(&mut slopes)
}
