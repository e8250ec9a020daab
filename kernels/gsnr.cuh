// What is kept of the tracked tensors across steps: src/gsnr/mod.rs documents it, with the same layouts and the same
// operations.
#pragma once
#include "record.cuh"
#include "spec.cuh"

constexpr u64 UNTRACKED = ~0ull;

struct Track {
    u64 offset; // of its first element in the state
    u32 steps, skipped;
    u32 slot; // which of the tracked tensors it is
    u32 reserved;
    double norm_mean, norm_deviations;
};
static_assert(sizeof(Track) == 40, "src/gsnr/mod.rs");
ASSERT_OFFSET(Track, slot, 16, "src/gsnr/mod.rs");
ASSERT_OFFSET(Track, norm_mean, 24, "src/gsnr/mod.rs");

constexpr u32 BINS = 4096;
constexpr u32 BIN_SHIFT = 19;

// What a chunk, and then a tensor, adds up over its elements.
struct GsnrSums {
    u64 defined, below_one;
    double ratios, spreads, squared_means;
    u64 nonfinite;
};
static_assert(sizeof(GsnrSums) == 48, "src/gsnr/mod.rs");

struct GsnrRecord {
    u32 steps, skipped;
    u64 defined, constant, below_one;
    double sum_ratio, sum_variance, sum_squared_mean, median_or_nan, norm_mean, norm_deviations;
    double effective_steps, ratio_shift;
    u64 nonfinite;
};
static_assert(sizeof(GsnrRecord) == 104, "src/gsnr/mod.rs");

struct Scaling {
    double degrees, effective_steps, ratio_shift;
};
DEVICE Scaling scaling_of(const Track &track) {
    return {(double)(track.steps - 1), (double)track.steps, 0.0};
}

// What is the same for all tensors at a step of Adam, before the table of their moments: src/gsnr/adam.rs.
struct AdamStep {
    Scaling scaling;
    double square_scale; // frees squares of the first moment of its start from 0
    double spread_scale; // the second moment, beside those: src/gsnr/adam.rs
    u32 steps, reserved;
};
static_assert(sizeof(AdamStep) == 48, "src/gsnr/adam.rs");
ASSERT_OFFSET(AdamStep, steps, 40, "src/gsnr/adam.rs");
struct AdamMoments {
    const float *exp_avg, *exp_avg_sq;
};

DEVICE GsnrSums merge(const GsnrSums &a, const GsnrSums &b) {
    return {a.defined + b.defined, a.below_one + b.below_one, a.ratios + b.ratios, a.spreads + b.spreads,
            a.squared_means + b.squared_means, a.nonfinite + b.nonfinite};
}

// Sums that another block has written in this launch.
DEVICE GsnrSums load_record(const GsnrSums *from) {
    const u64 *words = (const u64 *)from;
    LongPair counts = load_fresh(words), sums = load_fresh(words + 2), rest = load_fresh(words + 4);
    return {counts.x, counts.y, bits_to_double(sums.x), bits_to_double(sums.y), bits_to_double(rest.x), rest.y};
}

// Whether a step of a tensor with this record is merged into its state.
DEVICE bool is_merged(const Record &record) {
    return record.nan_count + record.inf_count == 0 && record.max_abs_or_zero <= bits_to_float(LARGE);
}

// Whether the next step that is merged begins a window.
DEVICE bool is_full(const Track &track, u32 window) { return window != 0 && track.steps == window; }

// Takes note of a step of a tensor with this record.
DEVICE void track_step(Track &track, const Record &record, u32 window) {
    if (!is_merged(record)) {
        track.skipped++;
        return;
    }
    if (is_full(track, window)) track = {track.offset, 0, 0, track.slot, 0, 0.0, 0.0};
    track.steps++;
    double norm = sqrt(sum_squares((double)finite_count(record), record.mean_or_zero, record.sum_squared_deviations));
    double gap = norm - track.norm_mean;
    track.norm_mean += gap / (double)track.steps;
    track.norm_deviations += gap * (norm - track.norm_mean);
}
