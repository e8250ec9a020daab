//! What is kept of a run in a folder, as readers see it: whole entries, or the reader fails.

use gradprobe::write::{Csv, JsonLines, Prometheus, Sink, TensorBoard};
use std::{fs, path::Path};

/// The sinks that keep every step, in this order.
pub const KEEPERS: [&str; 3] = ["steps.jsonl", "tensors.csv", "events"];

/// Opens them, and Prometheus' file.
pub fn sinks(folder: &Path) -> Vec<Box<dyn Sink>> {
    let [json, csv, events] = KEEPERS.map(|name| folder.join(name));
    vec![
        Box::new(JsonLines::open(json).unwrap()),
        Box::new(Csv::open(csv).unwrap()),
        Box::new(TensorBoard::create(events).unwrap()),
        Box::new(Prometheus::create(folder.join("gradients.prom")).unwrap()),
    ]
}

/// The steps that each of them has, in their order; of whole entries, and nothing else may be there.
#[track_caller]
pub fn steps(folder: &Path) -> [Vec<u64>; 3] {
    [0, 1, 2].map(|keeper| {
        let (steps, is_torn) = found(folder, keeper);
        assert!(!is_torn, "{} has a part of an entry behind step {:?}", KEEPERS[keeper], steps.last());
        steps
    })
}

/// The same of one of them, and whether a part of an entry is behind it.
#[track_caller]
pub fn found(folder: &Path, keeper: usize) -> (Vec<u64>, bool) {
    [of_json, of_csv, of_events][keeper](&folder.join(KEEPERS[keeper]))
}

#[track_caller]
fn of_json(path: &Path) -> (Vec<u64>, bool) {
    let text = fs::read_to_string(path).unwrap();
    let (whole, rest) = text.rsplit_once('\n').map_or(("", &*text), |(whole, rest)| (whole, rest));
    let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
    (whole.split_terminator('\n').map(step).collect(), !rest.is_empty())
}

/// A step is whole that has as many rows as the first.
#[track_caller]
fn of_csv(path: &Path) -> (Vec<u64>, bool) {
    let text = fs::read(path).unwrap();
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(&text[..]);
    let columns = reader.headers().unwrap().len();
    let mut rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    let cut = rows.pop_if(|row| row.len() < columns || !text.ends_with(b"\n"));
    assert!(rows.iter().all(|row| row.len() == columns));
    let steps: Vec<u64> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
    let mut of_step: Vec<&[u64]> = steps.chunk_by(|a, b| a == b).collect();
    let count = of_step.first().map_or(0, |rows| rows.len());
    let part = of_step.pop_if(|rows| rows.len() < count);
    assert!(of_step.iter().all(|rows| rows.len() == count), "{} lacks rows of a step", path.display());
    (of_step.iter().map(|rows| rows[0]).collect(), cut.is_some() || part.is_some())
}

#[derive(prost::Message)]
struct Event {
    #[prost(int64, tag = "2")]
    step: i64,
}

/// Of all event files, by their names. What lies behind the last whole record of one, readers leave alone: they go on with
/// the next.
#[track_caller]
fn of_events(folder: &Path) -> (Vec<u64>, bool) {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let records = files.iter().flat_map(|file| records(&fs::read(file).unwrap()));
    let steps = records.map(|record| <Event as prost::Message>::decode(&record[..]).unwrap().step);
    (steps.filter(|&step| step > 0).map(|step| step.try_into().unwrap()).collect(), false)
}

/// The whole records of an event file, whose checksums must be right.
#[track_caller]
fn records(file: &[u8]) -> Vec<Vec<u8>> {
    let checksum = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);
    let masked = |data: &[u8]| checksum.checksum(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let (mut rest, mut records) = (file, Vec::new());
    while let Some((header, behind)) = rest.split_at_checked(12) {
        let length = usize::try_from(u64::from_le_bytes(header[..8].try_into().unwrap())).unwrap();
        assert_eq!(header[8..], masked(&header[..8]));
        let Some((record, behind)) = behind.split_at_checked(length) else { break };
        let Some((sum, behind)) = behind.split_at_checked(4) else { break };
        assert_eq!(sum, masked(record));
        records.push(record.to_vec());
        rest = behind;
    }
    records
}
