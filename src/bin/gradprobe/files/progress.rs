//! The progress of a long run that reads its files, for a person at a terminal.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    time::{Duration, Instant},
};

/// Runs that end within this time show nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// A line on standard error that is overwritten, and removed in the end.
pub struct Progress {
    began: Instant,
    terminal: bool,
    total: usize,
    shown: Option<usize>,
}

impl Progress {
    /// Starts with this many files.
    pub fn new(total: usize) -> Self {
        Self { began: Instant::now(), terminal: io::stderr().is_terminal(), total, shown: None }
    }

    /// Shows that file `index` is being read. May be called often.
    pub fn reading(&mut self, index: usize, file: &Path) {
        if self.terminal && self.shown != Some(index) && self.began.elapsed() > PATIENCE {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            // Cut, as a carriage return does not clear a line that wraps.
            let name: String = name.chars().filter(|c| !c.is_control()).take(50).collect();
            self.write(&format!("reading {}/{} {name}…", index + 1, self.total));
            self.shown = Some(index);
        }
    }

    /// Removes the line, so that something else can be printed.
    pub fn clear(&mut self) {
        if self.shown.take().is_some() {
            self.write("");
        }
    }

    /// A lost terminal is no reason to stop.
    fn write(&self, text: &str) {
        let mut stderr = io::stderr();
        let _ = write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
