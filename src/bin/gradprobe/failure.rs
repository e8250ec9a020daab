//! Errors. A message names the file, and the line where one is at fault.

use std::{fmt::Display, path::Path};

/// Why the program ends early: one line for standard error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(String);

impl Failure {
    /// Two runs, or the options, do not go together.
    pub fn new(reason: impl Display) -> Self {
        Self(reason.to_string())
    }

    /// A file or folder is at fault.
    pub fn file(path: &Path, reason: impl Display) -> Self {
        Self(format!("{}: {reason}", path.display()))
    }

    /// A line of a file is at fault, counted from 1.
    pub fn line(path: &Path, line: u64, reason: impl Display) -> Self {
        Self(format!("{}: line {line}: {reason}", path.display()))
    }
}

impl From<gradprobe::Error> for Failure {
    fn from(error: gradprobe::Error) -> Self {
        Self::new(error)
    }
}
