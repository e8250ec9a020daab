//! The report for machines: the objects of `gradprobe::write`, in the shape of the inspector's contract.

use crate::files::TensorFile;
use gradprobe::{
    Finding, Report, Verdict,
    gsnr::GsnrReport,
    write::{json_gsnr, json_number, json_tensor},
};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Makes the whole report; of the tensors `shown`, with `gsnr` when there is more than one step.
pub fn report(
    device: &str,
    steps: Vec<Value>,
    (gsnr, shown): (Option<&GsnrReport>, &[usize]),
    findings: &[Finding],
    verdict: Verdict,
) -> Value {
    let mut report = Map::new();
    report.insert("device".to_owned(), device.into());
    report.insert("steps".to_owned(), steps.into());
    if let Some(gsnr) = gsnr {
        let all: Vec<_> = gsnr.tensors().collect();
        let tensors = shown.iter().map(|&index| value(json_gsnr(all[index].0, all[index].1)));
        report.insert("gsnr".to_owned(), tensors.collect());
    }
    report.insert("noise_scale".to_owned(), optional(gsnr.and_then(GsnrReport::noise_scale)));
    report.insert("findings".to_owned(), findings.iter().map(finding).collect());
    report.insert("verdict".to_owned(), verdict.name().into());
    report.into()
}

/// Makes one finding. Its step is the place in `steps`, from 0, of the file in which it began; for a finding on all
/// steps together, the last. The message has the number of further tensors.
fn finding(finding: &Finding) -> Value {
    let message = match finding.others.len() {
        0 => finding.message.clone(),
        others => format!("{}; and {others} more", finding.message),
    };
    json!({
        "severity": finding.severity.name(),
        "kind": finding.kind.name(),
        "step": finding.since,
        "tensor": finding.tensor,
        "value": number(finding.value),
        "threshold": number(finding.threshold),
        "message": message,
        "advice": finding.advice,
    })
}

/// Makes one step, with the tensors `shown`.
pub fn step(file: &TensorFile, report: &Report, shown: &[usize], clipped: bool) -> Value {
    let outputs = report.outputs();
    let mut step = Map::new();
    step.insert("file".to_owned(), file.path.to_string_lossy().into());
    step.insert("total_norm".to_owned(), number(outputs.total_norm));
    step.insert("finite_total_norm".to_owned(), number(outputs.finite_total_norm));
    if clipped {
        step.insert("clip_coefficient".to_owned(), number(outputs.coefficient_f64));
    }
    let all: Vec<_> = report.tensors().collect();
    step.insert("tensors".to_owned(), shown.iter().map(|&index| value(json_tensor(&all[index]))).collect());
    if !file.left_out.is_empty() {
        let left_out = file.left_out.iter().map(|tensor| json!({"name": tensor.name, "dtype": tensor.dtype}));
        step.insert("left_out".to_owned(), left_out.collect());
    }
    step.into()
}

fn optional(x: Option<f64>) -> Value {
    x.map_or(Value::Null, number)
}

fn number(x: f64) -> Value {
    value(json_number(x))
}

fn value(of: impl Serialize) -> Value {
    serde_json::to_value(of).expect("strings, numbers and lists of them")
}
