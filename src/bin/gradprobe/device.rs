//! Opens the device on which the statistics are computed.

use clap::ValueEnum;
use gradprobe::{Config, Cpu, Error, Plan, Probe};

/// Makes a probe on the device that the command line names.
pub type Open<'a> = &'a dyn Fn(Plan, Config) -> Result<Probe, Error>;

/// A place where statistics can be computed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Device {
    /// All cores of this machine
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
}

/// Makes a probe on the chosen device. The default is the GPU, or the CPU where there is no GPU. A GPU that is there
/// and fails is an error, so that nobody takes the slow path without knowing.
pub fn open(device: Option<Device>, plan: Plan, config: Config) -> Result<Probe, Error> {
    match device {
        Some(Device::Cpu) => Probe::new(Cpu, plan, config),
        Some(Device::Cuda) => cuda(plan, config),
        None => match cuda(plan.clone(), config.clone()) {
            Err(Error::DriverNotFound { .. } | Error::DeviceNotFound { .. }) => Probe::new(Cpu, plan, config),
            opened => opened,
        },
    }
}

#[cfg(feature = "cuda")]
fn cuda(plan: Plan, config: Config) -> Result<Probe, Error> {
    use gradprobe::cuda::{self, Cuda};
    Probe::new(Cuda::new(&cuda::stream(0)?)?, plan, config)
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: Plan, _: Config) -> Result<Probe, Error> {
    Err(Error::DeviceNotFound { ordinal: 0, reason: "this build is without the feature `cuda`".to_owned() })
}
