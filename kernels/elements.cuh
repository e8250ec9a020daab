// The element types: how packets of them are loaded, widened and stored.
//
// A packet is PACKET contiguous elements of one lane, kept as 32-bit words: four for the 16-bit types, eight for f32.
// Everything the kernels do per type is in one of the three structs below, or in scan.cuh; the rest is templated over them.
#pragma once
#include "arguments.cuh"
#include "spec.cuh"

struct F32 {
    typedef u32 Bits;
    static constexpr u32 WORDS = PACKET;
    static constexpr u32 INFINITY_MAGNITUDE = 0x7f800000u;
    static constexpr u32 MAX_MAGNITUDE = 0xffffffffu;
    static constexpr u32 QUIET_NAN = 0x7fc00000u;

    static DEVICE float widen(u32 bits) { return bits_to_float(bits); }
    static DEVICE u32 narrow(float value) { return float_to_bits(value); }
    static DEVICE u32 element(const u32 *words, u32 slot) { return words[slot]; }
    static DEVICE void set(u32 *words, u32 slot, u32 bits) { words[slot] = bits; }
};

// What the two 16-bit types share: two elements to a word, the lower half first.
struct Halves {
    typedef u16 Bits;
    static constexpr u32 WORDS = PACKET / 2;
    static constexpr u32 MAX_MAGNITUDE = 0xffffu;

    static DEVICE u32 element(const u32 *words, u32 slot) {
        return slot % 2 == 0 ? words[slot / 2] & 0xffffu : words[slot / 2] >> 16;
    }
    static DEVICE void set(u32 *words, u32 slot, u32 bits) {
        u32 &word = words[slot / 2];
        word = slot % 2 == 0 ? (word & 0xffff0000u) | bits : (word & 0xffffu) | (bits << 16);
    }
};

struct F16 : Halves {
    static constexpr u32 INFINITY_MAGNITUDE = 0x7c00u;
    static constexpr u32 QUIET_NAN = 0x7e00u;

    static DEVICE float widen(u32 bits) { return half_to_float((u16)bits); }
    static DEVICE u32 narrow(float value) { return float_to_half(value); }
};

struct BF16 : Halves {
    static constexpr u32 INFINITY_MAGNITUDE = 0x7f80u;
    static constexpr u32 QUIET_NAN = 0x7fc0u;

    static DEVICE float widen(u32 bits) { return bits_to_float(bits << 16); }
    // To nearest, ties to even. By integers: sm_75 has no instruction for it. NaN is the caller's matter.
    static DEVICE u32 narrow(float value) {
        u32 bits = float_to_bits(value);
        return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    }
};

// The magnitude bits of a number, sign removed.
template <typename E> DEVICE u32 magnitude(u32 bits) { return bits & (E::MAX_MAGNITUDE >> 1); }

// Packets lie RUN elements apart, the first at element `first`; the lane of an element does not depend on how it is loaded.
// From an address that is no multiple of 16 bytes, a packet is cut out of the aligned groups of 16 bytes it lies in: one load
// more a packet, and 4 to 8 instructions behind it. These reach to both sides: nothing outside of the chunk is read.

// N packets, TOGETHER of them at a time, by `load(p, address, is_last)`: words of which word FIRST is the first that is all a
// packet's, or in which it begins at bit `bits`.
template <typename E, u32 N, u32 TOGETHER, u32 FIRST, typename Load>
DEVICE void cut_packets(const u32 *from, u32 bits, const Load &load, u32 (*words)[E::WORDS]) {
#pragma unroll
    for (u32 begin = 0; begin < N; begin += TOGETHER) {
        u32 around[TOGETHER][E::WORDS + 4];
#pragma unroll
        for (u32 p = 0; p < TOGETHER; p++) {
            const u32 *packet = from + (begin + p) * (RUN / PACKET * E::WORDS);
#pragma unroll
            for (u32 i = 0; i < E::WORDS + 4; i += 4) {
                Words4 w = load(begin + p, packet + i, i == E::WORDS);
                for (u32 j = 0; j < 4; j++) around[p][i + j] = w.word[j];
            }
        }
        LOADS_FIRST();
#pragma unroll
        for (u32 p = 0; p < TOGETHER; p++) {
            const u32 *w = around[p] + FIRST;
            for (u32 i = 0; i < E::WORDS; i++) {
                words[begin + p][i] = E::WORDS == PACKET ? w[i] : shift_right_wide(w[i], w[i + 1], bits);
            }
        }
    }
}

// The same from any address, of which `load` is given the aligned ones around it.
template <typename E, u32 N, u32 TOGETHER, typename Load>
DEVICE void load_packets_any(const typename E::Bits *packet, const Load &load, u32 (*words)[E::WORDS]) {
    // The same for all: a branch, where selects would be two for each word.
    u32 offset = (u32)((u64)packet % 16), bits = offset % 4 * 8;
    const u32 *from = (const u32 *)((u64)packet - offset);
    if (offset < 8) {
        if (offset < 4) return cut_packets<E, N, TOGETHER, 0>(from, bits, load, words);
        return cut_packets<E, N, TOGETHER, 1>(from, bits, load, words);
    }
    if (offset < 12) return cut_packets<E, N, TOGETHER, 2>(from, bits, load, words);
    return cut_packets<E, N, TOGETHER, 3>(from, bits, load, words);
}

// The words of N packets, from an address that is a multiple of 16 bytes.
template <typename E, u32 N> DEVICE void load_packets_aligned(const typename E::Bits *packet, u32 (*words)[E::WORDS]) {
#pragma unroll
    for (u32 p = 0; p < N; p++) {
#pragma unroll
        for (u32 i = 0; i < E::WORDS; i += 4) {
            Words4 w = load_words4((const u32 *)(packet + p * RUN) + i);
            for (u32 j = 0; j < 4; j++) words[p][i + j] = w.word[j];
        }
    }
}

// Loads the first `count` elements of a packet into its words, one by one; the others stay.
template <typename E> DEVICE void load_packet_scalar(const typename E::Bits *packet, u32 count, u32 *words) {
#pragma unroll
    for (u32 slot = 0; slot < PACKET; slot++) {
        if (slot < count) E::set(words, slot, load_element(packet + slot));
    }
}

// The words of N packets of a lane, from any address of a tensor that may end before; zeros behind its end. Of a misaligned one
// TOGETHER packets are loaded before one of them is cut: more of them go to local memory. By all lanes of a warp.
template <typename E, u32 N, u32 TOGETHER>
DEVICE void load_packets_guarded(const typename E::Bits *elements, u32 first, u32 length, u32 (*words)[E::WORDS]) {
    bool is_aligned = (u64)elements % 16 == 0;
    u32 begin = first - threadIdx.x % WARP * PACKET; // the warp's
    if ((is_aligned || begin > 0) && begin + N * RUN + PACKET <= length) {
        auto load = [](u32, const u32 *address, bool) { return load_words4(address); };
        return load_packets_any<E, N, TOGETHER>(elements + first, load, words);
    }
    auto is_whole = [=](u32 p) {
        u32 index = first + p * RUN;
        return is_aligned ? index + PACKET <= length : index > 0 && index + 2 * PACKET <= length;
    };
    auto load = [=](u32 p, const u32 *address, bool is_last) {
        return load_words4_if(is_whole(p) && !(is_last && is_aligned), address);
    };
    load_packets_any<E, N, TOGETHER>(elements + first, load, words);
#pragma unroll
    for (u32 p = 0; p < N; p++) {
        u32 index = first + p * RUN;
        if (is_whole(p)) continue;
        load_packet_scalar<E>(elements + index, index < length ? length - index : 0, words[p]);
    }
}

// A packet of f32 that this thread will write, at a multiple of 16 bytes.
struct Floats8 {
    Words4 half[2];
};
DEVICE Floats8 load_floats(const float *address) {
    return {{load_words4_to_change((u64)address), load_words4_to_change((u64)(address + 4))}};
}
DEVICE void store_floats(float *address, const Floats8 &floats) {
    store_words4((u64)address, floats.half[0]);
    store_words4((u64)(address + 4), floats.half[1]);
}

// Evaluates a function template for a dtype code that is only known on the device; uniform over a block.
#define FOR_DTYPE(code, call)                                                                                        \
    switch (code) {                                                                                                  \
    case DTYPE_F32: call(F32); break;                                                                                \
    case DTYPE_F16: call(F16); break;                                                                                \
    case DTYPE_BF16:                                                                                                 \
    default: call(BF16); break;                                                                                      \
    }

// Of a dtype code, the same.
DEVICE u32 infinity_of(u32 dtype) {
    return dtype == DTYPE_F32   ? F32::INFINITY_MAGNITUDE
           : dtype == DTYPE_F16 ? F16::INFINITY_MAGNITUDE
                                : BF16::INFINITY_MAGNITUDE;
}

DEVICE u32 magnitude_mask(u32 dtype) { return dtype == DTYPE_F32 ? 0x7fffffffu : 0x7fffu; }

DEVICE float widen(u32 dtype, u32 bits) {
    return dtype == DTYPE_F32 ? F32::widen(bits) : dtype == DTYPE_F16 ? F16::widen(bits) : BF16::widen(bits);
}

// At most one chunk of a tensor's elements; none of one that is absent, whose address is 0.
struct Chunk {
    u64 address;
    u32 length;
    u32 dtype;
    u32 dead_bits;
};

// The part of a list that is this block's. A run, and not every so-manieth chunk, so that a block counts once for what it
// has of a tensor.
struct Run {
    u32 begin, end;
};
DEVICE Run run_of_block(u32 count) {
    u32 each = count / gridDim.x, longer = count - each * gridDim.x;
    u32 begin = blockIdx.x * each + smaller(blockIdx.x, longer);
    return {begin, begin + each + (blockIdx.x < longer ? 1 : 0)};
}

DEVICE Chunk chunk_of(const Common &a, u32 index, u32 tensor) {
    const TensorEntry &entry = a.tensors[tensor];
    u64 first = (u64)(index - entry.first_chunk) * CHUNK;
    u64 rest = entry.length - first, address = a.addresses[tensor];
    u64 size = entry.dtype == DTYPE_F32 ? 4 : 2;
    u32 length = rest < CHUNK ? (u32)rest : CHUNK;
    return {address + first * size, address ? length : 0, entry.dtype, entry.dead_bits};
}
