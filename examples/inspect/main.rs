//! Inspects gradients in safetensors files: `cargo run --release --example inspect -- FILE.safetensors...`
//!
//! Every file holds the gradients of one step. All are checked before the first is measured; then each is read,
//! measured, clipped if that was asked for, and reported. Exit code 2 for a command line that cannot be understood, 1
//! for every other failure, with one line on standard error.

mod copies;
mod device;
mod elements;
mod failure;
mod gradients;
mod header;
mod json;
mod natural;
mod options;
mod progress;
mod units;

use clap::Parser;
use copies::Copies;
use elements::Elements;
use failure::Failure;
use gradients::Gradients;
use gradprobe::{HostTensor, HostTensorMut, Plan};
use header::Entry;
use options::Options;
use progress::Progress;
use std::{
    io::{self, Write},
    process::ExitCode,
    time::Instant,
};

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
    match run(&options) {
        Err(failure) if !failure.reader_left() => {
            complain(&format!("error: {failure}"));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Prints a message as one line, whatever names are in it.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "{}", one_line(message));
}

/// With control characters escaped.
fn one_line(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

fn run(options: &Options) -> Result<(), Failure> {
    let files = &options.files;
    let first = Gradients::open(&files[0])?;
    for file in &files[1..] {
        Gradients::open(file)?.require_same(&first)?;
    }
    let entries = first.entries();
    let plan = Plan::new(entries.iter().map(|t| (t.name.as_str(), t.dtype, t.len)));
    let plan = plan.map_err(|error| Failure::file(&files[0], error))?;
    let bytes = plan.bytes();
    let mut probe = device::open(options.device, plan, options.config())?;
    let zeros = |t: &Entry| Elements::zeros(t.dtype, t.len).map_err(|error| Failure::tensor(&files[0], &t.name, error));
    let mut tensors = entries.iter().map(zeros).collect::<Result<Vec<Elements>, _>>()?;
    let copies = options.out.as_deref().map(|directory| Copies::prepare(directory, files)).transpose()?;

    let mut progress = Progress::new();
    let mut steps = Vec::new();
    for (index, file) in files.iter().enumerate() {
        // Opened and compared again: the run may be long, and the file another one by now.
        let mut step = Gradients::open(file)?;
        step.require_same(&first)?;
        step.read(&mut tensors, || progress.reading(index, files.len(), file))?;
        let failed = |error: gradprobe::Error| Failure::file(file, error);
        let views: Vec<HostTensor> = tensors.iter().map(Elements::view).collect();
        let began = Instant::now();
        let report = probe.measure_host(&views).map_err(failed)?;
        let time = began.elapsed();
        if let Some(copies) = &copies {
            let mut views: Vec<HostTensorMut> = tensors.iter_mut().map(Elements::view_mut).collect();
            probe.clip_host(&mut views).map_err(failed)?;
            copies.write(file, &step, &tensors)?;
        }
        if options.json {
            steps.push(json::step(file, &report, copies.is_some()));
            continue;
        }
        progress.clear();
        let gap = if index > 0 { "\n" } else { "" };
        let name = one_line(&file.display().to_string());
        let printed = print(&format!("{gap}{name}\n{report}{} on {}\n", units::rate(bytes, time), probe.name()));
        match printed {
            // Whoever stopped reading the tables still wants the copies.
            Err(failure) if failure.reader_left() && copies.is_some() => {}
            other => other?,
        }
    }
    progress.clear();
    if options.json { print(&format!("{}\n", json::report(probe.name(), steps))) } else { Ok(()) }
}

fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}
