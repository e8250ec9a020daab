//! Two files of gradients beside each other.

use super::{Files, assert_complains, file, golden, names, report, run, text};
use serde_json::{Value, json};

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
