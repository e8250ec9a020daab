//! JSON lines: one object a step, with the names that the inspector's report has.

use super::{Entry, Sink, append::Appender};
use crate::{Error, Finding, GsnrRecord, GsnrReport, Histogram, TensorReport, Verdict};
use serde::{Serialize, Serializer};
use std::path::PathBuf;

/// Writes one line of JSON a step; [`json_line`] says what is in it. A file that is there is continued.
#[derive(Debug)]
pub struct JsonLines(Appender);

impl JsonLines {
    /// Opens the file. What a crash has left of a line at its end is removed.
    ///
    /// # Errors
    /// [`Error::Unwritable`], also where the file holds something else.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Appender::lines(path.into(), b"{\"step\":").map(Self)
    }
}

impl Sink for JsonLines {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        let mut line = json_line(entry);
        line.push('\n');
        self.0.append(line.as_bytes())
    }
}

/// One step as JSON without a line break:
/// `{"step", "total_norm", "finite_total_norm", "clip_coefficient", "skip", "tensors": [{"name", "dtype", "absent"?,
/// "count", "nan_count", "inf_count", "zero_count", "dead_count", "l2_norm", "finite_l2_norm", "max_abs",
/// "min_nonzero_abs", "mean", "mean_abs", "variance", "first_nonfinite", "param_norm"?, "ratio"?, "verdict"?}], "gsnr"?,
/// "noise_scale", "histogram"?, "findings", "verdict"}`.
///
/// `absent` is there, and true, for a tensor that has no gradient in this step. What does not exist is null. A number that
/// JSON cannot hold is the string "nan", "inf" or "-inf". Numbers print so that reading them back gives the same bits. The
/// bins of a histogram are pairs of the smallest magnitude in the bin and the count, of bins that have any.
#[expect(clippy::missing_panics_doc, reason = "the types below have nothing that serde_json refuses")]
pub fn json_line(entry: &Entry) -> String {
    serde_json::to_string(&Step::new(entry)).expect("strings, numbers and lists of them")
}

/// One tensor of a step as [`json_line`] has it, for reports of another shape.
pub fn json_tensor<'a>(tensor: &TensorReport<'a>) -> impl Serialize + use<'a> {
    Tensor::new(tensor, None)
}

/// One tensor across steps, the same.
pub fn json_gsnr<'a>(name: &'a str, record: &GsnrRecord) -> impl Serialize + use<'a> {
    Gsnr::new(name, record)
}

/// A number, the same.
pub fn json_number(value: f64) -> impl Serialize {
    Number(value)
}

#[derive(Serialize)]
struct Step<'a> {
    step: u64,
    total_norm: Number,
    finite_total_norm: Number,
    clip_coefficient: Number,
    skip: bool,
    tensors: Vec<Tensor<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gsnr: Option<Vec<Gsnr<'a>>>,
    noise_scale: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    histogram: Option<Vec<Bins<'a>>>,
    findings: Option<Vec<Found<'a>>>,
    verdict: Option<&'static str>,
}

#[derive(Serialize)]
struct Tensor<'a> {
    name: &'a str,
    dtype: &'static str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    absent: bool,
    count: u64,
    nan_count: u64,
    inf_count: u64,
    zero_count: u64,
    dead_count: u64,
    l2_norm: Number,
    finite_l2_norm: Number,
    max_abs: Option<Number>,
    min_nonzero_abs: Option<Number>,
    mean: Option<Number>,
    mean_abs: Option<Number>,
    variance: Option<Number>,
    first_nonfinite: Option<u64>,
    /// There, perhaps as null, where the norms of the weights are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    param_norm: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<Option<Number>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<&'static str>,
}

#[derive(Serialize)]
struct Gsnr<'a> {
    name: &'a str,
    steps: u32,
    skipped: u32,
    defined: u64,
    constant: u64,
    mean: Option<Number>,
    median: Option<Number>,
    fraction_below_one: Option<Number>,
    sum_variance: Option<Number>,
    sum_squared_mean: Option<Number>,
    norm_cv: Option<Number>,
}

#[derive(Serialize)]
struct Bins<'a> {
    name: &'a str,
    zero_count: u64,
    inf_count: u64,
    nan_count: u64,
    bins: Vec<(Number, u64)>,
}

#[derive(Serialize)]
struct Found<'a> {
    severity: &'static str,
    kind: &'static str,
    step: u64,
    tensor: Option<&'a str>,
    value: Number,
    threshold: Number,
    rule: &'a str,
    message: &'a str,
    advice: &'a [&'static str],
}

impl<'a> Step<'a> {
    fn new(entry: &'a Entry) -> Self {
        let outputs = entry.report().outputs();
        Self {
            step: entry.step(),
            total_norm: Number(outputs.total_norm),
            finite_total_norm: Number(outputs.finite_total_norm),
            clip_coefficient: Number(outputs.coefficient_f64),
            skip: outputs.skip != 0,
            tensors: entry.tensors().map(|tensor| Tensor::new(&tensor.report, tensor.verdict)).collect(),
            gsnr: entry.gsnr().map(|gsnr| gsnr.tensors().map(|(name, record)| Gsnr::new(name, record)).collect()),
            noise_scale: entry.gsnr().and_then(GsnrReport::noise_scale).map(Number),
            histogram: entry.histogram().map(|report| report.tensors().map(|(name, of)| Bins::new(name, of)).collect()),
            findings: entry.verdict().map(|_| entry.findings().iter().map(Found::new).collect()),
            verdict: entry.verdict().map(Verdict::name),
        }
    }
}

impl<'a> Tensor<'a> {
    fn new(report: &TensorReport<'a>, verdict: Option<Verdict>) -> Self {
        let record = report.record;
        Self {
            name: report.name,
            dtype: report.dtype.name(),
            absent: report.is_absent(),
            count: record.count,
            nan_count: record.nan_count,
            inf_count: record.inf_count,
            zero_count: record.zero_count,
            dead_count: record.dead_count,
            l2_norm: Number(record.l2_norm()),
            finite_l2_norm: Number(record.finite_l2_norm()),
            max_abs: record.max_abs().map(f64::from).map(Number),
            min_nonzero_abs: record.min_nonzero_abs().map(f64::from).map(Number),
            mean: record.mean().map(Number),
            mean_abs: record.mean_abs().map(Number),
            variance: record.variance().map(Number),
            first_nonfinite: record.first_nonfinite(),
            param_norm: report.param_norm.map(Number),
            ratio: report.param_norm.map(|_| report.ratio().map(Number)),
            verdict: verdict.map(Verdict::name),
        }
    }
}

impl<'a> Gsnr<'a> {
    fn new(name: &'a str, record: &GsnrRecord) -> Self {
        // Of fewer than two steps, the sums say nothing.
        let sum = |sum: f64| (record.steps >= 2).then_some(Number(sum));
        Self {
            name,
            steps: record.steps,
            skipped: record.skipped,
            defined: record.defined,
            constant: record.constant,
            mean: record.mean().map(Number),
            median: record.median().map(Number),
            fraction_below_one: record.fraction_below_one().map(Number),
            sum_variance: sum(record.sum_variance),
            sum_squared_mean: sum(record.sum_squared_mean),
            norm_cv: record.norm_cv().map(Number),
        }
    }
}

impl<'a> Bins<'a> {
    fn new(name: &'a str, histogram: &Histogram) -> Self {
        Self {
            name,
            zero_count: histogram.zero_count,
            inf_count: histogram.inf_count,
            nan_count: histogram.nan_count,
            bins: histogram.occupied().map(|(bin, count)| (Number(Histogram::lowest_of(bin).into()), count)).collect(),
        }
    }
}

impl<'a> Found<'a> {
    fn new(finding: &'a Finding) -> Self {
        Self {
            severity: finding.severity.name(),
            kind: finding.kind.name(),
            step: finding.step,
            tensor: finding.tensor.as_deref(),
            value: Number(finding.value),
            threshold: Number(finding.threshold),
            rule: finding.rule,
            message: &finding.message,
            advice: finding.advice,
        }
    }
}

/// A number with all its bits; the ones JSON cannot hold are strings.
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            x if x.is_finite() => serializer.serialize_f64(x),
            x if x.is_nan() => serializer.serialize_str("nan"),
            x => serializer.serialize_str(if x > 0.0 { "inf" } else { "-inf" }),
        }
    }
}
