//! Norms of groups of tensors: the share of the gradient that each has, and the groups that rose.

use super::{Diagnosis, names, names::TensorType};
use crate::{Error, Plan, Record, Report, measure::printable};
use std::{collections::HashMap, fmt};
use wildmatch::WildMatch;

/// Sorts the tensors of a plan into groups, each into at most one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Groups {
    plan: Plan,
    names: Vec<String>,
    /// The group of each tensor.
    of: Vec<Option<usize>>,
}

/// A group in one step.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupNorm<'a> {
    /// The group's name.
    pub name: &'a str,
    /// Its tensors.
    pub tensors: usize,
    /// Their elements.
    pub elements: u64,
    /// Their L2 norm over the finite elements.
    pub norm: f64,
    /// norm² over that of all tensors; `None` where that is 0.
    pub share: Option<f64>,
    /// Elements that are NaN or infinite.
    pub nonfinite: u64,
}

/// One tensor's part of a squared norm, or of its change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contribution<'a> {
    /// The tensor.
    pub tensor: &'a str,
    /// ‖g_t‖², or how much it rose.
    pub squared_norm: f64,
    /// That over the whole: of all tensors, or of all that rose.
    pub share: f64,
}

impl Groups {
    /// Groups by the part of the model, as [`TensorType::of`] reads the names. Has all of [`TensorType::ALL`], also
    /// those without a tensor.
    pub fn by_type(plan: &Plan) -> Self {
        let of = plan.tensors().iter().map(|tensor| {
            let kind = TensorType::of(&tensor.name);
            TensorType::ALL.iter().position(|&other| other == kind)
        });
        let names = TensorType::ALL.map(|kind| kind.name().to_owned()).into();
        Self { plan: plan.clone(), of: of.collect(), names }
    }

    /// Groups by layer: tensors that differ only in the last part of their names (`weight`, `bias`), behind a `.`, `/`
    /// or `:`. A name of one part is a layer, and so is one that ends in a number.
    pub fn by_layer(plan: &Plan) -> Self {
        Self::by(plan, |name| {
            let parts = name.rsplit_once(['.', '/', ':']).filter(|(_, last)| last.parse::<u64>().is_err());
            parts.map_or(name, |(layer, _)| layer).to_owned()
        })
    }

    /// Groups by block: tensors with the same number of a layer (`blocks.3`). Those without a number are grouped by the
    /// first part of their names.
    pub fn by_block(plan: &Plan) -> Self {
        Self::by(plan, |name| match names::layer_of(name) {
            Some((stack, number)) => format!("{stack}{number}"),
            None => name.split('.').next().unwrap_or(name).to_owned(),
        })
    }

    fn by(plan: &Plan, key: impl Fn(&str) -> String) -> Self {
        let mut names = Vec::new();
        let mut known = HashMap::new();
        let of = plan.tensors().iter().map(|tensor| {
            let name = key(&tensor.name);
            Some(*known.entry(name.clone()).or_insert_with(|| {
                names.push(name);
                names.len() - 1
            }))
        });
        Self { plan: plan.clone(), of: of.collect(), names }
    }

    /// Groups by patterns: name and pattern of each group (`*` stands for any characters, `?` for one). A tensor is in
    /// the first that matches, or in none; groups of one name are one.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a pattern that matches none.
    pub fn by_patterns<N: Into<String>, P: AsRef<str>>(
        plan: &Plan,
        groups: impl IntoIterator<Item = (N, P)>,
    ) -> Result<Self, Error> {
        let mut names: Vec<String> = Vec::new();
        let mut of = vec![None; plan.tensors().len()];
        for (name, pattern) in groups {
            let name = name.into();
            let group = names.iter().position(|other| *other == name).unwrap_or_else(|| {
                names.push(name);
                names.len() - 1
            });
            let matcher = WildMatch::new(pattern.as_ref());
            let mut used = false;
            for (tensor, group_of) in plan.tensors().iter().zip(&mut of) {
                if matcher.matches(&tensor.name) {
                    used = true;
                    group_of.get_or_insert(group);
                }
            }
            if !used {
                return Err(Error::NoSuchTensor { pattern: pattern.as_ref().to_owned() });
            }
        }
        Ok(Self { plan: plan.clone(), names, of })
    }

    /// The groups' names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The group of each tensor, as a place in [`names`](Self::names).
    pub fn of_tensors(&self) -> &[Option<usize>] {
        &self.of
    }

    /// Gives the norms of the groups in a step.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`].
    pub fn norms(&self, report: &Report) -> Result<Vec<GroupNorm<'_>>, Error> {
        self.plan.check_report(report.plan())?;
        let empty = |name| GroupNorm { name, tensors: 0, elements: 0, norm: 0.0, share: None, nonfinite: 0 };
        let mut norms: Vec<GroupNorm> = self.names.iter().map(|name| empty(name.as_str())).collect();
        for (group, record) in self.of.iter().zip(report.records()) {
            if let Some(group) = *group {
                let norm = &mut norms[group];
                norm.tensors += 1;
                norm.elements += record.count;
                // The square, until all are in.
                norm.norm += record.finite_sum_squares();
                norm.nonfinite += record.nan_count + record.inf_count;
            }
        }
        let whole: f64 = report.records().iter().map(Record::finite_sum_squares).sum();
        for norm in &mut norms {
            norm.share = (whole > 0.0).then(|| norm.norm / whole);
            norm.norm = norm.norm.sqrt();
        }
        Ok(norms)
    }

    /// Counts the tensors with a finding in each group, most first, without the groups that have none. It shows which
    /// part of the model to look at.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`].
    pub fn offenders(&self, diagnosis: &Diagnosis) -> Result<Vec<(&str, usize)>, Error> {
        self.plan.check_report(diagnosis.plan())?;
        let mut counts: Vec<(&str, usize)> = self.names.iter().map(|name| (name.as_str(), 0)).collect();
        for (group, verdict) in self.of.iter().zip(diagnosis.verdicts()) {
            if let Some(group) = group.filter(|_| *verdict != super::Verdict::Healthy) {
                counts[group].1 += 1;
            }
        }
        counts.retain(|&(_, count)| count > 0);
        counts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        Ok(counts)
    }
}

/// A group's line in a table.
impl fmt::Display for GroupNorm<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = self.share.map_or_else(|| "–".to_owned(), |share| format!("{:.1} %", 100.0 * share));
        write!(f, "{}: norm {:.3e}, {share} of the square, {} tensors", printable(self.name), self.norm, self.tensors)?;
        if self.nonfinite > 0 {
            write!(f, ", {} elements not finite", self.nonfinite)?;
        }
        Ok(())
    }
}

/// Gives the k tensors with the largest parts of the squared norm, largest first, over the finite elements. Empty where
/// all are 0.
pub fn top_contributors(report: &Report, k: usize) -> Vec<Contribution<'_>> {
    let parts = report.tensors().map(|tensor| (tensor.name, tensor.record.finite_sum_squares()));
    largest(parts.collect(), k)
}

/// Gives the k tensors whose squared norms rose most from one step to the next, with their shares of the whole rise:
/// the source of a spike.
///
/// # Errors
/// [`Error::ReportOfAnotherPlan`] when the two are of different tensors.
pub fn risen<'a>(before: &Report, after: &'a Report, k: usize) -> Result<Vec<Contribution<'a>>, Error> {
    before.plan().check_report(after.plan())?;
    let rise = |(tensor, before): (crate::TensorReport<'a>, &Record)| {
        (tensor.name, tensor.record.finite_sum_squares() - before.finite_sum_squares())
    };
    Ok(largest(after.tensors().zip(before.records()).map(rise).collect(), k))
}

/// Gives the k largest of the parts above 0.
pub(super) fn largest(mut parts: Vec<(&str, f64)>, k: usize) -> Vec<Contribution<'_>> {
    parts.retain(|&(_, part)| part > 0.0);
    let whole: f64 = parts.iter().map(|&(_, part)| part).sum();
    parts.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    parts.truncate(k);
    let contribution =
        |(tensor, squared_norm): (_, f64)| Contribution { tensor, squared_norm, share: squared_norm / whole };
    parts.into_iter().map(contribution).collect()
}
