//! Histograms over steps: a column a step, a row a range of magnitudes.

use super::{
    Drawn, NOT_FINITE,
    scale::{Axis, Frame, Steps},
    text::{self, DARK, GREY, SMALL},
};
use crate::Histogram;
use plotters::{
    coord::Shift,
    prelude::*,
    style::colors::colormaps::{ColorMap, ViridisRGB},
};

/// Histograms by step, and beside the rows of magnitudes one for each of 0, Inf and NaN.
#[derive(Clone, Debug)]
pub struct Heat {
    /// In the order of steps.
    pub columns: Vec<(u64, Box<Histogram>)>,
}

/// So many rows at most: an SVG of more is megabytes.
const ROWS: usize = 64;
/// The share of the elements that has the darkest colour, as a power of ten.
const DARKEST: f64 = -5.0;
/// Height of the rows that stand apart, in pixels.
const BAND: i32 = 14;

impl Heat {
    pub fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        let (width, height) = super::dimensions(area);
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
            right: width - 24,
            top: 44 + 2 * (BAND + 4),
            bottom: height - 44 - BAND - 8,
            axis: Axis::with_ticks((last - first) as f64, decades(first, last)),
        };
        scale(area, frame.right)?;
        if self.columns.is_empty() {
            return frame.empty(area);
        }
        let edges = self.edges();
        let across = |index: usize| {
            let share = (edges[index] - edges[0]) / (edges[edges.len() - 1] - edges[0]);
            frame.across(share)
        };
        let zeros = frame.bottom + 5;
        let [inf, nan] = [1, 2].map(|row| frame.top - row * (BAND + 4));
        for (y, label) in [(zeros, "0"), (inf, "Inf"), (nan, "NaN")] {
            text::right(area, label, (frame.left - 6, y + BAND / 2), SMALL, &DARK)?;
            let line = Rectangle::new([(frame.left, y), (frame.right, y + BAND)], text::PALE);
            area.draw(&line)?;
        }
        for (index, (_, histogram)) in self.columns.iter().enumerate() {
            let (left, right) = (across(index), (across(index + 1) - 1).max(across(index)));
            let finite = histogram.finite_count() as f64;
            for row in (first..last).step_by(per_row) {
                let end = (row + per_row).min(last);
                let count: u64 = histogram.bins[row..end.min(Histogram::BINS)].iter().sum();
                if count > 0 {
                    let share = |bin: usize| (bin - first) as f64 / (last - first) as f64;
                    let (top, bottom) = (frame.at(share(end)), frame.at(share(row)) - 1);
                    let cell = Rectangle::new([(left, top), (right, bottom.max(top))], shade(count as f64 / finite));
                    area.draw(&cell)?;
                }
            }
            let band = |y: i32, style: ShapeStyle| area.draw(&Rectangle::new([(left, y), (right, y + BAND)], style));
            if histogram.zero_count > 0 {
                band(zeros, shade(histogram.zero_count as f64 / finite))?;
            }
            if histogram.inf_count > 0 {
                band(inf, NOT_FINITE.filled())?;
            }
            if histogram.nan_count > 0 {
                band(nan, NOT_FINITE.filled())?;
            }
        }
        frame.draw(area)?;
        self.label_steps(area, &frame, &across)
    }

    /// Where columns end: half-way between two steps.
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

    /// Steps below the columns they are of, or nearest to.
    fn label_steps<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
        frame: &Frame,
        across: &dyn Fn(usize) -> i32,
    ) -> Drawn<DB> {
        let Some(steps) = Steps::of(self.columns.iter().map(|(step, _)| *step)) else { return Ok(()) };
        let bottom = frame.bottom + BAND + 5;
        for tick in steps.ticks() {
            let index = self.columns.partition_point(|(step, _)| *step < tick).min(self.columns.len() - 1);
            let x = i32::midpoint(across(index), across(index + 1));
            area.draw(&PathElement::new([(x, bottom + 3), (x, bottom + 7)], GREY))?;
            text::centred(area, &self.columns[index].0.to_string(), (x, bottom + 17), text::TINY, &DARK)?;
        }
        text::centred(area, "step", (frame.across(0.5), bottom + 32), SMALL, &DARK)
    }
}

/// The colour of a row with this share of the column's finite elements.
fn shade(share: f64) -> ShapeStyle {
    ViridisRGB.get_color(1.0 - share.log10().clamp(DARKEST, 0.0) / DARKEST).filled()
}

/// The decades among the bins, as places above the first.
fn decades(first: usize, last: usize) -> Vec<(f64, String)> {
    let exponents: Vec<i32> = (-45..=38).collect();
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

/// What the colours mean.
fn scale<DB: DrawingBackend>(area: &DrawingArea<DB, Shift>, right: i32) -> Drawn<DB> {
    const CELLS: i32 = 40;
    let left = right - 6 * CELLS / 2 - 40;
    text::right(area, "share of the finite elements   1e-5", (left - 8, 22), SMALL, &DARK)?;
    for cell in 0..CELLS {
        let share = 10f64.powf(DARKEST * (1.0 - f64::from(cell) / f64::from(CELLS - 1)));
        let x = left + 3 * cell;
        area.draw(&Rectangle::new([(x, 15), (x + 2, 29)], shade(share)))?;
    }
    text::left(area, "1", (left + 3 * CELLS + 8, 22), SMALL, &DARK)
}
