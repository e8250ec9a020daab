//! The runs.

use crate::{architecture::Architecture, fault::Fault};

/// A run: a training, and where in it the six steps are.
pub struct Case {
    pub name: &'static str,
    pub architecture: Architecture,
    pub fault: Option<Fault>,
    /// The step of the training whose gradients come first.
    pub first_step: usize,
    /// Where the fault is; empty where it is everywhere, or the place is a matter of opinion.
    pub tensors: &'static [&'static str],
    /// The one of the six steps in which it begins; 0 if it was there before; none where the moment is not sharp.
    pub step: Option<usize>,
    pub note: &'static str,
}

impl Case {
    pub fn label(&self) -> &'static str {
        self.fault.map_or("healthy", Fault::label)
    }

    /// The step of the training in which the fault begins, if it begins while it runs.
    pub fn moment(&self) -> usize {
        self.first_step + self.step.unwrap_or(0)
    }
}

/// What is true of the healthy runs of an architecture, too.
fn note(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Mlp | Architecture::Deep | Architecture::Recurrent | Architecture::Transformer => "",
        Architecture::MlpF16 => "the f16 gradients still carry the loss scale, of which the tool is not told",
        Architecture::Convolution => "a bias before a batch norm has only rounding for a gradient",
        Architecture::Lora => "branches start at 0: no gradient behind them in the first step",
        Architecture::Table => "rows that no sample has are not updated",
    }
}

pub fn all() -> Vec<Case> {
    use Architecture::{Convolution, Deep, Lora, Mlp, MlpF16, Recurrent, Table, Transformer};
    let healthy = |name, architecture, first_step| Case {
        name,
        architecture,
        fault: None,
        first_step,
        tensors: &[],
        step: None,
        note: note(architecture),
    };
    let faulty = |name, architecture, fault, first_step, tensors, step| Case {
        name,
        architecture,
        fault: Some(fault),
        first_step,
        tensors,
        step,
        note: "",
    };
    vec![
        healthy("mlp-early", Mlp, 0),
        healthy("mlp-late", Mlp, 394),
        faulty("mlp-lr-too-high", Mlp, Fault::LearningRate(60.0), 0, &[], None),
        faulty("mlp-init-too-large", Mlp, Fault::LargeWeights(20.0), 0, &[], Some(0)),
        faulty("mlp-dead-relu", Mlp, Fault::DeadRelu, 20, DEAD, Some(0)),
        faulty("mlp-corrupted-batch", Mlp, Fault::CorruptedBatch(100.0), 60, &[], Some(3)),
        faulty("mlp-bit-flip", Mlp, Fault::BitFlip("1.weight"), 80, &["1.weight"], Some(3)),
        healthy("mlp-f16-early", MlpF16, 0),
        faulty("mlp-f16-overflow", MlpF16, Fault::Overflow, 0, &[], Some(0)),
        healthy("deep-residual-early", Deep, 0),
        faulty("deep-sigmoid", Deep, Fault::Sigmoids, 0, DEEP, Some(0)),
        faulty("mlp-init-too-small", Mlp, Fault::SmallWeights(0.01), 0, &[], Some(0)),
        healthy("convolution-early", Convolution, 0),
        healthy("convolution-middle", Convolution, 100),
        faulty("convolution-frozen", Convolution, Fault::Frozen, 30, CONVOLUTIONS, Some(0)),
        Case {
            note: "candle's ReLU makes 0 of a NaN: the loss stays a number",
            ..faulty("convolution-nan", Convolution, Fault::Nan, 40, FIRST_CONVOLUTION, Some(3))
        },
        faulty("convolution-loss-times-1e4", Convolution, Fault::LossFactor, 60, &[], Some(3)),
        healthy("lstm-early", Recurrent, 0),
        healthy("lstm-late", Recurrent, 294),
        healthy("transformer-early", Transformer, 0),
        healthy("transformer-middle", Transformer, 150),
        faulty("transformer-detached", Transformer, Fault::Detached, 10, BLOCK, Some(0)),
        healthy("lora-early", Lora, 0),
        faulty("lora-zero-init-both", Lora, Fault::ZeroFactors, 0, FACTORS, Some(0)),
        healthy("table-middle", Table, 200),
        faulty("table-embedding-index-bug", Table, Fault::Index, 100, &["users.weight", "items.weight"], None),
    ]
}

/// The layers whose ReLU never fires, and what they feed: where biases are 0, so is the second layer.
const DEAD: &[&str] = &["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"];
/// All but the last layers, where the gradient has not vanished.
const DEEP: &[&str] = &[
    "first.weight",
    "first.bias",
    "0.weight",
    "0.bias",
    "1.weight",
    "1.bias",
    "2.weight",
    "2.bias",
    "3.weight",
    "3.bias",
    "4.weight",
    "4.bias",
];
const FIRST_CONVOLUTION: &[&str] = &["conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias"];
const CONVOLUTIONS: &[&str] = &[
    "conv1.weight",
    "conv1.bias",
    "norm1.weight",
    "norm1.bias",
    "conv2.weight",
    "conv2.bias",
    "norm2.weight",
    "norm2.bias",
];
/// All before the cut but the table, which learns as last layer.
const BLOCK: &[&str] = &[
    "positions.weight",
    "h.0.norm1.weight",
    "h.0.norm1.bias",
    "h.0.attn.qkv.weight",
    "h.0.attn.qkv.bias",
    "h.0.attn.proj.weight",
    "h.0.attn.proj.bias",
    "h.0.norm2.weight",
    "h.0.norm2.bias",
    "h.0.mlp.up.weight",
    "h.0.mlp.up.bias",
    "h.0.mlp.down.weight",
    "h.0.mlp.down.bias",
];
const FACTORS: &[&str] = &[
    "0.lora_down.weight",
    "0.lora_up.weight",
    "1.lora_down.weight",
    "1.lora_up.weight",
    "2.lora_down.weight",
    "2.lora_up.weight",
];
