// Fingerprint: an integer of the bits of each chunk, so that ranks can tell whether their replicas are the same without
// sending them; and of all of them, times each tensor's factors, the words that all ranks add up. src/ranks/replicas.rs
// documents both, with the same operations.
//
// A packet's words, times an odd number each, are added up and mixed with the place of the packet by a function that gives no
// value twice; packets and chunks add up. So one changed bit always changes the sum, and no order, grid or alignment is in it.
//
// Reads each element once: n·size bytes.
#include "parts.cuh"

// Per packet of PACKET elements, at most 8 words.
constexpr u64 PLACE_FACTOR = 0x9e3779b97f4a7c15ull;
constexpr u64 MIX_FACTOR = 0xbf58476d1ce4e5b9ull;
DEVICE u32 word_factor(u32 i) { return 0x9e3779b1u + 0x3c6ef372u * i; }

// What a tensor's fingerprint is multiplied by before all ranks are added up.
struct Factors {
    u64 rank[2]; // so that replicas that are the same add up to 0
    u64 tensor;
    u64 reserved;
};

struct FingerprintArguments : Common {
    u64 *fingerprints; // of the chunks
    const Factors *factors; // of the tensors, and behind them of their weights
    CheckSums *check;
    u32 weights; // 1: of them too
    u32 reserved;
};
static_assert(sizeof(FingerprintArguments) == 104, "src/ranks/replicas.rs");

// What a lane adds to the fingerprint of a chunk, whose first packet has this place in its tensor.
template <typename E> DEVICE u64 fingerprint_of(const Chunk &chunk, u64 place) {
    constexpr u32 TOGETHER = 4 * 4 / E::WORDS; // 64 bytes in flight, as the histogram has
    const typename E::Bits *elements = (const typename E::Bits *)chunk.address;
    u64 all = 0;
    auto add = [&](u32 first, const u32(*words)[E::WORDS]) {
#pragma unroll
        for (u32 p = 0; p < TOGETHER; p++) {
            u64 sum = 0;
#pragma unroll
            for (u32 i = 0; i < E::WORDS; i++) sum += (u64)words[p][i] * word_factor(i);
            u32 index = first + p * RUN;
            u64 mixed = (sum + (place + index / PACKET) * PLACE_FACTOR) * MIX_FACTOR;
            if (index < chunk.length) all += mixed ^ mixed >> 32;
        }
    };
    auto whole = [&](u32 first) {
        u32 words[TOGETHER][E::WORDS];
        load_packets_aligned<E, TOGETHER>(elements + first, words);
        LOADS_FIRST();
        add(first, words);
    };
    auto rest = [&](u32 first) {
        u32 words[TOGETHER][E::WORDS] = {};
        load_packets_guarded<E, TOGETHER, 1>(elements, first, chunk.length, words);
        add(first, words);
    };
    for_parts<TOGETHER>(chunk.length, chunk.address % 16 == 0, whole, rest);
    return all;
}

struct FingerprintScratch {
    u64 chunk[2]; // in turn
    u64 words[3];
};

KERNEL(LANES, 8) gradprobe_fingerprint(FingerprintArguments a) {
    SHARED(FingerprintScratch, scratch);
    if (threadIdx.x < 2) scratch.chunk[threadIdx.x] = 0;
    if (threadIdx.x < 3) scratch.words[threadIdx.x] = 0;
    BARRIER();
    Run run = run_of_block(a.chunk_count << a.weights);
    for (u32 index = run.begin; index < run.end; index++) {
        u32 tensor = a.chunk_tensors[index];
        Chunk chunk = chunk_of(a, index, tensor);
        u64 place = (u64)(index - a.tensors[tensor].first_chunk) * (CHUNK / PACKET), lane = 0;
#define FINGERPRINT(E) lane = fingerprint_of<E>(chunk, place)
        FOR_DTYPE(chunk.dtype, FINGERPRINT)
#undef FINGERPRINT
        for (u32 delta = WARP / 2; delta > 0; delta /= 2) lane += SHUFFLE_DOWN(lane, delta);
        if (threadIdx.x % WARP == 0) atomicAdd(&scratch.chunk[index % 2], lane);
        BARRIER();
        if (threadIdx.x != 0) continue;
        const Factors &factors = a.factors[tensor];
        u64 all = scratch.chunk[index % 2];
        scratch.chunk[index % 2] = 0; // for the chunk after the next, which a barrier parts from this
        a.fingerprints[index] = all;
        scratch.words[0] += all * factors.rank[0];
        scratch.words[1] += all * factors.rank[1];
        scratch.words[2] += all * factors.rank[0] * factors.tensor;
    }
    BARRIER();
    if (threadIdx.x < 3 && scratch.words[threadIdx.x] != 0) atomicAdd(&a.check->replicas[threadIdx.x], scratch.words[threadIdx.x]);
}
