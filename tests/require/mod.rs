//! For tests of what not every machine has: a compiler, a driver, a GPU. They pass where it is missing, and say so.

#![allow(dead_code)] // Each test file is a crate of its own and uses a part of this.

use std::{io::Write, thread};

/// Set to 1, it makes a missing CUDA toolkit a failure.
pub const NVCC: &str = "GRADPROBE_REQUIRE_NVCC";
/// Set to 1, it makes a missing GPU a failure.
pub const GPU: &str = "GRADPROBE_REQUIRE_GPU";
/// Set to 1, it makes a missing Python a failure.
pub const PYTHON: &str = "GRADPROBE_REQUIRE_PYTHON";
/// Set to 1, it makes a missing TensorBoard a failure.
pub const TENSORBOARD: &str = "GRADPROBE_REQUIRE_TENSORBOARD";

/// Says that the running test is skipped and why; or fails it when the environment sets `variable` to 1.
#[track_caller]
pub fn skipped(variable: &str, why: &str) {
    assert!(std::env::var(variable).as_deref() != Ok("1"), "{variable} is 1, but {why}");
    pointless(why);
}

/// Says on standard error, past the test harness, that the running test has nothing to test on this machine and why.
pub fn pointless(why: &str) {
    let line = format!("{} skipped: {why}\n", thread::current().name().unwrap_or("a test"));
    std::io::stderr().write_all(line.as_bytes()).expect("standard error is open");
}
