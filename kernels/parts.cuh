// How a lane goes through a chunk, in parts of N packets, RUN elements apart: the order of src/spec.rs.
#pragma once
#include "elements.cuh"

// Calls `whole` with the lane's first element of each part of which all the warp's packets lie in the chunk, as long as
// `aligned` says that these are at multiples of 16 bytes, and `rest` for the parts after those that have elements. By all lanes
// of a warp.
template <u32 N, typename Whole, typename Rest>
DEVICE void for_parts(u32 length, bool aligned, const Whole &whole, const Rest &rest) {
    constexpr u32 PARTS = GROUPS * PACKETS / N;
    u32 warp = threadIdx.x / WARP * TILE, lane = threadIdx.x % WARP * PACKET, part = 0;
    auto first = [&] { return part * N / PACKETS * ROW + warp + part * N % PACKETS * RUN; };
    if (aligned) {
#pragma unroll 1
        for (; part < PARTS && first() + N * RUN <= length; part++) whole(first() + lane);
    }
#pragma unroll 1
    for (; part < PARTS && first() < length; part++) rest(first() + lane);
}
