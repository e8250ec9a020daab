//! `gradprobe live`: the file is followed as it grows.

use crate::{Folder, lines, steps};
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::{Command, Output},
    thread,
    time::Duration,
};

fn live(run: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gradprobe")).arg("live").arg(run).output().unwrap()
}

/// Has the program follow a run in which a line replaces half of another; gives the bytes that the terminal got, and the exit
/// status.
#[cfg(unix)]
fn grown(folder: &Folder, line: &str) -> Option<(String, i64)> {
    let lines = lines(&steps());
    let run = folder.run("run", &lines[..20]);
    let mut file = File::options().append(true).open(run.join("steps.jsonl")).unwrap();
    let whole = file.metadata().unwrap().len();
    file.write_all(&lines[20].as_bytes()[..1000]).unwrap();
    let line = format!("{line}\n");
    let writer = thread::spawn(move || {
        thread::sleep(Duration::from_secs(1));
        file.set_len(whole).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    });
    let program = Path::new(env!("CARGO_BIN_EXE_gradprobe"));
    let seen = crate::terminal::run(&[program, Path::new("live"), &run], "exploding", "q");
    writer.join().unwrap();
    seen
}

#[cfg(unix)]
#[test]
fn a_step_is_shown_as_soon_as_its_line_is_whole() {
    let line = r#"{"step":77,"total_norm":"inf","clip_coefficient":0.25,"findings":[{"severity":"critical","kind":"exploding",
        "step":77,"since":70,"tensor":"h.1.weight","others":["h.2.weight"],"value":"inf","threshold":1.0,"rule":"norm-above",
        "message":"far above","advice":["lower the learning rate"]}],"verdict":"critical"}"#;
    let line: String = line.lines().map(str::trim).collect();
    let Some((sent, status)) = grown(&Folder::new(), &line) else { return };
    assert_eq!(status, 0);
    // The tensors are those of the last step that has them. Only changes of the screen are sent, and no blanks.
    for part in ["h.5.weight", "of step 20", "77", "critical exploding", "above", "learning"] {
        assert!(sent.contains(part), "{part} is not in {sent}");
    }
}

#[cfg(unix)]
#[test]
fn a_damaged_line_gives_the_terminal_back_and_is_named() {
    let Some((sent, status)) = grown(&Folder::new(), r#"{"step":77,"total_norm":"exploding"}"#) else { return };
    let (_, after) = sent.split_once("\u{1b}[?1049l").expect("the terminal is given back");
    assert!(after.contains("steps.jsonl: line 21: ") && after.contains("exploding"), "{after}");
    assert_eq!(status, 1);
}

#[test]
fn without_a_terminal_or_a_run_it_says_so() {
    let folder = Folder::new();
    let run = folder.run("run", &lines(&steps()));
    fs::write(folder.path("text.jsonl"), "a diary").unwrap();
    for (run, words) in [
        (run, "error: no terminal: standard output is redirected\n"),
        (folder.path("nowhere"), "nowhere: No such file"),
        (folder.path("text.jsonl"), "text.jsonl: is no run"),
    ] {
        let output = live(&run);
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains(words) && message.lines().count() == 1, "{message}");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    }
}
