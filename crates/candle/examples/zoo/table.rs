//! Two tables of embeddings, of users and of items, and a perceptron on a pair of their rows.

use crate::{architecture::Network, data::IDS};
use candle_core::{Result, Tensor};
use candle_nn::{Embedding, Linear, Module, VarBuilder, embedding, linear};

const WIDTH: usize = 6;

pub struct Table {
    users: Embedding,
    items: Embedding,
    first: Linear,
    last: Linear,
    modulo_4: bool,
}

impl Table {
    pub fn new(modulo_4: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        let rows = |name| embedding(IDS as usize, WIDTH, vb.pp(name));
        Ok(Self {
            users: rows("users")?,
            items: rows("items")?,
            first: linear(2 * WIDTH, 2 * WIDTH, vb.pp("0"))?,
            last: linear(2 * WIDTH, 2, vb.pp("1"))?,
            modulo_4,
        })
    }
}

impl Network for Table {
    fn scores(&self, inputs: &Tensor, _broken: bool) -> Result<Tensor> {
        let ids = |column: usize| -> Result<Tensor> {
            let ids = inputs.narrow(1, column, 1)?.squeeze(1)?.contiguous()?;
            if !self.modulo_4 {
                return Ok(ids);
            }
            // candle has no remainder.
            let four = Tensor::full(4u32, ids.shape(), ids.device())?;
            &ids - ((&ids / &four)? * &four)?
        };
        let x = Tensor::cat(&[self.users.forward(&ids(0)?)?, self.items.forward(&ids(1)?)?], 1)?;
        self.last.forward(&self.first.forward(&x)?.relu()?)
    }
}
