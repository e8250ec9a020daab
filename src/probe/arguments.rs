//! The arguments of the kernels: a part that all have in common, and behind it each kernel's own, which its room
//! declares.

use crate::device::Kernel;
#[cfg(doc)]
use crate::{
    Config, Record, StepOutputs,
    history::{HistoryStep, HistoryTensor},
};
use bytemuck::{Pod, Zeroable};

/// The one parameter of a kernel: plain values, [`Common`] first.
pub trait Arguments: Pod {
    /// The kernel.
    const KERNEL: Kernel;
}

/// One tensor of the plan, as the kernels read it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct TensorEntry {
    /// Elements.
    pub length: u64,
    /// Its first chunk.
    pub first_chunk: u32,
    /// Its chunks.
    pub chunk_count: u32,
    /// [`DType::code`](crate::DType).
    pub dtype: u16,
    /// Whether it is a replica that counts on another rank.
    pub is_uncounted: u16,
    /// The dead threshold as a magnitude of its dtype.
    pub dead_bits: u32,
}

/// The arguments that every kernel has: the tensors, their chunks, and workspace.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Common {
    /// Table of the tensors' addresses.
    pub addresses: u64,
    /// Table of the tensors: [`TensorEntry`].
    pub tensors: u64,
    /// Table of each chunk's tensor.
    pub chunk_tensors: u64,
    /// The result of each chunk, at most as large as a [`Record`]: workspace.
    pub chunk_parts: u64,
    /// One [`Record`] a tensor: a result.
    pub records: u64,
    /// The [`StepOutputs`]: a result.
    pub outputs: u64,
    /// Counters of finished work, one a chunk: workspace.
    pub chunks_done: u64,
    /// A counter for all tensors, and one a tensor.
    pub tensors_done: u64,
    /// Chunks in all.
    pub chunk_count: u32,
    /// Tensors in all.
    pub tensor_count: u32,
}

/// The arguments of [`Kernel::Measure`]: the tensors to measure, and how to finish the step.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct StepArguments {
    /// The common part.
    pub common: Common,
    /// Chunks of large tensors. Behind them come those of tensors of at most one tile, which are measured warp by warp.
    pub large_chunks: u32,
    /// Whether this launch measures the weights too. Their tables and records are behind those of the tensors.
    pub weights: u32,
    /// [`Config::non_finite`].
    pub policy: u32,
    /// Whether this launch leaves the step for another to finish.
    pub is_part: u32,
    /// The norm to which all tensors are clipped together, or 0.
    pub max_norm: f64,
    /// [`Config::clip`]: its threshold.
    pub clip_threshold: f64,
    /// [`Config::clip`]: its smoothing.
    pub clip_smoothing: f64,
    /// [`Config::clip`]: its code.
    pub clip: u32,
    /// [`Config::clip`]: its history or warm-up.
    pub clip_steps: u32,
    /// [`Config::clip`]: its state from step to step.
    pub clip_state: u64,
    /// One f32 coefficient a tensor, under a policy that clips tensors on their own.
    pub coefficients: u64,
    /// The loss scale and its rule; 0 when gradients are not scaled.
    pub loss_scale: u64,
    /// One [`HistoryStep`] a step; 0 when none are kept, as for the next two.
    pub history: u64,
    /// One [`HistoryTensor`] a step and tensor.
    pub history_tensors: u64,
    /// The batch's tag.
    pub tag: u64,
    /// The rules of the health words, and behind them the tensors' exemptions; 0 without rules, as for the next.
    pub health_rules: u64,
    /// f64 norm of the last clean step, and behind it of each tensor in it.
    pub last_norms: u64,
    /// One u32 health word a tensor: a result.
    pub health_words: u64,
    /// The sums of the step, 192 bytes that are 0 between steps; 0 for records alone.
    pub sums: u64,
    /// The sums that ranks compare, 48 bytes behind it; 0 when there is one rank.
    pub check: u64,
    /// Where the sums of all ranks are left for the host.
    pub checked: u64,
    /// The factors of this rank's state in those sums.
    pub rank_factors: [u64; 2],
    /// Steps of the history.
    pub history_steps: u32,
    /// Words of the clip's state that are the same on all ranks.
    pub clip_words: u32,
    /// Whether a step is skipped when ranks differ.
    pub strict: u32,
    /// Number of ranks.
    pub ranks: u32,
}

/// One tensor of a second list, as kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Other {
    pub address: u64,
    pub dtype: u32,
    pub reserved: u32,
}

// The other side of these numbers is in kernels/arguments.cuh.
const _: () = {
    assert!(size_of::<TensorEntry>() == 24 && size_of::<Common>() == 72);
    assert!(size_of::<StepArguments>() == 248 && size_of::<Other>() == 16);
};
