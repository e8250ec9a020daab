//! Clips: of all tensors together, of tensors, units or elements, and the loss scale.

mod adaptive;
mod cpu;
mod loss_scale;
mod policy;

pub use adaptive::{AdaptiveClip, AdaptiveClipReport, AdaptiveRecord, AdaptiveUnits};
pub use loss_scale::LossScale;
pub use policy::Clip;

pub(crate) use adaptive::{
    cpu::run as adaptive,
    room::{Rule, TensorUnits},
};
pub(crate) use cpu::run as clip;
pub(crate) use loss_scale::{LossScaleMemory, LossScaleState, divisor, is_usable};
pub(crate) use policy::{ClipHeader, ClipState, Decision, Norms, percentile_of};
