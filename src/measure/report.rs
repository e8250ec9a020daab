//! The report of one step, read back to the host.

use crate::{
    DType, Error, Plan, Record, StepOutputs,
    health::Diagnosis,
    optim::{Optimizer, UpdateRecord},
    ranks::RankCheck,
    statistics::{self, Value},
};
use std::{fmt, sync::Arc};

/// Holds the statistics of one step. `Display` prints a table.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe};
///
/// let plan = Plan::new([("weight", DType::F32, 2), ("bias", DType::F32, 1)])?;
/// let mut probe = Probe::new(Cpu, plan, Config::new())?;
/// probe.measure(&[&[3.0f32, 4.0], &[0.0f32]])?;
/// let report = probe.wait()?;
/// assert_eq!((report.step(), report.outputs().total_norm), (1, 5.0));
/// for tensor in report.tensors() {
///     println!("{}: {}", tensor.name, tensor.record.l2_norm());
/// }
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Report {
    plan: Plan,
    outputs: StepOutputs,
    records: Vec<Record>,
    /// Records of the weights, one a tensor, when they were measured.
    weights: Option<Vec<Record>>,
    /// Norms of the weights, when they are known from elsewhere.
    param_norms: Option<Vec<f64>>,
    /// Health words of the tensors, where the probe has rules.
    health_words: Option<Vec<u32>>,
    diagnosis: Option<Arc<Diagnosis>>,
    /// How far the step moved the weights, and by which optimizer.
    updates: Option<(Arc<Optimizer>, Vec<UpdateRecord>)>,
    ranks: Option<RankCheck>,
}

/// One tensor of a report.
#[derive(Clone, Copy, Debug)]
pub struct TensorReport<'a> {
    /// Its name in the plan.
    pub name: &'a str,
    /// Type of its elements.
    pub dtype: DType,
    /// Number of its elements in the plan.
    pub len: u64,
    /// Its statistics.
    pub record: &'a Record,
    /// The statistics of its weight, if the step measured the weights.
    pub weight: Option<&'a Record>,
    /// L2 norm of its weight, if that was measured or given. An optimizer that moves the weight measures it afterwards.
    pub param_norm: Option<f64>,
    /// How far the step has moved its weight, if it did.
    pub update: Option<&'a UpdateRecord>,
    /// Signal over noise of the gradients of all steps, from the moments of an AdamW that moved the weight.
    pub moments: Option<f64>,
}

impl Report {
    /// Makes a report. `weights` are the records of the weights, where the step measured them; `health_words` one a
    /// tensor, where the probe has rules.
    pub(crate) fn new(
        plan: Plan,
        outputs: StepOutputs,
        records: Vec<Record>,
        weights: Option<Vec<Record>>,
        health_words: Option<Vec<u32>>,
    ) -> Self {
        debug_assert_eq!(plan.tensors().len(), records.len());
        let (param_norms, diagnosis, updates, ranks) = (None, None, None, None);
        Self { plan, outputs, records, weights, param_norms, health_words, diagnosis, updates, ranks }
    }

    /// Adds how far an optimizer has moved the weights, one a tensor.
    pub(crate) fn with_updates(self, updates: Option<(Arc<Optimizer>, Vec<UpdateRecord>)>) -> Self {
        Self { updates, ..self }
    }

    /// Adds the comparison of the ranks.
    pub(crate) fn with_ranks(self, ranks: Option<RankCheck>) -> Self {
        Self { ranks, ..self }
    }

    /// The comparison of ranks, if there are [others](crate::ranks).
    pub fn rank_check(&self) -> Option<&RankCheck> {
        self.ranks.as_ref()
    }

    /// Adds the diagnosis.
    pub(crate) fn with_diagnosis(self, diagnosis: Option<Arc<Diagnosis>>) -> Self {
        Self { diagnosis, ..self }
    }

    /// Adds the L2 norms of the weights, in the plan's order, where they are known from elsewhere, such as a step that
    /// measured them.
    ///
    /// # Errors
    /// [`Error::TensorCount`] when there are not as many norms as tensors.
    pub fn with_param_norms(self, norms: &[f64]) -> Result<Self, Error> {
        self.plan.check_count(norms.len())?;
        Ok(Self { param_norms: Some(norms.to_vec()), ..self })
    }

    /// Gives the table that `Display` prints, of these tensors alone: places in the plan, in this order.
    ///
    /// # Panics
    /// When it is printed with a place that is not in the plan.
    pub fn table_of<'a>(&'a self, tensors: &'a [usize]) -> impl fmt::Display + 'a {
        Table(self, tensors)
    }

    /// The plan of the measured tensors.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The number of the step: its probe's count of measurements, from 1, or the number given by
    /// [`Probe::set_step`](crate::Probe::set_step).
    pub fn step(&self) -> u64 {
        self.outputs.step
    }

    /// The step's scalars: norms, coefficient, flags.
    pub fn outputs(&self) -> &StepOutputs {
        &self.outputs
    }

    /// Whether the optimizer should leave the step out: an element was not finite, under
    /// [`NonFinitePolicy::Skip`](crate::NonFinitePolicy::Skip), or the loss scale was not usable.
    pub fn skip(&self) -> bool {
        self.outputs.skip != 0
    }

    /// One record a tensor, in the plan's order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The diagnosis of the step, by the rules that its probe was declared with.
    pub fn diagnosis(&self) -> Option<&Diagnosis> {
        self.diagnosis.as_deref()
    }

    /// Names of the tensors that had no gradient, in the plan's order.
    pub fn absent(&self) -> impl Iterator<Item = &str> {
        self.tensors().filter(TensorReport::is_absent).map(|tensor| tensor.name)
    }

    /// The health word of each tensor, in the plan's order, if the probe has rules: the bits of
    /// [`StepOutputs::health`].
    pub fn health_words(&self) -> Option<&[u32]> {
        self.health_words.as_deref()
    }

    /// One record a weight, in the plan's order, if the step measured them.
    pub fn weights(&self) -> Option<&[Record]> {
        self.weights.as_deref()
    }

    /// How far the step has moved each weight, in the plan's order, if the probe has an optimizer. Before the update of
    /// this step, or if it is skipped, they have another step's number, or 0.
    pub fn updates(&self) -> Option<&[UpdateRecord]> {
        self.updates.as_ref().map(|(_, updates)| &updates[..])
    }

    /// The update of a tensor, if it is this step's.
    fn update(&self, index: usize) -> Option<&UpdateRecord> {
        self.updates().map(|updates| &updates[index]).filter(|update| update.count > 0 && update.step == self.step())
    }

    /// Whether the norms of the weights are known.
    fn has_param_norms(&self) -> bool {
        self.weights.is_some() || self.param_norms.is_some() || self.updates.is_some()
    }

    /// The norm of a weight before the step: given, or measured with the gradients.
    pub(crate) fn param_norm_before(&self, index: usize) -> Option<f64> {
        let given = self.param_norms.as_ref().map(|norms| norms[index]);
        given.or_else(|| self.weights.as_ref().map(|weights| weights[index].l2_norm()))
    }

    /// The same, or else the norm after the step.
    fn param_norm(&self, index: usize) -> Option<f64> {
        self.param_norm_before(index).or_else(|| self.update(index).map(UpdateRecord::weight_norm))
    }

    /// The tensors, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorReport<'_>> {
        self.plan.tensors().iter().zip(&self.records).enumerate().map(|(index, (spec, record))| TensorReport {
            name: &spec.name,
            dtype: spec.dtype,
            len: spec.len,
            record,
            weight: self.weights.as_ref().map(|weights| &weights[index]),
            param_norm: self.param_norm(index),
            update: self.update(index),
            moments: self.updates.as_ref().and_then(|(optimizer, _)| self.update(index)?.gsnr(optimizer)),
        })
    }
}

impl TensorReport<'_> {
    /// Whether it had no gradient in this step, on any rank. The record is then empty, though the tensor is not.
    pub fn is_absent(&self) -> bool {
        self.len > 0 && self.record.count == 0
    }

    /// Norm of the gradient over that of its weight; `None` when the latter is unknown or 0.
    pub fn ratio(&self) -> Option<f64> {
        self.param_norm.filter(|&norm| norm != 0.0).map(|norm| self.record.l2_norm() / norm)
    }

    /// Cosine of update and gradient: [`UpdateRecord::cosine`].
    pub fn update_cosine(&self) -> Option<f64> {
        self.update.and_then(|update| update.cosine(self.record.finite_l2_norm()))
    }

    /// Says in a few words where to look first: that it has no gradient, or [`Record::remarks`].
    pub fn remarks(&self) -> String {
        if self.is_absent() { "no gradient".to_owned() } else { self.record.remarks() }
    }
}

/// Gives a name as one line of printable characters.
pub(crate) fn printable(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// The width of a column of such names under its heading, up to the most a format takes. A longer name is printed in
/// full.
pub(crate) fn width_of<N: AsRef<str>>(names: impl IntoIterator<Item = N>, heading: &str) -> usize {
    let longest = names.into_iter().map(|name| name.as_ref().chars().count()).max().unwrap_or(0);
    longest.max(heading.chars().count()).min(u16::MAX.into())
}

/// Columns behind a tensor's name and type: the statistic, the heading and the width.
const COLUMNS: [(&str, &str, usize); 11] = [
    ("count", "elements", 12),
    ("l2_norm", "l2 norm", 10),
    ("param_norm", "param norm", 10),
    ("ratio", "ratio", 10),
    ("update_ratio", "update", 10),
    ("max_abs", "max |x|", 10),
    ("min_nonzero_abs", "min≠0 |x|", 10),
    ("mean", "mean", 11),
    ("std", "std", 10),
    ("zero_fraction", "zero %", 7),
    ("dead_fraction", "dead %", 7),
];

/// A statistic of a tensor, with a share in percent.
fn cell(name: &str, tensor: TensorReport<'_>) -> String {
    let statistic = statistics::of_tensor(name);
    let value = (statistic.of)(&tensor.into());
    match (value, value.and_then(Value::as_f64)) {
        (Some(Value::Whole(Some(whole))), _) => whole.to_string(),
        (_, Some(share)) if statistic.unit == statistics::SHARE => format!("{:.2}", 100.0 * share),
        (_, Some(number)) => format!("{number:.3e}"),
        (_, None) => "–".to_owned(),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.table_of(&(0..self.records.len()).collect::<Vec<_>>()).fmt(f)
    }
}

/// A table of these tensors.
struct Table<'a>(&'a Report, &'a [usize]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(report, tensors) = *self;
        let all: Vec<TensorReport<'_>> = report.tensors().collect();
        let names: Vec<String> = tensors.iter().map(|&index| printable(all[index].name)).collect();
        let width = width_of(&names, "tensor");
        let of_weights = |name| ["param_norm", "ratio"].contains(&name);
        let columns = || {
            let known = |name| match name {
                "update_ratio" => report.updates.is_some(),
                name => report.has_param_norms() || !of_weights(name),
            };
            COLUMNS.into_iter().filter(move |&(name, ..)| known(name))
        };
        write!(f, "{:width$} {:>5}", "tensor", "dtype")?;
        columns().try_for_each(|(_, heading, width)| write!(f, " {heading:>width$}"))?;
        writeln!(f)?;
        for (tensor, name) in tensors.iter().map(|&index| all[index]).zip(&names) {
            write!(f, "{name:width$} {:>5}", tensor.dtype)?;
            columns().try_for_each(|(name, _, width)| write!(f, " {:>width$}", cell(name, tensor)))?;
            let remarks = tensor.remarks();
            writeln!(f, "{}{remarks}", if remarks.is_empty() { "" } else { "  ◄ " })?;
        }
        let outputs = &report.outputs;
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
        writeln!(f)?;
        report.ranks.as_ref().map_or(Ok(()), |ranks| ranks.fmt(f))?;
        report.diagnosis().map_or(Ok(()), |diagnosis| diagnosis.fmt(f))
    }
}
