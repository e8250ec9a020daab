// The shape of the reduction: src/spec.rs explains it and holds the same numbers; a test compares the two.
#pragma once
#include "platform.cuh"

constexpr u32 PACKET = 8;
constexpr u32 PACKETS = 8;
constexpr u32 WARP = 32;
constexpr u32 LANES = 128;
constexpr u32 GROUPS = 4;
constexpr u32 RUN = WARP * PACKET;
constexpr u32 TILE = PACKETS * RUN;
constexpr u32 ROW = LANES / WARP * TILE;
constexpr u32 CHUNK = GROUPS * ROW;
constexpr u32 SPAN = 128;

// Threads of a block that measures, or finishes a step: two to a lane, one for its first groups and one for the others.
constexpr u32 STEP_THREADS = 2 * LANES;

// f32 bit patterns.
constexpr u32 LARGE = 0x58800000u;
constexpr u32 LARGE_SCALE = 0x17800000u;
constexpr u32 SMALL = 0x27800000u;
constexpr u32 SMALL_SCALE = 0x70800000u;

constexpr double CENTRED_SHARE = 1.0 / 16.0;

DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }
DEVICE u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

// The power of two by which a chunk with this largest finite magnitude (f32 bits) is multiplied before its sums.
DEVICE float scale_of(u32 max_bits) {
    if (max_bits > LARGE) return bits_to_float(LARGE_SCALE);
    if (max_bits < SMALL && max_bits > 0) return bits_to_float(SMALL_SCALE);
    return 1.0f;
}
