//! A transformer of four blocks, 200 000 weights; or, to see gradients vanish, a tower of sigmoid layers.

use crate::{
    block::{self, Block, Norm, Sizes},
    root,
    text::CONTEXT,
    weights,
};
use candle_core::{Result, Tensor};
use candle_nn::{Embedding, Init, Linear, Module, VarBuilder, VarMap, embedding, linear, ops};

const WIDTH: usize = 64;
const SIZES: Sizes = Sizes { width: WIDTH, heads: 4, hidden: 4 * WIDTH };
const BLOCKS: usize = 4;
const TOWER: usize = 12;

/// Tells the next character.
pub struct Model {
    tokens: Embedding,
    /// [CONTEXT, WIDTH]
    positions: Tensor,
    body: Body,
    norm: Norm,
    head: Linear,
    /// [CONTEXT, CONTEXT]
    mask: Tensor,
}

enum Body {
    Blocks(Vec<Block>),
    Tower(Vec<Linear>),
}

impl Model {
    /// Makes the variables, by [`seed`] to be given their values.
    pub fn new(alphabet: usize, tower: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        let layer = |index: usize| vb.pp(format!("h.{index}"));
        let body = if tower {
            Body::Tower((0..TOWER).map(|index| linear(WIDTH, WIDTH, layer(index))).collect::<Result<_>>()?)
        } else {
            Body::Blocks((0..BLOCKS).map(|index| Block::new(SIZES, &layer(index))).collect::<Result<_>>()?)
        };
        Ok(Self {
            tokens: embedding(alphabet, WIDTH, vb.pp("embed.tokens"))?,
            positions: vb.get_with_hints((CONTEXT, WIDTH), "embed.positions.weight", Init::Const(0.0))?,
            body,
            norm: Norm::new(WIDTH, &vb.pp("norm"))?,
            head: linear(WIDTH, alphabet, vb.pp("head"))?,
            mask: block::mask(CONTEXT, vb.device())?,
        })
    }

    /// The scores of all characters to come next, [lines · CONTEXT, alphabet], from [lines, CONTEXT]. `broken` puts a root
    /// of 0 behind the third block.
    pub fn forward(&self, inputs: &Tensor, broken: bool) -> Result<Tensor> {
        let mut x = self.tokens.forward(inputs)?.broadcast_add(&self.positions)?;
        match &self.body {
            Body::Blocks(blocks) => {
                for (index, block) in blocks.iter().enumerate() {
                    x = block.forward(&x, &self.mask)?;
                    if broken && index == 2 {
                        x = root::with_root_of_zero(&x)?;
                    }
                }
            }
            Body::Tower(layers) => {
                for layer in layers {
                    x = ops::sigmoid(&layer.forward(&x)?)?;
                }
            }
        }
        self.head.forward(&self.norm.forward(&x)?)?.flatten(0, 1)
    }
}

/// Gives every weight its first value: the matrices have variance 1/columns, that of the head less.
pub fn seed(variables: &mut VarMap, names: &[String], random: &mut fastrand::Rng) -> Result<()> {
    // Scores of about 0 make the first loss that of guessing.
    weights::fill(variables, names, random, |name, usual| if name.starts_with("head") { 0.05 } else { usual })
}
