//! Prometheus' text exposition format, for the node exporter's textfile collector or a handler of your own.

use super::{Entry, Sink, file};
use crate::{
    Error, FindingKind, Verdict,
    statistics::{self, Output, Statistic, Value},
};
use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

/// Keeps a file with the gauges of the last step, replaced in one piece each time. Prometheus' collector reads files
/// that end in `.prom`.
#[derive(Debug)]
pub struct Prometheus {
    path: PathBuf,
}

impl Prometheus {
    /// Checks that the file can be written. It exists from the first step on.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref().to_owned();
        file::check_folder_of(&path)?;
        Ok(Self { path })
    }
}

impl Sink for Prometheus {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        file::replace(&self.path, prometheus_text(entry).as_bytes())
    }
}

/// Gives the gauges of one step in the text format, version 0.0.4: `gradprobe_step`, `gradprobe_total_norm` and its
/// neighbours, `gradprobe_scalar{name="…"}`, `gradprobe_tensor_l2_norm{tensor="…"}` and its neighbours, and
/// `gradprobe_findings{kind="…",severity="…"}`. The neighbours are the scalars among the
/// [statistics](crate::statistics#what-is-written). A missing value has no line.
pub fn prometheus_text(entry: &Entry) -> String {
    let mut text = String::new();
    #[expect(clippy::cast_precision_loss, reason = "what a gauge can hold")]
    let step = entry.step() as f64;
    family(&mut text, "step", "Step that the others are of", [(String::new(), step)]);
    for Statistic { name, meaning, of, .. } in statistics::of_steps(Output::Scalars) {
        let value = of(entry).and_then(Value::as_f64);
        family(&mut text, name, meaning, value.map(|value| (String::new(), value)));
    }
    let samples = entry.scalars().iter().map(|(name, value)| (format!("{{name=\"{}\"}}", escaped(name)), *value));
    family(&mut text, "scalar", "The trainer's own numbers", samples);
    for Statistic { name, meaning, of, .. } in statistics::of_tensors(Output::Scalars) {
        let samples = entry.tensors().filter_map(|tensor| {
            let value = of(&tensor)?.as_f64()?;
            Some((format!("{{tensor=\"{}\"}}", escaped(tensor.report.name)), value))
        });
        family(&mut text, &format!("tensor_{name}"), meaning, samples);
    }
    let samples = entry.verdict().into_iter().flat_map(|_| {
        let cases = FindingKind::ALL.into_iter().flat_map(|kind| {
            [Verdict::Warning, Verdict::Critical].map(|severity| {
                let of_it = entry.findings().iter().filter(|f| f.kind == kind && f.severity == severity);
                (kind, severity, u32::try_from(of_it.count()).map_or(f64::INFINITY, f64::from))
            })
        });
        // All of them, also those that are 0: a gauge that disappears keeps an alert in doubt.
        cases.map(|(kind, severity, count)| (format!("{{kind=\"{kind}\",severity=\"{severity}\"}}"), count))
    });
    family(&mut text, "findings", "Findings of a kind and severity in this step", samples);
    text
}

/// Adds a gauge with its samples: label sets and values. Adds nothing without samples.
fn family(text: &mut String, name: &str, help: &str, samples: impl IntoIterator<Item = (String, f64)>) {
    let mut samples = samples.into_iter().peekable();
    if samples.peek().is_none() {
        return;
    }
    let mut line = |line: std::fmt::Arguments<'_>| text.write_fmt(line).expect("a string takes all");
    line(format_args!("# HELP gradprobe_{name} {help}.\n# TYPE gradprobe_{name} gauge\n"));
    for (labels, value) in samples {
        line(format_args!("gradprobe_{name}{labels} {}\n", number(value)));
    }
}

/// In the form that Go's `ParseFloat` reads.
fn number(x: f64) -> String {
    if x.is_nan() {
        "NaN".to_owned()
    } else if x.is_infinite() {
        if x > 0.0 { "+Inf" } else { "-Inf" }.to_owned()
    } else {
        format!("{x:e}")
    }
}

/// Gives a label's value, with the three characters that the format escapes.
fn escaped(name: &str) -> String {
    name.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}
