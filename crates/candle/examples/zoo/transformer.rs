//! A transformer of one block, whose last layer is its table of letters.

use crate::{
    architecture::Network,
    block::{self, Block, Norm, Sizes},
    text::{ALPHABET, CONTEXT},
};
use candle_core::{Result, Tensor};
use candle_nn::{Embedding, Init, Module, VarBuilder, embedding};

const SIZES: Sizes = Sizes { width: 6, heads: 2, hidden: 12 };

pub struct Transformer {
    letters: Embedding,
    /// [CONTEXT, width]
    positions: Tensor,
    block: Block,
    norm: Norm,
    mask: Tensor,
    detached: bool,
}

impl Transformer {
    /// `detached`: what the block gives is cut from the graph, and only the table learns, as last layer.
    pub fn new(detached: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            letters: embedding(ALPHABET, SIZES.width, vb.pp("letters"))?,
            positions: vb.get_with_hints((CONTEXT, SIZES.width), "positions.weight", Init::Const(0.0))?,
            block: Block::new(SIZES, &vb.pp("h.0"))?,
            norm: Norm::new(SIZES.width, &vb.pp("norm"))?,
            mask: block::mask(CONTEXT, vb.device())?,
            detached,
        })
    }
}

impl Network for Transformer {
    fn scores(&self, inputs: &Tensor, _broken: bool) -> Result<Tensor> {
        let x = self.letters.forward(inputs)?.broadcast_add(&self.positions)?;
        let mut x = self.block.forward(&x, &self.mask)?;
        if self.detached {
            x = x.detach();
        }
        self.norm.forward(&x)?.flatten(0, 1)?.matmul(&self.letters.embeddings().t()?)
    }
}
