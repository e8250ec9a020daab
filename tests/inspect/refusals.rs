//! The inspector's manners when something is wrong: with its command line, its files, or where it writes.

use super::{Files, assert_complains, command, file, golden, raw, report, text};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

#[test]
fn a_command_line_that_makes_no_sense_exits_with_2() {
    let dead = golden("dead");
    let dead = dead.to_str().unwrap();
    let mut lines = vec![
        (vec![], "<FILE>..."),
        (vec!["--json"], "<FILE>..."),
        (vec![dead, "--clip-norm", "1"], "--out"),
        (vec![dead, "--out", "nowhere"], "--clip-norm"),
        (vec![dead, "--unknown"], "--unknown"),
        (vec![dead, "--lr"], "--lr"),
        (vec![dead, "--lr", "0"], "--lr"),
        (vec![dead, "--lr=-1"], "--lr"),
        (vec![dead, "--lr", "nan"], "--lr"),
        (vec![dead, "--lr", "1e400"], "--lr"),
        (vec![dead, "--lr", "1e-320"], "--lr"),
        (vec![dead, "--lr", "fast"], "--lr"),
        (vec![dead, "--preset", "gpt"], "--preset"),
        (vec![dead, "--preset", "a\nb"], "--preset"),
        (vec![dead, "--preset", "lr-scaled"], "--lr"),
        (vec![dead, "--params"], "--params"),
        (vec![dead, "--params", dead, "--params", dead], "--params"),
        (vec![dead, "--device", "tpu"], "tpu"),
        (vec![dead, "--json", "--json"], "--json"),
        (vec![dead, "--clip-norm"], "--clip-norm"),
    ];
    let norms =
        ["0", "-0", "-1", "nan", "inf", "-inf", "1e999", "one", "", "1\n\n2"].map(|x| format!("--clip-norm={x}"));
    lines.extend(norms.iter().map(|norm| (vec![dead, "--out", "nowhere", norm], "--clip-norm")));
    let thresholds = ["-1", "-1e-30", "nan", "inf", "1e39", "x", "1,5"];
    lines.extend(thresholds.map(|x| (vec![dead, "--dead-threshold", x], "--dead-threshold")));
    for (arguments, needle) in lines {
        assert_complains(command(&arguments).output().unwrap(), 2, &[needle]);
    }
    assert!(!Path::new("nowhere").exists());
    assert!(text(inspect!["--help"]).contains("--clip-norm <X>"));
}

#[test]
fn bad_files_are_named_before_anything_is_written() {
    let files = Files::new();
    let good = files.write("good", &file(&[("a.2", &[1.0, 2.0]), ("a.10", &[3.0])], 0));
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(
            r#"{{"a.2":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#
        )
    };
    let cases: [(&str, Vec<u8>, &str); 25] = [
        ("garbage", b"not a safetensors file at all".to_vec(), ""),
        ("long header", u64::MAX.to_le_bytes().to_vec(), "header of 18446744073709551615 bytes"),
        ("no JSON", raw("{", &[]), "malformed header"),
        ("not an object", raw("[]", &[]), "malformed header"),
        ("not UTF-8", [&[2u8, 0, 0, 0, 0, 0, 0, 0][..], b"\xff\xff"].concat(), "malformed header"),
        ("deep", raw(&"[".repeat(100_000), &[]), "malformed header"),
        ("metadata", raw(r#"{"__metadata__":{"step":1}}"#, &[]), "__metadata__"),
        ("I64", raw(&tensor("I64", "[1]", "[8,16]"), &[0; 16]), r#"tensor "t": dtype I64 is not"#),
        ("F64", raw(&tensor("F64", "[0]", "[8,8]"), &[0; 8]), r#"tensor "t": dtype F64 is not"#),
        ("unknown", raw(&tensor("F33", "[1]", "[8,12]"), &[0; 12]), r#"tensor "t": unknown variant `F33`"#),
        ("shape", raw(&tensor("F32", "[3]", "[8,16]"), &[0; 16]), r#"tensor "t": shape [3] of F32"#),
        ("overflow", raw(&tensor("F32", "[4294967296,4294967296]", "[8,8]"), &[0; 8]), r#"tensor "t": shape"#),
        (
            "huge",
            raw(&tensor("F16", "[9223372036854775807]", "[0,18446744073709551614]"), &[0; 8]),
            r#"tensor "t": its data"#,
        ),
        ("negative", raw(&tensor("F32", "[-1]", "[8,12]"), &[0; 12]), r#"tensor "t": invalid value"#),
        ("backwards", raw(&tensor("F32", "[1]", "[12,8]"), &[0; 12]), r#"tensor "t": shape"#),
        ("overlap", raw(&tensor("F32", "[2]", "[4,12]"), &[0; 12]), r#"tensor "t": its data"#),
        ("hole", raw(&tensor("F32", "[1]", "[12,16]"), &[0; 16]), r#"tensor "t": its data"#),
        (
            "too long",
            raw(&tensor("F32", "[1]", "[8,12]"), &[0; 13]),
            "12 bytes of tensors in the header, 13 in the file",
        ),
        (
            "other dtype",
            raw(&tensor("BF16", "[1]", "[8,10]").replace("\"t\"", "\"a.10\""), &[0; 10]),
            r#"tensor "a.10": 1 BF16 elements here, 1 F32"#,
        ),
        ("other length", file(&[("a.2", &[1.0]), ("a.10", &[3.0])], 0), r#"tensor "a.2": 1 F32 elements here, 2 F32"#),
        ("renamed", file(&[("a.3", &[1.0, 2.0]), ("a.10", &[3.0])], 0), r#"tensor "a.2": is missing here"#),
        ("more", file(&[("a.2", &[1.0, 2.0]), ("a.5", &[]), ("a.10", &[3.0])], 0), r#"tensor "a.5": is not in"#),
        ("last", file(&[("a.2", &[1.0, 2.0]), ("a.10", &[3.0]), ("b", &[])], 0), r#"tensor "b": is not in"#),
        ("fewer", file(&[("a.2", &[1.0, 2.0])], 0), r#"tensor "a.10": is missing here"#),
        ("none", file(&[], 0), r#"tensor "a.2": is missing here"#),
    ];
    let out = files.path("out");
    for (name, bytes, needle) in cases {
        let bad = files.write(name, &bytes);
        for json in [&[][..], &["--json"]] {
            let mut run = command([good.as_os_str(), bad.as_os_str(), "--clip-norm".as_ref(), "1".as_ref()]);
            assert_complains(
                run.args(json).arg("--out").arg(&out).output().unwrap(),
                1,
                &[bad.to_str().unwrap(), needle],
            );
        }
    }
    assert_complains(inspect![good, files.path("absent")], 1, &["absent"]);
    assert_complains(inspect![good, files.0.path()], 1, &["not a regular file"]);
    assert!(!out.exists());
}

#[test]
fn bad_weights_are_named_before_anything_is_measured() {
    let files = Files::new();
    let step = files.write("step", &file(&[("a.2", &[1.0, 2.0]), ("a.10", &[3.0])], 0));
    let name = "w\n\"10\"";
    let odd = files.write("odd", &file(&[(name, &[1.0])], 0));
    let integers = r#"{"a.2":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},"a.10":{"dtype":"F32","shape":[1],"data_offsets":[16,20]}}"#;
    let cases = [
        (&step, "first", file(&[("a.10", &[3.0])], 0), r#"tensor "a.2": is missing here, but its gradient is in"#),
        (&step, "last", file(&[("a.2", &[1.0, 2.0]), ("b", &[])], 0), r#"tensor "a.10": is missing here"#),
        (&step, "none", file(&[], 0), r#"tensor "a.2": is missing here"#),
        (
            &step,
            "longer",
            file(&[("a.2", &[1.0; 3]), ("a.10", &[3.0])], 0),
            r#"tensor "a.2": 3 elements here, 2 of its"#,
        ),
        (&step, "empty", file(&[("a.2", &[1.0; 2]), ("a.10", &[])], 0), r#"tensor "a.10": 0 elements here, 1 of its"#),
        (&step, "integers", raw(integers, &[0; 20]), r#"tensor "a.2": dtype I64 is not"#),
        (&step, "cut", file(&[("a.2", &[1.0; 2]), ("a.10", &[3.0])], 0)[..100].to_vec(), "truncated"),
        (&step, "garbage", b"no weights".to_vec(), "not a safetensors file"),
        (&odd, "odd\nweights", file(&[("w", &[1.0])], 0), r#"tensor "w\n\"10\"": is missing here"#),
    ];
    let out = files.path("out");
    for (step, weights, bytes, needle) in cases {
        let weights = files.write(weights, &bytes);
        for json in [&[][..], &["--json"]] {
            let mut run =
                command([step.as_os_str(), "--clip-norm=1".as_ref(), "--params".as_ref(), weights.as_os_str()]);
            let output = run.args(json).arg("--out").arg(&out).output().unwrap();
            let shown = weights.to_str().unwrap().replace('\n', r"\n");
            assert_complains(output, 1, &[&shown, needle]);
        }
    }
    assert_complains(inspect![step, "--params", files.path("absent")], 1, &["absent"]);
    assert_complains(inspect![step, "--params", files.0.path()], 1, &["not a regular file"]);
    assert!(!out.exists());
}

/// A file that takes no room on the disk, with a tensor twice as large as the memory that the run may have.
#[test]
#[cfg(target_os = "linux")]
fn memory_that_is_missing_is_reported() {
    let files = Files::new();
    let header = r#"{"t":{"dtype":"F32","shape":[536870912],"data_offsets":[0,2147483648]}}"#;
    let path = files.write("large", &raw(header, &[]));
    fs::File::options().write(true).open(&path).unwrap().set_len(8 + header.len() as u64 + (2 << 30)).unwrap();
    let limited = |arguments: &[&Path]| {
        let inspector = command(arguments);
        let mut run = Command::new("sh");
        run.args(["-c", r#"ulimit -v 1048576; exec "$0" "$@""#]).arg(inspector.get_program());
        // A thread reserves address space of its own.
        run.args(inspector.get_args()).env("RAYON_NUM_THREADS", "1").output().unwrap()
    };
    assert_complains(limited(&[&path]), 1, &["large: tensor \"t\": 2147483648 bytes"]);
    assert_complains(limited(&[&path, &path]), 1, &["signal and noise across the files", "2147483648 bytes"]);
}

#[test]
fn every_truncation_and_every_changed_byte_is_reported_or_harmless() {
    let files = Files::new();
    let whole = file(&[("a", &[1.0, 2.0]), ("b", &[])], 0);
    for length in 0..whole.len() {
        let path = files.write("cut", &whole[..length]);
        assert_complains(inspect![path], 1, &[path.to_str().unwrap()]);
    }
    let larger = fs::read(golden("dead")).unwrap();
    for length in (0..larger.len()).step_by(4999) {
        assert_complains(inspect![files.write("cut", &larger[..length])], 1, &["cut"]);
    }
    for place in 0..whole.len() - 8 {
        let mut changed = whole.clone();
        changed[place] ^= [1, 0x80, 0x22, 0xff][place % 4];
        let path = files.write("changed", &changed);
        let output = inspect!["--json", path];
        if output.status.success() { drop(report(output)) } else { assert_complains(output, 1, &["changed"]) }
    }
}

#[test]
fn copies_never_replace_an_input_or_each_other() {
    let files = Files::new();
    let data = file(&[("a", &[3.0])], 0);
    let (one, two) = (files.write("one/x", &data), files.write("two/x", &data));
    let clip = |inputs: &[&Path], out: &Path| {
        command(inputs).args(["--clip-norm", "1", "--out"]).arg(out).current_dir(files.0.path()).output().unwrap()
    };
    let fresh = files.path("fresh");
    assert_complains(clip(&[&one, &two], &fresh), 1, &["has the file name of", "one"]);
    assert_complains(clip(&[&one, &one], &fresh), 1, &["has the file name of"]);
    assert!(!fresh.exists());
    for out in [files.path("one"), "one".into(), "two/../one/.".into(), "created/../one".into()] {
        assert_complains(clip(&[&one], &out), 1, &["would replace an input"]);
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        symlink(files.path("one"), files.path("link")).unwrap();
        assert_complains(clip(&[&one], &files.path("link")), 1, &["would replace an input"]);
        assert_complains(clip(&[&files.path("link/x")], &files.path("one")), 1, &["would replace an input"]);
        // A file that is a link: neither it nor what it leads to may be replaced.
        fs::create_dir(files.path("three")).unwrap();
        symlink(&one, files.path("three/x")).unwrap();
        assert_complains(clip(&[&files.path("three/x")], &files.path("three")), 1, &["would replace an input"]);
        assert_complains(clip(&[&one], &files.path("three")), 1, &["would replace an input"]);
    }
    // Nor the weights, which may well have the name of a step elsewhere.
    let weights = |out: &str| {
        let mut run = command([&one]);
        run.arg("--params").arg(&two).args(["--clip-norm", "1", "--out"]).arg(files.path(out)).output().unwrap()
    };
    assert_complains(weights("two"), 1, &["would replace an input"]);
    text(weights("elsewhere"));
    // Neither a directory in the place of a copy nor a file in the place of the directory leaves anything behind.
    fs::create_dir_all(files.path("full/x")).unwrap();
    assert_complains(clip(&[&one], &files.path("full")), 1, &["full"]);
    assert_eq!(fs::read_dir(files.path("full")).unwrap().count(), 1);
    assert_complains(clip(&[&one], &two), 1, &["two"]);
    assert_eq!((fs::read(&one).unwrap(), fs::read(&two).unwrap()), (data.clone(), data));
}

#[test]
fn a_reader_who_leaves_is_no_failure() {
    let files = Files::new();
    for json in [&[][..], &["--json"]] {
        let out = files.path(&format!("out{}", json.len()));
        let mut run = command([golden("dead"), golden("dead")]);
        let mut child = run.args(json).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        text(child.wait_with_output().unwrap());
        let mut run = command([golden("dead")]);
        run.args(json).args(["--clip-norm", "1e-3", "--out"]).arg(&out);
        let mut child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        text(child.wait_with_output().unwrap());
        assert!(out.join("dead.safetensors").exists());
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_reported() {
    for json in [&[][..], &["--json"]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = command([golden("dead")]).args(json).stdout(full).output().unwrap();
        assert_complains(output, 1, &["standard output: "]);
    }
}
