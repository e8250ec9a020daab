//! The gradients of one step in a safetensors file: looked at, compared with another step's, read.

use crate::{
    elements::Elements,
    failure::Failure,
    header::{self, Entry},
    natural,
};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// An open file whose header is valid and whose data is still to be read.
pub struct Gradients {
    path: PathBuf,
    file: File,
    /// Everything in front of the data.
    head: Vec<u8>,
    /// The tensors in natural order of their names.
    entries: Vec<Entry>,
}

impl Gradients {
    /// Opens a file and checks its header.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let fail = |error: io::Error| Failure::file(path, error);
        // Before opening: to open a pipe is to wait for a writer.
        if !fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Failure::file(path, "not a regular file"));
        }
        let mut file = File::open(path).map_err(fail)?;
        let size = file.metadata().map_err(fail)?.len();
        let (head, entries) = header::read(path, &mut file, size)?;
        Ok(Self { path: path.to_owned(), file, head, entries })
    }

    /// The tensors in natural order of their names.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Fails unless the tensors are those of `first` in name, dtype and length.
    pub fn require_same(&self, first: &Gradients) -> Result<(), Failure> {
        let reference = first.path.display();
        for index in 0..self.entries.len().max(first.entries.len()) {
            let (own, others) = (self.entries.get(index), first.entries.get(index));
            // At the first difference of two sorted lists, the name that comes first is the one the other list lacks.
            let (name, reason) = match (own, others) {
                (Some(own), Some(others)) if own.name == others.name => {
                    if (own.dtype, own.len) == (others.dtype, others.len) {
                        continue;
                    }
                    let count = |entry: &Entry| format!("{} {} elements", entry.len, entry.dtype);
                    (&own.name, format!("{} here, {} in {reference}", count(own), count(others)))
                }
                (Some(own), others)
                    if others.is_none_or(|others| natural::compare(&own.name, &others.name).is_lt()) =>
                {
                    (&own.name, format!("is not in {reference}"))
                }
                (_, Some(others)) => (&others.name, format!("is missing here, but is in {reference}")),
                _ => continue,
            };
            return Err(Failure::tensor(&self.path, name, reason));
        }
        Ok(())
    }

    /// Reads all the data into `tensors`, which are in natural order. To be called once.
    pub fn read(&mut self, tensors: &mut [Elements], mut progress: impl FnMut()) -> Result<(), Failure> {
        for index in self.file_order() {
            progress();
            let read = self.file.read_exact(tensors[index].view_mut().as_bytes_mut());
            read.map_err(|error| Failure::tensor(&self.path, &self.entries[index].name, error))?;
        }
        Ok(())
    }

    /// Writes what the file was, with `tensors` in the places of their data.
    pub fn write(&self, tensors: &[Elements], mut writer: impl Write) -> io::Result<()> {
        writer.write_all(&self.head)?;
        for index in self.file_order() {
            writer.write_all(tensors[index].view().as_bytes())?;
        }
        writer.flush()
    }

    /// The tensors as their data lies in the file, where nothing is between them: that is part of a valid header.
    fn file_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        // An empty tensor begins where the next one does; which of the two comes first changes nothing.
        order.sort_by_key(|&index| self.entries[index].start);
        order
    }
}
