//! Compiles `kernels/*.cu` to one fat binary, or leaves that to NVRTC at first use.
//!
//! `NVCC`, then `CUDA_HOME` and `CUDA_PATH`, then `PATH`, then /usr/local/cuda are searched for nvcc. Found, it makes
//! machine code for every architecture from Turing to Blackwell and PTX of the lowest for what comes after; if it
//! fails, so does the build. Not found, or on docs.rs, the binary is empty and a warning says so. Either way the source
//! is embedded as one file. Nothing is linked, and no GPU is looked for.

#[path = "kernels/nvcc.rs"]
mod nvcc;

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Machine code is made for these; PTX for the first.
const ARCHITECTURES: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];

fn main() {
    for variable in nvcc::VARIABLES.into_iter().chain(["DOCS_RS", "NVCC_CCBIN", "GRADPROBE_REQUIRE_NVCC"]) {
        println!("cargo::rerun-if-env-changed={variable}");
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let source = out.join("gradprobe.cu");
    let mut text = String::from("// All of kernels/ in one file, made by build.rs.\n");
    let mut seen = Vec::new();
    println!("cargo::rerun-if-changed=kernels");
    let files = fs::read_dir("kernels").expect("kernels/ can be read");
    let mut files: Vec<PathBuf> = files.map(|file| file.expect("kernels/ can be read").path()).collect();
    files.sort();
    for kernel in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "cu")) {
        flatten(kernel, &mut seen, &mut text);
    }
    fs::write(&source, &text).expect("OUT_DIR can be written");

    let binary = out.join("gradprobe.fatbin");
    let want = env::var_os("CARGO_FEATURE_CUDA").is_some() && env::var_os("DOCS_RS").is_none();
    match nvcc::find().filter(|_| want) {
        Some(nvcc) => compile(&nvcc, &source, &binary),
        None => {
            fs::write(&binary, []).expect("OUT_DIR can be written");
            if want {
                println!(
                    "cargo::warning=no nvcc in NVCC, CUDA_HOME/bin, CUDA_PATH/bin, PATH or /usr/local/cuda/bin: \
                     the CUDA kernels will be compiled by NVRTC at first use"
                );
            }
        }
    }
}

/// Appends `file` with its `#include "…"` lines replaced by the files they name, each once.
fn flatten(file: &Path, seen: &mut Vec<PathBuf>, text: &mut String) {
    if seen.iter().any(|s| s == file) {
        return;
    }
    seen.push(file.to_owned());
    println!("cargo::rerun-if-changed={}", file.display());
    let content = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    writeln!(text, "// ==== {}", file.display()).expect("a string takes everything");
    for line in content.lines() {
        let include = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match include {
            Some(name) => flatten(&file.with_file_name(name), seen, text),
            None if line == "#pragma once" => {}
            None => writeln!(text, "{line}").expect("a string takes everything"),
        }
    }
}

/// The architectures this nvcc can make code for: Blackwell needs 12.8.
/// All of them where it does not say.
fn known_to(nvcc: &Path) -> Vec<u32> {
    let output = Command::new(nvcc).arg("--list-gpu-code").output();
    let listed = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let known = |architecture: &u32| listed.split_whitespace().any(|code| code == format!("sm_{architecture}"));
    let architectures: Vec<u32> = ARCHITECTURES.into_iter().filter(known).collect();
    if architectures.is_empty() { ARCHITECTURES.to_vec() } else { architectures }
}

fn compile(nvcc: &Path, source: &Path, binary: &Path) {
    let mut command = Command::new(nvcc);
    command.arg("--fatbin").arg("-o").arg(binary).arg(source);
    command.args(nvcc::OPTIONS);
    // The architectures side by side, on all cores: one after the other they take 85 s. CUDA 11.2 has it, the oldest that cudarc
    // knows is 11.4.
    command.arg("--threads=0");
    // Ours to heed, not a user's, whose nvcc may be newer than any we know.
    if env::var("GRADPROBE_REQUIRE_NVCC").is_ok_and(|value| value == "1") {
        command.args(["-Werror", "all-warnings"]);
    }
    let architectures = known_to(nvcc);
    for architecture in &architectures {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    let lowest = architectures[0];
    command.arg(format!("-gencode=arch=compute_{lowest},code=compute_{lowest}"));
    let output = command.output().unwrap_or_else(|error| panic!("{} could not be run: {error}", nvcc.display()));
    assert!(
        output.status.success(),
        "{} failed ({}):\n{}{}\nTo build without it, set NVCC, CUDA_HOME, CUDA_PATH and PATH so that no nvcc is found: \
         the kernels are then compiled by NVRTC at first use.",
        nvcc.display(),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
}
