//! A CUDA driver on the host, to test the CUDA backend's own code where there is no GPU: the functions of libcuda that
//! it and `tests/cuda` call, under their names, in a library that is loaded as `libcuda.so` (`.ci/run` shows how).
//!
//! Device memory is host memory, a stream is a thread with a queue, and a launch runs the PTX that was loaded, by
//! `gradprobe-ptx`, each in another order: what is launched is what is interpreted. It shows the calls and their order, not
//! the hardware. `tests/cuda/documented.rs` asks it, and a GPU where there is one, what NVIDIA documents of streams and captures;
//! where that leaves open whether a call waits or what is done later, as of copies from pageable memory, it does both.
//!
//! It forgives less than a real driver does:
//!
//! * what is not allowed in a capture is an error and invalidates the capture;
//! * fresh memory holds garbage, freed memory another, which is looked at before the memory is used again, as is a fence
//!   behind each allocation;
//! * what would be undefined – a copy outside of all allocations, a kernel that reads or writes what is freed, too short or
//!   without a value, races, a graph whose kernels are unloaded, a communicator that is aborted before its work has run, a
//!   handle that is gone, a call without a current context – ends the process with a line that says so;
//! * so does, but only when the process ends, a context that ended before what was made in it, unless it was lost.
//!
//! A function that is not here cannot be called: cudarc panics with its name.
//!
//! | environment variable | |
//! |---|---|
//! | `GRADPROBE_HOST_DRIVER_SEED` | a number: other orders of the kernels' threads and blocks than those of 0 |
//! | `GRADPROBE_HOST_DRIVER_NO_BINARY` | if set, binaries are refused as if they were for other devices, but PTX is not |
//!
//! It is NCCL as well, as much of it as gathers records, when it is loaded as `libnccl.so`: ranks are streams, of one device.
//!
//! Of the functions that no other driver has, `gradprobe_host_driver_trace_begin` and `…_end` tell which calls were made;
//! `…_hold_copies` holds copies to page-locked memory, so that a stream that should wait for one and does not is seen;
//! `…_faults_begin` and its kin (`src/faults.rs`) fail a call, and `…_left` tells what was made and not released.
#![allow(unsafe_code, reason = "C functions that get addresses, and device memory that is host memory")]

mod context;
mod faults;
mod functions;
mod graph;
mod handles;
mod hold;
mod memory;
mod nccl;
mod stream;
mod trace;

use cudarc::driver::sys::CUresult;
use std::ffi::c_int;

/// What a call comes to: a value or one of the driver's errors.
type Outcome<T = ()> = Result<T, CUresult>;

/// Ends the process, for what a GPU would not survive either. An unwinding panic would only end one thread.
fn die(why: &str) -> ! {
    eprintln!("host driver: {why}");
    std::process::abort()
}

/// Says what is wrong and lets the process fail when it ends: for what a test that fails may leave behind, of which the
/// test harness still has to tell.
fn die_at_exit(why: &str) {
    unsafe extern "C" {
        fn atexit(function: extern "C" fn()) -> c_int;
    }
    extern "C" fn fail() {
        die("see above");
    }
    eprintln!("host driver: {why}");
    // SAFETY: this library is never unloaded, and the function does not return.
    unsafe { atexit(fail) };
}
