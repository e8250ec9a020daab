//! Sums over the pairs of elements of two tensors, in f64, in the order of the kernels.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::{Dot, DotArguments};
use crate::{
    Element, HostTensor,
    device::cpu::{
        dispatch::{self, InstructionSet, Work},
        memory::{Tables, tensor, tensors},
    },
    probe::Other,
    spec::{self, CHUNK, LANES, PACKET, PACKETS, ROW, TILE, WARP},
    tensor::with_elements,
};
use rayon::prelude::*;

const RUN: usize = WARP * PACKET;
const WARPS: usize = LANES / WARP;
/// Sums that stay in registers through a tile.
const TOGETHER: usize = 16;

/// Does as `gradprobe_dot`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn run(a: &DotArguments) {
    // SAFETY: the caller's promise.
    let (tensors, entries) = unsafe { tensors(&a.common) };
    let count = tensors.len();
    // SAFETY: the caller's promise.
    let (others, records): (&[Other], &mut [Dot]) = unsafe { Tables::at(((a.others, count), (a.dots, count))) };
    let pairs = tensors.par_iter().zip(entries).zip(others).zip(records);
    pairs.for_each(|(((&a, entry), b), record)| {
        // SAFETY: the second list has the lengths of the first.
        *record = of_pair(a, unsafe { tensor(b.address, entry.length, b.dtype) });
    });
}

/// Gives the record of two tensors of one length; an empty one where either is absent.
fn of_pair(a: HostTensor<'_>, b: HostTensor<'_>) -> Dot {
    with_elements!(HostTensor, a, a => with_elements!(HostTensor, b, b => {
        let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
        let chunks: Vec<Dot> = chunks.map(|(a, b)| dispatch::run(Multiply { a, b })).collect();
        spec::fold_spans(chunks.len(), |chunk| chunks[chunk], Dot::merge).unwrap_or_default()
    }))
}

/// The sums of each slot of each lane of a warp: element i of a run of packets is slot i % PACKET of lane i / PACKET.
struct Slots {
    dot: [f64; RUN],
    a_squares: [f64; RUN],
    b_squares: [f64; RUN],
}

impl Slots {
    const ZERO: Self = Self { dot: [0.0; RUN], a_squares: [0.0; RUN], b_squares: [0.0; RUN] };

    /// Adds the pairs in which both are finite, and gives the number of the others.
    #[inline(always)]
    fn add_tile<A: Element, B: Element>(&mut self, a: &[A; TILE], b: &[B; TILE], set: impl InstructionSet) -> u32 {
        const { assert!(TILE == PACKETS * RUN) };
        // Loops as short as these are vectorised.
        let (mut x, mut y, mut nonfinite) = ([0.0; TILE], [0.0; TILE], 0);
        A::widen(a, &mut x, set);
        B::widen(b, &mut y, set);
        for i in 0..TILE {
            let finite = x[i].is_finite() && y[i].is_finite();
            x[i] = if finite { x[i] } else { 0.0 };
            y[i] = if finite { y[i] } else { 0.0 };
            nonfinite += u32::from(!finite);
        }
        for first in (0..RUN).step_by(TOGETHER) {
            let [mut dot, mut a_squares, mut b_squares] = [[0.0; TOGETHER]; 3];
            dot.copy_from_slice(&self.dot[first..][..TOGETHER]);
            a_squares.copy_from_slice(&self.a_squares[first..][..TOGETHER]);
            b_squares.copy_from_slice(&self.b_squares[first..][..TOGETHER]);
            for packet in 0..PACKETS {
                for i in 0..TOGETHER {
                    let (x, y) = (x[packet * RUN + first + i], y[packet * RUN + first + i]);
                    let (x, y) = (f64::from(x), f64::from(y));
                    dot[i] = x.mul_add(y, dot[i]);
                    a_squares[i] = x.mul_add(x, a_squares[i]);
                    b_squares[i] = y.mul_add(y, b_squares[i]);
                }
            }
            self.dot[first..][..TOGETHER].copy_from_slice(&dot);
            self.a_squares[first..][..TOGETHER].copy_from_slice(&a_squares);
            self.b_squares[first..][..TOGETHER].copy_from_slice(&b_squares);
        }
        nonfinite
    }

    /// Adds up a lane's slots, in pairs.
    fn lane(&self, lane: usize) -> Dot {
        let s: [Dot; PACKET] = std::array::from_fn(|slot| {
            let i = lane * PACKET + slot;
            Dot { dot: self.dot[i], a_squares: self.a_squares[i], b_squares: self.b_squares[i], ..Dot::default() }
        });
        let pair = |slot: usize| s[slot].merge(&s[slot + 1]);
        pair(0).merge(&pair(2)).merge(&pair(4).merge(&pair(6)))
    }
}

/// Multiplies at most one chunk of each tensor.
struct Multiply<'a, A, B> {
    a: &'a [A],
    b: &'a [B],
}

impl<A: Element, B: Element> Work for Multiply<'_, A, B> {
    type Output = Dot;

    #[inline(always)]
    fn run(self, set: impl InstructionSet) -> Dot {
        const { assert!(WARPS == ROW / TILE) };
        let mut warps = [Slots::ZERO; WARPS];
        let mut nonfinite_count = 0;
        for (index, (a, b)) in self.a.chunks(TILE).zip(self.b.chunks(TILE)).enumerate() {
            let slots = &mut warps[index % WARPS];
            nonfinite_count += u64::from(match (<&[A; TILE]>::try_from(a), <&[B; TILE]>::try_from(b)) {
                (Ok(a), Ok(b)) => slots.add_tile(a, b, set),
                _ => slots.add_tile(&padded(a), &padded(b), set),
            });
        }
        let sums = spec::fold(LANES, |lane| warps[lane / WARP].lane(lane % WARP), Dot::merge).unwrap_or_default();
        Dot { count: self.a.len() as u64, nonfinite_count, ..sums }
    }
}

/// Elements of less than a tile, and zeros.
fn padded<E: Element>(elements: &[E]) -> [E; TILE] {
    let mut tile = [E::zeroed(); TILE];
    tile[..elements.len()].copy_from_slice(elements);
    tile
}
