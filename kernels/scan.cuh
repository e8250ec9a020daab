// Counts and extremes: integer work on magnitude bits, exact in any order. src/measure/scan.rs does the same.
#pragma once
#include "elements.cuh"
#include "record.cuh"

// What some elements are, in magnitude bits of their type.
struct Scan {
    u32 max;
    u32 min_nonzero_less_one; // all ones of the type's width when there is none; wraps a zero to the top
    u32 nonzeros;
    u32 alive; // at or above the dead threshold
};

DEVICE Scan operator+(const Scan &a, const Scan &b) {
    return {larger(a.max, b.max), smaller(a.min_nonzero_less_one, b.min_nonzero_less_one), a.nonzeros + b.nonzeros,
            a.alive + b.alive};
}

DEVICE Scan shuffled_down(const Scan &scan, u32 delta) {
    return {SHUFFLE_DOWN(scan.max, delta), SHUFFLE_DOWN(scan.min_nonzero_less_one, delta),
            SHUFFLE_DOWN(scan.nonzeros, delta), SHUFFLE_DOWN(scan.alive, delta)};
}

// Of no elements, and of one that is finite, of a type whose magnitudes have these bits.
DEVICE Scan no_scan(u32 mask) { return {0, 2 * mask + 1, 0, 0}; }
DEVICE Scan scan_of(u32 bits, u32 mask, u32 dead_bits) {
    u32 magnitude = bits & mask;
    return {magnitude, (magnitude - 1) & (2 * mask + 1), magnitude > 0 ? 1u : 0u, magnitude >= dead_bits ? 1u : 0u};
}

// What one lane has seen, packet by packet: two elements of 16 bits to an instruction; on sm_90 each line of the first
// loop is one.
template <typename E> struct Scanner {
    u32 max = 0, min = 0xffffffffu;
    int minus_nonzeros = 0, minus_alive = 0;

    DEVICE void add(const u32 *words, u32 dead_bits) {
        u32 to_bit_15 = (0x8000u - dead_bits) * 0x10001u;
        u32 nonzero[E::WORDS], alive[E::WORDS]; // in bit 15 of each half
        for (u32 i = 0; i < E::WORDS; i++) {
            u32 magnitudes = words[i] & 0x7fff7fffu;
            max = __vmaxu2(max, magnitudes);
            min = __viaddmin_u16x2(magnitudes, 0xffffffffu, min);
            nonzero[i] = magnitudes + 0x7fff7fffu;
            alive[i] = magnitudes + to_bit_15;
        }
        for (u32 i = 0; i < E::WORDS; i += 2) {
            minus_nonzeros = add_signs(nonzero[i], nonzero[i + 1], minus_nonzeros);
            minus_alive = add_signs(alive[i], alive[i + 1], minus_alive);
        }
    }
    // Bit 15 of four halves, spread over a byte each and so 0 or -1, added to `sum`.
    static DEVICE int add_signs(u32 a, u32 b, int sum) {
        return __dp4a((int)permute_bytes<0xfdb9>(a, b), 0x01010101, sum);
    }
    DEVICE Scan scan() const {
        return {larger(max >> 16, max & 0xffffu), smaller(min >> 16, min & 0xffffu), (u32)-minus_nonzeros, (u32)-minus_alive};
    }
};

template <> struct Scanner<F32> {
    u32 max = 0, min = F32::MAX_MAGNITUDE, nonzeros = 0, alive = 0;

    DEVICE void add(const u32 *words, u32 dead_bits) {
        for (u32 i = 0; i < F32::WORDS; i++) {
            u32 magnitude = words[i] & 0x7fffffffu;
            max = larger(max, magnitude);
            min = __viaddmin_u32(magnitude, 0xffffffffu, min);
            nonzeros += (magnitude + 0x7fffffffu) >> 31;
            alive += (magnitude + (0x80000000u - dead_bits)) >> 31;
        }
    }
    DEVICE Scan scan() const { return {max, min, nonzeros, alive}; }
};

// Non-finite elements of some run, and the scan of the finite ones.
struct FiniteScan {
    Scan scan;
    u32 nan_count, inf_count, first_nonfinite;
};

// Fills `record` but for its moments.
DEVICE void set_counts(Record &record, const Chunk &chunk, const FiniteScan &finite) {
    record.count = chunk.length;
    record.nan_count = finite.nan_count;
    record.inf_count = finite.inf_count;
    record.zero_count = finite_count(record) - finite.scan.nonzeros;
    // Below a threshold of 0 there is nothing, though what fills up the last packet counts as alive.
    record.dead_count = chunk.dead_bits == 0 ? 0 : finite_count(record) - finite.scan.alive;
    record.first_nonfinite_index = finite.first_nonfinite == 0xffffffffu ? NONE : finite.first_nonfinite;
    record.max_abs_or_zero = widen(chunk.dtype, finite.scan.max);
    record.min_nonzero_abs_or_infinity = finite.scan.nonzeros == 0
                                             ? bits_to_float(INFINITY_BITS)
                                             : widen(chunk.dtype, finite.scan.min_nonzero_less_one + 1);
}
