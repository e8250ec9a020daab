//! For tests of what not every machine has: a compiler, a driver, a GPU. They pass where it is missing, and say so.

#![allow(dead_code)] // Each test file is a crate of its own and uses a part of this.

#[path = "../../kernels/nvcc.rs"]
mod nvcc;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Set to 1, it makes a missing CUDA toolkit a failure.
pub const NVCC: &str = "GRADPROBE_REQUIRE_NVCC";
/// Set to 1, it makes a missing GPU a failure.
pub const GPU: &str = "GRADPROBE_REQUIRE_GPU";
/// Set to 1, it makes a missing Python a failure.
pub const PYTHON: &str = "GRADPROBE_REQUIRE_PYTHON";
/// Set to 1, it makes a missing TensorBoard a failure.
pub const TENSORBOARD: &str = "GRADPROBE_REQUIRE_TENSORBOARD";
/// Set to 1, it makes a missing Chromium a failure.
pub const CHROMIUM: &str = "GRADPROBE_REQUIRE_CHROMIUM";
/// Set to 1, it makes a rustdoc of another format a failure.
pub const RUSTDOC: &str = "GRADPROBE_REQUIRE_RUSTDOC";

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

/// A CUDA compiler, for kernels such as users write.
pub struct Nvcc(PathBuf);

/// nvcc where `build.rs` looks for it; where there is none, the running test is skipped.
#[track_caller]
pub fn nvcc() -> Option<Nvcc> {
    let found = nvcc::find();
    if found.is_none() {
        skipped(NVCC, "there is no nvcc in NVCC, CUDA_HOME/bin, CUDA_PATH/bin, PATH or /usr/local/cuda/bin");
    }
    found.map(Nvcc)
}

impl Nvcc {
    /// The machine code of a source that includes the headers for others' kernels, compiled without a warning.
    #[track_caller]
    pub fn compile(&self, source: &Path, options: &[&str]) -> Vec<u8> {
        self.run("-cubin", source, &[&["-std=c++17"], options].concat())
    }

    /// The PTX of a source for an architecture such as compute_75, by the options of `build.rs`.
    #[track_caller]
    pub fn ptx(&self, source: &Path, architecture: &str) -> String {
        let architecture = format!("-arch={architecture}");
        String::from_utf8(self.run("-ptx", source, &[&nvcc::OPTIONS[..], &[&architecture]].concat())).unwrap()
    }

    #[track_caller]
    fn run(&self, kind: &str, source: &Path, options: &[&str]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let binary = folder.path().join("kernels");
        let mut command = Command::new(&self.0);
        // Under the sanitizers, whose libraries nvcc must not get.
        command.env_remove("LD_PRELOAD");
        let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/include");
        command.args([kind, "-Werror", "all-warnings", "-I"]).arg(include);
        let output = command.args(options).arg("-o").arg(&binary).arg(source).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(&binary).unwrap()
    }
}
