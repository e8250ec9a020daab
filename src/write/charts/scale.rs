//! Axes of values: the ticks, and the place of a value between the ends.

use super::{
    DARK, GREY, PALE,
    canvas::{Anchor, Canvas},
    text,
};

/// The scale of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// With 0 on the axis.
    Linear,
    /// By the decadic logarithm.
    Logarithmic,
}

/// An axis with its ends, in the scale's own unit: values or their logarithms.
#[derive(Clone, Debug)]
pub struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    /// Places and labels.
    ticks: Vec<(f64, String)>,
}

/// A rectangle of pixels with values along its height.
pub struct Frame {
    pub left: i32,
    pub right: i32,
    pub top: i32,
    pub bottom: i32,
    pub axis: Axis,
}

impl Axis {
    /// Makes an axis with a place for all these values, as far as they can have one.
    pub fn of(scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        let shown = values.filter(|x| x.is_finite() && (scale == Scale::Linear || *x > 0.0));
        let ends = shown.fold(None, |ends: Option<(f64, f64)>, x| {
            Some(ends.map_or((x, x), |(low, high)| (low.min(x), high.max(x))))
        });
        match scale {
            Scale::Linear => Self::linear(ends.unwrap_or((0.0, 0.0))),
            Scale::Logarithmic => Self::logarithmic(ends.unwrap_or((1.0, 1.0))),
        }
    }

    /// Makes an axis from 0 to `high` with these ticks.
    pub fn with_ticks(high: f64, ticks: Vec<(f64, String)>) -> Self {
        Self { scale: Scale::Linear, low: 0.0, high, ticks }
    }

    fn linear((low, high): (f64, f64)) -> Self {
        let (mut low, mut high) = (low.min(0.0), high.max(0.0));
        if low == high {
            (low, high) = (-1.0, 1.0);
        }
        // A step of 1, 2 or 5 times a power of ten, four to ten of them. Halves first: the span may be beyond f64.
        let rough = (high / 8.0 - low / 8.0).max(f64::MIN_POSITIVE);
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|&step| step >= rough);
        let step = step.unwrap_or(rough);
        let (first, last) = ((low / step).floor(), (high / step).ceil());
        let mut ticks = Vec::new();
        let mut number = first;
        while number <= last {
            ticks.push((number * step, if number == 0.0 { "0".to_owned() } else { label(number * step) }));
            number += 1.0;
        }
        Self { scale: Scale::Linear, low: first * step, high: last * step, ticks }
    }

    fn logarithmic((low, high): (f64, f64)) -> Self {
        // Some room below, so that the smallest value has a height.
        let low = (low.log10() - 0.3).floor();
        let high = (high.log10() + 0.02).ceil().max(low + 1.0);
        let every = ((high - low) / 9.0).ceil();
        let mut ticks = Vec::new();
        let mut decade = low;
        while decade <= high {
            ticks.push((decade, format!("1e{decade}")));
            if high - low <= 2.0 && decade < high {
                ticks.extend([2u8, 5].map(|m| (decade + f64::from(m).log10(), format!("{m}e{decade}"))));
            }
            decade += every;
        }
        Self { scale: Scale::Logarithmic, low, high, ticks }
    }

    /// Gives the place of a value between the ends, 0 to 1. `None` for NaN, Inf and, on a logarithmic axis, numbers not
    /// above 0.
    pub fn place(&self, value: f64) -> Option<f64> {
        let value = match self.scale {
            Scale::Linear => value,
            Scale::Logarithmic if value > 0.0 => value.log10(),
            Scale::Logarithmic => return None,
        };
        value.is_finite().then(|| self.share(value).clamp(0.0, 1.0))
    }

    fn share(&self, place: f64) -> f64 {
        // Halves, as the span may be beyond f64.
        (place / 2.0 - self.low / 2.0) / (self.high / 2.0 - self.low / 2.0)
    }

    /// The foot of a bar, 0 to 1: the place of 0, if the axis has it.
    pub fn foot(&self) -> f64 {
        match self.scale {
            Scale::Linear => self.share(0.0),
            Scale::Logarithmic => 0.0,
        }
    }
}

/// Two digits, without an exponent where that is short.
fn label(x: f64) -> String {
    if (0.01..1e4).contains(&x.abs()) {
        let text = format!("{x:.2}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        format!("{x:.1e}").replace(".0e", "e")
    }
}

impl Frame {
    /// Room for the values' labels, in pixels.
    pub const LABELS: i32 = 66;

    /// Draws the ticks' lines and labels.
    pub fn draw(&self, canvas: &mut Canvas) {
        for (place, label) in &self.axis.ticks {
            let y = self.at(self.axis.share(*place));
            canvas.area((self.left, y), (self.right - self.left, 1), PALE);
            canvas.text(label, (self.left - 6, y), text::SMALL, DARK, Anchor::End);
        }
        canvas.area((self.left - 1, self.top), (1, self.bottom - self.top), GREY);
        canvas.area((self.left - 1, self.bottom), (self.right - self.left + 1, 1), GREY);
    }

    /// The pixel at a share of the height.
    #[expect(clippy::cast_possible_truncation, reason = "between two pixels")]
    pub fn at(&self, share: f64) -> i32 {
        self.bottom - (share * f64::from(self.bottom - self.top)).round() as i32
    }

    /// The pixel at a share of the width.
    #[expect(clippy::cast_possible_truncation, reason = "between two pixels")]
    pub fn across(&self, share: f64) -> i32 {
        self.left + (share * f64::from(self.right - self.left)).round() as i32
    }

    /// Draws the text of a picture without data.
    pub fn empty(&self, canvas: &mut Canvas) {
        let middle = (self.across(0.5), self.at(0.5));
        canvas.text("nothing to show", middle, text::HEADING, GREY, Anchor::Middle);
    }
}

/// The steps along a frame's width.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    first: u64,
    last: u64,
}

impl Steps {
    /// Makes the axis from the first of these to the last; `None` without any.
    pub fn of(steps: impl Iterator<Item = u64>) -> Option<Self> {
        let ends = steps.fold(None, |ends: Option<(u64, u64)>, step| {
            Some(ends.map_or((step, step), |(first, last)| (first.min(step), last.max(step))))
        });
        ends.map(|(first, last)| Self { first, last })
    }

    /// The pixel of a step; the middle when there is but one.
    pub fn at(&self, frame: &Frame, step: u64) -> i32 {
        let span = self.last - self.first;
        frame.across(if span == 0 { 0.5 } else { (step - self.first) as f64 / span as f64 })
    }

    /// Draws ticks at these steps below a frame.
    pub fn draw(&self, canvas: &mut Canvas, frame: &Frame) {
        for step in self.ticks() {
            Self::label(canvas, step, (self.at(frame, step), frame.bottom));
        }
        canvas.text("step", (frame.across(0.5), frame.bottom + 32), text::SMALL, DARK, Anchor::Middle);
    }

    /// Draws the tick of one step.
    pub fn label(canvas: &mut Canvas, step: u64, (x, y): (i32, i32)) {
        canvas.area((x, y), (1, 6), GREY);
        canvas.text(&step.to_string(), (x, y + 15), text::TINY, DARK, Anchor::Middle);
    }

    /// At most a dozen steps, at round numbers.
    pub fn ticks(&self) -> impl Iterator<Item = u64> + use<> {
        let Self { first, last } = *self;
        let rough = ((last - first) / 10).max(1);
        let power = 10u64.pow(rough.ilog10());
        let every = [1, 2, 5].map(|factor| power * factor).into_iter().find(|&every| every >= rough);
        let every = every.unwrap_or(power.saturating_mul(10));
        let start = first.div_ceil(every).saturating_mul(every);
        // A single step, or two between round ones, have a tick as well.
        let alone = (start > last).then_some(first);
        alone.into_iter().chain(
            (0..)
                .map(move |n: u64| start.saturating_add(n.saturating_mul(every)))
                .take(12)
                .take_while(move |&step| step <= last),
        )
    }
}
