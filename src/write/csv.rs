//! CSV: one row a step and tensor, for spreadsheets and data frames.

use super::{Entry, EntryTensor, Sink, append::Appender};
use crate::{Error, GsnrRecord};
use std::path::PathBuf;

/// Writes one row a step and tensor, below a line of headings. Commas, quotes and line breaks in names are quoted as
/// RFC 4180 has it. What does not exist is empty; other numbers are `nan`, `inf`, `-inf` or digits that read back to the
/// same bits. A file that is there is continued; it must have the same headings.
///
/// `total_norm`, `clip_coefficient` and `step_verdict` are the step's, the same in each of its rows.
#[derive(Debug)]
pub struct Csv(Appender);

const HEADINGS: [&str; 26] = [
    "step",
    "tensor",
    "dtype",
    "count",
    "nan_count",
    "inf_count",
    "zero_count",
    "dead_count",
    "l2_norm",
    "finite_l2_norm",
    "max_abs",
    "min_nonzero_abs",
    "mean",
    "mean_abs",
    "variance",
    "first_nonfinite",
    "param_norm",
    "ratio",
    "gsnr_mean",
    "gsnr_median",
    "verdict",
    "findings",
    "total_norm",
    "finite_total_norm",
    "clip_coefficient",
    "step_verdict",
];

impl Csv {
    /// Opens the file. What a crash has left of a line at its end is removed.
    ///
    /// # Errors
    /// [`Error::Unwritable`], also where the file holds something else.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let headings = rows([HEADINGS.map(str::to_owned)]);
        let mut file = Appender::lines(path.into(), &headings)?;
        if file.is_empty() {
            file.append(&headings)?;
        }
        Ok(Self(file))
    }
}

impl Sink for Csv {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        self.0.append(&rows(entry.tensors().map(|tensor| row(entry, &tensor))))
    }
}

fn rows(rows: impl IntoIterator<Item = [String; HEADINGS.len()]>) -> Vec<u8> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        writer.write_record(&row).expect("rows of one length, into memory");
    }
    writer.into_inner().expect("memory takes all")
}

fn row(entry: &Entry, tensor: &EntryTensor<'_>) -> [String; HEADINGS.len()] {
    let (report, outputs) = (&tensor.report, entry.report().outputs());
    let record = report.record;
    let verdict = |verdict: Option<crate::Verdict>| verdict.map_or_else(String::new, |verdict| verdict.to_string());
    let own = entry.findings().iter().filter(|finding| finding.tensor.as_deref() == Some(report.name));
    [
        entry.step().to_string(),
        report.name.to_owned(),
        report.dtype.to_string(),
        record.count.to_string(),
        record.nan_count.to_string(),
        record.inf_count.to_string(),
        record.zero_count.to_string(),
        record.dead_count.to_string(),
        number(record.l2_norm()),
        number(record.finite_l2_norm()),
        optional(record.max_abs().map(f64::from)),
        optional(record.min_nonzero_abs().map(f64::from)),
        optional(record.mean()),
        optional(record.mean_abs()),
        optional(record.variance()),
        record.first_nonfinite().map_or_else(String::new, |index| index.to_string()),
        optional(report.param_norm),
        optional(report.ratio()),
        optional(tensor.gsnr.and_then(GsnrRecord::mean)),
        optional(tensor.gsnr.and_then(GsnrRecord::median)),
        verdict(tensor.verdict),
        own.map(|finding| finding.kind.name()).collect::<Vec<_>>().join(" "),
        number(outputs.total_norm),
        number(outputs.finite_total_norm),
        number(outputs.coefficient_f64),
        verdict(entry.verdict()),
    ]
}

fn optional(x: Option<f64>) -> String {
    x.map_or_else(String::new, number)
}

/// With an exponent, as `Display` would spell 1e-300 in 300 zeros.
fn number(x: f64) -> String {
    if x.is_nan() {
        "nan".to_owned()
    } else if x.is_infinite() {
        x.to_string()
    } else {
        format!("{x:e}")
    }
}
