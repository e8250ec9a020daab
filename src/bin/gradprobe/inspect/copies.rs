//! The directory of the clipped copies: a copy never replaces an input, replaces another file only by `--force`, and is
//! never partial.

use crate::files::{Failure, TensorFile};
use gradprobe::{Absent, Probe, TensorMut};
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
};

/// A directory into which every file of the steps can be copied.
pub struct Copies<'a> {
    directory: &'a Path,
    force: bool,
}

impl<'a> Copies<'a> {
    /// Makes the directory, unless a copy would replace another copy, an input or one of the `weights`, or, without `force`,
    /// any file.
    pub fn prepare(directory: &'a Path, inputs: &[PathBuf], weights: &[PathBuf], force: bool) -> Result<Self, Failure> {
        refuse_overwriting(directory, inputs, weights, force)?;
        fs::create_dir_all(directory).map_err(|error| Failure::file(directory, error))?;
        // Again: before it existed, a path like `new/../inputs` could not be resolved.
        refuse_overwriting(directory, inputs, weights, force)?;
        Ok(Self { directory, force })
    }

    /// Writes copies of the step's files, each under its own name, clipped as `probe` has decided. Each appears whole
    /// or not at all. One tensor at a time is in memory.
    pub fn write(&self, step: &TensorFile, probe: &mut Probe) -> Result<(), Failure> {
        for (part, path) in step.files().enumerate() {
            let target = self.directory.join(path.file_name().unwrap_or_default());
            let fail = |error: std::io::Error| Failure::file(&target, error);
            // Made by `File::create_new` for the permissions of an ordinary file; removed when dropped.
            let temporary =
                tempfile::Builder::new().prefix(".inspect-").make_in(self.directory, |path| File::create_new(path));
            let temporary = temporary.map_err(fail)?;
            step.copy(part, BufWriter::new(temporary.as_file()), |index, elements| {
                let mut view = elements.view_mut();
                // An empty tensor needs no clip, and a call without any element is refused.
                if view.as_ref().is_empty() {
                    return Ok(());
                }
                let mut absent = vec![Absent; step.entries.len()];
                let mut tensors: Vec<&mut dyn TensorMut> = absent.iter_mut().map(|tensor| tensor as _).collect();
                tensors[index] = &mut view;
                probe.clip(&mut tensors)
            })?;
            let persisted = if self.force { temporary.persist(&target) } else { temporary.persist_noclobber(&target) };
            persisted.map_err(|error| fail(error.error))?;
        }
        Ok(())
    }
}

fn refuse_overwriting(directory: &Path, inputs: &[PathBuf], weights: &[PathBuf], force: bool) -> Result<(), Failure> {
    let mut names = HashMap::new();
    for input in inputs {
        if let Some(other) = names.insert(input.file_name(), input) {
            let reason = format!("has the file name of {}; their copies would be one file", other.display());
            return Err(Failure::file(input, reason));
        }
    }
    // An input has two paths: that of its data, and the entry by which it was found, which may be a link.
    let mut occupied = HashSet::new();
    for input in inputs.iter().chain(weights) {
        let fail = |error: std::io::Error| Failure::file(input, error);
        let name = input.file_name().unwrap_or_default();
        let parent = input.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        occupied.insert(parent.canonicalize().map_err(fail)?.join(name));
        occupied.insert(input.canonicalize().map_err(fail)?);
    }
    // A directory that does not exist yet holds no input.
    let Ok(directory) = directory.canonicalize() else { return Ok(()) };
    for input in inputs {
        let target = directory.join(input.file_name().unwrap_or_default());
        let resolved = target.canonicalize().unwrap_or_else(|_| target.clone());
        if occupied.contains(&target) || occupied.contains(&resolved) {
            return Err(Failure::file(&target, "the clipped copy would replace an input"));
        }
        if !force && target.is_file() {
            return Err(Failure::file(&target, "is there already; --force replaces it"));
        }
    }
    Ok(())
}
