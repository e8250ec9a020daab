//! A long short-term memory that must keep the first symbol of a sequence.

use crate::{architecture::Network, data::SYMBOLS};
use candle_core::{Result, Tensor};
use candle_nn::{LSTM, LSTMConfig, Linear, Module, RNN, VarBuilder, linear, lstm};

const WIDTH: usize = 9;

pub struct Recurrent {
    memory: LSTM,
    head: Linear,
}

impl Recurrent {
    pub fn new(vb: &VarBuilder<'_>) -> Result<Self> {
        let memory = lstm(SYMBOLS, WIDTH, LSTMConfig::default(), vb.pp("lstm"))?;
        Ok(Self { memory, head: linear(WIDTH, SYMBOLS, vb.pp("head"))? })
    }
}

impl Network for Recurrent {
    fn scores(&self, inputs: &Tensor, _broken: bool) -> Result<Tensor> {
        let states = self.memory.seq(inputs)?;
        let last = states.last().expect("a sequence has symbols");
        self.head.forward(last.h())
    }
}
