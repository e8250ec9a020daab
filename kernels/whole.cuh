// A tensor of all ranks as sums and maxima of integers: src/ranks/whole.rs documents it, with the same operations.
#pragma once
#include "exact.cuh"

struct TensorSums {
    u64 sum[LIMBS], sum_abs[LIMBS]; // of elements
    u64 mean_squares[LIMBS];        // of count * mean^2 of the parts
    u64 deviations[LIMBS];          // of their squared deviations
    u64 count, nan_count, inf_count, zero_count, dead_count;
};
constexpr u32 TENSOR_WORDS = sizeof(TensorSums) / sizeof(u64);
static_assert(TENSOR_WORDS == 89, "src/ranks/whole.rs");

// 0 where there is nothing.
struct TensorMaxima {
    u64 max_abs;         // bits
    u64 min_nonzero_abs; // those of Inf less its own
    u64 first_nonfinite; // NONE less its index
};
static_assert(sizeof(TensorMaxima) == 24, "src/ranks/whole.rs");

DEVICE void add_part(TensorSums &s, const Record &r) {
    double finite = (double)finite_count(r);
    double sum = finite * r.mean_or_zero;
    add_exactly(s.sum, sum);
    add_exactly(s.sum_abs, r.sum_abs);
    add_exactly(s.mean_squares, sum * r.mean_or_zero);
    add_exactly(s.deviations, r.sum_squared_deviations);
    s.count = r.count;
    s.nan_count = r.nan_count;
    s.inf_count = r.inf_count;
    s.zero_count = r.zero_count;
    s.dead_count = r.dead_count;
}

// Of a part that begins at this element of its tensor.
DEVICE TensorMaxima maxima_of(const Record &r, u64 first) {
    u64 index = r.first_nonfinite_index;
    return {float_to_bits(r.max_abs_or_zero), INFINITY_BITS - float_to_bits(r.min_nonzero_abs_or_infinity),
            index == NONE ? 0 : NONE - (first + index)};
}

DEVICE Record whole(TensorSums &s, const TensorMaxima &maxima) {
    Record r;
    r.count = s.count;
    r.nan_count = s.nan_count;
    r.inf_count = s.inf_count;
    r.zero_count = s.zero_count;
    r.dead_count = s.dead_count;
    r.first_nonfinite_index = NONE - maxima.first_nonfinite;
    double finite = (double)finite_count(r), sum = rounded_signed(s.sum);
    r.mean_or_zero = finite > 0.0 ? sum / finite : 0.0;
    double deviations = fma(-sum, r.mean_or_zero, rounded(s.mean_squares)) + rounded(s.deviations);
    r.sum_squared_deviations = deviations > 0.0 ? deviations : 0.0;
    r.sum_abs = rounded(s.sum_abs);
    r.max_abs_or_zero = bits_to_float((u32)maxima.max_abs);
    r.min_nonzero_abs_or_infinity = bits_to_float(INFINITY_BITS - (u32)maxima.min_nonzero_abs);
    return r;
}
