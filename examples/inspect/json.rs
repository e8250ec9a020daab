//! The report for machines.

use gradprobe::{Report, TensorReport};
use serde_json::{Map, Number, Value, json};
use std::path::Path;

/// The whole report. What is null here is not computed by this version.
pub fn report(device: &str, steps: Vec<Value>) -> Value {
    json!({ "device": device, "steps": steps, "noise_scale": null, "findings": null, "verdict": null })
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

fn tensor(TensorReport { name, dtype, record }: TensorReport<'_>) -> Value {
    json!({
        "name": name,
        "dtype": dtype.name(),
        "count": record.count,
        "nan_count": record.nan_count,
        "inf_count": record.inf_count,
        "zero_count": record.zero_count,
        "dead_count": record.dead_count,
        "l2_norm": number(record.l2_norm()),
        "finite_l2_norm": number(record.finite_l2_norm()),
        "max_abs": record.max_abs().map(|x| number(x.into())),
        "min_nonzero_abs": record.min_nonzero_abs().map(|x| number(x.into())),
        "mean": record.mean().map(number),
        "mean_abs": record.mean_abs().map(number),
        "variance": record.variance().map(number),
        "first_nonfinite": record.first_nonfinite(),
    })
}

/// A number with all its bits; the ones JSON cannot hold are strings.
fn number(x: f64) -> Value {
    Number::from_f64(x).map_or_else(|| if x.is_nan() { "nan".into() } else { x.to_string().into() }, Value::Number)
}
