// The record of a tensor or a chunk, as kernels/include declares and merges it for everybody: src/measure/record.rs documents
// both, with the same layout and the same sequence of operations.
#pragma once
#include "platform.cuh"
#include "include/gradprobe_epilogue.cuh"

typedef gradprobe_record Record;
using gradprobe::merge;

constexpr u64 NONE = GRADPROBE_NONE;
constexpr u32 INFINITY_BITS = gradprobe::INFINITE_BITS;

// NaN in f32 with the bits the CPU gives it: a conversion would set all the fraction's bits.
DEVICE float narrow(double value) { return value == value ? (float)value : bits_to_float(0x7fc00000u); }

DEVICE u64 finite_count(const Record &r) { return r.count - r.nan_count - r.inf_count; }

// Of elements with these moments.
DEVICE double sum_squares(double count, double mean, double deviations) { return fma(count * mean, mean, deviations); }

// A record, of whichever kind, that another block has written in this launch.
template <typename R> DEVICE R load_record(const R *from) {
    static_assert(sizeof(R) % 16 == 0, "by pairs of words");
    R r;
    u64 words[sizeof(R) / 8];
#pragma unroll
    for (u32 i = 0; i < sizeof(R) / 8; i += 2) {
        LongPair pair = load_fresh((const u64 *)from + i);
        words[i] = pair.x;
        words[i + 1] = pair.y;
    }
    memcpy(&r, words, sizeof r);
    return r;
}
