// Measure: every statistic of every tensor, the norms, the coefficient and the flags, in one launch.
//
// Blocks take chunks in turn, whatever their number, so that no bit depends on the grid. A chunk's record goes to its
// own slot; the last block to finish a span of chunks merges their slots in index order, the last span of a tensor
// those of the spans, and the last tensor finishes the step. No float is ever added atomically.
//
// Reads each element once: n·size bytes, and a record and 4 bytes a chunk of 32 Ki elements.
#include "chunk.cuh"
#include "finish.cuh"

struct MeasureScratch {
    ChunkScratch chunk;
    FinishScratch finish;
};

// The i-th chunk to be measured. Weights come first, so that gradients are what L2 holds when the clip begins.
DEVICE u32 chunk_at(const StepArguments &a, u32 i) {
    return a.weights == 0 ? i : i < a.chunk_count ? i + a.chunk_count : i - a.chunk_count;
}

// A chunk of the gradients or weights. These are scaled by nothing.
DEVICE Chunk chunk_to_measure(const StepArguments &a, u32 index, u32 tensor) {
    Chunk chunk = chunk_of(a, index, tensor);
    return a.loss_scale && tensor < a.tensor_count ? with_scaled_threshold(chunk, *a.loss_scale) : chunk;
}

KERNEL(4) gradprobe_measure(StepArguments a) {
    SHARED(MeasureScratch, scratch);
    u32 chunks = a.chunk_count << a.weights;
    bool finished = chunks == 0 && blockIdx.x == 0;
    for (u32 i = blockIdx.x; i < chunks; i += gridDim.x) {
        u32 index = chunk_at(a, i), tensor = a.chunk_tensors[index];
        measure_chunk(scratch.chunk, chunk_to_measure(a, index, tensor), [&] {
            if (i + gridDim.x < chunks && threadIdx.x >= WARP) {
                u32 next = chunk_at(a, i + gridDim.x);
                prefetch_row(chunk_of(a, next, a.chunk_tensors[next]));
            }
        });
        // Every way through what follows passes a barrier, behind which the scratch of the chunk is free for the next
        // one; that of the finish is not touched before the next chunk's barriers.
        FinishScratch &finish = scratch.finish;
        merge_chunk(finish.records, finish.last, a, scratch.chunk.record, index, tensor, (Record *)a.chunk_parts,
                    a.records + tensor, [&] {
                        if (a.loss_scale && tensor < a.tensor_count && threadIdx.x == 0) {
                            unscale(a.records[tensor], divisor_of(a.loss_scale->scale));
                        }
                        // The last block to get here has no chunk left.
                        finished = last_of(finish.last, a.tensors_done, a.busy_tensors);
                    });
    }
    if (finished && !a.is_part) finish_step(scratch.finish, a);
}
