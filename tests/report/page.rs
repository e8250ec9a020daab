//! A small run, of which nothing has to be left out: every number of the page is one of the run.

use crate::{Folder, HOSTILE, NONE, cells, curve, decoded, f64s, lines, steps};
use gradprobe::{StepOutputs, gsnr::GsnrRecord, histogram::Histogram, write::EntryTensor};
use serde_json::{Value, json};

#[test]
fn every_number_is_that_of_the_run() {
    let (folder, entries) = (Folder::new(), steps());
    let page = folder.page(&[&folder.run("run", &lines(&entries))]);
    let run = &page.runs()[0];
    for (key, value) in [
        ("name", json!("run")),
        ("verdict", json!("critical")),
        ("last_verdict", json!("critical")),
        ("steps", json!(40)),
        ("first", json!(1)),
        ("last", json!(40)),
        ("healthy", json!(29)),
        ("critical", json!(11)),
        ("nonfinite", json!(11)),
        ("skipped", json!(11)),
    ] {
        assert_eq!(run[key], value, "{key}");
    }

    let bits =
        |points: Vec<(f64, f64)>| points.into_iter().map(|(step, value)| (step, value.to_bits())).collect::<Vec<_>>();
    let of_entries = |of: fn(&StepOutputs) -> f64| {
        entries.iter().map(|entry| (entry.step() as f64, of(entry.report().outputs()))).collect::<Vec<_>>()
    };
    assert_eq!(bits(curve(run, "total_norm")), bits(of_entries(|outputs| outputs.total_norm)));
    assert_eq!(bits(curve(run, "clip_coefficient")), bits(of_entries(|outputs| outputs.coefficient_f64)));
    let loss = |step: u32| (f64::from(step), if step == 33 { f64::NAN } else { 1.0 / f64::from(step) });
    assert_eq!(bits(curve(run, "loss")), bits((1..=40).map(loss).collect()));

    assert_eq!(f64s(&run["columns"]["first"]), (1..=40).map(f64::from).collect::<Vec<_>>());
    type Of = fn(&EntryTensor<'_>) -> Option<f64>;
    let measures: [(&str, Of); 5] = [
        ("l2_norm", |tensor| Some(tensor.report.record.l2_norm())),
        ("dead_share", |tensor| tensor.report.record.dead_fraction()),
        ("gsnr", |tensor| tensor.gsnr.and_then(GsnrRecord::mean)),
        ("nan_count", |tensor| Some(tensor.report.record.nan_count as f64)),
        ("inf_count", |tensor| Some(tensor.report.record.inf_count as f64)),
    ];
    for (name, of) in measures {
        let of = |tensor: EntryTensor<'_>| {
            of(&tensor).map_or(NONE, |value| if value.is_nan() { f32::NAN } else { value as f32 }.to_bits())
        };
        let written: Vec<u32> = entries.iter().flat_map(|entry| entry.tensors().map(of).collect::<Vec<_>>()).collect();
        assert_eq!(cells(run, name), written, "{name}");
    }
    assert_eq!(run["measures"].as_object().unwrap().len(), measures.len());

    let last: Value = serde_json::from_str(lines(&entries).last().unwrap()).unwrap();
    for (tensor, written) in run["tensors"].as_array().unwrap().iter().zip(last["tensors"].as_array().unwrap()) {
        assert_eq!((&tensor["name"], &tensor["last"]), (&written["name"], written));
    }
    let since: Vec<&Value> =
        run["tensors"].as_array().unwrap().iter().map(|tensor| &tensor["unhealthy_since"]).collect();
    assert_eq!(since, [&Value::Null, &json!(30), &Value::Null, &Value::Null, &json!(30), &json!(30)]);
}

#[test]
fn shares_of_histograms_are_those_of_the_elements() {
    let (folder, entries) = (Folder::new(), steps());
    let page = folder.page(&[&folder.run("run", &lines(&entries))]);
    let run = &page.runs()[0];
    let shares: Vec<u16> = decoded(&run["histogram"]["shares"]).into_iter().map(u16::from_le_bytes).collect();
    for (index, place) in run["histogram"]["tensors"].as_array().unwrap().iter().enumerate() {
        let whole = |at: usize| place[at].as_i64().unwrap();
        let (start, exponent, octaves) = (whole(0) as usize, whole(1), whole(2) as usize);
        for (column, entry) in entries.iter().enumerate() {
            let histogram = entry.tensors().nth(index).unwrap().histogram.unwrap();
            let total = histogram.finite_count() + histogram.inf_count + histogram.nan_count;
            let mut counts = vec![0; octaves];
            for (bin, &count) in histogram.bins.iter().enumerate().filter(|&(_, &count)| count > 0) {
                let octave = Histogram::lowest_of(bin).log2().floor() as i64;
                counts[usize::try_from(octave - exponent).unwrap()] += count;
            }
            counts.extend([histogram.zero_count, histogram.inf_count, histogram.nan_count]);
            let written: Vec<u16> =
                counts.iter().map(|&count| (65535.0 * count as f64 / total as f64).round() as u16).collect();
            let begin = start + column * (octaves + 3);
            assert_eq!(shares[begin..begin + octaves + 3], written, "tensor {index}, column {column}");
        }
    }
}

#[test]
fn findings_that_go_on_are_one() {
    let folder = Folder::new();
    let finding = |step: u64, since: u64| {
        json!({"severity": "warning", "kind": "spike", "step": step, "since": since, "tensor": "w", "others": ["v"], "value": "inf",
            "threshold": 2.5, "rule": "norm-spike", "message": format!("seen in {step}"), "advice": ["clip"]})
    };
    let found = [(10, None), (20, Some(15)), (30, Some(15)), (40, None), (50, Some(50)), (60, None)];
    let lines = found.map(|(step, since)| {
        let findings: Vec<Value> = since.map(|since| finding(step, since)).into_iter().collect();
        let verdict = if since.is_some() { "warning" } else { "healthy" };
        json!({"step": step, "findings": findings, "verdict": verdict}).to_string()
    });
    let run = folder.page(&[&folder.run("run", &lines)]).runs().remove(0);
    let expected = json!([{"severity": "warning", "kind": "spike", "rule": "norm-spike", "tensor": "w", "others": ["v"], "since": 15,
        "last": 50, "steps": 3, "spans": [[15, 30], [50, 50]], "found": 20, "message": "seen in 20", "value": "inf",
        "threshold": 2.5, "advice": ["clip"]}]);
    assert_eq!(run["findings"], expected);
}

#[test]
fn nothing_is_loaded_and_names_end_no_script() {
    let folder = Folder::new();
    let page = folder.page(&[&folder.run("run", &lines(&steps()))]);
    // The one address is in the comment that uPlot begins with.
    let addresses: Vec<&str> = page.text.split("://").skip(1).map(|rest| &rest[..30]).collect();
    assert_eq!(addresses, ["github.com/leeoniya/uPlot (v1."]);
    for loads in ["src=", "url(", "@import", "import(", "fetch(", "XMLHttpRequest"] {
        assert!(!page.text.contains(loads), "{loads}");
    }
    assert_eq!(page.text.matches("<script").count(), 3);
    assert_eq!(page.text.matches("</script").count(), 3);
    assert_eq!(page.runs()[0]["tensors"][0]["name"], HOSTILE);
    assert!(page.text.contains("The MIT License (MIT)\n\nCopyright (c) 2022 Leon Sorokin"));
}

#[test]
fn a_run_that_is_being_written_has_its_whole_lines() {
    let (folder, lines) = (Folder::new(), lines(&steps()));
    let run = folder.run("run", &lines[..20]);
    let whole = std::fs::read_to_string(run.join("steps.jsonl")).unwrap();
    for part in [0, 3, 100, lines[20].len()] {
        std::fs::write(run.join("steps.jsonl"), format!("{whole}{}", &lines[20][..part])).unwrap();
        // By its file as well as by its folder.
        assert_eq!(folder.page(&[&run.join("steps.jsonl")]).runs()[0]["steps"], 20, "{part} bytes");
    }
}
