//! A block of a transformer.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::{Init, Linear, Module, VarBuilder, linear, ops};

/// The sizes of a block.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub width: usize,
    pub heads: usize,
    /// Units of the feed-forward part.
    pub hidden: usize,
}

pub struct Block {
    heads: usize,
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    up: Linear,
    down: Linear,
}

/// candle's own `LayerNorm` has no backward pass.
pub struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Block {
    pub fn new(sizes: Sizes, vb: &VarBuilder<'_>) -> Result<Self> {
        let Sizes { width, heads, hidden } = sizes;
        Ok(Self {
            heads,
            norm1: Norm::new(width, &vb.pp("norm1"))?,
            qkv: linear(width, 3 * width, vb.pp("attn.qkv"))?,
            proj: linear(width, width, vb.pp("attn.proj"))?,
            norm2: Norm::new(width, &vb.pp("norm2"))?,
            up: linear(width, hidden, vb.pp("mlp.up"))?,
            down: linear(hidden, width, vb.pp("mlp.down"))?,
        })
    }

    pub fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention(&self.norm1.forward(x)?, mask)?)?;
        let hidden = self.up.forward(&self.norm2.forward(&x)?)?.relu()?;
        &x + self.down.forward(&hidden)?
    }

    fn attention(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (lines, length, width) = x.dims3()?;
        let depth = width / self.heads;
        let qkv = self.qkv.forward(x)?.reshape((lines, length, 3, self.heads, depth))?;
        // [lines, heads, length, depth] each.
        let part = |index: usize| qkv.narrow(2, index, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
        let (query, key, value) = (part(0)?, part(1)?, part(2)?);
        let scale = 1.0 / f64::from(u32::try_from(depth).unwrap_or(u32::MAX)).sqrt();
        let scores = (query.matmul(&key.t()?)? * scale)?.broadcast_add(mask)?;
        // candle's `softmax_last_dim` has no backward pass.
        let mixed = ops::softmax(&scores, D::Minus1)?.matmul(&value)?;
        self.proj.forward(&mixed.transpose(1, 2)?.reshape((lines, length, width))?)
    }
}

impl Norm {
    pub fn new(width: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let weight = vb.get_with_hints(width, "weight", Init::Const(1.0))?;
        Ok(Self { weight, bias: vb.get_with_hints(width, "bias", Init::Const(0.0))? })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm_slow(x, &self.weight, &self.bias, 1e-5)
    }
}

/// What attention adds to its scores, [length, length]: −∞ for what comes later, else 0.
pub fn mask(length: usize, device: &Device) -> Result<Tensor> {
    let later = |(row, column): (usize, usize)| if column > row { f32::NEG_INFINITY } else { 0.0 };
    let mask = (0..length * length).map(|index| later((index / length, index % length))).collect();
    Tensor::from_vec(mask, (length, length), device)
}
