//! Draws pictures, as SVG and with the feature `png` as PNG: of a step by layer, and of a run by step.
//!
//! Colours show the verdicts of tensors: blue or none is healthy, orange a warning, red critical. A value that an axis
//! cannot show is marked, never left out: NaN or an infinite value is a purple column as high as the picture, 0 on a
//! logarithmic axis a ring at its foot. Both formats come from the same drawing code with a font of its own, so that a
//! machine without fonts draws the same picture.
//!
//! ```
//! # use gradprobe::{Config, Cpu, DType, Plan, Probe, write::{Entry, charts::Chart}};
//! # let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new())?;
//! # probe.measure(&[&[1.0f32, 2.0]])?;
//! # let entry = Entry::new(probe.wait()?);
//! let svg = Chart::overview(&entry).svg();
//! assert!(svg.starts_with("<svg"));
//! # Ok::<(), gradprobe::Error>(())
//! ```

mod bars;
mod canvas;
mod course;
mod folder;
mod heat;
mod lines;
#[cfg(feature = "png")]
mod png;
mod scale;
mod text;

pub use course::Course;
pub use folder::ChartFolder;

use super::{Entry, EntryTensor, file};
use crate::{Error, Record, Verdict, gsnr::GsnrRecord, measure::printable};
use bars::{Bar, Bars};
use canvas::{Anchor, Canvas};
use heat::Heat;
use lines::Lines;
use scale::Scale;
use std::path::Path;
use text::{Labels, SMALL, TITLE};

/// Red, green, blue.
type Colour = [u8; 3];

/// Blue.
const HEALTHY: Colour = [0x4c, 0x78, 0xa8];
/// Orange.
const WARNING: Colour = [0xf5, 0x85, 0x18];
/// Red.
const CRITICAL: Colour = [0xd6, 0x27, 0x28];
/// Purple.
const NOT_FINITE: Colour = [0x8e, 0x44, 0xad];
const WHITE: Colour = [0xff; 3];
const DARK: Colour = [0x22; 3];
const GREY: Colour = [0x66; 3];
/// Lines behind the data.
const PALE: Colour = [0xe4; 3];

fn colour(verdict: Option<Verdict>) -> Colour {
    match verdict {
        None | Some(Verdict::Healthy) => HEALTHY,
        Some(Verdict::Warning) => WARNING,
        Some(Verdict::Critical) => CRITICAL,
    }
}

/// A picture, ready to be drawn.
#[derive(Clone, Debug)]
pub struct Chart {
    title: String,
    /// A line below the title.
    subtitle: String,
    /// The legend of the colours.
    legend: Vec<(Colour, &'static str)>,
    /// Left to right, then down.
    panels: Vec<Panel>,
    columns: i32,
    /// Pixels.
    size: (i32, i32),
}

#[derive(Clone, Debug)]
enum Panel {
    Bars(Bars),
    Lines(Lines),
    Heat(Heat),
}

/// Height of title, subtitle and legend, in pixels.
const HEADER: i32 = 64;
const OF_TENSORS: [(Colour, &str); 4] =
    [(HEALTHY, "healthy"), (WARNING, "warning"), (CRITICAL, "critical"), (NOT_FINITE, "NaN or Inf")];

impl Chart {
    /// Draws mean, std, norm and largest magnitude of every tensor, the last three on logarithmic axes. 1500 × 1000
    /// pixels.
    pub fn overview(entry: &Entry) -> Self {
        let bars = |title, scale, of: fn(&Record) -> Option<f64>| {
            let value = move |tensor: &EntryTensor<'_>| {
                // Statistics are of the finite elements; a tensor with others is still marked.
                let record = tensor.report.record;
                if record.has_nonfinite() { Some(record.l2_norm()) } else { of(record) }
            };
            Panel::Bars(Bars { title, scale, reference: None, bars: bars_of(entry, value) })
        };
        Self {
            title: format!("Gradients by layer, step {}", entry.step()),
            subtitle: worst(entry),
            legend: OF_TENSORS.into(),
            panels: vec![
                bars("mean", Scale::Linear, Record::mean),
                bars("standard deviation", Scale::Logarithmic, Record::std),
                bars("L2 norm", Scale::Logarithmic, |record| Some(record.l2_norm())),
                bars("largest magnitude", Scale::Logarithmic, |record| record.max_abs().map(f64::from)),
            ],
            columns: 2,
            size: (1500, 1000),
        }
    }

    /// Draws the norm of every tensor in the plan's order, on a logarithmic axis: gradients that vanish or explode with
    /// depth make a slope. 1200 × 600 pixels.
    pub fn norm_by_depth(entry: &Entry) -> Self {
        let bars = bars_of(entry, |tensor| Some(tensor.report.record.l2_norm()));
        Self {
            title: format!("L2 norm by depth, step {}", entry.step()),
            subtitle: worst(entry),
            legend: OF_TENSORS.into(),
            panels: vec![Panel::Bars(Bars { title: "", scale: Scale::Logarithmic, reference: None, bars })],
            columns: 1,
            size: (1200, 600),
        }
    }

    /// Draws the median signal-to-noise ratio of every tracked tensor, on a logarithmic axis. Below a line at 1 there
    /// is more noise than signal. 1200 × 600 pixels.
    pub fn gsnr(entry: &Entry) -> Self {
        let tracked = entry.tensors().filter(|tensor| tensor.gsnr.is_some());
        let bars = tracked.map(|tensor| Bar::new(&tensor, tensor.gsnr.and_then(GsnrRecord::median))).collect();
        let noise = entry.gsnr().and_then(crate::gsnr::GsnrReport::noise_scale);
        Self {
            title: format!("Median signal-to-noise ratio by layer, to step {}", entry.step()),
            subtitle: noise.map_or_else(String::new, |scale| format!("noise scale {scale:.3e} batches")),
            legend: OF_TENSORS[..3].into(),
            panels: vec![Panel::Bars(Bars { title: "", scale: Scale::Logarithmic, reference: Some(1.0), bars })],
            columns: 1,
            size: (1200, 600),
        }
    }

    /// Width and height in pixels.
    pub fn size(&self) -> (u32, u32) {
        (self.size.0.unsigned_abs(), self.size.1.unsigned_abs())
    }

    /// Gives the picture as an SVG document.
    pub fn svg(&self) -> String {
        let mut canvas = Canvas::new(self.size.0, self.size.1);
        self.draw(&mut canvas);
        canvas.into_svg()
    }

    /// Gives the picture as a PNG file.
    ///
    /// # Errors
    /// [`Error::Drawing`], when memory runs out.
    #[cfg(feature = "png")]
    pub fn png(&self) -> Result<Vec<u8>, Error> {
        png::encode(&self.svg())
    }

    /// Writes the picture in one piece: as PNG to a path that ends in `.png`, else as SVG.
    ///
    /// # Errors
    /// [`Error::Drawing`], also for a PNG without the feature `png`; [`Error::Unwritable`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        if !path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png")) {
            return file::replace(path, self.svg().as_bytes());
        }
        #[cfg(feature = "png")]
        return file::replace(path, &self.png()?);
        #[cfg(not(feature = "png"))]
        Err(Error::Drawing { reason: format!("{}: a PNG needs the feature `png`", path.display()) })
    }

    fn draw(&self, canvas: &mut Canvas) {
        let (width, height) = self.size;
        canvas.text(&self.title, (16, 20), TITLE, DARK, Anchor::Start);
        canvas.text(
            &text::cut(&self.subtitle, text::characters(width - 32, SMALL)),
            (16, 46),
            SMALL,
            DARK,
            Anchor::Start,
        );
        let mut x = width - 16;
        for (colour, meaning) in self.legend.iter().rev() {
            canvas.text(meaning, (x, 20), SMALL, DARK, Anchor::End);
            x -= text::width(meaning, SMALL) + 18;
            canvas.area((x, 14), (12, 12), *colour);
            x -= 18;
        }
        let across = self.columns;
        let down = i32::try_from(self.panels.len()).map_or(1, |panels| (panels + across - 1) / across).max(1);
        let size = (width / across, (height - HEADER) / down);
        for (index, panel) in (0..).zip(&self.panels) {
            let place = (index % across * size.0, HEADER + index / across * size.1);
            canvas.within(place, size, |canvas| match panel {
                Panel::Bars(bars) => bars.draw(canvas),
                Panel::Lines(lines) => lines.draw(canvas),
                Panel::Heat(heat) => heat.draw(canvas),
            });
        }
    }
}

fn bars_of(entry: &Entry, value: impl Fn(&EntryTensor<'_>) -> Option<f64>) -> Vec<Bar> {
    entry.tensors().map(|tensor| Bar::new(&tensor, value(&tensor))).collect()
}

/// The unhealthy tensors by name, the worst first: an axis cannot name hundreds.
fn worst(entry: &Entry) -> String {
    let names: Vec<String> = entry.tensors().map(|tensor| printable(tensor.report.name)).collect();
    let labels = Labels::of(names.iter().map(String::as_str), bars::NAME);
    let mut line = format!("total norm {:.3e}", entry.report().outputs().total_norm);
    for verdict in [Verdict::Critical, Verdict::Warning] {
        let of_it = entry.tensors().zip(&labels.short).filter(|(tensor, _)| tensor.verdict == Some(verdict));
        let names: Vec<&str> = of_it.map(|(_, name)| name.as_str()).collect();
        if !names.is_empty() {
            line += &format!(" · {} {verdict}: {}", names.len(), names.join(", "));
        }
    }
    line
}

#[cfg(all(test, not(feature = "png")))]
mod tests {
    use super::*;
    use crate::{Config, Cpu, Plan, Probe};

    #[test]
    fn a_png_without_its_feature_is_an_error_that_says_so() {
        let mut probe = Probe::new(Cpu, Plan::new::<&str>([]).unwrap(), Config::default()).unwrap();
        probe.measure(&[]).unwrap();
        let chart = Chart::overview(&Entry::new(probe.wait().unwrap()));
        let path = std::env::temp_dir().join("gradprobe-without-feature.PNG");
        let Err(Error::Drawing { reason }) = chart.save(&path) else { panic!("a PNG without resvg") };
        assert!(reason.contains("gradprobe-without-feature.PNG") && reason.ends_with("needs the feature `png`"));
        assert!(!path.exists());
    }
}
