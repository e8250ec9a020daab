//! Reads a run: a folder that holds `steps.jsonl`, or such a file. Reads one step at a time, so that a file of
//! gigabytes takes the memory of its longest line.

use crate::failure::Failure;
use gradprobe::Verdict;
use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
};

/// The file of a run in its folder.
const STEPS: &str = "steps.jsonl";
/// Every line begins with it, as `write::json_line` writes it.
const BEGINNING: &[u8] = b"{\"step\":";

/// Gives the file of a run, from its folder or its file.
pub fn file_of(run: &Path) -> PathBuf {
    if run.is_dir() { run.join(STEPS) } else { run.to_owned() }
}

/// A run while it is read. The file may grow meanwhile.
pub struct Run {
    path: PathBuf,
    reader: BufReader<File>,
    line: Vec<u8>,
    number: u64,
    last: Option<u64>,
}

impl Run {
    /// Opens the file of a run, or that of its folder.
    pub fn open(run: &Path) -> Result<Self, Failure> {
        let path = file_of(run);
        let file = File::open(&path).map_err(|error| Failure::file(&path, error))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let found = reader.fill_buf().map_err(|error| Failure::file(&path, error))?;
        let compared = found.len().min(BEGINNING.len());
        if found[..compared] != BEGINNING[..compared] {
            return Err(Failure::file(&path, "is no run: its first line does not begin with {\"step\":"));
        }
        Ok(Self { path, reader, line: Vec::new(), number: 0, last: None })
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the next step; `None` where the file ends, even within a line that is being written. The next call reads
    /// that line again: its writer may have taken it back.
    pub fn next(&mut self) -> Result<Option<Step<'_>>, Failure> {
        self.line.clear();
        let fail = |error: io::Error| Failure::file(&self.path, error);
        let length = self.reader.read_until(b'\n', &mut self.line).map_err(fail)?;
        if self.line.last() != Some(&b'\n') {
            self.reader.seek_relative(-i64::try_from(length).unwrap_or(0)).map_err(fail)?;
            return Ok(None);
        }
        self.number += 1;
        let step: Step<'_> = serde_json::from_slice(&self.line).map_err(|error| self.damaged(reason(&error)))?;
        if let Some(last) = self.last.replace(step.step).filter(|&last| step.step <= last) {
            return Err(self.damaged(format!("step {} does not come after step {last}", step.step)));
        }
        Ok(Some(step))
    }

    /// Exchanges the line of the last step for a buffer.
    pub fn swap_line(&mut self, buffer: &mut Vec<u8>) {
        std::mem::swap(&mut self.line, buffer);
    }

    /// Makes the error of the last line.
    pub fn damaged(&self, reason: impl fmt::Display) -> Failure {
        Failure::line(&self.path, self.number, reason)
    }
}

/// Gives an error of serde_json without its "line 1": the line of the file is named instead.
fn reason(error: &serde_json::Error) -> String {
    let (text, column) = (error.to_string(), error.column());
    let place = format!(" at line {} column {column}", error.line());
    format!("{}, at its byte {column}", text.strip_suffix(&place).unwrap_or(&text))
}

/// One line of a run.
#[derive(Deserialize)]
pub struct Step<'a> {
    pub step: u64,
    /// The trainer's own numbers.
    #[serde(default)]
    pub scalars: BTreeMap<String, Option<Number>>,
    pub total_norm: Option<Number>,
    pub clip_coefficient: Option<Number>,
    #[serde(default)]
    pub skip: bool,
    /// `None` in a step whose details are not written.
    #[serde(borrow)]
    pub tensors: Option<Vec<Tensor<'a>>>,
    #[serde(borrow, default)]
    pub gsnr: Vec<Gsnr<'a>>,
    pub noise_scale: Option<Number>,
    #[serde(borrow, default)]
    pub histogram: Vec<Histogram<'a>>,
    pub findings: Option<Vec<Finding>>,
    #[serde(default, deserialize_with = "verdict")]
    pub verdict: Option<Verdict>,
}

/// One tensor of a step.
#[derive(Deserialize)]
pub struct Tensor<'a> {
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    #[serde(default)]
    pub absent: bool,
    pub count: u64,
    pub nan_count: u64,
    pub inf_count: u64,
    pub zero_count: u64,
    pub dead_count: u64,
    pub l2_norm: Option<Number>,
    pub first_nonfinite: Option<u64>,
    pub ratio: Option<Number>,
    pub update_ratio: Option<Number>,
    pub moments_gsnr: Option<Number>,
    #[serde(default, deserialize_with = "verdict")]
    pub verdict: Option<Verdict>,
}

/// Signal to noise of a tensor.
#[derive(Deserialize)]
pub struct Gsnr<'a> {
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    pub mean: Option<Number>,
}

/// Counts of a tensor's elements by magnitude.
#[derive(Deserialize)]
pub struct Histogram<'a> {
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    pub zero_count: u64,
    pub inf_count: u64,
    pub nan_count: u64,
    /// The smallest magnitude of a bin, and its count.
    pub bins: Vec<(Number, u64)>,
}

/// A finding of a step.
#[derive(Deserialize)]
pub struct Finding {
    #[serde(deserialize_with = "severity")]
    pub severity: Verdict,
    pub kind: String,
    pub since: u64,
    pub tensor: Option<String>,
    pub others: Vec<String>,
    pub value: Option<Number>,
    pub threshold: Option<Number>,
    pub rule: String,
    pub message: String,
    pub advice: Vec<String>,
}

/// A number of a run; those that JSON cannot hold are the strings "nan", "inf" and "-inf".
#[derive(Clone, Copy)]
pub struct Number(pub f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;

        impl Visitor<'_> for Read {
            type Value = Number;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, \"nan\", \"inf\" or \"-inf\"")
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Number, E> {
                Ok(Number(value))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Number, E> {
                match text {
                    "nan" => Ok(Number(f64::NAN)),
                    "inf" => Ok(Number(f64::INFINITY)),
                    "-inf" => Ok(Number(f64::NEG_INFINITY)),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(Read)
    }
}

fn verdict<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Verdict>, D::Error> {
    let name = Option::<Cow<'de, str>>::deserialize(deserializer)?;
    let of_name = |name: &str| {
        let known = [Verdict::Healthy, Verdict::Warning, Verdict::Critical];
        let found = known.into_iter().find(|verdict| verdict.name() == name);
        found.ok_or_else(|| de::Error::unknown_variant(name, &["healthy", "warning", "critical"]))
    };
    name.as_deref().map(of_name).transpose()
}

fn severity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Verdict, D::Error> {
    verdict(deserializer)?.ok_or_else(|| de::Error::custom("a finding without severity"))
}
