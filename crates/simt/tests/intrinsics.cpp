// The kernels of intrinsics.cu by the simt.hpp that the compiler is given, as a library for intrinsics.rs: threads wait for
// each other by the scheduler of the process that loads it.
#define GRADPROBE_SIMT
#include "intrinsics.cu"

thread_local SimtState gradprobe_simt_state;
static decltype(gradprobe_simt_barrier) *scheduler_barrier;
static decltype(gradprobe_simt_shuffle_down) *scheduler_shuffle_down;
static decltype(gradprobe_simt_fault) *scheduler_fault;

extern "C" {
// While a thread waits others run, and leave their own state here.
void gradprobe_simt_barrier(const char *file, uint32_t line) {
    SimtState own = gradprobe_simt_state;
    scheduler_barrier(file, line);
    gradprobe_simt_state = own;
}
uint64_t gradprobe_simt_shuffle_down(uint64_t bits, uint32_t delta, uint32_t line) {
    SimtState own = gradprobe_simt_state;
    bits = scheduler_shuffle_down(bits, delta, line);
    gradprobe_simt_state = own;
    return bits;
}
void gradprobe_simt_fault(const char *what) {
    scheduler_fault(what);
    __builtin_unreachable();
}

// What `gradprobe_simt_loaded` of adamw.cpp calls.
void run(const SimtState *state, decltype(gradprobe_simt_barrier) *barrier,
         decltype(gradprobe_simt_shuffle_down) *shuffle_down, decltype(gradprobe_simt_fault) *fault,
         void (*kernel)(const u64 *, u64 *), const u64 *from, u64 *to) {
    gradprobe_simt_state = *state;
    scheduler_barrier = barrier;
    scheduler_shuffle_down = shuffle_down;
    scheduler_fault = fault;
    kernel(from, to);
}
}
