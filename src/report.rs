//! The numbers of one step, read back to the host.

use crate::{DType, Error, Plan, Record, StepOutputs};
use std::{fmt, sync::Arc};

/// The statistics of one step. `Display` prints a table.
#[derive(Clone, Debug)]
pub struct Report {
    plan: Arc<Plan>,
    outputs: StepOutputs,
    records: Vec<Record>,
    /// Of the weights, one a tensor, when they were given.
    param_norms: Option<Vec<f64>>,
}

/// One tensor of a report.
#[derive(Clone, Copy, Debug)]
pub struct TensorReport<'a> {
    /// Its name in the plan.
    pub name: &'a str,
    /// Type of its elements.
    pub dtype: DType,
    /// Its statistics.
    pub record: &'a Record,
    /// L2 norm of the weight whose gradient it is, if that was given.
    pub param_norm: Option<f64>,
}

impl Report {
    pub(crate) fn new(plan: Arc<Plan>, outputs: StepOutputs, records: Vec<Record>) -> Self {
        debug_assert_eq!(plan.tensors().len(), records.len());
        Self { plan, outputs, records, param_norms: None }
    }

    /// With the L2 norms of the weights whose gradients these are, in the plan's order.
    ///
    /// # Errors
    /// [`Error::TensorCount`] when there are not as many as tensors.
    pub fn with_param_norms(self, norms: &[f64]) -> Result<Self, Error> {
        let (planned, given) = (self.records.len(), norms.len());
        if planned != given {
            return Err(Error::TensorCount { planned, given });
        }
        Ok(Self { param_norms: Some(norms.to_vec()), ..self })
    }

    /// What was measured.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Which measurement of its probe this is, from 1.
    pub fn step(&self) -> u64 {
        self.outputs.step
    }

    /// The step's scalars: norms, coefficient, flags.
    pub fn outputs(&self) -> &StepOutputs {
        &self.outputs
    }

    /// One record a tensor, in the plan's order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The tensors, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorReport<'_>> {
        self.plan.tensors().iter().zip(&self.records).enumerate().map(|(index, (spec, record))| TensorReport {
            name: &spec.name,
            dtype: spec.dtype,
            record,
            param_norm: self.param_norms.as_ref().map(|norms| norms[index]),
        })
    }
}

impl TensorReport<'_> {
    /// Norm of the gradient over that of its weight; `None` when that is not known, or 0.
    pub fn ratio(&self) -> Option<f64> {
        self.param_norm.filter(|&norm| norm != 0.0).map(|norm| self.record.l2_norm() / norm)
    }

    /// What a reader should look at first, in a few words; empty when nothing stands out. Facts, not a diagnosis:
    /// non-finite elements and where they begin, a tensor that is all zero, and a dead share of at least a tenth.
    pub fn remarks(&self) -> String {
        let record = self.record;
        let mut remarks = Vec::new();
        for (count, what) in [(record.nan_count, "NaN"), (record.inf_count, "Inf")] {
            if count > 0 {
                remarks.push(format!("{count} {what}"));
            }
        }
        if let Some(index) = record.first_nonfinite() {
            remarks.push(format!("first at {index}"));
        }
        if record.finite_count() > 0 && record.zero_count == record.finite_count() {
            remarks.push("all zero".to_owned());
        } else if let Some(dead) = record.dead_fraction().filter(|&dead| dead >= 0.1) {
            remarks.push(format!("{:.0} % dead", 100.0 * dead));
        }
        remarks.join(", ")
    }
}

/// A name as one line of printable characters, however odd the original.
pub(crate) fn printable(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.tensors().map(|t| printable(t.name)).collect();
        let width = names.iter().map(|n| n.chars().count()).max().unwrap_or(0).max("tensor".len());
        let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |x| format!("{x:.3e}"));
        // Two columns that are there when the weights are known.
        let beside_weights = |norm: &str, ratio: &str| {
            if self.param_norms.is_some() { format!(" {norm:>10} {ratio:>10}") } else { String::new() }
        };
        writeln!(
            f,
            "{:width$} {:>5} {:>12} {:>10}{} {:>10} {:>10} {:>11} {:>10} {:>7} {:>7}",
            "tensor",
            "dtype",
            "elements",
            "l2 norm",
            beside_weights("param norm", "ratio"),
            "max |x|",
            "min≠0 |x|",
            "mean",
            "std",
            "zero %",
            "dead %"
        )?;
        for (tensor, name) in self.tensors().zip(&names) {
            let record = tensor.record;
            let percent =
                |fraction: Option<f64>| fraction.map_or_else(|| "–".to_owned(), |x| format!("{:.2}", 100.0 * x));
            let remarks = tensor.remarks();
            writeln!(
                f,
                "{name:width$} {:>5} {:>12} {:>10}{} {:>10} {:>10} {:>11} {:>10} {:>7} {:>7}{}{remarks}",
                tensor.dtype,
                record.count,
                number(Some(record.l2_norm())),
                beside_weights(&number(tensor.param_norm), &number(tensor.ratio())),
                number(record.max_abs().map(f64::from)),
                number(record.min_nonzero_abs().map(f64::from)),
                number(record.mean()),
                number(record.std()),
                percent(record.zero_fraction()),
                percent(record.dead_fraction()),
                if remarks.is_empty() { "" } else { "  ◄ " },
            )?;
        }
        let outputs = &self.outputs;
        write!(f, "step {}: total norm {:.6e}", outputs.step, outputs.total_norm)?;
        if !outputs.total_norm.is_finite() {
            write!(
                f,
                " ({} NaN, {} Inf; finite part {:.6e})",
                outputs.nan_count, outputs.inf_count, outputs.finite_total_norm
            )?;
        }
        if outputs.coefficient != 1.0 {
            write!(f, ", clipped by {:.6e}", outputs.coefficient_f64)?;
        }
        if outputs.skip != 0 {
            write!(f, ", step to be skipped")?;
        }
        writeln!(f)
    }
}
