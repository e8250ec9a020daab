// From two arrays of f32 that say what each element's mean and spread are to one record a tensor, whatever the arrays
// hold. src/gsnr/cpu.rs does the same.
//
// Every chunk is added up by one block, in f64, lane i taking the elements i, i + LANES and so on; chunks merge as those
// of measure do. The ratios also fall into bins, for the median: integer counts, so that their order does not matter.
// Called now and then, not every step.
//
// Reads 8 bytes an element.
#pragma once
#include "finish.cuh"

struct GsnrScratch {
    GsnrSums runs[LANES];
    u32 bins[BINS];
    GsnrSums sums;
    u32 last;
};

// The block's sums in thread 0, and its counts added to the tensor's bins. `element` makes an element's squared mean and
// deviation from what the two arrays hold of it.
template <typename Source>
DEVICE GsnrSums reduce_chunk(GsnrScratch &scratch, const float *means, const float *spreads, u32 length,
                             const Source &element, const Scaling &scaling, u32 *bins) {
    for (u32 bin = threadIdx.x; bin < BINS; bin += LANES) scratch.bins[bin] = 0;
    BARRIER();
    double one = 1.0 + scaling.ratio_shift;
    auto lane = [&](u64 t) {
        GsnrSums sums = {};
        for (u32 i = (u32)t; i < length; i += LANES) {
            Spread spread = element((double)means[i], (double)spreads[i]);
            // Neither NaN nor Inf, which the difference turns into NaN.
            if (!(spread.deviation - spread.deviation == 0.0)) {
                sums.nonfinite++;
                continue;
            }
            sums.squared_means += spread.square;
            sums.deviations += spread.deviation;
            if (spread.deviation > 0.0) {
                double ratio = spread.square * scaling.degrees / spread.deviation;
                sums.defined++;
                sums.below_one += ratio < one ? 1 : 0;
                sums.ratios += ratio;
                atomicAdd(&scratch.bins[float_to_bits((float)ratio) >> BIN_SHIFT], 1u);
            }
        }
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

// The record of a tensor whose sums are known, from what is known without them.
DEVICE GsnrRecord with_sums(GsnrRecord record, u64 elements, const Scaling &scaling, const GsnrSums &sums,
                            double median) {
    record.defined = sums.defined;
    record.constant = elements - sums.defined - sums.nonfinite;
    record.nonfinite = sums.nonfinite;
    record.below_one = sums.below_one;
    record.sum_ratio = sums.ratios - scaling.ratio_shift * (double)sums.defined;
    record.sum_variance = sums.deviations / scaling.degrees;
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
                   const float *means, const float *spreads, const Source &element, const Scaling &scaling,
                   const GsnrRecord &known) {
    const TensorEntry &entry = a.tensors[tensor];
    u64 first = (u64)(index - entry.first_chunk) * CHUNK, rest = entry.length - first;
    u32 length = rest < CHUNK ? (u32)rest : CHUNK;
    GsnrSums sums = reduce_chunk(scratch, means + first, spreads + first, length, element, scaling, bins);
    BARRIER(); // all have added to the bins, and what thread 0 says below holds for them
    GsnrSums *parts = (GsnrSums *)a.chunk_parts;
    merge_chunk(scratch.runs, scratch.last, a, sums, index, tensor, parts, &scratch.sums, [&] {
        double median = take_median(scratch, bins);
        if (threadIdx.x == 0) records[tensor] = with_sums(known, entry.length, scaling, scratch.sums, median);
        BARRIER(); // the bins have been read
    });
}
