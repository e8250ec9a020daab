//! The probe on the device where the variables are.

#[cfg(feature = "cuda")]
use crate::device::OnDevice;
use crate::host;
use candle_core::{Device, Tensor};
#[cfg(feature = "cuda")]
use gradprobe::CudaProbe;
use gradprobe::{
    Config, CpuProbe, Error, GsnrConfig, GsnrReport, HistogramReport, HistoryReport, Plan, Report, health::Health,
};
use std::collections::VecDeque;

/// Reports that wait to be asked for: as many as a device has on their way.
pub const WAITING: usize = 4;

pub enum Backend {
    /// With the reports that nobody has asked for yet, the newest last.
    Cpu(Box<CpuProbe>, VecDeque<Report>),
    #[cfg(feature = "cuda")]
    Cuda(Box<OnDevice>),
}

/// The probe that a [`CandleProbe`](crate::CandleProbe) works with, for what that passes on nothing of.
#[non_exhaustive]
pub enum Underlying<'a> {
    /// Of gradients on the CPU.
    Cpu(&'a mut CpuProbe),
    /// Of gradients on a CUDA device.
    #[cfg(feature = "cuda")]
    Cuda(&'a mut CudaProbe),
}

/// Evaluates `$does` with `$probe` bound to the probe of either kind.
macro_rules! with_probe {
    ($backend:expr, $probe:ident => $does:expr) => {
        match $backend {
            Backend::Cpu($probe, _) => $does,
            #[cfg(feature = "cuda")]
            Backend::Cuda(on_device) => {
                let $probe = &mut on_device.probe;
                $does
            }
        }
    };
}

impl Backend {
    /// A probe for tensors on this device, which was checked.
    ///
    /// # Errors
    /// Those of [`CpuProbe::new`], or of `CudaProbe::new`.
    pub fn new(device: &Device, plan: Plan, config: Config) -> Result<Self, Error> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(Box::new(OnDevice::new(device, plan, config)?))),
            _ => Ok(Self::Cpu(Box::new(CpuProbe::new(plan, config)?), VecDeque::new())),
        }
    }

    pub fn measure(&mut self, gradients: &[Tensor], weights: Option<&[Tensor]>) -> Result<(), Error> {
        match self {
            Self::Cpu(probe, waiting) => {
                let report = host::measure(probe, gradients, weights)?;
                if waiting.len() == WAITING {
                    waiting.pop_front();
                }
                waiting.push_back(report);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => on_device.measure(gradients, weights),
        }
    }

    pub fn clip(&mut self, gradients: &[Tensor]) -> Result<(), Error> {
        match self {
            // Where nothing is to be done, the gradients stay where they are.
            Self::Cpu(probe, _) if probe.outputs().is_some_and(|outputs| outputs.action == 0) => Ok(()),
            Self::Cpu(probe, _) => host::clip(probe, gradients),
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => on_device.clip(gradients),
        }
    }

    /// The oldest report that has arrived and was not given.
    pub fn poll(&mut self) -> Result<Option<Report>, Error> {
        match self {
            Self::Cpu(_, waiting) => Ok(waiting.pop_front()),
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => on_device.probe.poll(),
        }
    }

    /// The report of the last measurement, which may have been given before.
    pub fn wait(&mut self) -> Result<Option<Report>, Error> {
        match self {
            Self::Cpu(_, waiting) => Ok(waiting.drain(..).next_back()),
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => match on_device.probe.wait() {
                Ok(report) => Ok(Some(report)),
                Err(Error::NotMeasured) => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    pub fn judge_by(&mut self, health: &Health) -> Result<(), Error> {
        with_probe!(self, probe => probe.judge_by(health))
    }

    pub fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        with_probe!(self, probe => probe.set_loss_scale(scale))
    }

    pub fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        with_probe!(self, probe => probe.track(config))
    }

    pub fn gsnr(&mut self) -> Result<GsnrReport, Error> {
        with_probe!(self, probe => probe.gsnr())
    }

    pub fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        with_probe!(self, probe => probe.keep_history(steps))
    }

    pub fn history(&mut self) -> Result<HistoryReport, Error> {
        with_probe!(self, probe => probe.history())
    }

    pub fn enable_histogram(&mut self) -> Result<(), Error> {
        match self {
            Self::Cpu(probe, _) => {
                probe.enable_histogram();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => on_device.probe.enable_histogram(),
        }
    }

    pub fn histogram(&mut self, gradients: &[Tensor]) -> Result<HistogramReport, Error> {
        match self {
            Self::Cpu(probe, _) => host::histogram(probe, gradients),
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => on_device.histogram(gradients),
        }
    }

    /// Whether something has been measured.
    pub fn has_measured(&self) -> bool {
        match self {
            Self::Cpu(probe, _) => probe.outputs().is_some(),
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => on_device.measured,
        }
    }

    pub fn plan(&self) -> &Plan {
        match self {
            Self::Cpu(probe, _) => probe.plan(),
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => on_device.probe.plan(),
        }
    }

    pub fn underlying(&mut self) -> Underlying<'_> {
        match self {
            Self::Cpu(probe, _) => Underlying::Cpu(probe),
            #[cfg(feature = "cuda")]
            Self::Cuda(on_device) => Underlying::Cuda(&mut on_device.probe),
        }
    }
}
