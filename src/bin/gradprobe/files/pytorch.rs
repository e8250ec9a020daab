//! PyTorch's files of tensors (`torch.save`): `.pt`, `.pth`, `.bin`.

use super::{
    Failure,
    header::{Entry, LeftOut, OtherTypes},
};
use gradprobe::DType;
use pytorch_reader::{PytorchError, PytorchReader, Tensor};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Seek},
    path::Path,
};

/// The keys under which a checkpoint keeps its tensors, beside an optimizer's, say.
const KEYS: [&str; 3] = ["state_dict", "model_state_dict", "model"];

/// Whether a file has one of PyTorch's names, and does not begin as a safetensors file does: with a length and a brace.
/// Reads the beginning, and goes back there.
pub fn is_one(path: &Path, file: &mut File) -> io::Result<bool> {
    let is_called_so =
        path.extension().is_some_and(|extension| ["pt", "pth", "bin"].iter().any(|ours| extension == *ours));
    let mut beginning = Vec::new();
    file.by_ref().take(9).read_to_end(&mut beginning)?;
    file.rewind()?;
    Ok(is_called_so && beginning.get(8) != Some(&b'{'))
}

/// Gives the `wanted` tensors of a file, and those of other types.
#[expect(clippy::type_complexity, reason = "tensors, entries and what is left out")]
pub fn open(
    path: &Path,
    wanted: impl Fn(&str) -> bool,
    others: OtherTypes,
) -> Result<(HashMap<String, Tensor>, Vec<Entry>, Vec<LeftOut>), Failure> {
    let tensors = read(path).map_err(|error| Failure::file(path, error))?.into_tensors();
    let (mut entries, mut left_out) = (Vec::new(), Vec::new());
    for (name, tensor) in tensors.iter().filter(|(name, _)| wanted(name)) {
        let dtype = match tensor.dtype() {
            pytorch_reader::DType::F32 => DType::F32,
            pytorch_reader::DType::F16 => DType::F16,
            pytorch_reader::DType::BF16 => DType::BF16,
            other if others == OtherTypes::LeftOut => {
                left_out.push(LeftOut { name: name.clone(), dtype: format!("{other:?}") });
                continue;
            }
            other => {
                return Err(Failure::tensor(path, name, format!("dtype {other:?} is not one of F32, F16, BF16")));
            }
        };
        let shape = tensor.shape().iter().map(|&length| length as u64).collect();
        let len = tensor.num_elements() as u64;
        entries.push(Entry { name: name.clone(), dtype, len, shape, part: 0, start: 0 });
    }
    Ok((tensors, entries, left_out))
}

fn read(path: &Path) -> Result<PytorchReader, PytorchError> {
    let nested = KEYS.iter().find_map(|key| PytorchReader::with_top_level_key(path, key).ok());
    nested.map_or_else(|| PytorchReader::new(path), Ok)
}
