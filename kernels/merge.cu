// Merge: the records of all ranks, gathered one list behind the other, to one record a tensor, and the end of the step
// that measure left open. src/ranks/mod.rs documents where elements are, and has the same operations.
//
// A thread takes a tensor and goes through its ranks in their order. No float is reduced in any other way, so every rank
// that was given the same lists has the same bits, and decides the same.
//
// Reads a record for each tensor and rank.
#include "finish.cuh"

// Which ranks hold the parts of a tensor: a run of the table of ranks behind all placements.
struct Placement {
    u32 first, count;
};
static_assert(sizeof(Placement) == 8, "src/ranks/mod.rs");
constexpr u32 REPLICATED = 0;           // in `count`: all of it on each
constexpr u32 EVERYWHERE = 0xffffffffu; // a part on each, in their order

struct MergeArguments : StepArguments {
    const Record *lists;         // of all ranks, a list of records each
    const Placement *placements; // of the tensors, and behind them ranks
    u32 list_count;              // ranks
    u32 list_length;             // records of a rank
};
static_assert(sizeof(MergeArguments) == 240, "src/ranks/room.rs");

// The record of the item at `index` of each list.
DEVICE Record merged(const MergeArguments &a, const Placement &placement, u32 index) {
    auto of = [&](u32 rank) { return load_record(a.lists + (u64)rank * a.list_length + index); };
    if (placement.count == REPLICATED) {
        Record all = of(0);
        bool differs = false, nonfinite = all.nan_count + all.inf_count > 0;
        for (u32 rank = 1; rank < a.list_count; rank++) {
            Record next = of(rank);
            differs = differs || !same_bits(a.lists + index, a.lists + (u64)rank * a.list_length + index);
            if (!nonfinite && next.nan_count + next.inf_count > 0) {
                all = next;
                nonfinite = true;
            }
        }
        if (differs) atomicAdd(a.differing, 1u);
        return all;
    }
    const u32 *ranks = (const u32 *)(a.placements + a.tensor_count) + placement.first;
    bool everywhere = placement.count == EVERYWHERE;
    u32 count = everywhere ? a.list_count : placement.count;
    Record all = of(everywhere ? 0 : ranks[0]);
    for (u32 i = 1; i < count; i++) all = merge(all, of(everywhere ? i : ranks[i]));
    return all;
}

// At four blocks to a multiprocessor ptxas put 24 to 32 bytes a thread into local memory.
KERNEL(STEP_THREADS, 2) gradprobe_merge(MergeArguments a) {
    SHARED(FinishScratch, scratch);
    u32 items = a.tensor_count << a.weights;
    for (u32 i = blockIdx.x * STEP_THREADS + threadIdx.x; i < items; i += gridDim.x * STEP_THREADS) {
        a.records[i] = merged(a, a.placements[i < a.tensor_count ? i : i - a.tensor_count], i);
    }
    BARRIER(); // what all threads of the block have written is released by its first
    if (!last_of(scratch.last, a.tensors_done, gridDim.x)) return;
    finish_step(scratch, a);
}
