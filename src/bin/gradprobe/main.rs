//! The program `gradprobe`: shows a run on a page for the browser and in the terminal.
//!
//! Exit code 2 for a command line that cannot be understood, 1 for every other failure, with one line on standard error.

mod failure;
mod live;
mod report;
mod run;

use clap::Parser;
use std::{
    io::{self, Write},
    process::ExitCode,
};

/// Shows the gradients of a run that a trainer has written.
#[derive(Parser)]
#[command(version)]
enum Command {
    Report(report::Options),
    Live(live::Options),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Report(options) => report::run(&options),
        Command::Live(options) => live::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // A name may have line breaks.
            let line: String = failure.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            let _ = writeln!(io::stderr(), "error: {line}");
            ExitCode::FAILURE
        }
    }
}
