//! What the inspector says of gradients: its numbers against known ones, its keys against the contract, its copies against a
//! clip computed here.

#[path = "../../src/bin/gradprobe/files/natural.rs"]
mod natural;

use super::{Files, assert_complains, command, file, golden, raw, report, text};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

const GOLDEN: [&str; 6] =
    ["gpt-bf16-step0", "gpt-mixed-step0", "exploding-step2", "exploding-step3", "dead", "vanishing"];

/// The eight steps that have statistics across steps.
fn eight_steps() -> [PathBuf; 8] {
    std::array::from_fn(|step| golden(&format!("gpt-bf16-step{step}")))
}

fn expected() -> Value {
    let text = fs::read_to_string(golden("expected").with_extension("json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A report's number, with the strings JSON needs for some.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str().map(|text| text.parse().unwrap()))
}

#[test]
fn natural_order_reads_numbers_as_numbers() {
    let sorted = [
        "",
        "-1",
        "0",
        "00",
        "01",
        "1",
        "1.weight",
        "2",
        "10",
        "18446744073709551615",
        "18446744073709551616",
        "36893488147419103232",
        "99999999999999999999999",
        "a",
        "a.",
        "a.b",
        "a0",
        "a1",
        "a01b",
        "a1b",
        "a1c",
        "a2",
        "a10",
        "blocks.2",
        "blocks.2.ln",
        "blocks.2.ln1",
        "blocks.2.ln10",
        "blocks.10",
        "é1",
        "é10",
    ];
    // Every name of up to four characters from these: an order is total when sorting by it explains each pair.
    let mut all: Vec<String> = vec![String::new()];
    for first in 0..156 {
        all.extend("019a.".chars().map(|c| format!("{}{c}", all[first])).collect::<Vec<_>>());
    }
    all.sort_by(|a, b| natural::compare(a, b));
    for names in [&sorted[..], &all.iter().map(String::as_str).collect::<Vec<_>>()] {
        for (i, a) in names.iter().enumerate() {
            for (j, b) in names.iter().enumerate() {
                assert_eq!(natural::compare(a, b), i.cmp(&j), "{a:?} {b:?}");
            }
        }
    }
}

#[test]
fn numbers_are_those_computed_in_float64() {
    let expected = expected();
    for name in GOLDEN {
        let found = &report(inspect!["--json", golden(name)])["steps"][0];
        let within = |what: &str, found: &Value, expected: &Value, bound: f64| {
            let close = match (number(found), number(expected)) {
                (Some(x), Some(y)) => x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= bound,
                (x, y) => x == y,
            };
            assert!(close, "{name} {what}: {found}, not {expected} ± {bound:e}");
        };
        let relative = |expected: &Value| 5e-7 * number(expected).unwrap_or(0.0);
        for field in ["total_norm", "finite_total_norm"] {
            within(field, &found[field], &expected[name][field], relative(&expected[name][field]));
        }
        let tensors = found["tensors"].as_array().unwrap();
        assert_eq!(tensors.len(), expected[name]["tensors"].as_object().unwrap().len());
        assert!(tensors.is_sorted_by(|a, b| {
            natural::compare(a["name"].as_str().unwrap(), b["name"].as_str().unwrap()).is_lt()
        }));
        for found in tensors {
            let expected = &expected[name]["tensors"][found["name"].as_str().unwrap()];
            let value = |field: &str| number(&expected[field]).unwrap_or(0.0);
            let std = value("variance").sqrt();
            for (field, expected) in expected.as_object().unwrap() {
                let bound = match field.as_str() {
                    "l2_norm" | "finite_l2_norm" | "mean_abs" => relative(expected),
                    "mean" => 5e-7 * value("mean_abs"),
                    "variance" if std == 0.0 => 1e-13 * value("mean").powi(2),
                    "variance" => 1e-6 * std.powi(2) + 1e-7 * value("mean").abs() * std,
                    _ => 0.0,
                };
                within(&format!("{} {field}", found["name"]), &found[field], expected, bound);
            }
        }
    }
}

#[test]
fn numbers_across_steps_are_those_computed_in_float64() {
    let expected = expected();
    let across = expected["gpt-bf16-gsnr"].as_object().unwrap();
    let found =
        report(command(eight_steps()).arg("--params").arg(golden("gpt-params")).arg("--json").output().unwrap());
    #[track_caller]
    fn within(found: &Value, expected: f64, bound: f64, what: &str) {
        let error = (found.as_f64().unwrap() - expected).abs();
        assert!(error <= bound, "{what}: {found}, not {expected} ± {bound:e}");
    }

    let tensors = found["gsnr"].as_array().unwrap();
    let names = |tensors: &Value| tensors.as_array().unwrap().iter().map(|t| t["name"].clone()).collect::<Vec<_>>();
    assert_eq!(tensors.len(), across.len());
    assert_eq!(names(&found["gsnr"]), names(&found["steps"][0]["tensors"]));
    for tensor in tensors {
        let name = tensor["name"].as_str().unwrap();
        assert_eq!(tensor["skipped"], 0);
        for (field, expected) in across[name].as_object().unwrap() {
            let relative = match field.as_str() {
                "mean" | "sum_variance" | "sum_squared_mean" => 1e-4,
                "median" => 0.05,
                "norm_cv" => 2e-6 / expected.as_f64().unwrap(),
                _ => 0.0,
            };
            let expected = expected.as_f64().unwrap();
            within(&tensor[field], expected, relative * expected, &format!("{name} {field}"));
        }
    }
    let sum = |field: &str| across.values().map(|tensor| tensor[field].as_f64().unwrap()).sum::<f64>();
    let noise = sum("sum_variance");
    let scale = noise / (sum("sum_squared_mean") - noise / 8.0);
    within(&found["noise_scale"], scale, 3e-4 * scale, "noise scale");

    for (index, step) in found["steps"].as_array().unwrap().iter().enumerate() {
        for tensor in step["tensors"].as_array().unwrap() {
            let name = tensor["name"].as_str().unwrap();
            let norm = expected["gpt-param-norms"][name].as_f64().unwrap();
            within(&tensor["param_norm"], norm, 5e-7 * norm, name);
            if index == 0 {
                let gradient = &expected["gpt-bf16-step0"]["tensors"][name]["l2_norm"];
                let ratio = gradient.as_f64().unwrap() / norm;
                within(&tensor["ratio"], ratio, 1e-6 * ratio, name);
            }
        }
    }
}

#[test]
fn json_has_the_keys_of_the_contract_in_their_order() {
    let files = Files::new();
    let data = file(&[("none", &[]), ("bad", &[f32::NAN, 0.5, f32::NEG_INFINITY, -0.0, 1e-45])], 0);
    let path = files.write("step.safetensors", &data);
    let mut found =
        report(inspect!["--json", path, "--clip-norm", "1", "--out", files.path("out"), "--dead-threshold", "0.5"]);
    // A 0 for every number that has been rounded; compared as text, so that the order counts.
    let expected = json!({
        "device": "cpu",
        "steps": [{
            "file": path.to_str(), "total_norm": "nan", "finite_total_norm": 0, "clip_coefficient": 1.0,
            "tensors": [{
                "name": "bad", "dtype": "F32", "count": 5, "nan_count": 1, "inf_count": 1, "zero_count": 1,
                "dead_count": 2, "l2_norm": "nan", "finite_l2_norm": 0, "max_abs": 0.5,
                "min_nonzero_abs": f64::from(1e-45f32), "mean": 0, "mean_abs": 0, "variance": 0, "first_nonfinite": 0,
            }, {
                "name": "none", "dtype": "F32", "count": 0, "nan_count": 0, "inf_count": 0, "zero_count": 0,
                "dead_count": 0, "l2_norm": 0.0, "finite_l2_norm": 0.0, "max_abs": null, "min_nonzero_abs": null,
                "mean": null, "mean_abs": null, "variance": null, "first_nonfinite": null,
            }],
        }],
        "noise_scale": null, "findings": null, "verdict": null,
    });
    // `findings.rs` is about these.
    assert!(found["findings"].take().is_array() && found["verdict"].take() == "critical");
    for field in
        ["finite_total_norm", "tensors/0/finite_l2_norm", "tensors/0/mean", "tensors/0/mean_abs", "tensors/0/variance"]
    {
        let number = found.pointer_mut(&format!("/steps/0/{field}")).unwrap();
        assert!(number.is_f64());
        *number = json!(0);
    }
    // Tensors may have more statistics than the contract's.
    let promised = expected["steps"][0]["tensors"][0].as_object().unwrap();
    for tensor in found["steps"][0]["tensors"].as_array_mut().unwrap() {
        tensor.as_object_mut().unwrap().retain(|key, _| promised.contains_key(key));
    }
    assert_eq!(found.to_string(), expected.to_string());
    let without_clip = report(inspect!["--json", path]);
    assert_eq!(without_clip["steps"][0].get("clip_coefficient"), None);
}

/// Of two steps whose statistics are exact: one element of two varies, and the weights are of other types.
#[test]
fn json_of_several_files_with_weights_has_the_keys_of_the_contract_in_their_order() {
    let files = Files::new();
    let [one, two] = [[3.0, 4.0], [5.0, 4.0]].map(|a| {
        let data = file(&[("none", &[]), ("still", &[0.0]), ("a", &a)], 0);
        files.write(&format!("{}", a[0]), &data)
    });
    let halves: Vec<u8> = [f16::ONE, f16::INFINITY].iter().flat_map(|x| x.to_le_bytes()).collect();
    let header = json!({
        "still": {"dtype": "BF16", "shape": [1, 1], "data_offsets": [8, 10]},
        "batches": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
        "none": {"dtype": "F16", "shape": [3, 0], "data_offsets": [8, 8]},
        "a": {"dtype": "F16", "shape": [1, 2], "data_offsets": [10, 14]},
    });
    let weights = [&[7; 8][..], &[0; 2], &halves].concat();
    let weights = files.write("weights", &raw(&header.to_string(), &weights));
    let mut found = report(inspect!["--json", one, two, "--params", weights]);
    let steps = found["steps"].take();
    assert!(found["findings"].take().is_array() && found["verdict"].take().is_string());
    let median = found["gsnr"][0]["median"].take().as_f64().unwrap();
    assert!((median / 8.0 - 1.0).abs() < 0.05, "{median}");
    let cv = found["gsnr"][0]["norm_cv"].take().as_f64().unwrap();
    let norms = [5.0, 41f64.sqrt()];
    assert!((cv - (norms[1] - norms[0]) / (norms[1] + norms[0])).abs() < 1e-15, "{cv}");
    let none = json!({
        "name": "none", "steps": 2, "skipped": 0, "defined": 0, "constant": 0, "mean": null, "median": null,
        "fraction_below_one": null, "sum_variance": 0.0, "sum_squared_mean": 0.0, "norm_cv": null,
    });
    let mut still = none.clone();
    (still["name"], still["constant"]) = ("still".into(), 1.into());
    let expected = json!({
        "device": "cpu",
        "steps": null,
        "gsnr": [{
            "name": "a", "steps": 2, "skipped": 0, "defined": 1, "constant": 1, "mean": 8.0, "median": null,
            "fraction_below_one": 0.0, "sum_variance": 2.0, "sum_squared_mean": 32.0, "norm_cv": null,
        }, none, still],
        "noise_scale": 2.0 / (32.0 - 2.0 / 2.0), "findings": null, "verdict": null,
    });
    assert_eq!(found.to_string(), expected.to_string());

    let of = |tensor: usize| {
        let tensor = steps[0]["tensors"][tensor].as_object().unwrap();
        let last: Vec<&str> = tensor.keys().map(String::as_str).skip(tensor.len() - 3).collect();
        assert_eq!(last, ["first_nonfinite", "param_norm", "ratio"]);
        (&tensor["dtype"], &tensor["l2_norm"], &tensor["param_norm"], &tensor["ratio"])
    };
    assert_eq!(of(0), (&json!("F32"), &json!(5.0), &json!("inf"), &json!(0.0)));
    assert_eq!(of(1), (&json!("F32"), &json!(0.0), &json!(0.0), &Value::Null));
    assert_eq!(of(2), of(1));

    let one_step = report(inspect!["--json", one]);
    assert_eq!((one_step.get("gsnr"), one_step.get("noise_scale")), (None, Some(&Value::Null)));
    assert_eq!(one_step["steps"][0]["tensors"][0].get("param_norm"), None);
    let itself = report(inspect!["--json", one, "--params", one]);
    assert_eq!(itself["steps"][0]["tensors"][0]["ratio"], 1.0);
    let nan = files.write("nan", &file(&[("none", &[]), ("still", &[1.0]), ("a", &[f32::NAN, 4.0])], 0));
    let broken = report(inspect!["--json", nan, "--params", one]);
    assert_eq!(broken["steps"][0]["tensors"][0]["ratio"], "nan");
}

#[test]
fn a_step_that_cannot_be_merged_is_as_if_it_had_not_been() {
    let files = Files::new();
    let write = |name: &str, a: f32, b: f32| files.write(name, &file(&[("a", &[a, 1.0]), ("b", &[b])], 0));
    let (one, two, three) = (write("one", 1.0, 4.0), write("two", 2.0, 6.0), write("three", 4.0, 5.0));
    let gsnr = |found: &Value, tensor: usize, fields: &[&str]| -> Vec<Value> {
        fields.iter().map(|field| found["gsnr"][tensor][field].clone()).collect()
    };
    let numbers =
        ["steps", "defined", "constant", "mean", "median", "sum_variance", "sum_squared_mean", "norm_cv"].as_slice();
    let [without, all] = [report(inspect!["--json", one, three]), report(inspect!["--json", one, two, three])];
    for (name, bad) in [("NaN", f32::NAN), ("Inf", f32::NEG_INFINITY), ("large", f32::MAX)] {
        let bad = write(name, bad, 6.0);
        let found = report(inspect!["--json", one, bad, three]);
        assert_eq!(gsnr(&found, 0, &["steps", "skipped"]), [2, 1]);
        assert_eq!(gsnr(&found, 0, numbers), gsnr(&without, 0, numbers), "{name}");
        assert_eq!(gsnr(&found, 1, numbers), gsnr(&all, 1, numbers), "{name}");

        // One step is left of it: no variance, and the noise scale is that of the other tensor.
        let found = report(inspect!["--json", one, bad]);
        assert_eq!(gsnr(&found, 0, &["steps", "skipped", "defined", "constant"]), [1, 1, 0, 0]);
        let sums = ["mean", "median", "fraction_below_one", "sum_variance", "sum_squared_mean"];
        assert_eq!(gsnr(&found, 0, &sums), [const { Value::Null }; 5]);
        assert_eq!(found["noise_scale"], 2.0 / (25.0 - 2.0 / 2.0));
    }
    let nothing = files.write("nothing", &file(&[("a", &[f32::NAN, 1.0]), ("b", &[f32::INFINITY])], 0));
    let found = report(inspect!["--json", nothing, nothing]);
    assert_eq!(gsnr(&found, 1, &["steps", "skipped", "norm_cv"]), [json!(0), json!(2), Value::Null]);
    assert_eq!(found["noise_scale"], Value::Null);
    assert!(text(inspect![nothing, nothing]).ends_with("noise scale: no tensor has two steps\nverdict: critical\n"));
    // +1 and −1: all noise.
    let [plus, minus] = [1.0, -1.0].map(|x| files.write(&format!("{x}"), &file(&[("a", &[x])], 0)));
    let found = text(inspect![plus, minus]);
    assert!(
        found.ends_with("noise scale: the gradient is not significant beside its noise\nverdict: healthy\n"),
        "{found}"
    );
}

#[test]
fn gradients_that_do_not_vary_are_counted_and_have_no_noise() {
    let found = report(inspect!["--json", golden("dead"), golden("dead"), golden("dead")]);
    for tensor in found["gsnr"].as_array().unwrap() {
        let count = found["steps"][0]["tensors"].as_array().unwrap().iter().find(|t| t["name"] == tensor["name"]);
        assert_eq!((&tensor["defined"], &tensor["constant"]), (&json!(0), &count.unwrap()["count"]));
        let absent = ["mean", "median", "fraction_below_one"].map(|field| &tensor[field]);
        assert_eq!(absent, [&Value::Null; 3]);
        assert_eq!(tensor["sum_variance"], 0.0);
    }
    assert_eq!(found["noise_scale"], 0.0);
}

/// The kernels on the host, by the C++ compiler and as nvcc's PTX, give the report of the CPU byte for byte, and the same
/// clipped files.
#[test]
fn devices_differ_in_their_name_alone() {
    let files = Files::new();
    let steps = GOLDEN.map(golden);
    let mut devices = vec!["cpu", "simt", "ptx"];
    if gradprobe::cuda::FATBIN.is_empty() {
        devices.pop();
        let refused = inspect!("--device", "ptx", golden("dead"));
        assert_eq!(refused.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("the build found no nvcc"), "{refused:?}");
    }
    for step in &steps {
        let all = devices.iter().map(|&device| {
            let out = files.path(device);
            let report = text(inspect!("--device", device, "--json", "--clip-norm", "0.01", "--out", out, step));
            let copy = fs::read(out.join(step.file_name().unwrap())).unwrap();
            (report.replacen(device, "…", 1), copy)
        });
        let all: Vec<(String, Vec<u8>)> = all.collect();
        assert!(all.iter().all(|one| *one == all[0]), "{}: {all:?}", step.display());
    }
    let all = devices.iter().map(|&device| {
        let mut run = command(eight_steps().iter().map(PathBuf::as_path).chain(["--device".as_ref(), device.as_ref()]));
        text(run.arg("--json").arg("--params").arg(golden("gpt-params")).output().unwrap()).replacen(device, "…", 1)
    });
    let all: Vec<String> = all.collect();
    assert!(all.iter().all(|one| *one == all[0]), "{}", all.join("\n"));
}

#[test]
fn tables_name_the_file_the_tensors_and_the_rate() {
    // By the rules of a preset that dead units are healthy to.
    let found = text(inspect![golden("dead"), golden("dead"), "--preset", "doctor"]);
    let tables: Vec<&str> = found.split("\n\n").collect();
    assert_eq!(tables.len(), 3);
    for (step, table) in tables[..2].iter().enumerate() {
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!((lines.len(), lines[0]), (10, golden("dead").to_str().unwrap()));
        assert!(lines[1].starts_with("tensor") && lines[2].starts_with("0.bias"), "{table}");
        assert!(lines[8].starts_with(&format!("step {step}: total norm 9.1")), "{table}");
        assert!(lines[9].starts_with("read 68.9 KB in ") && lines[9].ends_with(" GB/s on cpu"), "{table}");
    }
    let lines: Vec<&str> = tables[2].lines().collect();
    assert_eq!((lines.len(), lines[0], lines[9]), (10, "signal and noise across 2 steps", "verdict: healthy"));
    assert!(lines[1].starts_with("tensor") && lines[1].contains(" gsnr median "), "{lines:?}");
    assert!(lines[2].starts_with("0.bias ") && lines[8].starts_with("noise scale 0.0000 batches"), "{lines:?}");
    assert_eq!(text(inspect![golden("dead"), "--preset", "doctor"]).lines().count(), 11);
}

#[test]
fn tables_show_the_weights_beside_the_gradients() {
    let files = Files::new();
    let path = files.write("step", &file(&[("a", &[3.0, 4.0]), ("b", &[1.0])], 0));
    let weights = files.write("weights", &file(&[("a", &[0.0, 10.0]), ("b", &[0.0])], 0));
    let found = text(inspect![path, "--params", weights]);
    let expected =
        ["l2 norm param norm      ratio ", " 5.000e0    1.000e1   5.000e-1 ", " 1.000e0    0.000e0          – "];
    for (line, expected) in found.lines().skip(1).zip(expected) {
        assert!(line.contains(expected), "{expected:?} is not in {line:?}");
    }
}

#[test]
#[expect(clippy::cast_possible_truncation, reason = "the coefficient is rounded to f32")]
fn copies_differ_from_their_files_by_the_coefficient() {
    let files = Files::new();
    let odd = file(&[("b", &[3.0, -0.0, 1e-45]), ("none", &[]), ("a", &[4.0])], 3);
    let inputs = [
        golden("gpt-mixed-step0"),
        golden("exploding-step2"),
        golden("exploding-step3"),
        files.write("odd.safetensors", &odd),
    ];
    for (input, clipped) in inputs.iter().zip([true, true, false, true]) {
        let out = files.path("new/out");
        let found = report(inspect!["--json", input, "--clip-norm", "0.125", "--out", out]);
        let (before, after) = (fs::read(input).unwrap(), fs::read(out.join(input.file_name().unwrap())).unwrap());
        assert_eq!(before == after, !clipped, "{input:?}");
        let permissions = |path: &Path| fs::metadata(path).unwrap().permissions();
        assert_eq!(permissions(&out.join(input.file_name().unwrap())), permissions(&inputs[3]), "not an ordinary file");

        let (header, _) = SafeTensors::read_metadata(&before).unwrap();
        assert_eq!(before[..8 + header], after[..8 + header]);
        let (before, after) = (SafeTensors::deserialize(&before).unwrap(), SafeTensors::deserialize(&after).unwrap());
        let squares = before.iter().flat_map(|(_, tensor)| wide(tensor.dtype(), tensor.data())).map(f64::from);
        let norm = squares.map(|x| x * x).sum::<f64>().sqrt();
        let coefficient = if norm.is_nan() { 1.0 } else { 0.125 / (norm + 1e-6) };
        let reported = found["steps"][0]["clip_coefficient"].as_f64().unwrap();
        assert!((reported - coefficient).abs() <= 1e-6 * coefficient, "{reported}, not {coefficient}");
        for (name, tensor) in before.iter() {
            let scaled = wide(tensor.dtype(), tensor.data()).into_iter().map(|x| x * reported as f32);
            let expected = if clipped { narrow(tensor.dtype(), scaled) } else { tensor.data().to_vec() };
            assert!(after.tensor(name).unwrap().data() == expected, "{input:?} {name}");
        }
    }
    let names = fs::read_dir(files.path("new/out")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.count(), inputs.len(), "something besides the copies is left");
}

/// Elements as f32.
fn wide(dtype: Dtype, data: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
        _ => data.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
    }
}

/// Bytes of the nearest elements of a type.
fn narrow(dtype: Dtype, elements: impl Iterator<Item = f32>) -> Vec<u8> {
    match dtype {
        Dtype::F32 => elements.flat_map(f32::to_le_bytes).collect(),
        Dtype::F16 => elements.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => elements.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

#[test]
fn the_place_of_the_data_and_the_order_of_the_tensors_in_the_file_do_not_matter() {
    let files = Files::new();
    let (a, b) = (("a.2", &[1.5f32, -3.0, 7e-20][..]), ("a.10", &[f32::INFINITY, 0.1][..]));
    let reference = report(inspect!["--json", files.write("reference", &file(&[a, ("empty", &[]), b], 0))]);
    for (tensors, padding) in [([b, a, ("empty", &[])], 1), ([a, ("empty", &[]), b], 2), ([("empty", &[]), b, a], 3)] {
        let found = report(inspect!["--json", files.write("other", &file(&tensors, padding))]);
        assert_eq!(found["steps"][0]["tensors"], reference["steps"][0]["tensors"]);
    }
    assert_eq!(reference["steps"][0]["tensors"][1]["name"], "a.10");
}

#[test]
fn nothing_to_measure_is_a_valid_step() {
    let files = Files::new();
    for (name, header) in [("bare", "{}"), ("padded", "{}  "), ("noted", r#"{"__metadata__":{"step":"1"}}"#)] {
        let path = files.write(name, &raw(header, &[]));
        let found = report(inspect!["--json", path, path]);
        assert_eq!((&found["steps"][1]["total_norm"], &found["steps"][1]["tensors"]), (&json!(0.0), &json!([])));
        assert_eq!((&found["gsnr"], &found["noise_scale"]), (&json!([]), &Value::Null));
        text(inspect![path, path, "--params", path]);
        text(inspect![path, "--clip-norm", "1", "--out", files.path("out")]);
        assert_eq!(fs::read(path).unwrap(), fs::read(files.path("out").join(name)).unwrap());
    }
}

#[test]
fn odd_names_pass_through_json_and_stay_on_one_line_elsewhere() {
    let files = Files::new();
    let name = "a \"quoted\"\nname\u{1b}[2J \\ é\u{0}";
    let good = files.write("good\n\"file\".safetensors", &file(&[(name, &[1.0])], 0));
    let bad = files.write("bad\nfile.safetensors", &file(&[(name, &[1.0, 2.0])], 0));
    let found = report(inspect!["--json", good, good]);
    assert_eq!(found["steps"][0]["tensors"][0]["name"], name);
    assert_eq!(found["gsnr"][0]["name"], name);
    assert_eq!(found["steps"][0]["file"], good.to_str().unwrap());
    assert_eq!(text(inspect![good]).lines().count(), 6);
    let tables = text(inspect![good, good, "--params", good]);
    assert_eq!(tables.lines().count(), 17);
    assert_eq!(tables.matches(r#"a "quoted"\nname\u{1b}[2J"#).count(), 3);
    assert_complains(inspect![good, bad], 1, &[r"bad\nfile.safetensors", r#"tensor "a \"quoted\"\nname\u{1b}[2J"#]);
}
