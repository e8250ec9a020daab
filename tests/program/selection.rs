//! Which tensors are shown, and in which order.

use super::{Files, assert_complains, file, golden, names, program, report, run, text};
use std::path::PathBuf;

/// Four tensors with an order of their own each: by norm d b c a, by ratio c a b d, by largest c d b a, by dead share a d b c.
fn step(files: &Files) -> (PathBuf, PathBuf) {
    let step = file(
        &[("a", &[0.0, 0.0, 0.0, 1.0]), ("b", &[4.0, 4.0, 4.0, 0.0]), ("c", &[6.0, 1.0]), ("d", &[5.0, 5.0, 0.0])],
        0,
    );
    let weights = file(
        &[("a", &[1.0, 0.0, 0.0, 0.0]), ("b", &[9.0, 9.0, 9.0, 9.0]), ("c", &[1.0, 0.0]), ("d", &[99.0, 0.0, 0.0])],
        0,
    );
    (files.write("step", &step), files.write("weights", &weights))
}

/// The names in a table's lines.
fn listed(table: &str) -> Vec<&str> {
    let rows = table.lines().skip_while(|line| !line.starts_with("tensor")).skip(1);
    rows.take_while(|line| !line.starts_with("step ")).map(|line| line.split_whitespace().next().unwrap()).collect()
}

#[test]
fn tensors_are_sorted_and_cut() {
    let files = Files::new();
    let (step, weights) = step(&files);
    for (arguments, expected) in [
        (vec![], vec!["a", "b", "c", "d"]),
        (vec!["--sort", "norm"], vec!["d", "b", "c", "a"]),
        (vec!["--sort", "ratio"], vec!["c", "a", "b", "d"]),
        (vec!["--sort", "max"], vec!["c", "d", "b", "a"]),
        (vec!["--sort", "dead"], vec!["a", "d", "b", "c"]),
        (vec!["--sort", "norm", "--top", "2"], vec!["d", "b"]),
        (vec!["--top", "3"], vec!["d", "b", "c"]),
        (vec!["--top", "9"], vec!["a", "b", "c", "d"]),
        (vec!["--top", "0"], vec![]),
        (vec!["--filter", "[a]"], vec![]),
        (vec!["--filter", "?", "--sort", "max", "--top", "1"], vec!["c"]),
        (vec!["--only-bad"], vec![]),
    ] {
        let run = |json: &[&str]| {
            let mut command = program(["inspect", "--params"]);
            command.arg(&weights).args(&arguments).args(json).args([&step, &step]).output().unwrap()
        };
        if arguments == ["--filter", "[a]"] {
            assert_complains(run(&[]), 1, &["step: ", "\"[a]\""]);
            continue;
        }
        let table = text(run(&[]));
        assert_eq!(listed(&table), expected, "{arguments:?}");
        assert!(table.contains("step 1: total norm 1.1661"), "{table}");
        assert_eq!(table.contains("of 4 tensors, "), expected.len() < 4, "{table}");
        let found = report(run(&["--json"]));
        assert_eq!(names(&found["steps"][1]["tensors"]), expected, "{arguments:?}");
        assert_eq!(names(&found["gsnr"]), expected, "{arguments:?}");
    }
}

#[test]
fn the_worst_come_first() {
    let exploding = golden("exploding-step3");
    let table = text(run!["inspect", exploding, "--top", "4"]);
    assert!(table.contains("\n4 of 30 tensors, the worst first:\n"), "{table}");
    assert!(table.contains("\nverdict: critical\n"));
    let all = report(run!["inspect", "--json", exploding]);
    let tensors = all["steps"][0]["tensors"].as_array().unwrap();
    let is_bad = |name: &str| tensors.iter().any(|t| t["name"] == name && t["nan_count"] != 0);
    assert!(listed(&table).into_iter().all(is_bad), "{table}");
    let bad = report(run!["inspect", "--json", "--only-bad", exploding]);
    let bad = names(&bad["steps"][0]["tensors"]);
    assert!(bad.len() < tensors.len() && bad.into_iter().any(is_bad));
}

#[test]
fn a_thousand_tensors_fit_on_a_screen() {
    let files = Files::new();
    let tensors: Vec<String> = (0..1000).map(|t| format!("blocks.{}.w{}.weight", t / 10, t % 10)).collect();
    let elements = |t: usize| if t == 777 { [f32::NAN, 1.0] } else { [1.0 + t as f32, -1.0] };
    let data: Vec<[f32; 2]> = (0..1000).map(elements).collect();
    let all: Vec<(&str, &[f32])> = tensors.iter().zip(&data).map(|(name, data)| (name.as_str(), &data[..])).collect();
    let path = files.write("step", &file(&all, 0));
    let table = text(run!["inspect", path]);
    assert!(table.lines().count() < 45, "{table}");
    assert_eq!((listed(&table).len(), listed(&table)[0]), (20, "blocks.77.w7.weight"));
    assert!(table.contains("\n20 of 1000 tensors, the worst first:\n") && table.contains(", 1000 tensors"), "{table}");
    assert!(text(run!["inspect", path, path]).lines().count() < 100);
    assert_eq!(listed(&text(run!["inspect", path, "--top", "1000"])).len(), 1000);
    assert_eq!(listed(&text(run!["inspect", path, "--filter", "blocks.5.*"])).len(), 10);
    assert_eq!(report(run!["inspect", "--json", path])["steps"][0]["tensors"].as_array().unwrap().len(), 1000);
    // By blocks, where there are no more than a screen of them.
    let few = files.write("few", &file(&all[..100], 0));
    let table = text(run!["inspect", few]);
    assert!(table.contains("\nblocks.9: norm ") && table.contains(" % of the square, 10 tensors\n"), "{table}");
}
