//! The writers: what they write reads back value for value, whatever the values and names, and failures are told.

use crate::entries::{NAMES, entries, host::OnHost};
use gradprobe::{
    Absent, Config, Cpu, DType, Error, HostTensor, Plan, Probe, Tensor, Verdict,
    health::{Health, Rules},
    histogram::Histogram,
    write::{Background, Csv, Entry, JsonLines, Prometheus, Sink, TensorBoard, json_line, prometheus_text},
};
use serde_json::Value;
use std::{
    fs,
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
    time::Instant,
};
use tempfile::TempDir;

/// A number as JSON has it here.
#[track_caller]
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Null => None,
        Value::String(text) => {
            Some(["nan", "inf", "-inf"].contains(&text.as_str()).then(|| text.parse().unwrap()).unwrap())
        }
        value => Some(value.as_f64().unwrap()),
    }
}

#[track_caller]
fn same(read: Option<f64>, written: Option<f64>) {
    let bits = |x: Option<f64>| x.map(|x| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() });
    assert_eq!(bits(read), bits(written), "{read:?} was read of {written:?}");
}

#[test]
fn json_reads_back_to_the_same_bits() {
    for entry in entries(5) {
        let line = json_line(&entry);
        assert!(!line.contains(['\n', '\r']));
        let read: Value = serde_json::from_str(&line).unwrap();
        let outputs = entry.report().outputs();
        assert_eq!((read["step"].as_u64(), read["verdict"].as_str()), (Some(outputs.step), Some("critical")));
        same(number(&read["total_norm"]), Some(outputs.total_norm));
        same(number(&read["finite_total_norm"]), Some(outputs.finite_total_norm));
        same(number(&read["clip_coefficient"]), Some(outputs.coefficient_f64));
        let tensors = read["tensors"].as_array().unwrap();
        assert_eq!(tensors.len(), NAMES.len());
        for (read, tensor) in tensors.iter().zip(entry.tensors()) {
            let record = tensor.report.record;
            assert_eq!(read["name"].as_str(), Some(tensor.report.name));
            assert_eq!(read["dtype"].as_str(), Some("F32"));
            assert_eq!(read["verdict"].as_str(), tensor.verdict.map(|verdict| verdict.name()));
            for (field, count) in [
                ("count", record.count),
                ("nan_count", record.nan_count),
                ("inf_count", record.inf_count),
                ("zero_count", record.zero_count),
                ("dead_count", record.dead_count),
            ] {
                assert_eq!(read[field].as_u64(), Some(count), "{field}");
            }
            assert_eq!(read["first_nonfinite"].as_u64(), record.first_nonfinite());
            for (field, written) in [
                ("l2_norm", Some(record.l2_norm())),
                ("finite_l2_norm", Some(record.finite_l2_norm())),
                ("max_abs", record.max_abs().map(f64::from)),
                ("min_nonzero_abs", record.min_nonzero_abs().map(f64::from)),
                ("mean", record.mean()),
                ("mean_abs", record.mean_abs()),
                ("variance", record.variance()),
                ("param_norm", tensor.report.param_norm),
                ("ratio", tensor.report.ratio()),
            ] {
                same(number(&read[field]), written);
            }
        }
        let finding = &read["findings"][0];
        assert_eq!(finding["tensor"].as_str(), Some(NAMES[2]));
        assert_eq!((finding["value"].as_str(), finding["kind"].as_str()), (Some("inf"), Some("exploding")));
        assert_eq!(finding["message"].as_str(), Some(entry.findings()[0].message.as_str()));
        assert_eq!(finding["advice"][1].as_str(), Some("clip, harder"));
        assert_eq!(
            (&read["findings"][2]["tensor"], read["findings"][1]["value"].as_str()),
            (&Value::Null, Some("nan"))
        );
        let bins = read["histogram"][2]["bins"].as_array().unwrap();
        let ends: Vec<f64> = bins.iter().map(|bin| bin[0].as_f64().unwrap()).collect();
        let bin = |x: f32| f64::from(Histogram::lowest_of(Histogram::bin_of(x)));
        assert_eq!(ends, [f32::from_bits(1), f32::MIN_POSITIVE, 1.0, f32::MAX].map(bin));
        match entry.gsnr() {
            None => assert_eq!(read.get("gsnr"), None),
            Some(gsnr) => {
                for (read, (name, record)) in read["gsnr"].as_array().unwrap().iter().zip(gsnr.tensors()) {
                    assert_eq!(read["name"].as_str(), Some(name));
                    same(number(&read["median"]), record.median());
                    same(number(&read["norm_cv"]), record.norm_cv());
                }
            }
        }
    }
}

#[test]
fn what_nobody_diagnosed_has_no_verdict() {
    let mut probe = Probe::new(Cpu, Plan::new([("w", DType::F32, 1)]).unwrap(), Config::default()).unwrap();
    let entry = Entry::new(probe.measure_host(&[HostTensor::F32(&[3.0])]).unwrap());
    let read: Value = serde_json::from_str(&json_line(&entry)).unwrap();
    assert!(read["verdict"].is_null() && read["findings"].is_null() && read["noise_scale"].is_null());
    let absent = ["gsnr", "histogram"].map(|field| read.get(field)).into_iter();
    assert!(absent.chain(["verdict", "ratio"].map(|field| read["tensors"][0].get(field))).all(|field| field.is_none()));
    assert!(!prometheus_text(&entry).contains("verdict") && prometheus_text(&entry).contains("total_norm 3e0\n"));
}

#[test]
fn a_tensor_without_a_gradient_is_marked_and_no_other_is() {
    let plan = Plan::new([("missing", DType::F32, 2), ("zero", DType::F32, 2), ("empty", DType::F32, 0)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::default()).unwrap();
    let (zero, empty) = ([0f32; 2], [0f32; 0]);
    let mut marks = |first: &dyn Tensor| {
        probe.measure(&[first, &zero, &empty]).unwrap();
        let line = json_line(&Entry::new(probe.wait().unwrap()));
        let read: Value = serde_json::from_str(&line).unwrap();
        let tensors = read["tensors"].as_array().unwrap();
        assert_eq!(["missing", "zero", "empty"], [0, 1, 2].map(|index| tensors[index]["name"].as_str().unwrap()));
        let marks: Vec<Option<bool>> =
            tensors.iter().map(|tensor| tensor.get("absent").map(|mark| mark.as_bool().unwrap())).collect();
        (tensors[0]["count"].as_u64().unwrap(), marks)
    };
    assert_eq!(marks(&Absent), (0, vec![Some(true), None, None]));
    assert_eq!(marks(&None::<Vec<f32>>), (0, vec![Some(true), None, None]));
    assert_eq!(marks(&[3f32, 4.0]), (2, vec![None; 3]));
}

/// Runs a sink over entries, twice from opening to the end, as before and after a restart.
fn written(path: &Path, open: impl Fn(&Path) -> Box<dyn Sink>, entries: &[Entry]) -> Vec<u8> {
    let (before, after) = entries.split_at(entries.len() / 2);
    for part in [before, after] {
        let mut sink = open(path);
        part.iter().for_each(|entry| sink.write(entry).unwrap());
        sink.finish().unwrap();
    }
    fs::read(path).unwrap()
}

#[test]
fn json_lines_continue_a_file_after_its_last_whole_line() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("steps.jsonl");
    let entries = entries(4);
    let whole: Vec<String> = entries.iter().map(json_line).collect();
    let read = written(&path, |path| Box::new(JsonLines::open(path).unwrap()), &entries);
    assert_eq!(String::from_utf8(read).unwrap(), whole.join("\n") + "\n");
    // A file of something else is left alone.
    for other in ["precious", "step,tensor\n1,a\n"] {
        fs::write(&path, other).unwrap();
        for refused in [JsonLines::open(&path).map(drop), Csv::open(&path).map(drop)] {
            let Err(Error::Unwritable { reason, .. }) = refused else { panic!("{refused:?}") };
            assert!(reason.contains("something else"), "{reason}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), other);
    }
    // A crash has cut off a line, longer than a block of the search for its beginning.
    fs::write(&path, format!("{}\n{{\"step\": {}", whole[0], "1".repeat(10_000))).unwrap();
    JsonLines::open(&path).unwrap().write(&entries[1]).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n{}\n", whole[0], whole[1]));
}

#[test]
fn csv_has_a_row_for_every_step_and_tensor() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tensors.csv");
    let entries = entries(5);
    let read = written(&path, |path| Box::new(Csv::open(path).unwrap()), &entries);
    let mut reader = csv::Reader::from_reader(read.as_slice());
    let headings = reader.headers().unwrap().clone();
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 5 * NAMES.len());
    let tensors = entries.iter().flat_map(|entry| entry.tensors().map(move |tensor| (entry, tensor)));
    for (row, (entry, tensor)) in rows.iter().zip(tensors) {
        let field = |name: &str| row.get(headings.iter().position(|heading| heading == name).unwrap()).unwrap();
        let number = |name: &str| (!field(name).is_empty()).then(|| field(name).parse::<f64>().unwrap());
        let record = tensor.report.record;
        assert_eq!((field("tensor"), field("step")), (tensor.report.name, entry.step().to_string().as_str()));
        assert_eq!(field("nan_count"), record.nan_count.to_string());
        assert_eq!(field("verdict"), tensor.verdict.unwrap().name());
        let findings = entry.findings().iter().filter(|f| f.tensor.as_deref() == Some(tensor.report.name)).count();
        assert_eq!(field("findings").split_whitespace().count(), findings);
        same(number("total_norm"), Some(entry.report().outputs().total_norm));
        same(number("clip_coefficient"), Some(entry.report().outputs().coefficient_f64));
        same(number("l2_norm"), Some(record.l2_norm()));
        same(number("min_nonzero_abs"), record.min_nonzero_abs().map(f64::from));
        same(number("variance"), record.variance());
        same(number("ratio"), tensor.report.ratio());
        same(number("gsnr_median"), tensor.gsnr.and_then(|record| record.median()));
    }
}

#[test]
fn two_event_files_of_one_process_are_two() {
    let folder = TempDir::new().unwrap();
    let files = [0, 1].map(|_| TensorBoard::create(&folder).unwrap().path().to_owned());
    assert_ne!(files[0], files[1]);
}

/// A sink that waits for a word before each entry, and notes the steps it has seen.
struct Slow {
    go: Receiver<()>,
    seen: Sender<u64>,
}

impl Sink for Slow {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        let _ = self.go.recv();
        self.seen.send(entry.step()).unwrap();
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.seen.send(u64::MAX).unwrap();
        Ok(())
    }
}

#[test]
fn a_slow_sink_drops_entries_and_holds_nobody_up() {
    let (go, gate) = channel();
    let (seen, steps) = channel();
    let mut background = Background::new(vec![Box::new(Slow { go: gate, seen })], 2).unwrap();
    let entries = entries(1000);
    let started = Instant::now();
    let sent: Vec<u64> = entries
        .into_iter()
        .filter_map(|entry| {
            let step = entry.step();
            background.send(entry).then_some(step)
        })
        .collect();
    assert!(started.elapsed().as_secs() < 5, "sending waited");
    // Two wait, and the sink may have taken one.
    assert!((2..=3).contains(&sent.len()) && sent[0] == 1, "{sent:?}");
    assert_eq!(background.dropped(), 1000 - sent.len() as u64);
    drop(go);
    let finished = background.finish();
    assert_eq!((finished.dropped, finished.error), (1000 - sent.len() as u64, None));
    assert_eq!(steps.try_iter().collect::<Vec<_>>(), [sent, vec![u64::MAX]].concat());
}

/// Fails, or panics, at step 2.
struct Faulty(bool);

impl Sink for Faulty {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        assert!(!self.0 || entry.step() != 2, "a sink that panics");
        match entry.step() {
            2 => Err(Error::Unwritable { path: "somewhere".into(), reason: "no room".into() }),
            _ => Ok(()),
        }
    }
}

#[test]
fn errors_and_panics_of_a_sink_reach_neither_the_others_nor_training() {
    let folder = TempDir::new().unwrap();
    for panics in [false, true] {
        let path = folder.path().join(format!("{panics}.jsonl"));
        let sinks: Vec<Box<dyn Sink>> = vec![Box::new(Faulty(panics)), Box::new(JsonLines::open(&path).unwrap())];
        let mut background = Background::new(sinks, 8).unwrap();
        assert!(entries(5).into_iter().all(|entry| background.send(entry)));
        let finished = background.finish();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 5);
        let error = finished.error.unwrap().to_string();
        let why = if panics { "writing in the background: a sink panicked" } else { "somewhere: no room" };
        assert_eq!(error, format!("step 2 is lost: {why}"));
        // One that panicked is given nothing more.
        let lost = if panics { 4 } else { 1 };
        assert_eq!((finished.written, finished.lost, finished.dropped), (5 - lost, lost, 0));
    }
    assert!(matches!(Background::new(Vec::new(), 0), Err(Error::InvalidConfig { option: "capacity", .. })));
}

#[test]
fn what_is_queued_is_written_when_the_writers_are_dropped() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("steps.jsonl");
    let mut background = Background::new(vec![Box::new(JsonLines::open(&path).unwrap())], 8).unwrap();
    entries(3).into_iter().for_each(|entry| assert!(background.send(entry)));
    drop(background);
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
}

#[test]
fn a_path_that_cannot_be_written_is_named() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let below = file.join("name");
    let refusals = [
        JsonLines::open(&below).map(drop),
        Csv::open(&below).map(drop),
        Prometheus::create(&below).map(drop),
        TensorBoard::create(&below).map(drop),
        Prometheus::create(folder.path()).map(drop),
        JsonLines::open(folder.path()).map(drop),
    ];
    for (index, refusal) in refusals.into_iter().enumerate() {
        let Err(Error::Unwritable { path, reason }) = refusal else { panic!("{index}: {refusal:?}") };
        assert!(path.starts_with(folder.path()) && !reason.contains('\n'), "{index}: {}: {reason}", path.display());
    }
    // A folder that goes away while training runs.
    let gone = folder.path().join("gone");
    fs::create_dir(&gone).unwrap();
    let mut sink = Prometheus::create(gone.join("a.prom")).unwrap();
    fs::remove_dir(&gone).unwrap();
    assert!(matches!(sink.write(&entries(1)[0]), Err(Error::Unwritable { path, .. }) if path == gone.join("a.prom")));
}

#[test]
fn what_belongs_to_other_tensors_is_refused() {
    let mut probe = Probe::new(Cpu, Plan::new([("w", DType::F32, 1)]).unwrap(), Config::default()).unwrap();
    let entry = Entry::new(probe.measure_host(&[HostTensor::F32(&[3.0])]).unwrap());
    let other = entries(2).pop().unwrap();
    let refused = entry.clone().with_histogram(other.histogram().unwrap().clone()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the histogram is of another plan than the report: tensor \"w\": it has \"blocks.0.attn/weight\" in its place"
    );
    assert!(entry.clone().with_gsnr(other.gsnr().unwrap().clone()).is_err());
    let mut health = Health::new(other.report().plan(), Rules::default()).unwrap();
    let diagnosis = health.diagnose(other.report()).unwrap();
    assert!(entry.clone().with_diagnosis(&diagnosis).is_err());
    assert_eq!(
        entries(1)[0].clone().with_diagnosis(&diagnosis).map(drop).unwrap_err(),
        Error::EntryOfAnotherStep { entry: "diagnosis", step: 2, reported: 1 }
    );
    let diagnosed = other.with_diagnosis(&diagnosis).unwrap();
    assert_eq!((diagnosed.verdict(), diagnosed.findings()), (Some(diagnosis.verdict()), diagnosis.findings()));
    assert!(diagnosed.tensors().map(|tensor| tensor.verdict.unwrap()).eq(diagnosis.verdicts().iter().copied()));
    let refused = entry.with_findings(Verdict::Healthy, [Verdict::Healthy; 2], []).unwrap_err();
    assert_eq!(refused, Error::TensorCount { planned: 1, given: 2, first: None });
}
