//! The measurement of a step: from elements to records, to the step's outputs, to a report.

mod chunk;
pub(crate) mod cpu;
mod exact;
mod outputs;
mod record;
mod report;
mod scan;
mod sums;

pub use outputs::StepOutputs;
pub use record::Record;
pub use report::{Report, TensorReport};

pub(crate) use exact::{ExactSum, StepSums};
pub(crate) use outputs::narrow;
pub(crate) use record::{propagate, to_f64};
pub(crate) use report::{printable, width_of};
