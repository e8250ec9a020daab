// Kernels such as users write, with statistics in their epilogue: for the tests, on the host and by nvcc.
#include "../../kernels/platform.cuh"
#include "../../kernels/spec.cuh"
#include "../../kernels/include/gradprobe_epilogue.cuh"

// Writes `length` negated elements, and their statistics to `slots`, one a block. Blocks have runs of the buffer, or every
// gridDim-th tile of LANES elements.
static DEVICE void epilogue(const float *from, float *to, u64 length, float dead_threshold, gradprobe_record *slots,
                            bool tiles) {
    SHARED(gradprobe::BlockScratch<LANES>, scratch);
    gradprobe::Accumulator statistics(dead_threshold);
    u64 run = (length + gridDim.x - 1) / gridDim.x;
    u64 begin = tiles ? (u64)blockIdx.x * LANES : blockIdx.x * run;
    u64 end = tiles || begin + run > length ? length : begin + run;
    for (u64 i = begin + threadIdx.x; i < end; i += tiles ? (u64)gridDim.x * LANES : LANES) {
        to[i] = -from[i];
        statistics.add(to[i], tiles ? i : i - begin);
    }
    gradprobe::write_record<LANES>(statistics, threadIdx.x, scratch, slots + blockIdx.x);
}
KERNEL(LANES, 1) gradprobe_simt_epilogue(const float *from, float *to, u64 length, float dead_threshold,
                                  gradprobe_record *slots) {
    epilogue(from, to, length, dead_threshold, slots, false);
}
KERNEL(LANES, 1) gradprobe_simt_epilogue_tiles(const float *from, float *to, u64 length, float dead_threshold,
                                        gradprobe_record *slots) {
    epilogue(from, to, length, dead_threshold, slots, true);
}

// Merges `count` records, and writes the result behind them: as of runs, then as of parts of one buffer.
KERNEL(LANES, 1) gradprobe_simt_epilogue_merge(gradprobe_record *slots, u32 count) {
    if (threadIdx.x != 0) return;
    gradprobe_record runs = gradprobe::empty_record(), parts = runs;
    for (u32 i = 0; i < count; i++) {
        runs = gradprobe::merge(runs, slots[i]);
        parts = gradprobe::merge_parts(parts, slots[i]);
    }
    slots[count] = runs;
    slots[count + 1] = parts;
}
