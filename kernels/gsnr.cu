// GSNR: from the state of the tracked elements to one record a tensor.
//
// Every chunk is added up by one block, in f64, lane i taking the elements i, i + LANES and so on; chunks merge as those
// of measure do. The ratios also fall into bins, for the median: integer counts, so that their order does not matter.
// Called now and then, not every step.
//
// Reads 8 bytes an element.
#include "finish.cuh"

struct GsnrScratch {
    GsnrSums runs[LANES];
    u32 bins[BINS];
    GsnrSums sums;
    u32 last;
};

// The block's sums in thread 0, and its counts added to the tensor's bins.
DEVICE GsnrSums reduce_chunk(GsnrScratch &scratch, const float *means, const float *deviations, u32 length, u32 steps,
                             u32 *bins) {
    for (u32 bin = threadIdx.x; bin < BINS; bin += LANES) scratch.bins[bin] = 0;
    BARRIER();
    double degrees = (double)(steps - 1);
    auto lane = [&](u64 t) {
        GsnrSums sums = {};
        for (u32 i = (u32)t; i < length; i += LANES) {
            double square = (double)means[i] * (double)means[i], deviation = (double)deviations[i];
            sums.squared_means += square;
            sums.deviations += deviation;
            if (deviation > 0.0) {
                double ratio = square * degrees / deviation;
                sums.defined++;
                sums.below_one += ratio < 1.0 ? 1 : 0;
                sums.ratios += ratio;
                atomicAdd(&scratch.bins[float_to_bits((float)ratio) >> BIN_SHIFT], 1u);
            }
        }
        return sums;
    };
    auto add = [](const GsnrSums &x, const GsnrSums &y) { return merge(x, y); };
    GsnrSums sums = block_fold(scratch.runs, LANES, lane, add); // its barriers lie behind all that the lanes count
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

DEVICE void set_gsnr(GsnrRecord &record, const Track &track, u64 elements, const GsnrSums &sums, double median) {
    GsnrRecord r = {};
    r.steps = track.steps;
    r.skipped = track.skipped;
    r.median_or_nan = median;
    r.norm_mean = track.norm_mean;
    r.norm_deviations = track.norm_deviations;
    if (track.steps >= 2) {
        r.defined = sums.defined;
        r.constant = elements - sums.defined;
        r.below_one = sums.below_one;
        r.sum_ratio = sums.ratios;
        r.sum_variance = sums.deviations / (double)(track.steps - 1);
        r.sum_squared_mean = sums.squared_means;
    }
    record = r;
}

KERNEL(4) gradprobe_gsnr(Arguments a) {
    SHARED(GsnrScratch, scratch);
    // Tensors with nothing to add up have no chunk that would bring them here.
    for (u32 i = blockIdx.x * LANES + threadIdx.x; i < a.tensor_count; i += gridDim.x * LANES) {
        bool none = a.tensors[i].chunk_count == 0 || a.tracks[i].steps < 2;
        if (a.tracks[i].offset == UNTRACKED || !none) continue;
        set_gsnr(a.gsnr_records[i], a.tracks[i], a.tensors[i].length, GsnrSums{}, no_median());
    }
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        const Track &track = a.tracks[tensor];
        if (track.offset == UNTRACKED || track.steps < 2) continue;
        const TensorEntry &entry = a.tensors[tensor];
        u64 first = (u64)(index - entry.first_chunk) * CHUNK, rest = entry.length - first;
        u32 length = rest < CHUNK ? (u32)rest : CHUNK, *bins = a.gsnr_bins + (u64)track.slot * BINS;
        const float *means = a.means + track.offset + first, *deviations = a.deviations + track.offset + first;
        GsnrSums sums = reduce_chunk(scratch, means, deviations, length, track.steps, bins);
        BARRIER(); // all have added to the bins, and what thread 0 says below holds for them
        GsnrSums *parts = (GsnrSums *)a.chunk_parts;
        merge_chunk(scratch.runs, scratch.last, a, sums, index, tensor, parts, &scratch.sums, [&] {
            double median = take_median(scratch, bins);
            if (threadIdx.x == 0) set_gsnr(a.gsnr_records[tensor], track, entry.length, scratch.sums, median);
            BARRIER(); // the bins have been read
        });
    }
}
