//! The tensors of one step: of a file, or of several that are its shards.

use super::{
    Failure,
    elements::{Elements, Lent, mapped},
    header, natural, pytorch, shards,
};
use gradprobe::Plan;
pub use header::{Entry, LeftOut, OtherTypes};
use memmap2::Mmap;
use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Open files of one step, with valid headers and data that is still to be read.
pub struct TensorFile {
    /// The path on the command line: a file, an index of shards or their folder.
    pub path: PathBuf,
    pub parts: Vec<Part>,
    /// The tensors to be read, in natural order of their names.
    pub entries: Vec<Entry>,
    /// Tensors with types that cannot be measured.
    pub left_out: Vec<LeftOut>,
}

/// One file of a step.
pub struct Part {
    pub path: PathBuf,
    pub data: Data,
}

/// The source of a file's tensors.
pub enum Data {
    /// The file; and its pages, where the system maps them. Otherwise tensors are copied.
    File(File, Option<Mmap>),
    /// Tensors by name.
    PyTorch(HashMap<String, pytorch_reader::Tensor>),
}

impl TensorFile {
    /// Opens a file, an index or a folder of shards, and checks the headers, and in them the `wanted` tensors.
    pub fn open(path: &Path, wanted: impl Fn(&str) -> bool, others: OtherTypes) -> Result<Self, Failure> {
        let shards = shards::of(path)?;
        let mut step = Self { path: path.to_owned(), parts: Vec::new(), entries: Vec::new(), left_out: Vec::new() };
        for file in &shards.files {
            step.add(file, &wanted, others)?;
        }
        step.entries.sort_by(|a, b| natural::compare(&a.name, &b.name));
        step.left_out.sort_by(|a, b| natural::compare(&a.name, &b.name));
        if let Some([first, second]) = step.entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
            let reason = format!("is in {} as well", step.parts[first.part].path.display());
            return Err(Failure::tensor(&step.parts[second.part].path, &second.name, reason));
        }
        shards.check(&step, wanted)?;
        if let Some(path) = shards.index {
            let file = File::open(&path).map_err(|error| Failure::file(&path, error))?;
            step.parts.push(Part { path, data: Data::File(file, None) });
        }
        Ok(step)
    }

    /// The files of the step, the index among them.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|part| part.path.as_path())
    }

    /// Gives a file of the step, to be copied.
    ///
    /// # Errors
    /// For PyTorch's files: they have sums of their content, so that no changed copies are made.
    pub fn source(&self, part: usize) -> Result<&File, Failure> {
        match &self.parts[part].data {
            Data::File(file, _) => Ok(file),
            Data::PyTorch(_) => {
                Err(Failure::file(&self.parts[part].path, "clipped copies are made of safetensors files alone"))
            }
        }
    }

    fn add(&mut self, path: &Path, wanted: impl Fn(&str) -> bool, others: OtherTypes) -> Result<(), Failure> {
        let fail = |error: io::Error| Failure::file(path, error);
        // Before opening: opening a pipe waits for a writer.
        if !fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Failure::file(path, "not a regular file"));
        }
        let mut file = File::open(path).map_err(fail)?;
        let (data, entries, left_out) = if pytorch::is_one(path, &mut file).map_err(fail)? {
            let (tensors, entries, left_out) = pytorch::open(path, wanted, others)?;
            (Data::PyTorch(tensors), entries, left_out)
        } else {
            let size = file.metadata().map_err(fail)?.len();
            let (entries, left_out) = header::read(path, &mut file, size, wanted, others)?;
            let map = map(&file);
            (Data::File(file, map), entries, left_out)
        };
        let part = self.parts.len();
        self.parts.push(Part { path: path.to_owned(), data });
        self.entries.extend(entries.into_iter().map(|entry| Entry { part, ..entry }));
        self.left_out.extend(left_out);
        Ok(())
    }

    /// Fails unless the tensors are those of `first` in name, dtype and length.
    pub fn require_same(&self, first: &Self) -> Result<(), Failure> {
        let reference = first.path.display();
        for index in 0..self.entries.len().max(first.entries.len()) {
            let (own, others) = (self.entries.get(index), first.entries.get(index));
            // At the first difference of two sorted lists, the name that comes first is missing in the other list.
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

    /// Makes a plan to measure the tensors.
    pub fn plan(&self) -> Result<Plan, Failure> {
        let plan = Plan::new(self.entries.iter().map(|t| (t.name.as_str(), t.dtype, t.len)));
        let shapes = self.entries.iter().map(|t| t.shape.as_slice());
        plan.and_then(|plan| plan.with_shapes(shapes)).map_err(|error| Failure::file(&self.path, error))
    }

    /// Gives all tensors, in natural order. Before each it tells `progress` that this step is being read.
    pub fn lend(&self, mut progress: impl FnMut(&Path)) -> Result<Vec<Lent<'_>>, Failure> {
        let tensors = (0..self.entries.len()).map(|index| {
            progress(&self.path);
            self.tensor(index)
        });
        tensors.collect()
    }

    /// Gives one tensor: in the mapped file if it is aligned there, else as a copy.
    pub fn tensor(&self, index: usize) -> Result<Lent<'_>, Failure> {
        let entry = &self.entries[index];
        let bytes = match &self.parts[entry.part].data {
            Data::File(_, Some(map)) => place(entry).and_then(|(start, end)| map.get(start..end)),
            _ => None,
        };
        match bytes.and_then(|bytes| mapped(entry.dtype, bytes)) {
            Some(tensor) => Ok(Lent::Mapped(tensor)),
            None => self.read(index).map(Lent::Read),
        }
    }

    /// Copies one tensor.
    fn read(&self, index: usize) -> Result<Elements, Failure> {
        let entry = &self.entries[index];
        let part = &self.parts[entry.part];
        let fail = |reason: &dyn std::fmt::Display| Failure::tensor(&part.path, &entry.name, reason);
        let mut elements = Elements::zeros(entry.dtype, entry.len).map_err(|error| fail(&error))?;
        let mut view = elements.view_mut();
        match &part.data {
            Data::File(file, _) => {
                let mut file = file;
                let read = file.seek(SeekFrom::Start(entry.start));
                read.and_then(|_| file.read_exact(view.as_bytes_mut())).map_err(|error| fail(&error))?;
            }
            Data::PyTorch(tensors) => {
                let bytes = tensors[&entry.name].read().map_err(|error| fail(&error))?;
                view.as_bytes_mut().copy_from_slice(&bytes);
            }
        }
        Ok(elements)
    }

    /// Writes a copy of a file of the step, with changed tensors.
    pub fn copy(
        &self,
        part: usize,
        mut writer: impl Write,
        mut change: impl FnMut(usize, &mut Elements) -> Result<(), gradprobe::Error>,
    ) -> Result<(), Failure> {
        let path = &self.parts[part].path;
        let fail = |error: io::Error| Failure::file(path, error);
        let mut file = self.source(part)?;
        let mut order: Vec<usize> = (0..self.entries.len()).filter(|&t| self.entries[t].part == part).collect();
        order.sort_by_key(|&index| (self.entries[index].start, self.entries[index].len));
        let mut place = 0;
        for index in order {
            let entry = &self.entries[index];
            file.seek(SeekFrom::Start(place)).map_err(fail)?;
            // The header, or tensors of other types.
            io::copy(&mut file.take(entry.start - place), &mut writer).map_err(fail)?;
            let mut elements = self.read(index)?;
            change(index, &mut elements).map_err(|error| Failure::file(path, error))?;
            writer.write_all(elements.view().as_bytes()).map_err(fail)?;
            place = entry.end();
        }
        file.seek(SeekFrom::Start(place)).map_err(fail)?;
        io::copy(&mut file, &mut writer).map_err(fail)?;
        writer.flush().map_err(fail)
    }
}

/// The place of a tensor's data in memory that holds its file.
fn place(entry: &Entry) -> Option<(usize, usize)> {
    Some((usize::try_from(entry.start).ok()?, usize::try_from(entry.end()).ok()?))
}

/// Maps the pages of a file; `None` where the system cannot map it, or has no room for that.
fn map(file: &File) -> Option<Mmap> {
    // SAFETY: the pages are only read, as numbers, which any bits are. Writers of the file must leave it alone
    // meanwhile, as for any reader: another program that changes it changes the measurement, and one that cuts it short
    // ends this one by SIGBUS, as `--help` says.
    #[allow(unsafe_code, reason = "a file of gigabytes is measured where it is")]
    unsafe { Mmap::map(file) }.ok()
}
