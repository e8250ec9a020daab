//! Welford's update of each element's mean and deviations, and the reduction of these, or of Adam's moments, to one
//! record a tensor.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::{AdamArguments, BINS, GsnrArguments, GsnrRecord, GsnrSums, Scaling, Track, UpdateArguments, bin_of};
use crate::{
    Element, HostTensor, Record, StepOutputs,
    clip::divisor,
    device::cpu::{
        dispatch::{self, InstructionSet, Work},
        memory::{Tables, tensors},
    },
    measure::narrow,
    probe::TensorEntry,
    spec::{self, CHUNK, LANES},
    tensor::with_elements,
};
use rayon::prelude::*;

/// Does as `gradprobe_update`: merges a step whose records are known.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn update(a: &UpdateArguments) {
    // SAFETY: the caller's promise.
    let (tensors, entries) = unsafe { tensors(&a.common) };
    let count = tensors.len();
    // SAFETY: the caller's promise.
    let (tracks, records, outputs): (&mut [Track], &[Record], &[StepOutputs]) =
        unsafe { Tables::at(((a.tracks, count), (a.common.records, count), (a.common.outputs, 1))) };
    let elements = elements_of(tracks, entries);
    // SAFETY: the caller's promise.
    let (mut means, mut deviations): (&mut [f32], &mut [f32]) =
        unsafe { Tables::at(((a.means, elements), (a.deviations, elements))) };
    let unscale = narrow(1.0 / divisor(outputs[0].loss_scale));
    let mut begin = 0;
    let mut work = Vec::new();
    for (((track, tensor), entry), record) in tracks.iter_mut().zip(&tensors).zip(entries).zip(records) {
        // A step without the tensor does not count for it.
        let is_absent = tensor.is_empty() && entry.length > 0;
        if !track.is_tracked() || is_absent || !track.step(record, a.window) || tensor.is_empty() {
            continue;
        }
        let skip = usize::try_from(track.offset).unwrap_or(usize::MAX) - begin;
        begin += skip + tensor.len();
        let (mean, deviation);
        (mean, means) = means[skip..].split_at_mut(tensor.len());
        (deviation, deviations) = deviations[skip..].split_at_mut(tensor.len());
        work.push((*tensor, mean, deviation, track.steps));
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

/// Does as `gradprobe_gsnr`: makes the records of the tracked tensors.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn gsnr(a: &GsnrArguments) {
    let count = a.common.tensor_count as usize;
    // SAFETY: the caller's promise.
    let (entries, tracks, records): (&[TensorEntry], &[Track], &mut [GsnrRecord]) =
        unsafe { Tables::at(((a.common.tensors, count), (a.tracks, count), (a.gsnr_records, count))) };
    let elements = elements_of(tracks, entries);
    // SAFETY: the caller's promise.
    let (means, deviations): (&[f32], &[f32]) = unsafe { Tables::at(((a.means, elements), (a.deviations, elements))) };
    let tracked = tracks.par_iter().zip(entries).zip(records).filter(|((track, _), _)| track.is_tracked());
    tracked.for_each(|((track, entry), record): ((&Track, &TensorEntry), _)| {
        #[expect(clippy::cast_possible_truncation, reason = "the state is in memory")]
        let place = track.offset as usize..(track.offset + entry.length) as usize;
        let (mut sums, mut bins) = Default::default();
        if track.steps >= 2 {
            (sums, bins) = reduce(&means[place.clone()], &deviations[place], TrackedSource, track.scaling());
        }
        *record = GsnrRecord::of_track(track, entry.length, &sums, &bins);
    });
}

/// Gives the number of elements with state: up to the end of the last tracked tensor.
fn elements_of(tracks: &[Track], entries: &[TensorEntry]) -> usize {
    let tracked = tracks.iter().zip(entries).filter(|(track, _)| track.is_tracked());
    let end = tracked.map(|(track, entry)| track.offset + entry.length).max().unwrap_or(0);
    usize::try_from(end).unwrap_or(usize::MAX)
}

/// Does as `gradprobe_adam`: makes the records of the tensors that have moments.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn adam(a: &AdamArguments) {
    let (count, adam) = (a.common.tensor_count as usize, &a.step);
    // SAFETY: the caller's promise.
    let (entries, moments, records): (&[TensorEntry], &[[u64; 2]], &mut [GsnrRecord]) =
        unsafe { Tables::at(((a.common.tensors, count), (a.moments, count), (a.gsnr_records, count))) };
    let given = moments.par_iter().zip(entries).zip(records).filter(|((moments, _), _)| moments[0] != 0);
    given.for_each(|((moments, entry), record)| {
        let count = usize::try_from(entry.length).unwrap_or(usize::MAX);
        let [first, second] = moments.map(|address| (address, count));
        // SAFETY: the moments have the lengths of their tensors.
        let (exp_avg, exp_avg_sq): (&[f32], &[f32]) = unsafe { Tables::at((first, second)) };
        let (sums, bins) = reduce(exp_avg, exp_avg_sq, adam.source(), adam.scaling);
        *record = GsnrRecord::of_steps(adam.steps).with_sums(exp_avg.len() as u64, &adam.scaling, &sums, &bins);
    });
}

/// Updates by Welford (1962): the mean moves by the difference over the steps, k; the squared deviations grow by the
/// difference squared times (k - 1)/k. That is the product of the differences from the old and the new mean, but not 0
/// where the new mean rounds to the element. So only an element that never changes has no deviations.
/// `kernels/update.cu` has the same operations.
struct Update<'a, E> {
    elements: &'a [E],
    means: &'a mut [f32],
    deviations: &'a mut [f32],
    /// Steps, this one included.
    steps: u32,
    /// 1 / loss scale.
    unscale: f32,
}

impl<E: Element> Work for Update<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run(self, set: impl InstructionSet) {
        let mut wide = [0.0; 1024];
        #[expect(clippy::cast_precision_loss, reason = "rounded the same on every backend")]
        let (share, rest) = (1.0 / self.steps as f32, (self.steps - 1) as f32 / self.steps as f32);
        let state = self.means.chunks_mut(wide.len()).zip(self.deviations.chunks_mut(wide.len()));
        for (elements, (means, deviations)) in self.elements.chunks(wide.len()).zip(state) {
            let wide = &mut wide[..elements.len()];
            E::widen(elements, wide, set);
            let state = means.iter_mut().zip(deviations);
            if self.steps == 1 {
                for (x, (mean, deviation)) in wide.iter().zip(state) {
                    (*mean, *deviation) = (x * self.unscale, 0.0);
                }
                continue;
            }
            for (x, (mean, deviation)) in wide.iter().zip(state) {
                let x = x * self.unscale;
                let gap = x - *mean;
                *mean = gap.mul_add(share, *mean);
                *deviation = (gap * rest).mul_add(gap, *deviation);
            }
        }
    }
}

/// Reads an element's mean and spread from two arrays of f32.
pub(crate) trait Source: Copy + Sync {
    /// Gives an element's squared deviations, times a factor that all elements share.
    fn deviation(&self, mean: f32, spread: f32) -> f32;
    /// Completes the sums of a tensor: `spreads` are then its squared deviations.
    fn whole(&self, sums: GsnrSums) -> GsnrSums;
}

/// The tracked values are used as they are.
#[derive(Clone, Copy)]
struct TrackedSource;

impl Source for TrackedSource {
    #[inline(always)]
    fn deviation(&self, _: f32, spread: f32) -> f32 {
        spread
    }

    fn whole(&self, sums: GsnrSums) -> GsnrSums {
        sums
    }
}

/// Gives the sums of a tensor and its bins.
fn reduce(means: &[f32], spreads: &[f32], source: impl Source, scaling: Scaling) -> (GsnrSums, Vec<u32>) {
    let chunks = means.par_chunks(CHUNK).zip(spreads.par_chunks(CHUNK));
    let chunks: Vec<(GsnrSums, Vec<u32>)> =
        chunks.map(|(means, spreads)| dispatch::run(Reduce { means, spreads, source, scaling })).collect();
    let mut bins = vec![0; BINS];
    for (_, chunk) in &chunks {
        bins.iter_mut().zip(chunk).for_each(|(bin, more)| *bin += more);
    }
    let sums = spec::fold_spans(chunks.len(), |c| chunks[c].0, GsnrSums::add).unwrap_or_default();
    (source.whole(sums), bins)
}

/// Gives the sums of a chunk and its bins. Lane i has the elements i, i + LANES, …, in order: ratios of f32, sums of
/// f64.
struct Reduce<'a, S> {
    means: &'a [f32],
    spreads: &'a [f32],
    source: S,
    scaling: Scaling,
}

impl<S: Source> Work for Reduce<'_, S> {
    type Output = (GsnrSums, Vec<u32>);

    #[inline(always)]
    fn run(self, _: impl InstructionSet) -> (GsnrSums, Vec<u32>) {
        let mut lanes = [GsnrSums::default(); LANES];
        let mut bins = vec![0; BINS];
        let (degrees, one) = (narrow(self.scaling.degrees), narrow(1.0 + self.scaling.ratio_shift));
        for (means, spreads) in self.means.chunks(LANES).zip(self.spreads.chunks(LANES)) {
            for ((lane, &mean), &spread) in lanes.iter_mut().zip(means).zip(spreads) {
                if !mean.is_finite() || !spread.is_finite() {
                    lane.nonfinite += 1;
                    continue;
                }
                lane.squared_means += f64::from(mean) * f64::from(mean);
                lane.spreads += f64::from(spread);
                let deviation = self.source.deviation(mean, spread);
                if deviation > 0.0 {
                    // The square may be below all of f32. The quotient is between: a deviation that is not 0 is at least a
                    // rounding of the squared mean, unless the moments are none of Adam's.
                    let ratio = (mean / deviation * mean * degrees).min(f32::MAX);
                    lane.defined += 1;
                    lane.below_one += u64::from(ratio < one);
                    lane.ratios += f64::from(ratio);
                    bins[bin_of(ratio)] += 1;
                }
            }
        }
        (spec::fold(LANES, |lane| lanes[lane], GsnrSums::add).unwrap_or_default(), bins)
    }
}
