//! CSV: one row a step and tensor, for spreadsheets and data frames.

use super::{
    Entry, EntryTensor, Sink,
    append::{Appender, Opened, Rows, continued, cut, something_else},
};
use crate::{
    Error, TensorReport,
    statistics::{self, Output, Value},
};
use std::{
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Writes one row a step and tensor, below a line of headings. Commas, quotes and line breaks in names are quoted as in
/// RFC 4180. A missing value is empty; other numbers are `nan`, `inf`, `-inf` or digits that read back to the same
/// bits. An existing file is continued; it must have the same headings.
///
/// The columns are `step`, `tensor` and `dtype`; the [statistics](crate::statistics#what-is-written) of tensors that
/// are in CSV; `findings`; and the statistics of steps, the same in each row of a step. `step_verdict` is the step's.
/// The trainer's own numbers are left out, and so are steps [without details](Entry::without_details).
///
/// ```
/// # use gradprobe::{Config, Cpu, DType, Plan, Probe};
/// use gradprobe::write::{Csv, Entry, Sink};
///
/// # let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new())?;
/// # probe.measure(&[&[3.0f32, 4.0]])?;
/// let path = std::env::temp_dir().join(format!("gradprobe-{}.csv", std::process::id()));
/// let mut csv = Csv::open(&path)?;
/// csv.write(&Entry::new(probe.wait()?))?;
/// assert_eq!(std::fs::read_to_string(&path)?.lines().count(), 2); // the headings and a tensor
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Csv(Appender);

impl Csv {
    /// Opens the file. Removes the part of a step that a crash has left at its end: a part of a row at once, rows of a
    /// partial step with the first step that is written. Reads the whole file for that, at some 600 MB a second.
    ///
    /// # Errors
    /// [`Error::Unwritable`], also where the file has other content, or another sink or process writes to it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Appender::new(path.into(), open).map(Self)
    }
}

impl Sink for Csv {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        if !entry.has_details() {
            return Ok(());
        }
        let (count, rows) = (entry.report().records().len(), rows(entry.tensors().map(|tensor| row(entry, &tensor))));
        self.0.append(entry.step(), count, &rows)
    }

    fn last(&self) -> Option<(&Path, u64)> {
        self.0.last()
    }
}

fn open(path: &Path) -> io::Result<Opened> {
    let headings = rows([headings()]);
    let mut file = continued(path, &headings)?;
    let length = file.metadata()?.len();
    if length < headings.len() as u64 {
        cut(&file, 0)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&headings)?;
        return Ok(Opened { file, last: None, rows: None });
    }
    // From the start on: names may have line breaks, so that rows cannot be told from the end.
    file.seek(SeekFrom::Start(0))?;
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(&file);
    let columns = reader.byte_headers()?.len();
    let (mut row, mut end) = (csv::ByteRecord::new(), reader.position().byte());
    let (mut last, mut found) = (None, None::<Rows>);
    while reader.read_byte_record(&mut row)? {
        let (start, after) = (end, reader.position().byte());
        // The last field is never in quotes, so that a row of all columns is whole at its line break.
        if after == length && (row.len() < columns || !ends_with_newline(&file)?) {
            break;
        }
        let step = str::from_utf8(&row[0]).ok().and_then(|step| step.parse().ok()).filter(|_| row.len() == columns);
        let step = Some(step.ok_or_else(something_else)?);
        match &mut found {
            Some(rows) if step == last => rows.count += 1,
            _ => found = Some(Rows { start, count: 1, before: last }),
        }
        (last, end) = (step, after);
    }
    cut(&file, end)?;
    Ok(Opened { file, last, rows: found })
}

fn rows(rows: impl IntoIterator<Item = Vec<String>>) -> Vec<u8> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        writer.write_record(&row).expect("rows of one length, into memory");
    }
    writer.into_inner().expect("memory takes all")
}

fn headings() -> Vec<String> {
    let of_tensors: Vec<_> = statistics::of_tensors(Output::Csv).map(|statistic| statistic.name).collect();
    let of_step = statistics::of_steps(Output::Csv).map(|statistic| match statistic.name {
        name if of_tensors.contains(&name) => format!("step_{name}"),
        name => name.to_owned(),
    });
    let first = ["step", "tensor", "dtype"].iter().chain(&of_tensors).chain(&["findings"]);
    first.map(|&name| name.to_owned()).chain(of_step).collect()
}

fn row(entry: &Entry, tensor: &EntryTensor<'_>) -> Vec<String> {
    let TensorReport { name, dtype, .. } = tensor.report;
    let of_tensor = statistics::of_tensors(Output::Csv).map(|statistic| cell((statistic.of)(tensor)));
    let of_step = statistics::of_steps(Output::Csv).map(|statistic| cell((statistic.of)(entry)));
    let own = entry.findings().iter().filter(|finding| finding.tensors().any(|tensor| tensor == name));
    let findings = own.map(|finding| finding.kind.name()).collect::<Vec<_>>().join(" ");
    let first = [entry.step().to_string(), name.to_owned(), dtype.to_string()];
    first.into_iter().chain(of_tensor).chain([findings]).chain(of_step).collect()
}

fn cell(value: Option<Value>) -> String {
    let text = match value {
        None => None,
        Some(Value::Whole(whole)) => whole.map(|whole| whole.to_string()),
        Some(Value::Number(value)) => value.map(number),
        Some(Value::Flag(flag)) => Some(flag.to_string()),
        Some(Value::Verdict(verdict)) => verdict.map(|verdict| verdict.to_string()),
    };
    text.unwrap_or_default()
}

/// With an exponent, where `Display` would write 1e-300 in 300 zeros.
fn number(x: f64) -> String {
    if x.is_nan() {
        "nan".to_owned()
    } else if x.is_infinite() {
        x.to_string()
    } else {
        format!("{x:e}")
    }
}

fn ends_with_newline(mut file: &std::fs::File) -> io::Result<bool> {
    let mut byte = [0];
    file.seek(SeekFrom::End(-1))?;
    io::Read::read_exact(&mut file, &mut byte)?;
    Ok(byte == *b"\n")
}
