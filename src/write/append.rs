//! Files that grow by whole records, also when a disk fills up.

use super::file::unwritable;
use crate::Error;
use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::PathBuf,
};

/// A file that grows by whole records.
#[derive(Debug)]
pub(super) struct Appender {
    path: PathBuf,
    file: File,
    /// Up to here every record is whole.
    length: u64,
}

impl Appender {
    /// A file of lines, made or continued. What it holds must begin with `beginning`: appending to the wrong file would
    /// ruin it. The rest of a line that a crash has cut off is removed.
    #[cfg(any(feature = "json", feature = "csv"))]
    pub fn lines(path: PathBuf, beginning: &[u8]) -> Result<Self, Error> {
        use std::io::Read;

        let opened = || -> std::io::Result<(File, u64)> {
            let mut file = File::options().create(true).read(true).write(true).truncate(false).open(&path)?;
            let mut found = Vec::new();
            // No more than its length: some devices have no end.
            let compared = file.metadata()?.len().min(beginning.len() as u64);
            Read::by_ref(&mut file).take(compared).read_to_end(&mut found)?;
            if !beginning.starts_with(&found) {
                return Err(std::io::Error::other("holds something else, which is left as it is"));
            }
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
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Adds one record, which is there whole or not at all.
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
#[cfg(any(feature = "json", feature = "csv"))]
fn after_last_newline(file: &mut File) -> std::io::Result<u64> {
    use std::io::Read;

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
