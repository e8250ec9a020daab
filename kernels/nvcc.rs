//! Where nvcc is, and how it is told to compile the kernels: for build.rs, and for the tests that look at what it makes.

use std::{
    env,
    path::{Path, PathBuf},
};

/// One IEEE operation for each operator: see kernels/platform.cuh.
pub const OPTIONS: [&str; 6] = ["-std=c++17", "-O3", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"];

/// The variables that decide where it is looked for.
pub const VARIABLES: [&str; 4] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"];

/// nvcc in `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH` or /usr/local/cuda, in this order.
///
/// # Panics
/// When `NVCC` is set to what is no file.
pub fn find() -> Option<PathBuf> {
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    if let Some(nvcc) = env::var_os("NVCC") {
        let nvcc = PathBuf::from(nvcc);
        assert!(nvcc.is_file(), "NVCC is set to {}, which is not a file", nvcc.display());
        return Some(nvcc);
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .map(|folder| folder.join(&name))
        .find(|nvcc| nvcc.is_file())
}
