//! Compiles the kernels with the C++ compiler. With GRADPROBE_SANITIZE=1 they are instrumented by AddressSanitizer and
//! UndefinedBehaviorSanitizer; the tests then run with libasan preloaded (`.ci/run` shows how).

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    println!("cargo::rerun-if-changed=../../kernels");
    println!("cargo::rerun-if-changed=.");
    println!("cargo::rerun-if-changed=../../examples/adamw/adamw.cu");
    println!("cargo::rerun-if-env-changed=GRADPROBE_SANITIZE");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").files(["simt.cpp", "adamw.cpp"]).opt_level(2);
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("kernels.inc"), kernels()).expect("OUT_DIR can be written");
    build.includes([".", "../../kernels", "../../kernels/include"]).include(out);
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

/// Includes every kernel's file, and lists the kernels, which have the files' names.
fn kernels() -> String {
    let folder = fs::canonicalize("../../kernels").expect("the kernels are there");
    let files = fs::read_dir(&folder).expect("kernels/ can be read");
    let mut files: Vec<PathBuf> = files.map(|file| file.expect("kernels/ can be read").path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "cu"));
    files.sort();
    let includes: String = files.iter().map(|file| format!("#include \"{}\"\n", file.display())).collect();
    let name = |file: &PathBuf| format!("DESCRIBED(gradprobe_{}),", file.file_stem().expect("a name").display());
    format!("{includes}#define GRADPROBE_KERNELS {}\n", files.iter().map(name).collect::<String>())
}
