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

KERNEL(LANES, 4) gradprobe_adam(AdamArguments a) {
    SHARED(GsnrScratch, scratch);
    const AdamStep &step = a.step;
    GsnrRecord known = {};
    known.steps = step.steps;
    double mean_scale = step.mean_scale, square_scale = step.square_scale;
    auto element = [=](double exp_avg, double exp_avg_sq) {
        double mean = exp_avg * mean_scale, square = mean * mean;
        return Spread{square, exp_avg_sq * square_scale - square};
    };
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        AdamMoments of = a.moments[tensor];
        if (!of.exp_avg) continue; // given none
        reduce(scratch, a, index, tensor, a.bins + (u64)tensor * BINS, a.gsnr_records, of.exp_avg, of.exp_avg_sq, element,
               step.scaling, known);
    }
}
