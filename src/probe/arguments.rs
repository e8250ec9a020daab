//! What the host hands the kernels.

#[cfg(doc)]
use crate::{
    Config, GsnrRecord, Record, StepOutputs,
    device::Kernel,
    history::{HistoryStep, HistoryTensor},
};
use bytemuck::{Pod, Zeroable};

/// One tensor of the plan, as the kernels read it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct TensorEntry {
    pub length: u64,
    pub first_chunk: u32,
    pub chunk_count: u32,
    pub dtype: u32,
    pub dead_bits: u32,
}

/// The one parameter of every kernel: device addresses and the step's settings (`kernels/arguments.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Arguments {
    /// Table of the tensors' addresses.
    pub addresses: u64,
    /// Table of the tensors.
    pub tensors: u64,
    /// Table of each chunk's tensor.
    pub chunk_tensors: u64,
    /// What each chunk adds up to, at most as large as a [`Record`]: workspace.
    pub chunk_parts: u64,
    /// One [`Record`] a tensor: a result.
    pub records: u64,
    /// The [`StepOutputs`]: a result.
    pub outputs: u64,
    /// Counters of what is done, one a chunk: workspace.
    pub chunks_done: u64,
    /// One more, and one a tensor.
    pub tensors_done: u64,
    /// The norm to which all tensors are clipped together, or 0.
    pub max_norm: f64,
    /// Chunks in all.
    pub chunk_count: u32,
    /// Tensors in all.
    pub tensor_count: u32,
    /// Tensors that have elements, of those that this launch measures.
    pub busy_tensors: u32,
    /// Whether this launch measures the weights too, whose tables and records are behind those of the tensors.
    pub weights: u32,
    /// [`Config::non_finite`].
    pub policy: u32,
    /// Steps after which tracking starts anew, or 0.
    pub window: u32,
    /// [`Config::clip`], and its parameters.
    pub clip: u32,
    /// Its history or warm-up.
    pub clip_steps: u32,
    /// Its threshold.
    pub clip_threshold: f64,
    /// Its smoothing.
    pub clip_smoothing: f64,
    /// What it keeps from step to step.
    pub clip_state: u64,
    /// One f32 coefficient a tensor, under a policy that clips tensors on their own.
    pub coefficients: u64,
    /// Steps of the history.
    pub history_steps: u32,
    /// Whether all tensors are counted in one histogram.
    pub one_histogram: u32,
    /// One [`HistoryStep`] a step; 0 when none are kept, as the next.
    pub history: u64,
    /// One [`HistoryTensor`] a step and tensor.
    pub history_tensors: u64,
    /// The batch's tag.
    pub tag: u64,
    /// How far each tensor has been tracked; 0 when none is, as all that follow.
    pub tracks: u64,
    /// f32 means of the tracked elements.
    pub means: u64,
    /// Their summed squared deviations, f32.
    pub deviations: u64,
    /// One [`GsnrRecord`] a tensor: a result, of the tracked ones.
    pub gsnr_records: u64,
    /// Bins of each tracked tensor: workspace.
    pub gsnr_bins: u64,
    /// One [`Histogram`](crate::Histogram) a tensor: a result; 0 when there is none.
    pub histograms: u64,
    /// Table of the second list's addresses and dtypes; 0 when there is none, as the two that follow.
    pub others: u64,
    /// One [`Dot`](crate::Dot) a chunk: workspace.
    pub chunk_dots: u64,
    /// One [`Dot`](crate::Dot) a tensor: a result.
    pub dots: u64,
    /// The rules of the verdict words, and behind them the tensors' exemptions; 0 when there are none, as the next.
    pub health_rules: u64,
    /// f64 norm of the last clean step, and behind it of each tensor in it.
    pub last_norms: u64,
    /// One u32 verdict word a tensor: a result.
    pub health_words: u64,
    /// The rule of the adaptive clip, and behind it the units of each tensor; 0 when there is none, as the next.
    pub adaptive: u64,
    /// One [`AdaptiveRecord`](crate::clip::AdaptiveRecord) a tensor: a result.
    pub adaptive_records: u64,
    /// What is sampled, and where to; 0 when nothing is.
    pub samples: u64,
    /// The step of Adam and behind it the addresses of each tensor's moments; 0 but for [`Kernel::Adam`].
    pub adam: u64,
    /// The loss scale and its rule; 0 when gradients are not scaled.
    pub loss_scale: u64,
    /// One list of [`Record`]s a rank, of `list_length` each; 0 when there is one rank, as the two that follow.
    pub lists: u64,
    /// Where the elements of each tensor are, and behind that the ranks.
    pub placements: u64,
    /// A counter of replicas that differ.
    pub differing: u64,
    /// Ranks.
    pub list_count: u32,
    /// Records of a rank.
    pub list_length: u32,
    /// Whether [`Kernel::Measure`] leaves records alone, and the step for [`Kernel::Merge`] to finish.
    pub is_part: u32,
    /// Unused; 0.
    pub reserved: u32,
}

// The other side of these numbers is in kernels/arguments.cuh.
const _: () = assert!(size_of::<TensorEntry>() == 24 && size_of::<Arguments>() == 344);
