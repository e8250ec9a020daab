//! Sums over the pairs of elements of two tensors, in f64, in the order of the kernels.

use super::dispatch::{self, Work};
use crate::{
    Dot, Element, HostTensor,
    backend::with_elements,
    spec::{self, CHUNK, LANES, PACKET, PACKETS, ROW, TILE, WARP},
};
use rayon::prelude::*;

const RUN: usize = WARP * PACKET;
const WARPS: usize = LANES / WARP;

/// The record of two tensors of one length.
pub(super) fn dot(a: HostTensor<'_>, b: HostTensor<'_>) -> Dot {
    with_elements!(HostTensor, a, a => with_elements!(HostTensor, b, b => {
        let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
        let chunks: Vec<Dot> = chunks.map(|(a, b)| dispatch::run(Multiply { a, b })).collect();
        spec::fold_spans(chunks.len(), |chunk| chunks[chunk], Dot::merge).unwrap_or_default()
    }))
}

/// The sums of each slot of each lane of a warp: element i of a run of packets is slot i % PACKET of lane i / PACKET.
struct Slots {
    nonfinite: [u32; RUN],
    dot: [f64; RUN],
    a_squares: [f64; RUN],
    b_squares: [f64; RUN],
}

impl Slots {
    const ZERO: Self = Self { nonfinite: [0; RUN], dot: [0.0; RUN], a_squares: [0.0; RUN], b_squares: [0.0; RUN] };

    #[inline(always)]
    fn add_tile<A: Element, B: Element>(&mut self, a: &[A; TILE], b: &[B; TILE]) {
        const { assert!(TILE == PACKETS * RUN) };
        for i in 0..RUN {
            let (mut nonfinite, mut dot) = (self.nonfinite[i], self.dot[i]);
            let (mut a_squares, mut b_squares) = (self.a_squares[i], self.b_squares[i]);
            for packet in 0..PACKETS {
                let (x, y) = (a[packet * RUN + i], b[packet * RUN + i]);
                let finite = x.magnitude().into() < A::INFINITY && y.magnitude().into() < B::INFINITY;
                let (x, y) = if finite { (x.widen_finite(), y.widen_finite()) } else { (0.0, 0.0) };
                let (x, y) = (f64::from(x), f64::from(y));
                nonfinite += u32::from(!finite);
                dot = x.mul_add(y, dot);
                a_squares = x.mul_add(x, a_squares);
                b_squares = y.mul_add(y, b_squares);
            }
            (self.nonfinite[i], self.dot[i]) = (nonfinite, dot);
            (self.a_squares[i], self.b_squares[i]) = (a_squares, b_squares);
        }
    }

    /// A lane's slots, in pairs.
    fn lane(&self, lane: usize) -> Dot {
        let slot = |slot: usize| {
            let i = lane * PACKET + slot;
            Dot {
                nonfinite_count: self.nonfinite[i].into(),
                dot: self.dot[i],
                a_squares: self.a_squares[i],
                b_squares: self.b_squares[i],
                ..Dot::default()
            }
        };
        spec::fold(PACKET, slot, Dot::merge).unwrap_or_default()
    }
}

/// At most one chunk of each tensor.
struct Multiply<'a, A, B> {
    a: &'a [A],
    b: &'a [B],
}

impl<A: Element, B: Element> Work for Multiply<'_, A, B> {
    type Output = Dot;

    #[inline(always)]
    fn run(self) -> Dot {
        const { assert!(WARPS == ROW / TILE) };
        let mut warps = [Slots::ZERO; WARPS];
        for (index, (a, b)) in self.a.chunks(TILE).zip(self.b.chunks(TILE)).enumerate() {
            let slots = &mut warps[index % WARPS];
            match (<&[A; TILE]>::try_from(a), <&[B; TILE]>::try_from(b)) {
                (Ok(a), Ok(b)) => slots.add_tile(a, b),
                _ => slots.add_tile(&padded(a), &padded(b)),
            }
        }
        let sums = spec::fold(LANES, |lane| warps[lane / WARP].lane(lane % WARP), Dot::merge).unwrap_or_default();
        Dot { count: self.a.len() as u64, ..sums }
    }
}

/// Elements of less than a tile, and zeros.
fn padded<E: Element>(elements: &[E]) -> [E; TILE] {
    let mut tile = [E::zeroed(); TILE];
    tile[..elements.len()].copy_from_slice(elements);
    tile
}
