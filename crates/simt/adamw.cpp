// The kernels of examples/adamw on the host, such as users write them: in CUDA's own words and with parameters of their
// own. Each is described, so that it can be found by its name and called with parameters that are only bytes, as the
// driver gets them.
#define GRADPROBE_SIMT
#include "../../kernels/platform.cuh"
#include "../../kernels/spec.cuh"
#include <utility>

#define __global__
#define __device__ inline
#define blockDim (SimtIndex{LANES})
#include "../../examples/adamw/adamw.cu"

constexpr u32 MAX_PARAMETERS = 16;

// src/block.rs has the same.
struct SimtKernel {
    const char *name;
    void (*call)(const u64 *words);
    u32 parameter_count;
    u32 parameter_bytes[MAX_PARAMETERS];
};

// The parameter whose bytes this word begins with.
template <typename P> P parameter(u64 word) {
    static_assert(sizeof(P) <= sizeof word, "a word a parameter");
    P value;
    memcpy(&value, &word, sizeof value);
    return value;
}

template <auto kernel, typename Indices> struct Described;
template <typename... P, void (*kernel)(P...), size_t... I> struct Described<kernel, std::index_sequence<I...>> {
    static void call(const u64 *words) { kernel(parameter<P>(words[I])...); }
};

template <auto kernel, typename... P> constexpr SimtKernel described(const char *name, void (*)(P...)) {
    static_assert(sizeof...(P) <= MAX_PARAMETERS, "src/block.rs has room for so many");
    return {name, Described<kernel, std::index_sequence_for<P...>>::call, sizeof...(P), {(u32)sizeof(P)...}};
}
#define DESCRIBED(kernel) described<kernel>(#kernel, kernel)

// A kernel of a library that a test has built and loaded: with the same scheduler, whatever its simt.hpp says. `run` is
// the library's, which has a state of its own.
typedef void LoadedKernel(const u64 *from, u64 *to);
typedef void Run(const SimtState *, decltype(gradprobe_simt_barrier) *, decltype(gradprobe_simt_shuffle_down) *,
                 decltype(gradprobe_simt_fault) *, LoadedKernel *, const u64 *from, u64 *to);
static void gradprobe_simt_loaded(Run *run, LoadedKernel *kernel, const u64 *from, u64 *to) {
    run(&gradprobe_simt_state, gradprobe_simt_barrier, gradprobe_simt_shuffle_down, gradprobe_simt_fault, kernel, from,
        to);
}

static const SimtKernel kernels[] = {
    DESCRIBED(gradprobe_simt_loaded),
    DESCRIBED(forward_hidden), DESCRIBED(forward_output), DESCRIBED(backward_output),
    DESCRIBED(backward_hidden), DESCRIBED(count_step), DESCRIBED(adamw),
};

// The kernel of this number, or null behind the last.
extern "C" const SimtKernel *gradprobe_simt_user_kernel(u32 index) {
    return index < sizeof kernels / sizeof *kernels ? &kernels[index] : nullptr;
}
