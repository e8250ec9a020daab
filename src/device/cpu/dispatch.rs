//! Runs the loops of this backend under the widest instruction set of the machine. The code is the same, and so are the
//! bits: `mul_add` is one rounding, by an instruction or by libm.
#![allow(unsafe_code, reason = "calls into code compiled for instruction sets that were detected at run time")]

use half::f16;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// Work to be compiled for several instruction sets: `run` and all it calls must be inlined.
pub(crate) trait Work {
    type Output;
    fn run(self, set: impl InstructionSet) -> Self::Output;
}

/// Operations for which the compiler finds no instruction by itself. The bits are those of [`Portable`].
pub trait InstructionSet: Copy {
    /// Widens to the exact values, NaN and Inf included.
    fn widen_f16(self, from: &[f16], to: &mut [f32]);
    /// Narrows to the nearest of each of `from`, ties to even.
    fn narrow_f16(self, from: &[f32], to: &mut [f16]);
    /// Replaces each element by the nearest to its `value`, ties to even.
    fn change_f16(self, elements: &mut [f16], value: impl Fn(f32) -> f32);
    /// Asks for this memory, which is to be read soon.
    #[inline(always)]
    fn prefetch<T>(self, memory: &[T]) {
        for line in memory.chunks((64 / size_of::<T>()).max(1)) {
            self.prefetch_line(line.as_ptr());
        }
    }
    /// Asks for the line at this address, which may be any.
    fn prefetch_line<T>(self, address: *const T);
}

/// Runs on any machine. On aarch64 the loops become vectors of four, as every aarch64 has them.
#[derive(Clone, Copy)]
struct Portable;

impl InstructionSet for Portable {
    /// Moves exponent and fraction to their places in a binary32, then multiplies by 2^112 for the difference of the
    /// two biases: exact, subnormals included. `half`'s own conversion is a call for each element and keeps the loop
    /// from being vectorised.
    #[inline(always)]
    fn widen_f16(self, from: &[f16], to: &mut [f32]) {
        for (from, to) in from.iter().zip(to) {
            let bits = u32::from(from.to_bits());
            let scaled = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
            let nonfinite = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
            *to = f32::from_bits(scaled.to_bits() | nonfinite | (bits & 0x8000) << 16);
        }
    }

    #[inline(always)]
    fn narrow_f16(self, from: &[f32], to: &mut [f16]) {
        half::slice::HalfFloatSliceExt::convert_from_f32_slice(to, from);
    }

    #[inline(always)]
    fn change_f16(self, elements: &mut [f16], value: impl Fn(f32) -> f32) {
        let mut wide = [0.0; 1024];
        for elements in elements.chunks_mut(wide.len()) {
            let wide = &mut wide[..elements.len()];
            self.widen_f16(elements, wide);
            for x in wide.iter_mut() {
                *x = value(*x);
            }
            half::slice::HalfFloatSliceExt::convert_from_f32_slice(elements, wide);
        }
    }

    /// It has no such instruction; the memory is then waited for when it is read.
    #[inline(always)]
    fn prefetch_line<T>(self, _: *const T) {}
}

/// [`Work::run`], compiled for this machine.
pub(crate) fn run<W: Work>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    return x86::run(work);
    #[cfg(not(target_arch = "x86_64"))]
    work.run(Portable)
}

/// The name of the instruction set that [`run`] uses here.
pub(crate) fn name() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    return x86::Level::here().name();
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{InstructionSet, OnceLock, Portable, Work, f16};
    use std::arch::x86_64::{_MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _mm_prefetch, _mm256_cvtph_ps, _mm256_cvtps_ph};

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub(super) enum Level {
        Portable,
        Avx2,
        Avx512,
    }

    impl Level {
        /// Gives the highest level of this machine, but no higher than the one that `GRADPROBE_CPU` names, if it is
        /// set: for tests and benches of the others.
        pub fn here() -> Self {
            static HERE: OnceLock<Level> = OnceLock::new();
            *HERE.get_or_init(|| {
                let asked = std::env::var("GRADPROBE_CPU").ok();
                let allowed =
                    [Level::Portable, Level::Avx2].into_iter().find(|level| asked.as_deref() == Some(level.name()));
                allowed.map_or(Self::detected(), |allowed| allowed.min(Self::detected()))
            })
        }

        fn detected() -> Self {
            let avx2_and_fma = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt");
            let avx512_too = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512cd");
            match (avx2_and_fma, avx512_too) {
                (true, true) => Self::Avx512,
                (true, false) => Self::Avx2,
                (false, _) => Self::Portable,
            }
        }

        pub fn name(self) -> &'static str {
            match self {
                Self::Portable => "portable",
                Self::Avx2 => "avx2",
                Self::Avx512 => "avx512",
            }
        }
    }

    /// The conversions of F16C, which both levels have; made only where it was detected.
    #[derive(Clone, Copy)]
    struct F16c(());

    impl F16c {
        #[inline(always)]
        fn widen(self, from: [f16; 8]) -> [f32; 8] {
            // SAFETY: F16C was detected when this token was made.
            bytemuck::cast(unsafe { _mm256_cvtph_ps(bytemuck::cast(from)) })
        }

        #[inline(always)]
        fn narrow(self, from: [f32; 8]) -> [f16; 8] {
            // SAFETY: F16C was detected when this token was made.
            bytemuck::cast(unsafe { _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(bytemuck::cast(from)) })
        }
    }

    /// Less than eight elements, and zeros.
    #[inline(always)]
    fn padded(elements: &[f16]) -> [f16; 8] {
        let mut padded = [f16::ZERO; 8];
        padded[..elements.len()].copy_from_slice(elements);
        padded
    }

    impl InstructionSet for F16c {
        /// The multiplication of [`Portable`] costs an Intel machine some 150 cycles for a subnormal operand: gradients
        /// of size 1e-3, of which one in twenty is subnormal, took ten times as long to measure.
        #[inline(always)]
        fn widen_f16(self, from: &[f16], to: &mut [f32]) {
            let ((from, from_rest), (to, to_rest)) = (from.as_chunks::<8>(), to.as_chunks_mut::<8>());
            for (from, to) in from.iter().zip(to) {
                *to = self.widen(*from);
            }
            let padded = self.widen(padded(from_rest));
            to_rest.copy_from_slice(&padded[..to_rest.len()]);
        }

        #[inline(always)]
        fn narrow_f16(self, from: &[f32], to: &mut [f16]) {
            let ((from, from_rest), (to, to_rest)) = (from.as_chunks::<8>(), to.as_chunks_mut::<8>());
            for (from, to) in from.iter().zip(to) {
                *to = self.narrow(*from);
            }
            for (from, to) in from_rest.iter().zip(to_rest) {
                *to = f16::from_f32(*from);
            }
        }

        /// In registers from the load to the store: through a buffer it took half as long again.
        #[inline(always)]
        fn change_f16(self, elements: &mut [f16], value: impl Fn(f32) -> f32) {
            let (eights, rest) = elements.as_chunks_mut::<8>();
            for eight in eights {
                *eight = self.narrow(self.widen(*eight).map(&value));
            }
            let padded = self.narrow(self.widen(padded(rest)).map(&value));
            rest.copy_from_slice(&padded[..rest.len()]);
        }

        #[inline(always)]
        fn prefetch_line<T>(self, address: *const T) {
            // SAFETY: a hint, which no address makes a fault; every x86-64 has it.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
        }
    }

    pub(super) fn run<W: Work>(work: W) -> W::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,f16c,bmi2,lzcnt,popcnt")]
        fn avx512<W: Work>(work: W) -> W::Output {
            work.run(F16c(()))
        }
        #[target_feature(enable = "avx2,fma,f16c,bmi2,lzcnt,popcnt")]
        fn avx2<W: Work>(work: W) -> W::Output {
            work.run(F16c(()))
        }
        match Level::here() {
            // SAFETY: every feature named on `avx512` was detected.
            Level::Avx512 => unsafe { avx512(work) },
            // SAFETY: every feature named on `avx2` was detected.
            Level::Avx2 => unsafe { avx2(work) },
            Level::Portable => work.run(Portable),
        }
    }
}
