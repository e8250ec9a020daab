//! Welford's update of each element's mean and deviations, and the reduction of these, or of Adam's moments, to one
//! record a tensor.

use super::dispatch::{self, Work};
use crate::{
    AdamMoments, Element, Error, GsnrConfig, GsnrRecord, HostTensor, Plan, Record,
    adam::Adam,
    backend::with_elements,
    gsnr::{BINS, GsnrSums, Scaling, Track, bin_of},
    loss_scale::divisor,
    outputs::narrow,
    spec::{self, CHUNK, LANES},
};
use rayon::prelude::*;

/// The state of the tracked tensors.
#[derive(Clone, Debug)]
pub(super) struct Tracking {
    window: u32,
    tracks: Vec<Track>,
    means: Vec<f32>,
    deviations: Vec<f32>,
}

impl Tracking {
    pub(super) fn new(plan: &Plan, config: &GsnrConfig) -> Result<Self, Error> {
        let layout = config.layout(plan)?;
        let zeros = || {
            let bytes = layout.elements.saturating_mul(4);
            let out_of_memory = || Error::OutOfMemory { bytes: usize::try_from(bytes).unwrap_or(usize::MAX) };
            let elements = usize::try_from(layout.elements).map_err(|_| out_of_memory())?;
            let mut zeros = Vec::new();
            zeros.try_reserve_exact(elements).map_err(|_| out_of_memory())?;
            zeros.resize(elements, 0.0);
            Ok::<Vec<f32>, Error>(zeros)
        };
        let (means, deviations) = (zeros()?, zeros()?);
        Ok(Self { window: config.steps_of_window(), tracks: layout.tracks, means, deviations })
    }

    /// Forgets all steps.
    pub(super) fn reset(&mut self) {
        for track in &mut self.tracks {
            *track = track.fresh();
        }
    }

    /// Merges a step whose records are known, and whose elements were scaled by `scale`.
    pub(super) fn update(&mut self, tensors: &[HostTensor<'_>], records: &[Record], scale: f32) {
        let unscale = narrow(1.0 / divisor(scale));
        let (mut means, mut deviations) = (self.means.as_mut_slice(), self.deviations.as_mut_slice());
        let mut work = Vec::new();
        for ((track, tensor), record) in self.tracks.iter_mut().zip(tensors).zip(records) {
            if !track.is_tracked() {
                continue;
            }
            let merge = track.step(record, self.window);
            let padded = tensor.len().next_multiple_of(spec::GROUP);
            let (mean, deviation);
            (mean, means) = means.split_at_mut(padded);
            (deviation, deviations) = deviations.split_at_mut(padded);
            if merge {
                work.push((*tensor, &mut mean[..tensor.len()], &mut deviation[..tensor.len()], track.steps));
            }
        }
        work.into_par_iter().for_each(|(tensor, means, deviations, steps)| {
            let state = means.par_chunks_mut(CHUNK).zip(deviations.par_chunks_mut(CHUNK));
            with_elements!(HostTensor, tensor, elements => {
                elements.par_chunks(CHUNK).zip(state).for_each(|(elements, (means, deviations))| {
                    dispatch::run(Update { elements, means, deviations, steps, unscale });
                });
            });
        });
    }

    /// The records of the tracked tensors, with their places in the plan.
    pub(super) fn records(&self, plan: &Plan) -> Vec<(usize, GsnrRecord)> {
        let tracked = self.tracks.iter().enumerate().filter(|(_, track)| track.is_tracked());
        let tracked: Vec<_> = tracked.collect();
        let record = |&(index, track): &(usize, &Track)| {
            let length = plan.tensors()[index].len;
            #[expect(clippy::cast_possible_truncation, reason = "the state is in memory")]
            let place = track.offset as usize..(track.offset + length) as usize;
            let (means, deviations) = (&self.means[place.clone()], &self.deviations[place]);
            let (mut sums, mut bins) = Default::default();
            if track.steps >= 2 {
                let element = |mean: f64, deviation: f64| (mean * mean, deviation);
                (sums, bins) = reduce(means, deviations, element, track.scaling());
            }
            (index, GsnrRecord::of_track(track, length, &sums, &bins))
        };
        tracked.par_iter().map(record).collect()
    }
}

/// Welford (1962): the mean moves by the difference over the steps, k; the squared deviations grow by the difference
/// squared times (k - 1)/k. That is the product of the differences from the old and the new mean, but not 0 where the
/// new mean rounds to the element, so that only an element that never changes has no deviations. `kernels/update.cu`
/// has the same operations.
struct Update<'a, E> {
    elements: &'a [E],
    means: &'a mut [f32],
    deviations: &'a mut [f32],
    /// This one included.
    steps: u32,
    /// 1 / loss scale.
    unscale: f32,
}

impl<E: Element> Work for Update<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let state = self.means.iter_mut().zip(self.deviations);
        if self.steps == 1 {
            for (&x, (mean, deviation)) in self.elements.iter().zip(state) {
                (*mean, *deviation) = (x.widen_finite() * self.unscale, 0.0);
            }
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "rounded the same on every backend")]
        let (share, rest) = (1.0 / self.steps as f32, (self.steps - 1) as f32 / self.steps as f32);
        for (&x, (mean, deviation)) in self.elements.iter().zip(state) {
            let x = x.widen_finite() * self.unscale;
            let gap = x - *mean;
            *mean = gap.mul_add(share, *mean);
            *deviation = (gap * rest).mul_add(gap, *deviation);
        }
    }
}

/// The records of the tensors that have moments, with their places in the plan.
pub(super) fn adam_records(adam: &Adam, moments: &[AdamMoments<'_>]) -> Vec<(usize, GsnrRecord)> {
    let given: Vec<_> = moments.iter().enumerate().filter(|(_, moments)| !moments.exp_avg.is_empty()).collect();
    let record = |&(index, moments): &(usize, &AdamMoments<'_>)| {
        let element = |exp_avg: f64, exp_avg_sq: f64| adam.element(exp_avg, exp_avg_sq);
        let (sums, bins) = reduce(moments.exp_avg, moments.exp_avg_sq, element, adam.scaling);
        let length = moments.exp_avg.len() as u64;
        (index, GsnrRecord::of_steps(adam.steps).with_sums(length, &adam.scaling, &sums, &bins))
    };
    given.par_iter().map(record).collect()
}

/// The sums of a tensor and its bins. `element` makes an element's squared mean and deviation from what the two arrays
/// hold of it.
fn reduce(
    means: &[f32],
    spreads: &[f32],
    element: impl Fn(f64, f64) -> (f64, f64) + Copy + Sync,
    scaling: Scaling,
) -> (GsnrSums, Vec<u32>) {
    let chunks = means.par_chunks(CHUNK).zip(spreads.par_chunks(CHUNK));
    let chunks: Vec<(GsnrSums, Vec<u32>)> =
        chunks.map(|(means, spreads)| dispatch::run(Reduce { means, spreads, element, scaling })).collect();
    let mut bins = vec![0; BINS];
    for (_, chunk) in &chunks {
        bins.iter_mut().zip(chunk).for_each(|(bin, more)| *bin += more);
    }
    (spec::fold_spans(chunks.len(), |c| chunks[c].0, GsnrSums::add).unwrap_or_default(), bins)
}

/// The sums of a chunk and its bins. Lane i has the elements i, i + LANES, …, in order, in f64.
struct Reduce<'a, F> {
    means: &'a [f32],
    spreads: &'a [f32],
    element: F,
    scaling: Scaling,
}

impl<F: Fn(f64, f64) -> (f64, f64)> Work for Reduce<'_, F> {
    type Output = (GsnrSums, Vec<u32>);

    #[inline(always)]
    fn run(self) -> (GsnrSums, Vec<u32>) {
        let mut lanes = [GsnrSums::default(); LANES];
        let mut bins = vec![0; BINS];
        let one = 1.0 + self.scaling.ratio_shift;
        for (means, spreads) in self.means.chunks(LANES).zip(self.spreads.chunks(LANES)) {
            for ((lane, &mean), &spread) in lanes.iter_mut().zip(means).zip(spreads) {
                let (square, deviation) = (self.element)(f64::from(mean), f64::from(spread));
                if !deviation.is_finite() {
                    lane.nonfinite += 1;
                    continue;
                }
                lane.squared_means += square;
                lane.deviations += deviation;
                if deviation > 0.0 {
                    let ratio = square * self.scaling.degrees / deviation;
                    lane.defined += 1;
                    lane.below_one += u64::from(ratio < one);
                    lane.ratios += ratio;
                    bins[bin_of(ratio)] += 1;
                }
            }
        }
        (spec::fold(LANES, |lane| lanes[lane], GsnrSums::add).unwrap_or_default(), bins)
    }
}
