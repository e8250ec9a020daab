//! A multilayer perceptron of three layers with ReLU.

use crate::{architecture::Network, data::ARMS};
use candle_core::{Result, Tensor};
use candle_nn::{Linear, Module, VarBuilder, linear};

/// Units of a layer, in the trainings of the perceptron itself.
pub const WIDTH: usize = 20;

pub struct Mlp {
    layers: [Linear; 3],
}

impl Mlp {
    pub fn new(width: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let layers =
            [linear(2, width, vb.pp("0"))?, linear(width, width, vb.pp("1"))?, linear(width, ARMS.into(), vb.pp("2"))?];
        Ok(Self { layers })
    }

    pub fn into_layers(self) -> [Linear; 3] {
        self.layers
    }
}

impl Network for Mlp {
    fn scores(&self, inputs: &Tensor, _broken: bool) -> Result<Tensor> {
        let [first, second, last] = &self.layers;
        let x = inputs.to_dtype(first.weight().dtype())?;
        last.forward(&second.forward(&first.forward(&x)?.relu()?)?.relu()?)
    }
}
