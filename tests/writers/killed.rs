//! Processes that are killed while they write as fast as they can, and followed by others.

use crate::kept::{KEEPERS, found, sinks, steps};
use gradprobe::{Config, Cpu, DType, Plan, Probe, Tensor, write::Entry};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// The folder, and which of its files is written.
const FOLDER: &str = "GRADPROBE_KILLED";
const FILE: &str = "GRADPROBE_KILLED_FILE";
const TENSORS: usize = 24;
/// Letters of a tensor's name, which is in an event for every statistic. An entry then has hundreds of pages of memory, after each
/// of which the system may end a write.
const NAME: [usize; KEEPERS.len()] = [65_536, 65_536, 4096];
const KILLS: usize = 30;

/// Writes so many steps to one of the files, after those that it has, as fast as it can.
fn write(folder: &Path, file: usize, steps: u64) {
    let name = |index| format!("{index}\n{}", "name".repeat(NAME[file] / 4));
    let plan = Plan::new((0..TENSORS).map(|index| (name(index), DType::F32, 4))).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new()).unwrap();
    let mut state = probe.state().unwrap();
    state.measured = found(folder, file).0.len() as u64;
    probe.restore(&state).unwrap();
    let mut sink = sinks(folder).swap_remove(file);
    let gradients: Vec<&dyn Tensor> = (0..TENSORS).map(|_| &[0.1f32, -0.2, 0.3, 0.4] as &dyn Tensor).collect();
    for _ in 0..steps {
        probe.measure(&gradients).unwrap();
        sink.write(&Entry::new(probe.wait().unwrap())).unwrap();
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_has_every_step_once() {
    let own = |name| std::env::var(name).ok();
    if let Some((folder, file)) = own(FOLDER).zip(own(FILE)) {
        return write(Path::new(&folder), file.parse().unwrap(), u64::MAX);
    }
    let folder = TempDir::new().unwrap();
    let (mut last, mut torn) = ([0; KEEPERS.len()], [0; KEEPERS.len()]);
    drop(sinks(folder.path()));
    (0..KEEPERS.len()).for_each(|file| write(folder.path(), file, 2));
    let length = |file| {
        let path = folder.path().join(KEEPERS[file]);
        let length = |path: &Path| fs::metadata(path).unwrap().len();
        if path.is_dir() {
            fs::read_dir(path).unwrap().map(|file| length(&file.unwrap().path())).sum()
        } else {
            length(&path)
        }
    };
    for kill in 0..KILLS {
        let file = kill % KEEPERS.len();
        let before = length(file);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::a_run_that_is_killed_again_and_again_has_every_step_once"])
            .envs([(FOLDER, folder.path().to_str().unwrap()), (FILE, &file.to_string())])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        // The head of a new event file is no step yet.
        while length(file) <= before + 100 {
            assert!(child.try_wait().unwrap().is_none() && begun.elapsed().as_secs() < 60, "it does not write");
            thread::sleep(Duration::from_millis(1));
        }
        // A moment that no clock of the writer's knows.
        thread::sleep(Duration::from_micros(kill as u64 * 7919 % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let (steps, is_torn) = &found(folder.path(), file);
        assert!(
            steps.len() >= last[file] && steps.iter().copied().eq(1..=steps.len() as u64),
            "kill {kill}: {steps:?}"
        );
        torn[file] += u32::from(*is_torn);
        last[file] = steps.len();
    }
    println!("{KILLS} kills; steps {last:?}; parts of an entry in lines, rows: {:?}", &torn[..2]);
    // The last ones end well.
    (0..KEEPERS.len()).for_each(|file| write(folder.path(), file, 4));
    for (steps, last) in steps(folder.path()).into_iter().zip(last) {
        assert!(steps.iter().copied().eq(1..=last as u64 + 4), "{steps:?} after {last}");
    }
}
