//! Runs the loops of this backend under the widest instruction set the machine has. The code is the same, and so are
//! the bits: `mul_add` is one rounding whether an instruction or libm does it.
#![allow(unsafe_code, reason = "calls into code compiled for instruction sets that were detected at run time")]

/// Something to be compiled for several instruction sets: `run` and all it calls must be inlined.
pub(crate) trait Work {
    type Output;
    fn run(self) -> Self::Output;
}

/// [`Work::run`], compiled for this machine.
pub(crate) fn run<W: Work>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,fma,f16c,bmi2,lzcnt,popcnt")]
        fn avx512<W: Work>(work: W) -> W::Output {
            work.run()
        }
        #[target_feature(enable = "avx2,fma,f16c,bmi2,lzcnt,popcnt")]
        fn avx2<W: Work>(work: W) -> W::Output {
            work.run()
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
            return unsafe { avx512(work) };
        }
        if avx2_and_fma {
            // SAFETY: every feature named on `avx2` was just detected.
            return unsafe { avx2(work) };
        }
    }
    work.run()
}
