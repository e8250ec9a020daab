// Counts in shared memory, by integer atomics: their order does not matter, nor does the grid.
#pragma once
#include "spec.cuh"

// COUNT counters in COPIES copies, those of one counter side by side. A lane adds to copy(): neighbouring lanes, which
// often have equal numbers, do not wait for each other.
template <u32 COUNT, u32 COPIES> struct Bins {
    u32 counts[COUNT * COPIES];

    DEVICE u32 *copy() { return counts + threadIdx.x % COPIES; }

    // A barrier must follow before anything is added.
    DEVICE void clear() {
        for (u32 i = threadIdx.x; i < COUNT * COPIES; i += LANES) counts[i] = 0;
    }

    // Adds the counts to `to` in global memory and begins again from 0; a barrier must come before and after.
    DEVICE void flush(u64 *to) {
        for (u32 bin = threadIdx.x; bin < COUNT; bin += LANES) {
            u32 sum = 0;
            for (u32 i = bin * COPIES; i < (bin + 1) * COPIES; i++) {
                sum += counts[i];
                counts[i] = 0;
            }
            if (sum > 0) atomicAdd(&to[bin], (u64)sum);
        }
    }
};
