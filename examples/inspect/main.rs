//! Inspects gradients in safetensors files: `cargo run --release --example inspect -- FILE.safetensors...`
//!
//! Every file holds the gradients of one step. All are checked before the first is measured; then each is read,
//! measured, clipped if that was asked for, diagnosed and reported; at last, what they say together. Exit code 2 for a
//! command line that cannot be understood, 1 for every other failure, with one line on standard error. What is wrong with
//! the gradients is no failure.

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
mod tensor_file;
mod units;
mod weights;

use clap::Parser;
use copies::Copies;
use elements::Elements;
use failure::Failure;
use gradients::Gradients;
use gradprobe::{
    Error, Finding, HostTensor, HostTensorMut, Tensor, TensorMut, Verdict,
    gsnr::GsnrConfig,
    health::{self, Health},
};
use options::Options;
use progress::Progress;
use std::{
    io::{self, Write},
    process::ExitCode,
    time::Instant,
};
use weights::Weights;

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
    let params = options.params.as_ref();
    let weights = params.map(|path| Weights::open(path, &files[0], &first.tensors.entries)).transpose()?;
    let mut progress = Progress::new(files.len() + usize::from(params.is_some()));
    // First, so that weights and gradients need not be in memory together.
    let norms = weights.map(|weights| weights.norms(options.device, |path| progress.reading(0, path))).transpose()?;

    let plan = first.tensors.plan()?;
    let bytes = plan.bytes();
    // The plan is sorted by name, which is no order of a model.
    let mut health = Health::new(&plan, options.rules())?.backward_order(health::backward_order(&plan))?;
    let mut config = options.config();
    if files.len() > 1 {
        config = config.tracking(GsnrConfig::new());
    }
    let elements: u64 = plan.tensors().iter().map(|tensor| tensor.len).sum();
    let mut probe = device::open(options.device, plan, config).map_err(|error| match error {
        Error::TooLargeToTrack { .. } => Failure::Tracking(error),
        // What is kept of each element, 4 bytes in each of two places, is nearly all that a probe takes.
        Error::OutOfMemory { .. } if files.len() > 1 => Failure::Tracking(Error::OutOfMemory { bytes: 4 * elements }),
        other => Failure::Probe(other),
    })?;
    let mut tensors = first.tensors.room()?;
    let copies = options.out.as_deref().map(|directory| Copies::prepare(directory, files, params)).transpose()?;

    let mut steps = Vec::new();
    let mut findings: Vec<Finding> = Vec::new();
    for (index, file) in files.iter().enumerate() {
        // Opened and compared again: the run may be long, and the file another one by now.
        let mut step = Gradients::open(file)?;
        step.require_same(&first)?;
        step.tensors.read(&mut tensors, |path| progress.reading(index + usize::from(params.is_some()), path))?;
        let failed = |error: Error| Failure::file(file, error);
        let views: Vec<HostTensor> = tensors.iter().map(Elements::view).collect();
        let views: Vec<&dyn Tensor> = views.iter().map(|view| view as _).collect();
        let began = Instant::now();
        let mut report = probe.measure(&views).and_then(|()| probe.wait()).map_err(failed)?;
        let time = began.elapsed();
        if let Some(norms) = &norms {
            report = report.with_param_norms(norms).map_err(failed)?;
        }
        if let Some(copies) = &copies {
            let mut views: Vec<HostTensorMut> = tensors.iter_mut().map(Elements::view_mut).collect();
            let mut views: Vec<&mut dyn TensorMut> = views.iter_mut().map(|view| view as _).collect();
            probe.clip(&mut views).map_err(failed)?;
            copies.write(file, &step, &tensors)?;
        }
        let diagnosis = health.diagnose(&report)?;
        // What goes on from step to step is told once.
        let is_new = |found: &&Finding| !findings.iter().any(|earlier| found.is_of_same_cause(earlier));
        findings.extend(diagnosis.findings().iter().filter(is_new).cloned().collect::<Vec<_>>());
        if options.json {
            steps.push(json::step(file, &report, copies.is_some()));
            continue;
        }
        progress.clear();
        let gap = if index > 0 { "\n" } else { "" };
        let name = one_line(&file.display().to_string());
        let is_worth_a_look = diagnosis.verdict() != Verdict::Healthy || !diagnosis.undecided().is_empty();
        let diagnosis = if is_worth_a_look { diagnosis.to_string() } else { String::new() };
        let rate = units::rate(bytes, time);
        let printed = print(&format!("{gap}{name}\n{report}{rate} on {}\n{diagnosis}", probe.device()));
        match printed {
            // Whoever stopped reading the tables still wants the copies.
            Err(failure) if failure.reader_left() && copies.is_some() => {}
            other => other?,
        }
    }
    progress.clear();
    let gsnr = if files.len() > 1 { Some(probe.gsnr()?.report()?) } else { None };
    let of_all = gsnr.as_ref().map_or_else(|| Ok(Vec::new()), |gsnr| health.diagnose_gsnr(gsnr))?;
    let verdict = findings.iter().chain(&of_all).map(|finding| finding.severity).max().unwrap_or_default();
    if options.json {
        findings.extend(of_all);
        return print(&format!("{}\n", json::report(probe.device(), steps, gsnr.as_ref(), &findings, verdict)));
    }
    let across =
        gsnr.map_or_else(String::new, |gsnr| format!("\nsignal and noise across {} steps\n{gsnr}", files.len()));
    print(&format!("{across}{}verdict: {verdict}\n", health::table(&of_all)))
}

fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}
