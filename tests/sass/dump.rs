//! What `cuobjdump` says of the embedded binary, each kind asked for once a process: a listing of all machine code takes it
//! ten seconds.

use crate::require::{NVCC, skipped};
use gradprobe::cuda::FATBIN;
use std::{env, path::PathBuf, process::Command, sync::OnceLock};

/// Output, or why there is none.
type Output = Result<String, &'static str>;

/// The machine code for all architectures; `None` where there is no binary or no `cuobjdump`.
pub fn sass() -> Option<&'static str> {
    static CACHE: OnceLock<Output> = OnceLock::new();
    cached(&CACHE, "-sass")
}

/// What each kernel takes of a multiprocessor, likewise.
pub fn usage() -> Option<&'static str> {
    static CACHE: OnceLock<Output> = OnceLock::new();
    cached(&CACHE, "-res-usage")
}

fn cached(cache: &'static OnceLock<Output>, option: &str) -> Option<&'static str> {
    match cache.get_or_init(|| cuobjdump(option)) {
        Ok(output) => Some(output),
        Err(why) => {
            skipped(NVCC, why);
            None
        }
    }
}

fn cuobjdump(option: &str) -> Output {
    if FATBIN.is_empty() {
        return Err("the build found no nvcc: no binary is embedded");
    }
    let tool = find_cuobjdump().ok_or("there is no cuobjdump in GRADPROBE_CUOBJDUMP, CUDA_HOME/bin or PATH")?;
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("gradprobe.fatbin");
    std::fs::write(&binary, FATBIN).unwrap();
    let output = Command::new(&tool).arg(option).arg(&binary).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {option}: {complaint}", tool.display());
    Ok(String::from_utf8(output.stdout).unwrap())
}

fn find_cuobjdump() -> Option<PathBuf> {
    if let Some(tool) = env::var_os("GRADPROBE_CUOBJDUMP") {
        return Some(tool.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = home.into_iter().chain(env::split_paths(&path));
    folders.find_map(|folder| Some(folder.join("cuobjdump")).filter(|tool| tool.is_file()))
}

/// The code of every kernel for one architecture, out of the output on all of them.
pub fn section(architecture: u32, output: &str) -> &str {
    let heading = format!("code for sm_{architecture}\n");
    let start = output.find(&heading).unwrap_or_else(|| panic!("no code for sm_{architecture}"));
    let rest = &output[start + heading.len()..];
    &rest[..rest.find("code for sm_").unwrap_or(rest.len())]
}

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub registers: usize,
    pub stack: usize,
    pub shared: usize,
    pub local: usize,
}

/// Of every kernel for every architecture.
pub fn parse_usage(output: &str) -> Vec<(u32, String, Usage)> {
    let (mut architecture, mut kernel, mut usages) = (0, "", Vec::new());
    for line in output.lines().map(str::trim) {
        if let Some(number) = line.strip_prefix("arch = sm_") {
            architecture = number.parse().unwrap();
        } else if let Some(name) = line.strip_prefix("Function ") {
            kernel = name.trim_end_matches(':');
        } else if line.starts_with("REG:") {
            let field = |name: &str| {
                let (_, value) =
                    line.split_whitespace().filter_map(|word| word.split_once(':')).find(|w| w.0 == name)?;
                value.parse().ok()
            };
            let field = |name: &str| field(name).unwrap_or_else(|| panic!("no {name} in {line:?}"));
            let usage = Usage {
                registers: field("REG"),
                stack: field("STACK"),
                shared: field("SHARED"),
                local: field("LOCAL"),
            };
            usages.push((architecture, kernel.to_owned(), usage));
        }
    }
    usages
}
