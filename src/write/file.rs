//! Files that are replaced in one piece.

use crate::Error;
use std::{
    fs::{self, File},
    path::Path,
    process,
    sync::atomic::{AtomicU64, Ordering},
};

/// Makes the error of a file or folder.
pub(crate) fn unwritable(path: &Path, reason: impl ToString) -> Error {
    Error::Unwritable { path: path.to_owned(), reason: reason.to_string() }
}

/// Replaces a file in one step: a reader sees the old content or the new, never a part.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), Error> {
    // Beside it, as a rename does not cross file systems; and with another ending, so that no collector reads it. Not
    // `tempfile`: only the owner may read its files, and Prometheus' collector runs as another user.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().ok_or_else(|| unwritable(path, "not the name of a file"))?.to_owned();
    name.push(format!(".{}-{}.tmp", process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let temporary = path.with_file_name(name);
    let written = fs::write(&temporary, content).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| {
        // It may not exist.
        let _ = fs::remove_file(&temporary);
        unwritable(path, error)
    })
}

/// Makes a folder if it is missing.
#[cfg(any(feature = "json", feature = "tensorboard", feature = "charts"))]
pub(crate) fn folder(path: &Path) -> Result<(), Error> {
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
