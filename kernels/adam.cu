// Adam: the records of GSNR from the two moments that an optimizer keeps of each gradient, with no state of our own.
// src/gsnr/adam.rs derives what is computed.
#include "ratios.cuh"

struct AdamArguments : Common {
    AdamStep step;
    const AdamMoments *moments; // of the tensors
    GsnrRecord *gsnr_records;
    u32 *bins; // BINS a tensor; 0 between launches
};
static_assert(sizeof(AdamArguments) == 144, "src/gsnr/moments.rs");

// v̂ − m̂² in units of the square_scale: what m² and v times spread_scale leave, each in a pair of f32, of which the lower
// holds what the upper rounded off.
struct AdamSource {
    double square_scale, spread_scale;
    float scale, rest;

    DEVICE AdamSource(const AdamStep &step)
        : square_scale(step.square_scale), spread_scale(step.spread_scale), scale((float)spread_scale),
          rest((float)(spread_scale - (double)scale)) {}

    DEVICE float deviation(float exp_avg, float exp_avg_sq) const {
        float square = exp_avg * exp_avg, spread = exp_avg_sq * scale;
        float square_rest = fmaf(exp_avg, exp_avg, -square);
        float spread_rest = fmaf(exp_avg_sq, rest, fmaf(exp_avg_sq, scale, -spread));
        return spread - square + (spread_rest - square_rest);
    }
    DEVICE GsnrSums whole(GsnrSums sums) const {
        sums.spreads = square_scale * (spread_scale * sums.spreads - sums.squared_means);
        sums.squared_means *= square_scale;
        return sums;
    }
};

KERNEL(LANES, 4) gradprobe_adam(AdamArguments a) {
    SHARED(GsnrScratch, scratch);
    const AdamStep &step = a.step;
    GsnrRecord known = {};
    known.steps = step.steps;
    AdamSource source(step);
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        AdamMoments of = a.moments[tensor];
        if (!of.exp_avg) continue; // given none
        reduce(scratch, a, index, tensor, a.bins + (u64)tensor * BINS, a.gsnr_records, of.exp_avg, of.exp_avg_sq, source,
               step.scaling, known);
    }
}
