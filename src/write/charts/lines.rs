//! Values over steps.

use super::{
    CRITICAL, Colour, DARK, NOT_FINITE, WARNING,
    canvas::{Anchor, Canvas},
    scale::{Axis, Frame, Scale, Steps},
    text::{self, SMALL},
};
use crate::Verdict;

/// Lines over steps on a logarithmic axis, with their names beside them.
#[derive(Clone, Debug)]
pub struct Lines {
    pub series: Vec<Series>,
}

#[derive(Clone, Debug)]
pub struct Series {
    /// A short name.
    pub name: String,
    pub colour: Colour,
    /// Pixels.
    pub thickness: u32,
    pub points: Vec<Point>,
}

#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub step: u64,
    pub value: f64,
    /// A mark on the line where it is not healthy.
    pub verdict: Option<Verdict>,
}

impl Lines {
    pub fn draw(&self, canvas: &mut Canvas) {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let longest = self.series.iter().map(|series| text::width(&series.name, SMALL)).max().unwrap_or(0);
        let frame = Frame {
            left: Frame::LABELS + 8,
            right: canvas.width - longest - 56,
            top: 12,
            bottom: canvas.height - 44,
            axis: Axis::of(Scale::Logarithmic, points().map(|point| point.value)),
        };
        frame.draw(canvas);
        let Some(steps) = Steps::of(points().map(|point| point.step)) else { return frame.empty(canvas) };
        steps.draw(canvas, &frame);
        // Values that are not finite first, behind the lines.
        for point in points().filter(|point| !point.value.is_finite()) {
            let x = steps.at(&frame, point.step);
            canvas.area((x - 1, frame.top), (2, frame.bottom - frame.top), NOT_FINITE);
        }
        // From the last, so that the first lies on top.
        for series in self.series.iter().rev() {
            series.draw(canvas, &frame, &steps);
        }
        for (row, series) in (0..).zip(&self.series) {
            let (x, y) = (frame.right + 14, frame.top + 10 + 20 * row);
            canvas.line(&[(x, y), (x + 18, y)], series.colour, series.thickness);
            canvas.text(&series.name, (x + 24, y), SMALL, DARK, Anchor::Start);
        }
    }
}

impl Series {
    fn draw(&self, canvas: &mut Canvas, frame: &Frame, steps: &Steps) {
        let places: Vec<Option<(i32, i32)>> = self
            .points
            .iter()
            .map(|point| Some((steps.at(frame, point.step), frame.at(frame.axis.place(point.value)?))))
            .collect();
        // A line ends where a value has no place.
        for run in places.split(Option::is_none) {
            let run: Vec<(i32, i32)> = run.iter().copied().flatten().collect();
            match run.as_slice() {
                [] => {}
                [alone] => canvas.disc(*alone, 3, self.colour),
                run => canvas.line(run, self.colour, self.thickness),
            }
        }
        for (point, place) in self.points.iter().zip(&places) {
            let x = steps.at(frame, point.step);
            if point.value == 0.0 {
                canvas.ring((x, frame.bottom - 4), 3, self.colour);
            }
            let mark = match point.verdict {
                Some(Verdict::Warning) => WARNING,
                Some(Verdict::Critical) => CRITICAL,
                _ => continue,
            };
            // A column of its own marks a value that is not finite; its verdict sits on top.
            canvas.disc(place.unwrap_or((x, frame.top)), 4, mark);
        }
    }
}
