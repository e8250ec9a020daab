//! The models, and how each is trained.

use crate::{
    Result,
    convolution::Convolution,
    data::{self, Batch},
    deep::Deep,
    fault::Fault,
    lora::Lora,
    mlp::{self, Mlp},
    recurrent::Recurrent,
    table::Table,
    text::{self, Part},
    transformer::Transformer,
};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use fastrand::Rng;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Architecture {
    Mlp,
    MlpF16,
    Deep,
    Convolution,
    Recurrent,
    Transformer,
    Lora,
    Table,
}

/// How a model is trained.
pub struct Plan {
    pub name: &'static str,
    pub steps: usize,
    /// Samples of a step.
    pub batch: usize,
    pub adam: bool,
    pub learning_rate: f64,
    pub dtype: DType,
    pub loss_scale: f64,
}

/// A model.
pub trait Network {
    /// The scores of the classes, [samples, classes]. `broken` puts a root of 0 somewhere in it.
    fn scores(&self, inputs: &Tensor, broken: bool) -> candle_core::Result<Tensor>;
}

impl Architecture {
    pub fn plan(self) -> Plan {
        let plan = |name, steps, batch, adam, learning_rate| Plan {
            name,
            steps,
            batch,
            adam,
            learning_rate,
            dtype: DType::F32,
            loss_scale: 1.0,
        };
        match self {
            Self::Mlp => plan("mlp", 400, 32, false, 0.2),
            Self::MlpF16 => Plan { dtype: DType::F16, loss_scale: 1024.0, ..plan("mlp-f16", 300, 32, true, 0.005) },
            Self::Deep => plan("deep-residual", 400, 32, false, 0.1),
            Self::Convolution => plan("convolution-batchnorm", 300, 32, false, 0.1),
            Self::Recurrent => plan("lstm", 300, 32, true, 0.01),
            Self::Transformer => plan("transformer-tied", 500, 16, true, 0.01),
            Self::Lora => plan("lora-mlp", 200, 32, true, 0.01),
            Self::Table => plan("clicks-table", 400, 64, true, 0.01),
        }
    }

    /// The model, its variables made in `vb` and to be filled.
    pub fn network(self, vb: &VarBuilder<'_>, fault: Option<Fault>, seed: u64) -> Result<Box<dyn Network>> {
        Ok(match self {
            Self::Mlp | Self::MlpF16 => Box::new(Mlp::new(mlp::WIDTH, vb)?),
            Self::Deep => Box::new(Deep::new(fault == Some(Fault::Sigmoids), vb)?),
            Self::Convolution => Box::new(Convolution::new(fault == Some(Fault::Frozen), vb)?),
            Self::Recurrent => Box::new(Recurrent::new(vb)?),
            Self::Transformer => Box::new(Transformer::new(fault == Some(Fault::Detached), vb)?),
            Self::Lora => Box::new(Lora::new(seed, vb)?),
            Self::Table => Box::new(Table::new(fault == Some(Fault::Index), vb)?),
        })
    }

    /// Samples that are drawn anew; held-out ones of text come from a part of it that is never trained on.
    pub fn batch(self, samples: usize, held_out: bool, random: &mut Rng) -> candle_core::Result<Batch> {
        match self {
            Self::Mlp | Self::MlpF16 | Self::Deep => data::spirals(samples, 0.0, random),
            Self::Lora => data::spirals(samples, Lora::TURN, random),
            Self::Convolution => data::pictures(samples, random),
            Self::Recurrent => data::sequences(samples, random),
            Self::Transformer => text::batch(samples, if held_out { Part::HeldOut } else { Part::Trained }, random),
            Self::Table => data::clicks(samples, random),
        }
    }
}
