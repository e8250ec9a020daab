//! Files of tensors: safetensors, whole and in shards, and PyTorch's.

mod elements;
mod header;
mod natural;
mod progress;
mod pytorch;
mod shards;
mod tensor_file;
mod units;

use super::failure;
pub use elements::Lent;
pub use failure::Failure;
pub use progress::Progress;
#[allow(unused_imports, reason = "the example compares nothing")]
pub use shards::is_run;
pub use tensor_file::{Entry, LeftOut, OtherTypes, TensorFile};
pub use units::rate;
