//! What the numbers mean: rules that turn reports into findings and a verdict.

mod finding;

pub use finding::{Finding, FindingKind, Severity, Verdict};
