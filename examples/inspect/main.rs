//! Inspects gradients in safetensors files: `cargo run --release --example inspect -- FILE.safetensors...`
//!
//! What `gradprobe inspect` does, on two devices more, for checking the kernels. It refuses tensors of other types, and replaces
//! copies that are there. Exit code 2 for a command line that cannot be understood, 1 for every other failure, with one
//! line on standard error. What is wrong with the gradients is no failure, unless `--fail-on` says so.

// Of the program.
#[path = "../../src/bin/gradprobe/device.rs"]
mod device;
#[path = "../../src/bin/gradprobe/failure.rs"]
#[allow(dead_code, reason = "of which it needs a part")]
mod failure;
#[path = "../../src/bin/gradprobe/files/mod.rs"]
mod files;
#[path = "../../src/bin/gradprobe/inspect/mod.rs"]
mod inspect;
#[path = "../../src/bin/gradprobe/terminal.rs"]
mod terminal;

use clap::{Parser, ValueEnum};
use gradprobe::{Config, Error, Plan, Probe};
use gradprobe_simt::Simt;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "inspect")]
struct Inspector {
    /// Where the statistics are computed [default: cuda when a GPU is there, else cpu]
    #[arg(long, value_enum)]
    device: Option<Device>,

    #[command(flatten)]
    inspect: inspect::Options,
}

/// A place where statistics can be computed.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Device {
    /// All cores of this machine
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
    /// The GPU's kernels, run on this machine's cores: slow, for checking them
    Simt,
    /// The GPU's kernels as nvcc compiled them, interpreted: slower still, for checking what a GPU would be given
    Ptx,
}

fn main() -> ExitCode {
    terminal::run(|Inspector { device, inspect }: &mut Inspector| {
        (inspect.strict, inspect.force) = (true, true);
        inspect::run(inspect, &|plan, config| open(*device, plan, config))
    })
}

fn open(device: Option<Device>, plan: Plan, config: Config) -> Result<Probe, Error> {
    let device = match device {
        Some(Device::Simt) => return Probe::new(Simt::default(), plan, config),
        Some(Device::Ptx) => return ptx(plan, config),
        Some(Device::Cpu) => Some(device::Device::Cpu),
        Some(Device::Cuda) => Some(device::Device::Cuda),
        None => None,
    };
    device::open(device, plan, config)
}

#[cfg(feature = "cuda")]
fn ptx(plan: Plan, config: Config) -> Result<Probe, Error> {
    use gradprobe::cuda::FATBIN;
    use gradprobe_simt::{Compiled, ptx};

    if FATBIN.is_empty() {
        return Err(Error::KernelLoad("the build found no nvcc, which makes the PTX".to_owned()));
    }
    let module = ptx::fatbin::ptx(FATBIN).map_err(Error::KernelLoad)?;
    let module = ptx::Module::parse(&module).map_err(|error| Error::KernelLoad(error.to_string()))?;
    let compiled = Compiled { module: Box::leak(Box::new(module)), options: ptx::Options::default() };
    let device = Simt { ptx: Some(compiled), ..Simt::default() };
    Probe::new(device, plan, config)
}

#[cfg(not(feature = "cuda"))]
fn ptx(_: Plan, _: Config) -> Result<Probe, Error> {
    Err(Error::KernelLoad("this build is without the feature `cuda`, and so without PTX".to_owned()))
}
