//! The header of a safetensors file, checked against the rest of the file.
//!
//! The `safetensors` crate parses whole files in memory and says that something is wrong, not always where. Here the
//! header alone is read, with the crate's types and its check of the layout, and an error names the tensor.

use crate::{failure::Failure, natural};
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
    /// Where its data begins, from the end of the header.
    pub start: usize,
}

/// The bytes of `file` up to the data, and its `wanted` tensors in natural order. `file` holds `size` bytes.
pub fn read(
    path: &Path,
    file: &mut impl Read,
    size: u64,
    wanted: impl Fn(&str) -> bool,
) -> Result<(Vec<u8>, Vec<Entry>), Failure> {
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
    let mut head = length.to_vec();
    file.take(header).read_to_end(&mut head).map_err(|error| Failure::file(path, error))?;
    let (entries, data) = parse(path, &head[length.len()..], wanted)?;
    let given = size - LENGTH - header;
    if data as u64 != given {
        let what = if given < data as u64 { "truncated" } else { "malformed" };
        return Err(fail(format!("{what}: {data} bytes of tensors in the header, {given} in the file")));
    }
    Ok((head, entries))
}

/// The `wanted` tensors that this header describes, and the bytes that all of them take.
fn parse(path: &Path, header: &[u8], wanted: impl Fn(&str) -> bool) -> Result<(Vec<Entry>, usize), Failure> {
    let malformed = |error: &dyn std::fmt::Display| Failure::file(path, format!("malformed header: {error}"));
    let mut fields: Map<String, Value> = serde_json::from_slice(header).map_err(|error| malformed(&error))?;
    let metadata = fields.remove("__metadata__").unwrap_or(Value::Null);
    let metadata = serde_json::from_value(metadata).map_err(|error| malformed(&format!("__metadata__: {error}")))?;
    let mut infos = Vec::with_capacity(fields.len());
    let mut entries = Vec::with_capacity(fields.len());
    for (name, value) in fields {
        let info: TensorInfo = serde_json::from_value(value).map_err(|error| Failure::tensor(path, &name, error))?;
        if wanted(&name) {
            let (dtype, len) = check(&info).map_err(|reason| Failure::tensor(path, &name, reason))?;
            let shape = info.shape.iter().map(|&length| length as u64).collect();
            entries.push(Entry { name: name.clone(), dtype, len, shape, start: info.data_offsets.0 });
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
    Ok((entries, layout.data_len()))
}

/// Type and number of the elements, when they are what gradients can be and fit the place in the file.
fn check(info: &TensorInfo) -> Result<(DType, u64), String> {
    let dtype = match info.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => return Err(format!("dtype {other} is not one of F32, F16, BF16")),
    };
    let len = info.shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side));
    let bytes = len.and_then(|len| len.checked_mul(dtype.size()));
    let (start, end) = info.data_offsets;
    match (len, bytes) {
        (Some(len), Some(bytes)) if end.checked_sub(start) == Some(bytes) => Ok((dtype, len as u64)),
        _ => Err(format!("shape {:?} of {dtype} does not fit the data offsets {start} to {end}", info.shape)),
    }
}
