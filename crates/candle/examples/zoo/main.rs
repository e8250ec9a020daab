//! Trains small models, healthy ones and ones with a single fault, and writes the gradients of six steps of each, for the tests
//! of the diagnosis. The files of `tests/zoo` in the repository were made so, in its root:
//!
//! `cargo run --release -p gradprobe-candle --example zoo -- tests/zoo`
//!
//! A run counts by how its training went and by nothing that gradprobe says of it: gradprobe has no part in this program. A
//! healthy run must have learned, and ended about where the same training with another seed did. A faulty one must have ended
//! worse than both. The table that is printed says how each went; if a single run is not what it is called, that is an error,
//! and nothing is written. It takes about a minute. The same machine makes the same bytes, however many threads it has; another
//! one may add in another order.

mod architecture;
mod cases;
mod convolution;
mod data;
mod deep;
mod evidence;
mod fault;
mod lora;
mod mlp;
mod output;
mod recurrent;
mod table;
mod text;
mod training;
mod transformer;

#[path = "../shared/block.rs"]
mod block;
#[path = "../shared/root.rs"]
mod root;
#[path = "../shared/weights.rs"]
mod weights;

use clap::Parser;
use evidence::Twins;
use std::{
    error::Error,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

/// What any part of it may fail with: of candle, or a file.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Trains small models of known health and writes their gradients.
#[derive(Parser)]
#[command(name = "zoo")]
struct Options {
    /// Where cases.json and a file for each run are written
    folder: PathBuf,
}

fn main() -> ExitCode {
    match zoo(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn zoo(options: &Options) -> Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{:<28} {:<20} evidence", "run", "label")?;
    let cases = cases::all();
    let mut twins = Twins::new(&cases);
    let (mut done, mut wrong) = (Vec::new(), Vec::new());
    for case in cases {
        let (evidence, window) = twins.examine(&case)?;
        let mark = if evidence.accepted { "" } else { " – NOT WHAT IT IS CALLED" };
        writeln!(stdout, "{:<28} {:<20} {}{mark}", case.name, case.label(), evidence.text)?;
        stdout.flush()?;
        if !evidence.accepted {
            wrong.push(case.name);
        }
        done.push((case, evidence, window));
    }
    if !wrong.is_empty() {
        return Err(format!("{} did not go as they should have", wrong.join(", ")).into());
    }
    output::write(&options.folder, &done)
}
