#![doc = include_str!("README.md")]

mod error;
mod host;
mod parameters;

pub use error::Error;
pub use gradprobe::{ClipPolicy, Config, LossScale, NonFinitePolicy};

use burn_core::module::Module;
use burn_optim::GradientsParams;
use gradprobe::{CpuProbe, Plan, Report};
use host::Borrowed;
use parameters::{Found, Parameter};
use std::{collections::HashMap, fmt};

/// Measures the gradients of a module's parameters, and clips them together.
#[derive(Debug)]
pub struct BurnProbe {
    config: Config,
    /// Those that required a gradient when the probe was made.
    parameters: Vec<Parameter>,
    /// The place of each name among them.
    places: HashMap<String, usize>,
    /// For the parameters that are `present`.
    probe: CpuProbe,
    /// Which of the parameters had a gradient in the last step.
    present: Vec<bool>,
}

/// What a step's gradients were. `Display` prints the report's table, and a line with what is missing.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The statistics of the gradients there were, by the parameters' names; its steps count from the last change of
    /// what is missing.
    pub report: Report,
    /// Names of the parameters that had no gradient.
    pub missing: Vec<String>,
}

impl BurnProbe {
    /// A probe for the parameters of `module` that require a gradient.
    ///
    /// # Errors
    /// [`Error::Dtype`] for a parameter that is neither f32 nor f16 nor bf16; those of [`CpuProbe::new`] and
    /// [`Plan::new`].
    pub fn new<M: Module>(module: &M, config: Config) -> Result<Self, Error> {
        let found = Found::in_module(module, &GradientsParams::new());
        let required = found.into_iter().filter(|found| found.requires_gradient);
        let parameters = required.map(Parameter::try_from).collect::<Result<Vec<_>, _>>()?;
        let places = parameters.iter().enumerate().map(|(index, parameter)| (parameter.name.clone(), index)).collect();
        let present = vec![true; parameters.len()];
        let probe = probe_of(&parameters, &present, config)?;
        Ok(Self { config, parameters, places, probe, present })
    }

    /// Names of the planned parameters, in the module's order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.parameters.iter().map(|parameter| parameter.name.as_str())
    }

    /// The statistics of these gradients, which stay as they are. They are moved out and back: mutable for that alone.
    ///
    /// # Errors
    /// [`Error::Changed`] when the module is not the one the probe was made for, [`Error::Gradient`],
    /// [`Error::UnknownGradients`], [`Error::MissingGradient`], and [`Error::Read`], after which that one gradient is lost.
    ///
    /// # Panics
    /// As [`GradientsParams::get`] does, when a gradient has another number of dimensions than its parameter.
    pub fn measure<M: Module>(&mut self, module: &M, gradients: &mut GradientsParams) -> Result<Measured, Error> {
        self.step(module, gradients, false)
    }

    /// The statistics of these gradients, which are then clipped by [`Config::max_norm`] and [`Config::clip`].
    ///
    /// # Errors
    /// Those of [`measure`](Self::measure); nothing is clipped then.
    ///
    /// # Panics
    /// As [`measure`](Self::measure).
    pub fn measure_and_clip<M: Module>(
        &mut self,
        module: &M,
        gradients: &mut GradientsParams,
    ) -> Result<Measured, Error> {
        self.step(module, gradients, true)
    }

    fn step<M: Module>(&mut self, module: &M, gradients: &mut GradientsParams, clip: bool) -> Result<Measured, Error> {
        let found = Found::in_module(module, gradients);
        let present = self.check(&found, gradients.len())?;
        if present != self.present {
            self.plan_for(present)?;
        }
        let mut borrowed = Borrowed::take(module, gradients, &found)?;
        let report = borrowed.measure(&mut self.probe, clip);
        borrowed.put_back(gradients);
        let named = self.parameters.iter().zip(&self.present);
        let missing = named.filter(|(_, present)| !**present).map(|(parameter, _)| parameter.name.clone()).collect();
        Ok(Measured { report: report?, missing })
    }

    /// Which parameters have a gradient, once the module is known to be that of the plan.
    fn check(&self, found: &[Found], gradients: usize) -> Result<Vec<bool>, Error> {
        let mut present = vec![false; self.parameters.len()];
        let mut seen = vec![false; self.parameters.len()];
        let mut known = 0;
        for found in found {
            let gradient = found.gradient.as_deref();
            known += usize::from(gradient.is_some());
            match self.places.get(&found.name) {
                Some(&index) => {
                    self.parameters[index].check(found)?;
                    (seen[index], present[index]) = (true, gradient.is_some());
                }
                None if gradient.is_some() => {
                    let name = found.name.clone();
                    return Err(Error::Changed { name, planned: "nothing".to_owned(), given: found.describe() });
                }
                None => {}
            }
        }
        if let Some(index) = seen.iter().position(|seen| !seen) {
            let parameter = &self.parameters[index];
            let (name, planned) = (parameter.name.clone(), parameter.describe());
            return Err(Error::Changed { name, planned, given: "nothing".to_owned() });
        }
        if gradients > known {
            return Err(Error::UnknownGradients { count: gradients - known });
        }
        Ok(present)
    }

    /// Goes over to another set of gradients.
    fn plan_for(&mut self, present: Vec<bool>) -> Result<(), Error> {
        let remembers = matches!(
            self.config.clip,
            ClipPolicy::Percentile { .. } | ClipPolicy::ZScore { .. } | ClipPolicy::TensorEma { .. }
        );
        if remembers && self.probe.outputs().is_some() {
            let changed = present.iter().zip(&self.present).position(|(now, before)| now != before);
            let name = changed.map(|index| self.parameters[index].name.clone()).unwrap_or_default();
            return Err(Error::MissingGradient { name });
        }
        let mut probe = probe_of(&self.parameters, &present, self.config)?;
        if let Some(scale) = self.probe.loss_scale() {
            probe.set_loss_scale(scale)?;
        }
        self.probe = probe;
        self.present = present;
        Ok(())
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.report)?;
        if !self.missing.is_empty() {
            writeln!(f, "no gradient: {}", self.missing.join(", "))?;
        }
        Ok(())
    }
}

fn probe_of(parameters: &[Parameter], present: &[bool], config: Config) -> Result<CpuProbe, Error> {
    let measured = parameters.iter().zip(present).filter(|(_, present)| **present);
    let plan = Plan::new(measured.map(|(parameter, _)| (&*parameter.name, parameter.dtype, parameter.len())))?;
    Ok(CpuProbe::new(plan, config)?)
}
