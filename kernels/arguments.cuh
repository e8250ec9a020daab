// What the host hands the kernels and what they hand back: src/probe/arguments.rs and src/measure/outputs.rs hold the other side.
#pragma once
#include "exact.cuh"
#include "gsnr.cuh"

constexpr u32 DTYPE_F32 = 0;
constexpr u32 DTYPE_F16 = 1;
constexpr u32 DTYPE_BF16 = 2;

// One tensor of the plan.
struct TensorEntry {
    u64 length;
    u32 first_chunk;
    u32 chunk_count;
    u16 dtype;
    u16 is_uncounted; // 1: a replica, which counts on another rank
    u32 dead_bits;    // the dead threshold as a magnitude of the tensor's dtype
};
static_assert(sizeof(TensorEntry) == 24, "src/probe/arguments.rs");

// One tensor of a second list.
struct Other {
    u64 address;
    u32 dtype;
    u32 reserved;
};
static_assert(sizeof(Other) == 16, "src/probe/arguments.rs");

constexpr u32 POLICY_SKIP = 0;
constexpr u32 POLICY_ZERO_NONFINITE = 2;

// The scalars of a step.
typedef gradprobe_step_outputs StepOutputs;

// A step, and a tensor in it, in the history.
struct HistoryStep {
    StepOutputs outputs;
    u64 tag, reserved;
};
static_assert(sizeof(HistoryStep) == 112, "src/history/mod.rs");

constexpr u32 NO_ELEMENTS = 1u << 31; // in the flags of a tensor that is absent or has none
struct HistoryTensor {
    double finite_l2_norm;
    float max_abs, zero_fraction, dead_fraction;
    u32 flags;
};
static_assert(sizeof(HistoryTensor) == 24, "src/history/mod.rs");

// What a clip policy keeps from step to step, before its history, averages or histogram.
struct ClipState {
    u64 steps; // that were learnt from
    double mean, variance; // of the norms
    float limit; // of elements that are clipped on their own
    u32 reserved;
};
static_assert(sizeof(ClipState) == 32, "src/clip/policy.rs");

// A rule by which one step decides its health words, and all of them.
struct ThresholdRule {
    u32 statistic, kind, flags, reserved;
    double warning, critical;
};
static_assert(sizeof(ThresholdRule) == 32, "src/health/threshold.rs");

struct HealthRules {
    u32 count;
    u32 reserved[7];
    ThresholdRule rules[63];
};
static_assert(sizeof(HealthRules) == 2048, "src/health/judge.rs");

// What a step adds up to. Integers, so that neither the order of chunks nor that of ranks is in a bit.
struct StepSums {
    u64 squares[LIMBS]; // of the finite elements, before they are unscaled: an exact sum of the chunks' f64
    u64 nan_count, inf_count;
    u64 nonfinite; // chunks with NaN or Inf, of replicas that are not counted as well
};
constexpr u32 STEP_WORDS = sizeof(StepSums) / sizeof(u64);
static_assert(STEP_WORDS == 24, "src/measure/exact.rs");

// What all ranks add up to 0 when they are as they should be: src/ranks/replicas.rs.
struct CheckSums {
    u64 state[2];
    u64 replicas[3];
    u64 ranks; // that have added to it
};
constexpr u32 CHECK_WORDS = sizeof(CheckSums) / sizeof(u64);
static_assert(CHECK_WORDS == 6, "src/ranks/replicas.rs");

// The loss scale, and the rule it follows.
struct LossScale {
    float scale;
    u32 growth_tracker; // steps without NaN or Inf since it last changed
    float growth_factor, backoff_factor;
    u32 growth_interval;
    float dead_threshold;
    u32 reserved[2];
};
static_assert(sizeof(LossScale) == 32, "src/clip/loss_scale.rs");

// What all kernels are given: the tensors, how they are cut, and workspace. Behind it each kernel has what only it needs,
// declared in its own file.
struct Common {
    const u64 *addresses; // of the tensors' elements; 0 of one that is absent
    const TensorEntry *tensors;
    const u32 *chunk_tensors; // the tensor of each chunk
    void *chunk_parts;        // a slot a chunk for what it adds up to: a Record, or GsnrSums
    Record *records;          // of the tensors; those of empty ones are set by the host, once
    StepOutputs *outputs;
    u32 *chunks_done;  // counters, 0 between launches: per chunk, of which the first of a span is used
    u32 *tensors_done; // one more, and per tensor
    u32 chunk_count;
    u32 tensor_count;
};
static_assert(sizeof(Common) == 72, "src/probe/arguments.rs");
static_assert(sizeof(GsnrSums) <= sizeof(Record), "chunk_parts has room for a Record a chunk");

// Of gradprobe_measure: what is measured, and how the step is finished.
struct StepArguments : Common {
    u32 large_chunks; // those before the chunks of tensors of a tile at most
    u32 weights;      // 1: measure them too; their tables and records are behind those of the tensors
    u32 policy;
    u32 is_part;     // 1: leave the step for another launch to finish
    double max_norm; // 0: no clip
    double clip_threshold, clip_smoothing;
    u32 clip; // policy, and its parameters
    u32 clip_steps;
    ClipState *clip_state;
    float *coefficients;   // of the tensors, under a policy that has them
    LossScale *loss_scale; // null when gradients are not scaled
    HistoryStep *history;  // rings of the last steps; null when none are kept
    HistoryTensor *history_tensors;
    const u64 *tag; // of the batch
    const HealthRules *health_rules; // and behind them the exemptions of the tensors; null when there are none
    double *last_norms;              // of the last clean step, and behind it of its tensors
    u32 *health_words;               // of the tensors
    StepSums *sums;                  // 0 between steps; null: records alone
    CheckSums *check;                // of many ranks: what to add to, 0 before; null when there is one rank
    CheckSums *checked;              // and where what they add up to is left for the host
    u64 rank_factors[2];             // of this rank's state
    u32 history_steps;
    u32 clip_words; // of the clip's state, that are the same on all ranks
    u32 strict;     // 1: a step in which ranks differ is one to skip
    u32 ranks;
};
static_assert(sizeof(StepArguments) == 248, "src/probe/arguments.rs");
