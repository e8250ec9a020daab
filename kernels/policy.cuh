// How a step's clip is decided, by the block that finishes it: src/clip/policy.rs documents the policies and has the same
// operations.
#pragma once
#include "block.cuh"
#include "loss_scale.cuh"
#include "quantile.cuh"

// The policies; 0 is the global norm alone. A bit each: of consecutive numbers the compiler makes a jump table, with a
// copy of the code around it for each.
constexpr u32 CLIP_VALUE = 1;
constexpr u32 CLIP_TENSOR_NORM = 2;
constexpr u32 CLIP_PERCENTILE = 4;
constexpr u32 CLIP_Z_SCORE = 8;
constexpr u32 CLIP_TENSOR_EMA = 16;
constexpr u32 CLIP_QUANTILE = 32;
constexpr u32 MAX_HISTORY = 1024;

// A step as a policy sees it, and what it decided. In shared memory.
struct Clip {
    double norm;
    u32 finite; // all elements are, so that something is learnt
    u32 skip;
    double divisor; // the loss scale
    double coefficient;
    float limit; // of elements
    u32 clips_parts;
    u32 spike;
    u32 below[2]; // counts of the history
};

DEVICE double propagate(u64 nan_count, u64 inf_count, double finite) {
    if (nan_count > 0) return bits_to_double(0x7ff8000000000000ull);
    if (inf_count > 0) return bits_to_double(0x7ff0000000000000ull);
    return finite;
}

// torch's coefficient.
DEVICE double torch_rule(double max_norm, double norm) {
    double ratio = max_norm / (norm + 1e-6);
    if (ratio != ratio) return bits_to_double(0x7ff8000000000000ull);
    return ratio > 1.0 ? 1.0 : ratio;
}
DEVICE double rule(double limit, double norm) { return norm <= limit ? 1.0 : torch_rule(limit, norm); }

// Adds a norm to the history of at most MAX_HISTORY steps, in place of the oldest when that is full. All threads; a
// barrier must follow.
DEVICE void remember(Clip &clip, const ClipState *state, double *history, u32 capacity) {
    constexpr u32 EACH = MAX_HISTORY / STEP_THREADS;
    double *sorted = history + capacity, norm = clip.norm;
    bool full = state->steps >= capacity;
    u32 count = full ? capacity : (u32)state->steps, place = (u32)(state->steps % capacity);
    double oldest = history[place], moved[EACH];
    if (threadIdx.x < 2) clip.below[threadIdx.x] = 0;
    BARRIER();
    u32 below_norm = 0, below_oldest = 0;
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
        u32 i = threadIdx.x + k * STEP_THREADS;
        if (i >= count) continue;
        moved[k] = sorted[i];
        below_norm += moved[k] < norm ? 1 : 0;
        below_oldest += moved[k] < oldest ? 1 : 0;
    }
    atomicAdd(&clip.below[0], below_norm);
    atomicAdd(&clip.below[1], below_oldest);
    BARRIER();
    // The oldest leaves the place `gone`, then the norm takes the place `to`.
    u32 gone = full ? clip.below[1] : count, to = clip.below[0] - (full && oldest < norm ? 1 : 0);
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
        u32 i = threadIdx.x + k * STEP_THREADS;
        if (i >= count || i == gone) continue;
        u32 rest = i - (i > gone ? 1 : 0);
        sorted[rest + (rest >= to ? 1 : 0)] = moved[k];
    }
    if (threadIdx.x == 0) {
        sorted[to] = norm;
        history[place] = norm;
    }
}

// numpy's linear interpolation between `count` sorted numbers.
DEVICE double percentile_of(const double *sorted, u32 count, double percentile) {
    u32 last = count - 1;
    double place = percentile / 100.0 * (double)last;
    u32 low = (u32)place, high = low + 1 < last ? low + 1 : last;
    return sorted[low] + (sorted[high] - sorted[low]) * (place - (double)low);
}

// The mean and variance of norms, by one thread. Where the norm is an outlier, the norm it is clipped to; else itself.
DEVICE double z_score_limit(Clip &clip, ClipState *state, double threshold, double smoothing, u32 warmup) {
    double norm = clip.norm;
    if (state->steps < warmup) {
        if (clip.finite) {
            double steps = (double)(state->steps + 1), gap = norm - state->mean;
            state->mean += gap / steps;
            state->variance += (gap * (norm - state->mean) - state->variance) / steps;
        }
        return bits_to_double(0x7ff0000000000000ull);
    }
    double std = sqrt(state->variance), z = (norm - state->mean) / (std + 1e-6);
    clip.spike = z > threshold;
    double limit = clip.spike ? state->mean + threshold * std / (z / threshold) : norm;
    if (clip.finite) {
        state->mean = smoothing * state->mean + (1.0 - smoothing) * limit;
        double gap = limit - state->mean;
        state->variance = smoothing * state->variance + (1.0 - smoothing) * (gap * gap);
    }
    return limit;
}

// One tensor's coefficient by its average, which it moves.
DEVICE double average_coefficient(const Clip &clip, double &average, double norm, double global, bool warm,
                                  double threshold, double smoothing) {
    bool known = average > 0.0;
    double coefficient = warm || !known ? global : rule(threshold * average, norm), clipped = coefficient * norm;
    if (clip.finite && clipped > 0.0) {
        if (!known || (warm && clipped < average)) {
            average = clipped;
        } else if (!warm) {
            average = smoothing * average + (1.0 - smoothing) * clipped;
        }
    }
    return coefficient;
}

// Decides the clip of a step whose norm and flags are in `clip`, and learns from it. By all threads, between barriers;
// `counts` has a number a lane.
DEVICE void decide_clip(Clip &clip, u64 *counts, const StepArguments &a) {
    u32 t = threadIdx.x;
    ClipState *state = a.clip_state;
    double threshold = a.clip_threshold, smoothing = a.clip_smoothing;
    bool by_tensor = a.clip & (CLIP_TENSOR_NORM | CLIP_TENSOR_EMA), by_element = a.clip & (CLIP_VALUE | CLIP_QUANTILE);
    if (clip.skip) {
        if (by_tensor) {
            for (u32 i = t; i < a.tensor_count; i += STEP_THREADS) a.coefficients[i] = 1.0f;
        }
        return;
    }
    if (a.clip & CLIP_PERCENTILE) {
        double *history = (double *)(state + 1);
        if (clip.finite) remember(clip, state, history, a.clip_steps);
        BARRIER();
        u64 count = state->steps + clip.finite;
        if (count > a.clip_steps) count = a.clip_steps;
        if (t == 0 && count > 0) {
            clip.coefficient = rule(percentile_of(history + a.clip_steps, (u32)count, threshold), clip.norm);
        }
    } else if (a.clip & CLIP_Z_SCORE) {
        if (t == 0) clip.coefficient = rule(z_score_limit(clip, state, threshold, smoothing, a.clip_steps), clip.norm);
    } else if (by_tensor || by_element) {
        if (by_element) {
            double limit = threshold;
            if (a.clip & CLIP_QUANTILE) limit = quantile_estimate(counts, (const u64 *)(state + 1), threshold) / clip.divisor;
            // None where the quantile is 0.
            if (t == 0) clip.limit = state->limit = (float)limit > 0.0f ? (float)limit : bits_to_float(INFINITY_BITS);
            BARRIER();
        }
        double global = (a.clip & CLIP_TENSOR_EMA) && a.max_norm > 0.0 ? torch_rule(a.max_norm, clip.norm) : 1.0;
        bool warm = (a.clip & CLIP_TENSOR_EMA) && state->steps < a.clip_steps;
        bool all_finite = clip.norm - clip.norm == 0.0;
        for (u32 i = t; i < a.tensor_count; i += STEP_THREADS) {
            Record r = load_record(a.records + i);
            if (by_element) {
                bool outside = r.inf_count > 0 || r.max_abs_or_zero > clip.limit;
                if (outside && clip.limit < bits_to_float(INFINITY_BITS)) atomicAdd(&clip.clips_parts, 1u);
                continue;
            }
            double norm = sqrt(sum_squares((double)finite_count(r), r.mean_or_zero, r.sum_squared_deviations));
            if (!all_finite) norm = propagate(r.nan_count, r.inf_count, norm);
            double *averages = (double *)(state + 1);
            double coefficient = 1.0;
            if (a.clip & CLIP_TENSOR_NORM) {
                coefficient = torch_rule(threshold, norm);
            } else if (r.count > 0) {
                coefficient = average_coefficient(clip, averages[i], norm, global, warm, threshold, smoothing);
            }
            a.coefficients[i] = narrow(coefficient / clip.divisor);
            if (narrow(coefficient) != 1.0f) atomicAdd(&clip.clips_parts, 1u);
        }
    }
    BARRIER();
    if (t != 0) return;
    if (a.max_norm > 0.0 && !by_tensor) {
        double cap = torch_rule(a.max_norm, clip.norm);
        if (cap < clip.coefficient || cap != cap) clip.coefficient = cap;
    }
    if (clip.finite) state->steps++;
}
