//! Disks that are full, folders that are gone or read-only, files of others, runs that begin anew: what is there stays whole,
//! and what is lost is told.

use crate::{
    entries::entries,
    kept::{KEEPERS, sinks, steps},
    require::pointless,
};
use gradprobe::{
    Error,
    write::{Background, Csv, JsonLines, Prometheus, Sink, TensorBoard, charts::ChartFolder},
};
use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
    process::{self, Command},
};
use tempfile::TempDir;

#[test]
fn the_first_step_that_is_lost_is_told_and_all_are_counted() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("steps.jsonl");
    let sinks: Vec<Box<dyn Sink>> =
        vec![Box::new(JsonLines::open("/dev/full").unwrap()), Box::new(JsonLines::open(&path).unwrap())];
    let mut background = Background::new(sinks, 8).unwrap();
    assert!(entries(5).into_iter().skip(1).all(|entry| background.send(entry)));
    while background.lost() < 4 {
        std::thread::yield_now();
    }
    let told = background.error().unwrap();
    assert_eq!(told.to_string(), "step 2 is lost: /dev/full: No space left on device (os error 28)");
    let finished = background.finish();
    assert_eq!((finished.written, finished.lost, finished.dropped), (0, 4, 0));
    assert_eq!(finished.error, Some(told));
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 4, "the other sink has them");
}

/// Every sink through a disk that is full from step 11 to step 20, of which at least these files need more.
fn through_a_full_disk(folder: &Path, fill: impl Fn(), free: impl Fn(), starved: &[&str]) {
    let mut sinks = sinks(folder);
    let mut written = vec![Vec::new(); sinks.len()];
    for entry in entries(30) {
        match entry.step() {
            11 => fill(),
            21 => free(),
            _ => {}
        }
        for (sink, written) in sinks.iter_mut().zip(&mut written) {
            match sink.write(&entry) {
                Ok(()) => written.push(entry.step()),
                Err(Error::Unwritable { path, .. }) => assert!(path.starts_with(folder), "{}", path.display()),
                Err(other) => panic!("{other}"),
            }
        }
        if entry.step() == 20 {
            let kept = steps(folder);
            assert_eq!(kept.as_slice(), &written[..3], "nothing of an entry is left while there is no room");
        }
    }
    sinks.iter_mut().for_each(|sink| sink.finish().unwrap());
    assert_eq!(steps(folder).as_slice(), &written[..3]);
    for (written, name) in written.iter().zip(KEEPERS.iter().chain(&["gradients.prom"])) {
        assert!(written.len() < 30 || !starved.contains(name), "{name} never was without room");
        let whole = (1..=10).chain(21..=30);
        assert!(whole.clone().all(|step| written.contains(&step)), "{name} has only {written:?}");
    }
    let prometheus = fs::read_to_string(folder.join("gradients.prom")).unwrap();
    assert!(prometheus.contains("gradprobe_step 3e1\n"));
    let names = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name());
    assert_eq!(names.filter(|name| name.to_string_lossy().ends_with(".tmp")).count(), 0);
}

/// Runs the test of this name in a process of its own, which `command` starts; `folder` tells it from this one.
fn in_a_process(mut command: Command, test: &str, folder: &Path) {
    command.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    let output = command.env(FOLDER, folder).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{}: {text}{error}", output.status);
}

const FOLDER: &str = "GRADPROBE_FAULTS";

/// A file system of 1 MB in a namespace of its own, which needs no rights where users may have namespaces.
#[test]
fn writers_go_on_when_a_full_disk_has_room_again() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = Path::new(&folder);
        let filler = folder.join("filler");
        let fill = || {
            let mut file = File::create(&filler).unwrap();
            while file.write_all(&[0; 4096]).is_ok() {}
        };
        let files = [&KEEPERS[..], &["gradients.prom"]].concat();
        return through_a_full_disk(folder, fill, || fs::remove_file(&filler).unwrap(), &files);
    }
    let folder = TempDir::new().unwrap();
    let mut mounts = Command::new("unshare");
    mounts.args(["--map-root-user", "--mount", "sh", "-c"]).arg("mount -t tmpfs -o size=1m none \"$0\" && exec \"$@\"");
    mounts.arg(folder.path());
    let may = Command::new("unshare").args(mounts.get_args()).arg("true").output();
    if !may.is_ok_and(|output| output.status.success()) {
        return pointless("no file system can be mounted in a namespace");
    }
    in_a_process(mounts, "faults::writers_go_on_when_a_full_disk_has_room_again", folder.path());
}

/// A limit of files' sizes within an entry, which then is written in part.
#[test]
fn writers_go_on_when_files_may_grow_again() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = Path::new(&folder);
        let limit = |bytes: &str| {
            let process = process::id().to_string();
            let limit = format!("--fsize={bytes}:unlimited");
            assert!(Command::new("prlimit").args(["--pid", &process, &limit]).status().unwrap().success());
        };
        let length = || fs::metadata(folder.join(KEEPERS[0])).unwrap().len();
        let within_a_line = || limit(&(length() + 100).to_string());
        return through_a_full_disk(folder, within_a_line, || limit("unlimited"), &KEEPERS[..1]);
    }
    let folder = TempDir::new().unwrap();
    if !Command::new("prlimit").args(["--fsize=1:unlimited", "true"]).status().is_ok_and(|status| status.success()) {
        return pointless("there is no prlimit, or no limit can be set");
    }
    let mut ignores = Command::new("sh");
    ignores.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]);
    in_a_process(ignores, "faults::writers_go_on_when_files_may_grow_again", folder.path());
}

#[test]
fn a_folder_that_is_read_only_is_named() {
    let plan = entries(1)[0].report().plan().clone();
    // Nobody may make files there, root neither.
    let folder = Path::new("/sys/gradprobe");
    let refusals = [
        JsonLines::open(folder).map(drop),
        Csv::open(folder).map(drop),
        Prometheus::create(folder).map(drop),
        TensorBoard::create(folder).map(drop),
        ChartFolder::create(folder, &plan).map(drop),
    ];
    for (index, refusal) in refusals.into_iter().enumerate() {
        assert!(matches!(refusal, Err(Error::Unwritable { path, .. }) if path == folder), "{index}");
    }
}

#[test]
fn a_folder_that_is_removed_is_an_error_until_it_is_back() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    fs::create_dir(&run).unwrap();
    let mut sinks = sinks(&run);
    for entry in entries(5) {
        match entry.step() {
            2 => fs::remove_dir_all(&run).unwrap(),
            4 => fs::create_dir_all(run.join("events")).unwrap(),
            _ => {}
        }
        for (index, sink) in sinks.iter_mut().enumerate() {
            match sink.write(&entry) {
                Ok(()) => assert!(!(2..4).contains(&entry.step()), "{index}: step {}", entry.step()),
                Err(error) => {
                    assert!((2..4).contains(&entry.step()), "{index}: {error}");
                    assert!(matches!(error, Error::Unwritable { path, .. } if path.starts_with(&run)));
                }
            }
        }
    }
    assert_eq!(steps(&run), [const { [4u64, 5] }; 3]);
}

/// The files of 1 to 3, and then the same run again, and one that goes on.
#[test]
fn no_step_is_written_twice() {
    let folder = TempDir::new().unwrap();
    let entries = entries(6);
    let mut first = sinks(folder.path());
    entries[..4].iter().for_each(|entry| first.iter_mut().for_each(|sink| sink.write(entry).unwrap()));
    // A probe that is restored within a run goes back as well.
    let again = first.iter_mut().map(|sink| sink.write(&entries[1])).collect::<Vec<_>>();
    drop(first);
    let mut second = sinks(folder.path());
    let refused =
        entries[..4].iter().flat_map(|entry| second.iter_mut().map(|sink| sink.write(entry)).collect::<Vec<_>>());
    for (index, refused) in again.into_iter().chain(refused.collect::<Vec<_>>()).enumerate() {
        match refused {
            // Prometheus' file shows the run at hand.
            Ok(()) => assert_eq!(index % 4, 3),
            Err(error) => {
                assert!(matches!(error, Error::StepWritten { last: 4, .. }), "{index}: {error}");
                assert!(index % 4 < 3 && error.to_string().contains("needs a place of its own"));
            }
        }
    }
    entries[4..].iter().for_each(|entry| second.iter_mut().for_each(|sink| sink.write(entry).unwrap()));
    assert_eq!(steps(folder.path()), [const { [1u64, 2, 3, 4, 5, 6] }; 3]);
}

/// As a crash may leave it: continued from there, the file is the one without a crash.
#[test]
fn a_file_cut_off_anywhere_continues_after_its_last_whole_step() {
    let folder = TempDir::new().unwrap();
    let entries = entries(3);
    for (index, name) in KEEPERS[..2].iter().enumerate() {
        let open = |path: &Path| -> Box<dyn Sink> {
            if index == 0 { Box::new(JsonLines::open(path).unwrap()) } else { Box::new(Csv::open(path).unwrap()) }
        };
        let path = folder.path().join(name);
        let mut sink = open(&path);
        entries.iter().for_each(|entry| sink.write(entry).unwrap());
        drop(sink);
        let whole = fs::read(&path).unwrap();
        // Every break of a line among them, also those within names.
        let is_chosen = |&length: &usize| length % 59 == 0 || whole[length.saturating_sub(2)..length].contains(&b'\n');
        for length in (0..whole.len()).filter(is_chosen) {
            fs::write(&path, &whole[..length]).unwrap();
            let mut sink = open(&path);
            for entry in &entries {
                let done = sink.write(entry);
                assert!(matches!(done, Ok(()) | Err(Error::StepWritten { .. })), "{name} cut to {length}: {done:?}");
            }
            assert!(fs::read(&path).unwrap() == whole, "{name} cut to {length} bytes of {}", whole.len());
        }
    }
    // TensorBoard's readers go on with the next file, which begins after the last whole step.
    let events = folder.path().join("events");
    let mut sink = TensorBoard::create(&events).unwrap();
    entries.iter().for_each(|entry| sink.write(entry).unwrap());
    let (torn, whole) = (sink.path().to_owned(), fs::read(sink.path()).unwrap());
    for length in (0..whole.len()).step_by(101) {
        fs::write(&torn, &whole[..length]).unwrap();
        let mut sink = TensorBoard::create(&events).unwrap();
        for entry in &entries {
            let _ = sink.write(entry);
        }
        assert_eq!(steps(folder.path())[2], [1, 2, 3], "cut to {length}");
        fs::remove_file(sink.path()).unwrap();
    }
}

#[test]
fn a_line_that_a_reader_has_seen_is_whole_and_two_writers_are_one_too_many() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("steps.jsonl");
    let mut sink = JsonLines::open(&path).unwrap();
    let mut reader = File::open(&path).unwrap();
    for entry in entries(3) {
        sink.write(&entry).unwrap();
        let mut line = String::new();
        reader.read_to_string(&mut line).unwrap();
        assert_eq!(line, gradprobe::write::json_line(&entry) + "\n");
    }
    let refused = JsonLines::open(&path).map(drop).unwrap_err();
    assert!(refused.to_string().ends_with("is being written by another"), "{refused}");
    drop(sink);
    JsonLines::open(&path).unwrap();
}
