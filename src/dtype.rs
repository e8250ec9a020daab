//! The three element types of gradients, and the numbers that their bits stand for.
//!
//! [`Element`] holds all that the backends need of an element type: the contract types, the CPU backend and the host
//! side of the kernels are written once over it.

use bytemuck::Pod;
use half::{bf16, f16};

/// Type of the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(u32)]
pub enum DType {
    /// IEEE 754 binary32.
    F32 = 0,
    /// IEEE 754 binary16.
    F16 = 1,
    /// bfloat16: the upper half of a binary32.
    BF16 = 2,
}

impl DType {
    /// All the types, in the order of their codes.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name in the safetensors format and the inspector: `F32`, `F16`, `BF16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
        }
    }

    /// The type's code in the kernels.
    pub(crate) const fn code(self) -> u32 {
        self as u32
    }

    /// Gives the bits of the smallest non-negative number of this type that is at least `threshold` when widened, so
    /// that `|x| < threshold` is `bits(|x|) < result`. `threshold` must not be negative or NaN; `threshold_bits` in
    /// `kernels/loss_scale.cuh` has the same operations.
    #[expect(clippy::cast_possible_truncation, reason = "what rounding loses is looked at")]
    pub(crate) fn threshold_bits(self, threshold: f64) -> u32 {
        // −0 is a threshold of 0.
        let threshold = threshold.abs();
        let nearest = threshold as f32;
        // The smallest f32 at or above: a number of a narrower type that is at least this is at least the threshold.
        let widened = nearest.to_bits() + u32::from(f64::from(nearest) < threshold);
        let threshold = f32::from_bits(widened);
        match self {
            DType::F32 => widened,
            // The 16 upper bits of a binary32; any bit lost means that the next pattern is the first at or above.
            DType::BF16 => (widened >> 16) + u32::from(widened & 0xffff != 0),
            DType::F16 => {
                let nearest = f16::from_f32(threshold);
                u32::from(nearest.to_bits()) + u32::from(nearest.to_f32() < threshold)
            }
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Implemented by the types in which gradients are stored: `f32`, [`half::f16`] and [`half::bf16`]. Sealed.
pub trait Element: Pod + Send + Sync + PartialEq + std::fmt::Debug + sealed::Bits {
    /// The dtype tag of this type.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}

pub(crate) mod sealed {
    use crate::device::cpu::dispatch::InstructionSet;
    use half::{bf16, f16, slice::HalfFloatSliceExt};

    /// An unsigned integer that holds the bits of an element. Its methods stay this small so that the compiler
    /// vectorises loops over them.
    pub trait Word: Copy + Ord + Default + Into<u32> + 'static {
        const MAX: Self;
        const ONE: Self;
        fn decrement(self) -> Self;
        fn add(self, other: Self) -> Self;
        /// Compares two magnitudes. Their upper bits are clear, so it may be the signed comparison, which AVX2 has.
        fn is_below(self, other: Self) -> bool;
    }

    macro_rules! word {
        ($t:ty) => {
            impl Word for $t {
                const MAX: Self = <$t>::MAX;
                const ONE: Self = 1;
                #[inline(always)]
                fn decrement(self) -> Self {
                    self.wrapping_sub(1)
                }
                #[inline(always)]
                fn add(self, other: Self) -> Self {
                    self.wrapping_add(other)
                }
                #[inline(always)]
                fn is_below(self, other: Self) -> bool {
                    self.cast_signed() < other.cast_signed()
                }
            }
        };
    }
    word!(u16);
    word!(u32);

    /// The bit patterns of an element type.
    pub trait Bits: Copy {
        type Word: Word;
        /// Bits of +Inf; a magnitude at or above is not finite.
        const INFINITY: u32;
        /// A quiet NaN.
        const NAN: Self;
        /// 0.
        const ZERO: Self;
        /// The bits as they are.
        fn bits(self) -> Self::Word;
        /// Bits of |self|.
        fn magnitude(self) -> Self::Word;
        /// The bits of a threshold as a word of this type; `bits` must fit.
        fn word(bits: u32) -> Self::Word;
        /// The exact value as f32. A NaN or Inf may come out as any number: the caller finds those by bits.
        fn widen_finite(self) -> f32;
        /// The value of non-negative, finite bits as f32.
        fn widen_bits(bits: u32) -> f32;
        /// Exact values of `from`, NaN and Inf included.
        fn widen_slice(from: &[Self], to: &mut [f32]);
        /// [`Self::widen_slice`], to be inlined into code that is compiled for several instruction sets.
        fn widen(from: &[Self], to: &mut [f32], set: impl InstructionSet);
        /// Narrows to the nearest of each of `from`, ties to even.
        fn narrow(from: &[f32], to: &mut [Self], set: impl InstructionSet);
        /// Replaces each element by the nearest to its `value`, ties to even. The only NaN that `value` may return is
        /// [`f32::NAN`].
        fn change(elements: &mut [Self], value: impl Fn(f32) -> f32, set: impl InstructionSet);
    }

    impl Bits for f32 {
        type Word = u32;
        const INFINITY: u32 = 0x7f80_0000;
        const NAN: Self = f32::NAN;
        const ZERO: Self = 0.0;
        #[inline(always)]
        fn bits(self) -> u32 {
            self.to_bits()
        }
        #[inline(always)]
        fn magnitude(self) -> u32 {
            self.to_bits() & 0x7fff_ffff
        }
        #[inline(always)]
        fn word(bits: u32) -> u32 {
            bits
        }
        #[inline(always)]
        fn widen_finite(self) -> f32 {
            self
        }
        fn widen_bits(bits: u32) -> f32 {
            f32::from_bits(bits)
        }
        fn widen_slice(from: &[Self], to: &mut [f32]) {
            to.copy_from_slice(from);
        }
        #[inline(always)]
        fn widen(from: &[Self], to: &mut [f32], _: impl InstructionSet) {
            to.copy_from_slice(from);
        }
        #[inline(always)]
        fn narrow(from: &[f32], to: &mut [Self], _: impl InstructionSet) {
            to.copy_from_slice(from);
        }
        #[inline(always)]
        fn change(elements: &mut [Self], value: impl Fn(f32) -> f32, _: impl InstructionSet) {
            for x in elements {
                *x = value(*x);
            }
        }
    }

    /// [`Bits`] of a 16-bit type, from the pattern of its +Inf and functions for an element and for many.
    macro_rules! half_bits {
        ($t:ty, $infinity:literal, $widen:ident, $widen_all:ident, $narrow_all:ident, $change:ident) => {
            impl Bits for $t {
                type Word = u16;
                const INFINITY: u32 = $infinity;
                const NAN: Self = <$t>::NAN;
                const ZERO: Self = <$t>::ZERO;
                #[inline(always)]
                fn bits(self) -> u16 {
                    self.to_bits()
                }
                #[inline(always)]
                fn magnitude(self) -> u16 {
                    self.to_bits() & 0x7fff
                }
                #[inline(always)]
                #[expect(clippy::cast_possible_truncation, reason = "the caller's bits are those of a 16-bit type")]
                fn word(bits: u32) -> u16 {
                    bits as u16
                }
                #[inline(always)]
                fn widen_finite(self) -> f32 {
                    $widen(self.to_bits())
                }
                fn widen_bits(bits: u32) -> f32 {
                    Self::from_bits(Self::word(bits)).to_f32()
                }
                fn widen_slice(from: &[Self], to: &mut [f32]) {
                    from.convert_to_f32_slice(to);
                }
                #[inline(always)]
                fn widen(from: &[Self], to: &mut [f32], set: impl InstructionSet) {
                    $widen_all(from, to, set);
                }
                #[inline(always)]
                fn narrow(from: &[f32], to: &mut [Self], set: impl InstructionSet) {
                    $narrow_all(from, to, set);
                }
                #[inline(always)]
                fn change(elements: &mut [Self], value: impl Fn(f32) -> f32, set: impl InstructionSet) {
                    $change(elements, value, set);
                }
            }
        };
    }
    half_bits!(bf16, 0x7f80, widen_bf16, widen_all_bf16, narrow_all_bf16, change_bf16);
    half_bits!(f16, 0x7c00, widen_finite_f16, widen_all_f16, narrow_all_f16, change_f16);

    #[inline(always)]
    fn widen_bf16(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[inline(always)]
    fn widen_all_bf16(from: &[bf16], to: &mut [f32], _: impl InstructionSet) {
        for (from, to) in from.iter().zip(to) {
            *to = widen_bf16(from.to_bits());
        }
    }

    #[inline(always)]
    fn narrow_all_bf16(from: &[f32], to: &mut [bf16], _: impl InstructionSet) {
        for (from, to) in from.iter().zip(to) {
            let bits = from.to_bits();
            let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
            *to = bf16::from_bits(if from.is_nan() { 0x7fc0 } else { rounded as u16 });
        }
    }

    /// `half` looks for NaNs and rounds one element after the other, which took twice as long as the memory. Two in a
    /// word take a fifth less than one.
    #[inline(always)]
    fn change_bf16(elements: &mut [bf16], value: impl Fn(f32) -> f32, _: impl InstructionSet) {
        // Half a unit less where the last bit that stays is even. The fraction of `f32::NAN` has room for it.
        let rounded = |x: u32| {
            let bits = value(f32::from_bits(x)).to_bits();
            bits + 0x7fff + (bits >> 16 & 1)
        };
        let (pairs, rest) = elements.as_chunks_mut::<2>();
        for pair in pairs {
            let bits: u32 = bytemuck::cast(*pair);
            *pair = bytemuck::cast(rounded(bits << 16) >> 16 | rounded(bits & 0xffff_0000) & 0xffff_0000);
        }
        for x in rest {
            *x = bf16::from_bits((rounded(u32::from(x.to_bits()) << 16) >> 16) as u16);
        }
    }

    #[inline(always)]
    fn widen_all_f16(from: &[f16], to: &mut [f32], set: impl InstructionSet) {
        set.widen_f16(from, to);
    }

    #[inline(always)]
    fn narrow_all_f16(from: &[f32], to: &mut [f16], set: impl InstructionSet) {
        set.narrow_f16(from, to);
    }

    #[inline(always)]
    fn change_f16(elements: &mut [f16], value: impl Fn(f32) -> f32, set: impl InstructionSet) {
        set.change_f16(elements, value);
    }

    /// Moves exponent and fraction to their places in a binary32, then multiplies by 2^112 for the difference of the
    /// two biases: exact, subnormals included. Sign extension carries the sign along. `half`'s own conversion is a call
    /// for each element and keeps the loop around it from being vectorised.
    #[inline(always)]
    #[expect(clippy::cast_sign_loss, reason = "the sign extension is wanted as a bit pattern")]
    fn widen_finite_f16(bits: u16) -> f32 {
        let moved = (i32::from(bits.cast_signed()) << 13) as u32 & 0x8fff_ffff;
        f32::from_bits(moved) * f32::from_bits((127 + 112) << 23)
    }
}

#[cfg(test)]
mod tests {
    use super::{DType, sealed::Bits};
    use half::{bf16, f16};

    #[test]
    fn widening_is_exact_for_every_finite_pattern() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            if h.is_finite() {
                assert_eq!(h.widen_finite().to_bits(), h.to_f32().to_bits(), "f16 {bits:#06x}");
            }
            if b.is_finite() {
                assert_eq!(b.widen_finite().to_bits(), b.to_f32().to_bits(), "bf16 {bits:#06x}");
            }
        }
    }

    #[test]
    fn threshold_bits_separate_below_from_at_least() {
        let thresholds = [
            0.0,
            1e-50,
            f64::from(f32::from_bits(1)),
            1e-10,
            6e-8,
            1e-7,
            0.1,
            1.0,
            65504.0,
            65505.0,
            70000.0,
            f64::from(f32::MAX),
            1e39,
            3e-10,
            6e-8 * 3.0,
        ];
        for threshold in thresholds {
            for bits in 0..0x7c00u16 {
                let below = f16::from_bits(bits).to_f64() < threshold;
                assert_eq!(below, u32::from(bits) < DType::F16.threshold_bits(threshold), "{bits:#x} {threshold}");
            }
            for bits in 0..0x7f80u16 {
                let below = bf16::from_bits(bits).to_f64() < threshold;
                assert_eq!(below, u32::from(bits) < DType::BF16.threshold_bits(threshold), "{bits:#x} {threshold}");
            }
        }
    }
}
