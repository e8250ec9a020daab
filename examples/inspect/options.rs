//! The command line.

use clap::{Parser, ValueEnum};
use gradprobe::{
    Clip, Config,
    health::{Preset, Rules},
};
use std::{path::PathBuf, str::FromStr};

/// Reads gradients from safetensors files and reports what is in them: norms, moments, extremes, zero and dead
/// shares, NaN and Inf with their place; across steps, signal and noise. Each file holds the gradients of one step.
#[derive(Debug, Parser)]
#[command(name = "inspect")]
pub struct Options {
    /// Where the statistics are computed [default: cuda when a GPU is there, else cpu]
    #[arg(long, value_enum)]
    pub device: Option<Device>,

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

    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,

    /// Gradients of one step each, in step order. From two on, signal and noise across the steps are reported; that
    /// takes 8 bytes of memory an element
    #[arg(required = true, value_name = "FILE.safetensors")]
    pub files: Vec<PathBuf>,
}

/// A place where statistics can be computed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Device {
    /// All cores of this machine
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
    /// The GPU's kernels, run on this machine's cores: slow, for checking them
    Simt,
    /// The GPU's kernels as nvcc compiled them, interpreted: slower still, for checking what a GPU would be given
    Ptx,
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

    /// What findings are made by.
    pub fn rules(&self) -> Rules {
        let rules = Rules::preset(self.preset);
        match self.lr {
            Some(learning_rate) => rules.learning_rate(learning_rate),
            None => rules,
        }
    }
}

/// What is wrong with a command line, without the usage and the advice that follow it over several lines.
pub fn first_sentence(error: &clap::Error) -> String {
    let advice = |line: &str| ["tip:", "Usage:", "For more information"].iter().any(|word| line.starts_with(word));
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !advice(line)).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
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
