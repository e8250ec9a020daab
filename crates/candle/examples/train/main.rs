//! Trains a small transformer on Shakespeare, character by character, and watches its gradients:
//! `cargo run --release --example train`, with `--features cuda` on a GPU.
//!
//! Statistics, signal to noise, a clip and a diagnosis every step; a table while it runs; TensorBoard events, JSON lines,
//! pictures and a page for the browser in a folder; at the end a verdict, and what all that took of a step. `--fault` breaks the run in one of four
//! ways, for the diagnosis to find. Exit code 2 for a command line that cannot be understood, 1 for every other failure; a
//! run that goes bad is no failure.

#[path = "../shared/block.rs"]
mod block;
// Of the program `gradprobe`, for the page of the run.
#[path = "../../../../src/bin/gradprobe/failure.rs"]
#[allow(dead_code, reason = "of which it needs a part")]
mod failure;
mod fault;
mod model;
mod options;
#[path = "../../../../src/bin/gradprobe/report/mod.rs"]
#[allow(dead_code, reason = "of which it needs a part")]
mod report;
#[path = "../shared/root.rs"]
mod root;
#[path = "../../../../src/bin/gradprobe/run.rs"]
#[allow(dead_code, reason = "of which it needs a part")]
mod run;
mod summary;
mod table;
mod text;
mod training;
mod watch;
#[path = "../shared/weights.rs"]
mod weights;

use candle_core::Device;
use clap::Parser;
use options::Options;
use std::{
    error::Error,
    io::{self, ErrorKind, Write},
    process::ExitCode,
};

/// What any part of it may fail with: of the model, the probe, or a file.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if error.use_stderr() => {
            complain(&options::first_sentence(&error));
            return ExitCode::from(2);
        }
        Err(help) => {
            let _ = write!(io::stdout(), "{}", help.render());
            return ExitCode::SUCCESS;
        }
    };
    match device().and_then(|device| training::run(&options, &device)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if reader_left(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// The first GPU when built for one, else the CPU.
#[cfg(not(feature = "cuda"))]
fn device() -> Result<Device> {
    Ok(Device::Cpu)
}

/// The first GPU when built for one, else the CPU.
#[cfg(feature = "cuda")]
fn device() -> Result<Device> {
    // Says what is missing where candle would panic.
    gradprobe::cuda::stream(0)?;
    Ok(Device::new_cuda(0)?)
}

/// Whether whoever reads the table has closed the pipe, which is no failure.
fn reader_left(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// Prints a message as one line.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "{}", message.replace('\n', " "));
}
