//! The public API is what the text files beside this one say, one line an item: a change of it is seen in a diff.
//! `UPDATE_SNAPSHOTS=1` writes them.
#![cfg(unix)]

#[path = "../../tests/require/mod.rs"]
mod require;

use public_api::Builder;
use serde_json::Value;
use std::{collections::HashSet, fs, path::Path, process::Command, sync::LazyLock};

/// Rustdoc's JSON of this format is understood, and the files were written from it. Others may say the same in other words.
const FORMAT: u64 = 57;

/// One run of cargo for all, with the features of the step before it in CI: it then builds nothing but documentation.
static DOCUMENTED: LazyLock<Result<(), String>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(folder).args(["doc", "--no-deps", "--features=writers,nccl,checkpoint"]);
    cargo.args(["-p=gradprobe", "-p=gradprobe-candle", "-p=gradprobe-burn"]);
    cargo.env("RUSTDOC", folder.join("rustdoc"));
    cargo.env("RUSTDOCFLAGS", "-Zunstable-options --output-format=json --document-hidden-items");
    let output = cargo.output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
});

fn check(package: &str) {
    DOCUMENTED.as_ref().unwrap_or_else(|error| panic!("{error}"));
    let name = package.replace('-', "_");
    let written = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("doc").join(name).with_extension("json");
    let mut json: Value = serde_json::from_slice(&fs::read(written).unwrap()).unwrap();
    if json["format_version"] != FORMAT {
        let why = format!("rustdoc writes format {}, and {FORMAT} is compared", json["format_version"]);
        return require::skipped(require::RUSTDOC, &why);
    }
    shorten(json["index"].as_object_mut().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let shortened = folder.path().join("api.json");
    fs::write(&shortened, json.to_string()).unwrap();
    let api = Builder::from_rustdoc_json(shortened).omit_auto_trait_impls(true).omit_blanket_impls(true);
    let api = api.include_function_parameter_names(true).build().unwrap();
    api.assert_eq_or_update(Path::new(env!("CARGO_MANIFEST_DIR")).join(package).with_extension("txt"));
}

/// Leaves out the methods of implementations of traits, which the traits have, and what is hidden. Rustdoc, asked to leave that
/// out, also drops what is exported from a hidden module: `Cpu` and `Cuda`.
fn shorten(index: &mut serde_json::Map<String, Value>) {
    let of_traits = index.values().map(|item| &item["inner"]["impl"]).filter(|it| it["trait"].is_object());
    let methods: HashSet<Value> = of_traits.flat_map(|it| it["items"].as_array().unwrap()).cloned().collect();
    index.retain(|_, item| {
        let is_hidden = item["attrs"].as_array().unwrap().iter().any(|it| it["other"] == "#[doc(hidden)]");
        let is_method = item["inner"]["function"].is_object() && methods.contains(&item["id"]);
        !is_hidden && !is_method
    });
}

#[test]
fn of_gradprobe() {
    check("gradprobe");
}

#[test]
fn of_the_adapter_for_candle() {
    check("gradprobe-candle");
}

#[test]
fn of_the_adapter_for_burn() {
    check("gradprobe-burn");
}
