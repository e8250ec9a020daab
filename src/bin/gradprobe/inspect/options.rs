//! The command line of `inspect`.

use super::Selection;
use crate::files::OtherTypes;
use clap::{Args, ValueEnum};
use gradprobe::{
    Clip, Config, Verdict,
    health::{Preset, Rules},
};
use std::{path::PathBuf, str::FromStr};

/// Report what is in gradients, and what is wrong with them
///
/// Norms, moments, extremes, zero and dead shares, NaN and Inf with their place; across steps, signal and noise. Each file holds
/// the gradients of one step, which are counted from 0.
///
/// A step is a safetensors file, a folder of them or an index (`model.safetensors.index.json`), which are shards of one step, or
/// a file of PyTorch's (.pt, .pth, .bin): a dict of tensors, also under `state_dict`, `model_state_dict` or `model`. A checkpoint has weights,
/// not gradients. Save gradients after `loss.backward()`:
///
///   torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "step0.pt")
///
/// Tensors of other types than F32, F16 and BF16 are named and left out, F64 among them.
///
/// Safetensors files are mapped: the system keeps as much of them in memory as it has room for. PyTorch's are read whole. A file
/// that another program cuts short while it is measured ends this one by SIGBUS.
#[derive(Debug, Args)]
pub struct Options {
    /// Clip the gradients of each file together to this L2 norm
    #[arg(long, value_name = "X", value_parser = above_zero, requires = "out", allow_hyphen_values = true)]
    pub clip_norm: Option<f64>,

    /// Directory for the clipped copies, under the names of the files; made if missing
    #[arg(long, value_name = "DIR", requires = "clip_norm")]
    pub out: Option<PathBuf>,

    /// The weights by the names of their gradients: adds the norm of each, and that of its gradient over it
    #[arg(long, value_name = "FILE")]
    pub params: Option<PathBuf>,

    /// Elements with |x| below this count as dead [default: 1e-10]
    #[arg(long, value_name = "X", value_parser = not_negative, allow_hyphen_values = true)]
    pub dead_threshold: Option<f32>,

    /// Rules by which gradients are called unhealthy: default, lr-scaled, course, doctor or transformer
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = preset)]
    pub preset: Preset,

    /// The learning rate: by the default rules, a gradient of which X is more than its weight is too large; by the others, norms
    /// below 1e-10/X count as vanishing and above 1/X as exploding
    #[arg(
        long,
        value_name = "X",
        value_parser = learning_rate,
        required_if_eq("preset", "lr-scaled"),
        allow_hyphen_values = true
    )]
    pub lr: Option<f64>,

    /// Refuse files with tensors of other types than F32, F16 and BF16
    #[arg(long)]
    pub strict: bool,

    /// Replace clipped copies that are there already
    #[arg(long, requires = "out")]
    pub force: bool,

    /// Exit with code 3 when the verdict is this or worse
    #[arg(long, value_name = "VERDICT", value_enum)]
    pub fail_on: Option<FailOn>,

    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,

    /// Gradients of one step each, in step order. From two on, signal and noise across the steps are reported; that
    /// takes 8 bytes of memory an element
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,

    #[command(flatten)]
    pub selection: Selection,
}

/// A verdict that a run may fail on.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FailOn {
    Warning,
    Critical,
}

impl FailOn {
    /// Whether a verdict is this or worse.
    pub fn is_met_by(self, verdict: Verdict) -> bool {
        verdict
            >= match self {
                Self::Warning => Verdict::Warning,
                Self::Critical => Verdict::Critical,
            }
    }
}

impl Options {
    /// The settings of the probe.
    pub fn config(&self) -> Config {
        let mut config = Config::default();
        if let Some(threshold) = self.dead_threshold {
            config = config.dead_threshold(threshold);
        }
        if let Some(norm) = self.clip_norm {
            config = config.clip(Clip::global_norm(norm));
        }
        config
    }

    /// The treatment of tensors of other types than the three.
    pub fn others(&self) -> OtherTypes {
        if self.strict { OtherTypes::Refused } else { OtherTypes::LeftOut }
    }

    /// The rules for findings.
    pub fn rules(&self) -> Rules {
        let rules = Rules::preset(self.preset);
        match self.lr {
            Some(learning_rate) => rules.learning_rate(learning_rate),
            None => rules,
        }
    }
}

fn preset(name: &str) -> Result<Preset, String> {
    name.parse().map_err(|error: gradprobe::Error| error.to_string())
}

fn learning_rate(text: &str) -> Result<f64, String> {
    number(text, |x: f64| Rules::default().learning_rate(x).check().is_ok(), "a finite number above 0, at least 1e-290")
}

fn above_zero(text: &str) -> Result<f64, String> {
    number(text, |x: f64| x.is_finite() && x > 0.0, "a finite number above 0")
}

fn not_negative(text: &str) -> Result<f32, String> {
    number(text, |x: f32| x.is_finite() && x >= 0.0, "a finite number, not negative, in the range of f32")
}

fn number<T: FromStr + Copy>(text: &str, valid: impl Fn(T) -> bool, expected: &str) -> Result<T, String> {
    text.parse().ok().filter(|&x| valid(x)).ok_or_else(|| format!("it must be {expected}"))
}
