// Sample: a few elements of the step's gradients as f32, into a ring of the last steps, in one launch. src/samples/mod.rs says
// which, and what is made of them.
#include "chunk.cuh"

// An element to be sampled.
struct SamplePlace {
    u64 index;
    u32 tensor, reserved;
};
static_assert(sizeof(SamplePlace) == 16, "src/samples/mod.rs");
constexpr u64 SAMPLE_NONFINITE = 1ull << 63; // in the number of a step

struct SampleArguments : Common {
    const SamplePlace *places;
    u64 *numbers; // of the steps in the ring
    float *ring;
    u32 count, steps;
};
static_assert(sizeof(SampleArguments) == 104, "src/samples/room.rs");

KERNEL(LANES, 8) gradprobe_sample(SampleArguments a) {
    u64 step = a.outputs->step, slot = (step - 1) % a.steps;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        a.numbers[slot] = a.outputs->found_inf != 0.0f ? step | SAMPLE_NONFINITE : step;
    }
    for (u32 k = blockIdx.x * LANES + threadIdx.x; k < a.count; k += gridDim.x * LANES) {
        SamplePlace place = a.places[k];
        u32 dtype = a.tensors[place.tensor].dtype;
        u64 first = a.addresses[place.tensor], address = first + place.index * (dtype == DTYPE_F32 ? 4 : 2);
        // NaN of a tensor that is absent.
        a.ring[slot * a.count + k] =
            first ? widen(dtype, chunk_element({address, 1, dtype, 0}, 0)) : bits_to_float(0x7fc00000u);
    }
}
