//! What the CUDA backend does on a machine without a GPU: errors that say what is missing, and kernels that compile.
#![cfg(feature = "cuda")]
#![allow(unsafe_code, reason = "asks for the driver's library")]

mod require;

use gradprobe::{
    Error,
    cuda::{self, compile},
    cudarc::driver::sys::is_culib_present,
    device::Kernel,
};
use require::{pointless, skipped};

#[test]
fn a_missing_driver_is_an_error_that_says_where_it_was_looked_for() {
    // SAFETY: loads the library, if it is there, as every use of CUDA does.
    if unsafe { is_culib_present() } {
        return pointless("there is a CUDA driver");
    }
    let Err(error) = cuda::stream(0) else { panic!("a stream without a driver") };
    let Error::DriverNotFound { searched, reason } = &error else { panic!("{error:?}") };
    let library = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so" };
    assert!(searched.contains(library) && !reason.is_empty(), "{error}");
    assert!(error.to_string().contains(reason) && reason.contains(library), "{error}");
}

#[test]
fn nvrtc_compiles_the_kernels_for_old_and_new_gpus() {
    for capability in [(7, 5), (8, 0), (9, 0), (12, 0)] {
        let (major, minor) = capability;
        let ptx = match compile(capability) {
            Ok(ptx) => ptx.to_src(),
            Err(Error::KernelLoad(reason)) if reason.starts_with("no NVRTC") => {
                assert!(reason.contains("nvrtc"), "{reason}");
                return skipped(require::NVCC, &reason);
            }
            Err(error) => panic!("{major}.{minor}: {error}"),
        };
        assert!(ptx.contains(&format!(".target sm_{major}{minor}")), "{major}.{minor}: {ptx:.500}");
        for kernel in Kernel::ALL.iter().map(|kernel| kernel.entry()) {
            assert!(ptx.contains(&format!(".visible .entry {kernel}(")), "{major}.{minor}: no {kernel}");
        }
        // It would change bits.
        assert!(!ptx.contains(".ftz"), "{major}.{minor}: flushes subnormals");
    }
}

#[test]
fn what_nvrtc_says_of_an_architecture_it_does_not_know_is_passed_on() {
    match compile((1, 0)) {
        Err(Error::KernelLoad(reason)) if reason.starts_with("no NVRTC") => skipped(require::NVCC, &reason),
        Err(Error::KernelLoad(reason)) => {
            assert!(reason.contains("NVRTC") && reason.contains("architecture"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
}
