//! `gradprobe report` and `gradprobe live`: the numbers of the page are those of the run, it loads nothing, names do no harm, and a
//! browser shows it; the view in the terminal follows a run that grows.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "numbers of the page, which are narrower")]

#[path = "../entries/mod.rs"]
mod entries;
#[path = "../require/mod.rs"]
mod require;
#[cfg(unix)]
#[path = "../terminal/mod.rs"]
mod terminal;

mod browser;
mod live;
mod page;
mod reduced;
mod refusals;

use gradprobe::write::{Entry, json_line};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;

/// A name that ends a script, if nobody sees to it that it does not.
const HOSTILE: &str = "</script><script>document.title='broken'</script><!-- \u{2028}&amp;";

/// 40 steps of 6 tensors, of which some are bad from step 30 on, with the trainer's own numbers.
fn steps() -> Vec<Entry> {
    entries::deep(6, 40, 30..=40, |layer| if layer == 0 { HOSTILE.to_owned() } else { format!("h.{layer}.weight") })
}

/// The lines of a run; a step's loss is one over its number, and NaN in step 33.
fn lines(entries: &[Entry]) -> Vec<String> {
    let line = |entry: &Entry| {
        let step = entry.step();
        let loss = if step == 33 { "\"nan\"".to_owned() } else { format!("{:?}", 1.0 / step as f64) };
        json_line(entry).replacen(",\"total_norm\"", &format!(",\"scalars\":{{\"loss\":{loss}}},\"total_norm\""), 1)
    };
    entries.iter().map(line).collect()
}

/// A folder for runs and pages.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a run, every line with its end.
    fn run(&self, name: &str, lines: &[String]) -> PathBuf {
        let run = self.path(name);
        fs::create_dir_all(&run).unwrap();
        fs::write(run.join("steps.jsonl"), lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        run
    }

    /// The page of these runs.
    #[track_caller]
    fn page(&self, runs: &[&Path]) -> Page {
        let path = self.path("page.html");
        let output = report(&[runs, &[Path::new("--force"), Path::new("-o"), &path]].concat());
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{}\n", path.display()));
        let text = fs::read_to_string(&path).unwrap();
        Page { path, text }
    }
}

/// Runs the program.
fn report(arguments: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gradprobe")).arg("report").args(arguments).output().unwrap()
}

struct Page {
    path: PathBuf,
    text: String,
}

impl Page {
    /// The runs in it.
    fn runs(&self) -> Vec<Value> {
        let (_, data) = self.text.split_once("<script type=\"application/json\" id=\"data\">").unwrap();
        serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap()
    }
}

/// Bytes of base64, in groups.
fn decoded<const N: usize>(text: &Value) -> Vec<[u8; N]> {
    use base64::{Engine, engine::general_purpose::STANDARD};

    let bytes = STANDARD.decode(text.as_str().unwrap()).unwrap();
    assert_eq!(bytes.len() % N, 0);
    bytes.chunks_exact(N).map(|chunk| chunk.try_into().unwrap()).collect()
}

fn f64s(text: &Value) -> Vec<f64> {
    decoded(text).into_iter().map(f64::from_le_bytes).collect()
}

/// Steps and numbers of a curve.
fn curve(run: &Value, name: &str) -> Vec<(f64, f64)> {
    let curve = run["curves"].as_array().unwrap().iter().find(|curve| curve["name"] == name).unwrap();
    f64s(&curve["steps"]).into_iter().zip(f64s(&curve["values"])).collect()
}

/// The cells of a measure, column after column, by their bits.
fn cells(run: &Value, measure: &str) -> Vec<u32> {
    decoded(&run["measures"][measure]).into_iter().map(u32::from_le_bytes).collect()
}

/// A cell without a number.
const NONE: u32 = 0x7fc0_0001;
