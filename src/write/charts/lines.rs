//! Values over steps.

use super::{
    CRITICAL, Drawn, NOT_FINITE, WARNING,
    scale::{Axis, Frame, Scale, Steps},
    text::{self, DARK, SMALL, TINY},
};
use crate::Verdict;
use plotters::{coord::Shift, prelude::*};

/// Lines over steps on a logarithmic axis, with their names beside them.
#[derive(Clone, Debug)]
pub struct Lines {
    pub series: Vec<Series>,
}

#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub colour: RGBColor,
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

/// Characters of a name that are shown.
const NAME: usize = 28;

impl Lines {
    pub fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        let (width, height) = super::dimensions(area);
        let points = || self.series.iter().flat_map(|series| &series.points);
        let names: Vec<String> = self.series.iter().map(|series| text::shortened(&series.name, NAME)).collect();
        let longest = names.iter().map(|name| text::width(name, SMALL)).max().unwrap_or(0);
        let frame = Frame {
            left: Frame::LABELS + 8,
            right: width - longest - 56,
            top: 12,
            bottom: height - 44,
            axis: Axis::of(Scale::Logarithmic, points().map(|point| point.value)),
        };
        frame.draw(area)?;
        let Some(steps) = Steps::of(points().map(|point| point.step)) else { return frame.empty(area) };
        steps.draw(area, &frame)?;
        // What is not finite first, behind the lines.
        for point in points().filter(|point| !point.value.is_finite()) {
            let x = steps.at(&frame, point.step);
            area.draw(&Rectangle::new([(x - 1, frame.top), (x, frame.bottom)], NOT_FINITE.filled()))?;
        }
        // From the last, so that the first lies on top.
        for series in self.series.iter().rev() {
            series.draw(area, &frame, &steps)?;
        }
        for (row, (series, name)) in (0..).zip(self.series.iter().zip(&names)) {
            let y = frame.top + 10 + 20 * row;
            let x = frame.right + 14;
            let line = PathElement::new([(x, y), (x + 18, y)], series.colour.stroke_width(series.thickness));
            area.draw(&line)?;
            text::left(area, name, (x + 24, y), SMALL, &DARK)?;
        }
        Ok(())
    }
}

impl Series {
    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, frame: &Frame, steps: &Steps) -> Drawn<DB> {
        let places: Vec<Option<(i32, i32)>> = self
            .points
            .iter()
            .map(|point| Some((steps.at(frame, point.step), frame.at(frame.axis.place(point.value)?))))
            .collect();
        // A line ends where there is no place for a value.
        for run in places.split(Option::is_none) {
            let run: Vec<(i32, i32)> = run.iter().copied().flatten().collect();
            match run.as_slice() {
                [] => {}
                [alone] => area.draw(&Circle::new(*alone, 3, self.colour.filled()))?,
                _ => area.draw(&PathElement::new(run, self.colour.stroke_width(self.thickness)))?,
            }
        }
        for (point, place) in self.points.iter().zip(&places) {
            if point.value == 0.0 {
                let foot = (steps.at(frame, point.step), frame.bottom - 4);
                area.draw(&Circle::new(foot, 3, self.colour.stroke_width(1)))?;
            }
            let mark = match point.verdict {
                Some(Verdict::Warning) => WARNING,
                Some(Verdict::Critical) => CRITICAL,
                _ => continue,
            };
            // A column of its own marks a value that is not finite; its verdict sits on top.
            let place = place.unwrap_or((steps.at(frame, point.step), frame.top));
            area.draw(&Circle::new(place, 3, mark.filled()))?;
        }
        Ok(())
    }
}

impl Steps {
    /// Draws the ticks below a frame.
    pub fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, frame: &Frame) -> Drawn<DB> {
        for step in self.ticks() {
            let x = self.at(frame, step);
            area.draw(&PathElement::new([(x, frame.bottom), (x, frame.bottom + 5)], text::GREY))?;
            text::centred(area, &step.to_string(), (x, frame.bottom + 15), TINY, &DARK)?;
        }
        text::centred(area, "step", (frame.across(0.5), frame.bottom + 31), SMALL, &DARK)
    }
}
