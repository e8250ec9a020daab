// The kernels, compiled for the host, a few wrong ones on which the emulation itself is tested, and one such as users
// write, with an epilogue of statistics.
#define GRADPROBE_SIMT
#include <algorithm>
#include "../../kernels/measure.cu"
#include "../../kernels/clip.cu"
#include "../../kernels/update.cu"
#include "../../kernels/gsnr.cu"
#include "../../kernels/histogram.cu"
#include "../../kernels/dot.cu"
#include "../../kernels/adaptive.cu"
#include "../../kernels/sample.cu"
#include "../../kernels/adam.cu"
#include "../../kernels/merge.cu"
#include "epilogue.cu"

thread_local SimtState gradprobe_simt_state;

extern "C" {
void gradprobe_simt_enter(u32 thread, u32 block, u32 grid, void *shared, u64 shared_bytes) {
    gradprobe_simt_state = {thread, block, grid, shared, shared_bytes};
}
u64 gradprobe_simt_shared_bytes() {
    return std::max({sizeof(MeasureScratch), sizeof(GsnrScratch), sizeof(HistogramScratch), sizeof(DotScratch)});
}
}

// Each lane publishes its index and reads its neighbour's: right with a barrier between, and up to the order of the
// threads without.
struct Seen {
    u32 lane[LANES];
};
static void neighbours(Arguments a, bool barrier) {
    SHARED(Seen, seen);
    seen.lane[threadIdx.x] = threadIdx.x;
    if (barrier) BARRIER();
    ((u32 *)a.records)[threadIdx.x] = seen.lane[(threadIdx.x + 1) % LANES];
}
KERNEL(1) gradprobe_simt_with_barrier(Arguments a) { neighbours(a, true); }
KERNEL(1) gradprobe_simt_missing_barrier(Arguments a) { neighbours(a, false); }
KERNEL(1) gradprobe_simt_divergent_barrier(Arguments) {
    if (threadIdx.x < 100) BARRIER();
}
KERNEL(1) gradprobe_simt_two_barriers(Arguments) {
    if (threadIdx.x < 64) {
        BARRIER();
    } else {
        BARRIER();
    }
}
KERNEL(1) gradprobe_simt_divergent_shuffle(Arguments) {
    if (threadIdx.x % WARP < 16) SHUFFLE_DOWN(1u, 1u);
}
KERNEL(1) gradprobe_simt_misaligned(Arguments a) { load_words4((const u8 *)a.records + 4); }
KERNEL(1) gradprobe_simt_unset_shared(Arguments a) {
    SHARED(u32, word);
    if (threadIdx.x == 0) ((u32 *)a.records)[blockIdx.x] = word;
    word = 0;
}
