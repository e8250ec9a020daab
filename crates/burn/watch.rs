//! The watch for a burn trainer.

use crate::{BurnProbe, Config, Error, shared};
use burn_core::module::Module;
use burn_optim::GradientsParams;
use gradprobe::WatchedStep;
use std::ops::{Deref, DerefMut};

/// Watches the steps of a burn trainer: [`gradprobe::Watch`] around a [`BurnProbe`], with all its methods.
///
/// ```
/// # use burn_core::tensor::{Device, Distribution, Tensor};
/// # use burn_nn::LinearConfig;
/// # use burn_optim::{AdamWConfig, GradientsParams};
/// use gradprobe_burn::{Clip, Config, Watch};
/// # let device = Device::default().autodiff();
/// # let mut model = LinearConfig::new(16, 4).init(&device);
/// # let mut optimizer = AdamWConfig::new().init();
/// let mut watch = Watch::new(&model, Config::full().clip(Clip::global_norm(1.0)))?;
/// # #[cfg(feature = "json")]
/// watch.write_to(std::env::temp_dir().join(format!("burn-run-{}", std::process::id())))?;
/// for step in 0..3 {
///     # let input = Tensor::<2>::random([8, 16], Distribution::Default, &device);
///     let loss = model.forward(input).powf_scalar(2.0).mean();
///     let value: f64 = loss.clone().into_scalar();
///     let mut gradients = GradientsParams::from_grads(loss.backward(), &model);
///     let seen = watch.step(step, &model, &mut gradients, [("loss", value), ("lr", 1e-3)])?;
///     if !seen.is_some_and(|seen| seen.skip()) {
///         model = optimizer.step(1e-3, model, gradients);
///     }
/// }
/// watch.finish()?;
/// # Ok::<(), gradprobe_burn::Error>(())
/// ```
#[derive(Debug)]
pub struct Watch(gradprobe::Watch<BurnProbe>);

impl Watch {
    /// Watches the parameters of `module` that require a gradient: [`BurnProbe::new`].
    ///
    /// # Errors
    /// As there.
    pub fn new<M: Module>(module: &M, config: Config) -> Result<Self, Error> {
        Ok(Self(gradprobe::Watch::new(BurnProbe::new(module, config)?)))
    }

    /// Measures these gradients and clips them in place: [`BurnProbe::step`]. Gives this step, since its report is
    /// there at once.
    ///
    /// # Errors
    /// Those of [`gradprobe::Watch::step_with`] and of [`BurnProbe::step`].
    ///
    /// # Panics
    /// As [`BurnProbe::measure`].
    pub fn step<'s, M: Module>(
        &mut self,
        step: u64,
        module: &M,
        gradients: &mut GradientsParams,
        scalars: impl IntoIterator<Item = (&'s str, f64)>,
    ) -> Result<Option<WatchedStep>, Error> {
        self.0.step_with(step, scalars, |probe, has_histogram| {
            probe.lend_mut(module, gradients, |probe, tensors| {
                if has_histogram {
                    probe.histogram()?.start(&shared(tensors))?;
                }
                probe.step(tensors)
            })
        })
    }
}

impl Deref for Watch {
    type Target = gradprobe::Watch<BurnProbe>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Watch {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}
