// Measure: every statistic of every tensor, the norms, the coefficient and the flags, in one launch.
//
// Blocks take chunks in turn, whatever their number, so that no bit depends on the grid. A chunk's record goes to its
// own slot; the last block to finish a tensor merges that tensor's slots in index order, and the last tensor finishes
// the step. No float is ever added atomically.
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
    if (a.chunk_count == 0 && blockIdx.x == 0) finish_step(scratch.finish, a);
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        measure_chunk(scratch.chunk, chunk_of(a, index, tensor));
        u32 chunk_count = a.tensors[tensor].chunk_count;
        // A tensor of one chunk needs no merge.
        bool tensor_done = chunk_count == 1;
        if (threadIdx.x == 0) (tensor_done ? a.records[tensor] : a.chunk_records[index]) = scratch.chunk.record;
        if (!tensor_done && last_of(scratch.finish, a.chunks_done + tensor, chunk_count)) {
            finish_tensor(scratch.finish, a, tensor, chunk_count);
            tensor_done = true;
        }
        if (tensor_done && last_of(scratch.finish, a.chunks_done + a.tensor_count, a.busy_tensors)) {
            finish_step(scratch.finish, a);
        }
        BARRIER(); // the scratch has been read before the next chunk writes it
    }
}
