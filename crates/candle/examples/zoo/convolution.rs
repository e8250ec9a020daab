//! Two convolutions, each with a batch norm and ReLU, and the mean over the picture.

use crate::{architecture::Network, data::SHAPES, root::with_root_of_zero};
use candle_core::{Result, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, Init, Linear, Module, VarBuilder, conv2d, linear};

pub struct Convolution {
    first: (Conv2d, BatchNorm),
    second: (Conv2d, BatchNorm),
    head: Linear,
}

/// Of the batch alone: there is no mean of all batches, for held-out samples are many enough to have their own.
struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
}

impl Convolution {
    /// `frozen`: all but the head take no gradient.
    pub fn new(frozen: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        let layer = |index: usize, inputs: usize, outputs: usize| -> Result<(Conv2d, BatchNorm)> {
            let config = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
            let conv = conv2d(inputs, outputs, 3, config, vb.pp(format!("conv{index}")))?;
            let norm = BatchNorm::new(outputs, &vb.pp(format!("norm{index}")))?;
            if !frozen {
                return Ok((conv, norm));
            }
            let conv = Conv2d::new(conv.weight().detach(), conv.bias().map(Tensor::detach), config);
            Ok((conv, BatchNorm { weight: norm.weight.detach(), bias: norm.bias.detach() }))
        };
        Ok(Self { first: layer(1, 1, 6)?, second: layer(2, 6, 7)?, head: linear(7, SHAPES, vb.pp("head"))? })
    }
}

impl Network for Convolution {
    fn scores(&self, inputs: &Tensor, broken: bool) -> Result<Tensor> {
        let through = |(conv, norm): &(Conv2d, BatchNorm), x: &Tensor| norm.forward(&conv.forward(x)?)?.relu();
        let mut x = through(&self.first, inputs)?;
        if broken {
            x = with_root_of_zero(&x)?;
        }
        self.head.forward(&through(&self.second, &x)?.mean((2, 3))?)
    }
}

impl BatchNorm {
    fn new(channels: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let weight = vb.get_with_hints(channels, "weight", Init::Const(1.0))?;
        Ok(Self { weight, bias: vb.get_with_hints(channels, "bias", Init::Const(0.0))? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let each = |values: &Tensor| values.reshape((1, (), 1, 1));
        let centred = x.broadcast_sub(&x.mean_keepdim((0, 2, 3))?)?;
        let variance = centred.sqr()?.mean_keepdim((0, 2, 3))?;
        let normal = centred.broadcast_div(&(variance + 1e-5)?.sqrt()?)?;
        normal.broadcast_mul(&each(&self.weight)?)?.broadcast_add(&each(&self.bias)?)
    }
}
