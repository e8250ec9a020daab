#![doc = include_str!("README.md")]

mod backend;
#[cfg(feature = "cuda")]
mod device;
mod error;
mod gradients;
mod host;
mod natural;
mod variables;

pub use backend::Underlying;
pub use error::Error;
pub use gradprobe::{ClipPolicy, Config, GsnrConfig, LossScale, NonFinitePolicy, health::Rules};

use backend::{Backend, WAITING};
use candle_core::{Tensor, TensorId, Var, backprop::GradStore};
use candle_nn::VarMap;
use gradprobe::{
    GsnrReport, HistogramReport, HistoryReport, Plan, Report,
    health::{self, Diagnosis, Health},
};
use std::{
    collections::{HashSet, VecDeque},
    fmt,
};
use variables::{Found, Planned, Source};

/// Measures the gradients of a model's variables, and clips them together.
pub struct CandleProbe {
    source: Source,
    planned: Vec<Planned>,
    config: Config,
    settings: Settings,
    /// For the variables that are `present`.
    backend: Backend,
    /// Follows the reports of `backend`.
    health: Option<Health>,
    /// Which of the variables had a gradient in the last step.
    present: Vec<bool>,
    /// The last measurement of `backend` that was given.
    given: u64,
    /// The next step's, as far as is known here.
    loss_scale: Option<f32>,
    /// Steps measured before another set of gradients came, not given yet.
    earlier: VecDeque<Measured>,
}

/// What was asked for beyond a step's statistics: a probe for another set of gradients does the same.
#[derive(Clone, Default)]
struct Settings {
    weights: bool,
    rules: Option<Rules>,
    tracking: Option<GsnrConfig>,
    history: Option<u32>,
    histogram: bool,
}

/// What a step's gradients were. `Display` prints the report's table, what is missing, and the diagnosis.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The statistics of the gradients there were, by the variables' names; its steps count from the last change of what
    /// is missing.
    pub report: Report,
    /// Names of the variables that had no gradient.
    pub missing: Vec<String>,
    /// What is wrong, when [`CandleProbe::diagnose_by`] has given rules.
    pub diagnosis: Option<Diagnosis>,
}

impl CandleProbe {
    /// A probe for all variables of `variables`, in the natural order of their names: make it when the model has been
    /// built. The map is asked again every step.
    ///
    /// # Errors
    /// [`Error::NoVariables`]; [`Error::Dtype`] for a variable that is neither f32 nor f16 nor bf16; [`Error::Device`]
    /// unless all are on the CPU, or on one CUDA device; those of [`Plan::new`] and of the probe.
    pub fn new(variables: &VarMap, config: Config) -> Result<Self, Error> {
        Self::build(|_| Source::Map(variables.clone()), variables::of_map(variables), config)
    }

    /// A probe for these variables, in this order. A variable that is there twice counts once, under its first name; what
    /// is not in the list is neither measured nor clipped.
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
        let settings = Settings::default();
        let present = vec![true; planned.len()];
        let (source, earlier) = (source(variables), VecDeque::new());
        let (backend, health) = backend_of(&source, &planned, &present, config, &settings)?;
        Ok(Self { source, planned, config, settings, backend, health, present, given: 0, loss_scale: None, earlier })
    }

    /// Names of the planned variables, in the plan's order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.planned.iter().map(|variable| variable.name.as_str())
    }

    /// The plan of the reports: the variables that had a gradient in the last step, before the first all of them.
    pub fn plan(&self) -> &Plan {
        self.backend.plan()
    }

    /// With the weights measured too, in the same pass, which gives reports their norms and the ratio of each gradient to
    /// its weight.
    ///
    /// # Errors
    /// Those of the probe.
    pub fn with_weights(self) -> Result<Self, Error> {
        let settings = Settings { weights: true, ..self.settings };
        let (backend, health) = backend_of(&self.source, &self.planned, &self.present, self.config, &settings)?;
        Ok(Self { settings, backend, health, given: 0, ..self })
    }

    /// Diagnoses every report from now on by these rules, and has the probe leave their verdict words
    /// ([`StepOutputs::health`](gradprobe::StepOutputs::health)). Other rules later, for another learning rate say, go on
    /// with what the diagnosis remembers.
    ///
    /// # Errors
    /// Those of [`Health::new`] and [`judge_by`](gradprobe::CpuProbe::judge_by).
    pub fn diagnose_by(&mut self, rules: Rules) -> Result<(), Error> {
        let health = match self.health.clone() {
            None => health_of(&self.source, self.backend.plan(), rules.clone())?,
            Some(mut health) => {
                health.set_rules(rules.clone())?;
                health
            }
        };
        self.backend.judge_by(&health)?;
        (self.health, self.settings.rules) = (Some(health), Some(rules));
        Ok(())
    }

    /// Sets what the next loss is multiplied by, where [`Config::loss_scale`] says that it is. What it adapts to is
    /// [`StepOutputs::next_loss_scale`](gradprobe::StepOutputs::next_loss_scale) of each report.
    ///
    /// # Errors
    /// [`gradprobe::Error::NoLossScale`], [`gradprobe::Error::InvalidConfig`], or the device's.
    pub fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        self.backend.set_loss_scale(scale)?;
        self.loss_scale = Some(scale);
        Ok(())
    }

    /// Keeps mean and variance of every element across the steps from now on: 8 bytes each.
    ///
    /// # Errors
    /// Those of [`GsnrConfig::bytes`], or the device's.
    pub fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        self.backend.track(config)?;
        self.settings.tracking = Some(config.clone());
        Ok(())
    }

    /// Signal and noise of the tracked gradients up to the last step, and the noise scale. Waits, on a GPU.
    ///
    /// # Errors
    /// [`gradprobe::Error::NotTracked`], [`gradprobe::Error::TooFewSteps`], or the device's.
    pub fn gsnr(&mut self) -> Result<GsnrReport, Error> {
        Ok(self.backend.gsnr()?)
    }

    /// Keeps the last steps where the gradients are, this many, without asking for reports.
    ///
    /// # Errors
    /// [`gradprobe::Error::InvalidConfig`] for 0 steps, or the device's.
    pub fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        self.backend.keep_history(steps)?;
        self.settings.history = Some(steps);
        Ok(())
    }

    /// The last steps. Waits, on a GPU.
    ///
    /// # Errors
    /// [`gradprobe::Error::NoHistory`], or the device's.
    pub fn history(&mut self) -> Result<HistoryReport, Error> {
        Ok(self.backend.history()?)
    }

    /// Makes room for histograms.
    ///
    /// # Errors
    /// The device's.
    pub fn enable_histogram(&mut self) -> Result<(), Error> {
        self.backend.enable_histogram()?;
        self.settings.histogram = true;
        Ok(())
    }

    /// The histograms of these gradients, those of the last step or others of the same variables. Waits, on a GPU.
    ///
    /// # Errors
    /// [`gradprobe::Error::NotEnabled`], and those of [`measure`](Self::measure).
    pub fn histogram(&mut self, gradients: &GradStore) -> Result<HistogramReport, Error> {
        let found = self.source.find(&self.planned, gradients)?;
        self.plan_for(&found)?;
        let tensors = self.in_order(&found, |found| found.gradient.as_ref())?;
        Ok(self.backend.histogram(&tensors)?)
    }

    /// What does not pass through here: the probe of the last step's gradients. It is another one after what is missing
    /// has changed.
    pub fn underlying(&mut self) -> Underlying<'_> {
        self.backend.underlying()
    }

    /// Measures these gradients, which stay as they are. The report comes by [`poll`](Self::poll).
    ///
    /// # Errors
    /// [`Error::Changed`] when the model is not the one the probe was made for, [`Error::Gradient`],
    /// [`Error::NoGradients`], [`Error::MissingGradient`], [`Error::Candle`], and those of the probe.
    pub fn measure(&mut self, gradients: &GradStore) -> Result<(), Error> {
        let found = self.source.find(&self.planned, gradients)?;
        self.plan_for(&found)?;
        let tensors = self.in_order(&found, |found| found.gradient.as_ref())?;
        self.measure_tensors(&found, &tensors)
    }

    /// Measures these gradients and clips them, in place, by [`Config::max_norm`] and [`Config::clip`].
    ///
    /// # Errors
    /// Those of [`measure`](Self::measure); nothing is clipped then.
    pub fn measure_and_clip(&mut self, gradients: &mut GradStore) -> Result<(), Error> {
        let mut found = self.source.find(&self.planned, gradients)?;
        self.plan_for(&found)?;
        gradients::make_own(gradients, &self.planned, &mut found)?;
        let tensors = self.in_order(&found, |found| found.gradient.as_ref())?;
        self.measure_tensors(&found, &tensors)?;
        Ok(self.backend.clip(&tensors)?)
    }

    /// The oldest report that has arrived and was not given yet. Never waits: of gradients on the CPU that is the step's
    /// own, on a GPU this step's or one of the last few. When nobody asks, four are kept.
    ///
    /// # Errors
    /// The device's.
    pub fn poll(&mut self) -> Result<Option<Measured>, Error> {
        if let Some(earlier) = self.earlier.pop_front() {
            return Ok(Some(earlier));
        }
        let report = self.backend.poll()?;
        report.map(|report| self.measured(report)).transpose()
    }

    /// Waits for the last measurement and gives its report, unless it was given already; those before it are dropped.
    ///
    /// # Errors
    /// The device's.
    pub fn wait(&mut self) -> Result<Option<Measured>, Error> {
        let report = self.backend.wait()?.filter(|report| report.step() > self.given);
        let last = report.map(|report| self.measured(report)).transpose()?;
        Ok(last.or(self.earlier.pop_back()).inspect(|_| self.earlier.clear()))
    }

    fn measured(&mut self, report: Report) -> Result<Measured, Error> {
        self.given = report.step();
        self.loss_scale = Some(report.outputs().next_loss_scale);
        let diagnosis = self.health.as_mut().map(|health| health.diagnose(&report)).transpose()?;
        let missing = self.planned.iter().zip(&self.present).filter(|(_, present)| !**present);
        let missing = missing.map(|(variable, _)| variable.name.clone()).collect();
        Ok(Measured { report, missing, diagnosis })
    }

    fn measure_tensors(&mut self, found: &[Found], gradients: &[Tensor]) -> Result<(), Error> {
        let weights = self
            .settings
            .weights
            .then(|| self.in_order(found, |found| found.gradient.is_some().then_some(found.variable.as_tensor())));
        Ok(self.backend.measure(gradients, weights.transpose()?.as_deref())?)
    }

    /// One tensor of each variable that has one, its elements in order.
    fn in_order<'a>(
        &self,
        found: &'a [Found],
        tensor: impl Fn(&'a Found) -> Option<&'a Tensor>,
    ) -> Result<Vec<Tensor>, Error> {
        let tensors = found.iter().zip(&self.planned).filter_map(|(found, planned)| Some((tensor(found)?, planned)));
        tensors.map(|(tensor, planned)| gradients::in_order(&planned.name, tensor)).collect()
    }

    /// Goes over to the gradients that there are, if they are not those of the last step.
    fn plan_for(&mut self, found: &[Found]) -> Result<(), Error> {
        let present = || found.iter().map(|found| found.gradient.is_some());
        let changed = present().zip(&self.present).position(|(now, before)| now != *before);
        let Some(changed) = changed else { return Ok(()) };
        let remembers = matches!(
            self.config.clip,
            ClipPolicy::Percentile { .. } | ClipPolicy::ZScore { .. } | ClipPolicy::TensorEma { .. }
        );
        if remembers && self.backend.has_measured() {
            return Err(Error::MissingGradient { name: self.planned[changed].name.clone() });
        }
        let present: Vec<bool> = present().collect();
        let (backend, health) = backend_of(&self.source, &self.planned, &present, self.config, &self.settings)?;
        while let Some(report) = self.backend.poll()? {
            let measured = self.measured(report)?;
            self.earlier.push_back(measured);
        }
        if let Some(report) = self.backend.wait()?.filter(|report| report.step() > self.given) {
            let measured = self.measured(report)?;
            self.earlier.push_back(measured);
        }
        self.earlier.drain(..self.earlier.len().saturating_sub(WAITING));
        (self.backend, self.health, self.present, self.given) = (backend, health, present, 0);
        match self.loss_scale {
            Some(scale) if self.config.loss_scale.is_some() => Ok(self.backend.set_loss_scale(scale)?),
            _ => Ok(()),
        }
    }
}

impl Measured {
    /// Whether the step should be skipped: something was not finite, under [`NonFinitePolicy::Skip`].
    pub fn skip(&self) -> bool {
        self.report.outputs().skip != 0
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.report)?;
        if !self.missing.is_empty() {
            writeln!(f, "no gradient: {}", self.missing.join(", "))?;
        }
        self.diagnosis.as_ref().map_or(Ok(()), |diagnosis| write!(f, "{diagnosis}"))
    }
}

impl fmt::Debug for CandleProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CandleProbe")
            .field("planned", &self.planned)
            .field("config", &self.config)
            .field("present", &self.present)
            .finish_non_exhaustive()
    }
}

/// A probe of the variables that are present, with everything that was asked for, and what follows its reports.
fn backend_of(
    source: &Source,
    planned: &[Planned],
    present: &[bool],
    config: Config,
    settings: &Settings,
) -> Result<(Backend, Option<Health>), Error> {
    let device = variables::device(planned)?;
    let dtypes = planned.iter().map(Planned::known_dtype).collect::<Result<Vec<_>, _>>()?;
    let measured = || planned.iter().zip(&dtypes).zip(present).filter(|(_, present)| **present).map(|(of, _)| of);
    let mut plan = Plan::new(measured().map(|(variable, &dtype)| (variable.name.as_str(), dtype, variable.len())))?;
    if settings.weights {
        plan = plan.with_weights(measured().map(|(_, &dtype)| dtype))?;
    }
    let health = settings.rules.clone().map(|rules| health_of(source, &plan, rules)).transpose()?;
    let mut backend = Backend::new(device, plan, config)?;
    if let Some(health) = &health {
        backend.judge_by(health)?;
    }
    if let Some(tracking) = &settings.tracking {
        backend.track(tracking)?;
    }
    if let Some(steps) = settings.history {
        backend.keep_history(steps)?;
    }
    if settings.histogram {
        backend.enable_histogram()?;
    }
    Ok((backend, health))
}

/// Health of these gradients. A list is in the order of the model; the names of a map tell it as far as they can.
fn health_of(source: &Source, plan: &Plan, rules: Rules) -> Result<Health, Error> {
    let health = Health::new(plan, rules)?;
    match source {
        Source::Map(_) => Ok(health.backward_order(health::backward_order(plan))?),
        Source::List(_) => Ok(health),
    }
}
