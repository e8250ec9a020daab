// Contribute: the records of what a rank counts, as integers for all ranks to add up and to take the largest of.
// src/ranks/whole.rs documents them.
//
// A block takes a tensor of the model, of which this rank has a part or none; where it has none, or counts none, it leaves 0.
//
// Reads a record for each tensor, and writes 736 bytes.
#include "arguments.cuh"
#include "spec.cuh"
#include "whole.cuh"

struct ContributeArguments : Common {
    const u32 *owners;  // the tensor of the plan for each of the model, or NOWHERE
    const u64 *firsts;  // the place of each of the plan's parts in its tensor
    TensorSums *sums;   // of the model's tensors, and behind them of their weights
    TensorMaxima *maxima;
    u32 model_count; // tensors of the model
    u32 weights;     // 1: their records too
};
static_assert(sizeof(ContributeArguments) == 112, "src/ranks/whole.rs");

constexpr u32 NOWHERE = 0xffffffffu;

KERNEL(LANES, 8) gradprobe_contribute(ContributeArguments a) {
    for (u32 slot = blockIdx.x; slot < a.model_count << a.weights; slot += gridDim.x) {
        bool is_weight = slot >= a.model_count;
        u32 owner = a.owners[is_weight ? slot - a.model_count : slot];
        TensorSums &sums = a.sums[slot];
        u64 *words = (u64 *)&sums;
        if (threadIdx.x < TENSOR_WORDS) words[threadIdx.x] = 0;
        static_assert(TENSOR_WORDS <= LANES, "a word a thread");
        BARRIER();
        if (threadIdx.x != 0) continue;
        a.maxima[slot] = {};
        // The record of an empty part is set once: what `merge` has put there is not of this step.
        if (owner == NOWHERE || a.tensors[owner].is_uncounted || a.tensors[owner].length == 0) continue;
        const Record &record = a.records[is_weight ? a.tensor_count + owner : owner];
        add_part(sums, record);
        a.maxima[slot] = maxima_of(record, a.firsts[owner]);
    }
}
