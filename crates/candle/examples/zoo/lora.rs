//! LoRA: a trained perceptron whose weights stay, and beside each of its layers two thin factors that learn what is new.

use crate::{
    Result,
    architecture::{Architecture, Network},
    data,
    mlp::Mlp,
    weights,
};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, Optimizer, SGD, VarBuilder, VarMap, loss::cross_entropy};
use fastrand::Rng;

const WIDTH: usize = 32;
const RANK: usize = 4;

pub struct Lora {
    layers: Vec<Layer>,
}

struct Layer {
    base: Linear,
    down: Linear,
    up: Linear,
}

impl Lora {
    /// What is new: the arms are turned by so much, half the way to the next.
    pub const TURN: f32 = std::f32::consts::PI / 3.0;

    pub fn new(seed: u64, vb: &VarBuilder<'_>) -> Result<Self> {
        let layer = |(index, base): (usize, Linear)| -> candle_core::Result<Layer> {
            let vb = vb.pp(index);
            let (outputs, inputs) = base.weight().dims2()?;
            let down = candle_nn::linear_no_bias(inputs, RANK, vb.pp("lora_down"))?;
            Ok(Layer { base, down, up: candle_nn::linear_no_bias(RANK, outputs, vb.pp("lora_up"))? })
        };
        Ok(Self { layers: base(seed)?.into_iter().enumerate().map(layer).collect::<candle_core::Result<_>>()? })
    }
}

impl Network for Lora {
    fn scores(&self, inputs: &Tensor, _broken: bool) -> candle_core::Result<Tensor> {
        let mut x = inputs.clone();
        for (index, Layer { base, down, up }) in self.layers.iter().enumerate() {
            if index > 0 {
                x = x.relu()?;
            }
            x = (base.forward(&x)? + up.forward(&down.forward(&x)?)?)?;
        }
        Ok(x)
    }
}

/// The layers of a perceptron that knows the arms as they were.
fn base(seed: u64) -> Result<Vec<Linear>> {
    let mut variables = VarMap::new();
    let mlp = Mlp::new(WIDTH, &VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    let mut random = Rng::with_seed(seed);
    let names = crate::training::names(&variables);
    weights::fill(&mut variables, &names, &mut random, |_, usual| usual)?;
    let plan = Architecture::Mlp.plan();
    let mut optimizer = SGD::new(variables.all_vars(), plan.learning_rate)?;
    for _ in 0..plan.steps {
        let batch = data::spirals(plan.batch, 0.0, &mut random)?;
        optimizer.backward_step(&cross_entropy(&mlp.scores(&batch.inputs, false)?, &batch.targets)?)?;
    }
    let still = |layer: Linear| Linear::new(layer.weight().detach(), layer.bias().map(Tensor::detach));
    Ok(mlp.into_layers().map(still).into())
}
