//! TensorBoard's event files: TFRecord framing around protobuf messages.

use super::{
    Entry, Sink,
    append::{Appender, Opened},
    file,
};
use crate::{
    Error, Record,
    histogram::Histogram,
    statistics::{self, Output},
};
use crc::{CRC_32_ISCSI, Crc};
use prost::Message;
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
    process,
    time::{SystemTime, UNIX_EPOCH},
};

/// Writes an event file that TensorBoard shows: `tensorboard --logdir FOLDER`.
///
/// Scalars are f32, as TensorBoard keeps them: those among the [statistics](crate::statistics#what-is-written), by
/// their names for a step and as `l2_norm/NAME` and so on for each tensor, and the trainer's own by theirs. A missing
/// value has none. A value beyond f32 becomes infinite or 0.
///
/// Histograms, `gradient_abs/NAME`, are of |x|: four bins an octave, with zeros in a bin of their own below. NaN and
/// Inf are in none; they are the scalars `nan_count/NAME` and `inf_count/NAME`, in every step that has histograms or
/// any of them. A tensor without a finite element has no histogram.
///
/// ```
/// # use gradprobe::{Config, Cpu, DType, Plan, Probe};
/// use gradprobe::write::{Entry, Sink, TensorBoard};
///
/// # let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new())?;
/// # probe.measure(&[&[3.0f32, 4.0]])?;
/// let path = std::env::temp_dir().join(format!("gradprobe-events-{}", std::process::id()));
/// let mut events = TensorBoard::create(&path)?;
/// events.write(&Entry::new(probe.wait()?))?;
/// assert!(events.path().starts_with(&path)); // for `tensorboard --logdir`
/// # std::fs::remove_dir_all(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TensorBoard {
    file: Appender,
}

impl TensorBoard {
    /// Makes a new event file in `folder`, and the folder if it is missing. One folder is one run to TensorBoard. A run
    /// that goes on after a restart gets a second file in it, which continues after the last step there.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    pub fn create(folder: impl AsRef<Path>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        file::folder(folder)?;
        let last = last_step(folder).map_err(|error| file::unwritable(folder, error))?;
        // TensorBoard looks for `tfevents` in the name and reads files in the order of their names, so that time comes first.
        let (now, id) = (now(), process::id());
        let name = format!("events.out.tfevents.{:010}.{:09}{OWN}{id}", now.as_secs(), now.subsec_nanos());
        let mut file = Appender::new(folder.join(name), open)?;
        file.go_on_after(last);
        Ok(Self { file })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

impl Sink for TensorBoard {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        let event = Event {
            wall_time: now().as_secs_f64(),
            step: i64::try_from(entry.step()).unwrap_or(i64::MAX),
            what: Some(event::What::Summary(Summary { value: values(entry) })),
        };
        self.file.append(entry.step(), 1, &framed(&event))
    }

    fn last(&self) -> Option<(&Path, u64)> {
        self.file.last()
    }
}

/// Marks the names of our event files: a trainer may have others beside them.
const OWN: &str = ".gradprobe.";

fn open(path: &Path) -> io::Result<Opened> {
    let mut file = File::create_new(path)?;
    let version = Some(event::What::FileVersion("brain.Event:2".to_owned()));
    file.write_all(&framed(&Event { wall_time: now().as_secs_f64(), step: 0, what: version }))?;
    Ok(Opened { file, last: None, rows: None })
}

/// Gives the last step in the event files of a folder.
fn last_step(folder: &Path) -> io::Result<Option<u64>> {
    let mut last = None;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains(OWN) {
            last = last.max(last_step_of(File::open(entry.path())?)?);
        }
    }
    Ok(last)
}

/// Gives the step of the last whole event: steps rise in a file. Reads that event alone, and only the lengths of the
/// others.
fn last_step_of(mut file: File) -> io::Result<Option<u64>> {
    let (length, mut place, mut event) = (file.metadata()?.len(), 0u64, 0..0);
    let mut header = [0; 12];
    while place + 12 <= length {
        file.seek(SeekFrom::Start(place))?;
        file.read_exact(&mut header)?;
        let message = place + 12;
        let end = u64::from_le_bytes(header[..8].try_into().expect("8 bytes")).saturating_add(message);
        if end.saturating_add(4) > length {
            break;
        }
        (event, place) = (message..end, end + 4);
    }
    let mut message = Vec::new();
    file.seek(SeekFrom::Start(event.start))?;
    file.take(event.end - event.start).read_to_end(&mut message)?;
    let event = Event::decode(&message[..]).map_err(io::Error::other)?;
    // The version of a file has step 0, and no step of a run has.
    Ok(u64::try_from(event.step).ok().filter(|&step| step > 0))
}

fn now() -> std::time::Duration {
    // A clock before 1970 is no reason to fail.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A TFRecord: length, its checksum, the message, its checksum.
fn framed(event: &Event) -> Vec<u8> {
    const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
    // "Masked", since a checksum over data that holds checksums is weak.
    let masked = |data: &[u8]| CRC.checksum(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let message = event.encode_to_vec();
    let length = (message.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), &message, &masked(&message)].concat()
}

fn values(entry: &Entry) -> Vec<Value> {
    let mut values = Vec::new();
    values.extend(statistics::of_steps(Output::Scalars).filter_map(|statistic| {
        let value = (statistic.of)(entry)?.as_f64()?;
        Some(Value::scalar(statistic.name.to_owned(), value))
    }));
    values.extend(entry.scalars().iter().map(|(name, value)| Value::scalar(name.clone(), *value)));
    for tensor in entry.tensors().filter(|_| entry.has_details()) {
        let (name, record) = (tensor.report.name, tensor.report.record);
        values.extend(statistics::of_tensors(Output::Scalars).filter_map(|statistic| {
            let value = (statistic.of)(&tensor)?;
            let says_nothing = value == statistics::Value::Whole(Some(0)) && tensor.histogram.is_none();
            // The statistic first: TensorBoard groups by the part before the slash.
            let tag = format!("{}/{name}", statistic.name);
            if says_nothing { None } else { Some(Value::scalar(tag, value.as_f64()?)) }
        }));
        if let Some(histogram) = tensor.histogram.filter(|histogram| histogram.finite_count() > 0) {
            let what = value::What::Histogram(HistogramProto::new(histogram, record));
            values.push(Value { tag: format!("gradient_abs/{name}"), what: Some(what) });
        }
    }
    values
}

#[expect(clippy::cast_precision_loss, reason = "a plan holds at most 2^40 elements")]
fn as_f64(count: u64) -> f64 {
    count as f64
}

// The used parts of tensorflow/core/util/event.proto and tensorflow/core/framework/{summary,histogram}.proto.

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "event::What", tags = "3, 5")]
    what: Option<event::What>,
}

mod event {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum What {
        #[prost(string, tag = "3")]
        FileVersion(String),
        #[prost(message, tag = "5")]
        Summary(super::Summary),
    }
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(oneof = "value::What", tags = "2, 5")]
    what: Option<value::What>,
}

mod value {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum What {
        #[prost(float, tag = "2")]
        Simple(f32),
        #[prost(message, tag = "5")]
        Histogram(super::HistogramProto),
    }
}

impl Value {
    fn scalar(tag: String, value: f64) -> Self {
        Self { tag, what: Some(value::What::Simple(crate::measure::narrow(value))) }
    }
}

#[derive(Clone, PartialEq, Message)]
struct HistogramProto {
    #[prost(double, tag = "1")]
    min: f64,
    #[prost(double, tag = "2")]
    max: f64,
    #[prost(double, tag = "3")]
    num: f64,
    #[prost(double, tag = "4")]
    sum: f64,
    #[prost(double, tag = "5")]
    sum_squares: f64,
    /// Upper ends. A bucket begins at the one before.
    #[prost(double, repeated, tag = "6")]
    bucket_limit: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    bucket: Vec<f64>,
}

impl HistogramProto {
    /// Makes the histogram of |x| over the finite elements, of which there must be some; `record` is of the same
    /// elements.
    fn new(histogram: &Histogram, record: &Record) -> Self {
        let (mut limits, mut counts) = (Vec::new(), Vec::new());
        let mut push = |low: f64, high: f64, count: u64| {
            // One empty bucket for all that lie between: hundreds of zeros a tensor and step would fill a disk.
            if limits.last().is_none_or(|&last| last < low) {
                limits.push(low);
                counts.push(0.0);
            }
            limits.push(high);
            counts.push(as_f64(count));
        };
        if histogram.zero_count > 0 {
            push(f64::from(0f32.next_down()), 0.0, histogram.zero_count);
        }
        for (bin, count) in histogram.occupied() {
            push(Histogram::lowest_of(bin).next_down().into(), Histogram::highest_of(bin).into(), count);
        }
        let range = histogram.range();
        let lowest = if histogram.zero_count > 0 { 0.0 } else { range.map_or(0.0, |range| range.low) };
        Self {
            min: lowest,
            max: range.map_or(0.0, |range| range.high),
            num: as_f64(histogram.finite_count()),
            sum: record.sum_abs,
            sum_squares: record.finite_sum_squares(),
            bucket_limit: limits,
            bucket: counts,
        }
    }
}
