// One chunk clipped in place: elements times a coefficient, or between two limits, rounded to their type.
//
// Elements do not depend on each other, so 16-byte accesses begin where the memory allows, wherever a tensor begins, and
// a few elements at both ends go alone. Sixteen bytes that do not change are not written.
#pragma once
#include "elements.cuh"

// 16-byte loads a thread has in flight. With one, which 2048 threads make 32 KiB of a multiprocessor, an H200's memory
// would wait: it needs 48 KiB.
constexpr u32 TOGETHER = 4;

// What is done to each element of a tensor.
struct Clipping {
    float coefficient;
    float limit; // of magnitudes, or Inf
    u32 nonfinite_kept; // which bits a NaN or Inf keeps: none when those become 0, else all
};

// What becomes of one element's bits. ZERO_OR_CLAMP keeps what is rare out of the common case.
template <typename E, bool ZERO_OR_CLAMP> DEVICE u32 clipped(u32 bits, const Clipping &how) {
    float product = E::widen(bits) * how.coefficient;
    if (ZERO_OR_CLAMP) {
        if (product > how.limit) product = how.limit;
        if (product < -how.limit) product = -how.limit;
    }
    // A NaN gets no payload, so that its bits do not depend on the machine. By masks, here and below: a choice became a
    // branch for each element, or the loop twice.
    u32 nan = product == product ? 0 : 0xffffffffu;
    u32 after = (E::narrow(product) & ~nan) | (E::QUIET_NAN & nan);
    if (!ZERO_OR_CLAMP) return after;
    return after & (magnitude<E>(bits) < E::INFINITY_MAGNITUDE ? 0xffffffffu : how.nonfinite_kept);
}

template <typename E, bool ZERO_OR_CLAMP> DEVICE void clip_chunk(const Chunk &chunk, const Clipping &how) {
    typedef typename E::Bits Bits;
    constexpr u32 SIZE = sizeof(Bits), VECTOR = 16 / SIZE;
    u32 to_boundary = (u32)(-chunk.address % 16) / SIZE;
    u32 head = to_boundary < chunk.length ? to_boundary : chunk.length;
    u32 vectors = (chunk.length - head) / VECTOR;
    u64 vector = chunk.address + head * SIZE;

    u32 alone = chunk.length - vectors * VECTOR;
    if (threadIdx.x < alone) {
        u32 index = threadIdx.x < head ? threadIdx.x : threadIdx.x + vectors * VECTOR;
        Bits *element = (Bits *)chunk.address + index;
        Bits after = (Bits)clipped<E, ZERO_OR_CLAMP>(*element, how);
        if (*element != after) *element = after;
    }
    auto clip = [&](u64 address, const Words4 &before) {
        Words4 after = before;
        for (u32 slot = 0; slot < VECTOR; slot++) {
            E::set(after.word, slot, clipped<E, ZERO_OR_CLAMP>(E::element(before.word, slot), how));
        }
        u32 changed = 0;
        for (u32 i = 0; i < 4; i++) changed |= before.word[i] ^ after.word[i];
        if (changed) store_words4(address, after);
    };
    u32 i = threadIdx.x;
    for (; i + (TOGETHER - 1) * LANES < vectors; i += TOGETHER * LANES) {
        Words4 before[TOGETHER];
        for (u32 j = 0; j < TOGETHER; j++) before[j] = load_words4_to_change(vector + (i + j * LANES) * 16);
        for (u32 j = 0; j < TOGETHER; j++) clip(vector + (i + j * LANES) * 16, before[j]);
    }
#pragma unroll 1
    for (; i < vectors; i += LANES) clip(vector + i * 16, load_words4_to_change(vector + i * 16));
}
