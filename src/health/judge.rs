//! The words of each step as a probe on the host writes them, and the table by which a device does.

use super::{Health, StepNorms, ThresholdRule, step_word, tensor_word};
use crate::{Error, Plan, Record};
use bytemuck::{Pod, Zeroable};

/// Rules as a device reads them (`kernels/arguments.cuh`); the tensors' exemptions stand behind.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Table {
    count: u32,
    reserved: [u32; 7],
    rules: [ThresholdRule; MOST],
}
const _: () = assert!(size_of::<Table>() == 2048);

/// Rules that a table has room for.
const MOST: usize = 63;

impl Health {
    /// The bytes of the table for a device that measures these tensors.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`], and [`Error::InvalidConfig`] for more rules than there is room for.
    pub(crate) fn table_of(&self, plan: &Plan) -> Result<Vec<u8>, Error> {
        let rules = self.rules().thresholds();
        if *self.plan() != *plan {
            return Err(Error::ReportOfAnotherPlan);
        }
        let too_many = || Error::InvalidConfig {
            option: "rules",
            expected: "at most 63 thresholds",
            value: rules.len().to_string(),
        };
        let count = u32::try_from(rules.len()).ok().filter(|_| rules.len() <= MOST).ok_or_else(too_many)?;
        let mut table = Table { count, ..Table::zeroed() };
        table.rules[..rules.len()].copy_from_slice(rules);
        let mut bytes = bytemuck::bytes_of(&table).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(self.exemptions()));
        Ok(bytes)
    }
}

/// What a device has in its memory, on the host.
#[derive(Clone, Debug)]
pub(crate) struct Judge {
    rules: Vec<ThresholdRule>,
    exempt: Vec<u32>,
    /// Of the last clean step, 0 before it.
    norms: Vec<f64>,
    total: f64,
}

impl Judge {
    /// # Errors
    /// Those of [`Health::table_of`].
    pub(crate) fn new(health: &Health, plan: &Plan) -> Result<Self, Error> {
        health.table_of(plan)?;
        let exempt = health.exemptions().to_vec();
        let norms = vec![0.0; exempt.len()];
        Ok(Self { rules: health.rules().thresholds().to_vec(), exempt, norms, total: 0.0 })
    }

    /// The word of the step and those of its tensors. `finite` says whether all of them are.
    pub(crate) fn judge(
        &mut self,
        records: &[Record],
        weights: Option<&[Record]>,
        total: f64,
        finite: bool,
    ) -> (u32, Vec<u32>) {
        let mut step = StepNorms::new(total, self.total);
        let word = |(index, record): (usize, &Record)| {
            step.add(record, self.exempt[index]);
            let param_norm = weights.map_or(0.0, |weights| weights[index].l2_norm());
            tensor_word(&self.rules, record, param_norm, self.norms[index], self.exempt[index])
        };
        let words: Vec<u32> = records.iter().enumerate().map(word).collect();
        let united = words.iter().fold(0, |united, word| united | word);
        let of_step = step_word(&self.rules, united, &step);
        if finite {
            self.total = total;
            self.norms.iter_mut().zip(records).for_each(|(norm, record)| *norm = record.finite_l2_norm());
        }
        (of_step, words)
    }
}
