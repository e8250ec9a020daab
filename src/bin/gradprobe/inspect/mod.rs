//! Inspects gradients in files.
//!
//! All files are checked before the first is measured. Then each is measured, clipped on request, diagnosed and
//! reported. At last come the results over all of them.

mod copies;
mod json;
mod options;
mod selection;
mod weights;

use crate::{
    device::Open,
    files::{Failure, LeftOut, Lent, Progress, TensorFile, rate},
    terminal::{one_line, print},
};
use copies::Copies;
use gradprobe::{
    Error, Finding, HostTensor, Tensor, Verdict,
    gsnr::GsnrConfig,
    health::{self, Health},
};
pub use options::Options;
use selection::{Selection, Shown};
use std::{
    path::{Path, PathBuf},
    time::Instant,
};
use weights::Weights;

/// Inspects the files, on probes made by `open_probe`. Gives the verdict if the options say that the run fails on it.
pub fn run(options: &Options, open_probe: Open<'_>) -> Result<Option<Verdict>, Failure> {
    let files = &options.files;
    if options.selection.needs_weights() && options.params.is_none() {
        return Err(Failure::Mismatch("--sort ratio needs the weights: give them by --params".to_owned()));
    }
    let open = |file: &Path| TensorFile::open(file, |_| true, options.others());
    let first = open(&files[0])?;
    let mut inputs: Vec<PathBuf> = first.files().map(Path::to_owned).collect();
    for file in &files[1..] {
        let step = open(file)?;
        step.require_same(&first)?;
        inputs.extend(step.files().map(Path::to_owned));
        require_sources(options, &step)?;
    }
    require_sources(options, &first)?;
    let weights = options.params.as_ref().map(|path| Weights::open(path, &files[0], &first.entries)).transpose()?;
    let of_weights: Vec<PathBuf> = weights.iter().flat_map(Weights::files).collect();
    let plan = first.plan()?;
    options.selection.check(&plan, &files[0])?;
    let before = usize::from(weights.is_some());
    let mut progress = Progress::new(files.len() + before);
    // First, so that weights and gradients need not be in memory together.
    let norms = weights.map(|weights| weights.norms(open_probe, |path| progress.reading(0, path))).transpose()?;

    let bytes = plan.bytes();
    // The plan is sorted by name, which is no order of a model.
    let mut health = Health::new(&plan, options.rules())?.backward_order(health::backward_order(&plan))?;
    let mut config = options.config();
    if files.len() > 1 {
        config = config.tracking(GsnrConfig::new());
    }
    let elements: u64 = plan.tensors().iter().map(|tensor| tensor.len).sum();
    let mut probe = open_probe(plan, config).map_err(|error| match error {
        Error::TooLargeToTrack { .. } => Failure::Tracking(error),
        // The state of each element, 4 bytes in each of two places, is nearly all the memory of a probe.
        Error::OutOfMemory { .. } if files.len() > 1 => Failure::Tracking(Error::OutOfMemory { bytes: 4 * elements }),
        other => Failure::Probe(other),
    })?;
    let copies = options.out.as_deref();
    let copies = copies.map(|directory| Copies::prepare(directory, &inputs, &of_weights, options.force)).transpose()?;

    let mut steps = Vec::new();
    let mut findings: Vec<Finding> = Vec::new();
    let mut shown = Shown::default();
    for (index, file) in files.iter().enumerate() {
        // Opened and compared again: the run may be long, and the file may have changed.
        let step = open(file)?;
        step.require_same(&first)?;
        let failed = |error: Error| Failure::file(file, error);
        let began = Instant::now();
        let tensors = step.lend(|path| progress.reading(index + before, path))?;
        let views: Vec<HostTensor> = tensors.iter().map(Lent::view).collect();
        let views: Vec<&dyn Tensor> = views.iter().map(|view| view as _).collect();
        probe.set_step(index as u64)?;
        let mut report = probe.measure(&views).and_then(|()| probe.wait()).map_err(failed)?;
        let time = began.elapsed();
        if let Some(norms) = &norms {
            report = report.with_param_norms(norms).map_err(failed)?;
        }
        if let Some(copies) = &copies {
            drop(tensors);
            copies.write(&step, &mut probe)?;
        }
        let diagnosis = health.diagnose(&report)?;
        // A finding that goes on from step to step is reported once.
        let is_new = |found: &&Finding| !findings.iter().any(|earlier| found.is_of_same_cause(earlier));
        findings.extend(diagnosis.findings().iter().filter(is_new).cloned().collect::<Vec<_>>());
        shown = options.selection.of(&report, diagnosis.verdicts(), options.json);
        if options.json {
            steps.push(json::step(&step, &report, &shown.tensors, copies.is_some()));
            continue;
        }
        progress.clear();
        let gap = if index > 0 { "\n" } else { "" };
        let name = one_line(&file.display().to_string());
        let heading = options.selection.heading(&report, &shown)?;
        let is_worth_a_look = diagnosis.verdict() != Verdict::Healthy || !diagnosis.undecided().is_empty();
        let diagnosis = if is_worth_a_look { diagnosis.to_string() } else { String::new() };
        let (table, left_out, rate) = (report.table_of(&shown.tensors), left_out(&step.left_out), rate(bytes, time));
        let printed =
            print(&format!("{gap}{name}\n{heading}{table}{left_out}{rate} on {}\n{diagnosis}", probe.device()));
        match printed {
            // A closed output of the tables does not stop the copies.
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
        let report = json::report(probe.device(), steps, (gsnr.as_ref(), &shown.tensors), &findings, verdict);
        print(&format!("{report}\n"))?;
    } else {
        let table = |gsnr: &gradprobe::gsnr::GsnrReport| {
            format!("\nsignal and noise across {} steps\n{}", files.len(), gsnr.table_of(&shown.tensors))
        };
        let across = gsnr.as_ref().map_or_else(String::new, table);
        print(&format!("{across}{}verdict: {verdict}\n", health::table(&of_all)))?;
    }
    Ok(options.fail_on.filter(|limit| limit.is_met_by(verdict)).map(|_| verdict))
}

/// Fails for files that cannot be copied, if copies are requested.
fn require_sources(options: &Options, step: &TensorFile) -> Result<(), Failure> {
    let parts = if options.out.is_some() { step.parts.len() } else { 0 };
    (0..parts).try_for_each(|part| step.source(part).map(drop))
}

/// Tensors that are not measured, in one line.
fn left_out(tensors: &[LeftOut]) -> String {
    if tensors.is_empty() {
        return String::new();
    }
    let names: Vec<String> = tensors.iter().map(|tensor| format!("{} ({})", tensor.name, tensor.dtype)).collect();
    format!("left out: {}\n", one_line(&names.join(", ")))
}
