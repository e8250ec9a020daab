//! The output of the program: on standard output, and in one line on standard error where it fails.

use crate::files::Failure;
use clap::Parser;
use gradprobe::Verdict;
use std::{
    io::{self, Write},
    process::ExitCode,
};

/// Reads the command line and calls `run`, which gives the verdict if that is to be the exit code. Exits with code 2
/// for an invalid command line, 1 for every other failure, 3 for a verdict.
pub fn run<O: Parser>(run: impl FnOnce(&mut O) -> Result<Option<Verdict>, Failure>) -> ExitCode {
    let mut options = match O::try_parse() {
        Ok(options) => options,
        Err(error) if error.use_stderr() => {
            complain(&first_sentence(&error));
            return ExitCode::from(2);
        }
        Err(help) => {
            let _ = write!(io::stdout(), "{}", help.render());
            return ExitCode::SUCCESS;
        }
    };
    match run(&mut options) {
        Ok(Some(_)) => ExitCode::from(3),
        Err(failure) if !failure.reader_left() => {
            complain(&format!("error: {failure}"));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Writes to standard output.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Escapes control characters.
pub fn one_line(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// Prints a message as one line, with any names in it.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "{}", one_line(message));
}

/// Gives the error of a command line, without the usage and the advice that follow it over several lines.
fn first_sentence(error: &clap::Error) -> String {
    let advice = |line: &str| ["tip:", "Usage:", "For more information"].iter().any(|word| line.starts_with(word));
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !advice(line)).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}
