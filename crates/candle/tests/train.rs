//! The example `train`, run as its users run it: the loss falls, a healthy run is called healthy, every fault is named, and
//! the cost is said.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use tempfile::TempDir;

/// Beside this test's own program, in `examples`.
fn program() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let program =
        own.ancestors().nth(2).unwrap().join("examples").join(format!("train{}", std::env::consts::EXE_SUFFIX));
    assert!(program.exists(), "{} is missing: cargo build --example train", program.display());
    program
}

fn run(options: &[&str], folder: &Path) -> Output {
    Command::new(program()).args(options).arg("--out").arg(folder).output().unwrap()
}

/// What a run of small batches prints.
fn printed(options: &[&str], folder: &Path) -> String {
    let output = run(&[&["--batch", "4"], options].concat(), folder);
    let (out, error) = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).into();
    assert!(output.status.success() && error.is_empty(), "{out}{error}");
    out
}

/// The number behind these words.
fn number(text: &str, words: &str) -> f64 {
    let (_, rest) = text.split_once(words).unwrap_or_else(|| panic!("no {words:?} in {text}"));
    rest.trim_start().split([' ', ',', ';']).next().unwrap().parse().unwrap()
}

#[test]
fn a_healthy_run_learns_and_ends_healthy() {
    let folder = TempDir::new().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let text = printed(&["--steps", "60"], &first);
    assert!(text.contains("verdict: healthy; 0 of 60 steps unhealthy\n"), "{text}");
    let (early, late) = (number(&text, "loss: "), number(&text, " at first, "));
    // Guessing among 62 characters costs ln 62 = 4.13.
    assert!(early < 4.2 && late < early - 0.5, "{text}");
    assert!(number(&text, "gradprobe ") > 0.0 && text.contains(" ms, AdamW among it\n"), "{text}");

    let lines = fs::read_to_string(first.join("steps.jsonl")).unwrap();
    let steps: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(steps.len(), 60);
    assert!(steps.iter().all(|step| step["verdict"] == "healthy" && step["scalars"]["loss"].as_f64().unwrap() < 5.0));
    assert_eq!(steps[59]["scalars"]["lr"], steps[20]["scalars"]["lr"]);
    for (step, number) in steps.iter().zip(1..) {
        let has_details = number % 10 == 0;
        assert_eq!(step["tensors"].as_array().map(Vec::len), has_details.then_some(54), "{number}");
        assert!(step["histogram"].is_array() == has_details && step["gsnr"].is_array() == has_details);
    }
    assert_eq!(fs::read_dir(first.join("tensorboard")).unwrap().count(), 1);
    assert!(fs::read_to_string(first.join("report.html")).unwrap().contains("h.3.mlp.down.weight"));
    for picture in ["overview", "norms", "histograms", "gsnr", "norm-by-depth"] {
        let svg = fs::read_to_string(first.join("pictures").join(format!("{picture}.svg"))).unwrap();
        assert!(svg.starts_with("<svg"), "{picture}");
    }

    // Candle's AdamW makes much the same run, and may be timed beside.
    let candle = printed(&["--steps", "60", "--optimizer", "candle"], &second);
    assert!((number(&candle, " at first, ") - late).abs() < 0.2, "{candle}");
    assert!(
        (0.0..30.0).contains(&number(&candle, "overhead ")) && number(&candle, "candle's AdamW ") > 0.0,
        "{candle}"
    );
    let both = printed(&["--steps", "60", "--optimizer", "both"], &second);
    assert_eq!((number(&both, "loss: "), number(&both, " at first, ")), (early, late), "{both}");
    assert!((-30.0..30.0).contains(&number(&both, "overhead ")), "{both}");

    // The same seed makes the same run; and what a longer one left is replaced.
    let table = |text: &str| text.split_once("\nstep: ").unwrap().0.to_owned();
    fs::create_dir_all(second.join("tensorboard")).unwrap();
    fs::write(second.join("steps.jsonl"), "{\"step\":1000}\n").unwrap();
    assert_eq!(table(&printed(&["--steps", "60"], &second)), table(&text));
    assert_eq!(fs::read_to_string(second.join("steps.jsonl")).unwrap(), lines);
    printed(&["--steps", "2"], &second);
    assert_eq!(fs::read_to_string(second.join("steps.jsonl")).unwrap().lines().count(), 2);
    assert_eq!(fs::read_dir(second.join("tensorboard")).unwrap().count(), 1);
    assert_ne!(printed(&["--steps", "2", "--seed", "2"], &second).lines().nth(1), text.lines().nth(1));
}

/// What the run says in the table at the step of the fault, and what of it in full.
#[test]
fn every_fault_is_named() {
    let cases: [(&str, u64, &str, &[&str]); 4] = [
        ("lr", 12, "critical: update-too-large in head.weight", &["lower the learning rate", "update-too-large in 1"]),
        (
            "sigmoid",
            1,
            "critical: flow in h.0.weight",
            &[
                "gradients shrink towards the input",
                "use ReLU, GELU or SiLU in place of sigmoid and tanh",
                "(flow in 24",
            ],
        ),
        (
            "dead",
            // Five steps tell.
            16,
            "warning: dead in h.1.mlp.up.bias",
            &[
                "h.1.mlp.up.bias, since step 12: 94.92 % of the units without a gradient",
                "use Leaky ReLU, GELU or SiLU in place of ReLU",
                "9 of 24 steps unhealthy (dead in 9)",
            ],
        ),
        (
            "nan",
            12,
            "critical: nan in h.2.mlp.down.weight, skipped",
            &[
                "began at step 12 in h.2.mlp.down.weight",
                "the last clean one before it is h.3.",
                "1 of 24 steps unhealthy (nan in 1)",
                "1 skipped",
            ],
        ),
    ];
    for (fault, step, words, more) in cases {
        let folder = TempDir::new().unwrap();
        let text = printed(&["--steps", "24", "--fault", fault], folder.path());
        let line = text.lines().find(|line| line.trim_start().starts_with(&format!("{step} ")));
        assert!(line.is_some_and(|line| line.contains(words)), "{fault}: {text}");
        let verdict = words.split(':').next().unwrap();
        assert!(text.contains(&format!("verdict: {verdict}")), "{fault}: {text}");
        for words in more {
            assert!(text.contains(words), "{fault}, {words:?}: {text}");
        }
        let before = text.lines().skip(1).take_while(|line| !line.trim_start().starts_with(&format!("{step} ")));
        assert!(before.into_iter().all(|line| line.ends_with("healthy")), "{fault}: {text}");
        assert_eq!(folder.path().join("pictures/first-critical.svg").exists(), verdict == "critical");
    }
}

#[test]
fn micro_batches_have_a_noise_scale_of_their_own() {
    let folder = TempDir::new().unwrap();
    let text = printed(&["--steps", "12", "--accumulate", "3"], folder.path());
    let noise = |step: usize| text.lines().nth(step).unwrap().split_whitespace().nth(5).unwrap();
    assert!(noise(12).parse::<f64>().unwrap() > 0.0, "{text}");
    assert!(text.contains("verdict: healthy"), "{text}");
}

#[test]
fn what_cannot_be_done_is_said_in_one_line() {
    let folder = TempDir::new().unwrap();
    let said = |options: &[&str], out: &Path, code: i32| {
        let output = run(options, out);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), error.lines().count()), (Some(code), 1), "{error}");
        error
    };
    for (options, words) in [
        (["--lr", "nan"], "--lr"),
        (["--lr", "-1"], "1e-12 to 1000"),
        (["--steps", "0"], "--steps"),
        (["--batch", "many"], "--batch"),
        (["--accumulate", "1000"], "1..=256"),
        (["--fault", "fire"], "[possible values: lr, sigmoid, dead, nan]"),
    ] {
        let error = said(&options, folder.path(), 2);
        assert!(error.contains(words), "{error}");
    }
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = said(&["--steps", "1"], &file, 1);
    assert!(error.starts_with("error: ") && error.contains(file.to_str().unwrap()), "{error}");
}

#[test]
fn who_stops_reading_ends_the_run_quietly() {
    let folder = TempDir::new().unwrap();
    let mut command = Command::new(program());
    command.args(["--steps", "50", "--batch", "1", "--out"]).arg(folder.path());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
