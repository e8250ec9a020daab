//! Opens the device on which the statistics are computed.

use crate::options::Device;
use gradprobe::{Config, Cpu, Error, Plan, Probe};
use gradprobe_simt::Simt;

/// A probe on the device asked for. With none asked for: on the GPU, or on the CPU when there is no GPU; a GPU that
/// is there and fails is an error, so that nobody takes the slow path without knowing.
pub fn open(device: Option<Device>, plan: Plan, config: Config) -> Result<Probe, Error> {
    match device {
        Some(Device::Cpu) => cpu(plan, config),
        Some(Device::Cuda) => cuda(plan, config),
        Some(Device::Simt) => simt(plan, config),
        Some(Device::Ptx) => ptx(plan, config),
        None => match cuda(plan.clone(), config.clone()) {
            Err(Error::DriverNotFound { .. } | Error::DeviceNotFound { .. }) => cpu(plan, config),
            opened => opened,
        },
    }
}

fn cpu(plan: Plan, config: Config) -> Result<Probe, Error> {
    Probe::new(Cpu, plan, config)
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

fn simt(plan: Plan, config: Config) -> Result<Probe, Error> {
    Probe::new(Simt::default(), plan, config)
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
