//! Counts of the elements by the upper bits of their magnitudes.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::{Histogram, HistogramArguments};
use crate::{
    DType, Element, HostTensor,
    device::cpu::{
        dispatch::{self, InstructionSet, Work},
        memory::{Tables, tensors},
    },
    spec::CHUNK,
    tensor::with_elements,
};
use bytemuck::Zeroable;
use rayon::prelude::*;
use std::mem::offset_of;

/// Counters of a histogram, in the order of its fields.
const SLOTS: usize = size_of::<Histogram>() / size_of::<u64>();
const INF_SLOT: usize = offset_of!(Histogram, inf_count) / size_of::<u64>();
const NAN_SLOT: usize = offset_of!(Histogram, nan_count) / size_of::<u64>();
const ZERO_SLOT: usize = offset_of!(Histogram, zero_count) / size_of::<u64>();

/// Elements whose bins are found together, in vectors, before any is counted.
const BATCH: usize = 1024;
const HALF: usize = BATCH / 2;
/// Elements counted before the counters are added up.
const PART: usize = 8 * CHUNK;
/// Bins of the window in which elements are counted two at a time.
const WINDOW: u16 = 128;
/// The number of places, an index of seven bits.
const PLACES: usize = 1 << 7;
const _: () = assert!(PLACES == WINDOW as usize);
/// Bins of the window above the largest magnitude known when it is chosen.
const HEADROOM: u16 = 8;
/// For batches outside the window: copies of each counter, side by side. Neighbours are often in one bin, and an
/// addition to a counter waits for the one before it: with 4, 8, 16 and 32 copies an element of bf16 took 0.60, 0.38,
/// 0.33 and 0.7 ns.
const COPIES: usize = 16;
const _: () = assert!(PART / COPIES <= u16::MAX as usize);

/// Does as `gradprobe_histogram`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn run(a: &HistogramArguments) {
    // SAFETY: the caller's promise.
    let (tensors, entries) = unsafe { tensors(&a.common) };
    let count = if a.one_histogram != 0 { 1 } else { tensors.len() };
    // SAFETY: the caller's promise.
    let histograms: &mut [Histogram] = unsafe { Tables::at((a.histograms, count)) };
    if a.one_histogram != 0 {
        let counted = tensors.par_iter().zip(entries).filter(|(_, entry)| entry.is_uncounted == 0);
        let each = counted.map(|(&tensor, _)| of_tensor(tensor));
        histograms[0] = each.reduce(Histogram::zeroed, |a, b| a.merge(&b));
    } else {
        tensors.par_iter().zip(histograms).for_each(|(&tensor, histogram)| *histogram = of_tensor(tensor));
    }
}

/// Gives the histogram of a tensor.
fn of_tensor(tensor: HostTensor<'_>) -> Histogram {
    with_elements!(HostTensor, tensor, elements => {
        elements
            .par_chunks(PART)
            .fold(Histogram::zeroed, |mut to, elements| {
                dispatch::run(Count { elements, to: bytemuck::cast_mut(&mut to) });
                to
            })
            .reduce(Histogram::zeroed, |a, b| a.merge(&b))
    })
}

/// Adds at most [`PART`] elements to the counters.
struct Count<'a, E> {
    elements: &'a [E],
    to: &'a mut [u64; SLOTS],
}

impl<E: Element> Work for Count<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run(self, set: impl InstructionSet) {
        let (batches, rest) = self.elements.as_chunks::<BATCH>();
        let (mut pairs, mut copies, mut zeros) = (None, None, 0);
        let mut places = [0u64; HALF / 2];
        for (index, batch) in batches.iter().enumerate() {
            set.prefetch(batches.get(index + 1).map_or(rest, <[E; BATCH]>::as_slice));
            let first = pairs.as_ref().map_or(0, |pairs: &Pairs| pairs.first);
            let mut seen = see(batch, first, &mut places, set);
            if !seen.is_finite {
                batch.iter().for_each(|&x| self.to[slot_of(x)] += 1);
                continue;
            }
            if seen.is_zero {
                zeros += BATCH as u64;
                continue;
            }
            let pairs = match &mut pairs {
                Some(pairs) => pairs,
                // The window begins at the first elements that are not 0.
                none => {
                    let pairs = none.insert(Pairs::up_to(seen.last + HEADROOM));
                    seen = see(batch, pairs.first, &mut places, set);
                    pairs
                }
            };
            if pairs.has(&seen) {
                pairs.count::<E>(&places, &seen);
            } else {
                copies.get_or_insert_with(Copies::new).count(batch, set);
            }
        }
        rest.iter().for_each(|&x| self.to[slot_of(x)] += 1);
        if let Some(pairs) = pairs {
            pairs.add_to(self.to);
        }
        if let Some(copies) = copies {
            copies.add_to(self.to);
        }
        self.to[ZERO_SLOT] += zeros;
    }
}

/// The range of a batch's magnitudes.
struct Seen {
    is_finite: bool,
    is_zero: bool,
    /// Bin of the smallest that is not 0, or the one before it where that is the first in its bin; beyond all bins
    /// without any.
    least: u16,
    /// Bin of the largest.
    last: u16,
}

/// Finds the places of a batch's elements in the window that begins at bin `first`, two in one word: element i in its
/// lower seven bits, and element i + HALF above. An element in that bin or below is at 0. One of `places` holds four
/// words of 16 bits, or two larger ones: the compiler would take an array of words out of vectors one by one.
#[inline(always)]
fn see<E: Element>(batch: &[E; BATCH], first: u16, places: &mut [u64; HALF / 2], set: impl InstructionSet) -> Seen {
    /// For words of that type, with the bin in the upper bits of the magnitude.
    macro_rules! see {
        ($word:ty, $bits:expr, $places:expr, $shift:literal, $infinity:expr) => {{
            let (bits, places): (&[$word], &mut [$word]) =
                (bytemuck::cast_slice($bits), bytemuck::cast_slice_mut($places));
            let (low, high) = bits.split_at(HALF);
            let (mut max, mut least) = (0, <$word>::MAX);
            for ((low, high), place) in low.iter().zip(high).zip(places) {
                let [low, high] = [low, high].map(|bits| bits & (<$word>::MAX >> 1));
                max = max.max(low).max(high);
                // As in the scan of the measurement: 0 becomes the largest.
                least = least.min(low.wrapping_sub(1)).min(high.wrapping_sub(1));
                let [low, high] = [low, high].map(|bits| (bits >> $shift).saturating_sub(<$word>::from(first)));
                *place = low | high << 7;
            }
            Seen {
                is_finite: max < $infinity,
                is_zero: max == 0,
                least: (least >> $shift) as u16,
                last: (max >> $shift) as u16,
            }
        }};
    }
    match E::DTYPE {
        DType::BF16 => see!(u16, batch, &mut places[..HALF / 4], 5, 0x7f80),
        DType::F32 => see!(u32, batch, places, 21, 0x7f80_0000),
        DType::F16 => {
            let mut wide = [0.0; BATCH];
            E::widen(batch, &mut wide, set);
            see!(u32, &wide, places, 21, 0x7f80_0000)
        }
    }
}

/// Counts pairs of elements by the bins of both. One addition, which is a load and a store, then counts two elements,
/// and rarely waits for the one before: neighbours are often in one bin, but seldom two pairs.
struct Pairs {
    /// The bin at which the window begins. It is not in the window: zeros have its place.
    first: u16,
    /// Bins that were counted lie from `least` to `last`.
    least: u16,
    last: u16,
    counters: [u32; PLACES * PLACES],
}

impl Pairs {
    /// Makes a window whose last bin is this one, or a later one where there are too few below.
    #[inline(always)]
    fn up_to(last: u16) -> Self {
        let first = last.saturating_sub(WINDOW - 1);
        Self { first, least: u16::MAX, last: 0, counters: [0; PLACES * PLACES] }
    }

    /// Whether all non-zero elements of a batch are in the window.
    #[inline(always)]
    fn has(&self, seen: &Seen) -> bool {
        seen.least > self.first && seen.last < self.first + WINDOW
    }

    /// Counts such a batch.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "14 bits are left")]
    fn count<E: Element>(&mut self, places: &[u64; HALF / 2], seen: &Seen) {
        (self.least, self.last) = (self.least.min(seen.least), self.last.max(seen.last));
        let mut count = |place: u64| self.counters[place as usize % (PLACES * PLACES)] += 1;
        match E::DTYPE {
            DType::BF16 => places[..HALF / 4].iter().for_each(|places| (0..4).for_each(|i| count(places >> (16 * i)))),
            DType::F32 | DType::F16 => places.iter().for_each(|places| (0..2).for_each(|i| count(places >> (32 * i)))),
        }
    }

    /// Adds all up. Leaves out rows and columns outside the counted range: they are most.
    #[inline(always)]
    fn add_to(&self, to: &mut [u64; SLOTS]) {
        let first = usize::from(self.first);
        let places = usize::from(self.least).saturating_sub(first)..(usize::from(self.last) + 1).saturating_sub(first);
        let mut counts = [0u64; PLACES];
        for (high, row) in self.counters.as_chunks::<PLACES>().0.iter().enumerate() {
            if high != 0 && !places.contains(&high) {
                continue;
            }
            for (count, &pairs) in counts.iter_mut().zip(row).take(places.end) {
                *count += u64::from(pairs);
            }
            counts[high] += row.iter().take(places.end).map(|&pairs| u64::from(pairs)).sum::<u64>();
        }
        to[ZERO_SLOT] += counts[0];
        for (to, count) in to[first..].iter_mut().zip(counts).skip(1) {
            *to += count;
        }
    }
}

/// Counters of all bins, each [`COPIES`] times; zeros in the first bin.
struct Copies {
    counters: [u16; SLOTS * COPIES],
    zeros: u64,
}

impl Copies {
    #[inline(always)]
    fn new() -> Self {
        Self { counters: [0; SLOTS * COPIES], zeros: 0 }
    }

    /// Counts a batch of finite elements.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "a few copies, and places of 16 bits")]
    fn count<E: Element>(&mut self, batch: &[E; BATCH], set: impl InstructionSet) {
        let mut wide = [0.0; BATCH];
        E::widen(batch, &mut wide, set);
        let mut words = [0u64; BATCH / 4];
        let places: &mut [u16] = bytemuck::cast_slice_mut(&mut words);
        let mut zeros = 0u32;
        for (place, x) in places.iter_mut().zip(&wide) {
            zeros += u32::from(*x == 0.0);
            *place = bin_of(*x) * COPIES as u16;
        }
        self.zeros += u64::from(zeros);
        for words in words.as_chunks::<{ COPIES / 4 }>().0 {
            for copy in 0..COPIES {
                let place = (words[copy / 4] >> (16 * (copy % 4))) as usize;
                self.counters[(place | copy) % (SLOTS * COPIES)] += 1;
            }
        }
    }

    #[inline(always)]
    fn add_to(&self, to: &mut [u64; SLOTS]) {
        for (count, copies) in to.iter_mut().zip(self.counters.as_chunks::<COPIES>().0) {
            *count += copies.iter().map(|&count| u64::from(count)).sum::<u64>();
        }
        to[0] -= self.zeros;
        to[ZERO_SLOT] += self.zeros;
    }
}

/// The bin of a finite value.
#[inline(always)]
fn bin_of(x: f32) -> u16 {
    (x.to_bits() << 1 >> 22) as u16
}

/// Gives the counter of an element of any value.
#[inline(always)]
fn slot_of<E: Element>(x: E) -> usize {
    match x.magnitude().into() {
        0 => ZERO_SLOT,
        nan if nan > E::INFINITY => NAN_SLOT,
        infinity if infinity == E::INFINITY => INF_SLOT,
        _ => bin_of(x.widen_finite()).into(),
    }
}
