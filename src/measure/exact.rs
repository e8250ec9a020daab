//! Sums of f64 without rounding and without order. `kernels/exact.cuh` has the same layout.
//!
//! A number is a multiple of 2^-352 and falls into at most three limbs of 32 bits; adding it adds three integers.
//! Integers may be added in any order, by any thread or rank, and the sum is rounded once. So the norm of a step does
//! not depend on how its chunks lie on ranks. This is the "long accumulator" of Kulisch, *Computer Arithmetic and
//! Validity* (2013), chapter 8, with late carries, as in Collange, Defour, Graillat and Iakymchuk, *Numerical
//! reproducibility for the parallel reduction on multi- and many-core architectures* (2015).

use super::Record;
use bytemuck::{Pod, Zeroable};

/// Limbs of 32 bits and their carries, of which limb k weighs 2^(32k - 352).
///
/// Squares of f32 are multiples of 2^-298. Sums of a chunk in f64 are at least 2^-299, and so multiples of 2^-351. None
/// has a bit below the first limb. They are at most 2^256 each, and 2^54 of them below 2^310; the last limb ends at
/// 2^320.
///
/// A number adds at most 2^32 - 1 to a limb, and 2^32 numbers at most 2^64 - 2^32. A plan has 2^25 chunks. After a
/// carry, all limbs but the last are below 2^32 again, and those of 2^32 ranks may be added. Negative numbers wrap: a
/// limb is then a two's complement and holds 2^31 numbers, 2^63 - 2^31 at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub(crate) struct ExactSum([u64; LIMBS]);

const LIMBS: usize = 21;
const LIMB_BITS: u32 = 32;
const LIMB: u64 = (1 << LIMB_BITS) - 1;
/// The weight of the lowest bit is 2^-LOWEST.
const LOWEST: u32 = 352;

/// The sums of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct StepSums {
    /// Squares of the finite elements, before they are unscaled: the sum of the chunks' f64.
    pub squares: ExactSum,
    pub nan_count: u64,
    pub inf_count: u64,
    /// Chunks with NaN or Inf, also of replicas that are not counted.
    pub nonfinite: u64,
}
// The other side is in kernels/arguments.cuh.
const _: () = assert!(size_of::<StepSums>() == 24 * 8);

impl StepSums {
    /// Adds a tensor's chunks.
    pub fn add(&mut self, chunks: &[Record], is_counted: bool) {
        for chunk in chunks {
            self.nonfinite += u64::from(chunk.has_nonfinite());
            if is_counted {
                self.squares.add(chunk.finite_sum_squares());
                self.nan_count += chunk.nan_count;
                self.inf_count += chunk.inf_count;
            }
        }
    }
}

impl ExactSum {
    /// Adds a finite number. Bits below 2^-352 are cut off.
    #[expect(clippy::cast_possible_truncation, reason = "to the limb")]
    pub fn add(&mut self, value: f64) {
        const FRACTION: u64 = (1 << (f64::MANTISSA_DIGITS - 1)) - 1;
        /// The exponent field of a number whose fraction ends at the lowest bit.
        const FIRST: u64 = 1075 - LOWEST as u64;
        let bits = value.to_bits();
        let (exponent, fraction) = (bits >> 52 & 0x7ff, (bits & FRACTION) | (FRACTION + 1));
        if exponent + 52 < FIRST {
            return;
        }
        let fraction = fraction >> FIRST.saturating_sub(exponent);
        let place = exponent.saturating_sub(FIRST);
        let parts = u128::from(fraction) << (place % u64::from(LIMB_BITS));
        let first = (place / u64::from(LIMB_BITS)) as usize;
        for (limb, shift) in self.0[first..].iter_mut().zip([0, LIMB_BITS, 2 * LIMB_BITS]) {
            let part = (parts >> shift) as u64 & LIMB;
            *limb = if value < 0.0 { limb.wrapping_sub(part) } else { limb.wrapping_add(part) };
        }
    }

    /// Brings all limbs but the last below 2^32.
    pub fn carry(&mut self) {
        for k in 1..LIMBS {
            self.0[k] += self.0[k - 1] >> LIMB_BITS;
            self.0[k - 1] &= LIMB;
        }
    }

    /// Gives the nearest f64, to even between two, of a sum without negative numbers.
    pub fn rounded(mut self) -> f64 {
        self.carry();
        let top = (2..LIMBS).rev().find(|&k| self.0[k] != 0).unwrap_or(2);
        let (below, first) = self.0.split_at(top - 2);
        let bits = first[..3].iter().rev().fold(0u128, |bits, &limb| bits << LIMB_BITS | u128::from(limb));
        let rest = u128::from(below.iter().any(|&limb| limb != 0));
        // 96 bits at most, and a sticky bit for those below: more than twice a fraction's, so that it rounds as all of
        // them would.
        let exponent = 1023 - u64::from(LOWEST) - 1 + (top as u64 - 2) * u64::from(LIMB_BITS);
        #[expect(clippy::cast_precision_loss, reason = "rounding is what is wanted")]
        let nearest = (bits << 1 | rest) as f64;
        nearest * f64::from_bits(exponent << (f64::MANTISSA_DIGITS - 1))
    }

    /// Gives the nearest f64 of a sum of any numbers.
    pub fn rounded_signed(mut self) -> f64 {
        if !self.carry_signed() {
            return self.rounded();
        }
        self.0 = self.0.map(u64::wrapping_neg);
        self.carry_signed();
        -self.rounded()
    }

    /// Brings all limbs but the last, which may be negative, to 0..2^32. Says whether the sum is negative.
    fn carry_signed(&mut self) -> bool {
        for k in 1..LIMBS {
            let over = self.0[k - 1].cast_signed() >> LIMB_BITS;
            self.0[k] = self.0[k].wrapping_add_signed(over);
            self.0[k - 1] &= LIMB;
        }
        self.0[LIMBS - 1].cast_signed() < 0
    }
}

impl std::ops::AddAssign<&ExactSum> for ExactSum {
    fn add_assign(&mut self, other: &ExactSum) {
        for (limb, other) in self.0.iter_mut().zip(other.0) {
            *limb = limb.wrapping_add(other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use num_bigint::BigUint;

    /// value · 2^1074, exact.
    fn integer(value: f64) -> BigUint {
        let (exponent, fraction) = (value.to_bits() >> 52, value.to_bits() & ((1 << 52) - 1));
        if exponent == 0 { fraction.into() } else { BigUint::from(fraction | 1 << 52) << (exponent - 1) }
    }

    /// Whether `value` is the nearest f64 to `sum` · 2^-1074, or the even one of two.
    fn is_nearest(value: f64, sum: &BigUint) -> bool {
        let twice = |number: &BigUint| number << 1u32;
        let (below, above) =
            (integer(value.next_down().max(0.0)) + integer(value), integer(value) + integer(value.next_up()));
        let even = value.to_bits().is_multiple_of(2);
        (below < twice(sum) || even && below == twice(sum) || value == 0.0)
            && (twice(sum) < above || even && above == twice(sum))
    }

    fn check(values: &[f64]) {
        let mut sum = ExactSum::default();
        values.iter().for_each(|&value| sum.add(value));
        let exact: BigUint = values.iter().map(|&value| integer(value)).sum();
        assert!(is_nearest(sum.rounded(), &exact), "{values:?}: {:e}", sum.rounded());
        // The same integer in two parts, one of them carried before.
        let (mut one, mut other) = (ExactSum::default(), ExactSum::default());
        values.iter().rev().step_by(2).for_each(|&value| one.add(value));
        values.iter().rev().skip(1).step_by(2).for_each(|&value| other.add(value));
        one.carry();
        one += &other;
        assert_eq!(one.rounded().to_bits(), sum.rounded().to_bits(), "{values:?}");
        one.carry();
        sum.carry();
        assert_eq!(one, sum);
    }

    #[test]
    fn sums_are_those_of_rationals() {
        let mut random = fastrand::Rng::with_seed(16);
        // Squares of f32, from the smallest subnormal to the largest number, and sums of them rounded to f64.
        let mut square = || {
            let x = f64::from(f32::from_bits(random.u32(1..0x7f80_0000)));
            x * x * (1.0 + random.f64() * f64::from(1u32 << random.u32(..16)))
        };
        for length in 0..400 {
            check(&(0..length).map(|_| square()).collect::<Vec<_>>());
        }
        let (least, greatest) = (f64::from(f32::from_bits(1)).powi(2), f64::from(f32::MAX).powi(2));
        check(&[least]);
        check(&[least.next_down(), greatest, least]);
        check(&[greatest * 2f64.powi(54)]);
        // Ties, to even, and their neighbours.
        for exponent in [-290, -33, 0, 31, 200] {
            let unit = 2f64.powi(exponent);
            for odd in [1.0, 1.0 + f64::EPSILON] {
                let half = f64::EPSILON / 2.0 * unit;
                check(&[odd * unit, half]);
                check(&[odd * unit, half, least]);
                check(&[odd * unit, half.next_down()]);
            }
        }
        assert_eq!(ExactSum::default().rounded(), 0.0);
    }

    #[test]
    fn signs_cancel() {
        let mut random = fastrand::Rng::with_seed(17);
        for length in 1..200 {
            let numbers: Vec<f64> =
                (0..length).map(|_| (random.f64() - 0.5) * 2f64.powi(random.i32(-200..200))).collect();
            let (mut sum, mut other) = (ExactSum::default(), ExactSum::default());
            let (mut positive, mut negative) = (BigUint::ZERO, BigUint::ZERO);
            for &x in &numbers {
                sum.add(x);
                other.add(-x);
                *(if x < 0.0 { &mut negative } else { &mut positive }) += integer(x.abs());
            }
            let (is_negative, exact) =
                if positive < negative { (true, negative - positive) } else { (false, positive - negative) };
            let rounded = sum.rounded_signed();
            assert!(rounded == 0.0 || (rounded < 0.0) == is_negative);
            assert!(is_nearest(rounded.abs(), &exact), "{numbers:?}");
            assert_eq!(other.rounded_signed(), -rounded);
            sum += &other;
            assert_eq!(sum.rounded_signed(), 0.0);
        }
    }

    #[test]
    fn limbs_hold_two_to_the_32_numbers_and_not_one_more() {
        // All bits of three limbs, or of one, from numbers with all bits set.
        let full = f64::from_bits((1023 + 52) << 52 | ((1 << 52) - 1));
        for place in 0..LIMB_BITS {
            let value = full * f64::from_bits(u64::from(1023 + place) << 52);
            let mut one = ExactSum::default();
            one.add(value);
            // 2^32 additions of it, limb by limb; one more would pass 2^64 where all bits are ones.
            let sum = ExactSum(one.0.map(|limb| limb.checked_mul(1 << 32).unwrap()));
            assert!(is_nearest(sum.rounded(), &(integer(value) << 32u32)), "{place}");
            let largest = *one.0.iter().max().unwrap();
            assert_eq!(largest.checked_mul((1 << 32) + 2).is_none(), largest == LIMB, "{place}");
        }
    }
}
