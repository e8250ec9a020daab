// Clip: every element times the coefficient, in place, rounded to its type; or non-finite elements zeroed; or nothing.
//
// What to do was decided by the measure kernel and is one word: when it says nothing, a block ends after one load.
// Chunks are taken from the last to the first, since the last ones measured are the ones still in L2. A packet that
// does not change is not written.
//
// Reads and writes each element once when it clips: 2·n·size bytes.
#include "elements.cuh"

// What becomes of one element's bits.
template <typename E> DEVICE u32 clipped(u32 bits, float coefficient, bool zero_nonfinite) {
    if (zero_nonfinite && magnitude<E>(bits) >= E::INFINITY_MAGNITUDE) return 0;
    float product = E::widen(bits) * coefficient;
    // A NaN gets no payload, so that its bits do not depend on the machine.
    return product == product ? E::narrow(product) : E::QUIET_NAN;
}

template <typename E> DEVICE void clip_chunk(const Chunk &chunk, float coefficient, bool zero_nonfinite) {
    typename E::Bits *elements = (typename E::Bits *)chunk.address;
    bool aligned = chunk.address % 16 == 0;
    for (u32 index = threadIdx.x * PACKET; index < chunk.length; index += LANES * PACKET) {
        if (aligned && index + PACKET <= chunk.length) {
            Words4 *packet = (Words4 *)(elements + index);
            for (u32 i = 0; i < E::WORDS / 4; i++) {
                Words4 before = packet[i], after = before;
                for (u32 slot = 0; slot < PACKET * 4 / E::WORDS; slot++) {
                    E::set(after.word, slot, clipped<E>(E::element(before.word, slot), coefficient, zero_nonfinite));
                }
                u32 changed = 0;
                for (u32 j = 0; j < 4; j++) changed |= before.word[j] ^ after.word[j];
                if (changed) packet[i] = after;
            }
        } else {
            for (u32 i = index; i < index + PACKET && i < chunk.length; i++) {
                u32 after = clipped<E>(elements[i], coefficient, zero_nonfinite);
                if (elements[i] != after) elements[i] = (typename E::Bits)after;
            }
        }
    }
}

KERNEL(8) gradprobe_clip(Arguments a) {
    u32 action = a.outputs->action;
    if (action == ACTION_NONE) return;
    float coefficient = a.outputs->coefficient;
    bool zero_nonfinite = action == ACTION_ZERO_AND_SCALE;
    for (u32 from_end = blockIdx.x; from_end < a.chunk_count; from_end += gridDim.x) {
        u32 index = a.chunk_count - 1 - from_end;
        Chunk chunk = chunk_of(a, index, a.chunk_tensors[index]);
#define CLIP_CHUNK(E) clip_chunk<E>(chunk, coefficient, zero_nonfinite)
        FOR_DTYPE(chunk.dtype, CLIP_CHUNK)
#undef CLIP_CHUNK
    }
}
