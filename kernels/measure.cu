// Measure: every statistic of every tensor, the norms, the coefficient and the flags, in one launch.
//
// Blocks take chunks in turn, whatever their number, so that no bit depends on the grid. A chunk's record goes to its
// own slot; the last block to finish a span of chunks merges their slots in index order, the last span of a tensor
// those of the spans, and the last tensor finishes the step. No float is ever added atomically.
//
// Reads each element once: n·size bytes, and 80 + 4 bytes a chunk of 32 Ki elements.
#include "chunk.cuh"
#include "finish.cuh"

struct MeasureScratch {
    ChunkScratch chunk;
    FinishScratch finish;
};

KERNEL(4) gradprobe_measure(Arguments a) {
    SHARED(MeasureScratch, scratch);
    bool finished = a.chunk_count == 0 && blockIdx.x == 0;
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        measure_chunk(scratch.chunk, chunk_of(a, index, tensor), [&] {
            u32 next = index + gridDim.x;
            if (next < a.chunk_count && threadIdx.x >= WARP) prefetch_row(chunk_of(a, next, a.chunk_tensors[next]));
        });
        // Every way through what follows passes a barrier, behind which the scratch of the chunk is free for the next
        // one; that of the finish is not touched before the next chunk's barriers.
        FinishScratch &finish = scratch.finish;
        merge_chunk(finish.records, finish.last, a, scratch.chunk.record, index, tensor, (Record *)a.chunk_parts,
                    a.records + tensor, [&] {
                        u32 *tensors_done = a.done + a.chunk_count + a.tensor_count;
                        // The last block to get here has no chunk left.
                        finished = last_of(finish.last, tensors_done, a.busy_tensors);
                    });
    }
    if (finished) finish_step(scratch.finish, a);
}
