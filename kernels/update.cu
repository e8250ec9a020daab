// Update: Welford's mean and squared deviations of every tracked element, after the measurement of the same step.
//
// A launch of its own and not a part of measure: a step with a NaN anywhere in a tensor is merged into none of its
// elements, so that nothing may be written before the whole tensor has been read, and f32 sums cannot be taken back.
// Chunks are taken from the last to the first, since the last ones measured are the ones still in L2: of a model that
// fits there, no gradient is read from memory twice.
//
// Reads n·size bytes, and reads and writes 8 for each element. The last block counts the step of every tensor.
#include "finish.cuh"

template <typename E> DEVICE void update_chunk(const Chunk &chunk, float *means, float *deviations, u32 steps,
                                              float unscale) {
    const typename E::Bits *elements = (const typename E::Bits *)chunk.address;
    float share = 1.0f / (float)steps, rest = (float)(steps - 1) / (float)steps;
    // The state goes on to a whole packet; what lies behind the last element is 0, and stays so.
    auto update = [&](u32 index, const u32 *words) {
        Floats8 mean = {}, deviation = {};
        if (steps > 1) {
            mean = load_floats(means + index);
            deviation = load_floats(deviations + index);
        }
#pragma unroll
        for (u32 slot = 0; slot < PACKET; slot++) {
            u32 &m = mean.half[slot / 4].word[slot % 4], &d = deviation.half[slot / 4].word[slot % 4];
            float x = E::widen(E::element(words, slot)) * unscale, old = bits_to_float(m), gap = x - old;
            // The first is taken as it is: x·1 + 0 would be the same but for -0.
            m = float_to_bits(steps == 1 ? x : fmaf(gap, share, old));
            d = float_to_bits(steps == 1 ? 0.0f : fmaf(gap * rest, gap, bits_to_float(d)));
        }
        store_floats(means + index, mean);
        store_floats(deviations + index, deviation);
    };
    u32 whole = chunk.address % 16 == 0 ? chunk.length / PACKET * PACKET : 0, index = threadIdx.x * PACKET;
#pragma unroll 1
    for (; index < whole; index += LANES * PACKET) {
        u32 words[1][E::WORDS];
        load_packets_aligned<E, 1>(elements + index, words);
        update(index, words[0]);
    }
    // What is left of an aligned chunk, and all of another, whose state is most of what is read.
#pragma unroll 1
    for (; index < chunk.length; index += LANES * PACKET) {
        u32 words[E::WORDS] = {};
        load_packet_scalar<E>(elements + index, chunk.length - index, words);
        update(index, words);
    }
}

struct UpdateArguments : Common {
    Track *tracks; // of the tensors
    float *means;  // of the tracked elements
    float *deviations;
    u32 window; // steps after which tracking starts anew; 0: never
    u32 reserved;
};
static_assert(sizeof(UpdateArguments) == 104, "src/gsnr/room.rs");

// Whether a tensor has no gradient in this step, which is then no step of it.
DEVICE bool is_absent(const UpdateArguments &a, u32 tensor) { return !a.addresses[tensor] && a.tensors[tensor].length > 0; }

KERNEL(LANES, 8) gradprobe_update(UpdateArguments a) {
    SHARED(u32, last);
    float unscale = (float)(1.0 / divisor_of(a.outputs->loss_scale));
    for (u32 from_end = blockIdx.x; from_end < a.chunk_count; from_end += gridDim.x) {
        u32 index = a.chunk_count - 1 - from_end, tensor = a.chunk_tensors[index];
        const Track &track = a.tracks[tensor];
        if (track.offset == UNTRACKED || is_absent(a, tensor) || !is_merged(a.records[tensor])) continue;
        u32 steps = is_full(track, a.window) ? 1 : track.steps + 1;
        Chunk chunk = chunk_of(a, index, tensor);
        u64 first = track.offset + (u64)(index - a.tensors[tensor].first_chunk) * CHUNK;
#define UPDATE(E) update_chunk<E>(chunk, a.means + first, a.deviations + first, steps, unscale)
        FOR_DTYPE(chunk.dtype, UPDATE)
#undef UPDATE
    }
    // The tracks are brought up to date when all blocks have read them. Not by measure: the code cost it a quarter of
    // the loads it has in flight.
    BARRIER();
    if (!last_of(last, a.tensors_done, gridDim.x)) return;
    for (u32 i = threadIdx.x; i < a.tensor_count; i += LANES) {
        if (a.tracks[i].offset != UNTRACKED && !is_absent(a, i)) track_step(a.tracks[i], a.records[i], a.window);
    }
}
