// Optimizer: weights and moments moved by the gradients, in one launch, and how far each tensor moved.
//
// What the measurement decided is applied to each gradient as it is read: coefficient, unscale, clamp, zeros for what is not
// finite. The gradients stay as they are, and a step that is skipped is a read of one flag.
//
// Each lane has eight sums of f32, one a slot of its packets, through the packets of a tile. The slots merge in pairs, and
// from there on sums are f64: lanes, chunks and spans as everywhere. So there is hardly any f64 an element, which most GPUs
// have little of. src/optim/cpu.rs does the same.
//
// Reads and writes 28 bytes an element of f32 under AdamW: gradient, weight and two moments in, the last three out.
#include "clipping.cuh"
#include "finish.cuh"

// What is kept of a tensor from step to step, and what its group has of its own: src/optim/mod.rs.
struct OptimizerTensor {
    u64 offset;        // of its first element in the moments
    u64 master_offset; // and in the masters, where it has them
    double powers[2];  // β1 and β2 to the power of the next step
    float corrections[2]; // (1 − β1^t) / √(1 − β2^t) and 1 − β1^t of the next step
    float learning_rate_factor, weight_decay;
    u32 steps, reserved[3];
};
static_assert(sizeof(OptimizerTensor) == 64, "src/optim/mod.rs");
ASSERT_OFFSET(OptimizerTensor, corrections, 32, "src/optim/mod.rs");
ASSERT_OFFSET(OptimizerTensor, steps, 48, "src/optim/mod.rs");

// How a step moved a tensor: src/optim/record.rs documents it, with the same layout and the same merge.
struct UpdateRecord {
    u64 count, lost, nonfinite_count, step;
    u32 steps, reserved;
    double update_squares, weight_squares, dot, first_squares, second_sum;
};
static_assert(sizeof(UpdateRecord) == 80, "src/optim/record.rs");
ASSERT_OFFSET(UpdateRecord, update_squares, 40, "src/optim/record.rs");

DEVICE UpdateRecord merge(const UpdateRecord &a, const UpdateRecord &b) {
    UpdateRecord r = a;
    r.count += b.count;
    r.lost += b.lost;
    r.nonfinite_count += b.nonfinite_count;
    r.update_squares += b.update_squares;
    r.weight_squares += b.weight_squares;
    r.dot += b.dot;
    r.first_squares += b.first_squares;
    r.second_sum += b.second_sum;
    return r;
}

constexpr u32 RULE_ADAMW = 0, RULE_NESTEROV = 2, RULE_SGD = 3, RULE_LION = 4;

struct OptimizerArguments : Common {
    const ClipState *clip_state;
    const float *coefficients; // of the tensors, under a policy that has them
    const Other *weights;      // of the tensors
    OptimizerTensor *states;   // of the tensors
    const float *learning_rate;
    float *first, *second; // moments
    float *masters;        // of weights of 16 bits
    UpdateRecord *updates; // of the tensors; those of empty ones are cleared by the host, once
    double betas[2];
    float beta1, rest1, beta2, rest2; // what averages keep, and take of the gradient
    float epsilon;
    u32 rule;
};
static_assert(sizeof(OptimizerArguments) == 184, "src/optim/room.rs");

// The rules. `direction` moves the moments of an element and gives what the weight goes against, before decay. Numbers that are
// the same for all tensors are read where the launch has them: in registers they crowded out the sums.

// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2.
struct AdamW {
    static constexpr u32 MOMENTS = 2;
    float root_factor, epsilon;

    DEVICE AdamW(const OptimizerArguments &a, const OptimizerTensor &state)
        : root_factor(state.corrections[0]), epsilon(a.epsilon * state.corrections[1]) {}

    DEVICE float direction(const OptimizerArguments &a, float gradient, float &first, float &second) const {
        first = fmaf(a.beta1, first, a.rest1 * gradient);
        second = fmaf(a.beta2, second, a.rest2 * gradient * gradient);
        return first / fmaf(sqrtf(second), root_factor, epsilon);
    }
};

// One moment, the mean of the gradients with what `beta2` and `rest2` are: of SGD with momentum, Sutskever et al., "On the
// importance of initialization and momentum in deep learning", as torch has it and Nesterov's; and of Lion, Chen et al.,
// "Symbolic Discovery of Optimization Algorithms", algorithm 2.
struct OneMoment {
    static constexpr u32 MOMENTS = 1;

    DEVICE OneMoment(const OptimizerArguments &, const OptimizerTensor &) {}

    DEVICE float direction(const OptimizerArguments &a, float gradient, float &first, float &) const {
        float mean = fmaf(a.beta1, first, a.rest1 * gradient);
        first = fmaf(a.beta2, first, a.rest2 * gradient);
        if (a.rule == RULE_LION) return mean > 0.0f ? 1.0f : mean < 0.0f ? -1.0f : mean;
        return a.rule == RULE_NESTEROV ? fmaf(a.beta1, first, gradient) : first;
    }
};

struct Sgd {
    static constexpr u32 MOMENTS = 0;

    DEVICE Sgd(const OptimizerArguments &, const OptimizerTensor &) {}

    DEVICE float direction(const OptimizerArguments &, float gradient, float &, float &) const { return gradient; }
};

// A chunk of a tensor's state, and how it moves.
struct Moved {
    u64 weights;
    u64 offset, master_offset; // in the moments and masters
    float rate, decay; // negative learning rate
};

// A packet that may be misaligned, or end before, goes by way of a lane's own shared memory, element by element: unrolled, its loads
// took so many registers that others were spilled.

// The values of a packet of gradients; zeros behind the end.
template <typename G> DEVICE void load_values(const typename G::Bits *gradients, u32 count, u32 *staged) {
#pragma unroll 1
    for (u32 slot = 0; slot < PACKET; slot++) {
        staged[slot] = slot < count ? float_to_bits(G::widen(load_element(gradients + slot))) : 0;
    }
}

// A packet of weights; zeros behind the end.
template <typename W> DEVICE void load_weights(u64 address, u32 count, bool is_whole, u32 *words, u32 *staged) {
    if (is_whole) {
#pragma unroll
        for (u32 i = 0; i < W::WORDS; i += 4) {
            Words4 w = load_words4_to_change(address + i * 4);
            for (u32 j = 0; j < 4; j++) words[i + j] = w.word[j];
        }
        return;
    }
    const typename W::Bits *weights = (const typename W::Bits *)address;
#pragma unroll 1
    for (u32 slot = 0; slot < PACKET; slot++) staged[slot] = slot < count ? weights[slot] : 0;
    for (u32 slot = 0; slot < PACKET; slot++) W::set(words, slot, staged[slot]);
}

template <typename W>
DEVICE void store_weights(u64 address, u32 count, bool is_whole, const u32 *words, u32 *staged) {
    if (is_whole) {
#pragma unroll
        for (u32 i = 0; i < W::WORDS; i += 4) {
            store_words4(address + i * 4, {{words[i], words[i + 1], words[i + 2], words[i + 3]}});
        }
        return;
    }
    typename W::Bits *weights = (typename W::Bits *)address;
    for (u32 slot = 0; slot < PACKET; slot++) staged[slot] = W::element(words, slot);
#pragma unroll 1
    for (u32 slot = 0; slot < count; slot++) weights[slot] = (typename W::Bits)staged[slot];
}

// The nearest of a type to a value. A NaN has no payload.
template <typename W> DEVICE u32 nearest(float value) {
    u32 nan = value == value ? 0 : 0xffffffffu;
    return (W::narrow(value) & ~nan) | (W::QUIET_NAN & nan);
}

// Sums of one slot of a lane over the packets of a tile.
struct SlotSums {
    float update_squares, weight_squares, dot, first_squares, second_sum;
};
DEVICE SlotSums operator+(const SlotSums &a, const SlotSums &b) {
    return {a.update_squares + b.update_squares, a.weight_squares + b.weight_squares, a.dot + b.dot,
            a.first_squares + b.first_squares, a.second_sum + b.second_sum};
}

DEVICE u32 &float_of(Floats8 &floats, u32 slot) { return floats.half[slot / 4].word[slot % 4]; }

// One packet of a tensor, on its way through the registers.
template <typename W> struct Packet {
    u32 weights[W::WORDS];
    Floats8 first, second, masters;
    float gradients[PACKET];
};

// Moves a chunk, and puts into `lane` what a lane adds up of it: in shared memory, as registers are short.
template <typename W, typename R>
DEVICE void move_lane(UpdateRecord &lane, u32 *staged, const OptimizerArguments &a, const Chunk &chunk, const Moved &moved, const Clipping &how,
                      const R &rule) {
    constexpr bool HAS_MASTERS = W::WORDS != PACKET;
    constexpr u32 SIZE = sizeof(typename W::Bits);
    // Packets loaded before the first is used: with one, less than 48 KiB of a multiprocessor are in flight but under AdamW.
    constexpr u32 AT_ONCE = R::MOMENTS + (HAS_MASTERS ? 1 : 0) < 2 ? 2 : 1;
    bool is_aligned = (chunk.address | moved.weights) % 16 == 0;
    lane = {};
    SlotSums slots[PACKET];
    u32 lost = 0;
    auto load = [&](Packet<W> &packet, u32 index, u32 count) {
        bool is_whole = is_aligned && count == PACKET;
        if (R::MOMENTS > 0) packet.first = load_floats(a.first + (moved.offset + index));
        if (R::MOMENTS > 1) packet.second = load_floats(a.second + (moved.offset + index));
        if (HAS_MASTERS) packet.masters = load_floats(a.masters + (moved.master_offset + index));
        load_weights<W>(moved.weights + index * SIZE, count, is_whole, packet.weights, staged);
    };
    auto move = [&](Packet<W> &packet, u32 index, u32 count) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) { // stored as soon as it is known
#pragma unroll
            for (u32 slot = half * 4; slot < half * 4 + 4; slot++) {
                float gradient = packet.gradients[slot];
                gradient = gradient - gradient == 0.0f || how.nonfinite_kept ? gradient : 0.0f;
                float clipped = gradient * how.coefficient;
                if (clipped > how.limit) clipped = how.limit;
                if (clipped < -how.limit) clipped = -how.limit;
                u32 bits = W::element(packet.weights, slot);
                float before = W::widen(bits);
                if (HAS_MASTERS) {
                    // Of other bits than the weight, the master is one of a weight that somebody has set since.
                    float master = bits_to_float(float_of(packet.masters, slot));
                    before = nearest<W>(master) == bits ? master : before;
                }
                float mean = 0.0f, square = 0.0f;
                if (R::MOMENTS > 0) mean = bits_to_float(float_of(packet.first, slot));
                if (R::MOMENTS > 1) square = bits_to_float(float_of(packet.second, slot));
                float direction = fmaf(moved.decay, before, rule.direction(a, clipped, mean, square));
                float after = fmaf(moved.rate, direction, before), stored = after;
                if (R::MOMENTS > 0) float_of(packet.first, slot) = float_to_bits(mean);
                if (R::MOMENTS > 1) float_of(packet.second, slot) = float_to_bits(square);
                if (HAS_MASTERS) {
                    u32 narrow = nearest<W>(after);
                    float_of(packet.masters, slot) = float_to_bits(after);
                    stored = W::widen(narrow);
                    W::set(packet.weights, slot, narrow);
                } else {
                    W::set(packet.weights, slot, float_to_bits(after));
                }
                lost += after == before && direction != 0.0f ? 1 : 0;
                SlotSums &sums = slots[slot];
                sums.update_squares = fmaf(direction, direction, sums.update_squares);
                sums.weight_squares = fmaf(stored, stored, sums.weight_squares);
                sums.dot = fmaf(direction, gradient, sums.dot);
                if (R::MOMENTS > 1) {
                    sums.first_squares = fmaf(mean, mean, sums.first_squares);
                    sums.second_sum += square;
                }
            }
            u64 at = index + half * 4;
            if (R::MOMENTS > 0) store_words4((u64)(a.first + (moved.offset + at)), packet.first.half[half]);
            if (R::MOMENTS > 1) store_words4((u64)(a.second + (moved.offset + at)), packet.second.half[half]);
            if (HAS_MASTERS) store_words4((u64)(a.masters + (moved.master_offset + at)), packet.masters.half[half]);
        }
        store_weights<W>(moved.weights + index * SIZE, count, is_aligned && count == PACKET, packet.weights, staged);
    };
    auto begin = [&] {
        for (u32 slot = 0; slot < PACKET; slot++) slots[slot] = {};
    };
    auto end = [&](u32 first) {
        const SlotSums *s = slots;
        SlotSums tile = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
        lane.update_squares += (double)tile.update_squares;
        lane.weight_squares += (double)tile.weight_squares;
        lane.dot += (double)tile.dot;
        lane.first_squares += (double)tile.first_squares;
        lane.second_sum += (double)tile.second_sum;
        lane.lost += lost;
        lost = 0;
        // Where a sum of squares is not finite, an element may be none.
        if (tile.weight_squares < bits_to_float(INFINITY_BITS)) return;
#pragma unroll 1
        for (u32 i = 0; i < PACKETS * PACKET; i++) {
            u32 index = first + i / PACKET * RUN + i % PACKET;
            if (index >= chunk.length) break;
            u32 bits = ((const typename W::Bits *)moved.weights)[index];
            lane.nonfinite_count += magnitude<W>(bits) < W::INFINITY_MAGNITUDE ? 0 : 1;
        }
    };
    auto whole = [&](u32 first) {
        begin();
#pragma unroll 1
        for (u32 p = 0; p < PACKETS; p += AT_ONCE) {
            Packet<W> packets[AT_ONCE];
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) load(packets[i], first + (p + i) * RUN, PACKET);
            // A branch, and no template: instructions are cheap beside that many bytes. All loads come before it.
#define LOAD(G)                                                                                                      \
    {                                                                                                                \
        u32 words[AT_ONCE][G::WORDS];                                                                                \
        load_packets_aligned<G, AT_ONCE>((const typename G::Bits *)chunk.address + first + p * RUN, words);          \
        LOADS_FIRST();                                                                                               \
        for (u32 i = 0; i < AT_ONCE; i++) {                                                                          \
            for (u32 slot = 0; slot < PACKET; slot++) packets[i].gradients[slot] = G::widen(G::element(words[i], slot)); \
        }                                                                                                            \
    }
            FOR_DTYPE(chunk.dtype, LOAD)
#undef LOAD
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) move(packets[i], first + (p + i) * RUN, PACKET);
        }
        end(first);
    };
    auto rest = [&](u32 first) {
        begin();
#pragma unroll 1
        for (u32 p = 0; p < PACKETS; p++) {
            u32 index = first + p * RUN;
            if (index >= chunk.length) break;
            Packet<W> packet;
            u32 count = smaller(chunk.length - index, PACKET);
            load(packet, index, count);
#define LOAD(G) load_values<G>((const typename G::Bits *)chunk.address + index, count, staged)
            FOR_DTYPE(chunk.dtype, LOAD)
#undef LOAD
            for (u32 slot = 0; slot < PACKET; slot++) packet.gradients[slot] = bits_to_float(staged[slot]);
            move(packet, index, count);
        }
        end(first);
    };
    u32 first = threadIdx.x / WARP * TILE + threadIdx.x % WARP * PACKET, end_of_tile = TILE - threadIdx.x % WARP * PACKET;
    if (is_aligned) {
#pragma unroll 1
        for (; first + end_of_tile <= chunk.length; first += ROW) whole(first);
    }
#pragma unroll 1
    for (; first < chunk.length; first += ROW) rest(first);
}

struct OptimizerScratch {
    UpdateRecord runs[LANES];
    u32 staged[LANES][PACKET]; // of each lane
    u32 last;
};

// A NaN as the CPU has it.
DEVICE double plain(double sum) { return sum == sum ? sum : bits_to_double(0x7ff8000000000000ull); }

template <typename R> DEVICE void move_all(OptimizerScratch &scratch, const OptimizerArguments &a) {
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        Chunk chunk = chunk_of(a, index, tensor);
        const OptimizerTensor &state = a.states[tensor];
        const Other &weight = a.weights[tensor];
        // Of each chunk anew, as registers are short.
        u32 action = a.outputs->action;
        Clipping how = {a.outputs->coefficient, bits_to_float(INFINITY_BITS),
                        (action / GRADPROBE_ACTION_ZERO_NONFINITE & 1) - 1};
        if (action & GRADPROBE_ACTION_CLAMP) how.limit = a.clip_state->limit;
        if (action & GRADPROBE_ACTION_SCALE_TENSORS) how.coefficient = a.coefficients[tensor];
        u64 before = (u64)(index - a.tensors[tensor].first_chunk) * CHUNK;
        Moved moved = {weight.address + before * (weight.dtype == DTYPE_F32 ? 4 : 2),
                       state.offset + before,
                       state.master_offset + before,
                       -(*a.learning_rate * state.learning_rate_factor),
                       state.weight_decay};
        R rule(a, state);
        UpdateRecord &lane = scratch.runs[threadIdx.x];
#define MOVE(W) move_lane<W>(lane, scratch.staged[threadIdx.x], a, chunk, moved, how, rule)
        FOR_DTYPE(weight.dtype, MOVE)
#undef MOVE
        UpdateRecord sums = block_fold(scratch.runs, LANES, [&](u64) { return lane; },
                                       [](const UpdateRecord &x, const UpdateRecord &y) { return merge(x, y); });
        sums.count = chunk.length;
        UpdateRecord *updates = a.updates + tensor;
        BARRIER(); // the runs are free
        merge_chunk(scratch.runs, scratch.last, a, sums, index, tensor, (UpdateRecord *)a.chunk_parts, updates, [&] {
            if (threadIdx.x != 0) return;
            UpdateRecord &r = *updates;
            // Anew, and not kept in registers through every chunk.
            double rate = (double)(*a.learning_rate * state.learning_rate_factor), unscale = 1.0 / divisor_of(a.outputs->loss_scale);
            r.step = a.outputs->step;
            r.steps = state.steps + (chunk.length > 0 ? 1 : 0);
            if (rate == 0.0) r.lost = 0;
            r.update_squares = plain(r.update_squares * rate * rate);
            r.weight_squares = plain(r.weight_squares);
            r.dot = plain(r.dot * rate * unscale);
            r.first_squares = plain(r.first_squares);
            r.second_sum = plain(r.second_sum);
        });
        BARRIER(); // and for the next chunk
    }
}

KERNEL(LANES, 4) gradprobe_optimizer(OptimizerArguments a) {
    SHARED(OptimizerScratch, scratch);
    if (a.outputs->skip) {
        for (u32 i = blockIdx.x * LANES + threadIdx.x; i < a.tensor_count; i += gridDim.x * LANES) a.updates[i] = {};
        return;
    }
    switch (a.rule) {
    case RULE_ADAMW: move_all<AdamW>(scratch, a); break;
    case RULE_SGD: move_all<Sgd>(scratch, a); break;
    default: move_all<OneMoment>(scratch, a); break;
    }
    // Steps are counted when all blocks have read them.
    BARRIER();
    if (!last_of(scratch.last, a.tensors_done, gridDim.x)) return;
    for (u32 i = threadIdx.x; i < a.tensor_count; i += LANES) {
        if (!a.addresses[i]) continue;
        OptimizerTensor &state = a.states[i];
        state.steps++;
        for (u32 k = 0; k < 2; k++) state.powers[k] *= a.betas[k];
        double seen = 1.0 - state.powers[0];
        state.corrections[0] = (float)(seen / sqrt(1.0 - state.powers[1]));
        state.corrections[1] = (float)seen;
    }
}
