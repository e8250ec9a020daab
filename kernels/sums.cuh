// The f32 sums of a lane: always in pairs, in the order src/spec.rs describes.
#pragma once
#include "spec.cuh"

struct LaneSums {
    float sum, magnitude, squares;
};

DEVICE LaneSums operator+(const LaneSums &a, const LaneSums &b) {
    return {a.sum + b.sum, a.magnitude + b.magnitude, a.squares + b.squares};
}

// Two packets' values in one slot.
DEVICE LaneSums pair(float x, float y) { return {x + y, fabsf(x) + fabsf(y), fmaf(y, y, x * x)}; }

// Adds items 0, 1, 2, … N - 1 in pairs, pairs of pairs and so on, as they come: `single` waits with one item, `pairs`
// with the sum of two, `fours` with that of four; the last of them used ends as the sum of all. Named members and
// selects, not an array and returns: those went to local memory.
template <u32 N> struct Pairs {
    // Set at once: what is left unset stays alive through every loop around, in registers the sums need.
    LaneSums single = {}, pairs = {}, fours = {};

    DEVICE void add(u32 index, LaneSums item) {
        static_assert(N == 4 || N == 8, "the levels below");
        if (index % 2 == 0) {
            single = item;
            return;
        }
        item = single + item;
        if (N == 4) {
            pairs = index == 3 ? pairs + item : item;
        } else if (index % 4 == 1) {
            pairs = item;
        } else {
            item = pairs + item;
            fours = index == 7 ? fours + item : item;
        }
    }

    DEVICE LaneSums total() const { return N == 4 ? pairs : fours; }
};
