// Counts in shared memory, by integer atomics: their order does not matter, nor does the grid.
#pragma once
#include "spec.cuh"

// COUNT counters in COPIES copies, those of one counter side by side: neighbouring lanes, whose numbers are often equal,
// do not wait for each other. Behind them is a word for each lane of a warp that counts for nothing.
template <u32 COUNT, u32 COPIES> struct Bins {
    u32 counts[COUNT * COPIES + WARP];

    // Where this lane adds to a counter.
    static DEVICE u32 place(u32 bin) { return bin * COPIES + threadIdx.x % COPIES; }
    // Where it adds what is not to be counted. A condition became a branch for each element, and behind each the address
    // of shared memory was worked out anew.
    static DEVICE u32 nowhere() { return COUNT * COPIES + threadIdx.x % WARP; }

    // A barrier must follow before anything is added.
    DEVICE void clear() {
        for (u32 i = threadIdx.x; i < COUNT * COPIES + WARP; i += LANES) counts[i] = 0;
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
