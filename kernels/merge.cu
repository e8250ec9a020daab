// Merge: the end of a step that measure has left open, from what all ranks have added up; where they have added up their
// tensors too, their records first. src/ranks/mod.rs documents it.
//
// Every rank is given the same integers, so every rank has the same bits, and decides the same.
//
// Reads the sums of the step, and 736 bytes for each tensor of the plan where there are any.
#include "finish.cuh"
#include "whole.cuh"

struct MergeArguments : StepArguments {
    const u32 *slots; // of the plan's tensors in the model; null: records stay those of this rank
    TensorSums *model_sums;
    const TensorMaxima *model_maxima;
    u32 model_count;
    u32 reserved_too;
};
static_assert(sizeof(MergeArguments) == 280, "src/ranks/room.rs");

KERNEL(STEP_THREADS, 2) gradprobe_merge(MergeArguments a) {
    SHARED(FinishScratch, scratch);
    u32 items = a.slots ? a.tensor_count << a.weights : 0;
    for (u32 i = blockIdx.x * STEP_THREADS + threadIdx.x; i < items; i += gridDim.x * STEP_THREADS) {
        bool is_weight = i >= a.tensor_count;
        u32 slot = a.slots[is_weight ? i - a.tensor_count : i] + (is_weight ? a.model_count : 0);
        a.records[i] = whole(a.model_sums[slot], a.model_maxima[slot]);
    }
    BARRIER(); // what all threads of the block have written is released by its first
    if (!last_of(scratch.last, a.tensors_done, gridDim.x)) return;
    take_check(scratch, a);
    finish_step(scratch, a);
}
