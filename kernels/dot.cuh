// The record of two tensors' pairs of elements: src/dot/mod.rs documents it, with the same layout and the same merge.
#pragma once
#include "record.cuh"

struct Dot {
    u64 count, nonfinite_count;
    double dot, a_squares, b_squares;
    u64 reserved;
};
static_assert(sizeof(Dot) == 48, "src/dot/mod.rs");
ASSERT_OFFSET(Dot, dot, 16, "src/dot/mod.rs");

DEVICE Dot merge(const Dot &x, const Dot &y) {
    return {x.count + y.count, x.nonfinite_count + y.nonfinite_count, x.dot + y.dot, x.a_squares + y.a_squares,
            x.b_squares + y.b_squares, 0};
}

// A record that another block has written in this launch.
DEVICE Dot load_record(const Dot *from) {
    const u64 *words = (const u64 *)from;
    LongPair counts = load_fresh(words), sums = load_fresh(words + 2), rest = load_fresh(words + 4);
    return {counts.x, counts.y, bits_to_double(sums.x), bits_to_double(sums.y), bits_to_double(rest.x), 0};
}

// One tensor of the second list.
struct Other {
    u64 address;
    u32 dtype;
    u32 reserved;
};
static_assert(sizeof(Other) == 16, "src/dot/mod.rs");
