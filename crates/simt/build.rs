//! Compiles the kernels with the C++ compiler. With GRADPROBE_SANITIZE=1 they are instrumented by AddressSanitizer and
//! UndefinedBehaviorSanitizer; the tests then run with libasan preloaded (`.ci/run` shows how).

use std::{env, path::Path, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=../../kernels");
    println!("cargo::rerun-if-changed=.");
    println!("cargo::rerun-if-changed=../../examples/adamw/adamw.cu");
    println!("cargo::rerun-if-env-changed=GRADPROBE_SANITIZE");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").files(["simt.cpp", "adamw.cpp"]).opt_level(2);
    build.includes([".", "../../kernels", "../../kernels/include"]);
    // One IEEE operation for each operator, as nvcc is told; x86-64 and aarch64 have no excess precision.
    build.flag("-ffp-contract=off").flag("-fno-fast-math").flag("-Wno-unknown-pragmas");
    if env::var("GRADPROBE_SANITIZE").is_ok_and(|value| value == "1") {
        build.flag("-fsanitize=address,undefined").flag("-fno-sanitize-recover=all").flag("-g1");
        for library in ["asan", "ubsan"] {
            let file = format!("-print-file-name=lib{library}.so");
            let output = Command::new("c++").arg(file).output().expect("c++ runs");
            let path = String::from_utf8(output.stdout).expect("a path");
            let folder = Path::new(path.trim()).parent().expect("a folder").display().to_string();
            println!("cargo::rustc-link-search=native={folder}");
            println!("cargo::rustc-link-lib=dylib={library}");
        }
    }
    build.compile("gradprobe_simt");
}
