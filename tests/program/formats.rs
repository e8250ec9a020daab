//! What gradients can be read from: shards, PyTorch's files, files of more than gradients; and what is wrong with them.

use super::{Files, assert_complains, file, golden, names, program, raw, report, run, text};
use serde_json::{Value, json};
use std::{fs, path::PathBuf};

const A: (&str, &[f32]) = ("layer.2.weight", &[1.0, 2.0, -3.0]);
const B: (&str, &[f32]) = ("layer.10.weight", &[0.5, 0.0]);
const C: (&str, &[f32]) = ("head", &[f32::NAN, 7.0]);

/// A report without the name of its file.
fn anonymous(path: &PathBuf) -> Value {
    let mut report = report(run!["inspect", "--json", path]);
    report["steps"][0]["file"].take();
    report
}

/// An index of shards.
fn index(files: &Files, name: &str, tensors: &[(&str, &str)]) -> PathBuf {
    let map: serde_json::Map<String, Value> =
        tensors.iter().map(|&(tensor, shard)| (tensor.to_owned(), shard.into())).collect();
    files.write(name, json!({"metadata": {"total_size": 28}, "weight_map": map}).to_string().as_bytes())
}

#[test]
fn shards_are_one_step() {
    let files = Files::new();
    let whole = files.write("whole", &file(&[A, B, C], 0));
    let shards =
        [files.write("step/1-of-2.safetensors", &file(&[C, A], 1)), files.write("step/2.safetensors", &file(&[B], 0))];
    let folder = files.path("step");
    assert_eq!(anonymous(&folder), anonymous(&whole));
    let map = [(A.0, "1-of-2.safetensors"), (B.0, "2.safetensors"), (C.0, "1-of-2.safetensors")];
    let index = index(&files, "step/model.safetensors.index.json", &map);
    // Nor is a file beside them that the index does not name a shard.
    files.write("step/other.safetensors", b"no shard");
    for step in [&folder, &index] {
        assert_eq!(anonymous(step), anonymous(&whole));
        assert!(text(run!["inspect", step]).starts_with(&format!("{}\n", step.display())));
        // Two steps, and the weights.
        let found = report(run!["inspect", "--json", step, whole, "--params", step]);
        assert_eq!(
            (found["gsnr"].as_array().unwrap().len(), &found["steps"][1]["tensors"][1]["ratio"]),
            (3, &json!(1.0))
        );
    }
    let (out, clipped) = (files.path("out"), files.path("clipped"));
    text(run!["inspect", whole, "--clip-norm", "1", "--out", clipped]);
    text(run!["inspect", folder, "--clip-norm", "1", "--out", out]);
    assert_eq!(anonymous(&out), anonymous(&clipped.join("whole")));
    for source in shards.iter().chain([&index]) {
        let copy = out.join(source.file_name().unwrap());
        // A step with a NaN is not clipped.
        assert_eq!(fs::read(source).unwrap(), fs::read(copy).unwrap());
    }
    assert!(!out.join("other.safetensors").exists());
    assert_complains(run!["inspect", folder, "--clip-norm", "1", "--out", folder], 1, &["would replace an input"]);
}

#[test]
fn shards_that_are_wrong_are_named() {
    let files = Files::new();
    files.write("empty/notes.txt", b"nothing");
    assert_complains(run!["inspect", files.path("empty")], 1, &["empty: ", "*.safetensors"]);
    assert_complains(run!["inspect", files.path("nowhere.index.json")], 1, &["nowhere.index.json: "]);
    let bad = files.write("bad.index.json", b"{\"weight_map\": [1]}");
    assert_complains(run!["inspect", bad], 1, &["bad.index.json: malformed index"]);
    files.write("one.safetensors", &file(&[A], 0));
    files.write("two.safetensors", &file(&[A, B], 0));
    let missing = index(&files, "missing.index.json", &[(A.0, "one.safetensors"), (B.0, "three.safetensors")]);
    assert_complains(run!["inspect", missing], 1, &["missing.index.json: names the shard", "three.safetensors"]);
    let elsewhere = index(&files, "elsewhere.index.json", &[(A.0, "one.safetensors"), (C.0, "one.safetensors")]);
    assert_complains(run!["inspect", elsewhere], 1, &["one.safetensors: tensor \"head\": is missing here"]);
    let twice = index(&files, "twice.index.json", &[(A.0, "one.safetensors"), (B.0, "two.safetensors")]);
    assert_complains(
        run!["inspect", twice],
        1,
        &["two.safetensors: tensor \"layer.2.weight\"", "one.safetensors as well"],
    );
    let several = files.0.path();
    assert_complains(run!["inspect", several], 1, &["several indices"]);
}

#[test]
fn files_of_pytorch_are_read() {
    let files = Files::new();
    let bias: Vec<u8> = [0.0f32, -2.0].iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let weight: Vec<u8> = [1.0f32, 4.0, 2.0, 5.0, 3.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let header = json!({
        "layers.0.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
        "layers.0.bias": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
        "layers.1.num_batches_tracked": {"dtype": "I64", "shape": [], "data_offsets": [28, 36]},
    });
    let same = files.write("same", &raw(&header.to_string(), &[weight, bias, vec![7; 8]].concat()));
    let golden = |name: &str| golden(name).with_extension("pt");
    for name in ["state", "checkpoint"] {
        assert_eq!(anonymous(&golden(name)), anonymous(&same), "{name}");
        // The data of the first is that of the second, element by element.
        let compared = report(run!["compare", "--json", golden(name), same]);
        assert_eq!((&compared["total"]["count"], &compared["total"]["difference"]), (&json!(8), &json!(0.0)));
        let clip = run!["inspect", golden(name), "--clip-norm", "1", "--out", files.path("out")];
        assert_complains(clip, 1, &[name, "safetensors files alone"]);
        assert_complains(run!["inspect", "--strict", golden(name)], 1, &["num_batches_tracked\": dtype I64 is not"]);
    }
    assert!(!files.path("out").exists());
    let whole = fs::read(golden("state")).unwrap();
    for cut in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        assert_complains(run!["inspect", files.write("cut.pt", &whole[..cut])], 1, &["cut.pt: "]);
    }
    assert_complains(run!["inspect", files.write("text.bin", b"neither of both")], 1, &["text.bin: "]);
    text(run!["inspect", files.write("safe.bin", &file(&[A], 0))]);
}

#[test]
fn tensors_of_other_types_are_left_out_and_named() {
    let files = Files::new();
    let header = json!({
        "steps": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        "double\n": {"dtype": "F64", "shape": [], "data_offsets": [16, 24]},
    });
    let data = [&[1; 8][..], &3f32.to_le_bytes(), &4f32.to_le_bytes(), &[2; 8]].concat();
    let path = files.write("step", &raw(&header.to_string(), &data));
    assert!(text(run!["inspect", path]).contains("\nleft out: double\\n (F64), steps (I64)\n"));
    let found = report(run!["inspect", "--json", path]);
    assert_eq!((names(&found["steps"][0]["tensors"]), &found["steps"][0]["total_norm"]), (vec!["a"], &json!(5.0)));
    let left_out = json!([{"name": "double\n", "dtype": "F64"}, {"name": "steps", "dtype": "I64"}]);
    assert_eq!(found["steps"][0]["left_out"], left_out);
    assert_complains(run!["inspect", "--strict", path], 1, &["is not one of F32, F16, BF16"]);
    // They stay in copies.
    text(run!["inspect", path, "--clip-norm", "2.5", "--out", files.path("out")]);
    let (before, after) = (fs::read(&path).unwrap(), fs::read(files.path("out/step")).unwrap());
    let place = before.len() - 16;
    assert_eq!((&before[..place], &before[place + 8..]), (&after[..place], &after[place + 8..]));
    assert_ne!(before[place..place + 8], after[place..place + 8]);
    let compared = text(run!["compare", path, path]);
    assert!(compared.ends_with("left out of B: double\\n (F64), steps (I64)\n"), "{compared}");
}

/// A file that takes no room on the disk, of twice the memory that the run may have of its own.
#[test]
#[cfg(target_os = "linux")]
fn a_file_is_measured_where_it_is() {
    let files = Files::new();
    let names: Vec<String> = (0..8).map(|tensor| format!("t{tensor}")).collect();
    let size = 32usize << 20;
    let mut header = json!({});
    for (place, name) in names.iter().enumerate() {
        header[name] = json!({"dtype": "F32", "shape": [size / 4], "data_offsets": [place * size, (place + 1) * size]});
    }
    let header = header.to_string();
    let header = format!("{header:width$}", width = header.len().next_multiple_of(8));
    let path = files.write("large", &raw(&header, &[]));
    let length = 8 + header.len() + 8 * size;
    fs::File::options().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
    let run = program(["inspect", "--json", "--clip-norm", "1", "--out"]);
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", r#"ulimit -d 131072; exec "$0" "$@""#]).arg(run.get_program()).args(run.get_args());
    // Threads have memory of their own.
    limited.args([&files.path("out"), &path]).env("RAYON_NUM_THREADS", "1");
    let found = report(limited.output().unwrap());
    assert_eq!(found["steps"][0]["tensors"][7]["zero_count"], size / 4);
    assert_eq!(fs::metadata(files.path("out/large")).unwrap().len(), length as u64);
}
