// The slots of a histogram, and a quantile of one: src/histogram/mod.rs documents both, with the same operations.
#pragma once
#include "elements.cuh"

constexpr u32 SLOTS = 1024;
constexpr u32 SLOT_SHIFT = 21;
constexpr u32 INF_SLOT = 1020; // the upper bits of Inf
constexpr u32 NAN_SLOT = 1021;
constexpr u32 ZERO_SLOT = 1022;
static_assert(INFINITY_BITS >> SLOT_SHIFT == INF_SLOT, "src/histogram/mod.rs");

// An estimate of the quantile of |x| over the finite elements, or 0 without any. By all threads, of which LANES count
// some bins each; thread 0 gets it. A barrier must follow before `counts` is used again.
DEVICE double quantile_estimate(u64 *counts, const u64 *histogram, double quantile) {
    constexpr u32 EACH = SLOTS / LANES;
    u32 t = threadIdx.x;
    u64 own = 0;
    for (u32 bin = t * EACH; bin < (t + 1) * EACH && bin < INF_SLOT; bin++) own += histogram[bin];
    if (t < LANES) counts[t] = own;
    BARRIER();
    if (t != 0) return 0.0;
    u64 below = histogram[ZERO_SLOT], finite = below;
    for (u32 i = 0; i < LANES; i++) finite += counts[i];
    if (finite == 0) return 0.0;
    u64 rank = (u64)ceil(quantile * (double)finite);
    rank = rank < 1 ? 1 : rank > finite ? finite : rank;
    if (rank <= below) return 0.0;
    u32 part = 0;
    while (rank > below + counts[part]) below += counts[part++];
    u32 bin = part * EACH;
    while (rank > below + histogram[bin]) below += histogram[bin++];
    u32 edge = (bin + 1) << SLOT_SHIFT;
    double low = (double)bits_to_float(bin << SLOT_SHIFT);
    double high = (double)bits_to_float(edge < INFINITY_BITS ? edge : INFINITY_BITS - 1);
    return low + (high - low) * ((double)(rank - below) / (double)histogram[bin]);
}
