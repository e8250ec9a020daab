//! The micro-batches of a gradient accumulation: each one's records, and those of all together.

mod room;

pub use room::MicroBatches;

use crate::{Error, Plan, Record, measure::printable};
use std::fmt;

/// Holds the gradients' records of the micro-batches of one accumulation, each measured before it was added to the sum.
/// They tell more than the sum: which micro-batch brought the first NaN, say. `Display` prints a line a micro-batch.
#[derive(Clone, Debug)]
pub struct MicroBatchReport {
    plan: Plan,
    /// Records of the first micro-batch, then of the second, …
    records: Vec<Vec<Record>>,
}

impl MicroBatchReport {
    pub(crate) fn new(plan: Plan, records: Vec<Vec<Record>>) -> Self {
        Self { plan, records }
    }

    /// Number of measured micro-batches; at least one.
    #[expect(clippy::len_without_is_empty, reason = "there is no report of none")]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// The records of a micro-batch, counted from 0, in the plan's order.
    ///
    /// # Panics
    /// When there is no such micro-batch.
    pub fn records(&self, micro_batch: usize) -> &[Record] {
        &self.records[micro_batch]
    }

    /// Gives one record a tensor, in the plan's order: of its elements in the first micro-batch, followed by those in
    /// the second, and so on. Counts, extremes and places are exact, and the bits are those of [`Record::merge`] in
    /// that order. The squared norm is the sum of the micro-batches', not that of their sum.
    pub fn merged(&self) -> Vec<Record> {
        let merged = |index: usize| self.records.iter().fold(Record::EMPTY, |all, records| all.merge(&records[index]));
        (0..self.plan.tensors().len()).map(merged).collect()
    }

    /// Gives the first micro-batch in which the tensor at `index` of the plan has a NaN or Inf, and the place of the
    /// first there.
    ///
    /// # Panics
    /// When the plan has no such tensor.
    pub fn first_nonfinite(&self, index: usize) -> Option<(usize, u64)> {
        let first =
            |(micro_batch, records): (usize, &Vec<Record>)| Some((micro_batch, records[index].first_nonfinite()?));
        self.records.iter().enumerate().find_map(first)
    }
}

impl fmt::Display for MicroBatchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>11} {:>14} {:>14}  first tensor that is not finite", "micro-batch", "norm", "max |g|")?;
        for (micro_batch, records) in self.records.iter().enumerate() {
            let norm = records.iter().map(Record::finite_sum_squares).sum::<f64>().sqrt();
            let max = records.iter().map(|record| record.max_abs_or_zero).fold(0.0, f32::max);
            let bad = records.iter().zip(self.plan.tensors()).find(|(record, _)| record.has_nonfinite());
            let bad = bad.map_or(String::new(), |(record, spec)| {
                format!("  {} at element {}", printable(&spec.name), record.first_nonfinite_index)
            });
            writeln!(f, "{micro_batch:>11} {norm:>14.4e} {max:>14.4e}{bad}")?;
        }
        Ok(())
    }
}

/// The places for micro-batches that are taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accumulation {
    count: u32,
    taken: u32,
    /// Whether a step was measured since the last micro-batch: the next then begins another accumulation.
    closed: bool,
}

impl Accumulation {
    /// # Errors
    /// [`Error::InvalidConfig`] for 0 micro-batches.
    pub fn new(count: u32) -> Result<Self, Error> {
        if count == 0 {
            return Err(Error::InvalidConfig {
                option: "micro_batches",
                expected: "at least 1",
                value: "0".to_owned(),
            });
        }
        Ok(Self { count, taken: 0, closed: false })
    }

    /// Takes the place of the next micro-batch.
    ///
    /// # Errors
    /// [`Error::TooManyMicroBatches`].
    pub fn next(&mut self) -> Result<usize, Error> {
        let taken = if self.closed { 0 } else { self.taken };
        if taken == self.count {
            return Err(Error::TooManyMicroBatches { of: self.count });
        }
        (self.taken, self.closed) = (taken + 1, false);
        Ok(taken as usize)
    }

    /// Notes that a step was measured.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// The number of places.
    pub fn count(&self) -> usize {
        self.count as usize
    }

    /// The number of places taken.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] when none is.
    pub fn taken(&self) -> Result<usize, Error> {
        if self.taken == 0 { Err(Error::NotMeasured) } else { Ok(self.taken as usize) }
    }
}
