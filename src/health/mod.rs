#![doc = include_str!("../health.md")]

mod activity;
mod advice;
mod baseline;
mod cadence;
mod compare;
mod diagnosis;
mod finding;
mod flow;
mod found;
mod frontier;
mod groups;
mod judge;
mod jump;
mod monitor;
mod names;
mod presets;
mod robust;
mod rules;
mod run;
mod shares;

mod structure;
mod threshold;
mod updates;
mod weights;

pub use advice::advice;
pub use baseline::{Baseline, UsualNorm};
pub use cadence::Cadence;
pub use compare::{Compared, Comparison, NormChange, NormSummary, RunSummary, suggested_clip};
pub use diagnosis::{Diagnosis, Undecided, table};
pub use finding::{Finding, FindingKind, Verdict};
pub use flow::Flow;
pub use frontier::Frontier;
pub use groups::{Contribution, GroupNorm, Groups, risen, top_contributors};
pub(crate) use judge::{Judge, Table as RuleTable, judge};
pub use monitor::Health;
pub use names::{TensorType, backward_order};
pub use rules::{FlowMeasure, FlowRule, Limits, Preset, Rules, UnderflowRule};
pub use threshold::{Statistic, StepNorms, ThresholdRule, step_word, tensor_word, verdict_of};
