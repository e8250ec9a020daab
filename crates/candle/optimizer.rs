//! AdamW in place of candle's.

use crate::{CandleProbe, Config, Error};
use candle_core::{Result, Var, backprop::GradStore};
use candle_nn::{Optimizer, ParamsAdamW};
use gradprobe::optim;

/// Moves variables by AdamW, with the calls and the parameters of [`candle_nn::AdamW`]. It makes one pass over the
/// memory in place of a dozen, in one launch on a GPU, and leaves out steps in which a gradient is NaN or infinite. It
/// is the short form of [`CandleProbe::update`], which adds a clip, groups, other optimizers and reports.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, Optimizer, VarBuilder, VarMap, linear};
/// use gradprobe_candle::AdamW;
///
/// let (variables, device) = (VarMap::new(), Device::Cpu);
/// let model = linear(16, 4, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
/// let mut optimizer = AdamW::new_lr(variables.all_vars(), 1e-3)?;
/// let loss = model.forward(&Tensor::randn(0f32, 1.0, (8, 16), &device)?)?.sqr()?.mean_all()?;
/// optimizer.backward_step(&loss)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct AdamW {
    /// `None` without variables.
    probe: Option<CandleProbe>,
    parameters: ParamsAdamW,
}

/// Gives AdamW with these parameters, for [`Config::optimizer`].
pub fn adamw(parameters: &ParamsAdamW) -> optim::AdamW {
    let ParamsAdamW { lr, beta1, beta2, eps, weight_decay } = *parameters;
    optim::AdamW::new(lr).betas(beta1, beta2).epsilon(eps).weight_decay(weight_decay)
}

impl AdamW {
    /// Makes it with candle's other defaults, among them a decay of 0.01.
    ///
    /// # Errors
    /// Those of [`CandleProbe::of_variables`].
    pub fn new_lr(variables: Vec<Var>, learning_rate: f64) -> Result<Self> {
        Self::new(variables, ParamsAdamW { lr: learning_rate, ..ParamsAdamW::default() })
    }

    /// The parameters; the learning rate as it was last set.
    pub fn params(&self) -> &ParamsAdamW {
        &self.parameters
    }

    /// The probe, for its reports. Variables are named by their places in the list.
    pub fn probe(&mut self) -> Option<&mut CandleProbe> {
        self.probe.as_mut()
    }
}

impl Optimizer for AdamW {
    type Config = ParamsAdamW;

    /// Leaves out variables of integers, as candle does.
    fn new(variables: Vec<Var>, parameters: ParamsAdamW) -> Result<Self> {
        let variables: Vec<_> = variables.into_iter().filter(|variable| variable.dtype().is_float()).collect();
        if variables.is_empty() {
            return Ok(Self { probe: None, parameters });
        }
        let named = variables.into_iter().enumerate().map(|(place, variable)| (place.to_string(), variable));
        let config = Config::new().optimizer(adamw(&parameters));
        let probe = CandleProbe::of_variables(named, config).map_err(candle_core::Error::wrap)?;
        Ok(Self { probe: Some(probe), parameters })
    }

    fn step(&mut self, gradients: &GradStore) -> Result<()> {
        let Some(probe) = &mut self.probe else { return Ok(()) };
        let mut optimizer = probe.probe().optimizer().map_err(candle_core::Error::wrap)?;
        if optimizer.learning_rate().to_bits() != self.parameters.lr.to_bits() {
            optimizer.set_learning_rate(self.parameters.lr).map_err(candle_core::Error::wrap)?;
        }
        match probe.update(gradients) {
            // As in candle, a call without gradients is no step.
            Ok(()) | Err(Error::NoGradients { .. }) => Ok(()),
            Err(error) => Err(candle_core::Error::wrap(error)),
        }
    }

    fn learning_rate(&self) -> f64 {
        self.parameters.lr
    }

    fn set_learning_rate(&mut self, learning_rate: f64) {
        self.parameters.lr = learning_rate;
    }
}
