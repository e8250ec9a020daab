#![doc = include_str!("README.md")]

mod error;
mod host;
mod parameters;

pub use error::Error;
pub use gradprobe::{Clip, Config, NonFinitePolicy, Report, Rules, clip::LossScale, gsnr::GsnrConfig};

use burn_core::module::Module;
use burn_optim::GradientsParams;
use gradprobe::{Cpu, Plan, Probe};
use host::Borrowed;
use parameters::{Found, Parameter};
use std::collections::HashMap;

/// Measures the gradients of a module's parameters, and clips them together.
#[derive(Debug)]
pub struct BurnProbe {
    /// Those that required a gradient when the probe was made.
    parameters: Vec<Parameter>,
    /// The place of each name among them.
    places: HashMap<String, usize>,
    probe: Probe,
}

impl BurnProbe {
    /// A probe for the parameters of `module` that require a gradient.
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

    /// The probe, whose plan has the parameters in the module's order, for all that is declared in its [`Config`]: signal and
    /// noise, history, samples, other rules or another loss scale.
    pub fn probe(&mut self) -> &mut Probe {
        &mut self.probe
    }

    /// The statistics of these gradients, which stay as they are. They are moved out and back: mutable for that alone. A
    /// parameter without one is [absent](gradprobe::Absent).
    ///
    /// # Errors
    /// [`Error::Changed`] when the module is not the one the probe was made for, [`Error::Gradient`],
    /// [`Error::UnknownGradients`], those of the probe, and [`Error::Read`], after which that one gradient is lost.
    ///
    /// # Panics
    /// As [`GradientsParams::get`] does, when a gradient has another number of dimensions than its parameter.
    pub fn measure<M: Module>(&mut self, module: &M, gradients: &mut GradientsParams) -> Result<Report, Error> {
        self.run(module, gradients, false)
    }

    /// The statistics of these gradients, which are then clipped as [`Config::clip`] says.
    ///
    /// # Errors
    /// Those of [`measure`](Self::measure); nothing is clipped then.
    ///
    /// # Panics
    /// As [`measure`](Self::measure).
    pub fn step<M: Module>(&mut self, module: &M, gradients: &mut GradientsParams) -> Result<Report, Error> {
        self.run(module, gradients, true)
    }

    fn run<M: Module>(&mut self, module: &M, gradients: &mut GradientsParams, clip: bool) -> Result<Report, Error> {
        let found = Found::in_module(module, gradients);
        let places = self.check(&found, gradients.len())?;
        let mut borrowed = Borrowed::take(module, gradients, &found)?;
        let report = borrowed.measure(&mut self.probe, &places, clip);
        borrowed.put_back(gradients);
        report
    }

    /// Which of the gradients, in the module's order, is that of each parameter, once the module is known to be that of the
    /// plan.
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
