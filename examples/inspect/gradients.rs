//! The gradients of one step in a safetensors file: compared with another step's, written with other values.

use crate::{elements::Elements, failure::Failure, header::Entry, natural, tensor_file::TensorFile};
use std::{
    io::{self, Write},
    path::Path,
};

/// An open file of which every tensor is a gradient.
pub struct Gradients {
    pub tensors: TensorFile,
}

impl Gradients {
    /// Opens a file and checks its header.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        Ok(Self { tensors: TensorFile::open(path, |_| true)? })
    }

    /// Fails unless the tensors are those of `first` in name, dtype and length.
    pub fn require_same(&self, first: &Gradients) -> Result<(), Failure> {
        let reference = first.tensors.path.display();
        for index in 0..self.tensors.entries.len().max(first.tensors.entries.len()) {
            let (own, others) = (self.tensors.entries.get(index), first.tensors.entries.get(index));
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
            return Err(Failure::tensor(&self.tensors.path, name, reason));
        }
        Ok(())
    }

    /// Writes what the file was, with `tensors` in the places of their data.
    pub fn write(&self, tensors: &[Elements], mut writer: impl Write) -> io::Result<()> {
        writer.write_all(&self.tensors.head)?;
        // Nothing lies between them: that is part of a valid header.
        for index in self.tensors.file_order() {
            writer.write_all(tensors[index].view().as_bytes())?;
        }
        writer.flush()
    }
}
