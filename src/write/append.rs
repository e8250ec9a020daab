//! Files that grow by whole entries, even when a disk fills up, and by rising steps.

use super::file::unwritable;
use crate::Error;
use std::{
    fs::{File, Metadata},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Opens or makes the file and reads its end. Cuts off the part of an entry that a crash has left.
type Open = fn(&Path) -> io::Result<Opened>;

/// An opened file.
pub(super) struct Opened {
    pub file: File,
    /// The last step in it.
    pub last: Option<u64>,
    /// The rows of the last step, where an entry takes several rows.
    pub rows: Option<Rows>,
}

/// The rows of the last step in the file.
#[derive(Debug)]
pub(super) struct Rows {
    /// Offset of the first.
    pub start: u64,
    pub count: usize,
    /// The step before.
    pub before: Option<u64>,
}

/// A file that grows by whole entries.
#[derive(Debug)]
pub(super) struct Appender {
    path: PathBuf,
    open: Open,
    file: File,
    last: Option<u64>,
    rows: Option<Rows>,
    /// Offset of a partial entry that could not be removed yet.
    torn: Option<u64>,
}

impl Appender {
    /// # Errors
    /// [`Error::Unwritable`].
    pub fn new(path: PathBuf, open: Open) -> Result<Self, Error> {
        let Opened { file, last, rows } = open(&path).map_err(|error| unwritable(&path, error))?;
        Ok(Self { path, open, file, last, rows, torn: None })
    }

    /// The last step in it.
    pub fn last(&self) -> Option<(&Path, u64)> {
        Some((&self.path, self.last?))
    }

    /// Where it is.
    #[cfg(feature = "tensorboard")]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Goes on after this step, which another file of the run holds.
    #[cfg(feature = "tensorboard")]
    pub fn go_on_after(&mut self, last: Option<u64>) {
        self.last = last;
    }

    /// Adds the entry of a step, of so many rows, whole or not at all.
    ///
    /// # Errors
    /// [`Error::StepWritten`], [`Error::Unwritable`].
    pub fn append(&mut self, step: u64, rows: usize, entry: &[u8]) -> Result<(), Error> {
        self.make_ready(rows).map_err(|error| unwritable(&self.path, error))?;
        if let Some(last) = self.last.filter(|&last| step <= last) {
            return Err(Error::StepWritten { path: self.path.clone(), step, last });
        }
        self.write(entry).map_err(|error| unwritable(&self.path, error))?;
        self.last = Some(step);
        Ok(())
    }

    fn make_ready(&mut self, rows: usize) -> io::Result<()> {
        if is_removed(&self.file.metadata()?) {
            let Opened { file, last, rows } = (self.open)(&self.path)?;
            (self.file, self.last, self.rows, self.torn) = (file, last, rows, None);
        }
        if let Some(end) = self.torn {
            cut(&self.file, end)?;
            self.torn = None;
        }
        // The full number of rows is known only now.
        if let Some(found) = self.rows.take_if(|found| found.count < rows) {
            cut(&self.file, found.start)?;
            self.last = found.before;
        }
        Ok(())
    }

    fn write(&mut self, entry: &[u8]) -> io::Result<()> {
        let end = self.file.seek(SeekFrom::End(0))?;
        self.file.write_all(entry).inspect_err(|_| {
            // At once, for readers; if that fails, before the next entry.
            self.torn = cut(&self.file, end).is_err().then_some(end);
        })
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        // Closing it is not enough: a process that another thread is just starting holds a copy until it runs.
        let _ = self.file.unlock();
    }
}

/// Cuts the file at `end`. A device has no length, and nothing to cut.
pub(super) fn cut(file: &File, end: u64) -> io::Result<()> {
    if file.metadata()?.len() > end { file.set_len(end) } else { Ok(()) }
}

/// Whether an open file has no name any more: writes to it are lost.
fn is_removed(metadata: &Metadata) -> bool {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::nlink(metadata) == 0;
    #[cfg(not(unix))]
    false
}

/// Opens a file to be continued, or makes it. Its content must begin with `beginning`: appending to the wrong file
/// would ruin it. Two writers at one time are refused: each would overwrite the other's entries.
#[cfg(any(feature = "json", feature = "csv"))]
pub(super) fn continued(path: &Path, beginning: &[u8]) -> io::Result<File> {
    use std::io::Read;

    let mut file = File::options().create(true).read(true).write(true).truncate(false).open(path)?;
    let metadata = file.metadata()?;
    // On other systems a lock keeps readers out as well; some file systems have none.
    if cfg!(unix) && metadata.is_file() && matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock)) {
        return Err(io::Error::other("is being written by another"));
    }
    let mut found = Vec::new();
    // No more than its length: some devices have no end.
    let compared = metadata.len().min(beginning.len() as u64);
    Read::by_ref(&mut file).take(compared).read_to_end(&mut found)?;
    if beginning.starts_with(&found) { Ok(file) } else { Err(something_else()) }
}

#[cfg(any(feature = "json", feature = "csv"))]
pub(super) fn something_else() -> io::Error {
    io::Error::other("holds something else, which is left as it is")
}
