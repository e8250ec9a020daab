//! The selection of tensors to show, and their order.

use crate::files::Failure;
use clap::{Args, ValueEnum};
use gradprobe::{Plan, Report, TensorReport, Verdict, health::Groups};
use std::{fmt::Write, path::Path};
use wildmatch::WildMatch;

/// Tensors that a table shows by default: about a screen of them.
const SCREEN: usize = 40;
/// Of more than those, so many: the worst, below the norms of groups.
const WORST: usize = 20;

/// In tables as in JSON; norms and findings are those of all tensors.
#[derive(Debug, Args)]
#[command(next_help_heading = "Tensors that are shown")]
pub struct Selection {
    /// Show N tensors. By default tables show all of up to 40, else the 20 worst; JSON shows all
    #[arg(long, value_name = "N")]
    top: Option<usize>,

    /// Order tensors by this, largest first. By default by name, and the worst first where not all are shown
    #[arg(long, value_enum)]
    sort: Option<Sort>,

    /// Show tensors whose names match, with * for any characters and ? for one
    #[arg(long, value_name = "PATTERN")]
    filter: Option<String>,

    /// Show tensors that are not healthy
    #[arg(long)]
    only_bad: bool,
}

/// An order of tensors.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Sort {
    /// L2 norm
    Norm,
    /// Norm over that of the weight, known with --params
    Ratio,
    /// Largest magnitude
    Max,
    /// Share of dead elements
    Dead,
}

impl Sort {
    /// A NaN is largest.
    fn key(self, tensor: &TensorReport<'_>) -> f64 {
        let value = match self {
            Self::Norm => Some(tensor.record.l2_norm()),
            Self::Ratio => tensor.ratio(),
            Self::Max => tensor.record.max_abs().map(f64::from),
            Self::Dead => tensor.record.dead_fraction(),
        };
        value.unwrap_or(f64::NEG_INFINITY)
    }
}

/// The tensors to show.
#[derive(Default)]
pub struct Shown {
    /// Their places in the plan.
    pub tensors: Vec<usize>,
    order: &'static str,
}

impl Selection {
    /// Whether it needs the norms of the weights.
    pub fn needs_weights(&self) -> bool {
        matches!(self.sort, Some(Sort::Ratio))
    }

    /// Fails for a pattern that no tensor of `path` matches.
    pub fn check(&self, plan: &Plan, path: &Path) -> Result<(), Failure> {
        match &self.filter {
            Some(pattern) if !plan.tensors().iter().any(|tensor| matches(pattern, &tensor.name)) => {
                Err(Failure::file(path, format!("no tensor's name matches the pattern {pattern:?}")))
            }
            _ => Ok(()),
        }
    }

    /// Gives the tensors to show; `verdicts` has one a tensor.
    pub fn of(&self, report: &Report, verdicts: &[Verdict], json: bool) -> Shown {
        let all: Vec<TensorReport<'_>> = report.tensors().collect();
        let is_bad = |index: usize| verdicts[index] != Verdict::Healthy || all[index].record.has_nonfinite();
        let is_shown = |&index: &usize| {
            self.filter.as_ref().is_none_or(|pattern| matches(pattern, all[index].name))
                && (!self.only_bad || is_bad(index))
        };
        let largest_first = |sort: Sort, a: usize, b: usize| sort.key(&all[b]).total_cmp(&sort.key(&all[a]));
        let mut tensors: Vec<usize> = (0..all.len()).filter(is_shown).collect();
        let top = self.top.unwrap_or(if tensors.len() > SCREEN && !json { WORST } else { tensors.len() });
        let order = match self.sort {
            Some(sort) => {
                tensors.sort_by(|&a, &b| largest_first(sort, a, b));
                "in the order asked for"
            }
            None if top < tensors.len() => {
                let badness = |index| (verdicts[index], is_bad(index));
                tensors.sort_by(|&a, &b| badness(b).cmp(&badness(a)).then_with(|| largest_first(Sort::Norm, a, b)));
                "the worst first"
            }
            None => "by name",
        };
        tensors.truncate(top);
        Shown { tensors, order }
    }

    /// Gives the text above a table: the norms of groups, where no choice was made among many tensors, and the number
    /// shown.
    pub fn heading(&self, report: &Report, shown: &Shown) -> Result<String, gradprobe::Error> {
        let (all, shown, order) = (report.records().len(), shown.tensors.len(), shown.order);
        let is_asked = self.top.is_some() || self.sort.is_some() || self.filter.is_some() || self.only_bad;
        let mut heading = String::new();
        if all > SCREEN && !is_asked {
            let blocks = Groups::by_block(report.plan());
            let groups = if blocks.names().len() > SCREEN { Groups::by_type(report.plan()) } else { blocks };
            for group in groups.norms(report)?.iter().filter(|group| group.tensors > 0) {
                let _ = writeln!(heading, "{group}");
            }
        }
        if shown < all {
            let _ = writeln!(heading, "{shown} of {all} tensors, {order}:");
        }
        Ok(heading)
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    WildMatch::new(pattern).matches(name)
}
