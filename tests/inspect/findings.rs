//! What the inspector says is wrong: findings and verdict, as JSON and for a terminal, on the models of `tests/data`.

use super::{command, golden, text};
use serde_json::{Value, json};

/// Standard output of a run on the CPU, or on the device that the arguments name.
fn inspect(arguments: &[&str], files: &[&str]) -> String {
    text(command(arguments).args(files.iter().map(|name| golden(name))).output().unwrap())
}

/// The report by a preset.
fn report(preset: &str, files: &[&str]) -> Value {
    let arguments = [&["--json", "--preset"][..], &preset.split(' ').collect::<Vec<_>>()].concat();
    serde_json::from_str(&inspect(&arguments, files)).unwrap()
}

/// Whether there is a finding of this kind in this step, by its place.
fn finds(report: &Value, kind: &str, severity: &str, step: u64) -> bool {
    let matches = |f: &Value| f["kind"] == kind && f["severity"] == severity && f["step"] == step;
    report["findings"].as_array().unwrap().iter().any(matches)
}

const EXPLODING: [&str; 4] = ["exploding-step0", "exploding-step1", "exploding-step2", "exploding-step3"];

#[test]
fn a_healthy_model_is_healthy() {
    let steps: Vec<String> = (0..8).map(|step| format!("gpt-bf16-step{step}")).collect();
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    let weights = golden("gpt-params");
    for arguments in
        [vec!["--json"], vec!["--json", "--params", weights.to_str().unwrap()], vec!["--json", "--lr", "1e-3"]]
    {
        let report: Value = serde_json::from_str(&inspect(&arguments, &steps)).unwrap();
        assert_eq!((&report["findings"], &report["verdict"]), (&json!([]), &json!("healthy")));
    }
    assert!(inspect(&[], &["gpt-mixed-step0"]).ends_with("\nverdict: healthy\n"));
    for preset in ["doctor", "transformer"] {
        assert_eq!(report(preset, &steps)["verdict"], "healthy", "{preset}");
    }
    // The source of this one calls a tensor noisy where the median of its elements has more noise than signal, which is
    // what micro-batches have.
    let scaled = report("lr-scaled --lr 1e-3", &steps);
    assert_eq!(scaled["verdict"], "warning");
    assert!(
        scaled["findings"].as_array().unwrap().iter().all(|finding| finding["kind"] == "noisy" && finding["step"] == 7)
    );
    // And this one has 5 % of zeros as its limit, whatever the tensor: a third of an embedding is.
    let course = report("course", &steps);
    assert_eq!(
        (&course["findings"][0]["kind"], &course["findings"][0]["tensor"]),
        (&json!("zeros"), &json!("embed.weight"))
    );
}

#[test]
fn every_preset_finds_the_explosion_and_its_nan() {
    for (preset, before) in [
        ("default", vec![("spike", "warning", 1), ("spike", "warning", 2)]),
        ("course", vec![("exploding", "warning", 1), ("exploding", "critical", 2)]),
        ("transformer", vec![("unstable", "warning", 1), ("exploding", "critical", 2)]),
        ("lr-scaled --lr 60", vec![("exploding", "critical", 0), ("exploding", "critical", 2)]),
        ("doctor", vec![]),
    ] {
        let report = report(preset, &EXPLODING);
        for (kind, severity, step) in before {
            assert!(finds(&report, kind, severity, step), "{preset} {kind} {step}");
        }
        assert!(finds(&report, "nan", "critical", 3), "{preset}");
        assert_eq!(report["verdict"], "critical");
    }
    let text = inspect(&[], &EXPLODING);
    let began = "began at step 3 in blocks.0.attn.qkv.weight, element 576 (nan); the last clean one before it is \
                 blocks.0.attn.proj.bias\n";
    assert!(text.contains(began), "{text}");
    assert!(text.ends_with("\nverdict: critical\n"));
}

#[test]
fn vanishing_and_dead_units_are_found() {
    let vanishing = report("default", &["vanishing"]);
    assert!(finds(&vanishing, "flow", "critical", 0));
    assert!(finds(&report("lr-scaled --lr 0.1", &["vanishing"]), "vanishing", "critical", 0));
    assert!(finds(&report("doctor", &["vanishing"]), "vanishing", "warning", 0));
    let transformer = report("transformer", &["vanishing"]);
    assert!(finds(&transformer, "vanishing", "warning", 0) && finds(&transformer, "flow", "warning", 0));
    // One step cannot tell whether units are off in others.
    assert_eq!(report("default", &["dead"])["verdict"], "healthy");
    assert!(finds(&report("course", &["dead"]), "zeros", "critical", 0));
}

#[test]
fn findings_have_the_keys_of_the_contract_in_their_order() {
    let report = report("course", &["dead"]);
    let zeros = report["findings"].as_array().unwrap().iter().find(|finding| finding["kind"] == "zeros").unwrap();
    let value = zeros["value"].as_f64().unwrap();
    let expected = json!({
        "severity": "critical", "kind": "zeros", "step": 0, "tensor": "2.weight", "value": value, "threshold": 0.2,
        "message": "zeros 81.09 %, above 20 %; and 2 more", "advice": zeros["advice"],
    });
    assert_eq!(zeros.to_string(), expected.to_string());
    assert!(zeros["advice"].as_array().unwrap().iter().all(Value::is_string));
    let of_all = report["findings"].as_array().unwrap().iter().find(|finding| finding["kind"] == "vanishing").unwrap();
    assert_eq!(of_all["tensor"], Value::Null);
    let nan = &self::report("default", &["exploding-step3"])["findings"][0];
    assert_eq!((&nan["kind"], &nan["value"], &nan["threshold"]), (&json!("nan"), &json!(3456.0), &json!(0.0)));
    assert_eq!(nan["tensor"], "blocks.0.attn.qkv.weight");
    assert_eq!(nan["message"], "3456 of 6912 elements are NaN; the first that is not finite is 576; and 5 more");
}

#[test]
fn the_kernels_report_the_same_findings() {
    let on = |device: &str| {
        let text = inspect(&["--json", "--preset", "course", "--device", device], &["dead", "dead"]);
        text.replacen(&format!("{device:?}"), "", 1)
    };
    assert_eq!(on("cpu"), on("simt"));
}
