//! Runs and pages that cannot be: one line on standard error that says which file, and which line of it.

use crate::{Folder, lines, report, steps};
use gradprobe::write::json_line;
use std::{fs, path::Path};

/// Runs the program, which must end with this code and one line in which these words are.
#[track_caller]
fn refused(arguments: &[&Path], code: i32, words: &[&str]) {
    let output = report(arguments);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0), "{message}");
    assert!(code == 2 || message.lines().count() == 1, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message}");
    }
}

#[test]
fn what_is_no_run_is_refused_and_leaves_no_page() {
    let (folder, good) = (Folder::new(), lines(&steps()));
    let page = folder.path("page.html");
    let (line, other) = (good[4].clone(), good[5].clone());
    let damaged = |place: usize, line: &str| {
        let mut lines = good.clone();
        lines[place] = line.to_owned();
        lines
    };
    let renamed = line.replace("h.3.weight", "h.three.weight");
    for (name, lines, words) in [
        ("empty", vec![], &["empty/steps.jsonl: has no step that is whole"][..]),
        ("text", vec!["# A diary".to_owned()], &["text/steps.jsonl: is no run"]),
        ("half", damaged(7, &line[..line.len() / 2]), &["half/steps.jsonl: line 8: ", "byte"]),
        ("number", damaged(7, r#"{"step":8,"total_norm":"large"}"#), &["line 8: ", "\"large\""]),
        ("empty-line", damaged(7, ""), &["line 8: "]),
        ("twice", damaged(5, &line), &["line 6: step 5 does not come after step 5"]),
        ("falls", damaged(4, &other), &["line 6: step 6 does not come after step 6"]),
        ("renamed", damaged(4, &renamed), &["line 5: tensor \"h.three.weight\"", "\"h.3.weight\""]),
        ("fewer", damaged(4, r#"{"step":5,"tensors":[]}"#), &["line 5: 0 tensors", "have 6"]),
    ] {
        refused(&[&folder.run(name, &lines), Path::new("-o"), &page], 1, words);
        assert!(!page.exists(), "{name}");
    }
    refused(&[&folder.path("nowhere"), Path::new("-o"), &page], 1, &["nowhere: No such file"]);
    fs::create_dir(folder.path("folder")).unwrap();
    refused(&[&folder.path("folder")], 1, &["folder/steps.jsonl: No such file"]);
    // No temporary file is left.
    let left: Vec<_> = fs::read_dir(folder.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
    refused(&[], 2, &["RUN"]);
    refused(&[Path::new("a"), Path::new("b"), Path::new("c")], 2, &["unexpected"]);
}

#[test]
fn a_file_that_is_there_stays_unless_force_is_given() {
    let folder = Folder::new();
    let run = folder.run("run", &lines(&steps()));
    let page = folder.path("page.html");
    fs::write(&page, "a letter").unwrap();
    refused(&[&run, Path::new("-o"), &page], 1, &["page.html: is there already; --force replaces it"]);
    assert_eq!(fs::read_to_string(&page).unwrap(), "a letter");
    refused(&[&run, Path::new("-o"), &folder.path("nowhere/page.html")], 1, &["nowhere/page.html"]);
    refused(&[&run, Path::new("--force"), Path::new("-o"), &run], 1, &["run: "]);
    refused(
        &[&run, Path::new("--force"), Path::new("-o"), &run.join("steps.jsonl")],
        1,
        &["steps.jsonl: is the run itself"],
    );
    assert_eq!(folder.page(&[&run]).runs().len(), 1);
}

#[test]
fn two_runs_need_a_tensor_in_common() {
    let folder = Folder::new();
    let run = folder.run("run", &lines(&steps()));
    let lines_of =
        |name: fn(usize) -> String| crate::entries::deep(3, 5, 9..=9, name).iter().map(json_line).collect::<Vec<_>>();
    let some = folder.run("some", &lines_of(|layer| format!("h.{layer}.weight")));
    let none = folder.run("none", &lines_of(|layer| format!("other.{layer}")));
    // The first of six is another, and three are missing.
    let page = folder.page(&[&run, &some]);
    let names: Vec<String> = page.runs().iter().map(|run| run["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["run", "some"]);
    let output = folder.path("none.html");
    refused(&[&run, &none, Path::new("-o"), &output], 1, &["no tensor is in both runs", "none has no \"</script>"]);
    // Without details there is nothing to compare but curves.
    let loss = folder.run("loss", &[r#"{"step":3,"scalars":{"loss":1.5}}"#.to_owned()]);
    assert_eq!(folder.page(&[&run, &loss]).runs().len(), 2);
}
