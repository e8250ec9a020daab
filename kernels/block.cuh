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

DEVICE Lane operator+(const Lane &a, const Lane &b) { return {a.sums + b.sums, a.scan + b.scan}; }

// The totals of a chunk's lanes, in lane 0 of a warp, each of whose lanes has those of the four columns, LANES / 4 apart:
// lane i with lane i + 64, then i + 32, down to i + 1. One warp does all the merging: 36 f64 instructions (52 with the
// record made of them) for the 1024 elements that each of its lanes stands for, so that a GPU with one f64 unit to 64 f32
// ones stays bound by memory.
DEVICE Totals warp_totals(const Lane &a, const Lane &b, const Lane &c, const Lane &d) {
    static_assert(LANES == 4 * WARP, "four columns");
    Totals totals = {(wide(a.sums) + wide(c.sums)) + (wide(b.sums) + wide(d.sums)), (a.scan + b.scan) + (c.scan + d.scan)};
    for (u32 delta = WARP / 2; delta > 0; delta /= 2) {
        Sums sums = {SHUFFLE_DOWN(totals.sums.sum, delta), SHUFFLE_DOWN(totals.sums.magnitude, delta),
                     SHUFFLE_DOWN(totals.sums.squares, delta)};
        totals.sums = totals.sums + sums;
        totals.scan = totals.scan + shuffled_down(totals.scan, delta);
    }
    return totals;
}

// The same of what all threads of a block have put into `halves`: a lane's first groups, and LANES behind them its others.
DEVICE Totals block_totals(const Lane *halves) {
    auto lane = [&](u32 column) {
        u32 i = column * WARP + threadIdx.x % WARP;
        return halves[i] + halves[LANES + i];
    };
    return warp_totals(lane(0), lane(1), lane(2), lane(3));
}

// Folds item(0), item(1), … item(length - 1) by merge(left, right), in the order of `spec::fold`: up to LANES runs of
// equal length, each left to right by one thread, then neighbours in pairs. Thread 0 gets the result, meaningless when
// length is 0. A barrier must follow before `runs` is used again. UNROLL items are loaded before the first is merged.
template <u32 UNROLL = 1, typename T, typename Item, typename Merge>
DEVICE T block_fold(T *runs, u32 length, const Item &item, const Merge &merge) {
    u32 t = threadIdx.x;
    u32 run = (length + LANES - 1) / LANES;
    // Run r begins at r * run: comparing that with the length tells which runs there are without a division.
    if (t < LANES && t * run < length) {
        u32 end = smaller((t + 1) * run, length);
        T all = item(t * run);
#pragma unroll UNROLL
        for (u32 i = t * run + 1; i < end; i++) all = merge(all, item(i));
        runs[t] = all;
    }
    for (u32 stride = 1; stride * run < length; stride *= 2) {
        BARRIER();
        if (t < LANES && (t & (2 * stride - 1)) == 0 && (t + stride) * run < length) runs[t] = merge(runs[t], runs[t + stride]);
    }
    T result = {};
    if (t == 0 && length > 0) result = runs[0];
    return result;
}
