// What differs between nvcc, NVRTC and the host emulation. No toolkit header is included anywhere: the few intrinsics
// the kernels use are built into both CUDA compilers, and crates/simt/simt.hpp supplies them on the host.
//
// Arithmetic is written with plain operators and explicit fma: every compiler is told not to contract (-fmad=false,
// -ffp-contract=off), to keep subnormals and to divide and take roots exactly, so an operator is one IEEE operation.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Checks a struct's layout against `mirror`, where the host has the same. Not with NVRTC, which knows no offsetof.
#ifdef __CUDACC_RTC__
#define ASSERT_OFFSET(type, field, bytes, mirror)
#else
#define ASSERT_OFFSET(type, field, bytes, mirror) static_assert(__builtin_offsetof(type, field) == bytes, mirror)
#endif

#ifdef GRADPROBE_SIMT
#include <simt.hpp>
#else
#define DEVICE __device__ __forceinline__
// A kernel of THREADS threads a block, with at least BLOCKS blocks to a multiprocessor.
#define KERNEL(THREADS, BLOCKS) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
// Memory of type T shared by a block, under this name.
#define SHARED(T, name)                                                                                              \
    __shared__ T name##_memory;                                                                                      \
    T &name = name##_memory
#define BARRIER() __syncthreads()
// Keeps the loads of a warp before the first use of one: before sm_90 the compiler had half of them wait. Of all its lanes.
#define LOADS_FIRST() __syncwarp()
#define SHUFFLE_DOWN(value, delta) __shfl_down_sync(0xffffffffu, value, delta)

struct alignas(16) Words4 {
    u32 word[4];
};
struct LongPair {
    u64 x, y;
};

// Sixteen bytes through the read-only path: gradients do not change while they are measured.
DEVICE Words4 load_words4(const void *address) {
    Words4 w;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
        : "l"(address));
    return w;
}

// The same, or zeros: no branch, so that several are in flight.
DEVICE Words4 load_words4_if(bool wanted, const void *address) {
    Words4 w = {};
    asm("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(w.word[0]), "+r"(w.word[1]), "+r"(w.word[2]), "+r"(w.word[3])
        : "l"(address), "r"((u32)wanted));
    return w;
}

// Sixteen bytes that this thread will write, and their way back.
DEVICE Words4 load_words4_to_change(u64 address) {
    Words4 w;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
                 : "l"(address));
    return w;
}
DEVICE void store_words4(u64 address, const Words4 &w) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(w.word[0]), "r"(w.word[1]),
                 "r"(w.word[2]), "r"(w.word[3])
                 : "memory");
}

// One element through the read-only path.
DEVICE u32 load_element(const u32 *address) {
    u32 value;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(address));
    return value;
}
DEVICE u32 load_element(const u16 *address) {
    u16 value;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(value) : "l"(address));
    return value;
}

// Words other blocks have written in this launch: from L2, since a line of L1 may be older than the write.
DEVICE LongPair load_fresh(const u64 *address) {
    LongPair pair;
    asm volatile("ld.global.cg.v2.u64 {%0, %1}, [%2];" : "=l"(pair.x), "=l"(pair.y) : "l"(address) : "memory");
    return pair;
}

DEVICE u32 load_fresh(const u32 *address) {
    u32 word;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
    return word;
}

// Adds to a counter, and gives what it was. What this thread wrote before is there for the block that finds all others
// counted, once that has passed `acquire`.
DEVICE u32 count_released(u32 *counter, u32 amount) {
    u32 before;
    asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(amount) : "memory");
    return before;
}
DEVICE void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Has a line of 128 bytes fetched to L2.
DEVICE void prefetch(u64 address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Four bytes of b:a, each chosen by a nibble of the selector: its low three bits say which byte, its top bit whether to
// spread that byte's sign over all eight bits. CUDA's __byte_perm is no substitute: it ignores the top bit.
template <u32 SELECTOR> DEVICE u32 permute_bytes(u32 a, u32 b) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "n"(SELECTOR));
    return bytes;
}

// The lower word of high:low, shifted right by `bits` modulo 32.
DEVICE u32 shift_right_wide(u32 low, u32 high, u32 bits) {
    u32 word;
    asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(low), "r"(high), "r"(bits));
    return word;
}

DEVICE float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float value) { return __float_as_uint(value); }
DEVICE double bits_to_double(u64 bits) { return __longlong_as_double((long long)bits); }
DEVICE u64 double_to_bits(double value) { return (u64)__double_as_longlong(value); }
#endif
