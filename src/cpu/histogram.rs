//! Counts of the elements by the upper bits of their magnitudes.

use super::dispatch::{self, Work};
use crate::{Element, Histogram, HostTensor, backend::with_elements, spec::CHUNK};
use bytemuck::Zeroable;
use rayon::prelude::*;

/// Counters of a histogram, in the order of its fields.
const SLOTS: usize = size_of::<Histogram>() / size_of::<u64>();
const INF_SLOT: u16 = 1020;
const NAN_SLOT: u16 = 1021;
const ZERO_SLOT: u16 = 1022;
const _: () = assert!(INF_SLOT as usize == Histogram::BINS);

/// Elements whose slots are worked out together, in vectors, before any is counted.
const BATCH: usize = 256;
/// Copies of each counter: neighbours are often in one bin, and an addition to a counter waits for the one before it.
const COPIES: usize = 8;

/// The histogram of a tensor.
pub(super) fn histogram(tensor: HostTensor<'_>) -> Histogram {
    with_elements!(HostTensor, tensor, elements => {
        elements
            .par_chunks(CHUNK)
            .fold(Histogram::zeroed, |mut to, elements| {
                dispatch::run(Count { elements, to: bytemuck::cast_mut(&mut to) });
                to
            })
            .reduce(Histogram::zeroed, |a, b| a.merge(&b))
    })
}

/// Adds the elements of at most one chunk to the counters.
struct Count<'a, E> {
    elements: &'a [E],
    to: &'a mut [u64; SLOTS],
}

impl<E: Element> Work for Count<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // A chunk has 2^15 elements.
        let mut copies = [[0u16; SLOTS]; COPIES];
        let mut slots = [0; BATCH];
        for batch in self.elements.chunks(BATCH) {
            for (slot, &x) in slots.iter_mut().zip(batch) {
                *slot = slot_of(x);
            }
            let (groups, rest) = slots[..batch.len()].as_chunks::<COPIES>();
            for group in groups {
                for (copy, &slot) in copies.iter_mut().zip(group) {
                    copy[usize::from(slot) % SLOTS] += 1;
                }
            }
            for &slot in rest {
                copies[0][usize::from(slot) % SLOTS] += 1;
            }
        }
        for copy in &copies {
            self.to.iter_mut().zip(copy).for_each(|(count, &more)| *count += u64::from(more));
        }
    }
}

/// Which counter an element adds to.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "eleven bits are left, of which the sign goes")]
fn slot_of<E: Element>(x: E) -> u16 {
    let magnitude: u32 = x.magnitude().into();
    let bin = (x.widen_finite().to_bits() << 1 >> 22) as u16;
    if magnitude > E::INFINITY {
        NAN_SLOT
    } else if magnitude == E::INFINITY {
        INF_SLOT
    } else if magnitude == 0 {
        ZERO_SLOT
    } else {
        bin
    }
}
