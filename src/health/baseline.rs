//! The norms of healthy steps, learned from a run and kept as text.

use super::robust::{NORMAL, median_and_deviation};
use crate::{Error, Plan, Report, history::HistoryReport, plan::first_difference};
use std::{fmt, str::FromStr};

/// Holds the usual norms of healthy steps, of all tensors together and of each. They are the median and the median
/// absolute deviation, which a few odd steps do not move. They are learned from a run's last steps
/// ([`of_history`](Self::of_history)) or from reports ([`of_reports`](Self::of_reports)), and kept as text for the next
/// run: `Display` writes it and `FromStr` reads it back to the bit.
///
/// The text has a line for the format, one with the learning rate or `-`, one for the total and one a tensor. Fields are
/// separated by tabs: elements, steps, median, deviation, name. In a name, tab, line feed, carriage return and backslash
/// are `\t`, `\n`, `\r`, `\\`.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, Rules, health::Baseline};
///
/// let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new().history(64))?;
/// for _step in 0..20 {
///     probe.measure(&[&[3.0f32, 4.0]])?;
/// }
/// let baseline = Baseline::of_history(&probe.history()?.report()?, 11); // without the first ten steps
/// assert_eq!(baseline.total().steps, 10);
/// let text = baseline.to_string(); // in a file, until the next run
/// let config = Config::new().rules(Rules::default().baseline(text.parse()?));
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Baseline {
    learning_rate: Option<f64>,
    total: UsualNorm,
    tensors: Vec<(String, u64, UsualNorm)>,
}

/// The norms seen, without those that were 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UsualNorm {
    /// The number of steps.
    pub steps: u64,
    /// Their median; 0 without steps.
    pub median: f64,
    /// The standard deviation of their logarithm, as 1.4826 times the median absolute one; 0 without steps.
    pub deviation: f64,
}

impl UsualNorm {
    fn of(norms: impl Iterator<Item = f64>) -> Self {
        let mut logarithms: Vec<f64> = norms.filter(|&norm| norm > 0.0).map(f64::ln).collect();
        let steps = logarithms.len() as u64;
        if steps == 0 {
            return Self::default();
        }
        let (median, deviation) = median_and_deviation(&mut logarithms);
        Self { steps, median: median.exp(), deviation: NORMAL * deviation }
    }

    /// Gives how many deviations of the logarithm, each at least `least`, a norm lies above the median.
    pub(super) fn deviations(&self, norm: f64, least: f64) -> f64 {
        (norm / self.median).ln() / self.deviation.max(least)
    }
}

const HEADER: &str = "gradprobe baseline 2";

impl Baseline {
    /// Learns from the last steps of a run from number `first` on, counted from 1, to leave its warm-up out. Leaves out
    /// steps that were not finite or skipped.
    pub fn of_history(history: &HistoryReport, first: u64) -> Self {
        let healthy = history.steps().filter(|(step, _)| {
            let outputs = &step.outputs;
            outputs.step >= first && outputs.found_inf == 0.0 && outputs.skip == 0
        });
        let steps = healthy.map(|(step, tensors)| {
            let norms = tensors.iter().map(|tensor| tensor.finite_l2_norm).collect();
            (step.outputs.finite_total_norm, norms)
        });
        Self::learned(history.plan(), &steps.collect::<Vec<_>>())
    }

    /// Learns from these steps of a plan, without those that are not finite or to be skipped.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`].
    pub fn of_reports<'a>(plan: &Plan, reports: impl IntoIterator<Item = &'a Report>) -> Result<Self, Error> {
        let mut steps = Vec::new();
        for report in reports {
            plan.check_report(report.plan())?;
            let outputs = report.outputs();
            if outputs.found_inf == 0.0 && outputs.skip == 0 {
                let norms = report.records().iter().map(|record| record.finite_l2_norm()).collect();
                steps.push((outputs.finite_total_norm, norms));
            }
        }
        Ok(Self::learned(plan, &steps))
    }

    /// Learns from the total and the tensors' norms of each step; that of an absent tensor is 0.
    fn learned(plan: &Plan, steps: &[(f64, Vec<f64>)]) -> Self {
        let total = UsualNorm::of(steps.iter().map(|&(total, _)| total));
        let of_tensor = |(index, tensor): (usize, &crate::TensorSpec)| {
            let usual = UsualNorm::of(steps.iter().map(|(_, norms)| norms[index]));
            (tensor.name.clone(), tensor.len, usual)
        };
        Self { learning_rate: None, total, tensors: plan.tensors().iter().enumerate().map(of_tensor).collect() }
    }

    /// Sets the learning rate of those steps. Nothing is judged by the baseline under a
    /// [`Rules::learning_rate`](super::Rules::learning_rate) that differs by more than a factor of 2.
    #[must_use]
    pub fn at_learning_rate(self, learning_rate: f64) -> Self {
        Self { learning_rate: Some(learning_rate), ..self }
    }

    /// The learning rate of those steps, if it was given.
    pub fn learning_rate(&self) -> Option<f64> {
        self.learning_rate
    }

    /// The usual total norm.
    pub fn total(&self) -> UsualNorm {
        self.total
    }

    /// Names and usual norms of the tensors, in the plan's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, UsualNorm)> {
        self.tensors.iter().map(|(name, _, usual)| (name.as_str(), *usual))
    }

    pub(super) fn usual_of(&self, index: usize) -> &UsualNorm {
        &self.tensors[index].2
    }

    /// Checks that the baseline is of the tensors of this plan: by names and lengths, with any dtypes.
    ///
    /// # Errors
    /// [`Error::BaselineOfAnotherModel`], which names the first tensor that differs.
    pub fn check(&self, plan: &Plan) -> Result<(), Error> {
        let described = |name, len| (name, format!("{len} elements"));
        let here = plan.tensors().iter().map(|tensor| described(&tensor.name, tensor.len));
        let there = self.tensors.iter().map(|(name, len, _)| described(name, *len));
        let differs = |(name, what)| Err(Error::BaselineOfAnotherModel { name, what });
        first_difference(here, there).map_or(Ok(()), differs)
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = |usual: &UsualNorm| format!("{}\t{:e}\t{:e}", usual.steps, usual.median, usual.deviation);
        writeln!(f, "{HEADER}")?;
        match self.learning_rate {
            Some(rate) => writeln!(f, "{rate:e}")?,
            None => writeln!(f, "-")?,
        }
        writeln!(f, "{}", fields(&self.total))?;
        for (name, len, usual) in &self.tensors {
            writeln!(f, "{len}\t{}\t{}", fields(usual), escape(name))?;
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
            return Err(invalid("text that begins with \"gradprobe baseline 2\"", header));
        }
        let rate = lines.next().unwrap_or_default();
        let learning_rate = match rate {
            "-" => None,
            text => {
                let rate: Option<f64> = text.parse().ok().filter(|&rate: &f64| rate > 0.0 && rate.is_finite());
                Some(rate.ok_or_else(|| invalid("a line with a learning rate, or -", text))?)
            }
        };
        let total = lines.next().unwrap_or_default();
        let fields: Vec<&str> = total.split('\t').collect();
        let total = parse_usual(&fields)
            .ok_or_else(|| invalid("a line of steps, median and deviation for the total", total))?;
        let mut tensors = Vec::new();
        for line in lines {
            let fields: Vec<&str> = line.split('\t').collect();
            let tensor = match fields[..] {
                [len, steps, median, deviation, name] => {
                    let (len, usual) = (len.parse().ok(), parse_usual(&[steps, median, deviation]));
                    len.zip(usual).zip(unescape(name)).map(|((len, usual), name)| (name, len, usual))
                }
                _ => None,
            };
            tensors.push(
                tensor.ok_or_else(|| {
                    invalid("lines of elements, steps, median, deviation and a name for tensors", line)
                })?,
            );
        }
        Ok(Self { learning_rate, total, tensors })
    }
}

fn parse_usual(fields: &[&str]) -> Option<UsualNorm> {
    let [steps, median, deviation] = fields else { return None };
    let usual =
        UsualNorm { steps: steps.parse().ok()?, median: median.parse().ok()?, deviation: deviation.parse().ok()? };
    let is_number = |x: f64| (0.0..f64::INFINITY).contains(&x);
    let valid = match usual.steps {
        0 => usual == UsualNorm::default(),
        _ => usual.median > 0.0 && is_number(usual.median) && is_number(usual.deviation),
    };
    valid.then_some(usual)
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
