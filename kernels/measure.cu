// Measure: every statistic of every tensor, the norms, the coefficient and the flags, in one launch.
//
// A block takes a run of the chunks, and a warp the tensors of a tile at most. A chunk's record goes to its own slot; the
// last block to finish a section of chunks merges their slots in index order, the last section of a tensor those of the
// sections, and the last block finishes the step, of which each has added up its chunks as integers. No float is ever added
// atomically, and no bit depends on the grid.
//
// Loads go on while a chunk is merged: one warp does that, another for each chunk, while the others read the next one.
// What a chunk leaves to be done by all waits until they have. A block counts once for each section of its run.
//
// Reads each element once: n·size bytes, and a record a chunk of 32 Ki elements.
#include "chunk.cuh"
#include "finish.cuh"

constexpr u32 WARPS = STEP_THREADS / WARP;

struct MeasureScratch {
    ChunkScratch chunks[2]; // in turn
    u32 left[2];            // what there is still to be done about them
    Measured small[WARPS];
    u32 has_marked[WARPS];
    StepSums sums; // of the chunks of the block
    FinishScratch finish;
};

// What a chunk leaves to all threads of a block.
constexpr u32 NOTHING = 0;
constexpr u32 READ_AGAIN = 1;
constexpr u32 MERGE_SECTION = 2;

// The count in the record of a small tensor that is to be read again.
constexpr u64 MARK = ~0ull;

// Gradients are scaled by the loss scale if there is one, weights by nothing.
DEVICE bool is_scaled(const StepArguments &a, u32 tensor) { return a.loss_scale && tensor < a.tensor_count; }

DEVICE Chunk chunk_to_measure(const StepArguments &a, u32 index, u32 tensor) {
    Chunk chunk = chunk_of(a, index, tensor);
    return is_scaled(a, tensor) ? with_scaled_threshold(chunk, *a.loss_scale) : chunk;
}

// Brings a tensor's record to the units of the loss; one thread.
DEVICE void unscale_record(const StepArguments &a, u32 tensor) {
    if (is_scaled(a, tensor)) unscale(a.records[tensor], divisor_of(a.loss_scale->scale));
}

// Adds a chunk of a gradient to what the block adds up; one thread.
DEVICE void add_chunk(StepSums &sums, const StepArguments &a, u32 tensor, const Record &chunk) {
    if (tensor >= a.tensor_count) return;
    bool nonfinite = chunk.nan_count + chunk.inf_count > 0;
    if (nonfinite) atomicAdd(&sums.nonfinite, (u64)1);
    if (a.tensors[tensor].is_uncounted) return;
    add_exactly(sums.squares, sum_squares((double)finite_count(chunk), chunk.mean_or_zero, chunk.sum_squared_deviations));
    if (!nonfinite) return;
    atomicAdd(&sums.nan_count, (u64)chunk.nan_count);
    atomicAdd(&sums.inf_count, (u64)chunk.inf_count);
}

// Puts the record of a tensor that is one chunk; one thread.
DEVICE void put_record(StepSums &sums, const StepArguments &a, u32 tensor, const Record &record) {
    add_chunk(sums, a, tensor, record);
    a.records[tensor] = record;
    unscale_record(a, tensor);
}

// Puts a chunk's record in its place and, if no more of its section follow in the block's run, counts those that there
// are; by one thread. Says what is left.
DEVICE u32 put_chunk(StepSums &sums, const StepArguments &a, const Run &run, u32 index, u32 tensor, const Record &record) {
    add_chunk(sums, a, tensor, record);
    const TensorEntry &entry = a.tensors[tensor];
    // To unscale takes as many f64 instructions as to merge: not here, where all chunks come by.
    if (entry.chunk_count == 1 && !is_scaled(a, tensor)) {
        a.records[tensor] = record;
        return NOTHING;
    }
    ((Record *)a.chunk_parts)[index] = record;
    Section section = section_of(entry, index);
    u32 next = index + 1, count = next - larger(run.begin, section.first);
    if (next < run.end && next < section.first + section.length) return NOTHING;
    if (count == section.length) return MERGE_SECTION; // all of it is this block's
    u32 *counter = a.chunks_done + section.first;
    if (count_released(counter, count) != section.length - count) return NOTHING;
    acquire();
    *counter = 0;
    return MERGE_SECTION;
}

// Does what a chunk has left. By all threads, behind a barrier.
DEVICE void settle(MeasureScratch &scratch, const StepArguments &a, const Run &run, u32 index) {
    u32 left = scratch.left[index % 2], tensor = a.chunk_tensors[index];
    if (left == READ_AGAIN) {
        ChunkScratch &chunk = scratch.chunks[index % 2];
        measure_again(chunk, chunk_to_measure(a, index, tensor));
        if (threadIdx.x == 0) scratch.left[index % 2] = put_chunk(scratch.sums, a, run, index, tensor, chunk.measured.record);
        BARRIER();
        left = scratch.left[index % 2];
    }
    if (left == MERGE_SECTION) {
        FinishScratch &finish = scratch.finish;
        finish_section(finish.records, finish.last, a, section_of(a.tensors[tensor], index), tensor,
                       (Record *)a.chunk_parts, a.records + tensor, [&] {
                           if (threadIdx.x == 0) unscale_record(a, tensor);
                       });
    }
}

DEVICE void measure_run(MeasureScratch &scratch, const StepArguments &a, const Run &run) {
    for (u32 index = run.begin;; index++) {
        ChunkScratch &scratch_of_chunk = scratch.chunks[index % 2];
        u32 tensor = 0;
        Chunk chunk = {};
        if (index < run.end) {
            tensor = a.chunk_tensors[index];
            chunk = chunk_to_measure(a, index, tensor);
            scratch_of_chunk.halves[threadIdx.x] = fast_lane(chunk, share_of_thread());
        }
        BARRIER();
        if (index > run.begin) settle(scratch, a, run, index - 1);
        if (index == run.end) return;
        if (threadIdx.x / WARP != index % WARPS) continue;
        Totals totals = block_totals(scratch_of_chunk.halves);
        if (threadIdx.x % WARP != 0) continue;
        Measured &measured = scratch_of_chunk.measured;
        bool is_ordinary = set_ordinary(measured, chunk, totals);
        scratch.left[index % 2] = is_ordinary ? put_chunk(scratch.sums, a, run, index, tensor, measured.record) : READ_AGAIN;
    }
}

// The tensors of one tile at most, from a chunk on: a warp takes one, and marks it if it is not ordinary. Their chunks
// have one column, and what the others would add is 0.
DEVICE void measure_small(MeasureScratch &scratch, const StepArguments &a, u32 first, u32 end) {
    u32 warp = threadIdx.x / WARP, marked = 0;
    for (u32 index = first + blockIdx.x * WARPS + warp; index < end; index += gridDim.x * WARPS) {
        u32 tensor = a.chunk_tensors[index];
        Chunk chunk = chunk_to_measure(a, index, tensor);
        Lane none = {{}, no_scan(magnitude_mask(chunk.dtype))};
        Totals totals = warp_totals(small_lane(chunk) + none, none, none, none);
        if (threadIdx.x % WARP != 0) continue;
        Measured &measured = scratch.small[warp];
        if (set_ordinary(measured, chunk, totals)) {
            put_record(scratch.sums, a, tensor, measured.record);
        } else {
            a.records[tensor].count = MARK;
            marked = 1;
        }
    }
    if (threadIdx.x % WARP == 0) scratch.has_marked[warp] = marked;
}

// The marked ones of those.
DEVICE void measure_marked(MeasureScratch &scratch, const StepArguments &a, u32 first, u32 end) {
    u32 any = 0;
    for (u32 warp = 0; warp < WARPS; warp++) any |= scratch.has_marked[warp];
    if (!any) return;
    ChunkScratch &chunk = scratch.chunks[0];
    for (u32 block = first + blockIdx.x * WARPS; block < end; block += gridDim.x * WARPS) {
        for (u32 index = block; index < block + WARPS && index < end; index++) {
            u32 tensor = a.chunk_tensors[index];
            if (load_fresh((const u64 *)&a.records[tensor].count).x != MARK) continue;
            // As though it had a NaN: with none the sums are the same.
            if (threadIdx.x == 0) chunk.measured.directions.nonfinite = 1;
            BARRIER();
            measure_again(chunk, chunk_to_measure(a, index, tensor));
            if (threadIdx.x == 0) put_record(scratch.sums, a, tensor, chunk.measured.record);
            BARRIER();
        }
    }
}

KERNEL(STEP_THREADS, 2) gradprobe_measure(StepArguments a) {
    SHARED(MeasureScratch, scratch);
    u64 *of_block = (u64 *)&scratch.sums, *of_step = (u64 *)a.sums;
    if (threadIdx.x < STEP_WORDS) of_block[threadIdx.x] = 0;
    BARRIER();
    // Weights come first, so that gradients are what L2 holds when the clip begins.
    for (u32 list = a.weights + 1; list-- > 0;) {
        u32 first = list * a.chunk_count, small = first + a.large_chunks, end = first + a.chunk_count;
        measure_small(scratch, a, small, end);
        Run run = run_of_block(a.large_chunks);
        measure_run(scratch, a, {first + run.begin, first + run.end});
        BARRIER(); // the records are there for the block, and the scratch is free
        measure_marked(scratch, a, small, end);
        BARRIER(); // the scratch is free for the gradients
    }
    if (a.sums && threadIdx.x < STEP_WORDS && of_block[threadIdx.x] != 0) {
        atomicAdd(&of_step[threadIdx.x], of_block[threadIdx.x]);
    }
    BARRIER(); // what all threads have written is released by the first
    if (!last_of(scratch.finish.last, a.tensors_done, gridDim.x)) return;
    if (!a.sums) return;
    // With nothing to wait for other ranks for, what they add up to is that of the step before.
    if (!a.is_part) take_check(scratch.finish, a);
    if (a.check) add_state(scratch.finish, a);
    if (a.is_part) {
        leave_step(scratch.finish, a);
    } else {
        finish_step(scratch.finish, a);
    }
}
