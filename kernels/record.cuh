// The record of a tensor or a chunk, and its merge: src/record.rs documents both, with the same layout and the same
// sequence of operations.
#pragma once
#include "platform.cuh"

constexpr u64 NONE = ~0ull;
constexpr u32 INFINITY_BITS = 0x7f800000u;

struct Record {
    u64 count;
    u64 nan_count;
    u64 inf_count;
    u64 zero_count;
    u64 dead_count;
    u64 first_nonfinite_index;
    double mean_or_zero;
    double sum_squared_deviations;
    double sum_abs;
    float max_abs_or_zero;
    float min_nonzero_abs_or_infinity;
};
static_assert(sizeof(Record) == 80, "src/record.rs");
ASSERT_OFFSET(Record, first_nonfinite_index, 40, "src/record.rs");
ASSERT_OFFSET(Record, mean_or_zero, 48, "src/record.rs");
ASSERT_OFFSET(Record, max_abs_or_zero, 72, "src/record.rs");
ASSERT_OFFSET(Record, min_nonzero_abs_or_infinity, 76, "src/record.rs");

// NaN in f32 with the bits the CPU gives it: a conversion would set all the fraction's bits.
DEVICE float narrow(double value) { return value == value ? (float)value : bits_to_float(0x7fc00000u); }

DEVICE u64 finite_count(const Record &r) { return r.count - r.nan_count - r.inf_count; }

// Of elements with these moments.
DEVICE double sum_squares(double count, double mean, double deviations) { return fma(count * mean, mean, deviations); }

// A record that another block has written in this launch.
DEVICE Record load_record(const Record *from) {
    const u64 *words = (const u64 *)from;
    LongPair counts = load_fresh(words), more = load_fresh(words + 2), dead = load_fresh(words + 4);
    LongPair moments = load_fresh(words + 6), rest = load_fresh(words + 8);
    Record r;
    r.count = counts.x;
    r.nan_count = counts.y;
    r.inf_count = more.x;
    r.zero_count = more.y;
    r.dead_count = dead.x;
    r.first_nonfinite_index = dead.y;
    r.mean_or_zero = bits_to_double(moments.x);
    r.sum_squared_deviations = bits_to_double(moments.y);
    r.sum_abs = bits_to_double(rest.x);
    r.max_abs_or_zero = bits_to_float((u32)rest.y);
    r.min_nonzero_abs_or_infinity = bits_to_float((u32)(rest.y >> 32));
    return r;
}

// Whether two records that other launches or blocks have written are the same, byte for byte.
DEVICE bool same_bits(const Record *a, const Record *b) {
    bool same = true;
    for (u32 i = 0; i < sizeof(Record) / 8; i += 2) {
        LongPair x = load_fresh((const u64 *)a + i), y = load_fresh((const u64 *)b + i);
        same = same && x.x == y.x && x.y == y.y;
    }
    return same;
}

// The record of a's elements followed by b's.
DEVICE Record merge(const Record &a, const Record &b) {
    Record r;
    r.first_nonfinite_index = a.first_nonfinite_index != NONE   ? a.first_nonfinite_index
                              : b.first_nonfinite_index != NONE ? a.count + b.first_nonfinite_index
                                                                : NONE;
    r.count = a.count + b.count;
    r.nan_count = a.nan_count + b.nan_count;
    r.inf_count = a.inf_count + b.inf_count;
    r.zero_count = a.zero_count + b.zero_count;
    r.dead_count = a.dead_count + b.dead_count;
    r.sum_abs = a.sum_abs + b.sum_abs;
    r.max_abs_or_zero = a.max_abs_or_zero > b.max_abs_or_zero ? a.max_abs_or_zero : b.max_abs_or_zero;
    r.min_nonzero_abs_or_infinity = a.min_nonzero_abs_or_infinity < b.min_nonzero_abs_or_infinity
                                        ? a.min_nonzero_abs_or_infinity
                                        : b.min_nonzero_abs_or_infinity;
    double n = (double)finite_count(a), m = (double)finite_count(b);
    if (m == 0.0) {
        r.mean_or_zero = a.mean_or_zero;
        r.sum_squared_deviations = a.sum_squared_deviations;
    } else if (n == 0.0) {
        r.mean_or_zero = b.mean_or_zero;
        r.sum_squared_deviations = b.sum_squared_deviations;
    } else {
        double n_weight = n / (n + m), m_weight = m / (n + m);
        double gap = b.mean_or_zero - a.mean_or_zero;
        double within = a.sum_squared_deviations + b.sum_squared_deviations;
        r.mean_or_zero = n < m ? fma(-gap, n_weight, b.mean_or_zero) : fma(gap, m_weight, a.mean_or_zero);
        r.sum_squared_deviations = fma(gap * gap, n * m_weight, within);
    }
    return r;
}
