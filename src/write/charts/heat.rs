//! Histograms over steps: a column a step, a row a range of magnitudes.

use super::{
    Colour, DARK, NOT_FINITE, PALE,
    canvas::{Anchor, Canvas},
    scale::{Axis, Frame, Steps},
    text::SMALL,
};
use crate::histogram::Histogram;

/// Histograms by step. Beside the rows of magnitudes there is one each for 0, Inf and NaN.
#[derive(Clone, Debug)]
pub struct Heat {
    /// In the order of steps.
    pub columns: Vec<(u64, Box<Histogram>)>,
}

/// The most rows: an SVG of more takes megabytes.
const ROWS: usize = 64;
/// The share of the elements with the darkest colour, as a power of ten.
const DARKEST: f64 = -5.0;
/// Height of the separate rows, in pixels.
const BAND: i32 = 14;

impl Heat {
    pub fn draw(&self, canvas: &mut Canvas) {
        let ends = self.columns.iter().filter_map(|(_, histogram)| {
            let mut bins = histogram.occupied().map(|(bin, _)| bin);
            let first = bins.next()?;
            Some((first, bins.next_back().unwrap_or(first)))
        });
        let ends = ends.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
        // Whole octaves.
        let (first, last) = ends.map_or((500, 504), |(first, last)| (first / 4 * 4, last / 4 * 4 + 4));
        let per_row = (last - first).div_ceil(ROWS);
        let frame = Frame {
            left: Frame::LABELS + 8,
            right: canvas.width - 24,
            top: 44 + 2 * (BAND + 4),
            bottom: canvas.height - 44 - BAND - 8,
            axis: Axis::with_ticks((last - first) as f64, decades(first, last)),
        };
        scale(canvas, frame.right);
        if self.columns.is_empty() {
            return frame.empty(canvas);
        }
        let edges = self.edges();
        let across = |index: usize| {
            let share = (edges[index] - edges[0]) / (edges[edges.len() - 1] - edges[0]);
            frame.across(share)
        };
        frame.draw(canvas);
        let zeros = frame.bottom + 5;
        let [inf, nan] = [1, 2].map(|row| frame.top - row * (BAND + 4));
        for (y, label) in [(zeros, "0"), (inf, "Inf"), (nan, "NaN")] {
            canvas.text(label, (frame.left - 6, y + BAND / 2), SMALL, DARK, Anchor::End);
            canvas.area((frame.left, y), (frame.right - frame.left, BAND), PALE);
        }
        for (index, (_, histogram)) in self.columns.iter().enumerate() {
            let left = across(index);
            let width = (across(index + 1) - left).max(1);
            let finite = histogram.finite_count() as f64;
            for row in (first..last).step_by(per_row) {
                let end = (row + per_row).min(last);
                let count: u64 = histogram.bins[row..end.min(Histogram::BINS)].iter().sum();
                if count > 0 {
                    let share = |bin: usize| (bin - first) as f64 / (last - first) as f64;
                    let (top, bottom) = (frame.at(share(end)), frame.at(share(row)));
                    canvas.area((left, top), (width, (bottom - top).max(1)), shade(count as f64 / finite));
                }
            }
            let of_zeros = shade(histogram.zero_count as f64 / finite);
            let bands = [
                (zeros, histogram.zero_count, of_zeros),
                (inf, histogram.inf_count, NOT_FINITE),
                (nan, histogram.nan_count, NOT_FINITE),
            ];
            for (y, _, colour) in bands.into_iter().filter(|&(_, count, _)| count > 0) {
                canvas.area((left, y), (width, BAND), colour);
            }
        }
        self.label_steps(canvas, &frame, &across);
    }

    /// Gives the ends of the columns: half-way between two steps.
    fn edges(&self) -> Vec<f64> {
        let steps: Vec<f64> = self.columns.iter().map(|(step, _)| *step as f64).collect();
        let half = |a: f64, b: f64| (b - a) / 2.0;
        let outer = if steps.len() > 1 {
            (half(steps[0], steps[1]), half(steps[steps.len() - 2], steps[steps.len() - 1]))
        } else {
            (0.5, 0.5)
        };
        let between = steps.windows(2).map(|pair| pair[0] + half(pair[0], pair[1]));
        std::iter::once(steps[0] - outer.0).chain(between).chain([steps[steps.len() - 1] + outer.1]).collect()
    }

    /// Labels steps below their columns, or the nearest ones.
    fn label_steps(&self, canvas: &mut Canvas, frame: &Frame, across: &dyn Fn(usize) -> i32) {
        let Some(steps) = Steps::of(self.columns.iter().map(|(step, _)| *step)) else { return };
        let bottom = frame.bottom + BAND + 7;
        let mut last = None;
        for tick in steps.ticks() {
            let index = self.columns.partition_point(|(step, _)| *step < tick).min(self.columns.len() - 1);
            if last.replace(index) != Some(index) {
                let x = i32::midpoint(across(index), across(index + 1));
                Steps::label(canvas, self.columns[index].0, (x, bottom));
            }
        }
        canvas.text("step", (frame.across(0.5), bottom + 30), SMALL, DARK, Anchor::Middle);
    }
}

/// Dark to bright, also for eyes that tell no red from green: five colours of matplotlib's viridis.
const SHADES: [[f64; 3]; 5] =
    [[68.0, 1.0, 84.0], [59.0, 82.0, 139.0], [33.0, 145.0, 140.0], [94.0, 201.0, 98.0], [253.0, 231.0, 37.0]];

/// The colour of a row with this share of the column's finite elements.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 4, and 0 to 255")]
fn shade(share: f64) -> Colour {
    let place = (1.0 - share.log10().clamp(DARKEST, 0.0) / DARKEST) * (SHADES.len() - 1) as f64;
    let below = (place as usize).min(SHADES.len() - 2);
    let part = place - below as f64;
    [0, 1, 2].map(|channel| {
        (SHADES[below][channel] + part * (SHADES[below + 1][channel] - SHADES[below][channel])).round() as u8
    })
}

/// The decades among the bins, as places above the first. Below 1e-37 they crowd: subnormal numbers share four bins.
fn decades(first: usize, last: usize) -> Vec<(f64, String)> {
    let exponents: Vec<i32> = (-37..=38).collect();
    let places = exponents.into_iter().filter_map(|exponent| {
        let x = 10f64.powi(exponent);
        #[expect(clippy::cast_possible_truncation, reason = "near enough for a tick")]
        let bin = Histogram::bin_of(x as f32);
        let (low, high) = (f64::from(Histogram::lowest_of(bin)), f64::from(Histogram::highest_of(bin)));
        let place = bin as f64 + ((x - low) / (high - low)).clamp(0.0, 1.0) - first as f64;
        (place >= 0.0 && place <= (last - first) as f64).then(|| (place, format!("1e{exponent}")))
    });
    let places: Vec<(f64, String)> = places.collect();
    let every = places.len().div_ceil(12).max(1);
    places.into_iter().step_by(every).collect()
}

/// Draws the legend of the colours.
fn scale(canvas: &mut Canvas, right: i32) {
    const CELLS: i32 = 40;
    let left = right - 3 * CELLS - 30;
    canvas.text("share of the finite elements: 1e-5", (left - 8, 14), SMALL, DARK, Anchor::End);
    for cell in 0..CELLS {
        let share = 10f64.powf(DARKEST * (1.0 - f64::from(cell) / f64::from(CELLS - 1)));
        canvas.area((left + 3 * cell, 7), (3, 14), shade(share));
    }
    canvas.text("1", (left + 3 * CELLS + 8, 14), SMALL, DARK, Anchor::Start);
}
