// Adam: the records of GSNR from the two moments that an optimizer keeps of each gradient, with no state of our own.
// src/gsnr/adam.rs derives what is computed.
#include "ratios.cuh"

KERNEL(4) gradprobe_adam(Arguments a) {
    SHARED(GsnrScratch, scratch);
    const AdamStep &step = *a.adam;
    const AdamMoments *moments = (const AdamMoments *)(a.adam + 1);
    GsnrRecord known = {};
    known.steps = step.steps;
    double mean_scale = step.mean_scale, square_scale = step.square_scale;
    auto element = [=](double exp_avg, double exp_avg_sq) {
        double mean = exp_avg * mean_scale, square = mean * mean;
        return Spread{square, exp_avg_sq * square_scale - square};
    };
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        AdamMoments of = moments[tensor];
        if (!of.exp_avg) continue; // given none
        reduce(scratch, a, index, tensor, tensor, of.exp_avg, of.exp_avg_sq, element, step.scaling, known);
    }
}
