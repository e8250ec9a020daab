#![doc = include_str!("README.md")]

mod error;
mod host;
mod parameters;
mod watch;

pub use error::Error;
pub use gradprobe::{
    self, Clip, Config, NonFinitePolicy, Report, Rules, WatchedStep, clip::LossScale, gsnr::GsnrConfig,
};
pub use watch::Watch;

use burn_core::module::Module;
use burn_optim::GradientsParams;
use gradprobe::{Cpu, Plan, Probe, Tensor, TensorMut};
use host::Borrowed;
use parameters::{Found, Parameter};
use std::collections::HashMap;

/// Measures the gradients of a module's parameters, and clips them together.
#[derive(Debug)]
pub struct BurnProbe {
    /// Parameters that required a gradient when the probe was made.
    parameters: Vec<Parameter>,
    /// The place of each name among them.
    places: HashMap<String, usize>,
    probe: Probe,
}

impl BurnProbe {
    /// Makes a probe for the parameters of `module` that require a gradient.
    ///
    /// # Errors
    /// [`Error::Dtype`] for a parameter that is neither f32 nor f16 nor bf16; those of [`Probe::new`] and [`Plan::new`].
    pub fn new<M: Module>(module: &M, config: Config) -> Result<Self, Error> {
        let found = Found::in_module(module, &GradientsParams::new());
        let required = found.into_iter().filter(|found| found.requires_gradient);
        let parameters = required.map(Parameter::try_from).collect::<Result<Vec<_>, _>>()?;
        let places = parameters.iter().enumerate().map(|(index, parameter)| (parameter.name.clone(), index)).collect();
        let tensors = parameters.iter().map(|parameter| (&*parameter.name, parameter.dtype, parameter.len()));
        let probe =
            Probe::new(Cpu, Plan::new(tensors)?.with_shapes(parameters.iter().map(Parameter::lengths))?, config)?;
        Ok(Self { parameters, places, probe })
    }

    /// The probe, for the features declared in its [`Config`]: signal and noise, history, samples, other rules or
    /// another loss scale. Its plan has the parameters in the module's order.
    pub fn probe(&mut self) -> &mut Probe {
        &mut self.probe
    }

    /// The plan of the reports: all parameters that require a gradient.
    pub fn plan(&self) -> &Plan {
        self.probe.plan()
    }

    /// Measures these gradients, which stay as they are. They are mutable only because they are moved out and back. A
    /// parameter without one is [absent](gradprobe::Absent). The report comes by [`poll`](Self::poll).
    ///
    /// # Errors
    /// [`Error::Changed`] when the module is not the one the probe was made for, [`Error::Gradient`],
    /// [`Error::UnknownGradients`], those of the probe, and [`Error::Read`], after which that one gradient is lost.
    ///
    /// # Panics
    /// As [`GradientsParams::get`] does, when a gradient has another number of dimensions than its parameter.
    pub fn measure<M: Module>(&mut self, module: &M, gradients: &mut GradientsParams) -> Result<(), Error> {
        self.lend(module, gradients, |probe, tensors| probe.measure(tensors))
    }

    /// Measures these gradients and clips them, in place, by [`Config::clip`].
    ///
    /// # Errors
    /// Those of [`measure`](Self::measure); nothing is clipped then.
    ///
    /// # Panics
    /// As [`measure`](Self::measure).
    pub fn step<M: Module>(&mut self, module: &M, gradients: &mut GradientsParams) -> Result<(), Error> {
        self.lend_mut(module, gradients, |probe, tensors| probe.step(tensors))
    }

    /// Gives the oldest report that was not given yet: [`Probe::poll`]. For gradients on the host it is this step's.
    ///
    /// # Errors
    /// The device's.
    pub fn poll(&mut self) -> Result<Option<Report>, Error> {
        Ok(self.probe.poll()?)
    }

    /// Gives the report of the last measurement: [`Probe::wait`].
    ///
    /// # Errors
    /// As there.
    pub fn wait(&mut self) -> Result<Report, Error> {
        Ok(self.probe.wait()?)
    }

    /// Gives the probe and these gradients, in the plan's order, to another measurement: histograms, samples,
    /// micro-batches, dot products.
    ///
    /// # Errors
    /// Those of `does`, and of [`measure`](Self::measure).
    ///
    /// # Panics
    /// As [`measure`](Self::measure).
    pub fn lend<M: Module, R>(
        &mut self,
        module: &M,
        gradients: &mut GradientsParams,
        does: impl FnOnce(&mut Probe, &[&dyn Tensor]) -> Result<R, gradprobe::Error>,
    ) -> Result<R, Error> {
        self.lend_mut(module, gradients, |probe, tensors| does(probe, &shared(tensors)))
    }

    fn lend_mut<M: Module, R>(
        &mut self,
        module: &M,
        gradients: &mut GradientsParams,
        does: impl FnOnce(&mut Probe, &mut [&mut dyn TensorMut]) -> Result<R, gradprobe::Error>,
    ) -> Result<R, Error> {
        let found = Found::in_module(module, gradients);
        let places = self.check(&found, gradients.len())?;
        let mut borrowed = Borrowed::take(module, gradients, &found)?;
        let result = borrowed.lend(&places, |tensors| does(&mut self.probe, tensors));
        borrowed.put_back(gradients);
        result
    }

    /// Gives the place of each parameter's gradient among these, which are in the module's order, after a check that
    /// the module is that of the plan.
    fn check(&self, found: &[Found], gradients: usize) -> Result<Vec<Option<usize>>, Error> {
        let mut places = vec![None; self.parameters.len()];
        let mut seen = vec![false; self.parameters.len()];
        let mut known = 0;
        for found in found {
            let has_gradient = found.gradient.is_some();
            match self.places.get(&found.name) {
                Some(&index) => {
                    self.parameters[index].check(found)?;
                    (seen[index], places[index]) = (true, has_gradient.then_some(known));
                }
                None if has_gradient => {
                    let name = found.name.clone();
                    return Err(Error::Changed { name, planned: "nothing".to_owned(), given: found.describe() });
                }
                None => {}
            }
            known += usize::from(has_gradient);
        }
        if let Some(index) = seen.iter().position(|seen| !seen) {
            let parameter = &self.parameters[index];
            let (name, planned) = (parameter.name.clone(), parameter.describe());
            return Err(Error::Changed { name, planned, given: "nothing".to_owned() });
        }
        if gradients > known {
            return Err(Error::UnknownGradients { count: gradients - known });
        }
        Ok(places)
    }
}

impl AsMut<Probe> for BurnProbe {
    fn as_mut(&mut self) -> &mut Probe {
        &mut self.probe
    }
}

/// The same tensors, to be read.
fn shared<'a>(tensors: &'a [&mut dyn TensorMut]) -> Vec<&'a dyn Tensor> {
    tensors.iter().map(|tensor| &**tensor as &dyn Tensor).collect()
}
