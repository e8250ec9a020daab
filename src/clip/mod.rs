//! Clips: of all tensors together, of tensors, units or elements, and the loss scale.

pub(crate) mod adaptive;
pub(crate) mod cpu;
mod loss_scale;
mod policy;

pub use adaptive::{AdaptiveClip, AdaptiveClipReport, AdaptiveRecord, AdaptiveUnits};
pub use loss_scale::LossScale;
pub use policy::Clip;

pub(crate) use adaptive::room::AdaptiveArguments;
#[doc(hidden)]
pub use cpu::ClipArguments;
pub(crate) use cpu::Clipping;
pub(crate) use loss_scale::{LossScaleMemory, LossScaleState, divisor, is_usable, magnitude_over};
pub(crate) use policy::{ClipHeader, ClipState, Decision, Norms, percentile_of};
