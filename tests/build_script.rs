//! `build.rs`, compiled and run as cargo would, on machines with and without nvcc: programs that pretend to be nvcc.
#![cfg(unix)]

mod require;

use require::pointless;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};
use tempfile::TempDir;

/// The build script as a program.
static SCRIPT: LazyLock<PathBuf> = LazyLock::new(|| {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build-script");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command.args(["--edition=2024", "--crate-name=build_script", "-o"]).arg(&program);
    let output = command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("build.rs")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
});

/// A machine: an empty OUT_DIR, a PATH of one folder, and what programs and variables a test adds.
struct Machine {
    /// One test at a time: a program cannot be started while a fork of another test still has it open for writing.
    _alone: MutexGuard<'static, ()>,
    folder: TempDir,
    variables: Vec<(&'static str, PathBuf)>,
}

/// What a run of the build script left.
struct Built {
    output: Output,
    binary: Option<Vec<u8>>,
    source: String,
}

impl Machine {
    fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = TempDir::new().unwrap();
        for name in ["out", "path"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self { _alone: alone, folder, variables: vec![("CARGO_FEATURE_CUDA", "1".into())] }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn set(&mut self, variable: &'static str, value: impl Into<PathBuf>) {
        self.variables.push((variable, value.into()));
    }

    /// Puts a shell script there, and gives its path.
    fn program(&self, name: &str, script: &str) -> PathBuf {
        let program = self.path(name);
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        program
    }

    /// An nvcc there that works: what it makes is its name and its arguments.
    fn nvcc(&self, name: &str) -> PathBuf {
        self.program(name, &format!(r#"echo "{name}" "$@" > "$3""#))
    }

    fn build(&self) -> Built {
        let mut command = Command::new(&*SCRIPT);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).env_clear();
        command.env("OUT_DIR", self.path("out")).env("PATH", self.path("path"));
        let output = command.envs(self.variables.iter().map(|(name, value)| (name, value))).output().unwrap();
        let binary = fs::read(self.path("out/gradprobe.fatbin")).ok();
        let source = fs::read_to_string(self.path("out/gradprobe.cu")).unwrap_or_default();
        Built { output, binary, source }
    }
}

impl Built {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned() + &String::from_utf8_lossy(&self.output.stderr)
    }

    fn warnings(&self) -> Vec<String> {
        self.text().lines().filter_map(|line| line.strip_prefix("cargo::warning=").map(str::to_owned)).collect()
    }

    /// The build worked, and left this for a binary.
    #[track_caller]
    fn binary(&self) -> String {
        assert!(self.output.status.success(), "{}", self.text());
        String::from_utf8(self.binary.clone().expect("a binary, if an empty one")).unwrap()
    }

    /// The build failed and said all of this.
    #[track_caller]
    fn assert_fails_with(&self, needles: &[&str]) {
        assert!(!self.output.status.success(), "{}", self.text());
        for needle in needles {
            assert!(self.text().contains(needle), "{needle:?} is not in {}", self.text());
        }
    }
}

#[test]
fn without_nvcc_the_binary_is_empty_and_a_warning_says_where_it_was_looked_for() {
    if Path::new("/usr/local/cuda/bin/nvcc").exists() {
        return pointless("/usr/local/cuda/bin/nvcc cannot be hidden");
    }
    let built = Machine::new().build();
    assert_eq!(built.binary(), "");
    let [warning] = &built.warnings()[..] else { panic!("one warning: {}", built.text()) };
    for place in ["NVCC", "CUDA_HOME/bin", "CUDA_PATH/bin", "PATH", "/usr/local/cuda/bin", "NVRTC at first use"] {
        assert!(warning.contains(place), "{place:?} is not in {warning:?}");
    }
}

#[test]
fn the_source_is_one_file_whether_there_is_nvcc_or_not() {
    let mut machine = Machine::new();
    let nvcc = machine.nvcc("nvcc");
    machine.set("NVCC", nvcc);
    let compiled = machine.build();
    machine.set("DOCS_RS", "1");
    let embedded = machine.build();
    assert_eq!(compiled.source, embedded.source);
    for kernel in ["gradprobe_measure(", "gradprobe_clip("] {
        assert_eq!(compiled.source.matches(kernel).count(), 1, "{kernel}");
    }
    assert!(!compiled.source.contains("#include \""), "an include was left");
    assert_eq!(compiled.source.matches("typedef struct gradprobe_record {").count(), 1, "each header once");
}

#[test]
fn docs_rs_and_builds_without_the_feature_run_no_nvcc_and_warn_of_nothing() {
    let mut machine = Machine::new();
    let nvcc = machine.program("nvcc", "exit 1");
    machine.set("NVCC", &nvcc);
    machine.set("DOCS_RS", "1");
    let built = machine.build();
    assert_eq!((built.binary(), built.warnings()), (String::new(), vec![]));

    machine.variables = vec![("NVCC", nvcc)];
    let built = machine.build();
    assert_eq!((built.binary(), built.warnings()), (String::new(), vec![]));
}

#[test]
fn a_failing_nvcc_fails_the_build_with_what_it_said() {
    let mut machine = Machine::new();
    let script = "echo 'kernel.cu(7): error: no such thing'; echo 'nvcc fatal: gone' >&2; exit 3";
    let nvcc = machine.program("nvcc", script);
    machine.set("NVCC", &nvcc);
    let nvcc = nvcc.to_str().unwrap();
    let said =
        ["kernel.cu(7): error: no such thing", "nvcc fatal: gone", "exit status: 3", nvcc, "To build without it"];
    machine.build().assert_fails_with(&said);
}

#[test]
fn an_nvcc_that_is_not_there_or_cannot_run_is_named() {
    let mut machine = Machine::new();
    let missing = machine.path("missing/nvcc");
    machine.set("NVCC", &missing);
    machine.build().assert_fails_with(&["NVCC is set to", missing.to_str().unwrap(), "not a file"]);

    let text = machine.program("text", "");
    fs::set_permissions(&text, fs::Permissions::from_mode(0o644)).unwrap();
    machine.set("NVCC", &text);
    machine.build().assert_fails_with(&[text.to_str().unwrap(), "could not be run", "denied"]);
}

#[test]
fn nvcc_goes_before_cuda_home_before_cuda_path_before_path() {
    let mut machine = Machine::new();
    machine.nvcc("path/nvcc");
    let built = |machine: &Machine| machine.build().binary().split(' ').next().unwrap().to_owned();
    assert_eq!(built(&machine), "path/nvcc");
    machine.nvcc("cuda-path/bin/nvcc");
    machine.set("CUDA_PATH", machine.path("cuda-path"));
    assert_eq!(built(&machine), "cuda-path/bin/nvcc");
    machine.nvcc("cuda-home/bin/nvcc");
    machine.set("CUDA_HOME", machine.path("cuda-home"));
    assert_eq!(built(&machine), "cuda-home/bin/nvcc");
    let nvcc = machine.nvcc("chosen");
    machine.set("NVCC", nvcc);
    assert_eq!(built(&machine), "chosen");
}

#[test]
fn nvcc_is_asked_for_every_architecture_and_for_exact_arithmetic() {
    let mut machine = Machine::new();
    let nvcc = machine.nvcc("nvcc");
    machine.set("NVCC", nvcc);
    let built = machine.build();
    let command = built.binary();
    let arguments: Vec<&str> = command.split_whitespace().collect();
    for architecture in [75, 80, 86, 89, 90, 100, 120] {
        let code = format!("-gencode=arch=compute_{architecture},code=sm_{architecture}");
        assert!(arguments.contains(&code.as_str()), "{code} is not in {command}");
    }
    let ptx_for_what_comes_after = "-gencode=arch=compute_75,code=compute_75";
    for argument in
        [ptx_for_what_comes_after, "--threads=0", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
    {
        assert!(arguments.contains(&argument), "{argument} is not in {command}");
    }
}

#[test]
fn an_older_nvcc_is_asked_for_what_it_knows() {
    let mut machine = Machine::new();
    let script = r#"[ "$1" = --list-gpu-code ] && echo sm_80 sm_90 sm_90a || echo "$@" > "$3""#;
    let nvcc = machine.program("nvcc", script);
    machine.set("NVCC", nvcc);
    let command = machine.build().binary();
    let codes: Vec<&str> = command.split_whitespace().filter(|argument| argument.starts_with("-gencode")).collect();
    let code = |architecture, kind| format!("-gencode=arch=compute_{architecture},code={kind}_{architecture}");
    assert_eq!(codes, [code(80, "sm"), code(90, "sm"), code(80, "compute")]);
}
