// The CUDA the kernels use, on the host: each thread of a block is a fiber of one OS thread, and whatever makes
// threads wait for each other hands over to the scheduler (src/block.rs). It cannot show memory-model races between
// blocks, which run one after the other, nor alignment faults other than those checked here.
//
// Each function has the meaning that its reference gives it, whatever the kernels want of it: beside it stands the section
// of the CUDA C++ Programming Guide, the CUDA Math API or the PTX ISA. tests/intrinsics.rs compares all with PTX.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// What the scheduler sets before it lets a thread go on.
struct SimtState {
    uint32_t thread, block, grid;
    void *shared;
    uint64_t shared_bytes;
};
extern thread_local SimtState gradprobe_simt_state;

extern "C" {
// Supplied by src/block.rs.
void gradprobe_simt_barrier(const char *file, uint32_t line);
uint64_t gradprobe_simt_shuffle_down(uint64_t bits, uint32_t delta, uint32_t line);
[[noreturn]] void gradprobe_simt_fault(const char *what);
}

struct SimtIndex {
    uint32_t x;
};
#define threadIdx (SimtIndex{gradprobe_simt_state.thread})
#define blockIdx (SimtIndex{gradprobe_simt_state.block})
#define gridDim (SimtIndex{gradprobe_simt_state.grid})

#define DEVICE inline
#define KERNEL(THREADS, BLOCKS) extern "C" void
// One to a kernel: each has the same place.
#define SHARED(T, name) T &name = *static_cast<T *>(simt_shared(sizeof(T)))
// Programming Guide, "Synchronization Functions" and "Warp Shuffle Functions".
#define BARRIER() gradprobe_simt_barrier(__FILE__, __LINE__)
// Says nothing but the order of loads to a compiler.
#define LOADS_FIRST()
#define SHUFFLE_DOWN(value, delta) simt_shuffle_down(value, delta, __LINE__)

inline void *simt_shared(uint64_t bytes) {
    if (bytes > gradprobe_simt_state.shared_bytes) gradprobe_simt_fault("more shared memory than there is");
    return gradprobe_simt_state.shared;
}

template <typename T> inline T simt_shuffle_down(T value, uint32_t delta, uint32_t line) {
    static_assert(sizeof(T) <= 8, "one register pair");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = gradprobe_simt_shuffle_down(bits, delta, line);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

// Programming Guide, "Atomic Functions": each returns the old value. Unsigned integers alone: of floats "atom" (PTX ISA) may
// flush subnormals, and CUDA has none of the others for them.
template <typename T> constexpr bool SIMT_HAS_ATOMICS = std::is_same<T, u32>::value || std::is_same<T, u64>::value;
template <typename T> T atomicAdd(T *address, T value) {
    static_assert(SIMT_HAS_ATOMICS<T>, "u32 or u64");
    T old = *address;
    *address = old + value;
    return old;
}
template <typename T> T atomicMax(T *address, T value) {
    static_assert(SIMT_HAS_ATOMICS<T>, "u32 or u64");
    T old = *address;
    if (value > old) *address = value;
    return old;
}
template <typename T> T atomicMin(T *address, T value) {
    static_assert(SIMT_HAS_ATOMICS<T>, "u32 or u64");
    T old = *address;
    if (value < old) *address = value;
    return old;
}
template <typename T> T atomicOr(T *address, T value) {
    static_assert(SIMT_HAS_ATOMICS<T>, "u32 or u64");
    T old = *address;
    *address = old | value;
    return old;
}
// CUDA Math API, "Integer Intrinsics": a value between 0 and 64 inclusive.
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll((unsigned long long)value); }
// PTX ISA, "atom" and "fence". Blocks run one after the other: there is nothing to order.
inline u32 count_released(u32 *counter, u32 amount) {
    u32 before = *counter;
    *counter = before + amount;
    return before;
}
inline void acquire() {}

struct alignas(16) Words4 {
    u32 word[4];
};
struct LongPair {
    u64 x, y;
};

// PTX ISA, "ld", "ld.global.nc" and "st": the first element of a vector is at the lowest address. "Addresses as Operands":
// that is a multiple of the size of the whole vector.
inline Words4 load_words4(const void *address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) gradprobe_simt_fault("misaligned load of 16 bytes");
    return *static_cast<const Words4 *>(address);
}
inline Words4 load_words4_if(bool wanted, const void *address) { return wanted ? load_words4(address) : Words4{}; }
inline Words4 load_words4_to_change(u64 address) { return load_words4(reinterpret_cast<const void *>(address)); }
inline void store_words4(u64 address, const Words4 &words) {
    if (address % 16 != 0) gradprobe_simt_fault("misaligned store of 16 bytes");
    *reinterpret_cast<Words4 *>(address) = words;
}
inline u32 load_element(const u32 *address) { return *address; }
inline u32 load_element(const u16 *address) { return *address; }
inline LongPair load_fresh(const u64 *address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) gradprobe_simt_fault("misaligned load of two words");
    return {address[0], address[1]};
}
inline u32 load_fresh(const u32 *address) { return *address; }
// PTX ISA, "prefetch": no effect on a program. Reads, so that AddressSanitizer sees an address outside a tensor.
inline void prefetch(u64 address) { (void)*reinterpret_cast<const volatile char *>(address); }

// Math API, "Type Casting Intrinsics": the bits as they are, those of a NaN too.
inline float bits_to_float(u32 bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline u32 float_to_bits(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline double bits_to_double(u64 bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}
inline u64 double_to_bits(double value) {
    u64 bits;
    memcpy(&bits, &value, 8);
    return bits;
}

// PTX ISA, "cvt", of .f32.f16: exact, subnormals included. Which NaN a NaN becomes is left open ("Floating-Point
// Instructions": "an unspecified NaN"); here it keeps its bits, and tests on PTX see another.
inline float half_to_float(u16 bits) {
    u32 sign = (u32)(bits & 0x8000u) << 16, exponent = bits >> 10 & 0x1fu, fraction = bits & 0x3ffu;
    if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000u | fraction << 13);
    float magnitude = std::ldexp((float)(exponent == 0 ? fraction : fraction | 0x400u), (int)(exponent == 0 ? 1 : exponent) - 25);
    return bits_to_float(sign | float_to_bits(magnitude));
}

// PTX ISA, "cvt", .rn.f16.f32: to nearest, ties to even, by the current rounding of a scaled integer; overflow gives Inf.
// Which NaN is left open.
inline u16 float_to_half(float value) {
    u32 bits = float_to_bits(value);
    u16 sign = (u16)(bits >> 16 & 0x8000u);
    double magnitude = std::fabs((double)value);
    if (magnitude != magnitude) return 0x7fff;
    if (magnitude >= 65520.0) return (u16)(sign | 0x7c00u);
    int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
    // In units of the last place; a carry into the next binade is a carry in the bits as well.
    u32 units = (u32)std::nearbyint(std::ldexp(magnitude, 10 - exponent));
    return (u16)(sign | (((u32)(exponent + 14) << 10) + units));
}

// PTX ISA, "prmt", in its generic form: "The msb defines if the byte value should be copied, or if the sign (msb of the
// byte) should be replicated over all 8 bits".
template <u32 SELECTOR> inline u32 permute_bytes(u32 a, u32 b) {
    u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
        u32 nibble = SELECTOR >> 4 * i & 0xfu;
        u32 byte = (u32)(bytes >> 8 * (nibble & 7)) & 0xffu;
        if (nibble & 8) byte = byte & 0x80u ? 0xffu : 0;
        result |= byte << 8 * i;
    }
    return result;
}

// PTX ISA, "shf": "The .r modifier shifts right", "the 32-bit result is the lower word of [b:a] >> n", "n = c & 0x1f".
inline u32 shift_right_wide(u32 low, u32 high, u32 bits) { return (u32)(((u64)high << 32 | low) >> (bits & 31)); }

// Math API, "SIMD Intrinsics": "min(a + b, c)", of a sum that wraps; "per-halfword" of each half alone.
inline u32 __viaddmin_u32(u32 a, u32 b, u32 c) { return a + b < c ? a + b : c; }
inline u32 __viaddmin_u16x2(u32 a, u32 b, u32 c) {
    u32 low = (a + b) & 0xffffu, high = ((a >> 16) + (b >> 16)) & 0xffffu;
    return (high < c >> 16 ? high : c >> 16) << 16 | (low < (c & 0xffffu) ? low : c & 0xffffu);
}
// "Performs per-halfword unsigned maximum computation."
inline u32 __vmaxu2(u32 a, u32 b) {
    u32 low = (a & 0xffffu) > (b & 0xffffu) ? a & 0xffffu : b & 0xffffu;
    u32 high = a >> 16 > b >> 16 ? a >> 16 : b >> 16;
    return high << 16 | low;
}
// Math API, "Integer Intrinsics": "Four-way signed int8 dot product with int32 accumulate"; PTX ISA, "dp4a". The sum wraps,
// which one of int in C++ may not.
inline int __dp4a(int a, int b, int c) {
    u32 sum = (u32)c;
    for (int i = 0; i < 4; i++) sum += (u32)((int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i));
    return (int)sum;
}
