// Clip: every element times a coefficient, that of all tensors or its tensor's own, or between two limits; in place,
// rounded to its type. Non-finite elements may become 0.
//
// What to do was decided by the measure kernel and is one word: when it says nothing, a block ends after one load.
// A run of chunks is taken from the last to the first, since the last ones measured are the ones still in L2.
//
// Reads and writes each element once when it clips: 2·n·size bytes.
#include "clipping.cuh"

struct ClipArguments : Common {
    const ClipState *clip_state;
    const float *coefficients; // of the tensors, under a policy that has them
};
static_assert(sizeof(ClipArguments) == 88, "src/clip/cpu.rs");

KERNEL(LANES, 8) gradprobe_clip(ClipArguments a) {
    u32 action = a.outputs->action;
    if (action == 0) return;
    // By arithmetic: of a condition here the compiler made one in the loop.
    u32 kept = (action / GRADPROBE_ACTION_ZERO_NONFINITE & 1) - 1;
    Clipping how = {a.outputs->coefficient, bits_to_float(INFINITY_BITS), kept};
    if (action & GRADPROBE_ACTION_CLAMP) how.limit = a.clip_state->limit;
    Run run = run_of_block(a.chunk_count);
    for (u32 index = run.end; index-- > run.begin;) {
        u32 tensor = a.chunk_tensors[index];
        if (action & GRADPROBE_ACTION_SCALE_TENSORS) {
            how.coefficient = a.coefficients[tensor];
            if (how.coefficient == 1.0f && how.nonfinite_kept) continue;
        }
        Chunk chunk = chunk_of(a, index, tensor);
#define SCALE(E) clip_chunk<E, false>(chunk, how)
#define ZERO_OR_CLAMP(E) clip_chunk<E, true>(chunk, how)
        if (action & (GRADPROBE_ACTION_ZERO_NONFINITE | GRADPROBE_ACTION_CLAMP)) {
            FOR_DTYPE(chunk.dtype, ZERO_OR_CLAMP)
        } else {
            FOR_DTYPE(chunk.dtype, SCALE)
        }
#undef SCALE
#undef ZERO_OR_CLAMP
    }
}
