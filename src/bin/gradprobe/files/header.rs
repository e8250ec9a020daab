//! The header of a safetensors file, checked against the rest of the file.
//!
//! The `safetensors` crate parses whole files in memory, and its errors do not always name the place. Here the header
//! alone is read, with the crate's types and its check of the layout, and an error names the tensor.

use super::{failure::Failure, natural};
use gradprobe::DType;
use safetensors::{
    Dtype, SafeTensorError,
    tensor::{Metadata, TensorInfo},
};
use serde_json::{Map, Value};
use std::{io::Read, path::Path};

/// Bytes of the length in front of the header.
const LENGTH: u64 = 8;
/// The format's limit for the header.
const LONGEST: u64 = 100_000_000;

/// A tensor of a file.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: String,
    pub dtype: DType,
    pub len: u64,
    pub shape: Vec<u64>,
    /// Its file, among those that make up a step.
    pub part: usize,
    /// The start of its data in that file.
    pub start: u64,
}

impl Entry {
    /// The end of its data in its file.
    pub fn end(&self) -> u64 {
        self.start + self.len * self.dtype.size() as u64
    }
}

/// A tensor with a type that cannot be measured.
#[derive(Clone, Debug)]
pub struct LeftOut {
    pub name: String,
    pub dtype: String,
}

/// The treatment of tensors of other types than F32, F16 and BF16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherTypes {
    Refused,
    LeftOut,
}

/// Gives the `wanted` tensors of `file`, which holds `size` bytes, in natural order, and those of other types.
pub fn read(
    path: &Path,
    file: &mut impl Read,
    size: u64,
    wanted: impl Fn(&str) -> bool,
    others: OtherTypes,
) -> Result<(Vec<Entry>, Vec<LeftOut>), Failure> {
    let fail = |reason: String| Failure::file(path, reason);
    let Some(room) = size.checked_sub(LENGTH) else {
        return Err(fail(format!("not a safetensors file: {size} bytes are too few")));
    };
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| Failure::file(path, error))?;
    let header = u64::from_le_bytes(length);
    if header > room {
        return Err(fail(format!(
            "truncated or not a safetensors file: a header of {header} bytes in a file of {size}"
        )));
    }
    if header > LONGEST {
        return Err(fail(format!("a header of {header} bytes is above the format's limit of {LONGEST}")));
    }
    let mut head = Vec::new();
    file.take(header).read_to_end(&mut head).map_err(|error| Failure::file(path, error))?;
    let (mut entries, left_out, data) = parse(path, &head, wanted, others)?;
    let given = size - LENGTH - header;
    if data as u64 != given {
        let what = if given < data as u64 { "truncated" } else { "malformed" };
        return Err(fail(format!("{what}: {data} bytes of tensors in the header, {given} in the file")));
    }
    entries.iter_mut().for_each(|entry| entry.start += LENGTH + header);
    Ok((entries, left_out))
}

/// Gives the `wanted` tensors that this header describes, placed from its end, those of other types, and the bytes of
/// all.
fn parse(
    path: &Path,
    header: &[u8],
    wanted: impl Fn(&str) -> bool,
    others: OtherTypes,
) -> Result<(Vec<Entry>, Vec<LeftOut>, usize), Failure> {
    let malformed = |error: &dyn std::fmt::Display| Failure::file(path, format!("malformed header: {error}"));
    let mut fields: Map<String, Value> = serde_json::from_slice(header).map_err(|error| malformed(&error))?;
    let metadata = fields.remove("__metadata__").unwrap_or(Value::Null);
    let metadata = serde_json::from_value(metadata).map_err(|error| malformed(&format!("__metadata__: {error}")))?;
    let mut infos = Vec::with_capacity(fields.len());
    let mut entries = Vec::with_capacity(fields.len());
    let mut left_out = Vec::new();
    for (name, value) in fields {
        let info: TensorInfo = serde_json::from_value(value).map_err(|error| Failure::tensor(path, &name, error))?;
        match dtype_of(info.dtype) {
            _ if !wanted(&name) => {}
            None if others == OtherTypes::LeftOut => {
                left_out.push(LeftOut { name: name.clone(), dtype: info.dtype.to_string() });
            }
            None => {
                return Err(Failure::tensor(path, &name, format!("dtype {} is not one of F32, F16, BF16", info.dtype)));
            }
            Some(dtype) => {
                let len = check(dtype, &info).map_err(|reason| Failure::tensor(path, &name, reason))?;
                let shape = info.shape.iter().map(|&length| length as u64).collect();
                entries.push(Entry {
                    name: name.clone(),
                    dtype,
                    len,
                    shape,
                    part: 0,
                    start: info.data_offsets.0 as u64,
                });
            }
        }
        infos.push((name, info));
    }
    infos.sort_by_key(|(_, info)| info.data_offsets);
    let layout = Metadata::new(metadata, infos).map_err(|error| match error {
        SafeTensorError::InvalidOffset(name) => {
            Failure::tensor(path, &name, "its data does not begin where the tensor before it ends")
        }
        error => malformed(&error),
    })?;
    entries.sort_by(|a, b| natural::compare(&a.name, &b.name));
    left_out.sort_by(|a, b| natural::compare(&a.name, &b.name));
    Ok((entries, left_out, layout.data_len()))
}

/// Gives the type, if gradients can be measured in it.
fn dtype_of(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Gives the number of the elements, if they fit the place in the file.
fn check(dtype: DType, info: &TensorInfo) -> Result<u64, String> {
    let len = info.shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
    let bytes = len.and_then(|len| len.checked_mul(dtype.size()));
    let (start, end) = info.data_offsets;
    match (len, bytes) {
        (Some(len), Some(bytes)) if end.checked_sub(start) == Some(bytes) => Ok(len as u64),
        _ => Err(format!("shape {:?} of {dtype} does not fit the data offsets {start} to {end}", info.shape)),
    }
}
