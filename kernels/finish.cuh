// What the last blocks do: a tensor's record from its chunks', and the step's outputs from the records.
// StepOutputs::finish in src/outputs.rs does the second on the host.
#pragma once
#include "block.cuh"

struct FinishScratch {
    union {
        Record records[LANES];
        double squares[LANES];
        u64 counts[LANES][2];
    };
    u32 last;
};

// Whether the calling block is the last of `count` to get here; resets the counter if so. What thread 0 wrote to
// global memory before is then visible to the block that gets true.
DEVICE bool last_of(FinishScratch &scratch, u32 *counter, u32 count) {
    if (threadIdx.x == 0) {
        __threadfence();
        scratch.last = atomicAdd(counter, 1u) == count - 1;
        if (scratch.last) *counter = 0;
        __threadfence();
    }
    BARRIER();
    bool last = scratch.last;
    BARRIER();
    return last;
}

DEVICE void finish_tensor(FinishScratch &scratch, const Arguments &a, u32 tensor, u32 chunk_count) {
    const Record *chunks = a.chunk_records + a.tensors[tensor].first_chunk;
    auto item = [&](u64 i) { return load_record(chunks + i); };
    Record all = block_fold(scratch.records, chunk_count, item, [](const Record &x, const Record &y) { return merge(x, y); });
    if (threadIdx.x == 0) a.records[tensor] = all;
}

DEVICE double propagate(u64 nan_count, u64 inf_count, double finite) {
    if (nan_count > 0) return bits_to_double(0x7ff8000000000000ull);
    if (inf_count > 0) return bits_to_double(0x7ff0000000000000ull);
    return finite;
}

// NaN in f32 with the bits the CPU gives it: a conversion would set all the fraction's bits.
DEVICE float narrow(double value) { return value == value ? (float)value : bits_to_float(0x7fc00000u); }

DEVICE void finish_step(FinishScratch &scratch, const Arguments &a) {
    auto square = [&](u64 i) { return finite_sum_squares(load_record(a.records + i)); };
    double squares = block_fold(scratch.squares, a.tensor_count, square, [](double x, double y) { return x + y; });
    BARRIER();
    u64 counts[2] = {};
    for (u32 i = threadIdx.x; i < a.tensor_count; i += LANES) {
        Record record = load_record(a.records + i);
        counts[0] += record.nan_count;
        counts[1] += record.inf_count;
    }
    for (u32 k = 0; k < 2; k++) scratch.counts[threadIdx.x][k] = counts[k];
    BARRIER();
    if (threadIdx.x != 0) return;
    u64 nan_count = 0, inf_count = 0;
    for (u32 i = 0; i < LANES; i++) {
        nan_count += scratch.counts[i][0];
        inf_count += scratch.counts[i][1];
    }
    bool found = nan_count + inf_count > 0;
    StepOutputs o = {};
    o.finite_total_norm = a.tensor_count == 0 ? 0.0 : sqrt(squares);
    o.total_norm = propagate(nan_count, inf_count, o.finite_total_norm);
    bool skip = found && a.policy == POLICY_SKIP;
    bool zero = found && a.policy == POLICY_ZERO_NONFINITE;
    o.coefficient_f64 = 1.0;
    if (a.max_norm > 0.0 && !skip) {
        double norm = zero ? o.finite_total_norm : o.total_norm;
        double ratio = norm == norm ? a.max_norm / (norm + 1e-6) : norm;
        if (!(ratio > 1.0)) o.coefficient_f64 = ratio;
    }
    o.total_norm_f32 = narrow(o.total_norm);
    o.coefficient = narrow(o.coefficient_f64);
    o.inverse_coefficient = narrow(o.coefficient_f64 == o.coefficient_f64 ? 1.0 / o.coefficient_f64 : o.coefficient_f64);
    o.found_inf = found ? 1.0f : 0.0f;
    o.skip = skip ? 1 : 0;
    bool clipped = o.coefficient != 1.0f;
    o.action = zero ? ACTION_ZERO_AND_SCALE : clipped ? ACTION_SCALE : ACTION_NONE;
    o.verdict = (nan_count > 0 ? VERDICT_NAN : 0) | (inf_count > 0 ? VERDICT_INF : 0) | (clipped ? VERDICT_CLIPPED : 0) |
                (skip ? VERDICT_SKIP : 0);
    o.step = a.outputs->step + 1;
    o.nan_count = nan_count;
    o.inf_count = inf_count;
    *a.outputs = o;
}
