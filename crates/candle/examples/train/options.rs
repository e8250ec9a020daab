//! The command line.

use crate::fault::Fault;
use clap::{Parser, ValueEnum};
use std::path::PathBuf;

/// Trains a small transformer on Shakespeare and watches its gradients.
#[derive(Debug, Parser)]
#[command(name = "train")]
pub struct Options {
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub steps: u32,

    /// Lines of 64 characters in a batch
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,

    /// AdamW's learning rate
    #[arg(long, value_name = "X", default_value_t = 3e-3, value_parser = rate, allow_hyphen_values = true)]
    pub lr: f64,

    /// Whose AdamW moves the weights
    #[arg(long, value_enum, default_value_t = Choice::Gradprobe)]
    pub optimizer: Choice,

    /// Batches whose gradients are summed before a step; from two on, the noise scale is that of the sums
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub accumulate: u32,

    /// Breaks the run: a learning rate 1000 times as high or dead units from the middle of it on, a NaN there, or a tower of
    /// sigmoid layers in place of the transformer
    #[arg(long, value_enum)]
    pub fault: Option<Fault>,

    /// Of the weights and the batches: the same seed makes the same run
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Folder for what is written; what an earlier run left of the same names is replaced
    #[arg(long, value_name = "DIR", default_value = "target/train")]
    pub out: PathBuf,
}

/// Whose AdamW it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// Gradprobe's, which takes clip and skip as it reads the gradients
    Gradprobe,
    /// Candle's, behind gradprobe's clip
    Candle,
    /// Gradprobe's, and by turns candle's on a copy of the weights, for the time it takes
    Both,
}

/// What is wrong with a command line, without the usage and the advice that follow it over several lines.
pub fn first_sentence(error: &clap::Error) -> String {
    let advice = |line: &str| ["tip:", "Usage:", "For more information"].iter().any(|word| line.starts_with(word));
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !advice(line)).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|x: &f64| (1e-12..=1e3).contains(x));
    number.ok_or_else(|| "it must be a number from 1e-12 to 1000".to_owned())
}
