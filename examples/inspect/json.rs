//! The report for machines.

use gradprobe::{Finding, GsnrRecord, GsnrReport, Report, TensorReport, Verdict};
use serde_json::{Map, Number, Value, json};
use std::path::Path;

/// The whole report; `gsnr` when there is more than one step.
pub fn report(
    device: &str,
    steps: Vec<Value>,
    gsnr: Option<&GsnrReport>,
    findings: &[Finding],
    verdict: Verdict,
) -> Value {
    let mut report = Map::new();
    report.insert("device".to_owned(), device.into());
    report.insert("steps".to_owned(), steps.into());
    if let Some(gsnr) = gsnr {
        report.insert("gsnr".to_owned(), gsnr.tensors().map(|(name, record)| signal_and_noise(name, record)).collect());
    }
    report.insert("noise_scale".to_owned(), optional(gsnr.and_then(GsnrReport::noise_scale)));
    report.insert("findings".to_owned(), findings.iter().map(finding).collect());
    report.insert("verdict".to_owned(), verdict.name().into());
    report.into()
}

/// One finding. Its step is the place of the file in `steps`, from 0; what is known of all steps together has the last.
fn finding(finding: &Finding) -> Value {
    json!({
        "severity": finding.severity.name(),
        "kind": finding.kind.name(),
        "step": finding.step.saturating_sub(1),
        "tensor": finding.tensor,
        "value": number(finding.value),
        "threshold": number(finding.threshold),
        "message": finding.message,
        "advice": finding.advice,
    })
}

/// One step.
pub fn step(file: &Path, report: &Report, clipped: bool) -> Value {
    let outputs = report.outputs();
    let mut step = Map::new();
    step.insert("file".to_owned(), file.to_string_lossy().into());
    step.insert("total_norm".to_owned(), number(outputs.total_norm));
    step.insert("finite_total_norm".to_owned(), number(outputs.finite_total_norm));
    if clipped {
        step.insert("clip_coefficient".to_owned(), number(outputs.coefficient_f64));
    }
    step.insert("tensors".to_owned(), report.tensors().map(tensor).collect());
    step.into()
}

fn tensor(tensor: TensorReport<'_>) -> Value {
    let record = tensor.record;
    let mut value = json!({
        "name": tensor.name,
        "dtype": tensor.dtype.name(),
        "count": record.count,
        "nan_count": record.nan_count,
        "inf_count": record.inf_count,
        "zero_count": record.zero_count,
        "dead_count": record.dead_count,
        "l2_norm": number(record.l2_norm()),
        "finite_l2_norm": number(record.finite_l2_norm()),
        "max_abs": optional(record.max_abs().map(f64::from)),
        "min_nonzero_abs": optional(record.min_nonzero_abs().map(f64::from)),
        "mean": optional(record.mean()),
        "mean_abs": optional(record.mean_abs()),
        "variance": optional(record.variance()),
        "first_nonfinite": record.first_nonfinite(),
    });
    if let Some(norm) = tensor.param_norm {
        value["param_norm"] = number(norm);
        value["ratio"] = optional(tensor.ratio());
    }
    value
}

/// One tensor across the steps.
fn signal_and_noise(name: &str, record: &GsnrRecord) -> Value {
    // Of fewer than two steps, the sums say nothing.
    let sum = |sum: f64| optional((record.steps >= 2).then_some(sum));
    json!({
        "name": name,
        "steps": record.steps,
        "skipped": record.skipped,
        "defined": record.defined,
        "constant": record.constant,
        "mean": optional(record.mean()),
        "median": optional(record.median()),
        "fraction_below_one": optional(record.fraction_below_one()),
        "sum_variance": sum(record.sum_variance),
        "sum_squared_mean": sum(record.sum_squared_mean),
        "norm_cv": optional(record.norm_cv()),
    })
}

fn optional(x: Option<f64>) -> Value {
    x.map_or(Value::Null, number)
}

/// A number with all its bits; the ones JSON cannot hold are strings.
fn number(x: f64) -> Value {
    Number::from_f64(x).map_or_else(|| if x.is_nan() { "nan".into() } else { x.to_string().into() }, Value::Number)
}
