//! The table that is printed while the run goes on.

use crate::watch::{Noise, words};
use gradprobe::health::Diagnosis;
use gradprobe_candle::WatchedStep;
use std::io::{self, Write};

/// Prints a line every so many steps, and when the verdict changes.
pub struct Table {
    every: u64,
    steps: u64,
    words: String,
}

/// Lines of a run in which nothing happens.
const LINES: u64 = 20;

impl Table {
    /// # Errors
    /// When standard output is closed.
    pub fn new(steps: u64) -> io::Result<Self> {
        writeln!(
            io::stdout(),
            "{:>6} {:>9} {:>9} {:>7} {:>9} {:>9}  verdict",
            "step",
            "loss",
            "norm",
            "clip",
            "gsnr",
            "noise"
        )?;
        Ok(Self { every: steps.div_ceil(LINES).max(1), steps, words: "healthy".to_owned() })
    }

    /// Whether a step has a line.
    pub fn shows(&self, seen: &WatchedStep, diagnosis: &Diagnosis) -> bool {
        let step = seen.step();
        step == 1 || step == self.steps || step.is_multiple_of(self.every) || words(diagnosis) != self.words
    }

    /// # Errors
    /// When standard output is closed.
    pub fn line(&mut self, seen: &WatchedStep, diagnosis: &Diagnosis, (loss, noise): (f32, Noise)) -> io::Result<()> {
        self.words = words(diagnosis);
        let mut stdout = io::stdout().lock();
        writeln!(
            stdout,
            "{:>6} {loss:>9.4} {:>9} {:>7.4} {:>9} {:>9}  {}{}",
            seen.step(),
            number(Some(seen.norm())),
            seen.coefficient(),
            number(noise.gsnr),
            number(noise.scale),
            self.words,
            if seen.skip() { ", skipped" } else { "" }
        )?;
        stdout.flush()
    }
}

/// A number with three digits or more, in nine places.
fn number(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(x) if (1e-2..1e4).contains(&x) || !x.is_finite() => format!("{x:.3}"),
        Some(x) => format!("{x:.2e}"),
    }
}
