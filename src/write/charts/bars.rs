//! One bar a tensor.

use super::{
    Drawn, EntryTensor, HEALTHY, NOT_FINITE, colour, printable,
    scale::{Axis, Frame, Scale},
    text::{self, DARK, HEADING, TINY},
};
use crate::Verdict;
use plotters::{coord::Shift, prelude::*};

/// Bars side by side, with the names below.
#[derive(Clone, Debug)]
pub struct Bars {
    pub title: &'static str,
    pub scale: Scale,
    /// A value with a line through all bars.
    pub reference: Option<f64>,
    pub bars: Vec<Bar>,
}

#[derive(Clone, Debug)]
pub struct Bar {
    name: String,
    /// `None` where there is no such number.
    value: Option<f64>,
    verdict: Option<Verdict>,
}

impl Bar {
    pub fn new(tensor: &EntryTensor<'_>, value: Option<f64>) -> Self {
        Self { name: printable(tensor.report.name), value, verdict: tensor.verdict }
    }
}

/// Characters of a name that are shown.
const NAME: usize = 24;

impl Bars {
    pub fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        let (width, height) = super::dimensions(area);
        let names: Vec<String> = self.bars.iter().map(|bar| text::shortened(&bar.name, NAME)).collect();
        let longest = names.iter().map(|name| text::width(name, TINY)).max().unwrap_or(0);
        let values = self.bars.iter().filter_map(|bar| bar.value).chain(self.reference);
        let frame = Frame {
            left: Frame::LABELS + 8,
            right: width - 16,
            top: if self.title.is_empty() { 12 } else { 34 },
            bottom: height - longest - 18,
            axis: Axis::of(self.scale, values),
        };
        text::left(area, self.title, (frame.left, 14), HEADING, &DARK)?;
        frame.draw(area)?;
        if self.bars.is_empty() {
            return frame.empty(area);
        }
        let pixels = f64::from(frame.right - frame.left) / self.bars.len() as f64;
        // The unhealthy last: where bars share a pixel they are the ones to be seen.
        let mut order: Vec<usize> = (0..self.bars.len()).collect();
        order.sort_by_key(|&index| {
            (self.bars[index].verdict, self.bars[index].value.is_some_and(|value| !value.is_finite()))
        });
        for index in order {
            self.draw_bar(area, &frame, index)?;
        }
        if let Some(y) = self.reference.and_then(|value| frame.axis.place(value)).map(|share| frame.at(share)) {
            area.draw(&PathElement::new([(frame.left, y), (frame.right, y)], DARK.stroke_width(2)))?;
        }
        // As many names as do not touch.
        let room = f64::from(TINY) + 3.0;
        let mut next = f64::NEG_INFINITY;
        for (index, name) in names.iter().enumerate() {
            let middle = (index as f64 + 0.5) * pixels;
            if middle >= next {
                let x = frame.across((index as f64 + 0.5) / names.len() as f64);
                let ink = match colour(self.bars[index].verdict) {
                    HEALTHY => DARK,
                    other => other,
                };
                text::upright(area, name, (x, frame.bottom + 6), TINY, &ink)?;
                next = middle + room;
            }
        }
        Ok(())
    }

    fn draw_bar<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, frame: &Frame, index: usize) -> Drawn<DB> {
        let bar = &self.bars[index];
        let Some(value) = bar.value else { return Ok(()) };
        let share = |place: f64| (index as f64 + place) / self.bars.len() as f64;
        let (left, right) = (frame.across(share(0.1)), frame.across(share(0.9)));
        // Rectangles include both ends; none is thinner than a pixel.
        let right = (right - 1).max(left);
        let column = |from: i32, to: i32, colour: RGBColor| {
            Rectangle::new([(left, from.min(to)), (right, from.max(to))], colour.filled())
        };
        let foot = frame.at(frame.axis.foot());
        match frame.axis.place(value) {
            Some(share) if value != 0.0 => area.draw(&column(foot, frame.at(share), colour(bar.verdict))),
            _ if value.is_finite() => {
                let radius = ((right - left) / 2).clamp(1, 4);
                let ring = colour(bar.verdict).stroke_width(1);
                area.draw(&Circle::new(((left + right) / 2, foot - radius), radius, ring))
            }
            _ => {
                area.draw(&column(frame.bottom, frame.top, NOT_FINITE))?;
                // Its verdict at the foot.
                area.draw(&column(frame.bottom, frame.bottom - 8, colour(bar.verdict)))?;
                let word = if value.is_nan() { "NaN" } else { "Inf" };
                if text::width(word, TINY) <= right - left + 1 {
                    let place = ((left + right) / 2, frame.top + 10);
                    text::centred(area, word, place, TINY, &WHITE)?;
                }
                Ok(())
            }
        }
    }
}
