// From chunks to sections, tensors and the step.
// StepOutputs::finish in src/measure/outputs.rs does the second on the host.
#pragma once
#include "health.cuh"

struct FinishScratch {
    union {
        Record records[LANES];
        StepSums sums;
        u64 counts[LANES];
    };
    CheckSums check;
    u64 state;
    Clip clip;
    StepHealth health;
    u32 last;
};

// Whether the calling block is the last of `count` to get here; resets the counter if so. What thread 0 of the others
// wrote to global memory before is then there for this block to load fresh. A barrier must follow on the way to the
// next call; where it returns true, one has.
DEVICE bool last_of(u32 &scratch, u32 *counter, u32 count) {
    if (threadIdx.x == 0) {
        scratch = count_released(counter, 1) == count - 1;
        if (scratch) {
            acquire();
            *counter = 0;
        }
    }
    BARRIER();
    bool last = scratch;
    if (last) BARRIER(); // all have read it
    return last;
}

// Merges `count` records that lie `stride` apart.
template <typename R> DEVICE void merge_records(R *runs, const R *records, u32 stride, u32 count, R *to) {
    auto item = [&](u32 i) { return load_record(records + i * stride); };
    R all = block_fold(runs, count, item, [](const R &x, const R &y) { return merge(x, y); });
    if (threadIdx.x == 0) *to = all;
}

// Chunks whose records one block merges: eight to a lane. A tensor of more has several sections.
constexpr u32 SECTION = 8 * LANES;

struct Section {
    u32 first, length;
};
DEVICE Section section_of(const TensorEntry &entry, u32 index) {
    u32 begin = (index - entry.first_chunk) / SECTION * SECTION;
    return {entry.first_chunk + begin, smaller(entry.chunk_count - begin, SECTION)};
}

// Merges the parts of a section in the order of spec::fold_spans, in pairs: of a tensor of more than LANES spans, whose
// spans are not folded in pairs, up to each span, whose record takes the place of its first part; else all of it, and
// thread 0 gets it. `runs` may be used again behind a barrier.
template <typename R> DEVICE R merge_section(R *runs, R *parts, u32 length, bool by_spans) {
    u32 each = 1; // parts to a lane, a power of two
    while (each * LANES < length) each *= 2;
    u32 t = threadIdx.x, begin = t * each, end = smaller(begin + each, length);
    auto two = [&](u32 first) {
        R x = load_record(parts + first), y = load_record(parts + smaller(first + 1, length - 1));
        return first + 1 < end ? merge(x, y) : x;
    };
    auto four = [&](u32 first) {
        R x = two(first);
        return first + 2 < end ? merge(x, two(first + 2)) : x;
    };
    bool has_parts = t < LANES && begin < length;
    if (has_parts) {
        runs[t] = four(begin);
        if (begin + 4 < end) runs[t] = merge(runs[t], four(begin + 4));
    }
    u32 all = by_spans ? SPAN : SECTION;
    for (u32 stride = 1; stride * each < smaller(all, length); stride *= 2) {
        BARRIER();
        bool merges = has_parts && (t & (2 * stride - 1)) == 0 && begin + stride * each < length;
        if (merges) runs[t] = merge(runs[t], runs[t + stride]);
    }
    if (by_spans && has_parts && begin % SPAN == 0) parts[begin] = runs[t];
    return t == 0 ? runs[0] : R{};
}

// Merges what is complete with the last part of a section: that, and where it is the last of its tensor the tensor, whose
// record thread 0 then puts at `to`, and calls `done`: a function and not an answer, which the compiler kept in a
// register through every path. By all threads. `parts` has a slot a chunk.
template <typename R, typename Done>
DEVICE void finish_section(R *runs, u32 &last, const Common &a, const Section &section, u32 tensor, R *parts, R *to,
                           const Done &done) {
    const TensorEntry &entry = a.tensors[tensor];
    u32 sections = (entry.chunk_count + SECTION - 1) / SECTION, spans = (entry.chunk_count + SPAN - 1) / SPAN;
    bool by_spans = spans > LANES;
    R merged = merge_section(runs, parts + section.first, section.length, by_spans);
    if (threadIdx.x == 0 && !by_spans) (sections == 1 ? *to : parts[section.first]) = merged;
    BARRIER(); // the runs are free, and what all threads have written is released by the first
    if (sections > 1) {
        if (!last_of(last, a.tensors_done + 1 + tensor, sections)) return;
        merge_records(runs, parts + entry.first_chunk, by_spans ? SPAN : SECTION, by_spans ? spans : sections, to);
    }
    done();
}

// Puts a chunk's record, which thread 0 knows, in its slot, and merges what it is the last part of: its section, its
// tensor.
template <typename R, typename Done>
DEVICE void merge_chunk(R *runs, u32 &last, const Common &a, const R &part, u32 index, u32 tensor, R *parts, R *to,
                        const Done &done) {
    const TensorEntry &entry = a.tensors[tensor];
    if (entry.chunk_count == 1) {
        if (threadIdx.x == 0) *to = part;
        done();
        return;
    }
    if (threadIdx.x == 0) parts[index] = part;
    Section section = section_of(entry, index);
    if (!last_of(last, a.chunks_done + section.first, section.length)) return;
    finish_section(runs, last, a, section, tensor, parts, to, done);
}

// A function of 64 bits that gives no value twice: the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
DEVICE u64 mixed(u64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// Takes words from global memory, that other blocks or launches have added to, and leaves 0 there. A barrier must follow.
DEVICE void take_words(u64 *to, u64 *from, u32 count) {
    if (threadIdx.x >= count / 2) return;
    u64 *words = from + 2 * threadIdx.x;
    LongPair pair = load_fresh(words);
    to[2 * threadIdx.x] = pair.x;
    to[2 * threadIdx.x + 1] = pair.y;
    words[0] = words[1] = 0;
}

// Adds what must be the same on all ranks before they decide a step: its number, the loss scale, and what the clip remembers.
// By all threads, between barriers.
DEVICE void add_state(FinishScratch &scratch, const StepArguments &a) {
    if (threadIdx.x == 0) scratch.state = 0;
    BARRIER();
    u64 sum = 0;
    auto add = [&](u32 place, u64 word) { sum += mixed(word + place * 0x9e3779b97f4a7c15ull); };
    const u64 *words = (const u64 *)a.clip_state;
    for (u32 i = threadIdx.x; i < a.clip_words; i += STEP_THREADS) add(i, words[i]);
    if (threadIdx.x == 0) add(a.clip_words, a.outputs->step);
    if (threadIdx.x == 0 && a.loss_scale) {
        add(a.clip_words + 1, (u64)float_to_bits(a.loss_scale->scale) << 32 | a.loss_scale->growth_tracker);
    }
    if (sum != 0) atomicAdd(&scratch.state, sum);
    BARRIER();
    if (threadIdx.x < 2) a.check->state[threadIdx.x] = scratch.state * a.rank_factors[threadIdx.x];
    if (threadIdx.x == 2) a.check->ranks = 1;
}

// Leaves a step, of many ranks, to be added up with those of the others; by all threads.
DEVICE void leave_step(FinishScratch &scratch, const StepArguments &a) {
    u64 *limbs = (u64 *)a.sums, *words = (u64 *)&scratch.sums;
    if (threadIdx.x < STEP_WORDS / 2) {
        LongPair pair = load_fresh(limbs + 2 * threadIdx.x);
        words[2 * threadIdx.x] = pair.x;
        words[2 * threadIdx.x + 1] = pair.y;
    }
    BARRIER();
    if (threadIdx.x == 0) carry(scratch.sums.squares);
    BARRIER();
    if (threadIdx.x < LIMBS) limbs[threadIdx.x] = scratch.sums.squares[threadIdx.x];
}

// What ranks have added up of what they compare; nothing for one alone. A barrier must follow.
DEVICE void take_check(FinishScratch &scratch, const StepArguments &a) {
    if (a.check) {
        take_words((u64 *)&scratch.check, (u64 *)a.check, CHECK_WORDS);
    } else if (threadIdx.x == 0) {
        scratch.check = {};
    }
}

// Behind `take_check`.
DEVICE void finish_step(FinishScratch &scratch, const StepArguments &a) {
    take_words((u64 *)&scratch.sums, (u64 *)a.sums, STEP_WORDS);
    BARRIER();
    StepSums &all = scratch.sums;
    if (a.history) keep_tensors(a);
    Clip &clip = scratch.clip;
    u64 nan_count = all.nan_count, inf_count = all.inf_count;
    float scale = a.loss_scale ? a.loss_scale->scale : 1.0f;
    const CheckSums &check = scratch.check;
    // Of a rank that has aborted the collective ends before it is done; of none there is nothing before the first step.
    bool is_late = !a.is_part, is_complete = !a.check || check.ranks == a.ranks || (is_late && check.ranks == 0);
    bool state_differs = (check.state[0] | check.state[1]) != 0 || !is_complete;
    bool replicas_differ = (check.replicas[0] | check.replicas[1]) != 0;
    bool refused = !is_complete || (a.strict && (state_differs || replicas_differ));
    bool usable = is_usable(scale), found = all.nonfinite > 0 || !usable;
    bool skip = (found && (a.policy == POLICY_SKIP || !usable)) || refused;
    bool zero = found && a.policy == POLICY_ZERO_NONFINITE && !skip;
    StepOutputs o = {};
    if (threadIdx.x == 0) {
        o.finite_total_norm = sqrt(rounded(all.squares)) / divisor_of(scale);
        o.total_norm = propagate(nan_count, inf_count, o.finite_total_norm);
        scratch.health = {0, ~0ull, 0, 0};
        clip = {zero ? o.finite_total_norm : o.total_norm, found || refused ? 0u : 1u, skip ? 1u : 0u, divisor_of(scale), 1.0, 0.0f, 0, 0, {0, 0}};
    }
    BARRIER();
    if (a.health_rules) {
        judge_tensors(scratch.health, a, clip.finite);
        BARRIER(); // what decides the clip has none when there is nothing to decide
    }
    decide_clip(clip, scratch.counts, a);
    if (threadIdx.x != 0) return;
    o.coefficient_f64 = clip.coefficient;
    o.total_norm_f32 = narrow(o.total_norm);
    o.coefficient = skip ? 1.0f : narrow(o.coefficient_f64 / clip.divisor);
    o.inverse_coefficient = skip ? 1.0f : narrow(clip.divisor / o.coefficient_f64);
    o.found_inf = found || refused ? 1.0f : 0.0f;
    o.skip = skip ? 1 : 0;
    bool scales = o.coefficient != 1.0f, parts = clip.clips_parts;
    bool clips = narrow(o.coefficient_f64) != 1.0f || parts;
    u32 part = a.clip & (CLIP_VALUE | CLIP_QUANTILE) ? GRADPROBE_ACTION_CLAMP : GRADPROBE_ACTION_SCALE_TENSORS;
    o.action = (scales ? GRADPROBE_ACTION_SCALE : 0) | (parts ? part : 0) | (zero ? GRADPROBE_ACTION_ZERO_NONFINITE : 0);
    o.flags = (nan_count > 0 ? GRADPROBE_FLAG_NAN : 0) | (inf_count > 0 ? GRADPROBE_FLAG_INF : 0) |
                (clips ? GRADPROBE_FLAG_CLIPPED : 0) | (skip ? GRADPROBE_FLAG_SKIP : 0) | (clip.spike ? GRADPROBE_FLAG_SPIKE : 0) |
                (usable ? 0 : GRADPROBE_FLAG_LOSS_SCALE) | (replicas_differ ? GRADPROBE_FLAG_REPLICAS : 0) |
                (state_differs ? GRADPROBE_FLAG_STATE : 0);
    o.weights = a.weights;
    o.step = a.outputs->step + 1;
    o.nan_count = nan_count;
    o.inf_count = inf_count;
    o.loss_scale = o.next_loss_scale = scale;
    if (a.check) *a.checked = check;
    if (a.loss_scale) {
        adapt(*a.loss_scale, found);
        o.next_loss_scale = a.loss_scale->scale;
    }
    if (a.health_rules) o.health = judge_step(scratch.health, a, o.finite_total_norm, clip.finite);
    *a.outputs = o;
    if (a.history) keep_step(a, o);
}
