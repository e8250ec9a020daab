// The last steps, kept in a ring on the device: src/history/mod.rs documents it, with the same layouts.
#pragma once
#include "policy.cuh"

// Writes the lines of the tensors; all threads.
DEVICE void keep_tensors(const StepArguments &a) {
    HistoryTensor *line = a.history_tensors + a.outputs->step % a.history_steps * a.tensor_count;
    for (u32 i = threadIdx.x; i < a.tensor_count; i += STEP_THREADS) {
        Record r = load_record(a.records + i);
        double finite = (double)finite_count(r);
        auto share = [&](u64 count) { return finite > 0.0 ? (float)((double)count / finite) : 0.0f; };
        HistoryTensor t;
        t.finite_l2_norm = sqrt(sum_squares(finite, r.mean_or_zero, r.sum_squared_deviations));
        t.max_abs = r.max_abs_or_zero;
        t.zero_fraction = share(r.zero_count);
        t.dead_fraction = share(r.dead_count);
        t.flags = (r.nan_count > 0 ? GRADPROBE_FLAG_NAN : 0) | (r.inf_count > 0 ? GRADPROBE_FLAG_INF : 0) |
                  (r.count == 0 ? NO_ELEMENTS : 0);
        line[i] = t;
    }
}

// Writes the line of a step that is finished; one thread.
DEVICE void keep_step(const StepArguments &a, const StepOutputs &outputs) {
    a.history[(outputs.step - 1) % a.history_steps] = {outputs, *a.tag, 0};
}
