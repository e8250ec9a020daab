// Histogram: how many elements of each tensor have each exponent and upper two bits of the fraction, in one launch.
//
// An element's slot is the upper ten bits of its magnitude as f32: four to an octave. The slots of the exponent that
// only Inf and NaN have hold the counts of those, and of zeros. A block counts in shared memory, in u32, and adds to the
// tensor's u64 in global memory when it goes on to another tensor, or before 2^31 elements: integer atomics only, so
// that no order matters. The host has them cleared before the launch.
//
// Reads each element once: n·size bytes. Zeros, of which some gradients have little else, are not counted one by one.
#include "bins.cuh"
#include "parts.cuh"
#include "quantile.cuh"

// The copies of each counter: see TUNING.md.
constexpr u32 COPIES = 4;
// Chunks a block counts at most before it adds them up: 2^31 elements.
constexpr u32 HELD = 1 << 16;
static_assert((u64)HELD * CHUNK <= 1ull << 31, "u32 counts");

typedef Bins<SLOTS, COPIES> HistogramScratch;

// Counts the lane's non-zero elements of a chunk, and says how many they are.
template <typename E> DEVICE u32 count_chunk(HistogramScratch &scratch, const Chunk &chunk) {
    // Four loads of 16 bytes in flight: 56 KiB in the 896 threads of a multiprocessor. For those of eight blocks there are too few
    // registers.
    constexpr u32 TOGETHER = 4 * 4 / E::WORDS;
    const typename E::Bits *elements = (const typename E::Bits *)chunk.address;
    u32 nonzeros = 0;
    auto count = [&](const u32(*words)[E::WORDS]) {
#pragma unroll
        for (u32 p = 0; p < TOGETHER; p++) {
#pragma unroll
            for (u32 slot = 0; slot < PACKET; slot++) {
                u32 bits = float_to_bits(E::widen(E::element(words[p], slot))) & 0x7fffffffu;
                u32 place = scratch.place(bits > INFINITY_BITS ? NAN_SLOT : bits >> SLOT_SHIFT);
                nonzeros += bits != 0 ? 1 : 0;
                atomicAdd(&scratch.counts[bits != 0 ? place : scratch.nowhere()], 1u);
            }
        }
    };
    auto whole = [&](u32 first) {
        u32 words[TOGETHER][E::WORDS];
        load_packets_aligned<E, TOGETHER>(elements + first, words);
        LOADS_FIRST();
        count(words);
    };
    auto rest = [&](u32 first) {
        u32 words[TOGETHER][E::WORDS];
        load_packets_guarded<E, TOGETHER, 1>(elements, first, chunk.length, words);
        count(words);
    };
    for_parts<TOGETHER>(chunk.length, chunk.address % 16 == 0, whole, rest);
    return nonzeros;
}

struct HistogramArguments : Common {
    u64 *histograms;   // SLOTS a tensor
    u32 one_histogram; // 1: of all tensors
    u32 reserved;
};
static_assert(sizeof(HistogramArguments) == 88, "src/histogram/room.rs");

KERNEL(LANES, 7) gradprobe_histogram(HistogramArguments a) {
    SHARED(HistogramScratch, scratch);
    scratch.clear();
    BARRIER();
    u32 held = 0, elements = 0, nonzeros = 0;
    Run run = run_of_block(a.chunk_count);
    for (u32 index = run.begin; index < run.end; index++) {
        u32 tensor = a.chunk_tensors[index], next = index + 1;
        Chunk chunk = chunk_of(a, index, tensor);
        if (a.one_histogram && a.tensors[tensor].is_uncounted) chunk.length = 0;
#define COUNT(E) nonzeros += count_chunk<E>(scratch, chunk)
        FOR_DTYPE(chunk.dtype, COUNT)
#undef COUNT
        elements += chunk.length;
        held++;
        if (held < HELD && next < run.end && (a.one_histogram || a.chunk_tensors[next] == tensor)) continue;
        // Zeros are the elements that no lane has counted: one lane adds all, and each takes off its own.
        atomicAdd(&scratch.counts[scratch.place(ZERO_SLOT)], (threadIdx.x == 0 ? elements : 0u) - nonzeros);
        BARRIER();
        scratch.flush(a.histograms + (a.one_histogram ? 0 : (u64)tensor * SLOTS));
        BARRIER();
        held = elements = nonzeros = 0;
    }
}
