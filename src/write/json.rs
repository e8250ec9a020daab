//! JSON lines: one object a step, with the names of the inspector's report.

use super::{
    Entry, EntryTensor, Sink,
    append::{Appender, Opened, continued, cut, something_else},
};
use crate::{
    Error, Finding, TensorReport, Verdict,
    gsnr::GsnrRecord,
    histogram::Histogram,
    statistics::{self, Output, Value},
};
use serde::{Serialize, Serializer, ser::SerializeMap};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// The beginning of every line.
const BEGINNING: &[u8] = b"{\"step\":";

/// Writes one line of JSON a step; [`json_line`] lists its content. An existing file is continued.
///
/// ```
/// # use gradprobe::{Config, Cpu, DType, Plan, Probe};
/// use gradprobe::write::{Entry, JsonLines, Sink};
///
/// # let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new())?;
/// # probe.measure(&[&[3.0f32, 4.0]])?;
/// let path = std::env::temp_dir().join(format!("gradprobe-{}.jsonl", std::process::id()));
/// let mut lines = JsonLines::open(&path)?;
/// lines.write(&Entry::new(probe.wait()?))?;
/// assert!(std::fs::read_to_string(&path)?.starts_with("{\"step\":1,"));
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct JsonLines(Appender);

impl JsonLines {
    /// Opens the file. Removes the part of a line that a crash has left at its end.
    ///
    /// # Errors
    /// [`Error::Unwritable`], also where the file has other content, or another sink or process writes to it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Appender::new(path.into(), open).map(Self)
    }
}

fn open(path: &Path) -> io::Result<Opened> {
    let mut file = continued(path, BEGINNING)?;
    let length = file.metadata()?.len();
    let end = after_last_newline(&mut file, length)?;
    cut(&file, end)?;
    let last = if end == 0 { None } else { Some(step_of_line(&mut file, end)?) };
    Ok(Opened { file, last, rows: None })
}

/// Gives the step of the line that ends there.
fn step_of_line(file: &mut File, end: u64) -> io::Result<u64> {
    let start = after_last_newline(file, end - 1)?;
    let mut line = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    // As many bytes as the largest step has digits, and one.
    file.take(BEGINNING.len() as u64 + 21).read_to_end(&mut line)?;
    let step = line.strip_prefix(BEGINNING).and_then(|rest| rest.split(|byte| !byte.is_ascii_digit()).next());
    step.and_then(|digits| str::from_utf8(digits).ok()?.parse().ok()).ok_or_else(something_else)
}

/// Gives the place after the last newline before `end`, reading backwards.
fn after_last_newline(file: &mut File, mut end: u64) -> io::Result<u64> {
    const BLOCK: u64 = 4096;
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        Read::by_ref(file).take(end - start).read_to_end(&mut block)?;
        if let Some(place) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + place as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

impl Sink for JsonLines {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        let mut line = json_line(entry);
        line.push('\n');
        self.0.append(entry.step(), 1, line.as_bytes())
    }

    fn last(&self) -> Option<(&Path, u64)> {
        self.0.last()
    }
}

/// Gives one step as JSON without a line break:
/// `{"step", "scalars"?, …, "tensors"?: [{"name", "dtype", "absent"?, …}], "gsnr"?, "noise_scale", "histogram"?, "findings",
/// "verdict"}`, with the [statistics](crate::statistics#what-is-written) of steps and tensors that are in JSON, in
/// their order. A key that ends in `?` is present only with a value, as are `param_norm`, `ratio` and the `verdict` of
/// a tensor. `absent` is true, and present only for a tensor without a gradient in this step.
///
/// A missing value is null. A number that JSON cannot hold is the string "nan", "inf" or "-inf". Numbers read back to
/// the same bits. The bins of a histogram are pairs of the smallest magnitude in the bin and the count, for bins that
/// are not empty.
#[expect(clippy::missing_panics_doc, reason = "the types below have nothing that serde_json refuses")]
pub fn json_line(entry: &Entry) -> String {
    serde_json::to_string(&Step(entry)).expect("strings, numbers and lists of them")
}

/// Gives one tensor of a step as [`json_line`] does, for reports of another shape.
pub fn json_tensor<'a>(tensor: &TensorReport<'a>) -> impl Serialize + use<'a> {
    Tensor((*tensor).into())
}

/// Gives one tensor across steps in the same way.
pub fn json_gsnr<'a>(name: &'a str, record: &GsnrRecord) -> impl Serialize + use<'a> {
    Gsnr::new(name, record)
}

/// Gives a number in the same way.
pub fn json_number(value: f64) -> impl Serialize {
    Number(value)
}

struct Step<'a>(&'a Entry);

struct Tensor<'a>(EntryTensor<'a>);

struct Scalars<'a>(&'a [(String, f64)]);

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
    since: u64,
    tensor: Option<&'a str>,
    others: &'a [String],
    value: Number,
    threshold: Number,
    rule: &'a str,
    message: &'a str,
    advice: &'a [&'static str],
}

impl Serialize for Step<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let entry = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("step", &entry.step())?;
        if !entry.scalars().is_empty() {
            map.serialize_entry("scalars", &Scalars(entry.scalars()))?;
        }
        for statistic in statistics::of_steps(Output::Json) {
            // The lists have their places between the numbers.
            match statistic.name {
                "noise_scale" if entry.has_details() => {
                    map.serialize_entry("tensors", &entry.tensors().map(Tensor).collect::<Vec<_>>())?;
                    if let Some(gsnr) = entry.gsnr() {
                        let tensors = gsnr.tensors().map(|(name, record)| Gsnr::new(name, record));
                        map.serialize_entry("gsnr", &tensors.collect::<Vec<_>>())?;
                    }
                }
                "verdict" => {
                    if let Some(histogram) = entry.histogram() {
                        let tensors = histogram.tensors().map(|(name, of)| Bins::new(name, of));
                        map.serialize_entry("histogram", &tensors.collect::<Vec<_>>())?;
                    }
                    let findings = entry.verdict().map(|_| entry.findings().iter().map(Found::new));
                    map.serialize_entry("findings", &findings.map(Iterator::collect::<Vec<_>>))?;
                }
                _ => {}
            }
            if let Some(value) = (statistic.of)(entry) {
                map.serialize_entry(statistic.name, &value)?;
            }
        }
        map.end()
    }
}

impl Serialize for Scalars<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, Number(*value))))
    }
}

impl Serialize for Tensor<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", self.0.report.name)?;
        map.serialize_entry("dtype", self.0.report.dtype.name())?;
        if self.0.report.is_absent() {
            map.serialize_entry("absent", &true)?;
        }
        for statistic in statistics::of_tensors(Output::Json) {
            if let Some(value) = (statistic.of)(&self.0) {
                map.serialize_entry(statistic.name, &value)?;
            }
        }
        map.end()
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Whole(whole) => whole.serialize(serializer),
            Self::Number(number) => number.map(Number).serialize(serializer),
            Self::Flag(flag) => flag.serialize(serializer),
            Self::Verdict(verdict) => verdict.map(Verdict::name).serialize(serializer),
        }
    }
}

impl<'a> Gsnr<'a> {
    fn new(name: &'a str, record: &GsnrRecord) -> Self {
        // Below two steps the sums mean nothing.
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
            since: finding.since,
            tensor: finding.tensor.as_deref(),
            others: &finding.others,
            value: Number(finding.value),
            threshold: Number(finding.threshold),
            rule: finding.rule,
            message: &finding.message,
            advice: finding.advice,
        }
    }
}

/// A number with all its bits; those that JSON cannot hold are strings.
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
