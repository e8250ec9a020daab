//! Processes that are killed while they write as fast as they can, and followed by others.

use crate::kept::{KEEPERS, found, sinks, steps};
use gradprobe::{Config, Cpu, DType, Error, Plan, Probe, Tensor, write::Entry};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

const FOLDER: &str = "GRADPROBE_KILLED";
const TENSORS: usize = 24;
/// Of a tensor's name. An entry then has some hundred pages of memory, after each of which the system may end a write.
const NAME: usize = 8192;
const KILLS: u64 = 24;

/// Writes the steps after this one, as fast as it can.
fn write(folder: &Path, last: u64, steps: u64) {
    let name = |index| format!("{index}\n{}", "name".repeat(NAME / 4));
    let plan = Plan::new((0..TENSORS).map(|index| (name(index), DType::F32, 4))).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new()).unwrap();
    let mut state = probe.state().unwrap();
    state.step = last;
    probe.restore(&state).unwrap();
    let mut sinks = sinks(folder);
    sinks.truncate(KEEPERS.len());
    let gradients: Vec<&dyn Tensor> = (0..TENSORS).map(|_| &[0.1f32, -0.2, 0.3, 0.4] as &dyn Tensor).collect();
    for _ in 0..steps {
        probe.measure(&gradients).unwrap();
        let entry = Entry::new(probe.wait().unwrap());
        for sink in &mut sinks {
            match sink.write(&entry) {
                // One file may have got a step that another had not.
                Ok(()) | Err(Error::StepWritten { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_has_every_step_once() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let last = found(Path::new(&folder)).map(|(steps, _)| steps.last().copied().unwrap_or(0));
        return write(Path::new(&folder), last.into_iter().min().unwrap_or(0), u64::MAX);
    }
    let folder = TempDir::new().unwrap();
    write(folder.path(), 0, 2);
    let (mut last, mut torn) = (2, [0; 3]);
    let length = || fs::metadata(folder.path().join("steps.jsonl")).unwrap().len();
    for kill in 0..KILLS {
        let before = length();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::a_run_that_is_killed_again_and_again_has_every_step_once"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while length() <= before {
            assert!(child.try_wait().unwrap().is_none() && begun.elapsed().as_secs() < 60, "it does not write");
            thread::sleep(Duration::from_millis(1));
        }
        // A moment that no clock of the writer's knows.
        thread::sleep(Duration::from_micros(kill * 7919 % 10_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = found(folder.path());
        for ((steps, is_torn), torn) in found.iter().zip(&mut torn) {
            assert!(steps.iter().copied().eq(1..=steps.len() as u64), "kill {kill}: {steps:?}");
            *torn += u32::from(*is_torn);
        }
        let now = found.map(|(steps, _)| steps.len()).into_iter().min().unwrap();
        assert!(now >= last, "kill {kill}: {now} steps after {last}");
        last = now;
    }
    println!("{last} steps, {KILLS} kills; parts of an entry in lines, rows, events: {torn:?}");
    // Where one has but begun with a step, the next completes it.
    assert!(last as u64 >= 2 + KILLS / 2);
    // The last one ends well.
    write(folder.path(), last as u64, 4);
    for steps in steps(folder.path()) {
        assert!(steps.len() >= last + 4 && steps.iter().copied().eq(1..=steps.len() as u64), "{steps:?}");
    }
}
