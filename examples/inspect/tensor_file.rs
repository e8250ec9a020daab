//! A safetensors file of which some tensors, or all, are to be read.

use crate::{
    elements::Elements,
    failure::Failure,
    header::{self, Entry},
};
use gradprobe::Plan;
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// An open file whose header is valid and whose data is still to be read.
pub struct TensorFile {
    pub path: PathBuf,
    file: File,
    /// Everything in front of the data.
    pub head: Vec<u8>,
    /// The tensors to be read, in natural order of their names.
    pub entries: Vec<Entry>,
}

impl TensorFile {
    /// Opens a file and checks its header, and in it the `wanted` tensors.
    pub fn open(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<Self, Failure> {
        let fail = |error: io::Error| Failure::file(path, error);
        // Before opening: to open a pipe is to wait for a writer.
        if !fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Failure::file(path, "not a regular file"));
        }
        let mut file = File::open(path).map_err(fail)?;
        let size = file.metadata().map_err(fail)?.len();
        let (head, entries) = header::read(path, &mut file, size, wanted)?;
        Ok(Self { path: path.to_owned(), file, head, entries })
    }

    /// A plan to measure the tensors by.
    pub fn plan(&self) -> Result<Plan, Failure> {
        let plan = Plan::new(self.entries.iter().map(|t| (t.name.as_str(), t.dtype, t.len)));
        let shapes = self.entries.iter().map(|t| t.shape.as_slice());
        plan.and_then(|plan| plan.with_shapes(shapes)).map_err(|error| Failure::file(&self.path, error))
    }

    /// Memory to read the tensors into.
    pub fn room(&self) -> Result<Vec<Elements>, Failure> {
        let zeros =
            |t: &Entry| Elements::zeros(t.dtype, t.len).map_err(|error| Failure::tensor(&self.path, &t.name, error));
        self.entries.iter().map(zeros).collect()
    }

    /// Reads the data into `tensors`, which are in natural order. Says before each that this file is being read.
    pub fn read(&mut self, tensors: &mut [Elements], mut progress: impl FnMut(&Path)) -> Result<(), Failure> {
        for index in self.file_order() {
            progress(&self.path);
            let entry = &self.entries[index];
            let start = SeekFrom::Start((self.head.len() + entry.start) as u64);
            let read =
                self.file.seek(start).and_then(|_| self.file.read_exact(tensors[index].view_mut().as_bytes_mut()));
            read.map_err(|error| Failure::tensor(&self.path, &entry.name, error))?;
        }
        Ok(())
    }

    /// The tensors as their data lies in the file.
    pub fn file_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        // An empty tensor begins where the next one does; which of the two comes first changes nothing.
        order.sort_by_key(|&index| self.entries[index].start);
        order
    }
}
