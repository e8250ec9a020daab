//! A transformer of four blocks, 200 000 weights; or, to see gradients vanish, a tower of sigmoid layers.

use crate::{fault, text::CONTEXT};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Embedding, Init, Linear, Module, VarBuilder, VarMap, embedding, linear, ops};

const WIDTH: usize = 64;
const HEADS: usize = 4;
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
    /// [CONTEXT, CONTEXT]: −∞ for what comes later, else 0.
    mask: Tensor,
}

enum Body {
    Blocks(Vec<Block>),
    Tower(Vec<Linear>),
}

struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    up: Linear,
    down: Linear,
}

/// candle's own `LayerNorm` has no backward pass.
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Model {
    /// Makes the variables, by [`seed`] to be given their values.
    pub fn new(alphabet: usize, tower: bool, vb: &VarBuilder<'_>) -> Result<Self> {
        let layer = |index: usize| vb.pp(format!("h.{index}"));
        let body = if tower {
            Body::Tower((0..TOWER).map(|index| linear(WIDTH, WIDTH, layer(index))).collect::<Result<_>>()?)
        } else {
            Body::Blocks((0..BLOCKS).map(|index| Block::new(&layer(index))).collect::<Result<_>>()?)
        };
        let later = |(row, column): (usize, usize)| if column > row { f32::NEG_INFINITY } else { 0.0 };
        let mask = (0..CONTEXT * CONTEXT).map(|index| later((index / CONTEXT, index % CONTEXT))).collect();
        Ok(Self {
            tokens: embedding(alphabet, WIDTH, vb.pp("embed.tokens"))?,
            positions: vb.get_with_hints((CONTEXT, WIDTH), "embed.positions.weight", Init::Const(0.0))?,
            body,
            norm: Norm::new(&vb.pp("norm"))?,
            head: linear(WIDTH, alphabet, vb.pp("head"))?,
            mask: Tensor::from_vec(mask, (CONTEXT, CONTEXT), vb.device())?,
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
                        x = fault::with_root_of_zero(&x)?;
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

impl Block {
    fn new(vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            norm1: Norm::new(&vb.pp("norm1"))?,
            qkv: linear(WIDTH, 3 * WIDTH, vb.pp("attn.qkv"))?,
            proj: linear(WIDTH, WIDTH, vb.pp("attn.proj"))?,
            norm2: Norm::new(&vb.pp("norm2"))?,
            up: linear(WIDTH, 4 * WIDTH, vb.pp("mlp.up"))?,
            down: linear(4 * WIDTH, WIDTH, vb.pp("mlp.down"))?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention(&self.norm1.forward(x)?, mask)?)?;
        let hidden = self.up.forward(&self.norm2.forward(&x)?)?.relu()?;
        &x + self.down.forward(&hidden)?
    }

    fn attention(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (lines, length, width) = x.dims3()?;
        let depth = width / HEADS;
        let qkv = self.qkv.forward(x)?.reshape((lines, length, 3, HEADS, depth))?;
        // [lines, HEADS, length, depth] each.
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
    fn new(vb: &VarBuilder<'_>) -> Result<Self> {
        let weight = vb.get_with_hints(WIDTH, "weight", Init::Const(1.0))?;
        Ok(Self { weight, bias: vb.get_with_hints(WIDTH, "bias", Init::Const(0.0))? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm_slow(x, &self.weight, &self.bias, 1e-5)
    }
}

/// Gives every matrix normal values of variance 1/columns, that of the head smaller ones, and every bias 0. candle's generator cannot
/// be seeded on the CPU.
pub fn seed(variables: &mut VarMap, names: &[String], random: &mut fastrand::Rng, device: &Device) -> Result<()> {
    let shapes: Vec<Vec<usize>> = {
        let data = variables.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        names.iter().map(|name| data[name].dims().to_vec()).collect()
    };
    for (name, shape) in names.iter().zip(shapes) {
        let values = match shape[..] {
            [rows, columns] => {
                // Scores of about 0 make the first loss that of guessing.
                let std = if name.starts_with("head") { 0.05 } else { 1.0 / (columns as f32).sqrt() };
                (0..rows * columns).map(|_| std * normal(random)).collect()
            }
            _ if name.ends_with("bias") => vec![0.0; shape.iter().product()],
            _ => continue,
        };
        variables.set_one(name, Tensor::from_vec(values, shape, device)?.to_dtype(DType::F32)?)?;
    }
    Ok(())
}

/// A standard normal number, by Box and Muller.
fn normal(random: &mut fastrand::Rng) -> f32 {
    (-2.0 * (1.0 - random.f32()).ln()).sqrt() * (std::f32::consts::TAU * random.f32()).cos()
}
