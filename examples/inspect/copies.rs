//! The directory of the clipped copies: never over a file that is read, never half a file.

use crate::{elements::Elements, failure::Failure, gradients::Gradients};
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
};

/// A directory into which every input can be copied.
pub struct Copies<'a> {
    directory: &'a Path,
}

impl<'a> Copies<'a> {
    /// Makes the directory, unless a copy would replace another copy, an input or the file of the weights.
    pub fn prepare(directory: &'a Path, inputs: &[PathBuf], weights: Option<&PathBuf>) -> Result<Self, Failure> {
        refuse_overwriting(directory, inputs, weights)?;
        fs::create_dir_all(directory).map_err(|error| Failure::file(directory, error))?;
        // Again: until it was made, a path like `new/../inputs` could not be resolved.
        refuse_overwriting(directory, inputs, weights)?;
        Ok(Self { directory })
    }

    /// Writes a copy under the name of `input`. It appears there whole or not at all.
    pub fn write(&self, input: &Path, step: &Gradients, tensors: &[Elements]) -> Result<(), Failure> {
        let target = self.directory.join(input.file_name().unwrap_or_default());
        let fail = |error: std::io::Error| Failure::file(&target, error);
        // Made by `File::create_new` for the permissions of an ordinary file; removed when dropped.
        let temporary =
            tempfile::Builder::new().prefix(".inspect-").make_in(self.directory, |path| File::create_new(path));
        let temporary = temporary.map_err(fail)?;
        step.write(tensors, BufWriter::new(temporary.as_file())).map_err(fail)?;
        temporary.persist(&target).map_err(|error| fail(error.error))?;
        Ok(())
    }
}

fn refuse_overwriting(directory: &Path, inputs: &[PathBuf], weights: Option<&PathBuf>) -> Result<(), Failure> {
    let mut names = HashMap::new();
    for input in inputs {
        if let Some(other) = names.insert(input.file_name(), input) {
            let reason = format!("has the file name of {}; their copies would be one file", other.display());
            return Err(Failure::file(input, reason));
        }
    }
    // Two paths an input has: where its data is, and the entry by which it was found, which may be a link.
    let mut occupied = HashSet::new();
    for input in inputs.iter().chain(weights) {
        let fail = |error: std::io::Error| Failure::file(input, error);
        let name = input.file_name().unwrap_or_default();
        let parent = input.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        occupied.insert(parent.canonicalize().map_err(fail)?.join(name));
        occupied.insert(input.canonicalize().map_err(fail)?);
    }
    // A directory that is not there yet holds no input.
    let Ok(directory) = directory.canonicalize() else { return Ok(()) };
    for input in inputs {
        let target = directory.join(input.file_name().unwrap_or_default());
        let resolved = target.canonicalize().unwrap_or_else(|_| target.clone());
        if occupied.contains(&target) || occupied.contains(&resolved) {
            return Err(Failure::file(&target, "the clipped copy would replace an input"));
        }
    }
    Ok(())
}
