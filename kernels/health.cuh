// Health words by rules that one step decides by itself: src/health/threshold.rs documents them, with the same
// operations.
#pragma once
#include "history.cuh"

constexpr u32 STATISTIC_NORM = 0;
constexpr u32 STATISTIC_RMS = 1;
constexpr u32 STATISTIC_MAX_ABS = 2;
constexpr u32 STATISTIC_ZERO_FRACTION = 3;
constexpr u32 STATISTIC_DEAD_FRACTION = 4;
constexpr u32 STATISTIC_RATIO = 5;
constexpr u32 STATISTIC_CHANGE = 6;
constexpr u32 STATISTIC_TOTAL_NORM = 7;
constexpr u32 STATISTIC_TOTAL_CHANGE = 8;
constexpr u32 STATISTIC_SPREAD = 9;
constexpr u32 RULE_BELOW = 1;
constexpr u32 RULE_NOT_ZERO = 2;
constexpr u32 KIND_NAN = 0;
constexpr u32 KIND_INF = 1;
constexpr u32 KIND_SPREAD = 7;
constexpr u32 NONFINITE_WORD = 1u << (16 + KIND_NAN) | 1u << (16 + KIND_INF);

// What the rules on a step look at, and the union of its tensors' words. In shared memory; norms as their bits, which
// are in the order of the norms.
struct StepHealth {
    u64 largest, smallest;
    u32 word;
    u32 has_elements;
};

// The bit that a value raises.
DEVICE u32 rule_bit(const ThresholdRule &rule, double value) {
    bool below = rule.flags & RULE_BELOW;
    if (below ? value < rule.critical : value > rule.critical) return 1u << (16 + (rule.kind & 15));
    if (below ? value < rule.warning : value > rule.warning) return 1u << (rule.kind & 15);
    return 0;
}

DEVICE bool concerns(const ThresholdRule &rule, double norm) { return !(rule.flags & RULE_NOT_ZERO) || norm > 0.0; }

// The word of a tensor with these norms: its own, that of its weight and that of the last clean step.
DEVICE u32 tensor_word(const HealthRules &rules, const Record &r, double norm, double param_norm, double last_norm) {
    if (r.nan_count + r.inf_count > 0) {
        return (r.nan_count > 0 ? 1u << (16 + KIND_NAN) : 0) | (r.inf_count > 0 ? 1u << (16 + KIND_INF) : 0);
    }
    if (r.count == 0) return 0;
    double count = (double)r.count;
    auto known = [](double divisor) { return divisor > 0.0 && divisor < bits_to_double(0x7ff0000000000000ull); };
    u32 word = 0;
    for (u32 i = 0; i < rules.count; i++) {
        const ThresholdRule &rule = rules.rules[i];
        double value;
        if (rule.statistic == STATISTIC_NORM) {
            value = norm;
        } else if (rule.statistic == STATISTIC_RMS) {
            value = norm / sqrt(count);
        } else if (rule.statistic == STATISTIC_MAX_ABS) {
            value = (double)r.max_abs_or_zero;
        } else if (rule.statistic == STATISTIC_ZERO_FRACTION) {
            value = (double)r.zero_count / count;
        } else if (rule.statistic == STATISTIC_DEAD_FRACTION) {
            value = (double)r.dead_count / count;
        } else if (rule.statistic == STATISTIC_RATIO && known(param_norm)) {
            value = norm / param_norm;
        } else if (rule.statistic == STATISTIC_CHANGE && known(last_norm)) {
            value = norm / last_norm;
        } else {
            continue;
        }
        if (concerns(rule, norm)) word |= rule_bit(rule, value);
    }
    return word;
}

// Writes the words of the tensors and, of a step that is finite, keeps their norms. By all threads, between barriers;
// `step` is cleared before.
DEVICE void judge_tensors(StepHealth &step, const StepArguments &a, bool finite) {
    const u32 *exempt = (const u32 *)(a.health_rules + 1);
    double *last_norms = a.last_norms + 1;
    for (u32 i = threadIdx.x; i < a.tensor_count; i += STEP_THREADS) {
        Record r = load_record(a.records + i);
        double norm = sqrt(sum_squares((double)finite_count(r), r.mean_or_zero, r.sum_squared_deviations));
        double param_norm = 0.0;
        if (a.weights) {
            Record w = load_record(a.records + a.tensor_count + i);
            // One that is not finite is not known.
            if (w.nan_count + w.inf_count == 0) param_norm = sqrt(sum_squares((double)w.count, w.mean_or_zero, w.sum_squared_deviations));
        }
        u32 word = tensor_word(*a.health_rules, r, norm, param_norm, last_norms[i]);
        if (!(word & NONFINITE_WORD)) word &= ~(exempt[i] | exempt[i] << 16);
        a.health_words[i] = word;
        atomicOr(&step.word, word);
        if (r.count > 0) atomicOr(&step.has_elements, 1u);
        if (norm > 0.0 && r.nan_count + r.inf_count == 0 && !(exempt[i] & 1u << KIND_SPREAD)) {
            atomicMax(&step.largest, double_to_bits(norm));
            atomicMin(&step.smallest, double_to_bits(norm));
        }
        if (finite && r.count > 0) last_norms[i] = norm; // one that is absent keeps its own
    }
}

// The word of the step; one thread, after the barrier.
DEVICE u32 judge_step(const StepHealth &step, const StepArguments &a, double total, bool finite) {
    const HealthRules &rules = *a.health_rules;
    double last_total = *a.last_norms, largest = bits_to_double(step.largest), smallest = bits_to_double(step.smallest);
    if (finite) *a.last_norms = total;
    u32 word = step.word;
    if (word & NONFINITE_WORD || !step.has_elements) return word;
    for (u32 i = 0; i < rules.count; i++) {
        const ThresholdRule &rule = rules.rules[i];
        double value;
        if (rule.statistic == STATISTIC_TOTAL_NORM) {
            value = total;
        } else if (rule.statistic == STATISTIC_TOTAL_CHANGE && last_total > 0.0) {
            value = total / last_total;
        } else if (rule.statistic == STATISTIC_SPREAD && largest > 0.0) {
            value = largest / smallest;
        } else {
            continue;
        }
        if (concerns(rule, total)) word |= rule_bit(rule, value);
    }
    return word;
}
