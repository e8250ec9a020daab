// From lanes to a block: sums in f64, and the fold whose order kernels and CPU share.
#pragma once
#include "scan.cuh"
#include "sums.cuh"

struct Sums {
    double sum, magnitude, squares;
};

// What a lane, and then a block, has seen of a chunk.
struct Lane {
    LaneSums sums;
    Scan scan;
};

struct Totals {
    Sums sums;
    Scan scan;
};

DEVICE Sums wide(const LaneSums &a) { return {(double)a.sum, (double)a.magnitude, (double)a.squares}; }
DEVICE Sums operator+(const Sums &a, const Sums &b) {
    return {a.sum + b.sum, a.magnitude + b.magnitude, a.squares + b.squares};
}

// The block's totals, in thread 0: lane i with lane i + 64, then i + 32, down to i + 1. One warp does all the merging:
// 36 f64 instructions (52 with the record made of them) for the 1024 elements that each of its lanes stands for, so that
// a GPU with one f64 unit to 64 f32 ones stays bound by memory. A barrier must follow before `lanes` is used again.
DEVICE Totals block_totals(Lane *lanes, const Lane &lane) {
    static_assert(LANES == 4 * WARP, "the merge below");
    u32 t = threadIdx.x;
    lanes[t] = lane;
    BARRIER();
    Totals totals = {};
    if (t < WARP) {
        const Lane &a = lanes[t], &b = lanes[t + 32], &c = lanes[t + 64], &d = lanes[t + 96];
        totals.sums = (wide(a.sums) + wide(c.sums)) + (wide(b.sums) + wide(d.sums));
        totals.scan = (a.scan + b.scan) + (c.scan + d.scan);
        for (u32 delta = WARP / 2; delta > 0; delta /= 2) {
            Sums sums = {SHUFFLE_DOWN(totals.sums.sum, delta), SHUFFLE_DOWN(totals.sums.magnitude, delta),
                         SHUFFLE_DOWN(totals.sums.squares, delta)};
            totals.sums = totals.sums + sums;
            totals.scan = totals.scan + shuffled_down(totals.scan, delta);
        }
    }
    return totals;
}

// Folds item(0), item(1), … item(length - 1) by merge(left, right), in the order of `spec::fold`: up to LANES runs of
// equal length, each left to right by one thread, then neighbours in pairs. Thread 0 gets the result, meaningless when
// length is 0. A barrier must follow before `runs` is used again. UNROLL items are loaded before the first is merged.
template <u32 UNROLL = 1, typename T, typename Item, typename Merge>
DEVICE T block_fold(T *runs, u64 length, const Item &item, const Merge &merge) {
    u64 t = threadIdx.x;
    u64 run = (length + LANES - 1) / LANES;
    u64 count = run == 0 ? 0 : (length + run - 1) / run;
    if (t < count) {
        u64 end = (t + 1) * run < length ? (t + 1) * run : length;
        T all = item(t * run);
#pragma unroll UNROLL
        for (u64 i = t * run + 1; i < end; i++) all = merge(all, item(i));
        runs[t] = all;
    }
    for (u64 stride = 1; stride < count; stride *= 2) {
        BARRIER();
        if (t % (2 * stride) == 0 && t + stride < count) runs[t] = merge(runs[t], runs[t + stride]);
    }
    T result = {};
    if (t == 0 && count > 0) result = runs[0];
    return result;
}
