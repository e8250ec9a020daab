//! The program, run as users run it. What `inspect` says of a file is tested by `tests/inspect`, of the example that shares it.

#[path = "../inspect/files.rs"]
mod files;

mod compare;
mod formats;
mod selection;

use files::{Files, assert_complains, file, golden, raw, text};
use serde_json::Value;
use std::{
    ffi::OsStr,
    process::{Command, Output},
};

/// The program, on the CPU where it is asked to measure.
fn program<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradprobe"));
    for (place, argument) in arguments.into_iter().enumerate() {
        command.arg(&argument);
        if place == 0 && ["inspect", "compare"].iter().any(|measures| argument.as_ref() == *measures) {
            command.args(["--device", "cpu"]);
        }
    }
    command
}

macro_rules! run {
    ($($argument:expr),* $(,)?) => {
        crate::program([$(AsRef::<std::ffi::OsStr>::as_ref(&$argument)),*]).output().unwrap()
    };
}
use run;

fn report(output: Output) -> Value {
    serde_json::from_str(&text(output)).unwrap()
}

/// The names of these tensors of a report, in its order.
fn names(tensors: &Value) -> Vec<&str> {
    tensors.as_array().unwrap().iter().map(|tensor| tensor["name"].as_str().unwrap()).collect()
}

#[test]
fn a_command_line_that_makes_no_sense_exits_with_2() {
    let dead = golden("dead");
    let dead = dead.to_str().unwrap();
    for (arguments, needle) in [
        (vec![], "subcommand"),
        (vec!["examine"], "examine"),
        (vec!["inspect"], "<FILE"),
        (vec!["inspect", dead, "--top=-1"], "--top"),
        (vec!["inspect", dead, "--top", "ten"], "--top"),
        (vec!["inspect", dead, "--sort", "name"], "--sort"),
        (vec!["inspect", dead, "--fail-on", "healthy"], "--fail-on"),
        (vec!["inspect", dead, "--force"], "--out"),
        (vec!["inspect", dead, "--device", "simt"], "--device"),
        (vec!["compare", dead], "<B>"),
        (vec!["compare", dead, dead, dead], "unexpected"),
        (vec!["completions"], "<SHELL>"),
        (vec!["completions", "cmd"], "cmd"),
        (vec!["man", "inspect"], "unexpected"),
    ] {
        assert_complains(program(arguments).output().unwrap(), 2, &[needle]);
    }
    assert!(text(run!["--help"]).contains("compare"));
    assert!(text(run!["--version"]).starts_with("gradprobe "));
}

#[test]
fn a_verdict_can_be_the_exit_code() {
    let warning = ["exploding-step0", "exploding-step1"].map(golden);
    let critical = ["exploding-step2", "exploding-step3"].map(golden);
    let healthy = golden("gpt-mixed-step0");
    for (files, code, of_critical) in [(&[healthy][..], 0, 0), (&warning[..], 3, 0), (&critical[..], 3, 3)] {
        for (limit, code) in [("warning", code), ("critical", of_critical)] {
            for json in [&[][..], &["--json"]] {
                let output = program(["inspect"]).args(files).args(json).args(["--fail-on", limit]).output().unwrap();
                assert_eq!(output.status.code(), Some(code), "{files:?} {limit}");
                assert!(output.stderr.is_empty() && !output.stdout.is_empty());
            }
        }
    }
}

#[test]
fn nothing_is_overwritten_unasked() {
    let files = Files::new();
    let step = files.write("step.safetensors", &file(&[("a", &[3.0, 4.0])], 0));
    let (out, copy) = (files.path("out"), files.write("out/step.safetensors", b"precious"));
    let clip = |force: &[&str]| {
        program(["inspect", "--clip-norm", "1", "--out"]).args([&out, &step]).args(force).output().unwrap()
    };
    assert_complains(clip(&[]), 1, &[copy.to_str().unwrap(), "--force"]);
    assert_eq!(std::fs::read(&copy).unwrap(), b"precious");
    text(clip(&["--force"]));
    assert_ne!(std::fs::read(&copy).unwrap(), b"precious");
    assert_complains(clip(&[]), 1, &["is there already"]);
}

#[test]
fn scripts_and_manual_name_every_command() {
    let commands = ["inspect", "compare", "report", "live", "completions", "man"];
    for shell in ["bash", "zsh", "fish"] {
        let script = text(run!["completions", shell]);
        assert!(commands.iter().all(|command| script.contains(command)), "{shell}");
        assert!(script.contains("only-bad"), "{shell}");
    }
    let manual = text(run!["man"]);
    for command in commands {
        assert!(manual.contains(&format!(".TH gradprobe-{command} 1")), "{command}");
    }
    assert!(manual.contains(r"\-\-only\-bad"));
}
