// The kernels of examples/adamw on the host, such as users write them: in CUDA's own words and with parameters of their
// own.
#define GRADPROBE_SIMT
#include "../../kernels/spec.cuh"
#include "described.hpp"

#define __global__
#define __device__ inline
#define blockDim (SimtIndex{LANES})
#include "../../examples/adamw/adamw.cu"

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

extern "C" const SimtKernel *gradprobe_simt_user_kernel(u32 index) { return kernel_at(kernels, index); }
