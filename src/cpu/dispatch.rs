//! Runs the chunk reduction under the widest instruction set the machine has. The code is the same, and so are the
//! bits: `mul_add` is one rounding whether an instruction or libm does it. The one module of this backend with
//! `unsafe` code.
#![allow(unsafe_code, reason = "calls into code compiled for instruction sets that were detected at run time")]

use super::chunk;
use crate::{Element, Record, dtype::sealed::Bits};

/// [`chunk::chunk`], compiled for this machine.
pub(super) fn chunk<E: Element>(elements: &[E], dead_bits: <E as Bits>::Word) -> Record {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,f16c,bmi2,lzcnt,popcnt")]
        fn avx512<E: Element>(elements: &[E], dead_bits: E::Word) -> Record {
            chunk::chunk(elements, dead_bits)
        }
        #[target_feature(enable = "avx2,fma,f16c,bmi2,lzcnt,popcnt")]
        fn avx2<E: Element>(elements: &[E], dead_bits: E::Word) -> Record {
            chunk::chunk(elements, dead_bits)
        }
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
        if avx2_and_fma && avx512_too {
            // SAFETY: every feature named on `avx512` was just detected.
            return unsafe { avx512(elements, dead_bits) };
        }
        if avx2_and_fma {
            // SAFETY: every feature named on `avx2` was just detected.
            return unsafe { avx2(elements, dead_bits) };
        }
    }
    chunk::chunk(elements, dead_bits)
}
