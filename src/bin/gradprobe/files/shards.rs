//! Steps in several files: a folder of shards, or an index with the file of each tensor.

use super::{Failure, TensorFile, natural};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
};

/// The files of a step.
#[derive(Debug)]
pub struct Shards {
    pub files: Vec<PathBuf>,
    /// The index, if there is one.
    pub index: Option<PathBuf>,
    /// The file of each tensor, by the index.
    names: BTreeMap<String, PathBuf>,
}

/// The used part of an index.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Whether this is a run, not a file of tensors.
pub fn is_run(path: &Path) -> bool {
    path.join("steps.jsonl").is_file() || path.extension().is_some_and(|extension| extension == "jsonl")
}

/// Gives the files of `path`: itself, or those of an index or a folder.
pub fn of(path: &Path) -> Result<Shards, Failure> {
    let is_index = |path: &Path| path.to_string_lossy().ends_with(".index.json");
    if is_run(path) {
        return Err(Failure::file(path, "is a run: `gradprobe report` and `gradprobe live` show one"));
    }
    if !path.is_dir() {
        if is_index(path) {
            return by_index(path);
        }
        return Ok(Shards { files: vec![path.to_owned()], index: None, names: BTreeMap::new() });
    }
    let fail = |error: io::Error| Failure::file(path, error);
    let entries = fs::read_dir(path).map_err(fail)?.map(|entry| entry.map(|entry| entry.path()));
    let all: Vec<PathBuf> = entries.collect::<io::Result<_>>().map_err(fail)?;
    let of_kind = |is_one: &dyn Fn(&Path) -> bool| {
        let mut files: Vec<PathBuf> = all.iter().filter(|file| is_one(file)).cloned().collect();
        files.sort_by(|a, b| natural::compare(&a.to_string_lossy(), &b.to_string_lossy()));
        files
    };
    let indices = of_kind(&is_index);
    match &indices[..] {
        [index] => return by_index(index),
        [] => {}
        [first, second, ..] => {
            let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let reason = format!("a folder of several indices: {} and {}; name one", name(first), name(second));
            return Err(Failure::file(path, reason));
        }
    }
    let files = of_kind(&|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    if files.is_empty() {
        return Err(Failure::file(path, "not a regular file, nor a folder with shards: it has no *.safetensors"));
    }
    Ok(Shards { files, index: None, names: BTreeMap::new() })
}

fn by_index(path: &Path) -> Result<Shards, Failure> {
    let text = fs::read(path).map_err(|error| Failure::file(path, error))?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|error| Failure::file(path, format!("malformed index: {error}")))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let names: BTreeMap<_, _> = index.weight_map.into_iter().map(|(name, file)| (name, folder.join(file))).collect();
    let files: BTreeSet<&PathBuf> = names.values().collect();
    if let Some(missing) = files.iter().find(|file| !file.is_file()) {
        return Err(Failure::file(path, format!("names the shard {}, which is missing", missing.display())));
    }
    Ok(Shards { files: files.into_iter().cloned().collect(), index: Some(path.to_owned()), names })
}

impl Shards {
    /// Fails unless the `wanted` tensors of the index are in the files that it names.
    pub fn check(&self, step: &TensorFile, wanted: impl Fn(&str) -> bool) -> Result<(), Failure> {
        let found: HashMap<&str, &Path> =
            step.entries.iter().map(|entry| (entry.name.as_str(), step.parts[entry.part].path.as_path())).collect();
        let is_left_out = |name: &str| step.left_out.iter().any(|tensor| tensor.name == name);
        for (name, shard) in self.names.iter().filter(|(name, _)| wanted(name)) {
            if found.get(name.as_str()) != Some(&shard.as_path()) && !is_left_out(name) {
                return Err(Failure::tensor(shard, name, "is missing here, but the index says that it is here"));
            }
        }
        Ok(())
    }
}
