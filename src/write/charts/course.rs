//! The data for pictures of a whole run, in memory of a fixed size.

use super::{
    Chart, Colour, DARK, HEADER, NOT_FINITE, Panel,
    heat::Heat,
    lines::{Lines, Point, Series},
    text::Labels,
};
use crate::{Error, Plan, Verdict, histogram::Histogram, measure::printable, write::Entry};

/// The most steps in a picture. Of longer runs one step of every two, four, … is kept: the worst of them.
const STEPS: usize = 512;
/// Columns of histograms.
const COLUMNS: usize = 128;
/// Characters shown of a name.
const NAME: usize = 28;
/// Tensors that have a line of their own.
const LINES: usize = 6;

/// Holds the course of a run: norms of every tensor and histograms of all elements, over its steps. Takes about 1 MB,
/// and 2 KB a tensor, for a run of any length.
#[derive(Clone, Debug)]
pub struct Course {
    plan: Plan,
    norms: Thinned<Norms>,
    histograms: Thinned<(u64, Box<Histogram>)>,
    last_step: Option<u64>,
    /// Verdicts of the last step.
    verdicts: Vec<Option<Verdict>>,
}

#[derive(Clone, Debug)]
struct Norms {
    step: u64,
    total: f64,
    verdict: Option<Verdict>,
    tensors: Vec<f32>,
}

impl Course {
    /// Makes the course of a run with these tensors, before its first step.
    pub fn new(plan: &Plan) -> Self {
        // Whether the second is more worth keeping: a step that is not finite, then a bad one, then a large norm.
        let worse = |a: &Norms, b: &Norms| {
            let badness = |norms: &Norms| (!norms.total.is_finite(), norms.verdict);
            badness(b).cmp(&badness(a)).then(b.total.total_cmp(&a.total)).is_gt()
        };
        let unlike = |a: &(u64, Box<Histogram>), b: &(u64, Box<Histogram>)| {
            let bad = |histogram: &Histogram| histogram.nan_count + histogram.inf_count > 0;
            bad(&b.1) && !bad(&a.1)
        };
        Self {
            verdicts: vec![None; plan.tensors().len()],
            plan: plan.clone(),
            last_step: None,
            norms: Thinned::new(STEPS, worse),
            histograms: Thinned::new(COLUMNS, unlike),
        }
    }

    /// Adds a step. One that is not after the last begins the course anew: the run was restarted.
    ///
    /// # Errors
    /// [`Error::EntryOfAnotherPlan`].
    pub fn push(&mut self, entry: &Entry) -> Result<(), Error> {
        entry.report().plan().check_entry(&self.plan, "course")?;
        if self.last_step.replace(entry.step()).is_some_and(|last| entry.step() <= last) {
            self.norms.clear();
            self.histograms.clear();
        }
        let norm = |record: &crate::Record| crate::measure::narrow(record.l2_norm());
        self.norms.push(Norms {
            step: entry.step(),
            total: entry.report().outputs().total_norm,
            verdict: entry.verdict(),
            tensors: entry.report().records().iter().map(norm).collect(),
        });
        if let Some(histogram) = entry.histogram() {
            self.histograms.push((entry.step(), Box::new(histogram.total())));
        }
        self.verdicts = entry.tensors().map(|tensor| tensor.verdict).collect();
        Ok(())
    }

    /// Draws the total norm over the steps, and those of six tensors: the unhealthy of the last step, then the largest.
    /// Steps that are not healthy are marked. 1200 × 600 pixels.
    pub fn norms(&self) -> Chart {
        const COLOURS: [Colour; LINES] = [
            [0x4e, 0x79, 0xa7],
            [0x59, 0xa1, 0x4f],
            [0x76, 0xb7, 0xb2],
            [0xb0, 0x7a, 0x5f],
            [0xed, 0xc9, 0x48],
            [0xe3, 0x8e, 0xb0],
        ];
        let steps = &self.norms.items;
        let point = |norms: &Norms, value: f64, verdict| Point { step: norms.step, value, verdict };
        let total = steps.iter().map(|norms| point(norms, norms.total, norms.verdict)).collect();
        let names: Vec<String> = self.plan.tensors().iter().map(|tensor| printable(&tensor.name)).collect();
        let labels = Labels::of(names.iter().map(String::as_str), NAME);
        let mut series = vec![Series { name: "total norm".to_owned(), colour: DARK, thickness: 3, points: total }];
        if let Some(last) = steps.last() {
            let mut chosen: Vec<usize> = (0..self.verdicts.len()).collect();
            let rank = |&tensor: &usize| (self.verdicts[tensor], last.tensors[tensor].is_nan());
            let norm = |tensor: usize| last.tensors[tensor];
            chosen.sort_by(|a, b| rank(b).cmp(&rank(a)).then(norm(*b).total_cmp(&norm(*a))));
            for (tensor, colour) in chosen.into_iter().zip(COLOURS) {
                let points = steps.iter().map(|norms| point(norms, norms.tensors[tensor].into(), None)).collect();
                let name = labels.short[tensor].clone();
                series.push(Series { name, colour, thickness: 1, points });
            }
        }
        Chart {
            title: "L2 norm over steps".to_owned(),
            subtitle: [thinned(self.norms.stride), labels.pattern].join(" ").trim().to_owned(),
            legend: vec![(super::WARNING, "warning"), (super::CRITICAL, "critical"), (NOT_FINITE, "NaN or Inf")],
            panels: vec![Panel::Lines(Lines { series })],
            columns: 1,
            size: (1200, 600),
        }
    }

    /// Draws the distribution of all elements' magnitudes over the steps that had histograms. 1200 × 664 pixels.
    pub fn histograms(&self) -> Chart {
        Chart {
            title: "Magnitudes of the gradients' elements over steps".to_owned(),
            subtitle: thinned(self.histograms.stride),
            legend: vec![(NOT_FINITE, "some are NaN or Inf")],
            panels: vec![Panel::Heat(Heat { columns: self.histograms.items.clone() })],
            columns: 1,
            size: (1200, 600 + HEADER),
        }
    }
}

fn thinned(stride: u64) -> String {
    if stride == 1 { String::new() } else { format!("one of every {stride} steps: the worst") }
}

/// A series that keeps every item while they are few, then one of every two, of every four, and so on.
#[derive(Clone, Debug)]
struct Thinned<T> {
    items: Vec<T>,
    /// The most items; even.
    most: usize,
    /// The steps that an item stands for; the last may stand for fewer.
    stride: u64,
    seen: u64,
    /// Whether the second of two neighbours is the one to keep.
    second: fn(&T, &T) -> bool,
}

impl<T> Thinned<T> {
    fn new(most: usize, second: fn(&T, &T) -> bool) -> Self {
        Self { items: Vec::new(), most, stride: 1, seen: 0, second }
    }

    fn clear(&mut self) {
        *self = Self::new(self.most, self.second);
    }

    fn push(&mut self, item: T) {
        let starts = self.seen.is_multiple_of(self.stride);
        self.seen += 1;
        match self.items.last_mut() {
            Some(last) if !starts => {
                if (self.second)(last, &item) {
                    *last = item;
                }
                return;
            }
            _ => {}
        }
        if self.items.len() == self.most {
            let mut rest = std::mem::take(&mut self.items).into_iter();
            while let Some(first) = rest.next() {
                self.items.push(match rest.next() {
                    Some(next) if (self.second)(&first, &next) => next,
                    _ => first,
                });
            }
            self.stride *= 2;
        }
        self.items.push(item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_worst_of_equal_runs_in_order() {
        let mut series = Thinned::new(8, |a: &u64, b: &u64| b % 100 > a % 100);
        for item in 0..1000 {
            series.push(item);
            assert!(series.items.len() <= 8 && series.items.is_sorted());
        }
        assert_eq!(series.stride, 128);
        let worst =
            |run: u64| (run * 128..(run * 128 + 128).min(1000)).max_by_key(|x| (x % 100, std::cmp::Reverse(*x)));
        assert_eq!(series.items, (0..8).filter_map(worst).collect::<Vec<_>>());
    }
}
