// What a card can do at best, beside which benches/gpu/main.rs sets the kernels: a plain sum of 16-byte loads, and a plain
// scaling in place by 16-byte loads and stores. Compiled when the bench starts, in several shapes; the fastest counts.
struct alignas(16) Words {
    unsigned x, y, z, w;
};

template <int UNROLL> __device__ void sum(const Words *words, unsigned long long count, unsigned *sums) {
    unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    unsigned total = 0;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += UNROLL * stride) {
        Words read[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            unsigned long long at = i + u * stride; // Beyond the end the first is read again: only time counts here.
            asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(read[u].x), "=r"(read[u].y), "=r"(read[u].z), "=r"(read[u].w)
                         : "l"(words + (at < count ? at : i)));
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) total += read[u].x + read[u].y + read[u].z + read[u].w;
    }
    sums[(unsigned long long)blockIdx.x * blockDim.x + threadIdx.x] = total;
}

template <int UNROLL> __device__ void scale(Words *words, unsigned long long count, unsigned factor) {
    unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += UNROLL * stride) {
        Words read[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (i + u * stride < count) read[u] = words[i + u * stride];
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            Words &w = read[u];
            if (i + u * stride < count) words[i + u * stride] = {w.x * factor, w.y * factor, w.z * factor, w.w * factor};
        }
    }
}

#define SHAPE(UNROLL)                                                                                               \
    extern "C" __global__ void sum_##UNROLL(const Words *words, unsigned long long count, unsigned *sums) {         \
        sum<UNROLL>(words, count, sums);                                                                            \
    }                                                                                                               \
    extern "C" __global__ void scale_##UNROLL(Words *words, unsigned long long count, unsigned factor) {            \
        scale<UNROLL>(words, count, factor);                                                                        \
    }
SHAPE(1)
SHAPE(2)
SHAPE(4)
SHAPE(8)
