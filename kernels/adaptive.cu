// Adaptive clip: each unit of each tensor – a row of a weight, say – to a share of the norm of its weights, in place and
// in one launch. src/clip/adaptive/mod.rs documents the rule.
//
// A block takes units in turn. It adds up Σg² and Σw² of one in f64, lane by lane: element i belongs to lane
// i / PACKET % LANES and to a sum of its own for each slot of a packet; slots and lanes then merge in pairs. Then it scales
// the unit, which is still in a near cache. Nothing depends on another unit, nor on the grid.
//
// Reads each gradient and each weight once: n·(size of g + size of w) bytes, and writes the units that are clipped.
#include "block.cuh"
#include "clipping.cuh"
#include "loss_scale.cuh"

struct UnitSums {
    double gradient, weight;
    u64 nonfinite; // of the gradient
};

struct UnitScratch {
    UnitSums runs[LANES];
    float coefficient;
    u32 nonfinite;
};

struct Squares {
    double sum;
    u64 nonfinite;
};

// What a lane adds up of a unit. Not through the read-only path: gradients are about to change.
template <typename E> DEVICE Squares squares(u64 address, u64 length) {
    const typename E::Bits *elements = (const typename E::Bits *)address;
    double slots[PACKET] = {};
    u64 nonfinite = 0;
    auto add = [&](u32 slot, u32 bits) {
        if (magnitude<E>(bits) < E::INFINITY_MAGNITUDE) {
            double x = (double)E::widen(bits);
            slots[slot] = fma(x, x, slots[slot]);
        } else {
            nonfinite++;
        }
    };
    constexpr u64 STRIDE = LANES * PACKET;
    if (address % 16 == 0) {
        // Four loads of 16 bytes in flight, or as many as the unit has for a lane.
        constexpr u32 TOGETHER = 4 * 4 / E::WORDS;
        u64 whole = length / PACKET * PACKET;
        for (u64 first = threadIdx.x * PACKET; first < whole; first += TOGETHER * STRIDE) {
            u32 words[TOGETHER][E::WORDS];
#pragma unroll
            for (u32 p = 0; p < TOGETHER; p++) {
                // Left unset, they cost sm_100 and sm_120 an array in local memory.
                for (u32 i = 0; i < E::WORDS; i++) words[p][i] = 0;
                if (first + p * STRIDE >= whole) continue;
                for (u32 part = 0; part < E::WORDS; part += 4) {
                    Words4 w = load_words4_to_change((u64)(elements + first + p * STRIDE) + part * 4);
                    for (u32 j = 0; j < 4; j++) words[p][part + j] = w.word[j];
                }
            }
#pragma unroll
            for (u32 p = 0; p < TOGETHER; p++) {
                if (first + p * STRIDE >= whole) continue;
                for (u32 slot = 0; slot < PACKET; slot++) add(slot, E::element(words[p], slot));
            }
        }
        bool has_rest = whole / PACKET % LANES == threadIdx.x;
        for (u32 slot = 0; slot < PACKET; slot++) {
            if (has_rest && whole + slot < length) add(slot, elements[whole + slot]);
        }
    } else {
        for (u64 first = threadIdx.x * PACKET; first < length; first += STRIDE) {
            for (u32 slot = 0; slot < PACKET; slot++) {
                if (first + slot < length) add(slot, elements[first + slot]);
            }
        }
    }
    const double *s = slots;
    return {((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])), nonfinite};
}

DEVICE Squares squares_of(u32 dtype, u64 address, u64 length) {
    Squares lane;
#define SQUARES(E) lane = squares<E>(address, length)
    FOR_DTYPE(dtype, SQUARES)
#undef SQUARES
    return lane;
}

// The units of one tensor, and where its weights are.
struct Units {
    u64 address, length; // elements of a unit; of the last one perhaps less
    u64 first;
    u32 dtype;
    u32 limited; // 0: units lose only the loss scale, and what is not finite under ZeroNonFinite
};
static_assert(sizeof(Units) == 32, "src/clip/adaptive/room.rs");

// What an adaptive clip did to a tensor.
struct AdaptiveRecord {
    u64 clipped, nonfinite;
    u32 reduction;
    u32 reserved;
};
static_assert(sizeof(AdaptiveRecord) == 24, "src/clip/adaptive/mod.rs");

struct AdaptiveArguments : Common {
    double clipping, epsilon;
    u64 unit_count;
    const Units *units; // of each tensor, and one entry more with the number of all
    AdaptiveRecord *adaptive_records; // of the tensors
    u32 policy;
    u32 reserved;
};
static_assert(sizeof(AdaptiveArguments) == 120, "src/clip/adaptive/room.rs");

// A unit's coefficient, by the thread that knows its sums.
DEVICE float unit_coefficient(const UnitSums &sums, const AdaptiveArguments &a, double divisor) {
    if (sums.nonfinite > 0 && a.policy != POLICY_ZERO_NONFINITE) return bits_to_float(0x7fc00000u);
    double weight = sqrt(sums.weight), norm = sqrt(sums.gradient) / divisor;
    double limit = a.clipping * (weight > a.epsilon ? weight : a.epsilon);
    return norm > limit ? (float)(limit / norm) : 1.0f;
}

DEVICE void count_unit(AdaptiveRecord &record, const UnitSums &sums, float coefficient) {
    if (sums.nonfinite > 0) atomicAdd(&record.nonfinite, (u64)1);
    if (coefficient < 1.0f) {
        atomicAdd(&record.clipped, (u64)1);
        atomicMax(&record.reduction, float_to_bits(1.0f) - float_to_bits(coefficient));
    }
}

KERNEL(LANES, 6) gradprobe_adaptive(AdaptiveArguments a) {
    SHARED(UnitScratch, scratch);
    if (a.outputs->skip) return;
    const Units *all = a.units;
    double divisor = divisor_of(a.outputs->loss_scale);
    u32 tensor = 0;
    for (u64 unit = blockIdx.x; unit < a.unit_count; unit += gridDim.x) {
        while (unit >= all[tensor + 1].first) tensor++;
        const Units &units = all[tensor];
        if (!a.addresses[tensor]) continue; // absent
        const TensorEntry &entry = a.tensors[tensor];
        u32 dtype = entry.dtype, size = dtype == DTYPE_F32 ? 4 : 2;
        u64 first = (unit - units.first) * units.length, address = a.addresses[tensor] + first * size;
        u64 rest = entry.length - first, length = units.length < rest ? units.length : rest;
        bool zeroes = a.policy == POLICY_ZERO_NONFINITE;
        Clipping how = {narrow(1.0 / divisor), bits_to_float(INFINITY_BITS), zeroes ? 0 : 0xffffffffu};
        bool changes = how.coefficient != 1.0f || zeroes;
        if (units.limited && units.address) {
            u32 weight_size = units.dtype == DTYPE_F32 ? 4 : 2;
            u64 weights = units.address + first * weight_size;
            // On their way while the gradient is read.
            if (threadIdx.x * PACKET < length) prefetch(weights + threadIdx.x * PACKET * weight_size);
            Squares g = squares_of(dtype, address, length);
            Squares w = squares_of(units.dtype, weights, length);
            UnitSums lane = {g.sum, w.sum, g.nonfinite};
            UnitSums sums = block_fold(scratch.runs, LANES, [&](u64) { return lane; },
                                       [](const UnitSums &x, const UnitSums &y) {
                                           return UnitSums{x.gradient + y.gradient, x.weight + y.weight,
                                                           x.nonfinite + y.nonfinite};
                                       });
            if (threadIdx.x == 0) {
                float coefficient = unit_coefficient(sums, a, divisor);
                count_unit(a.adaptive_records[tensor], sums, coefficient);
                scratch.coefficient = narrow((double)coefficient / divisor);
                scratch.nonfinite = sums.nonfinite > 0;
            }
            BARRIER(); // the fold of the next unit has more, behind which both may change
            how.coefficient = scratch.coefficient;
            changes = how.coefficient != 1.0f || scratch.nonfinite;
        }
        if (!changes) continue;
        for (u64 done = 0; done < length; done += CHUNK) {
            u64 rest = length - done;
            Chunk chunk = {address + done * size, rest < CHUNK ? (u32)rest : CHUNK, dtype, 0};
#define SCALE(E) clip_chunk<E, true>(chunk, how)
            FOR_DTYPE(dtype, SCALE)
#undef SCALE
        }
    }
}
