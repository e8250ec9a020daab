// Dot: Σab, Σa² and Σb² of each tensor of one list with the tensor of as many elements in another, in one launch.
//
// In f64 from the first product on, which is exact there: a small a times a large b may be all there is to the sum, so
// that no scaling by the largest elements would keep f32 products from vanishing. Each slot of a lane's packets has sums
// of its own, added to in the order of the packets; the eight slots merge in pairs, lanes, chunks and spans as
// everywhere.
//
// Reads each element of both lists once. Five instructions of f64 a pair: see TUNING.md.
#include "finish.cuh"
#include "parts.cuh"

// The record of two tensors' pairs of elements: src/dot/mod.rs documents it, with the same layout and the same merge.
struct Dot {
    u64 count, nonfinite_count;
    double dot, a_squares, b_squares;
    u64 reserved;
};
static_assert(sizeof(Dot) == 48, "src/dot/mod.rs");
ASSERT_OFFSET(Dot, dot, 16, "src/dot/mod.rs");

DEVICE Dot merge(const Dot &x, const Dot &y) {
    return {x.count + y.count, x.nonfinite_count + y.nonfinite_count, x.dot + y.dot, x.a_squares + y.a_squares,
            x.b_squares + y.b_squares, 0};
}

// A record that another block has written in this launch.
DEVICE Dot load_record(const Dot *from) {
    const u64 *words = (const u64 *)from;
    LongPair counts = load_fresh(words), sums = load_fresh(words + 2), rest = load_fresh(words + 4);
    return {counts.x, counts.y, bits_to_double(sums.x), bits_to_double(sums.y), bits_to_double(rest.x), 0};
}

struct DotScratch {
    Dot runs[LANES];
    u32 last;
};

// A packet that may be misaligned, or end behind the chunk. Element by element: to cut it out of what is aligned would take more
// registers than there are.
template <typename E> DEVICE void load_rest(const typename E::Bits *elements, u32 index, u32 length, u32 (*words)[E::WORDS]) {
    if ((u64)elements % 16 == 0 && index + PACKET <= length) return load_packets_aligned<E, 1>(elements + index, words);
    for (u32 i = 0; i < E::WORDS; i++) (*words)[i] = 0;
    load_packet_scalar<E>(elements + index, index < length ? length - index : 0, *words);
}

// What a lane adds up of a chunk; the count is set later.
template <typename A, typename B> DEVICE Dot dot_lane(const Chunk &a, const Chunk &b) {
    // Eight loads of 16 bytes in flight, or six.
    constexpr u32 TOGETHER = A::WORDS + B::WORDS > 8 ? 2 : 4;
    const typename A::Bits *as = (const typename A::Bits *)a.address;
    const typename B::Bits *bs = (const typename B::Bits *)b.address;
    Dot slots[PACKET] = {};
    auto add = [&](const u32(*x)[A::WORDS], const u32(*y)[B::WORDS]) {
#pragma unroll
        for (u32 p = 0; p < TOGETHER; p++) {
#pragma unroll
            for (u32 slot = 0; slot < PACKET; slot++) {
                u32 x_bits = A::element(x[p], slot), y_bits = B::element(y[p], slot);
                Dot &sums = slots[slot];
                if (magnitude<A>(x_bits) < A::INFINITY_MAGNITUDE && magnitude<B>(y_bits) < B::INFINITY_MAGNITUDE) {
                    double xi = (double)A::widen(x_bits), yi = (double)B::widen(y_bits);
                    sums.dot = fma(xi, yi, sums.dot);
                    sums.a_squares = fma(xi, xi, sums.a_squares);
                    sums.b_squares = fma(yi, yi, sums.b_squares);
                } else {
                    slots[0].nonfinite_count++;
                }
            }
        }
    };
    auto whole = [&](u32 first) {
        u32 x[TOGETHER][A::WORDS], y[TOGETHER][B::WORDS];
        load_packets_aligned<A, TOGETHER>(as + first, x);
        load_packets_aligned<B, TOGETHER>(bs + first, y);
        LOADS_FIRST();
        add(x, y);
    };
    auto rest = [&](u32 first) {
        u32 x[TOGETHER][A::WORDS], y[TOGETHER][B::WORDS];
#pragma unroll
        for (u32 p = 0; p < TOGETHER; p++) {
            u32 index = first + p * RUN;
            load_rest<A>(as, index, a.length, x + p);
            load_rest<B>(bs, index, a.length, y + p);
        }
        add(x, y);
    };
    for_parts<TOGETHER>(a.length, (a.address | b.address) % 16 == 0, whole, rest);
    const Dot *s = slots;
    return merge(merge(merge(s[0], s[1]), merge(s[2], s[3])), merge(merge(s[4], s[5]), merge(s[6], s[7])));
}

template <typename A> DEVICE Dot dot_lane_with(const Chunk &a, const Chunk &b) {
    Dot lane;
#define WITH(B) lane = dot_lane<A, B>(a, b)
    FOR_DTYPE(b.dtype, WITH)
#undef WITH
    return lane;
}

struct DotArguments : Common {
    const Other *others; // the second list
    Dot *chunk_dots;
    Dot *dots; // of the tensors; those of empty ones are cleared by the host, once
};
static_assert(sizeof(DotArguments) == 96, "src/dot/room.rs");

KERNEL(LANES, 4) gradprobe_dot(DotArguments a) {
    SHARED(DotScratch, scratch);
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        Chunk x = chunk_of(a, index, tensor), y = x;
        const Other &other = a.others[tensor];
        if (!other.address) x.length = y.length = 0;
        y.dtype = other.dtype;
        y.address = other.address + (u64)(index - a.tensors[tensor].first_chunk) * CHUNK * (y.dtype == DTYPE_F32 ? 4 : 2);
        Dot lane;
#define DOT(A) lane = dot_lane_with<A>(x, y)
        FOR_DTYPE(x.dtype, DOT)
#undef DOT
        Dot sums = block_fold(scratch.runs, LANES, [&](u64) { return lane; },
                              [](const Dot &left, const Dot &right) { return merge(left, right); });
        sums.count = x.length;
        merge_chunk(scratch.runs, scratch.last, a, sums, index, tensor, a.chunk_dots, a.dots + tensor, [] {});
        BARRIER(); // the runs are free for the next chunk's
    }
}
