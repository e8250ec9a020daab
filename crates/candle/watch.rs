//! The watch for a candle trainer.

use crate::{CandleProbe, Config, Error};
use candle_core::backprop::GradStore;
use candle_nn::VarMap;
use gradprobe::WatchedStep;
use std::ops::{Deref, DerefMut};

/// Watches the steps of a candle trainer: [`gradprobe::Watch`] around a [`CandleProbe`], with all its methods.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{AdamW, Module, Optimizer, VarBuilder, VarMap, linear};
/// use gradprobe_candle::{Clip, Config, Watch};
/// # let (variables, device) = (VarMap::new(), Device::Cpu);
/// # let model = linear(16, 4, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
/// # let mut optimizer = AdamW::new_lr(variables.all_vars(), 1e-3)?;
/// # let input = Tensor::randn(0f32, 1.0, (8, 16), &device)?;
/// let mut watch = Watch::new(&variables, Config::full().clip(Clip::global_norm(1.0)))?;
/// # #[cfg(feature = "json")]
/// watch.write_to(std::env::temp_dir().join(format!("candle-run-{}", std::process::id())))?;
/// for step in 0..3 {
///     let loss = model.forward(&input)?.sqr()?.mean_all()?;
///     let mut gradients = loss.backward()?;
///     watch.step(step, &mut gradients, [("loss", loss.to_scalar::<f32>()?.into()), ("lr", 1e-3)])?;
///     optimizer.step(&gradients)?;
/// }
/// watch.finish()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Watch(gradprobe::Watch<CandleProbe>);

impl Watch {
    /// Watches all variables of `variables`: [`CandleProbe::new`]. For a probe made otherwise, use
    /// `Watch::from(probe)`.
    ///
    /// # Errors
    /// As there.
    pub fn new(variables: &VarMap, config: Config) -> Result<Self, Error> {
        CandleProbe::new(variables, config).map(Self::from)
    }

    /// Measures these gradients and clips them in place: [`CandleProbe::step`]. Gives the last step whose report has
    /// come: on the CPU this one, on a GPU this or one of the last few.
    ///
    /// # Errors
    /// Those of [`gradprobe::Watch::step_with`] and of [`CandleProbe::step`].
    pub fn step<'s>(
        &mut self,
        step: u64,
        gradients: &mut GradStore,
        scalars: impl IntoIterator<Item = (&'s str, f64)>,
    ) -> Result<Option<WatchedStep>, Error> {
        self.0.step_with(step, scalars, |probe, has_histogram| {
            start_histogram(probe, gradients, has_histogram)?;
            probe.step(gradients)
        })
    }

    /// Measures these gradients and moves the variables by them, with the declared optimizer: [`CandleProbe::update`].
    ///
    /// # Errors
    /// Those of [`gradprobe::Watch::step_with`] and of [`CandleProbe::update`].
    pub fn update<'s>(
        &mut self,
        step: u64,
        gradients: &GradStore,
        scalars: impl IntoIterator<Item = (&'s str, f64)>,
    ) -> Result<Option<WatchedStep>, Error> {
        self.0.step_with(step, scalars, |probe, has_histogram| {
            start_histogram(probe, gradients, has_histogram)?;
            probe.update(gradients)
        })
    }
}

fn start_histogram(probe: &mut CandleProbe, gradients: &GradStore, wanted: bool) -> Result<(), Error> {
    if wanted { probe.lend(gradients, |probe, tensors| probe.histogram()?.start(tensors)) } else { Ok(()) }
}

impl From<CandleProbe> for Watch {
    fn from(probe: CandleProbe) -> Self {
        Self(gradprobe::Watch::new(probe))
    }
}

impl Deref for Watch {
    type Target = gradprobe::Watch<CandleProbe>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Watch {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}
