//! Long runs, of which the page has a part: no spike, no NaN and no Inf is lost.

use crate::{Folder, NONE, cells, curve, f64s};
use serde_json::{Value, json};
use std::fs;

/// Of a run of 12,345 steps from 7 on, one in ten with details of two tensors.
fn line(step: u64) -> String {
    let norm = match step {
        5_007 => json!(1e30),
        6_001 => json!("nan"),
        6_002 => json!("-inf"),
        7_777 => json!(-3.0),
        _ => json!(1.0 + (step % 100) as f64 / 100.0),
    };
    let tensor = |name: &str, norm: Value| {
        json!({"name": name, "dtype": "F32", "count": 4, "nan_count": u8::from(norm == "nan"), "inf_count": 0, "zero_count": 0,
            "dead_count": 1, "l2_norm": norm, "absent": name == "v" && step < 6_000})
    };
    let mut line =
        json!({"step": step, "total_norm": norm, "verdict": if step == 8_888 { "critical" } else { "healthy" }});
    if step % 10 == 7 {
        let norm = match step {
            9_007 => json!(1e300),
            9_507 => json!("nan"),
            9_607 => json!("inf"),
            _ => json!(step as f64),
        };
        line["tensors"] = json!([tensor("w", norm), tensor("v", json!(0.5))]);
    }
    format!("{line}\n")
}

#[test]
fn no_spike_and_no_nan_is_lost() {
    let folder = Folder::new();
    let file = folder.path("long.jsonl");
    fs::write(&file, (7..12_352).map(line).collect::<String>()).unwrap();
    let page = folder.page(&[&file]);
    let run = &page.runs()[0];
    assert_eq!(
        (&run["name"], &run["steps"], &run["first"], &run["last"]),
        (&json!("long.jsonl"), &json!(12_345), &json!(7), &json!(12_351))
    );
    let norms = curve(run, "total_norm");
    assert!((1000..3000).contains(&norms.len()), "{} points", norms.len());
    assert!(norms.is_sorted_by(|a, b| a.0 < b.0));
    for point in [(5_007.0, 1e30), (7_777.0, -3.0)] {
        assert!(norms.contains(&point), "{point:?}");
    }
    // Those of one bucket are one mark; the first of them is told.
    assert!(norms.iter().any(|&(step, norm)| step == 6_001.0 && norm.is_nan()));
    assert_eq!(run["curves"][0]["nonfinite"], 2);
    // Every other point is one of the run.
    for (step, norm) in norms {
        if ![5_007.0, 6_001.0, 7_777.0].contains(&step) {
            assert_eq!(norm, 1.0 + (step % 100.0) / 100.0, "step {step}");
        }
    }

    let (first, last) = (f64s(&run["columns"]["first"]), f64s(&run["columns"]["last"]));
    assert!((400..=800).contains(&first.len()), "{} columns", first.len());
    let cells: Vec<f32> = cells(run, "l2_norm").into_iter().map(f32::from_bits).collect();
    for (column, (&first, &last)) in first.iter().zip(&last).enumerate() {
        let has = |step: f64| (first..=last).contains(&step);
        let (w, v) = (cells[2 * column], cells[2 * column + 1]);
        // Steps rise, and so do the norms of w.
        if has(9_507.0) {
            assert!(w.is_nan() && w.to_bits() != NONE);
        } else if has(9_607.0) {
            assert_eq!(w, f32::INFINITY);
        } else {
            // A finite number stays finite.
            assert_eq!(w, if has(9_007.0) { f32::MAX } else { last as f32 });
        }
        assert!(if last < 6_000.0 { v.to_bits() == NONE } else { v == 0.5 }, "column {column}");
    }
    let worst = super::decoded::<1>(&run["verdicts"]["worst"]);
    assert!((500..=1000).contains(&worst.len()));
    assert_eq!(worst.iter().filter(|&&worst| worst == [2]).count(), 1);
}

#[test]
fn a_thousand_tensors_are_a_few_megabytes() {
    let folder = Folder::new();
    let file = folder.path("wide.jsonl");
    let tensors: Vec<Value> = (0..1000)
        .map(|index| {
            json!({"name": format!("transformer.h.{index}.attn.weight"), "dtype": "F32", "count": 9, "nan_count": 1, "inf_count": 1,
                "zero_count": 0, "dead_count": 1, "l2_norm": "nan", "ratio": 0.5, "update_ratio": 1e-3, "moments_gsnr": 0.1})
        })
        .collect();
    let bins: Vec<(f64, u64)> = (0..80).map(|bin| (2f64.powi(bin / 4 - 20), 3)).collect();
    let histogram: Vec<Value> = tensors
        .iter()
        .map(|tensor| json!({"name": tensor["name"], "zero_count": 0, "inf_count": 0, "nan_count": 0, "bins": bins}))
        .collect();
    let mut wide = json!({"step": 0, "tensors": tensors, "histogram": histogram});
    let lines = (1..=40).map(|step| {
        wide["step"] = json!(250 * step);
        format!("{wide}\n")
    });
    fs::write(&file, lines.collect::<String>()).unwrap();
    let page = folder.page(&[&file]);
    assert_eq!(page.runs()[0]["tensors"].as_array().unwrap().len(), 1000);
    assert!(page.text.len() < 6 << 20, "{} bytes", page.text.len());
}
