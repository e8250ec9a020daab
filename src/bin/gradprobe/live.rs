//! `gradprobe live`: a run in the terminal, as its file grows.

use crate::{
    failure::Failure,
    run::{Finding, Number, Run, Step, Tensor},
};
use clap::Args;
use gradprobe::{
    Record,
    write::live::{View, ViewFinding, ViewStep, ViewTensor, follow},
};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// Show a run in the terminal while it is written: norms, the tensors, the worst first, and findings
///
/// Arrow and page keys move the list of tensors, q ends.
#[derive(Debug, Args)]
pub struct Options {
    /// A folder with steps.jsonl, or such a file
    run: PathBuf,
}

/// The longest wait of a key while the program catches up with a long file.
const PATIENCE: Duration = Duration::from_millis(50);

/// Follows the run until the user quits.
pub fn run(options: &Options) -> Result<(), Failure> {
    let mut run = Run::open(&options.run)?;
    follow(View::default(), |view| {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let Some(step) = run.next()? else { break };
            view.show(shown(step));
        }
        Ok(())
    })
}

fn shown(step: Step<'_>) -> ViewStep {
    ViewStep {
        step: step.step,
        verdict: step.verdict,
        total_norm: norm(step.total_norm),
        clip_coefficient: step.clip_coefficient.map(|Number(coefficient)| coefficient),
        skip: step.skip,
        tensors: step.tensors.unwrap_or_default().into_iter().map(shown_tensor).collect(),
        findings: step.findings.unwrap_or_default().into_iter().map(shown_finding).collect(),
    }
}

/// A missing norm is drawn as NaN.
fn norm(norm: Option<Number>) -> f64 {
    norm.map_or(f64::NAN, |Number(norm)| norm)
}

fn shown_tensor(tensor: Tensor<'_>) -> ViewTensor {
    let record = Record {
        count: tensor.count,
        nan_count: tensor.nan_count,
        inf_count: tensor.inf_count,
        zero_count: tensor.zero_count,
        dead_count: tensor.dead_count,
        first_nonfinite_index: tensor.first_nonfinite.unwrap_or(Record::NONE),
        ..Record::EMPTY
    };
    ViewTensor {
        verdict: tensor.verdict,
        norm: norm(tensor.l2_norm),
        dead_fraction: record.dead_fraction(),
        remarks: if tensor.absent { "no gradient".to_owned() } else { record.remarks() },
        name: tensor.name.into_owned(),
    }
}

fn shown_finding(finding: Finding) -> ViewFinding {
    ViewFinding {
        severity: finding.severity,
        kind: finding.kind,
        tensor: finding.tensor,
        others: finding.others.len(),
        message: finding.message,
        advice: finding.advice,
    }
}
