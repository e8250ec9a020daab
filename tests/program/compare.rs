//! Two files of gradients beside each other.

use super::{Files, assert_complains, file, golden, names, report, run, text};
use gradprobe::{Config, Cpu, DType, Plan, Probe, Watch};
use serde_json::{Value, json};
use std::path::PathBuf;

#[test]
fn tensors_are_compared_by_name_the_largest_differences_first() {
    let files = Files::new();
    let one = [
        ("same", &[3.0, 4.0][..]),
        ("a", &[3.0, 0.0]),
        ("turned", &[1.0, 1.0]),
        ("nan", &[f32::NAN, 2.0]),
        ("none", &[]),
    ];
    let two =
        [("turned", &[-1.0, -1.0][..]), ("same", &[3.0, 4.0]), ("b", &[1.0]), ("nan", &[1.0, 2.0]), ("none", &[])];
    let (one, two) = (files.write("one", &file(&one, 0)), files.write("two", &file(&two, 2)));
    let found = report(run!["compare", "--json", one, two]);
    assert_eq!(names(&found["tensors"])[..2], ["nan", "turned"]);
    let tensor = |name: &str| found["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap().clone();
    let turned = json!({"name": "turned", "count": 2, "nonfinite_count": 0, "norm_a": 2f64.sqrt(), "norm_b": 2f64.sqrt(),
        "ratio": 1.0, "cosine": tensor("turned")["cosine"], "difference": 8f64.sqrt()});
    assert_eq!(tensor("turned"), turned);
    assert!((turned["cosine"].as_f64().unwrap() + 1.0).abs() < 1e-12);
    assert_eq!((&tensor("same")["norm_a"], &tensor("same")["difference"]), (&json!(5.0), &json!(0.0)));
    assert_eq!((&tensor("nan")["norm_a"], &tensor("nan")["nonfinite_count"]), (&json!(2.0), &json!(1)));
    assert_eq!((&tensor("none")["ratio"], &tensor("none")["cosine"]), (&Value::Null, &Value::Null));
    assert_eq!((&found["only_in_a"], &found["only_in_b"]), (&json!(["a"]), &json!(["b"])));
    assert_eq!(found["total"]["count"], 6);
    let table = text(run!["compare", one, two, "--top", "1"]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[3].starts_with("nan ") && lines[3].ends_with("1 not finite in A or B, left out"), "{table}");
    assert!(lines[4].starts_with("all tensors "), "{table}");
    assert_eq!(lines[5..], ["1 of 4 tensors, the largest differences first", "only in A: a", "only in B: b"]);
}

#[test]
fn types_may_differ() {
    let found = report(run!["compare", "--json", golden("gpt-bf16-step0"), golden("gpt-mixed-step0")]);
    assert!(found["total"]["cosine"].as_f64().unwrap() > 0.99999);
    assert_eq!((&found["only_in_a"], &found["total"]["count"]), (&json!([]), &json!(65548)));
}

#[test]
fn files_of_two_models_are_an_error() {
    let files = Files::new();
    let (dead, other) = (golden("dead"), golden("gpt-bf16-step0"));
    assert_complains(run!["compare", dead, other], 1, &["gpt-bf16-step0", "dead", "of two models"]);
    let longer = files.write("longer", &file(&[("0.bias", &[1.0])], 0));
    let needles = ["longer: tensor \"0.bias\": 1 elements here, 128 in", "of two models"];
    assert_complains(run!["compare", dead, longer], 1, &needles);
    assert_complains(run!["compare", dead, files.path("absent")], 1, &["absent"]);
    assert_complains(run!["compare", files.path("absent"), dead], 1, &["absent"]);
}

/// A run of two tensors whose gradients are so large, of which the second may have another name.
fn run_of(files: &Files, name: &str, other: &str, sizes: [f32; 2]) -> PathBuf {
    let plan = Plan::new([("a", DType::F32, 4), (other, DType::F32, 4)]).unwrap();
    let mut watch = Watch::new(Probe::new(Cpu, plan, Config::new()).unwrap());
    let folder = files.path(name);
    watch.write_to(&folder).unwrap();
    for step in 0..=20 {
        let nan = if step == 13 { f32::NAN } else { 1.0 };
        watch.step(step, &mut [&mut [sizes[0] * nan; 4], &mut [sizes[1]; 4]], []).unwrap();
    }
    watch.finish().unwrap();
    folder
}

#[test]
fn runs_are_compared_by_their_norms() {
    let files = Files::new();
    let (one, two) = (run_of(&files, "one", "b", [1.0, 2.0]), run_of(&files, "two", "b", [1.0, 50.0]));
    let found = report(run!["compare", "--json", one, two]);
    let all = json!({"steps": 20, "mean": 20f64.sqrt(), "std": 0.0});
    assert_eq!(
        (&found["lines"][0]["tensor"], &found["lines"][0]["a"], &found["left_out"]),
        (&Value::Null, &all, &json!([1, 1]))
    );
    let changes: Vec<&Value> = found["lines"].as_array().unwrap().iter().map(|line| &line["change"]).collect();
    assert_eq!(changes, ["rose more than tenfold", "alike", "rose more than tenfold"]);
    // Of the steps with details: 0, 10 and 20.
    assert_eq!(found["lines"][2]["b"], json!({"steps": 3, "mean": 100.0, "std": 0.0}));
    let table = text(run!["compare", one, two.join("steps.jsonl")]);
    assert!(table.contains("20 steps, then 20; 1 tensors alike"), "{table}");

    let other = run_of(&files, "other", "c", [1.0, 2.0]);
    assert_eq!(report(run!["compare", "--json", one, other])["unmatched"], json!(["b", "c"]));
    assert_complains(run!["compare", one, golden("dead")], 1, &["one: is a run, and", "dead"]);
    assert_complains(run!["compare", golden("dead"), one], 1, &["one: is a run, and"]);
    std::fs::write(files.path("empty.jsonl"), "").unwrap();
    assert_complains(run!["compare", one, files.path("empty.jsonl")], 1, &["empty.jsonl: has no step"]);
    assert_complains(run!["compare", one, files.path("absent.jsonl")], 1, &["absent.jsonl"]);
}
