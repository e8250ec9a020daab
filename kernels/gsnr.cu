// GSNR: from the state of the tracked elements to one record a tensor.
#include "ratios.cuh"

// What a track tells without the elements.
DEVICE GsnrRecord record_of(const Track &track) {
    GsnrRecord r = {};
    r.steps = track.steps;
    r.skipped = track.skipped;
    r.median_or_nan = no_median();
    r.norm_mean = track.norm_mean;
    r.norm_deviations = track.norm_deviations;
    return r;
}

// What is tracked is what is wanted.
struct TrackedSource {
    static DEVICE float deviation(float, float spread) { return spread; }
    static DEVICE const GsnrSums &whole(const GsnrSums &sums) { return sums; }
};

struct GsnrArguments : Common {
    const Track *tracks; // of the tensors
    const float *means;  // of the tracked elements
    const float *deviations;
    GsnrRecord *gsnr_records;
    u32 *bins; // BINS a tracked tensor; 0 between launches
};
static_assert(sizeof(GsnrArguments) == 112, "src/gsnr/room.rs");

KERNEL(LANES, 4) gradprobe_gsnr(GsnrArguments a) {
    SHARED(GsnrScratch, scratch);
    // Tensors with nothing to add up have no chunk that would bring them here. Without a second step there is no
    // variance, and nothing is defined.
    for (u32 i = blockIdx.x * LANES + threadIdx.x; i < a.tensor_count; i += gridDim.x * LANES) {
        const Track &track = a.tracks[i];
        if (track.offset == UNTRACKED) continue;
        if (track.steps < 2) {
            a.gsnr_records[i] = record_of(track);
        } else if (a.tensors[i].chunk_count == 0) {
            a.gsnr_records[i] = with_sums(record_of(track), 0, scaling_of(track), GsnrSums{}, no_median());
        }
    }
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        const Track &track = a.tracks[tensor];
        if (track.offset == UNTRACKED || track.steps < 2) continue;
        reduce(scratch, a, index, tensor, a.bins + (u64)track.slot * BINS, a.gsnr_records, a.means + track.offset,
               a.deviations + track.offset, TrackedSource{}, scaling_of(track), record_of(track));
    }
}
