// The kernels, compiled for the host, a few wrong ones on which the emulation itself is tested, and one such as users
// write, with an epilogue of statistics.
#define GRADPROBE_SIMT
#include <algorithm>
#include "described.hpp"
#include "kernels.inc" // all of kernels/*.cu
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
static void neighbours(u32 *words, bool barrier) {
    SHARED(Seen, seen);
    seen.lane[threadIdx.x] = threadIdx.x;
    if (barrier) BARRIER();
    words[threadIdx.x] = seen.lane[(threadIdx.x + 1) % LANES];
}
KERNEL(LANES, 1) gradprobe_simt_with_barrier(u32 *words) { neighbours(words, true); }
KERNEL(LANES, 1) gradprobe_simt_missing_barrier(u32 *words) { neighbours(words, false); }
KERNEL(LANES, 1) gradprobe_simt_divergent_barrier(u32 *) {
    if (threadIdx.x < 100) BARRIER();
}
KERNEL(LANES, 1) gradprobe_simt_two_barriers(u32 *) {
    if (threadIdx.x < 64) {
        BARRIER();
    } else {
        BARRIER();
    }
}
KERNEL(LANES, 1) gradprobe_simt_divergent_shuffle(u32 *) {
    if (threadIdx.x % WARP < 16) SHUFFLE_DOWN(1u, 1u);
}
KERNEL(LANES, 1) gradprobe_simt_misaligned(u32 *words) { load_words4((const u8 *)words + 4); }
KERNEL(LANES, 1) gradprobe_simt_unset_shared(u32 *words) {
    SHARED(u32, word);
    if (threadIdx.x == 0) words[blockIdx.x] = word;
    word = 0;
}

static const SimtKernel kernels[] = {
    GRADPROBE_KERNELS
    DESCRIBED(gradprobe_simt_with_barrier),
    DESCRIBED(gradprobe_simt_missing_barrier),
    DESCRIBED(gradprobe_simt_divergent_barrier),
    DESCRIBED(gradprobe_simt_two_barriers),
    DESCRIBED(gradprobe_simt_divergent_shuffle),
    DESCRIBED(gradprobe_simt_misaligned),
    DESCRIBED(gradprobe_simt_unset_shared),
    DESCRIBED(gradprobe_simt_epilogue),
    DESCRIBED(gradprobe_simt_epilogue_tiles),
    DESCRIBED(gradprobe_simt_epilogue_merge),
};

extern "C" const SimtKernel *gradprobe_simt_kernel(u32 index) { return kernel_at(kernels, index); }
