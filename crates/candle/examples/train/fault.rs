//! Ways to break a run that real ones break in.

use candle_core::{Tensor, Var};
use candle_nn::VarMap;
use clap::ValueEnum;
use std::sync::PoisonError;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// A learning rate 1000 times as high
    Lr,
    /// A tower of sigmoid layers: the gradients vanish on their way down
    Sigmoid,
    /// Units of the second block that never fire again
    Dead,
    /// A root of 0 in the third block: nothing is to be seen in the forward pass, and the gradient is NaN
    Nan,
}

/// The factor of [`Fault::Lr`].
pub const RATE: f64 = 1000.0;

/// Pulls 15 of 16 units of the second block's feed-forward part so far below 0 that ReLU lets none of them through.
pub fn kill_units(variables: &VarMap) -> candle_core::Result<()> {
    let data = variables.data().lock().unwrap_or_else(PoisonError::into_inner);
    let bias: &Var = &data["h.1.mlp.up.bias"];
    let killed: Vec<f32> = (0..bias.elem_count()).map(|unit| if unit % 16 == 0 { 0.0 } else { -1e3 }).collect();
    bias.set(&Tensor::from_vec(killed, bias.shape(), bias.device())?)
}
