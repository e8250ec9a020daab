// One chunk: from elements to a record, by one block. src/measure/chunk.rs does the same.
//
// A chunk is first read as though all were finite, of ordinary size and centred. Where that turns out wrong it is
// read again, from a near cache: element by element, the bad ones left out, the rest scaled by a power of two, and
// around its mean.
#pragma once
#include "block.cuh"

// How a chunk is to be read again.
struct Directions {
    u32 nonfinite;
    u32 again;
    float scale;
    float shift;
};

// In shared memory: in registers it would crowd out the sums of the careful path.
struct Measured {
    Record record;
    Directions directions;
};

struct ChunkScratch {
    union {
        Lane halves[STEP_THREADS];
        FiniteScan finite[LANES];
    };
    Measured measured;
};

// A thread's share of a chunk: the groups of one lane from `group` to `end`.
struct Share {
    u32 lane, group, end;
};
DEVICE Share share_of_thread() { return {threadIdx.x % LANES, threadIdx.x / LANES * 2, threadIdx.x / LANES * 2 + 2}; }

// Half of a lane's groups.
DEVICE LaneSums joined(u32 group, const LaneSums &all, const LaneSums &item) { return group % 2 == 0 ? item : all + item; }

DEVICE u32 chunk_element(const Chunk &chunk, u32 index) {
    return chunk.dtype == DTYPE_F32 ? load_element((const u32 *)chunk.address + index)
                                    : load_element((const u16 *)chunk.address + index);
}

// Packets of a group at once: for all of f32 there are no registers.
template <typename E> constexpr u32 AT_ONCE = E::WORDS == PACKET ? PACKETS / 2 : PACKETS;

// A lane's group. `load` puts AT_ONCE packets from an element on into words.
template <typename E, typename Load>
DEVICE LaneSums group_sums(Scanner<E> &scanner, u32 dead_bits, u32 first, const Load &load) {
    LaneSums slots[PACKET];
    // Whatever is added to -0 is what it was.
    for (u32 slot = 0; slot < PACKET; slot++) slots[slot] = {-0.0f, -0.0f, -0.0f};
#pragma unroll 1
    for (u32 begin = 0; begin < PACKETS; begin += AT_ONCE<E>) {
        u32 words[AT_ONCE<E>][E::WORDS];
        load(first + begin * RUN, words);
        LOADS_FIRST();
#pragma unroll
        for (u32 p = 0; p < AT_ONCE<E>; p++) scanner.add(words[p], dead_bits);
#pragma unroll
        for (u32 p = 0; p < AT_ONCE<E>; p += PACKETS / 2) {
            for (u32 slot = 0; slot < PACKET; slot++) {
                float x[PACKETS / 2];
                for (u32 i = 0; i < PACKETS / 2; i++) x[i] = E::widen(E::element(words[p + i], slot));
                slots[slot] = slots[slot] + (pair(x[0], x[1]) + pair(x[2], x[3]));
            }
        }
    }
    const LaneSums *s = slots;
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

// A group of a chunk that may begin anywhere, and end in it.
template <typename E> DEVICE LaneSums guarded_sums(Scanner<E> &scanner, const Chunk &chunk, u32 first) {
    constexpr u32 TOGETHER = E::WORDS == PACKET ? 2 : 4;
    return group_sums(scanner, chunk.dead_bits, first, [&](u32 from, u32(*words)[E::WORDS]) {
        load_packets_guarded<E, AT_ONCE<E>, TOGETHER>((const typename E::Bits *)chunk.address, from, chunk.length, words);
    });
}

// What a thread sees of its share of a chunk of ordinary numbers. If they are not, `scan.max` says so and the sums mean
// nothing.
template <typename E> DEVICE Lane fast_lane(const Chunk &chunk, const Share &share) {
    static_assert(GROUPS == 4, "two groups to a thread");
    u32 lane = share.lane % WARP * PACKET, group = share.group, tile = group * ROW + share.lane / WARP * TILE;
    Scanner<E> scanner;
    LaneSums all = {};
    // The hot loop: whole tiles, no conditions, 128 bytes in flight for each lane.
    auto load = [&](u32 first, u32(*words)[E::WORDS]) {
        load_packets_aligned<E, AT_ONCE<E>>((const typename E::Bits *)chunk.address + first, words);
    };
    if (chunk.address % 16 == 0) {
#pragma unroll 1
        for (; group < share.end && tile + TILE <= chunk.length; group++, tile += ROW) {
            all = joined(group, all, group_sums(scanner, chunk.dead_bits, tile + lane, load));
        }
    }
#pragma unroll 1
    for (; group < share.end; group++, tile += ROW) {
        LaneSums item = {};
        if (tile < chunk.length) item = guarded_sums(scanner, chunk, tile + lane);
        all = joined(group, all, item);
    }
    return {all, scanner.scan()};
}

DEVICE Lane fast_lane(const Chunk &chunk, const Share &share) {
    Lane lane = {};
#define MEASURE_LANE(E) lane = fast_lane<E>(chunk, share)
    FOR_DTYPE(chunk.dtype, MEASURE_LANE)
#undef MEASURE_LANE
    return lane;
}

// Of a chunk of a tile at most, what a lane of one warp sees: its first group.
DEVICE Lane small_lane(const Chunk &chunk) {
    Lane lane = {};
#define MEASURE_LANE(E)                                                                                              \
    {                                                                                                                \
        Scanner<E> scanner;                                                                                          \
        lane.sums = guarded_sums(scanner, chunk, threadIdx.x % WARP * PACKET);                                       \
        lane.scan = scanner.scan();                                                                                  \
    }
    FOR_DTYPE(chunk.dtype, MEASURE_LANE)
#undef MEASURE_LANE
    return lane;
}

// The sums over a thread's finite elements of x·scale − shift, one element at a time.
DEVICE LaneSums careful_lane(const Chunk &chunk, const Share &share, float scale, float shift) {
    u32 infinity = infinity_of(chunk.dtype), mask = magnitude_mask(chunk.dtype);
    auto value = [&](u32 index) {
        if (index >= chunk.length) return 0.0f;
        u32 bits = chunk_element(chunk, index);
        return (bits & mask) < infinity ? widen(chunk.dtype, bits) * scale - shift : 0.0f;
    };
    LaneSums all = {};
#pragma unroll 1
    for (u32 group = share.group; group < share.end; group++) {
        Pairs<PACKET> slots;
#pragma unroll 1
        for (u32 slot = 0; slot < PACKET; slot++) {
            Pairs<PACKETS / 2> packets;
            u32 i = group * ROW + share.lane / WARP * TILE + share.lane % WARP * PACKET + slot;
#pragma unroll 4
            for (u32 p = 0; p < PACKETS / 2; p++, i += 2 * RUN) packets.add(p, pair(value(i), value(i + RUN)));
            slots.add(slot, packets.total());
        }
        all = joined(group, all, slots.total());
    }
    return all;
}

// In the threads of the first warp.
DEVICE Sums careful_sums(ChunkScratch &scratch, const Chunk &chunk, float scale, float shift) {
    LaneSums sums = careful_lane(chunk, share_of_thread(), scale, shift);
    BARRIER(); // all have read the last directions and the last totals
    scratch.halves[threadIdx.x] = {sums, {}};
    BARRIER();
    return threadIdx.x < WARP ? block_totals(scratch.halves).sums : Sums{};
}

// Mean and sum of squared deviations of `count` values with these sums.
struct Centred {
    double mean, deviations;
};
DEVICE Centred centred(const Sums &sums, double count) {
    double mean = sums.sum / count;
    return {mean, fma(-sums.sum, mean, sums.squares)};
}

// Counts the non-finite elements and scans the finite ones; in thread 0. A barrier must follow.
DEVICE FiniteScan scan_finite(ChunkScratch &scratch, const Chunk &chunk) {
    u32 infinity = infinity_of(chunk.dtype), mask = magnitude_mask(chunk.dtype);
    auto look = [&](u32 lane) {
        FiniteScan s = {no_scan(mask), 0, 0, 0xffffffffu};
        for (u32 i = lane; i < chunk.length; i += LANES) {
            u32 bits = chunk_element(chunk, i), magnitude = bits & mask;
            if (magnitude >= infinity) {
                s.first_nonfinite = smaller(s.first_nonfinite, i);
                magnitude == infinity ? s.inf_count++ : s.nan_count++;
            } else {
                s.scan = s.scan + scan_of(bits, mask, chunk.dead_bits);
            }
        }
        return s;
    };
    auto merge = [](const FiniteScan &a, const FiniteScan &b) {
        return FiniteScan{a.scan + b.scan, a.nan_count + b.nan_count, a.inf_count + b.inf_count,
                          smaller(a.first_nonfinite, b.first_nonfinite)};
    };
    return block_fold(scratch.finite, LANES, look, merge);
}

// 1 / scale, for a power of two: in its bits, a division being a chain of instructions that the block waits for.
DEVICE double unscale_of(float scale) { return (double)bits_to_float(2 * 0x3f800000u - float_to_bits(scale)); }

// Puts the moments of elements that were scaled into `record`.
DEVICE void set_centred(Record &record, double mean, double deviations, float scale) {
    double unscale = unscale_of(scale);
    record.mean_or_zero = mean * unscale;
    record.sum_squared_deviations = (deviations > 0.0 ? deviations : 0.0) * unscale * unscale;
}

// Fills the moments of `record` from the sums of its finite elements times `scale`, in thread 0, and says whether they
// are too far from centred, and if so around what they are to be read again.
DEVICE void set_moments(Record &record, Directions &directions, const Sums &sums, float scale) {
    double count = (double)finite_count(record);
    Centred moments = {};
    directions.again = 0;
    if (count > 0.0) {
        moments = centred(sums, count);
        directions.again = sums.sum * moments.mean > CENTRED_SHARE * moments.deviations;
        directions.shift = (float)moments.mean;
    }
    set_centred(record, moments.mean, moments.deviations, scale);
    record.sum_abs = sums.magnitude * unscale_of(scale);
}

// Fills the record and the directions of a chunk that was read as though all were ordinary, and says whether it was.
DEVICE bool set_ordinary(Measured &measured, const Chunk &chunk, const Totals &totals) {
    Directions &directions = measured.directions;
    directions.nonfinite = totals.scan.max >= infinity_of(chunk.dtype);
    if (directions.nonfinite) return false;
    set_counts(measured.record, chunk, {totals.scan, 0, 0, 0xffffffffu});
    directions.scale = scale_of(float_to_bits(measured.record.max_abs_or_zero));
    set_moments(measured.record, directions, totals.sums, 1.0f);
    return directions.scale == 1.0f && !directions.again;
}

// Reads a chunk again that was not ordinary; by all threads, and a barrier must follow.
DEVICE void measure_again(ChunkScratch &scratch, const Chunk &chunk) {
    bool first = threadIdx.x == 0;
    Record &record = scratch.measured.record;
    Directions &directions = scratch.measured.directions;
    bool nonfinite = directions.nonfinite;
    if (nonfinite) {
        FiniteScan finite = scan_finite(scratch, chunk);
        if (first) {
            set_counts(record, chunk, finite);
            directions.scale = scale_of(float_to_bits(record.max_abs_or_zero));
        }
        BARRIER();
    }
    float scale = directions.scale;
    if (nonfinite || scale != 1.0f) {
        Sums sums = careful_sums(scratch, chunk, scale, 0.0f);
        if (first) set_moments(record, directions, sums, scale);
        BARRIER();
    }
    if (directions.again) {
        float shift = directions.shift;
        Sums sums = careful_sums(scratch, chunk, scale, shift);
        if (first) {
            Centred moments = centred(sums, (double)finite_count(record));
            set_centred(record, (double)shift + moments.mean, moments.deviations, scale);
        }
    }
}
