//! Pictures, as SVG and as PNG: of a step by layer, and of a run by step.
//!
//! Tensors are coloured by their verdicts: blue or none is healthy, orange a warning, red critical. What an axis cannot
//! show is marked, never left out: a value that is NaN or infinite is a purple column as high as the picture, a 0 on a
//! logarithmic axis a ring at its foot. Both formats come from the same drawing code with a font of its own, so that a
//! machine without fonts draws the same picture.
//!
//! ```
//! # use gradprobe::{Config, CpuProbe, DType, HostTensor, Plan, write::{Entry, charts::Chart}};
//! # let mut probe = CpuProbe::new(Plan::new([("weight", DType::F32, 2)])?, Config::default())?;
//! # let entry = Entry::new(probe.measure(&[HostTensor::F32(&[1.0, 2.0])])?);
//! let svg = Chart::overview(&entry).svg()?;
//! assert!(svg.starts_with("<svg"));
//! # Ok::<(), gradprobe::Error>(())
//! ```

mod bars;
mod course;
mod folder;
mod heat;
mod lines;
mod scale;
mod text;

pub use course::Course;
pub use folder::ChartFolder;

use super::{Entry, EntryTensor, file};
use crate::{Error, GsnrRecord, Record, Verdict, report::printable};
use bars::{Bar, Bars};
use heat::Heat;
use lines::Lines;
use plotters::{coord::Shift, prelude::*};
use scale::Scale;
use std::{fmt::Display, path::Path};
use text::{DARK, SMALL, TITLE};

/// Blue.
const HEALTHY: RGBColor = RGBColor(0x4c, 0x78, 0xa8);
/// Orange.
const WARNING: RGBColor = RGBColor(0xf5, 0x85, 0x18);
/// Red.
const CRITICAL: RGBColor = RGBColor(0xd6, 0x27, 0x28);
/// Purple.
const NOT_FINITE: RGBColor = RGBColor(0x8e, 0x44, 0xad);

fn colour(verdict: Option<Verdict>) -> RGBColor {
    match verdict {
        None | Some(Verdict::Healthy) => HEALTHY,
        Some(Verdict::Warning) => WARNING,
        Some(Verdict::Critical) => CRITICAL,
    }
}

/// What drawing gives, on whichever backend.
type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// A picture, ready to be drawn.
#[derive(Clone, Debug)]
pub struct Chart {
    title: String,
    /// A line below the title.
    subtitle: String,
    /// What the colours mean.
    legend: Vec<(RGBColor, &'static str)>,
    /// Left to right, then down.
    panels: Vec<Panel>,
    columns: usize,
    /// Pixels.
    size: (u32, u32),
}

#[derive(Clone, Debug)]
enum Panel {
    Bars(Bars),
    Lines(Lines),
    Heat(Heat),
}

/// Height of title, subtitle and legend, in pixels.
const HEADER: u32 = 64;
const OF_TENSORS: [(RGBColor, &str); 4] =
    [(HEALTHY, "healthy"), (WARNING, "warning"), (CRITICAL, "critical"), (NOT_FINITE, "NaN or Inf")];

impl Chart {
    /// Mean, std, norm and largest magnitude of every tensor, the last three on logarithmic axes. 1500 × 1000 pixels.
    pub fn overview(entry: &Entry) -> Self {
        let bars = |title, scale, of: fn(&Record) -> Option<f64>| {
            let value = move |tensor: &EntryTensor<'_>| {
                // Statistics are of the finite elements; a tensor with others is marked all the same.
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

    /// The norm of every tensor in the plan's order, on a logarithmic axis: gradients that vanish or explode with depth
    /// make a slope. 1200 × 600 pixels.
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

    /// The median signal-to-noise ratio of every tracked tensor, on a logarithmic axis with a line at 1, below which
    /// there is more noise than signal. 1200 × 600 pixels.
    pub fn gsnr(entry: &Entry) -> Self {
        let tracked = entry.tensors().filter(|tensor| tensor.gsnr.is_some());
        let bars = tracked.map(|tensor| Bar::new(&tensor, tensor.gsnr.and_then(GsnrRecord::median))).collect();
        let noise = entry.gsnr().and_then(crate::GsnrReport::noise_scale);
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
        self.size
    }

    /// The picture as an SVG document.
    ///
    /// # Errors
    /// [`Error::Drawing`].
    pub fn svg(&self) -> Result<String, Error> {
        let mut svg = String::new();
        self.draw_on(SVGBackend::with_string(&mut svg, self.size))?;
        Ok(svg)
    }

    /// The picture as a PNG file.
    ///
    /// # Errors
    /// [`Error::Drawing`].
    pub fn png(&self) -> Result<Vec<u8>, Error> {
        let (width, height) = self.size;
        let mut pixels = vec![0; 3 * width as usize * height as usize];
        self.draw_on(BitMapBackend::with_buffer(&mut pixels, self.size))?;
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
        written.map_err(drawing)?;
        Ok(file)
    }

    /// Writes the picture in one piece: as PNG to a path that ends in `.png`, else as SVG.
    ///
    /// # Errors
    /// [`Error::Drawing`], [`Error::Unwritable`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let is_png = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
        let content = if is_png { self.png()? } else { self.svg()?.into_bytes() };
        file::replace(path, &content)
    }

    fn draw_on<DB: DrawingBackend>(&self, backend: DB) -> Result<(), Error> {
        text::register_font()?;
        let root = backend.into_drawing_area();
        self.draw(&root).and_then(|()| root.present()).map_err(drawing)
    }

    fn draw<DB: DrawingBackend>(&self, root: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        root.fill(&WHITE)?;
        let (header, body) = root.split_vertically(HEADER);
        text::left(&header, &self.title, (16, 20), TITLE, &DARK)?;
        let room = text::characters(self.size.0.saturating_sub(32), SMALL);
        text::left(&header, &text::cut(&self.subtitle, room), (16, 46), SMALL, &DARK)?;
        let mut x = i32::try_from(self.size.0).unwrap_or(i32::MAX) - 16;
        for (colour, meaning) in self.legend.iter().rev() {
            x -= text::width(meaning, SMALL);
            text::left(&header, meaning, (x, 20), SMALL, &DARK)?;
            x -= 18;
            header.draw(&Rectangle::new([(x, 14), (x + 12, 26)], colour.filled()))?;
            x -= 18;
        }
        let rows = self.panels.len().div_ceil(self.columns);
        for (panel, area) in self.panels.iter().zip(body.split_evenly((rows, self.columns))) {
            match panel {
                Panel::Bars(bars) => bars.draw(&area)?,
                Panel::Lines(lines) => lines.draw(&area)?,
                Panel::Heat(heat) => heat.draw(&area)?,
            }
        }
        Ok(())
    }
}

/// Width and height of an area in pixels.
fn dimensions<DB: DrawingBackend>(area: &DrawingArea<DB, Shift>) -> (i32, i32) {
    let (width, height) = area.dim_in_pixel();
    (i32::try_from(width).unwrap_or(i32::MAX), i32::try_from(height).unwrap_or(i32::MAX))
}

fn bars_of(entry: &Entry, value: impl Fn(&EntryTensor<'_>) -> Option<f64>) -> Vec<Bar> {
    entry.tensors().map(|tensor| Bar::new(&tensor, value(&tensor))).collect()
}

/// The unhealthy tensors by name, the worst first: where there are hundreds, an axis cannot name them.
fn worst(entry: &Entry) -> String {
    let total = entry.report().outputs().total_norm;
    let mut line = format!("total norm {total:.3e}");
    for verdict in [Verdict::Critical, Verdict::Warning] {
        let names: Vec<String> = entry
            .tensors()
            .filter(|tensor| tensor.verdict == Some(verdict))
            .map(|tensor| text::shortened(&printable(tensor.report.name), 28))
            .collect();
        if !names.is_empty() {
            line += &format!(" · {} {verdict}: {}", names.len(), names.join(", "));
        }
    }
    line
}

fn drawing(error: impl Display) -> Error {
    Error::Drawing { reason: error.to_string() }
}
