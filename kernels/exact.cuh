// Sums of f64 without rounding and without order: src/measure/exact.rs documents them, with the same layout.
//
// A number is a multiple of 2^-352 and falls into three limbs of 32 bits at most; adding it adds three integers. Integers
// may be added in any order, by any thread, block or rank. Squares of f32, from 2^-298 to 2^256, and their sums over 2^54
// elements fit. A limb is carried once, at the end: a number adds at most 2^32 - 1 to it, and 2^32 numbers 2^64 - 2^32. Where
// some are negative, which wraps, it is 2^31 numbers.
#pragma once
#include "record.cuh"
#include "spec.cuh"

constexpr u32 LIMBS = 21;

// Adds a finite number. Bits below 2^-352 are cut off.
DEVICE void add_exactly(u64 *limbs, double value) {
    constexpr u64 FRACTION = (1ull << 52) - 1;
    u64 bits = double_to_bits(value), fraction = (bits & FRACTION) | (FRACTION + 1);
    u64 sign = bits >> 63 ? ~0ull : 0;
    u32 exponent = (u32)(bits >> 52) & 2047;
    // Of the fraction's last bit, above 2^-352. A subnormal number is far below.
    constexpr u32 LOWEST = 1075 - 352;
    if (exponent + 52 < LOWEST) return;
    if (exponent < LOWEST) fraction >>= LOWEST - exponent;
    u32 place = exponent < LOWEST ? 0 : exponent - LOWEST, limb = place / 32, shift = place % 32;
    u64 parts[3] = {(u32)(fraction << shift), (u32)(fraction >> (32 - shift)), fraction >> 32 >> (32 - shift)};
    for (u32 i = 0; i < 3; i++) {
        if (parts[i] != 0) atomicAdd(&limbs[limb + i], (parts[i] ^ sign) - sign);
    }
}

// Brings all limbs but the last below 2^32, which leaves room to add those of 2^32 ranks; one thread.
DEVICE void carry(u64 *limbs) {
    for (u32 i = 0; i + 1 < LIMBS; i++) {
        limbs[i + 1] += limbs[i] >> 32;
        limbs[i] = (u32)limbs[i];
    }
}

// The nearest f64, to even between two, of a sum of numbers of which none is negative; one thread. Carries.
DEVICE double rounded(u64 *limbs) {
    carry(limbs);
    u32 top = LIMBS - 1;
    while (top > 2 && limbs[top] == 0) top--;
    // The first 64 bits, and whether there is more.
    u64 high = limbs[top] << 32 | limbs[top - 1], low = limbs[top - 2] << 32;
    u32 shift = smaller((u32)__clzll((long long)high), 63);
    high = high << shift | low >> 1 >> (63 - shift);
    low <<= shift;
    for (u32 i = 0; i + 2 < top; i++) low |= limbs[i];
    if (low != 0) high |= 1;
    u32 exponent = 1023 - 352 + 32 * (top - 1) - shift;
    return (double)high * bits_to_double((u64)exponent << 52);
}

// Brings all limbs but the last to 0..2^32, where they may be negative, and says whether the sum is; one thread.
DEVICE bool carry_signed(u64 *limbs) {
    for (u32 i = 0; i + 1 < LIMBS; i++) {
        limbs[i + 1] += (u64)((long long)limbs[i] >> 32);
        limbs[i] = (u32)limbs[i];
    }
    return (long long)limbs[LIMBS - 1] < 0;
}

// The nearest f64 of a sum of any numbers.
DEVICE double rounded_signed(u64 *limbs) {
    if (!carry_signed(limbs)) return rounded(limbs);
    for (u32 i = 0; i < LIMBS; i++) limbs[i] = 0 - limbs[i];
    carry_signed(limbs);
    return -rounded(limbs);
}
