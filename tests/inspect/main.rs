//! The inspector, run as users run it.

use files::{Files, assert_complains, file, golden, raw, text};
use serde_json::Value;
use std::{
    path::Path,
    process::{Command, Output},
};

/// The inspector, on the CPU unless told otherwise.
fn command<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let test = std::env::current_exe().unwrap();
    let name = format!("inspect{}", std::env::consts::EXE_SUFFIX);
    let binary = test.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    assert!(binary.exists(), "{} is missing: cargo build --example inspect", binary.display());
    let mut command = Command::new(binary);
    command.args(arguments);
    if !command.get_args().any(|argument| argument == "--device") {
        command.args(["--device", "cpu"]);
    }
    command
}

macro_rules! inspect {
    ($($argument:expr),* $(,)?) => {
        command([$(AsRef::<std::ffi::OsStr>::as_ref(&$argument)),*]).output().unwrap()
    };
}

mod files;
mod findings;
mod refusals;
mod reports;

fn report(output: Output) -> Value {
    serde_json::from_str(&text(output)).unwrap()
}
