//! Files that hold whole records at any moment, also after a disk was full.

use crate::Error;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

/// What went wrong with a file or folder.
pub(super) fn unwritable(path: &Path, reason: impl ToString) -> Error {
    Error::Unwritable { path: path.to_owned(), reason: reason.to_string() }
}

/// Puts a file there in one step: a reader sees the old content or the new, never a part.
pub(super) fn replace(path: &Path, content: &[u8]) -> Result<(), Error> {
    // Beside it, as a rename does not cross file systems; and with another ending, so that no collector reads it. Not
    // `tempfile`, whose files are for their owner's eyes only: Prometheus' collector runs as another user.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().ok_or_else(|| unwritable(path, "not the name of a file"))?.to_owned();
    name.push(format!(".{}-{}.tmp", process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let temporary = path.with_file_name(name);
    let written = fs::write(&temporary, content).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| {
        // It may never have been there.
        let _ = fs::remove_file(&temporary);
        unwritable(path, error)
    })
}

/// A folder, made if it is not there.
pub(super) fn folder(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|error| unwritable(path, error))
}

/// Fails where [`replace`] would, without leaving anything.
pub(super) fn check_folder_of(path: &Path) -> Result<(), Error> {
    let probe = path.with_extension(format!("{}.tmp", process::id()));
    if path.is_dir() {
        return Err(unwritable(path, "is a directory"));
    }
    File::create(&probe).and_then(|_| fs::remove_file(&probe)).map_err(|error| unwritable(path, error))
}

/// A file that grows by whole records.
#[derive(Debug)]
pub(super) struct Appender {
    path: PathBuf,
    file: File,
    /// Up to here every record is whole.
    length: u64,
}

impl Appender {
    /// A file of lines, made or continued. The rest of a line that a crash has cut off is removed.
    pub fn lines(path: PathBuf) -> Result<Self, Error> {
        let opened = || -> io::Result<(File, u64)> {
            let mut file = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(&path)?;
            let length = after_last_newline(&mut file)?;
            // Not of a device, which has no length.
            if file.metadata()?.len() != length {
                file.set_len(length)?;
            }
            file.seek(SeekFrom::End(0))?;
            Ok((file, length))
        };
        let (file, length) = opened().map_err(|error| unwritable(&path, error))?;
        Ok(Self { path, file, length })
    }

    /// A file that must not be there yet.
    #[cfg(feature = "tensorboard")]
    pub fn create_new(path: PathBuf) -> Result<Self, Error> {
        let file = File::create_new(&path).map_err(|error| unwritable(&path, error))?;
        Ok(Self { path, file, length: 0 })
    }

    /// Whether there is nothing in it.
    #[cfg(feature = "csv")]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Where it is.
    #[cfg(feature = "tensorboard")]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds one record, which is there whole or not at all.
    #[cfg(any(feature = "json", feature = "csv", feature = "tensorboard"))]
    pub fn append(&mut self, record: &[u8]) -> Result<(), Error> {
        if let Err(error) = self.file.write_all(record) {
            // If even that fails, what is there stays as it is; the first error is the one to tell.
            let _ = self.file.set_len(self.length).and_then(|()| self.file.seek(SeekFrom::Start(self.length)));
            return Err(unwritable(&self.path, error));
        }
        self.length += record.len() as u64;
        Ok(())
    }
}

/// The place after the last newline, read from the end.
fn after_last_newline(file: &mut File) -> io::Result<u64> {
    const BLOCK: u64 = 4096;
    let mut end = file.metadata()?.len();
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        Read::by_ref(file).take(end - start).read_to_end(&mut block)?;
        if let Some(place) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + place as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}
