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
#include "parts.cuh"

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

// A record that another block has written in this launch.
DEVICE UpdateRecord load_record(const UpdateRecord *from) {
    UpdateRecord r;
    u64 words[sizeof(UpdateRecord) / 8];
#pragma unroll
    for (u32 i = 0; i < sizeof(UpdateRecord) / 8; i += 2) {
        LongPair pair = load_fresh((const u64 *)from + i);
        words[i] = pair.x;
        words[i + 1] = pair.y;
    }
    memcpy(&r, words, sizeof r);
    return r;
}

constexpr u32 RULE_ADAMW = 0, RULE_MOMENTUM = 1, RULE_NESTEROV = 2, RULE_SGD = 3;

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
    float epsilon;
    u32 rule;
};
static_assert(sizeof(OptimizerArguments) == 168, "src/optim/room.rs");

// The rules. `direction` moves the moments of an element and gives what the weight goes against, before decay.

// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2.
struct AdamW {
    static constexpr u32 MOMENTS = 2;
    float beta1, rest1, beta2, rest2, root_factor, epsilon;

    DEVICE AdamW(const OptimizerArguments &a, const OptimizerTensor &state)
        : beta1((float)a.betas[0]), rest1((float)(1.0 - a.betas[0])), beta2((float)a.betas[1]),
          rest2((float)(1.0 - a.betas[1])), root_factor(state.corrections[0]), epsilon(a.epsilon * state.corrections[1]) {}

    DEVICE float direction(float gradient, float &first, float &second) const {
        first = fmaf(beta1, first, rest1 * gradient);
        second = fmaf(beta2, second, rest2 * gradient * gradient);
        return first / fmaf(sqrtf(second), root_factor, epsilon);
    }
};

// Sutskever et al., "On the importance of initialization and momentum in deep learning", as torch has both.
struct Momentum {
    static constexpr u32 MOMENTS = 1;
    float momentum;
    bool nesterov;

    DEVICE Momentum(const OptimizerArguments &a, const OptimizerTensor &)
        : momentum((float)a.betas[0]), nesterov(a.rule == RULE_NESTEROV) {}

    DEVICE float direction(float gradient, float &first, float &) const {
        first = fmaf(momentum, first, gradient);
        return nesterov ? fmaf(momentum, first, gradient) : first;
    }
};

struct Sgd {
    static constexpr u32 MOMENTS = 0;

    DEVICE Sgd(const OptimizerArguments &, const OptimizerTensor &) {}

    DEVICE float direction(float gradient, float &, float &) const { return gradient; }
};

// Chen et al., "Symbolic Discovery of Optimization Algorithms", algorithm 2.
struct Lion {
    static constexpr u32 MOMENTS = 1;
    float beta1, rest1, beta2, rest2;

    DEVICE Lion(const OptimizerArguments &a, const OptimizerTensor &)
        : beta1((float)a.betas[0]), rest1((float)(1.0 - a.betas[0])), beta2((float)a.betas[1]),
          rest2((float)(1.0 - a.betas[1])) {}

    DEVICE float direction(float gradient, float &first, float &) const {
        float mean = fmaf(beta1, first, rest1 * gradient);
        first = fmaf(beta2, first, rest2 * gradient);
        return mean > 0.0f ? 1.0f : mean < 0.0f ? -1.0f : mean;
    }
};

// A chunk of a tensor's state, and how it moves.
struct Moved {
    u64 weights;
    float *first, *second, *masters;
    float rate, decay; // negative learning rate
};

// The values of a packet of gradients; zeros behind the end. A branch a packet, and not a template: instructions are cheap
// beside 28 bytes an element.
template <typename G> DEVICE void load_values(u64 address, u32 count, bool is_whole, float *values) {
    u32 words[1][G::WORDS];
    if (is_whole) {
        load_packets_aligned<G, 1>((const typename G::Bits *)address, words);
    } else {
        for (u32 i = 0; i < G::WORDS; i++) words[0][i] = 0;
        load_packet_scalar<G>((const typename G::Bits *)address, count, words[0]);
    }
    for (u32 slot = 0; slot < PACKET; slot++) values[slot] = G::widen(G::element(words[0], slot));
}

// A packet of weights; zeros behind the end.
template <typename W> DEVICE void load_weights(u64 address, u32 count, bool is_whole, u32 *words) {
    if (is_whole) {
#pragma unroll
        for (u32 i = 0; i < W::WORDS; i += 4) {
            Words4 w = load_words4_to_change(address + i * 4);
            for (u32 j = 0; j < 4; j++) words[i + j] = w.word[j];
        }
        return;
    }
    const typename W::Bits *weights = (const typename W::Bits *)address;
    for (u32 i = 0; i < W::WORDS; i++) words[i] = 0;
#pragma unroll
    for (u32 slot = 0; slot < PACKET; slot++) {
        if (slot < count) W::set(words, slot, weights[slot]);
    }
}

template <typename W> DEVICE void store_weights(u64 address, u32 count, bool is_whole, const u32 *words) {
    if (is_whole) {
#pragma unroll
        for (u32 i = 0; i < W::WORDS; i += 4) {
            store_words4(address + i * 4, {{words[i], words[i + 1], words[i + 2], words[i + 3]}});
        }
        return;
    }
    typename W::Bits *weights = (typename W::Bits *)address;
#pragma unroll
    for (u32 slot = 0; slot < PACKET; slot++) {
        if (slot < count) weights[slot] = (typename W::Bits)W::element(words, slot);
    }
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
DEVICE void move_lane(UpdateRecord &lane, const Chunk &chunk, const Moved &moved, const Clipping &how, const R &rule) {
    constexpr bool HAS_MASTERS = W::WORDS != PACKET;
    constexpr u32 SIZE = sizeof(typename W::Bits);
    // Packets loaded before the first is used: with one of plain SGD only 32 KiB of a multiprocessor are in flight.
    constexpr u32 AT_ONCE = R::MOMENTS == 0 ? 2 : 1;
    bool is_aligned = (chunk.address | moved.weights) % 16 == 0;
    lane = {};
    SlotSums slots[PACKET];
    u32 lost = 0, nonfinite = 0;
    auto load = [&](Packet<W> &packet, u32 index, u32 count) {
        bool is_whole = is_aligned && count == PACKET;
        if (R::MOMENTS > 0) packet.first = load_floats(moved.first + index);
        if (R::MOMENTS > 1) packet.second = load_floats(moved.second + index);
        if (HAS_MASTERS) packet.masters = load_floats(moved.masters + index);
        load_weights<W>(moved.weights + index * SIZE, count, is_whole, packet.weights);
#define LOAD(G) load_values<G>(chunk.address + index * sizeof(typename G::Bits), count, is_whole, packet.gradients)
        FOR_DTYPE(chunk.dtype, LOAD)
#undef LOAD
    };
    auto move = [&](Packet<W> &packet, u32 index, u32 count) {
#pragma unroll
        for (u32 slot = 0; slot < PACKET; slot++) {
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
            float direction = fmaf(moved.decay, before, rule.direction(clipped, mean, square));
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
        if (R::MOMENTS > 0) store_floats(moved.first + index, packet.first);
        if (R::MOMENTS > 1) store_floats(moved.second + index, packet.second);
        if (HAS_MASTERS) store_floats(moved.masters + index, packet.masters);
        store_weights<W>(moved.weights + index * SIZE, count, is_aligned && count == PACKET, packet.weights);
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
        // Where a sum of squares is not finite, an element may be none.
        if (tile.weight_squares < bits_to_float(INFINITY_BITS)) return;
#pragma unroll 1
        for (u32 i = 0; i < PACKETS * PACKET; i++) {
            u32 index = first + i / PACKET * RUN + i % PACKET;
            if (index >= chunk.length) break;
            u32 bits = ((const typename W::Bits *)moved.weights)[index];
            nonfinite += magnitude<W>(bits) < W::INFINITY_MAGNITUDE ? 0 : 1;
        }
    };
    auto whole = [&](u32 first) {
        begin();
#pragma unroll 1
        for (u32 p = 0; p < PACKETS; p += AT_ONCE) {
            Packet<W> packets[AT_ONCE];
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) load(packets[i], first + (p + i) * RUN, PACKET);
            LOADS_FIRST();
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
            move(packet, index, count);
        }
        end(first);
    };
    for_parts<PACKETS>(chunk.length, is_aligned, whole, rest);
    lane.lost = lost;
    lane.nonfinite_count = nonfinite;
}

struct OptimizerScratch {
    UpdateRecord runs[LANES];
    u32 last;
};

// A NaN as the CPU has it.
DEVICE double plain(double sum) { return sum == sum ? sum : bits_to_double(0x7ff8000000000000ull); }

template <typename R> DEVICE void move_all(OptimizerScratch &scratch, const OptimizerArguments &a) {
    u32 action = a.outputs->action;
    double unscale = 1.0 / divisor_of(a.outputs->loss_scale);
    Clipping how = {a.outputs->coefficient, bits_to_float(INFINITY_BITS), (action / GRADPROBE_ACTION_ZERO_NONFINITE & 1) - 1};
    if (action & GRADPROBE_ACTION_CLAMP) how.limit = a.clip_state->limit;
    for (u32 index = blockIdx.x; index < a.chunk_count; index += gridDim.x) {
        u32 tensor = a.chunk_tensors[index];
        if (action & GRADPROBE_ACTION_SCALE_TENSORS) how.coefficient = a.coefficients[tensor];
        Chunk chunk = chunk_of(a, index, tensor);
        const OptimizerTensor &state = a.states[tensor];
        const Other &weight = a.weights[tensor];
        u64 before = (u64)(index - a.tensors[tensor].first_chunk) * CHUNK;
        float learning_rate = *a.learning_rate * state.learning_rate_factor;
        Moved moved = {weight.address + before * (weight.dtype == DTYPE_F32 ? 4 : 2),
                       a.first + state.offset + before,
                       a.second + state.offset + before,
                       a.masters + state.master_offset + before,
                       -learning_rate,
                       state.weight_decay};
        R rule(a, state);
        UpdateRecord &lane = scratch.runs[threadIdx.x];
#define MOVE(W) move_lane<W>(lane, chunk, moved, how, rule)
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
            double rate = (double)learning_rate;
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
    case RULE_MOMENTUM:
    case RULE_NESTEROV: move_all<Momentum>(scratch, a); break;
    case RULE_SGD: move_all<Sgd>(scratch, a); break;
    default: move_all<Lion>(scratch, a); break;
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
