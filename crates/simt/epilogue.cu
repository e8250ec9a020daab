// Kernels such as users write, with statistics in their epilogue: for the tests, on the host and by nvcc.
#include "../../kernels/arguments.cuh"
#include "../../kernels/include/gradprobe_epilogue.cuh"

// A user's kernel: writes the negated `means`, `window` of them, to `deviations`, and its statistics to `records`, a slot a
// block. Blocks have runs of the buffer, or every gridDim-th tile of LANES elements.
static DEVICE void epilogue(Arguments a, bool tiles) {
    SHARED(gradprobe::BlockScratch<LANES>, scratch);
    gradprobe::Accumulator statistics((float)a.clip_threshold);
    u64 length = a.window, run = (length + gridDim.x - 1) / gridDim.x;
    u64 begin = tiles ? (u64)blockIdx.x * LANES : blockIdx.x * run;
    u64 end = tiles || begin + run > length ? length : begin + run;
    for (u64 i = begin + threadIdx.x; i < end; i += tiles ? (u64)gridDim.x * LANES : LANES) {
        a.deviations[i] = -a.means[i];
        statistics.add(a.deviations[i], tiles ? i : i - begin);
    }
    gradprobe::write_record<LANES>(statistics, threadIdx.x, scratch, (gradprobe_record *)a.records + blockIdx.x);
}
KERNEL(1) gradprobe_simt_epilogue(Arguments a) { epilogue(a, false); }
KERNEL(1) gradprobe_simt_epilogue_tiles(Arguments a) { epilogue(a, true); }

// Merges the `window` records there, and writes the result behind them: as of runs, then as of parts of one buffer.
KERNEL(1) gradprobe_simt_epilogue_merge(Arguments a) {
    if (threadIdx.x != 0) return;
    gradprobe_record *slots = (gradprobe_record *)a.records;
    gradprobe_record runs = gradprobe::empty_record(), parts = runs;
    for (u32 i = 0; i < a.window; i++) {
        runs = gradprobe::merge(runs, slots[i]);
        parts = gradprobe::merge_parts(parts, slots[i]);
    }
    slots[a.window] = runs;
    slots[a.window + 1] = parts;
}
