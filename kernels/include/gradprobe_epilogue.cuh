// Statistics of what a kernel of one's own writes, accumulated in its epilogue: a record a block, at no extra read of
// the buffer. Include it in CUDA C++; it needs nothing but gradprobe.h beside it.
//
//     __global__ void my_backward(…, float *gradient, gradprobe_u64 length, gradprobe_record *slots) {
//         __shared__ gradprobe::BlockScratch<256> scratch;
//         gradprobe::Accumulator statistics;
//         gradprobe_u64 run = (length + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * run;
//         for (gradprobe_u64 i = begin + threadIdx.x; i < begin + run && i < length; i += 256) {
//             gradient[i] = …;
//             statistics.add(gradient[i], i - begin);
//         }
//         gradprobe::write_record<256>(statistics, threadIdx.x, scratch, &slots[blockIdx.x]);
//     }
//
// Blocks that write runs of the buffer, in order, give each element its index in its run: the slots are then merged from
// first to last by `merge`, or by `Record::merge` on the host. Blocks that write tiles give each element its index in
// the buffer: the slots are merged by `merge_parts`, in any fixed order.
//
// Of a buffer of f16 or bf16, add the value as it is stored, widened again: the statistics are those of the elements.
//
// Numerics. Counts, extremes and the first index are exact. A thread sums in f64, without overflow or underflow at any
// f32, and takes differences from its first finite element, so that a mean far from 0 costs no digits. With n elements a
// thread, B blocks, u = 2^-53 and e = 4 n (n + B + 40) u, worst cases: `sum_abs` within (n + B + 40) u relative,
// `mean_or_zero` within e times mean |x|, `sum_squared_deviations` within e + 8 u |mean| / std relative. At n = 4096 that
// e is 8e-9, where gradprobe's own kernels promise 1e-6 of the variance; outliers that come first make it so, else n
// stands for the square. These are other sums than those kernels': the same to the bit in every run and on the host, but
// not the bits of `measure`.
//
// Cost: five f64 instructions an element and 18 registers. A GPU with one f64 unit to 64 f32 ones feels them in a kernel
// bound by memory; `measure`, which needs as many for some hundred elements, is then the better place. Compiled with
// -ftz=true or --use_fast_math, subnormal elements add 0 to the sums; nothing else changes, whatever -fmad says.
#pragma once
#include "gradprobe.h"

#ifdef GRADPROBE_SIMT
#define GRADPROBE_DEVICE inline
#define GRADPROBE_BARRIER() BARRIER()
#define GRADPROBE_SHUFFLE_DOWN(value, delta) SHUFFLE_DOWN(value, delta)
#else
#define GRADPROBE_DEVICE __device__ __forceinline__
#define GRADPROBE_BARRIER() __syncthreads()
#define GRADPROBE_SHUFFLE_DOWN(value, delta) __shfl_down_sync(0xffffffffu, value, delta)
#endif

namespace gradprobe {

constexpr unsigned EPILOGUE_WARP = 32;

constexpr unsigned INFINITE_BITS = 0x7f800000u;

GRADPROBE_DEVICE unsigned float_bits(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
GRADPROBE_DEVICE float float_of(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The record of no elements: merging it changes nothing.
GRADPROBE_DEVICE gradprobe_record empty_record() {
    gradprobe_record r = {};
    r.first_nonfinite_index = GRADPROBE_NONE;
    r.min_nonzero_abs_or_infinity = float_of(INFINITE_BITS);
    return r;
}

// What both merges do alike: src/measure/record.rs has the same sequence of operations, and the same bits.
GRADPROBE_DEVICE gradprobe_record merge_moments(const gradprobe_record &a, const gradprobe_record &b) {
    gradprobe_record r;
    r.first_nonfinite_index = GRADPROBE_NONE;
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
    double n = (double)(a.count - a.nan_count - a.inf_count), m = (double)(b.count - b.nan_count - b.inf_count);
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

// The record of a's elements followed by b's: indices are those in either run.
GRADPROBE_DEVICE gradprobe_record merge(const gradprobe_record &a, const gradprobe_record &b) {
    gradprobe_record r = merge_moments(a, b);
    if (a.first_nonfinite_index != GRADPROBE_NONE) {
        r.first_nonfinite_index = a.first_nonfinite_index;
    } else if (b.first_nonfinite_index != GRADPROBE_NONE) {
        r.first_nonfinite_index = a.count + b.first_nonfinite_index;
    }
    return r;
}

// The record of two parts of one buffer, wherever they lie in it: indices are those in the buffer.
GRADPROBE_DEVICE gradprobe_record merge_parts(const gradprobe_record &a, const gradprobe_record &b) {
    gradprobe_record r = merge_moments(a, b);
    r.first_nonfinite_index =
        a.first_nonfinite_index < b.first_nonfinite_index ? a.first_nonfinite_index : b.first_nonfinite_index;
    return r;
}

// What one thread has seen, up to 2^32 - 1 elements.
struct Accumulator {
    unsigned count = 0, nan_count = 0, inf_count = 0, zero_count = 0, dead_count = 0;
    unsigned max_bits = 0, min_nonzero_bits = INFINITE_BITS; // of magnitudes: their order is that of the numbers
    gradprobe_u64 first_nonfinite = GRADPROBE_NONE;
    double shift = 0.0; // the first finite element
    double sum = 0.0, squares = 0.0; // of differences from it
    double magnitude = 0.0;
    float dead_threshold;

    // An element is dead when |x| is below this threshold, which is that of `Config`.
    GRADPROBE_DEVICE explicit Accumulator(float dead_threshold = 1e-10f) : dead_threshold(dead_threshold) {}

    // Takes in one element and the index it has in the record.
    GRADPROBE_DEVICE void add(float x, gradprobe_u64 index) {
        unsigned bits = float_bits(x) & 0x7fffffffu;
        bool is_first = count == nan_count + inf_count;
        count++;
        if (bits >= INFINITE_BITS) {
            nan_count += bits > INFINITE_BITS;
            inf_count += bits == INFINITE_BITS;
            first_nonfinite = index < first_nonfinite ? index : first_nonfinite;
            return;
        }
        zero_count += bits == 0;
        dead_count += bits < float_bits(dead_threshold);
        max_bits = bits > max_bits ? bits : max_bits;
        min_nonzero_bits = bits != 0 && bits < min_nonzero_bits ? bits : min_nonzero_bits;
        double wide = (double)x;
        if (is_first) shift = wide;
        double difference = wide - shift;
        sum += difference;
        squares = fma(difference, difference, squares);
        magnitude += wide < 0.0 ? -wide : wide;
    }

    // The record of what this thread has seen.
    GRADPROBE_DEVICE gradprobe_record record() const {
        gradprobe_record r = empty_record();
        r.count = count;
        r.nan_count = nan_count;
        r.inf_count = inf_count;
        r.zero_count = zero_count;
        r.dead_count = dead_count;
        r.first_nonfinite_index = first_nonfinite;
        unsigned finite = count - nan_count - inf_count;
        if (finite > 0) {
            double mean = sum / (double)finite; // of the differences
            double deviations = fma(-sum, mean, squares);
            r.mean_or_zero = shift + mean;
            r.sum_squared_deviations = deviations > 0.0 ? deviations : 0.0;
            r.sum_abs = magnitude;
            r.max_abs_or_zero = float_of(max_bits);
            r.min_nonzero_abs_or_infinity = float_of(min_nonzero_bits);
        }
        return r;
    }
};

// Shared memory of a block of THREADS threads.
template <unsigned THREADS> struct BlockScratch {
    gradprobe_record warps[THREADS / EPILOGUE_WARP];
};

// The record of the lane `delta` further on.
GRADPROBE_DEVICE gradprobe_record record_below(const gradprobe_record &own, unsigned delta) {
    gradprobe_record r;
    r.count = GRADPROBE_SHUFFLE_DOWN((unsigned long long)own.count, delta);
    r.nan_count = GRADPROBE_SHUFFLE_DOWN((unsigned long long)own.nan_count, delta);
    r.inf_count = GRADPROBE_SHUFFLE_DOWN((unsigned long long)own.inf_count, delta);
    r.zero_count = GRADPROBE_SHUFFLE_DOWN((unsigned long long)own.zero_count, delta);
    r.dead_count = GRADPROBE_SHUFFLE_DOWN((unsigned long long)own.dead_count, delta);
    r.first_nonfinite_index = GRADPROBE_SHUFFLE_DOWN((unsigned long long)own.first_nonfinite_index, delta);
    r.mean_or_zero = GRADPROBE_SHUFFLE_DOWN(own.mean_or_zero, delta);
    r.sum_squared_deviations = GRADPROBE_SHUFFLE_DOWN(own.sum_squared_deviations, delta);
    r.sum_abs = GRADPROBE_SHUFFLE_DOWN(own.sum_abs, delta);
    r.max_abs_or_zero = GRADPROBE_SHUFFLE_DOWN(own.max_abs_or_zero, delta);
    r.min_nonzero_abs_or_infinity = GRADPROBE_SHUFFLE_DOWN(own.min_nonzero_abs_or_infinity, delta);
    return r;
}

// Merges what the threads of a block have seen, in a fixed order, and writes it to `slot`. All THREADS threads call it,
// each with its number in the block; a barrier must follow before `scratch` is used again.
template <unsigned THREADS>
GRADPROBE_DEVICE void write_record(const Accumulator &accumulator, unsigned thread, BlockScratch<THREADS> &scratch,
                                   gradprobe_record *slot) {
    static_assert(THREADS % EPILOGUE_WARP == 0 && THREADS > 0 && THREADS <= 1024, "whole warps of one block");
    gradprobe_record record = accumulator.record();
    for (unsigned delta = EPILOGUE_WARP / 2; delta > 0; delta /= 2) {
        record = merge_parts(record, record_below(record, delta));
    }
    if (thread % EPILOGUE_WARP == 0) scratch.warps[thread / EPILOGUE_WARP] = record;
    GRADPROBE_BARRIER();
    if (thread == 0) {
        for (unsigned warp = 1; warp < THREADS / EPILOGUE_WARP; warp++) record = merge_parts(record, scratch.warps[warp]);
        *slot = record;
    }
}

} // namespace gradprobe
