//! The sums of a chunk: f32 in pairs within a lane, f64 from there on, in the tree of `spec`.

use crate::spec::{GROUPS, LANES, PACKET, PACKETS, ROW, TILE, WARP};

/// Σx, Σ|x| and Σx² of the values of a chunk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sums {
    pub sum: f64,
    pub magnitude: f64,
    pub squares: f64,
}

/// The three sums of each lane.
struct Lanes {
    sum: [f32; LANES],
    magnitude: [f32; LANES],
    squares: [f32; LANES],
}

impl Lanes {
    const ZERO: Self = Self { sum: [0.0; LANES], magnitude: [0.0; LANES], squares: [0.0; LANES] };

    /// Puts the groups of one warp's tile into its lanes.
    #[inline(always)]
    fn set_tile<E: Copy>(&mut self, warp: usize, tile: &[E; TILE], value: impl Fn(E) -> f32) {
        const RUN: usize = WARP * PACKET;
        const { assert!(TILE == PACKETS * RUN && PACKETS == 8 && PACKET == 8) };
        let (mut sum, mut magnitude, mut squares) = ([0.0; RUN], [0.0; RUN], [0.0; RUN]);
        for i in 0..RUN {
            let x: [f32; PACKETS] = std::array::from_fn(|p| value(tile[p * RUN + i]));
            sum[i] = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
            let a = x.map(f32::abs);
            magnitude[i] = ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
            let s = |p: usize| x[p + 1].mul_add(x[p + 1], x[p] * x[p]);
            squares[i] = (s(0) + s(2)) + (s(4) + s(6));
        }
        let lanes = warp * WARP..(warp + 1) * WARP;
        self.sum[lanes.clone()].copy_from_slice(&sum_slots(&sum));
        self.magnitude[lanes.clone()].copy_from_slice(&sum_slots(&magnitude));
        self.squares[lanes].copy_from_slice(&sum_slots(&squares));
    }

    #[inline(always)]
    fn add(&mut self, other: &Self) {
        for lane in 0..LANES {
            self.sum[lane] += other.sum[lane];
            self.magnitude[lane] += other.magnitude[lane];
            self.squares[lane] += other.squares[lane];
        }
    }
}

/// Neighbours added in pairs, three times over: the PACKET slots of each lane become one.
#[inline(always)]
fn sum_slots(slots: &[f32; WARP * PACKET]) -> [f32; WARP] {
    #[inline(always)]
    fn pairs<const FROM: usize, const TO: usize>(from: &[f32; FROM]) -> [f32; TO] {
        std::array::from_fn(|i| from[2 * i] + from[2 * i + 1])
    }
    pairs::<64, 32>(&pairs::<128, 64>(&pairs::<256, 128>(slots)))
}

/// Lane i plus lane i + 64, then i + 32, down to i + 1, in f64.
#[inline(always)]
fn sum_lanes(lanes: &[f32; LANES]) -> f64 {
    let mut wide = lanes.map(f64::from);
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = wide.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        half /= 2;
    }
    wide[0]
}

/// The sums of `value(x)` over at most one chunk of elements. What lies behind the last element up to the end of its
/// tile is taken to be `padding`, whose value must be 0. `visit` sees each tile's elements while they are near.
#[inline(always)]
pub(super) fn sums<E: Copy>(
    elements: &[E],
    padding: E,
    value: impl Fn(E) -> f32 + Copy,
    mut visit: impl FnMut(&[E]),
) -> Sums {
    const WARPS: usize = ROW / TILE;
    const { assert!(GROUPS == 4) };
    let (tiles, rest) = elements.as_chunks::<TILE>();
    let mut rows = [const { Lanes::ZERO }; GROUPS];
    for (index, tile) in tiles.iter().enumerate() {
        visit(tile);
        rows[index / WARPS].set_tile(index % WARPS, tile, value);
    }
    if !rest.is_empty() {
        visit(rest);
        let mut tile = [padding; TILE];
        tile[..rest.len()].copy_from_slice(rest);
        rows[tiles.len() / WARPS].set_tile(tiles.len() % WARPS, &tile, value);
    }
    let [mut first, second, mut third, fourth] = rows;
    first.add(&second);
    third.add(&fourth);
    first.add(&third);
    let Lanes { sum, magnitude, squares } = &first;
    Sums { sum: sum_lanes(sum), magnitude: sum_lanes(magnitude), squares: sum_lanes(squares) }
}
