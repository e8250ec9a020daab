//! The errors of the program. A message names the file, and the tensor or the line where one is at fault.

use std::{
    fmt::Display,
    io,
    path::{Path, PathBuf},
};

/// Ends the program early, with one line on standard error.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A file, or a directory, is at fault.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// A tensor of a file is at fault.
    #[error("{}: tensor {name:?}: {reason}", path.display())]
    Tensor { path: PathBuf, name: String, reason: String },
    /// A line of a file is at fault, counted from 1.
    #[error("{}: line {line}: {reason}", path.display())]
    Line { path: PathBuf, line: u64, reason: String },
    /// Two inputs do not go together.
    #[error("{0}")]
    Mismatch(String),
    /// The device could not be opened.
    #[error(transparent)]
    Probe(#[from] gradprobe::Error),
    /// There are too many files to compare with each other.
    #[error("signal and noise across the files, which one file alone would not need: {0}")]
    Tracking(gradprobe::Error),
    /// The report could not be written.
    #[error("standard output: {0}")]
    Output(io::Error),
}

impl Failure {
    /// Makes the error of a whole file.
    pub fn file(path: &Path, reason: impl Display) -> Self {
        Self::File { path: path.to_owned(), reason: reason.to_string() }
    }

    /// Makes the error of a tensor of this file.
    pub fn tensor(path: &Path, name: &str, reason: impl Display) -> Self {
        Self::Tensor { path: path.to_owned(), name: name.to_owned(), reason: reason.to_string() }
    }

    /// Makes the error of a line of this file.
    pub fn line(path: &Path, line: u64, reason: impl Display) -> Self {
        Self::Line { path: path.to_owned(), line, reason: reason.to_string() }
    }

    /// Whether the reader of standard output has left, which needs no message.
    pub fn reader_left(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}
