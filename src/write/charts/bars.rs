//! One bar a tensor.

use super::{
    DARK, EntryTensor, GREY, HEALTHY, NOT_FINITE, WHITE,
    canvas::{Anchor, Canvas},
    colour, printable,
    scale::{Axis, Frame, Scale},
    text::{self, HEADING, Labels, TINY},
};
use crate::Verdict;

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
    /// `None` for a missing number.
    value: Option<f64>,
    verdict: Option<Verdict>,
}

impl Bar {
    pub fn new(tensor: &EntryTensor<'_>, value: Option<f64>) -> Self {
        Self { name: printable(tensor.report.name), value, verdict: tensor.verdict }
    }
}

/// Characters shown of a name.
pub const NAME: usize = 24;

impl Bars {
    pub fn draw(&self, canvas: &mut Canvas) {
        let labels = Labels::of(self.bars.iter().map(|bar| bar.name.as_str()), NAME);
        let longest = labels.short.iter().map(|name| text::width(name, TINY)).max().unwrap_or(0);
        let values = self.bars.iter().filter_map(|bar| bar.value).chain(self.reference);
        let headed = !self.title.is_empty() || !labels.pattern.is_empty();
        let frame = Frame {
            left: Frame::LABELS + 8,
            right: canvas.width - 16,
            top: if headed { 34 } else { 12 },
            bottom: canvas.height - longest - 18,
            axis: Axis::of(self.scale, values),
        };
        canvas.text(self.title, (frame.left, 14), HEADING, DARK, Anchor::Start);
        if !labels.pattern.is_empty() {
            let room = frame.right - frame.left - text::width(self.title, HEADING) - 20;
            let pattern = text::shortened(&labels.pattern, text::characters(room, TINY));
            canvas.text(&pattern, (frame.right, 14), TINY, GREY, Anchor::End);
        }
        frame.draw(canvas);
        if self.bars.is_empty() {
            return frame.empty(canvas);
        }
        // The unhealthy last, so that they are seen where bars share a pixel.
        let mut order: Vec<usize> = (0..self.bars.len()).collect();
        order.sort_by_key(|&index| {
            (self.bars[index].verdict, self.bars[index].value.is_some_and(|value| !value.is_finite()))
        });
        for index in order {
            self.draw_bar(canvas, &frame, index);
        }
        if let Some(y) = self.reference.and_then(|value| frame.axis.place(value)).map(|share| frame.at(share)) {
            canvas.area((frame.left, y), (frame.right - frame.left, 2), DARK);
        }
        // As many names as do not touch.
        let mut next = i32::MIN;
        for (index, name) in labels.short.iter().enumerate() {
            let x = frame.across((index as f64 + 0.5) / self.bars.len() as f64);
            if x >= next {
                let ink = match colour(self.bars[index].verdict) {
                    HEALTHY => DARK,
                    other => other,
                };
                canvas.text(name, (x, frame.bottom + 6), TINY, ink, Anchor::TopEnd);
                next = x + TINY + 3;
            }
        }
    }

    fn draw_bar(&self, canvas: &mut Canvas, frame: &Frame, index: usize) {
        let bar = &self.bars[index];
        let Some(value) = bar.value else { return };
        let share = |place: f64| (index as f64 + place) / self.bars.len() as f64;
        // Gaps only where there is room: between many bars they would make a pattern without meaning.
        let gap =
            if frame.right - frame.left / 4 < i32::try_from(self.bars.len()).unwrap_or(i32::MAX) { 0.0 } else { 0.1 };
        let left = frame.across(share(gap));
        // No bar is thinner than a pixel, and no marked one thinner than two.
        let plain = value.is_finite() && colour(bar.verdict) == HEALTHY;
        let width = (frame.across(share(1.0 - gap)) - left).max(if plain { 1 } else { 2 });
        let mut column = |from: i32, to: i32, colour| {
            canvas.area((left, from.min(to)), (width, (from - to).abs().max(1)), colour);
        };
        let foot = frame.at(frame.axis.foot());
        match frame.axis.place(value) {
            Some(share) if value != 0.0 => column(foot, frame.at(share), colour(bar.verdict)),
            _ if value.is_finite() => {
                let radius = (width / 2).clamp(1, 4);
                canvas.ring((left + width / 2, foot - radius), radius, colour(bar.verdict));
            }
            _ => {
                column(frame.bottom, frame.top, NOT_FINITE);
                // Its verdict at the foot.
                column(frame.bottom, frame.bottom - 8, colour(bar.verdict));
                let word = if value.is_nan() { "NaN" } else { "Inf" };
                if text::width(word, TINY) <= width {
                    canvas.text(word, (left + width / 2, frame.top + 10), TINY, WHITE, Anchor::Middle);
                }
            }
        }
    }
}
