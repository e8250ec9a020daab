//! Prometheus' text exposition format, for the node exporter's textfile collector or a handler of the user's own.

use super::{Entry, EntryTensor, Sink, file};
use crate::{Error, FindingKind, GsnrRecord, GsnrReport, Record, Severity};
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
    /// Makes sure that the file can be written. It is there from the first step on.
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

type OfTensor = fn(&EntryTensor<'_>) -> Option<f64>;

/// Name, help and value of each gauge that a tensor has.
const OF_TENSORS: [(&str, &str, OfTensor); 15] = [
    ("l2_norm", "L2 norm, NaN or +Inf if an element is", |t| Some(t.report.record.l2_norm())),
    ("finite_l2_norm", "L2 norm of the finite elements", |t| Some(t.report.record.finite_l2_norm())),
    ("max_abs", "Largest finite magnitude", |t| t.report.record.max_abs().map(f64::from)),
    ("min_nonzero_abs", "Smallest finite magnitude that is not 0", |t| {
        t.report.record.min_nonzero_abs().map(f64::from)
    }),
    ("mean", "Mean of the finite elements", |t| t.report.record.mean()),
    ("std", "Standard deviation of the finite elements", |t| t.report.record.std()),
    ("zero_fraction", "Share of the elements that are 0", |t| t.report.record.zero_fraction()),
    ("dead_fraction", "Share of the elements below the dead threshold", |t| t.report.record.dead_fraction()),
    ("nan_count", "Elements that are NaN", |t| Some(count(t.report.record, |r| r.nan_count))),
    ("inf_count", "Elements that are infinite", |t| Some(count(t.report.record, |r| r.inf_count))),
    ("param_norm", "L2 norm of the weights", |t| t.report.param_norm),
    ("ratio", "Norm of the gradient over that of the weights", |t| t.report.ratio()),
    ("gsnr_mean", "Mean signal-to-noise ratio of the elements", |t| t.gsnr.and_then(GsnrRecord::mean)),
    ("gsnr_median", "Median signal-to-noise ratio of the elements", |t| t.gsnr.and_then(GsnrRecord::median)),
    ("verdict", "0 healthy, 1 warning, 2 critical", |t| t.verdict.map(super::level)),
];

#[expect(clippy::cast_precision_loss, reason = "a plan holds at most 2^40 elements")]
fn count(record: &Record, of: fn(&Record) -> u64) -> f64 {
    of(record) as f64
}

/// The gauges of one step in the text format, version 0.0.4: `gradprobe_total_norm` and its neighbours,
/// `gradprobe_tensor_l2_norm{tensor="…"}` and its neighbours, and `gradprobe_findings{kind="…",severity="…"}`. What does
/// not exist has no line.
pub fn prometheus_text(entry: &Entry) -> String {
    let mut text = String::new();
    let outputs = entry.report().outputs();
    #[expect(clippy::cast_precision_loss, reason = "what a gauge can hold")]
    let step = entry.step() as f64;
    let of_step = [
        ("step", "Measurement that the others are of", Some(step)),
        ("total_norm", "L2 norm of all gradients, NaN or +Inf if an element is", Some(outputs.total_norm)),
        ("finite_total_norm", "L2 norm of all finite elements", Some(outputs.finite_total_norm)),
        ("clip_coefficient", "What the clip multiplies the gradients by", Some(outputs.coefficient_f64)),
        ("skip", "1 if the step is to be left out", Some(outputs.skip.into())),
        ("noise_scale", "Noise scale in batches", entry.gsnr().and_then(GsnrReport::noise_scale)),
        ("verdict", "0 healthy, 1 warning, 2 critical", entry.verdict().map(super::level)),
    ];
    for (name, help, value) in of_step {
        family(&mut text, name, help, value.map(|value| (String::new(), value)));
    }
    for (name, help, of) in OF_TENSORS {
        let samples = entry.tensors().filter_map(|tensor| {
            let value = of(&tensor)?;
            Some((format!("{{tensor=\"{}\"}}", escaped(tensor.report.name)), value))
        });
        family(&mut text, &format!("tensor_{name}"), help, samples);
    }
    let samples = entry.verdict().into_iter().flat_map(|_| {
        let cases = FindingKind::ALL.into_iter().flat_map(|kind| {
            [Severity::Warning, Severity::Critical].map(|severity| {
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

/// A gauge with its samples: label sets and values. Nothing when there are none.
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

/// As Go's `ParseFloat` reads it.
fn number(x: f64) -> String {
    if x.is_nan() {
        "NaN".to_owned()
    } else if x.is_infinite() {
        if x > 0.0 { "+Inf" } else { "-Inf" }.to_owned()
    } else {
        format!("{x:e}")
    }
}

/// A label's value: the three characters that the format escapes.
fn escaped(name: &str) -> String {
    name.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}
