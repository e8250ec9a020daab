//! What is written for Prometheus and TensorBoard, read by their own readers.

use crate::entries::{NAMES, entries};
use crate::require::skipped;
use gradprobe::{
    histogram::Histogram,
    write::{Prometheus, Sink, TensorBoard, prometheus_text},
};
use serde_json::Value;
use std::{fs, path::Path, process::Command};
use tempfile::TempDir;

#[track_caller]
fn same(read: Option<f64>, written: Option<f64>) {
    let bits = |x: Option<f64>| x.map(|x| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() });
    assert_eq!(bits(read), bits(written), "{read:?} was read of {written:?}");
}

/// Runs a test's Python with TensorBoard and prometheus_client; none where there is none.
fn python(code: &str, arguments: &[&Path]) -> Option<Value> {
    const VARIABLE: &str = "GRADPROBE_TENSORBOARD";
    let Ok(python) = std::env::var(VARIABLE) else {
        skipped(
            crate::require::TENSORBOARD,
            &format!("{VARIABLE} names no Python that has tensorboard and prometheus_client"),
        );
        return None;
    };
    let output = Command::new(python).arg("-c").arg(code).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn prometheus_reads_its_text() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("gradients.prom");
    let entry = entries(5).pop().unwrap();
    let mut sink = Prometheus::create(&path).unwrap();
    assert!(fs::read_dir(&folder).unwrap().next().is_none(), "nothing is there before the first step");
    sink.write(&entry).unwrap();
    sink.write(&entry).unwrap();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text, prometheus_text(&entry));
    for line in [
        "# TYPE gradprobe_total_norm gauge",
        "gradprobe_total_norm NaN",
        "gradprobe_step 5e0",
        "gradprobe_verdict 2e0",
        r#"gradprobe_tensor_l2_norm{tensor="a \"quoted\", name"} 0e0"#,
        r#"gradprobe_tensor_zero_fraction{tensor="a \"quoted\", name"} 1e0"#,
        r#"gradprobe_tensor_nan_count{tensor="größe–∇∥{x=\"1\"}"} 1e0"#,
        r#"gradprobe_findings{kind="exploding",severity="warning"} 2e0"#,
        r#"gradprobe_findings{kind="nan",severity="critical"} 0e0"#,
    ] {
        assert!(text.split('\n').any(|own| own == line), "{line} is not in\n{text}");
    }
    let of_inf = entries(1).pop().unwrap();
    let names: Vec<&str> = of_inf.tensors().map(|tensor| tensor.report.name).collect();
    assert_eq!(names, NAMES);

    let code = "
import json, sys
from prometheus_client.parser import text_string_to_metric_families
samples = [sample for family in text_string_to_metric_families(open(sys.argv[1], newline='').read())
           for sample in family.samples]
print(json.dumps([[sample.name, sample.labels.get('tensor'), repr(sample.value)] for sample in samples]))
";
    let Some(read) = python(code, &[&path]) else { return };
    let samples: Vec<(&str, Option<&str>, f64)> = read
        .as_array()
        .unwrap()
        .iter()
        .map(|sample| (sample[0].as_str().unwrap(), sample[1].as_str(), sample[2].as_str().unwrap().parse().unwrap()))
        .collect();
    let find = |name: &str, tensor: Option<&str>| {
        samples.iter().find(|sample| (sample.0, sample.1) == (name, tensor)).map(|sample| sample.2)
    };
    same(find("gradprobe_total_norm", None), Some(entry.report().outputs().total_norm));
    same(find("gradprobe_nan_count", None), Some(entry.report().outputs().nan_count as f64));
    for tensor in entry.tensors() {
        let name = Some(tensor.report.name);
        same(find("gradprobe_tensor_l2_norm", name), Some(tensor.report.record.l2_norm()));
        same(find("gradprobe_tensor_max_abs", name), tensor.report.record.max_abs().map(f64::from));
        same(find("gradprobe_tensor_mean", name), tensor.report.record.mean());
        same(find("gradprobe_tensor_ratio", name), tensor.report.ratio());
        same(find("gradprobe_tensor_gsnr_median", name), tensor.gsnr.and_then(|record| record.median()));
    }
}

#[test]
fn tensorboard_reads_back_value_for_value() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("runs/one");
    let entries = entries(5);
    let mut sink = TensorBoard::create(&run).unwrap();
    entries.iter().for_each(|entry| sink.write(entry).unwrap());
    sink.finish().unwrap();
    assert_eq!(sink.path().parent(), Some(run.as_path()));

    // The reader under TensorBoard's own pages, with all events kept; and then what its histogram page is given.
    let code = "
import json, sys
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from tensorboard.util import tensor_util
accumulator = EventAccumulator(sys.argv[1], tensor_size_guidance={'scalars': 0, 'histograms': 0}, size_guidance={'tensors': 0})
accumulator.Reload()
scalars, histograms = {}, {}
tags = accumulator.Tags()['tensors']
for tag in tags:
    plugin = accumulator.SummaryMetadata(tag).plugin_data.plugin_name
    for event in accumulator.Tensors(tag):
        value = tensor_util.make_ndarray(event.tensor_proto)
        if plugin == 'scalars':
            scalars.setdefault(tag, {})[event.step] = repr(float(value))
        else:
            assert plugin == 'histograms', plugin
            histograms.setdefault(tag, {})[event.step] = [[repr(float(x)) for x in row] for row in value]

# What lies in the file, which the reader above shows in another form.
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2
raw, versions = {}, []
for record in RawEventFileLoader(sys.argv[2]).Load():
    event = event_pb2.Event.FromString(record)
    versions.append(event.file_version)
    for value in event.summary.value:
        if value.HasField('histo'):
            h = value.histo
            raw.setdefault(value.tag, {})[event.step] = [repr(x) for x in (h.min, h.max, h.num, h.sum, h.sum_squares)] + [
                [repr(x) for x in h.bucket_limit], [repr(x) for x in h.bucket]]
print(json.dumps({'scalars': scalars, 'histograms': histograms, 'raw': raw, 'versions': versions}))
";
    let Some(read) = python(code, &[&run, sink.path()]) else { return };
    assert_eq!(read["versions"].as_array().unwrap().len(), 1 + entries.len());
    assert_eq!(read["versions"][0].as_str(), Some("brain.Event:2"));
    let parsed = |value: &Value| value.as_str().map(|text| text.parse::<f64>().unwrap());
    let mut scalars = 0;
    for entry in &entries {
        let step = entry.step().to_string();
        let outputs = entry.report().outputs();
        let mut scalar = |tag: String, written: Option<f64>| {
            #[expect(clippy::cast_possible_truncation, reason = "a scalar is f32")]
            let written = written.map(|x| f64::from(x as f32));
            same(parsed(&read["scalars"][&tag][&step]), written);
            scalars += usize::from(written.is_some());
        };
        scalar("total_norm".into(), Some(outputs.total_norm));
        scalar("finite_total_norm".into(), Some(outputs.finite_total_norm));
        scalar("clip_coefficient".into(), Some(outputs.coefficient_f64));
        scalar("skip".into(), Some(outputs.skip.into()));
        scalar("nan_count".into(), Some(outputs.nan_count as f64));
        scalar("inf_count".into(), Some(outputs.inf_count as f64));
        scalar("noise_scale".into(), entry.gsnr().and_then(|gsnr| gsnr.noise_scale()));
        scalar("verdict".into(), Some(2.0));
        for tensor in entry.tensors() {
            let (name, record) = (tensor.report.name, tensor.report.record);
            for (statistic, written) in [
                ("l2_norm", Some(record.l2_norm())),
                ("finite_l2_norm", Some(record.finite_l2_norm())),
                ("max_abs", record.max_abs().map(f64::from)),
                ("min_nonzero_abs", record.min_nonzero_abs().map(f64::from)),
                ("mean", record.mean()),
                ("std", record.std()),
                ("zero_fraction", record.zero_fraction()),
                ("dead_fraction", record.dead_fraction()),
                ("nan_count", Some(record.nan_count as f64)),
                ("inf_count", Some(record.inf_count as f64)),
                ("param_norm", tensor.report.param_norm),
                ("ratio", tensor.report.ratio()),
                ("gsnr_mean", tensor.gsnr.and_then(|record| record.mean())),
                ("gsnr_median", tensor.gsnr.and_then(|record| record.median())),
                ("verdict", tensor.verdict.map(|verdict| f64::from(verdict as u8))),
            ] {
                scalar(format!("{statistic}/{name}"), written);
            }
            let histogram = tensor.histogram.unwrap();
            let tag = format!("gradient_abs/{name}");
            let raw = &read["raw"][&tag][&step];
            if record.finite_count() == 0 {
                assert!(raw.is_null());
                continue;
            }
            same(parsed(&raw[2]), Some(record.finite_count() as f64));
            same(parsed(&raw[3]), Some(record.sum_abs));
            same(parsed(&raw[4]), Some(record.finite_sum_squares()));
            same(parsed(&raw[1]), Some(histogram.range().map_or(0.0, |range| range.high)));
            let list = |value: &Value| value.as_array().unwrap().iter().map(|x| parsed(x).unwrap()).collect::<Vec<_>>();
            let (limits, counts) = (list(&raw[5]), list(&raw[6]));
            assert!(limits.is_sorted_by(|a, b| a < b) && limits.len() == counts.len(), "{limits:?}");
            // Every bin is a bucket: its upper end a limit, its lower end just above the limit before.
            let mut found: Vec<(f64, f64, f64)> = Vec::new();
            for (index, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0.0) {
                found.push((limits[index - 1], limits[index], count));
            }
            let zeros =
                (histogram.zero_count > 0).then(|| (-f64::from(f32::from_bits(1)), 0.0, histogram.zero_count as f64));
            let bins = (0..Histogram::BINS).filter(|&bin| histogram.bins[bin] > 0).map(|bin| {
                let low = f64::from(Histogram::lowest_of(bin).next_down());
                (low, f64::from(Histogram::highest_of(bin)), histogram.bins[bin] as f64)
            });
            assert_eq!(found, zeros.into_iter().chain(bins).collect::<Vec<_>>());
            // What the page shows counts every finite element once.
            let shown = read["histograms"][&tag][&step].as_array().unwrap();
            let sum: f64 = shown.iter().map(|bucket| parsed(&bucket[2]).unwrap()).sum();
            same(Some(sum), Some(record.finite_count() as f64));
            assert!(shown.iter().all(|bucket| parsed(&bucket[0]).unwrap() <= parsed(&bucket[1]).unwrap()));
        }
    }
    let of_all = |kind: &str| {
        read[kind].as_object().unwrap().values().map(|steps| steps.as_object().unwrap().len()).sum::<usize>()
    };
    assert_eq!(of_all("scalars"), scalars, "there is nothing that was not checked");
}

/// A process that is killed leaves a file cut off, and the one after it another file.
#[test]
fn tensorboard_goes_on_behind_a_file_that_was_cut_off() {
    let folder = TempDir::new().unwrap();
    let entries = entries(5);
    let mut sink = TensorBoard::create(&folder).unwrap();
    entries[..3].iter().for_each(|entry| sink.write(entry).unwrap());
    let whole = fs::read(sink.path()).unwrap();
    fs::write(sink.path(), &whole[..whole.len() - 10]).unwrap();
    let mut sink = TensorBoard::create(&folder).unwrap();
    let refused: Vec<bool> = entries.iter().map(|entry| sink.write(entry).is_err()).collect();
    assert_eq!(refused, [true, true, false, false, false]);
    let code = "
import json, sys
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
accumulator = EventAccumulator(sys.argv[1], size_guidance={'tensors': 0})
accumulator.Reload()
print(json.dumps([event.step for event in accumulator.Tensors('skip')]))
";
    let Some(read) = python(code, &[folder.path()]) else { return };
    assert_eq!(read, serde_json::json!([1, 2, 3, 4, 5]));
}
