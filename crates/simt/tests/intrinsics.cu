// Each intrinsic of platform.cuh, and each operation of the language that the kernels leave to the compiler, applied to
// rows of inputs. intrinsics.rs compares what the C++ compiler makes of this by simt.hpp with the PTX that nvcc makes.
//
// A thread has a row of IN words and writes its row of OUT words, both in the order in which intrinsics.rs names them.
#include "../../../kernels/spec.cuh"

constexpr u32 IN = 4;

struct Row {
    const u64 *in;
    u64 *out;
    u32 column = 0;

    DEVICE Row(const u64 *from, u64 *to, u32 outputs)
        : in(from + (u64)(blockIdx.x * LANES + threadIdx.x) * IN),
          out(to + (u64)(blockIdx.x * LANES + threadIdx.x) * outputs) {}
    DEVICE u32 word(u32 i) const { return (u32)in[i]; }
    DEVICE float number(u32 i) const { return bits_to_float((u32)in[i]); }
    DEVICE double wide(u32 i) const { return bits_to_double(in[i]); }
    DEVICE void put(u64 value) { out[column++] = value; }
    DEVICE void put_float(float value) { put(float_to_bits(value)); }
    DEVICE void put_double(double value) { put(double_to_bits(value)); }
};

KERNEL(LANES, 1) integers(const u64 *from, u64 *to) {
    Row row(from, to, 13);
    u32 a = row.word(0), b = row.word(1), c = row.word(2);
    row.put(permute_bytes<0xfdb9>(a, b));
    row.put(permute_bytes<0x3210>(a, b));
    row.put(permute_bytes<0x7654>(a, b));
    row.put(permute_bytes<0x0246>(a, b));
    row.put(permute_bytes<0xba98>(a, b));
    row.put(permute_bytes<0xcdef>(a, b));
    row.put(permute_bytes<0x8f70>(a, b));
    row.put(permute_bytes<0x5555>(a, b));
    row.put((u32)__dp4a((int)a, (int)b, (int)c));
    row.put(__viaddmin_u32(a, b, c));
    row.put(shift_right_wide(a, b, c));
    row.put(shift_right_wide(a, b, 16));
    row.put((u32)__clzll((long long)(((u64)a << 32 | b) >> c % 64)));
}

KERNEL(LANES, 1) pairs(const u64 *from, u64 *to) {
    Row row(from, to, 2);
    row.put(__vmaxu2(row.word(0), row.word(1)));
    row.put(__viaddmin_u16x2(row.word(0), row.word(1), row.word(2)));
}

KERNEL(LANES, 1) halves(const u64 *from, u64 *to) {
    Row row(from, to, 4);
    row.put_float(half_to_float((u16)row.word(0)));
    for (u32 i = 1; i < 4; i++) row.put(float_to_half(row.number(i)));
}

// Bits to numbers and back are one movement to a compiler; the comparisons ask what the numbers are.
KERNEL(LANES, 1) casts(const u64 *from, u64 *to) {
    Row row(from, to, 4);
    row.put(float_to_bits(bits_to_float(row.word(0))));
    row.put(double_to_bits(bits_to_double(row.in[1])));
    row.put(bits_to_float(row.word(0)) < 1.0f);
    row.put(bits_to_double(row.in[1]) < 1.0);
}

// Each from another place of the row.
KERNEL(LANES, 1) memory(const u64 *from, u64 *to) {
    Row row(from, to, 24);
    Words4 wanted = load_words4_if(row.word(0) % 2 != 0, row.in + 2), other = load_words4_if(row.word(0) % 2 == 0, row.in);
    LOADS_FIRST();
    Words4 read = load_words4(row.in), changed = load_words4_to_change((u64)(row.in + 2));
    for (u32 i = 0; i < 4; i++) row.put(read.word[i]);
    for (u32 i = 0; i < 4; i++) row.put(changed.word[i]);
    LongPair pair = load_fresh(row.in + 2);
    row.put(pair.x);
    row.put(pair.y);
    row.put(load_fresh((const u32 *)row.in + 3));
    row.put(load_element((const u32 *)row.in + 5));
    row.put(load_element((const u16 *)row.in + 6));
    row.put(load_element((const u16 *)row.in + 9));
    prefetch((u64)row.in);
    store_words4((u64)(row.out + 14), Words4{{read.word[3], read.word[2], changed.word[1], changed.word[0]}});
    row.column = 16;
    for (u32 i = 0; i < 4; i++) row.put(wanted.word[i]);
    for (u32 i = 0; i < 4; i++) row.put(other.word[i]);
}

// What a cell held goes to one column, what it holds then to the next: all eight bytes, for nothing beside it may change.
template <typename T, typename Change> DEVICE void change(Row &row, const Change &by) {
    u64 *cell = row.out + row.column + 1;
    *cell = row.in[0];
    row.put(by((T *)cell, (T)row.in[1]));
    row.column++;
}
KERNEL(LANES, 1) atomics(const u64 *from, u64 *to) {
    Row row(from, to, 15);
    change<u32>(row, [](u32 *cell, u32 by) { return atomicAdd(cell, by); });
    change<u64>(row, [](u64 *cell, u64 by) { return atomicAdd(cell, by); });
    change<u32>(row, [](u32 *cell, u32 by) { return atomicMax(cell, by); });
    change<u64>(row, [](u64 *cell, u64 by) { return atomicMax(cell, by); });
    change<u64>(row, [](u64 *cell, u64 by) { return atomicMin(cell, by); });
    change<u32>(row, [](u32 *cell, u32 by) { return atomicOr(cell, by); });
    // Counted twice, to see what the first left, and set back, as a kernel must do with its counters.
    u64 *counter = row.out + 14;
    *counter = row.in[0];
    u32 before = count_released((u32 *)counter, 1);
    row.put(before);
    row.put(count_released((u32 *)counter, (u32)row.in[1]));
    acquire();
    *(u32 *)counter = before;
}

KERNEL(LANES, 1) floats(const u64 *from, u64 *to) {
    Row row(from, to, 9);
    float a = row.number(0), b = row.number(1), c = row.number(2);
    row.put_float(fabsf(a));
    row.put_float(fmaf(a, b, c));
    row.put_float(a + b);
    row.put_float(a - b);
    row.put_float(a * b);
    row.put_float(a / b);
    row.put_float(-a);
    row.put((a < b ? 1 : 0) | (a > b ? 2 : 0) | (a <= b ? 4 : 0) | (a == b ? 8 : 0) | (a != b ? 16 : 0));
    row.put_double((double)a);
}

KERNEL(LANES, 1) doubles(const u64 *from, u64 *to) {
    Row row(from, to, 10);
    double a = row.wide(0), b = row.wide(1), c = row.wide(2);
    row.put_double(sqrt(a));
    row.put_double(ceil(a));
    row.put_double(fma(a, b, c));
    row.put_double(a + b);
    row.put_double(a - b);
    row.put_double(a * b);
    row.put_double(a / b);
    row.put_double(-a);
    row.put((a < b ? 1 : 0) | (a > b ? 2 : 0) | (a <= b ? 4 : 0) | (a == b ? 8 : 0) | (a != b ? 16 : 0));
    row.put_float((float)a);
}

// Of doubles to integers only those that have a value in C++: the kernels convert no others.
KERNEL(LANES, 1) conversions(const u64 *from, u64 *to) {
    Row row(from, to, 5);
    row.put_double((double)row.in[0]);
    row.put_double((double)row.word(0));
    row.put_float((float)row.word(0));
    row.put((u64)row.wide(1));
    row.put((u32)row.wide(2));
}

// What threads have of each other. All lanes of a block take the number of the block for the distance, 32 and more
// included.
struct Exchange {
    u64 words[LANES];
    u32 largest, sum;
};
KERNEL(LANES, 1) threads(const u64 *from, u64 *to) {
    Row row(from, to, 10);
    SHARED(Exchange, exchange);
    u32 lane = threadIdx.x, distance = blockIdx.x;
    if (lane == 0) exchange.largest = exchange.sum = 0;
    exchange.words[lane] = row.in[0];
    BARRIER();
    row.put(exchange.words[(lane + 37) % LANES]);
    atomicMax(&exchange.largest, row.word(0));
    atomicAdd(&exchange.sum, row.word(1));
    BARRIER();
    row.put(exchange.largest);
    row.put(exchange.sum);
    row.put(SHUFFLE_DOWN(row.word(0), distance));
    row.put(SHUFFLE_DOWN(row.in[1], distance));
    row.put_float(SHUFFLE_DOWN(row.number(2), distance));
    row.put_double(SHUFFLE_DOWN(row.wide(3), distance));
    row.put(threadIdx.x);
    row.put(blockIdx.x);
    row.put(gridDim.x);
}
