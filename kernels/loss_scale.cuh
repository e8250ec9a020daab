// The loss scale of mixed precision: src/clip/loss_scale.rs documents it, with the same layout and the same operations.
//
// Elements are measured as they are; what is made of a tensor's is unscaled once, in its record. So nothing is added to
// what is done for an element, and no element is rounded.
#pragma once
#include "elements.cuh"

// Whether gradients can have been scaled by it.
DEVICE bool is_usable(float scale) { return scale > 0.0f && scale < bits_to_float(INFINITY_BITS); }

// What scaled gradients are divided by; 1 for a scale that is not usable.
DEVICE double divisor_of(float scale) { return is_usable(scale) ? (double)scale : 1.0; }

// Bits of the smallest magnitude of a type that is at least `threshold`, as DType::threshold_bits in src/dtype.rs.
DEVICE u32 threshold_bits(u32 dtype, double threshold) {
    float nearest = (float)threshold;
    u32 bits = float_to_bits(nearest) + ((double)nearest < threshold ? 1 : 0);
    if (dtype == DTYPE_F32) return bits;
    if (dtype == DTYPE_BF16) return (bits >> 16) + ((bits & 0xffffu) != 0 ? 1 : 0);
    float at_least = bits_to_float(bits);
    u32 half = F16::narrow(at_least);
    return half + (F16::widen(half) < at_least ? 1 : 0);
}

// A chunk of scaled gradients, with the dead threshold in their units.
DEVICE Chunk with_scaled_threshold(Chunk chunk, const LossScale &loss) {
    chunk.dead_bits = threshold_bits(chunk.dtype, (double)loss.dead_threshold * divisor_of(loss.scale));
    return chunk;
}

// Non-zero magnitudes stay non-zero and finite.
DEVICE float magnitude_over(float magnitude, double divisor) {
    if (magnitude == 0.0f || magnitude == bits_to_float(INFINITY_BITS)) return magnitude;
    float nearest = (float)((double)magnitude / divisor);
    if (nearest == 0.0f) return bits_to_float(1);
    return nearest == bits_to_float(INFINITY_BITS) ? bits_to_float(INFINITY_BITS - 1) : nearest;
}

// Brings a record of scaled gradients to the units of the loss.
DEVICE void unscale(Record &r, double divisor) {
    if (divisor == 1.0) return;
    r.mean_or_zero = r.mean_or_zero / divisor;
    r.sum_squared_deviations = r.sum_squared_deviations / divisor / divisor;
    r.sum_abs = r.sum_abs / divisor;
    r.max_abs_or_zero = magnitude_over(r.max_abs_or_zero, divisor);
    r.min_nonzero_abs_or_infinity = magnitude_over(r.min_nonzero_abs_or_infinity, divisor);
}

// Adapts the scale to a step: torch's _amp_update_scale_. One thread, when all that reads it has run.
DEVICE void adapt(LossScale &loss, bool found_nonfinite) {
    if (found_nonfinite) {
        float scale = loss.scale * loss.backoff_factor;
        if (scale >= bits_to_float(0x00800000u)) loss.scale = scale;
        loss.growth_tracker = 0;
    } else if (loss.growth_tracker + 1 >= loss.growth_interval) {
        float scale = loss.scale * loss.growth_factor;
        if (scale < bits_to_float(INFINITY_BITS)) loss.scale = scale;
        loss.growth_tracker = 0;
    } else {
        loss.growth_tracker++;
    }
}
