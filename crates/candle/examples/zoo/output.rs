//! The files.

use crate::{Result, architecture::Architecture, cases::Case, evidence::Evidence, fault::Fault, training::Window};
use candle_core::safetensors;
use serde_json::{Value, json};
use std::{fs, path::Path};

/// Writes cases.json and a file for each run.
pub fn write(folder: &Path, runs: &[(Case, Evidence, Window)]) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut cases = serde_json::Map::new();
    // By name, for a map may keep the order in which it got its entries, or sort them: that depends on what else is built.
    let mut runs: Vec<_> = runs.iter().collect();
    runs.sort_by_key(|(case, ..)| case.name);
    for (case, evidence, window) in runs {
        safetensors::save(window, folder.join(format!("{}.safetensors", case.name)))?;
        cases.insert(case.name.to_owned(), described(case, evidence));
    }
    let text = serde_json::to_string_pretty(&json!({ "cases": cases }))?;
    fs::write(folder.join("cases.json"), text + "\n")?;
    Ok(())
}

/// What cases.json says of a run, its words in alphabetical order.
fn described(case: &Case, evidence: &Evidence) -> Value {
    let plan = case.architecture.plan();
    let verdicts: &[&str] = match case.fault {
        Some(fault) => fault.verdicts(),
        // A tool that is not told the loss scale may well warn of the gradients' size.
        None if case.architecture == Architecture::MlpF16 => &["healthy", "warning"],
        None => &["healthy"],
    };
    json!({
        "architecture": plan.name,
        "evidence": evidence.text,
        "first_step": case.first_step,
        "kinds": case.fault.map_or(&[][..], Fault::kinds),
        "label": case.label(),
        "learning_rate": plan.learning_rate * case.fault.map_or(1.0, Fault::of_learning_rate),
        "note": case.note,
        "step": case.step,
        "tensors": if case.tensors.is_empty() { None } else { Some(case.tensors) },
        "verdicts": verdicts,
    })
}
