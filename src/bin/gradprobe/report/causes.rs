//! Findings, one for all steps with the same cause.

use super::summary::Exact;
use crate::run::{Finding, Number};
use gradprobe::Verdict;
use serde::{Serialize, Serializer};
use std::collections::HashMap;

/// Spans of a finding that comes and goes. Of more, those with the smallest gap become one.
const SPANS: usize = 100;

/// A finding, and the steps in which it was there.
#[derive(Serialize)]
pub struct Cause {
    #[serde(serialize_with = "name")]
    severity: Verdict,
    kind: String,
    rule: String,
    tensor: Option<String>,
    /// The other tensors, of the step that had most.
    others: Vec<String>,
    since: u64,
    /// The last step with it, and the number of steps.
    last: u64,
    steps: u64,
    /// Its spans: the beginning, and the last of the steps that followed each other.
    spans: Vec<(u64, u64)>,
    /// The step of the first report.
    found: u64,
    message: String,
    value: Option<Exact>,
    threshold: Option<Exact>,
    advice: Vec<String>,
}

fn name<S: Serializer>(verdict: &Verdict, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(verdict.name())
}

/// The causes of a run so far.
#[derive(Default)]
pub struct Causes {
    causes: Vec<Cause>,
    /// Places in `causes` by severity, rule and tensor.
    places: HashMap<(Verdict, String, Option<String>), usize>,
}

impl Causes {
    /// Adds the findings of a step, which comes after `before`.
    pub fn add(&mut self, step: u64, before: u64, findings: &[Finding]) {
        for finding in findings {
            let key = (finding.severity, finding.rule.clone(), finding.tensor.clone());
            let place = *self.places.entry(key).or_insert(self.causes.len());
            if place == self.causes.len() {
                self.causes.push(Cause::new(step, finding));
            }
            self.causes[place].add(step, before, finding);
        }
    }

    /// Gives the critical ones first, then in the order of their beginnings.
    pub fn into_worst_first(mut self) -> Vec<Cause> {
        self.causes.sort_by_key(|cause| (std::cmp::Reverse(cause.severity), cause.since));
        self.causes
    }
}

impl Cause {
    fn new(step: u64, finding: &Finding) -> Self {
        let exact = |number: Option<Number>| number.map(|Number(number)| Exact(number));
        Self {
            severity: finding.severity,
            kind: finding.kind.clone(),
            rule: finding.rule.clone(),
            tensor: finding.tensor.clone(),
            others: Vec::new(),
            since: finding.since,
            last: step,
            steps: 0,
            spans: Vec::new(),
            found: step,
            message: finding.message.clone(),
            value: exact(finding.value),
            threshold: exact(finding.threshold),
            advice: finding.advice.clone(),
        }
    }

    fn add(&mut self, step: u64, before: u64, finding: &Finding) {
        self.since = self.since.min(finding.since);
        self.last = step;
        self.steps += 1;
        if finding.others.len() > self.others.len() {
            self.others.clone_from(&finding.others);
        }
        match self.spans.last_mut() {
            Some(span) if span.1 >= before.min(finding.since) => span.1 = step,
            _ => self.spans.push((finding.since, step)),
        }
        if self.spans.len() > SPANS {
            let gap = |&place: &usize| self.spans[place].0.saturating_sub(self.spans[place - 1].1);
            let closest = (1..self.spans.len()).min_by_key(gap).expect("there are some");
            self.spans[closest - 1].1 = self.spans.remove(closest).1;
        }
    }
}
