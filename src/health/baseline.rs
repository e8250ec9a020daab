//! What healthy steps were like, learned from a run and kept as text.

use crate::{Error, Plan, Report, history::HistoryReport};
use std::{fmt, str::FromStr};

/// The range of norms over healthy steps: of all tensors together and of each. Learned from a run's own last steps
/// ([`of_history`](Self::of_history)) or step by step ([`observe`](Self::observe)), and kept as text: `Display` writes it
/// and `FromStr` reads it back to the bit.
///
/// The text is one line for the format, one for the total and one a tensor, of fields between tabs: elements, steps,
/// smallest norm, largest norm, name. In a name, tab, line feed, carriage return and backslash are `\t`, `\n`, `\r`,
/// `\\`.
#[derive(Clone, Debug, PartialEq)]
pub struct Baseline {
    total: NormRange,
    tensors: Vec<(String, u64, NormRange)>,
}

/// The norms that were seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormRange {
    /// Steps they are of.
    pub steps: u64,
    /// The smallest; +Inf without steps.
    pub smallest: f64,
    /// The largest; 0 without steps.
    pub largest: f64,
}

impl NormRange {
    const NONE: Self = Self { steps: 0, smallest: f64::INFINITY, largest: 0.0 };

    fn add(&mut self, norm: f64) {
        self.steps = self.steps.saturating_add(1);
        self.smallest = self.smallest.min(norm);
        self.largest = self.largest.max(norm);
    }
}

const HEADER: &str = "gradprobe baseline 1";

impl Baseline {
    /// Of the tensors of a plan, before any step.
    pub fn new(plan: &Plan) -> Self {
        let tensors = plan.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.len, NormRange::NONE)).collect();
        Self { total: NormRange::NONE, tensors }
    }

    /// Of the last steps of a run, those left out that were not finite or skipped.
    pub fn of_history(history: &HistoryReport) -> Self {
        let mut baseline = Self::new(history.plan());
        for (step, tensors) in history.steps() {
            if step.outputs.found_inf == 0.0 && step.outputs.skip == 0 {
                baseline.add(
                    step.outputs.finite_total_norm,
                    tensors.iter().map(|tensor| tensor.has_elements().then_some(tensor.finite_l2_norm)),
                );
            }
        }
        baseline
    }

    /// Takes a step in, unless it is not finite or to be skipped.
    ///
    /// # Errors
    /// [`Error::BaselineOfAnotherModel`], which names the first tensor that differs.
    pub fn observe(&mut self, report: &Report) -> Result<(), Error> {
        self.check(report.plan())?;
        let outputs = report.outputs();
        if outputs.found_inf == 0.0 && outputs.skip == 0 {
            self.add(
                outputs.finite_total_norm,
                report.records().iter().map(|record| (record.count > 0).then(|| record.finite_l2_norm())),
            );
        }
        Ok(())
    }

    fn add(&mut self, total: f64, norms: impl Iterator<Item = Option<f64>>) {
        self.total.add(total);
        for ((_, _, range), norm) in self.tensors.iter_mut().zip(norms) {
            norm.into_iter().for_each(|norm| range.add(norm));
        }
    }

    /// The total norms that were seen.
    pub fn total(&self) -> NormRange {
        self.total
    }

    /// Names and norms of the tensors, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, NormRange)> {
        self.tensors.iter().map(|(name, _, range)| (name.as_str(), *range))
    }

    pub(super) fn range_of(&self, index: usize) -> &NormRange {
        &self.tensors[index].2
    }

    /// Whether it is of the tensors of this plan: by names and lengths, whatever their dtypes.
    ///
    /// # Errors
    /// [`Error::BaselineOfAnotherModel`], which names the first tensor that differs.
    pub fn check(&self, plan: &Plan) -> Result<(), Error> {
        let differs = |name: &str, what: String| Err(Error::BaselineOfAnotherModel { name: name.to_owned(), what });
        for (index, tensor) in plan.tensors().iter().enumerate() {
            match self.tensors.get(index) {
                Some((name, len, _)) if *name == tensor.name && *len == tensor.len => {}
                Some((name, len, _)) if *name == tensor.name => {
                    return differs(name, format!("it has {len} elements there, {} here", tensor.len));
                }
                Some((other, ..)) => return differs(&tensor.name, format!("it has {other:?} in its place")),
                None => return differs(&tensor.name, "it does not have that tensor".to_owned()),
            }
        }
        match self.tensors.get(plan.tensors().len()) {
            Some((name, ..)) => differs(name, "the model does not have that tensor".to_owned()),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = |range: &NormRange| format!("{}\t{:e}\t{:e}", range.steps, range.smallest, range.largest);
        writeln!(f, "{HEADER}")?;
        writeln!(f, "{}", range(&self.total))?;
        for (name, len, norms) in &self.tensors {
            writeln!(f, "{len}\t{}\t{}", range(norms), escape(name))?;
        }
        Ok(())
    }
}

impl FromStr for Baseline {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidConfig`] with the line that cannot be read.
    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |expected: &'static str, line: &str| {
            let value = if line.is_empty() { "the end of the text".to_owned() } else { format!("{line:?}") };
            Error::InvalidConfig { option: "baseline", expected, value }
        };
        let mut lines = text.split_terminator('\n');
        let header = lines.next().unwrap_or_default();
        if header != HEADER {
            return Err(invalid("text that begins with \"gradprobe baseline 1\"", header));
        }
        let total = lines.next().unwrap_or_default();
        let fields: Vec<&str> = total.split('\t').collect();
        let total =
            parse_range(&fields).ok_or_else(|| invalid("a line of steps and two norms for the total", total))?;
        let mut tensors = Vec::new();
        for line in lines {
            let fields: Vec<&str> = line.split('\t').collect();
            let tensor = match fields[..] {
                [len, steps, smallest, largest, name] => {
                    let (len, range) = (len.parse().ok(), parse_range(&[steps, smallest, largest]));
                    len.zip(range).zip(unescape(name)).map(|((len, range), name)| (name, len, range))
                }
                _ => None,
            };
            tensors.push(
                tensor.ok_or_else(|| invalid("lines of elements, steps, two norms and a name for tensors", line))?,
            );
        }
        Ok(Self { total, tensors })
    }
}

fn parse_range(fields: &[&str]) -> Option<NormRange> {
    let [steps, smallest, largest] = fields else { return None };
    let range =
        NormRange { steps: steps.parse().ok()?, smallest: smallest.parse().ok()?, largest: largest.parse().ok()? };
    let valid = if range.steps == 0 {
        range == NormRange::NONE
    } else {
        range.smallest >= 0.0 && range.smallest <= range.largest && range.largest < f64::INFINITY
    };
    valid.then_some(range)
}

fn escape(name: &str) -> String {
    name.replace('\\', r"\\").replace('\t', r"\t").replace('\n', r"\n").replace('\r', r"\r")
}

fn unescape(text: &str) -> Option<String> {
    let mut name = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        name.push(match character {
            '\\' => match characters.next()? {
                '\\' => '\\',
                't' => '\t',
                'n' => '\n',
                'r' => '\r',
                _ => return None,
            },
            other => other,
        });
    }
    Some(name)
}
