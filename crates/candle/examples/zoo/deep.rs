//! Many layers: with ReLU and residuals, or, as they were in the eighties, with sigmoids and nothing else.

use crate::{architecture::Network, data::ARMS};
use candle_core::{Result, Tensor};
use candle_nn::{Linear, Module, VarBuilder, linear, ops};

const WIDTH: usize = 8;
const LAYERS: usize = 7;
/// The factor of what a residual is added to: 1/√LAYERS, so that the sum of all is no larger than one.
const BRANCH: f64 = 0.38;

pub struct Deep {
    first: Linear,
    layers: Vec<Linear>,
    last: Linear,
    sigmoids: bool,
}

impl Deep {
    pub fn new(sigmoids: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            first: linear(2, WIDTH, vb.pp("first"))?,
            layers: (0..LAYERS).map(|index| linear(WIDTH, WIDTH, vb.pp(index))).collect::<Result<_>>()?,
            last: linear(WIDTH, ARMS.into(), vb.pp("last"))?,
            sigmoids,
        })
    }
}

impl Network for Deep {
    fn scores(&self, inputs: &Tensor, _broken: bool) -> Result<Tensor> {
        let mut x = self.first.forward(inputs)?;
        for layer in &self.layers {
            let through = layer.forward(&x)?;
            x = if self.sigmoids { ops::sigmoid(&through)? } else { (x + (through.relu()? * BRANCH)?)? };
        }
        self.last.forward(&x)
    }
}
