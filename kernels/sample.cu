// Sample: a few elements of the step's gradients as f32, into a ring of the last steps, in one launch. src/samples/mod.rs says
// which, and what is made of them.
#include "chunk.cuh"

KERNEL(8) gradprobe_sample(Arguments a) {
    const Samples &samples = *a.samples;
    u64 step = a.outputs->step, slot = (step - 1) % samples.steps;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        samples.numbers[slot] = a.outputs->found_inf != 0.0f ? step | SAMPLE_NONFINITE : step;
    }
    for (u32 k = blockIdx.x * LANES + threadIdx.x; k < samples.count; k += gridDim.x * LANES) {
        SamplePlace place = samples.places[k];
        u32 dtype = a.tensors[place.tensor].dtype;
        u64 first = a.addresses[place.tensor], address = first + place.index * (dtype == DTYPE_F32 ? 4 : 2);
        // NaN of a tensor that is absent.
        samples.ring[slot * samples.count + k] =
            first ? widen(dtype, chunk_element({address, 1, dtype, 0}, 0)) : bits_to_float(0x7fc00000u);
    }
}
