//! Kernels such as users write, as nvcc compiles them: in place of what the C++ compiler makes of them, where the tests of
//! the emulation run on PTX (`GRADPROBE_PTX`).

#![allow(dead_code)] // Each test file is a crate of its own and uses a part of this.

use crate::require;
use gradprobe_simt::{
    Schedule,
    ptx::{Module, Options, memory::Lent},
};
use std::{path::Path, sync::OnceLock};

/// The kernels of a source of this repository, if the tests run on PTX. A test crate has one source.
pub fn kernels(source: &str) -> Option<&'static Module> {
    static MODULE: OnceLock<Option<Module>> = OnceLock::new();
    let compile = || {
        gradprobe_simt::ptx_of_environment()?;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
        let ptx = require::nvcc().expect("tests on PTX need nvcc").ptx(&source, "compute_75");
        Some(Module::parse(&ptx).unwrap_or_else(|error| panic!("{}: {error}", source.display())))
    };
    MODULE.get_or_init(compile).as_ref()
}

/// Lets kernels use this memory.
pub fn lend<T>(values: &[T], writable: bool) -> Lent {
    gradprobe_simt::ptx::memory::lend([(values.as_ptr() as u64, size_of_val(values) as u64, writable)])
}

/// Runs a kernel with blocks of 128 threads.
#[track_caller]
pub fn launch(module: &Module, kernel: &str, blocks: u32, schedule: Schedule, parameters: &[&[u8]]) {
    let options = Options { seed: schedule.seed(), ..Options::default() };
    let kernel = module.kernel(kernel).unwrap();
    // SAFETY: what a test has not lent is refused.
    unsafe { kernel.launch(blocks, 128, parameters, options) }.unwrap();
}
