// From two arrays of f32 that say what each element's mean and spread are to one record a tensor, whatever the arrays
// hold. src/gsnr/cpu.rs does the same.
//
// Every chunk is added up by one block, in f64, lane i taking the elements i, i + LANES and so on; chunks merge as those
// of measure do. The ratios are f32, and also fall into bins, for the median: integer counts, so that their order does not
// matter. Called now and then, not every step.
//
// Reads 8 bytes an element, for which it has three instructions of f64, one for each sum: most GPUs have one such unit to 64
// others. They were 28 with ratios of f64, and 6 with the conversions, which are made of integers.
#pragma once
#include "finish.cuh"

struct GsnrScratch {
    GsnrSums runs[LANES];
    u32 bins[BINS];
    GsnrSums sums;
    u32 last;
};

// An f32 as f64, times 2^-896: as the exponents of the two have other biases. Subnormals are subnormals, so that sums of these
// round as those of the numbers themselves.
constexpr double SCALED_DOWN = 0x1p-896;
DEVICE double scaled_down(float value) {
    u32 bits = float_to_bits(value);
    return bits_to_double((u64)(bits & 0x80000000u) << 32 | (u64)(bits & 0x7fffffffu) << 29);
}

// The magnitude of an f32 as f64, of a subnormal by way of a normal number.
DEVICE double widened_magnitude(float value) {
    float magnitude = fabsf(value);
    bool is_normal = magnitude >= 0x1p-126f;
    u64 bits = (u64)float_to_bits(is_normal ? magnitude : magnitude * 0x1p24f) << 29;
    return bits_to_double(bits == 0 ? 0 : bits + ((is_normal ? 896ull : 896ull - 24) << 52));
}

// Pairs of elements that a lane has loaded before the first is used.
constexpr u32 PAIRS = 8;

// The block's sums in thread 0, and its counts added to the tensor's bins. `source` has an element's squared deviations from
// what the two arrays hold of it, times something that is the same for all.
template <typename Source>
DEVICE GsnrSums reduce_chunk(GsnrScratch &scratch, const float *means, const float *spreads, u32 length,
                             const Source &source, const Scaling &scaling, u32 *bins) {
    for (u32 bin = threadIdx.x; bin < BINS; bin += LANES) scratch.bins[bin] = 0;
    BARRIER();
    float degrees = (float)scaling.degrees, one = (float)(1.0 + scaling.ratio_shift);
    auto lane = [&](u64 t) {
        GsnrSums sums = {};
        u32 nonfinite = 0, defined = 0, below_one = 0; // of a chunk
        for (u32 first = 0; first < length; first += PAIRS * LANES) {
            float mean[PAIRS], spread[PAIRS];
#pragma unroll
            for (u32 p = 0; p < PAIRS; p++) {
                u32 i = first + p * LANES + (u32)t;
                mean[p] = i < length ? means[i] : 0.0f;
                spread[p] = i < length ? spreads[i] : 0.0f;
            }
            LOADS_FIRST();
#pragma unroll
            for (u32 p = 0; p < PAIRS; p++) {
                // Those behind the end change nothing: they are 0, and vary not.
                float x = mean[p], y = spread[p];
                // NaN and Inf, of which the difference makes NaN.
                if (!(x - x == 0.0f && y - y == 0.0f)) {
                    nonfinite++;
                    continue;
                }
                double magnitude = widened_magnitude(x);
                sums.squared_means = fma(magnitude, magnitude, sums.squared_means);
                sums.spreads += scaled_down(y);
                float deviation = source.deviation(x, y);
                if (deviation > 0.0f) {
                    // The square may be below all of f32. The quotient is between: a deviation that is not 0 is at least
                    // a rounding of the squared mean, unless the moments are none of Adam's.
                    float ratio = fminf(x / deviation * x * degrees, bits_to_float(0x7f7fffffu));
                    defined++;
                    below_one += ratio < one ? 1 : 0;
                    sums.ratios += scaled_down(ratio);
                    atomicAdd(&scratch.bins[float_to_bits(ratio) >> BIN_SHIFT], 1u);
                }
            }
        }
        sums.ratios /= SCALED_DOWN;
        sums.spreads /= SCALED_DOWN;
        sums.nonfinite = nonfinite;
        sums.defined = defined;
        sums.below_one = below_one;
        return sums;
    };
    auto add = [](const GsnrSums &x, const GsnrSums &y) { return merge(x, y); };
    GsnrSums sums = block_fold(scratch.runs, LANES, lane, add);
    BARRIER();
    for (u32 bin = threadIdx.x; bin < BINS; bin += LANES) {
        if (scratch.bins[bin] > 0) atomicAdd(&bins[bin], scratch.bins[bin]);
    }
    return sums;
}

DEVICE double no_median() { return bits_to_double(0x7ff8000000000000ull); }

// A number in the middle of a bin.
DEVICE double middle_of(u32 bin) {
    return bin == 0 ? 0.0 : (double)bits_to_float(bin << BIN_SHIFT | 1u << (BIN_SHIFT - 1));
}

// The median of the ratios in the tensor's bins, which are then empty again; in thread 0.
DEVICE double take_median(GsnrScratch &scratch, u32 *bins) {
    for (u32 bin = threadIdx.x; bin < BINS; bin += LANES) {
        scratch.bins[bin] = load_fresh(bins + bin);
        bins[bin] = 0;
    }
    BARRIER();
    u64 defined = threadIdx.x == 0 ? scratch.sums.defined : 0;
    if (defined == 0) return no_median();
    double middles[2];
    u64 below = 0;
    u32 bin = 0;
    for (u32 i = 0; i < 2; i++) {
        u64 rank = i == 0 ? (defined - 1) / 2 : defined / 2;
        while (below + scratch.bins[bin] <= rank && bin < BINS - 1) below += scratch.bins[bin++];
        middles[i] = middle_of(bin);
    }
    return (middles[0] + middles[1]) / 2.0;
}

// The record of a tensor whose sums are known, from what is known without them. `spreads` add up to its squared deviations.
DEVICE GsnrRecord with_sums(GsnrRecord record, u64 elements, const Scaling &scaling, const GsnrSums &sums,
                            double median) {
    record.defined = sums.defined;
    record.constant = elements - sums.defined - sums.nonfinite;
    record.nonfinite = sums.nonfinite;
    record.below_one = sums.below_one;
    record.sum_ratio = sums.ratios - scaling.ratio_shift * (double)sums.defined;
    record.sum_variance = sums.spreads / scaling.degrees;
    record.sum_squared_mean = sums.squared_means;
    // Not of the NaN, whose bits a GPU's arithmetic would change.
    record.median_or_nan = sums.defined == 0 ? median : median - scaling.ratio_shift;
    record.effective_steps = scaling.effective_steps;
    record.ratio_shift = scaling.ratio_shift;
    return record;
}

// Reduces a chunk, and with the last one of its tensor the tensor: `known` is then completed and stored. The arrays
// and bins begin with the tensor.
template <typename Source>
DEVICE void reduce(GsnrScratch &scratch, const Common &a, u32 index, u32 tensor, u32 *bins, GsnrRecord *records,
                   const float *means, const float *spreads, const Source &source, const Scaling &scaling,
                   const GsnrRecord &known) {
    const TensorEntry &entry = a.tensors[tensor];
    u64 first = (u64)(index - entry.first_chunk) * CHUNK, rest = entry.length - first;
    u32 length = rest < CHUNK ? (u32)rest : CHUNK;
    GsnrSums sums = reduce_chunk(scratch, means + first, spreads + first, length, source, scaling, bins);
    BARRIER(); // all have added to the bins, and what thread 0 says below holds for them
    GsnrSums *parts = (GsnrSums *)a.chunk_parts;
    merge_chunk(scratch.runs, scratch.last, a, sums, index, tensor, parts, &scratch.sums, [&] {
        double median = take_median(scratch, bins);
        if (threadIdx.x == 0) {
            records[tensor] = with_sums(known, entry.length, scaling, source.whole(scratch.sums), median);
        }
        BARRIER(); // the bins have been read
    });
}
