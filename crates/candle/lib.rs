#![doc = include_str!("README.md")]

mod error;
mod gradients;
mod memory;
mod natural;
mod optimizer;
mod variables;
mod watch;

pub use error::Error;
pub use gradprobe::{
    self, Clip, Config, NonFinitePolicy, Report, Rules, WatchedStep, clip::LossScale, gsnr::GsnrConfig, optim,
};
pub use optimizer::{AdamW, adamw};
pub use watch::Watch;

use candle_core::{Device, Tensor, TensorId, Var, backprop::GradStore};
use candle_nn::VarMap;
use gradprobe::{Cpu, Plan, Probe, health};
use memory::{Exchange, with_views, with_views_mut};
use std::collections::HashSet;
use variables::{Found, Planned, Source};

/// Measures the gradients of a model's variables, and clips them.
#[derive(Debug)]
pub struct CandleProbe {
    source: Source,
    planned: Vec<Planned>,
    config: Config,
    probe: Probe,
    /// One a variable.
    exchanges: Vec<Exchange>,
}

impl CandleProbe {
    /// Makes a probe for all variables of `variables`, in the natural order of their names. Make it after the model:
    /// the map is read again every step. The diagnosis takes the order of the backward pass from the names, unless the
    /// configuration has one.
    ///
    /// # Errors
    /// [`Error::NoVariables`]; [`Error::Dtype`] for a variable that is neither f32 nor f16 nor bf16; [`Error::Device`]
    /// unless all are on the CPU, or on one CUDA device; those of [`Plan::new`] and of [`Probe::new`].
    pub fn new(variables: &VarMap, config: Config) -> Result<Self, Error> {
        Self::build(|_| Source::Map(variables.clone()), variables::of_map(variables), config)
    }

    /// Makes a probe for these variables, in this order, which is that of the model. A variable listed twice counts
    /// once, under its first name. Other variables are neither measured nor clipped.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn of_variables<N: Into<String>>(
        variables: impl IntoIterator<Item = (N, Var)>,
        config: Config,
    ) -> Result<Self, Error> {
        let variables = variables.into_iter().map(|(name, variable)| (name.into(), variable));
        Self::build(Source::List, variables.collect(), config)
    }

    fn build(
        source: impl FnOnce(Vec<Var>) -> Source,
        mut variables: Vec<(String, Var)>,
        config: Config,
    ) -> Result<Self, Error> {
        let mut seen: HashSet<TensorId> = HashSet::new();
        variables.retain(|(_, variable)| seen.insert(variable.id()));
        let (planned, variables): (Vec<_>, Vec<_>) =
            variables.into_iter().map(|(name, variable)| (Planned::new(name, &variable), variable)).unzip();
        let device = variables::device(&planned)?;
        let dtypes = planned.iter().map(Planned::known_dtype).collect::<Result<Vec<_>, _>>()?;
        let tensors = planned.iter().zip(dtypes).map(|(of, dtype)| (of.name.as_str(), dtype, of.len()));
        let plan = Plan::new(tensors)?.with_shapes(planned.iter().map(Planned::lengths))?;
        let source = source(variables);
        let exchanges = planned.iter().map(|_| Exchange::on(device)).collect::<Result<_, _>>()?;
        let probe = probe_of(&source, device, plan, config.clone())?;
        Ok(Self { source, planned, config, probe, exchanges })
    }

    /// Measures the weights too, in the same pass: reports then have their norms and the ratio of each gradient to its
    /// weight. Call it before the first step, since it makes the probe anew, which with [`Config::ranks`] is a
    /// collective call.
    ///
    /// # Errors
    /// Those of [`Probe::new`].
    pub fn with_weights(self) -> Result<Self, Error> {
        let Self { source, planned, config, probe, exchanges } = self;
        let plan = probe.plan().clone();
        // First, so that there is never the memory of two.
        drop(probe);
        let dtypes: Vec<_> = plan.tensors().iter().map(|tensor| tensor.dtype).collect();
        let probe = probe_of(&source, variables::device(&planned)?, plan.with_weights(dtypes)?, config.clone())?;
        Ok(Self { source, planned, config, probe, exchanges })
    }

    /// The probe, for its reports and the features declared in its [`Config`]: signal and noise, history, samples,
    /// other rules or another loss scale.
    pub fn probe(&mut self) -> &mut Probe {
        &mut self.probe
    }

    /// The plan of the reports: all variables.
    pub fn plan(&self) -> &Plan {
        self.probe.plan()
    }

    /// Measures these gradients, which stay as they are. A variable without one is [absent](gradprobe::Absent). The report
    /// comes by [`poll`](Self::poll).
    ///
    /// # Errors
    /// [`Error::Changed`] when the model is not the one the probe was made for, [`Error::Gradient`],
    /// [`Error::NoGradients`], [`Error::Candle`], and those of the probe.
    pub fn measure(&mut self, gradients: &GradStore) -> Result<(), Error> {
        let found = self.source.find(&self.planned, gradients)?;
        let tensors = self.in_order(&found, |found| found.gradient.as_ref())?;
        self.measure_tensors(&found, &tensors)
    }

    /// Measures these gradients and clips them, in place, by [`Config::clip`].
    ///
    /// # Errors
    /// Those of [`measure`](Self::measure); nothing is clipped then.
    pub fn step(&mut self, gradients: &mut GradStore) -> Result<(), Error> {
        let mut found = self.source.find(&self.planned, gradients)?;
        gradients::make_own(gradients, &self.planned, &mut found)?;
        let tensors = self.in_order(&found, |found| found.gradient.as_ref())?;
        self.measure_tensors(&found, &tensors)?;
        Ok(with_views_mut(&tensors, &self.exchanges, |tensors| self.probe.clip(tensors))?)
    }

    /// Measures these gradients, which stay as they are, and moves the variables by them, in place and without a copy,
    /// with the optimizer of [`Config::optimizer`]: [`Probe::update`](gradprobe::Probe::update). The optimizer applies
    /// the clip itself, and leaves out a step to skip, on a GPU without the host. Meanwhile the variables are out of
    /// their tensors: another thread that uses them then gets an error from candle, or a panic.
    ///
    /// # Errors
    /// Those of [`measure`](Self::measure), [`Error::Memory`], and [`gradprobe::Error::NotDeclared`]. Nothing is changed then.
    pub fn update(&mut self, gradients: &GradStore) -> Result<(), Error> {
        let mut found = self.source.find(&self.planned, gradients)?;
        gradients::apart(&self.planned, &mut found)?;
        let gradients = self.in_order(&found, |found| found.gradient.as_ref())?;
        let of = |found: &Found| found.gradient.as_ref().map(|_| found.variable.as_tensor().clone());
        let weights: Vec<Option<Tensor>> = found.iter().map(of).collect();
        let updated = with_views_mut(&weights, &self.exchanges, |weights| {
            with_views(&gradients, |gradients| self.probe.update(gradients, weights))
        });
        Ok(updated?)
    }

    /// Gives the oldest report that has arrived and was not given yet: [`Probe::poll`]. Never waits. Called every step
    /// it gives this step's report for gradients on the CPU, and on a GPU this step's or one of the last few. Called
    /// less often, it gives the last.
    ///
    /// # Errors
    /// The device's.
    pub fn poll(&mut self) -> Result<Option<Report>, Error> {
        Ok(self.probe.poll()?)
    }

    /// Waits for the last measurement and gives its report: [`Probe::wait`].
    ///
    /// # Errors
    /// As there.
    pub fn wait(&mut self) -> Result<Report, Error> {
        Ok(self.probe.wait()?)
    }

    /// Gives the probe and these gradients, in the plan's order, to another measurement: histograms, samples,
    /// micro-batches, dot products. The gradients are those of the last step, or others of the same variables.
    ///
    /// ```
    /// # fn of(probe: &mut gradprobe_candle::CandleProbe, gradients: &candle_core::backprop::GradStore)
    /// #     -> Result<gradprobe::histogram::HistogramReport, gradprobe_candle::Error> {
    /// probe.lend(gradients, |probe, tensors| probe.histogram()?.measure(tensors))
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of `does`, and of [`measure`](Self::measure).
    pub fn lend<R>(
        &mut self,
        gradients: &GradStore,
        does: impl FnOnce(&mut Probe, &[&dyn gradprobe::Tensor]) -> Result<R, gradprobe::Error>,
    ) -> Result<R, Error> {
        let found = self.source.find(&self.planned, gradients)?;
        let tensors = self.in_order(&found, |found| found.gradient.as_ref())?;
        Ok(with_views(&tensors, |tensors| does(&mut self.probe, tensors))?)
    }

    fn measure_tensors(&mut self, found: &[Found], gradients: &[Option<Tensor>]) -> Result<(), Error> {
        if self.plan().weights().is_none() {
            return Ok(with_views(gradients, |gradients| self.probe.measure(gradients))?);
        }
        let weights = self.in_order(found, |found| Some(found.variable.as_tensor()))?;
        let measured = with_views(gradients, |gradients| {
            with_views(&weights, |weights| self.probe.measure_with_weights(gradients, weights))
        });
        Ok(measured?)
    }

    /// Gives one tensor of each variable that has one, its elements in order.
    fn in_order<'a>(
        &self,
        found: &'a [Found],
        tensor: impl Fn(&'a Found) -> Option<&'a Tensor>,
    ) -> Result<Vec<Option<Tensor>>, Error> {
        let pairs = found.iter().zip(&self.planned);
        let in_order = |tensor, planned: &Planned| gradients::in_order(&planned.name, tensor);
        pairs.map(|(found, planned)| tensor(found).map(|tensor| in_order(tensor, planned)).transpose()).collect()
    }
}

impl AsMut<Probe> for CandleProbe {
    fn as_mut(&mut self) -> &mut Probe {
        &mut self.probe
    }
}

/// Makes a probe on this device, which was checked. A list is in the order of the model; for a map the names tell the
/// order as far as they can.
fn probe_of(source: &Source, device: &Device, plan: Plan, mut config: Config) -> Result<Probe, Error> {
    if let (Source::Map(_), Some(_), None) = (source, &config.features.rules, &config.backward_order) {
        config = config.backward_order(health::backward_order(&plan));
    }
    let probe = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Probe::new(gradprobe::cuda::Cuda::new(&device.cuda_stream())?, plan, config),
        _ => Probe::new(Cpu, plan, config),
    };
    Ok(probe?)
}

/// The code of the project's README, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
mod readme {}
