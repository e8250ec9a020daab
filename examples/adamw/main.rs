//! A training step written by hand against the driver, with a clip that costs no pass over the gradients: kernels of its
//! own (`adamw.cu`) compute a small net, gradprobe measures the gradients, and AdamW reads the coefficient of the clip and
//! the flag of a step to be skipped where gradprobe has left them, in device memory. All of it is captured into one CUDA
//! graph (`training.rs`), which the host only launches again. In one step a broken sample comes in: the device skips that
//! step by itself, and gradprobe says what happened.
//!
//! ```sh
//! cargo run --release --example adamw
//! ```

mod data;
mod training;

use data::{BATCH, BATCHES};
use gradprobe::{Report, Verdict};
use std::{error::Error, process::ExitCode};
use training::Training;

const EPOCHS: usize = 12;
/// The step with a broken sample, counted from 1 as in a report: in the third epoch.
const BROKEN_STEP: usize = 2 * BATCHES + 5;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut training = Training::new()?;
    println!("epoch  loss     gradient norm × coefficient of the clip, in the last step");
    for step in 1..=EPOCHS * BATCHES {
        if step == BROKEN_STEP {
            broken_step(&mut training)?;
        } else {
            training.step()?;
        }
        // Never waits. Where the host is far ahead of the device, not every step is reported.
        if let Some(report) = training.probe.poll()? {
            warn(&report);
        }
        // These do wait, for a line in the log.
        if step % BATCHES == 0 {
            let (losses, report) = (training.losses()?, training.probe.wait()?);
            print_epoch(step / BATCHES, &losses, &report);
        }
    }
    Ok(())
}

/// Prints what is wrong with a step, if it is bad.
fn warn(report: &Report) {
    if let Some(diagnosis) = report.diagnosis().filter(|diagnosis| diagnosis.verdict() == Verdict::Critical) {
        print!("{diagnosis}");
    }
}

/// One line: the mean loss of the batches, but for one that is not a number, and what was measured.
fn print_epoch(epoch: usize, losses: &[f32], report: &Report) {
    let finite: Vec<f32> = losses.iter().copied().filter(|loss| loss.is_finite()).collect();
    let loss = finite.iter().sum::<f32>() / finite.len() as f32;
    let outputs = report.outputs();
    println!("{epoch:5}  {loss:.5}  {:.3} × {:.3}", outputs.total_norm, outputs.coefficient);
}

/// A step in which a sample's value is missing. For the demonstration the host waits, to see that nothing has changed.
fn broken_step(training: &mut Training) -> Result<(), Box<dyn Error>> {
    let sample = (BROKEN_STEP - 1) % BATCHES * BATCH;
    let target = data::Samples::new().targets[sample];
    let before = training.state()?;
    training.set_target(sample, f32::NAN)?;
    training.step()?;
    training.set_target(sample, target)?;
    let report = training.probe.wait()?;
    warn(&report);
    if training.state()? != before {
        return Err(format!("step {} was not skipped", report.step()).into());
    }
    println!("  skipped by AdamW: parameters, moments and its count of {} steps are as before", before.steps);
    Ok(())
}
