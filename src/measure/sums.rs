//! The sums of a chunk: f32 in pairs within a lane, f64 from there on, in the tree of `spec`.

use crate::{
    DType, Element,
    device::cpu::dispatch::InstructionSet,
    spec::{GROUPS, LANES, PACKET, PACKETS, ROW, TILE, WARP},
};
use half::bf16;

/// Σx, Σ|x| and Σx² of the values of a chunk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sums {
    pub sum: f64,
    pub magnitude: f64,
    pub squares: f64,
}

/// Elements of a run of packets.
const RUN: usize = WARP * PACKET;
const _: () = assert!(TILE == PACKETS * RUN && PACKETS == 8 && PACKET == 8);

/// The three sums of each slot of a tile; for bf16, of each pair of slots, in the first half. They are kept from tile
/// to tile: new ones would be filled with zeros each time, in three calls.
struct Slots {
    sum: [f32; RUN],
    magnitude: [f32; RUN],
    squares: [f32; RUN],
}

impl Slots {
    const ZERO: Self = Self { sum: [0.0; RUN], magnitude: [0.0; RUN], squares: [0.0; RUN] };

    #[inline(always)]
    fn set<E: Element>(&mut self, tile: &[E; TILE], value: impl Fn(f32) -> f32, set: impl InstructionSet) {
        match E::DTYPE {
            DType::F32 => self.set_f32(as_array(bytemuck::cast_slice(tile)), value),
            DType::BF16 => self.set_bf16(as_array(bytemuck::cast_slice(tile)), value),
            DType::F16 => {
                let mut wide = [0.0; TILE];
                E::widen(tile, &mut wide, set);
                self.set_f32(&wide, value);
            }
        }
    }

    #[inline(always)]
    fn set_f32(&mut self, tile: &[f32; TILE], value: impl Fn(f32) -> f32) {
        for i in 0..RUN {
            (self.sum[i], self.magnitude[i], self.squares[i]) =
                sum_packets(std::array::from_fn(|p| value(tile[p * RUN + i])));
        }
    }

    /// Sums elements in pairs. The first of a pair becomes an f32 by a shift, the second by a mask. They are then added
    /// as neighbours are: 32 instructions less for 64 elements, and half the shuffles of the next stage.
    #[inline(always)]
    fn set_bf16(&mut self, tile: &[[bf16; 2]; TILE / 2], value: impl Fn(f32) -> f32) {
        for i in 0..RUN / 2 {
            let pairs: [[f32; 2]; PACKETS] = std::array::from_fn(|p| {
                let bits: u32 = bytemuck::cast(tile[p * RUN / 2 + i]);
                let bits = if cfg!(target_endian = "big") { bits.rotate_left(16) } else { bits };
                [bits << 16, bits & 0xffff_0000].map(|bits| value(f32::from_bits(bits)))
            });
            let (first, second) = (sum_packets(pairs.map(|pair| pair[0])), sum_packets(pairs.map(|pair| pair[1])));
            self.sum[i] = first.0 + second.0;
            self.magnitude[i] = first.1 + second.1;
            self.squares[i] = first.2 + second.2;
        }
    }
}

/// Sums of one slot's elements in each packet, of their magnitudes and of their squares.
#[inline(always)]
fn sum_packets(x: [f32; PACKETS]) -> (f32, f32, f32) {
    let a = x.map(f32::abs);
    let s = |p: usize| x[p + 1].mul_add(x[p + 1], x[p] * x[p]);
    (
        ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])),
        ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])),
        (s(0) + s(2)) + (s(4) + s(6)),
    )
}

/// Adds neighbours in pairs, three times over: the PACKET slots of each lane become one.
#[inline(always)]
fn sum_slots<E: Element>(slots: &[f32; RUN]) -> [f32; WARP] {
    #[inline(always)]
    fn pairs<const FROM: usize, const TO: usize>(from: &[f32; FROM]) -> [f32; TO] {
        std::array::from_fn(|i| from[2 * i] + from[2 * i + 1])
    }
    let of_pairs: [f32; RUN / 2] = match E::DTYPE {
        DType::F32 | DType::F16 => pairs(slots),
        // They are pairs already.
        DType::BF16 => *as_array(&slots[..RUN / 2]),
    };
    let of_fours: [f32; RUN / 4] = pairs(&of_pairs);
    pairs(&of_fours)
}

/// All the elements of a slice that has that many.
#[inline(always)]
fn as_array<T, const N: usize>(slice: &[T]) -> &[T; N] {
    slice.try_into().expect("as many elements")
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
    fn set_tile<E: Element>(&mut self, warp: usize, slots: &Slots) {
        let lanes = warp * WARP..(warp + 1) * WARP;
        self.sum[lanes.clone()].copy_from_slice(&sum_slots::<E>(&slots.sum));
        self.magnitude[lanes.clone()].copy_from_slice(&sum_slots::<E>(&slots.magnitude));
        self.squares[lanes].copy_from_slice(&sum_slots::<E>(&slots.squares));
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

/// Gives the sums of `value(x)` over at most one chunk of elements. The rest of the last tile is filled with `padding`,
/// whose value must be 0. `visit` sees each tile's elements while they are in the cache, and the next tile's.
#[inline(always)]
pub(super) fn sums<E: Element>(
    elements: &[E],
    padding: E,
    value: impl Fn(f32) -> f32 + Copy,
    mut visit: impl FnMut(&[E], &[E]),
    set: impl InstructionSet,
) -> Sums {
    const WARPS: usize = ROW / TILE;
    const { assert!(GROUPS == 4) };
    let (tiles, rest) = elements.as_chunks::<TILE>();
    let mut rows = [const { Lanes::ZERO }; GROUPS];
    let mut slots = Slots::ZERO;
    for (index, tile) in tiles.iter().enumerate() {
        visit(tile, tiles.get(index + 1).map_or(rest, <[E; TILE]>::as_slice));
        slots.set(tile, value, set);
        rows[index / WARPS].set_tile::<E>(index % WARPS, &slots);
    }
    if !rest.is_empty() {
        visit(rest, &[]);
        let mut tile = [padding; TILE];
        tile[..rest.len()].copy_from_slice(rest);
        slots.set(&tile, value, set);
        rows[tiles.len() / WARPS].set_tile::<E>(tiles.len() % WARPS, &slots);
    }
    let [mut first, second, mut third, fourth] = rows;
    first.add(&second);
    third.add(&fourth);
    first.add(&third);
    let Lanes { sum, magnitude, squares } = &first;
    Sums { sum: sum_lanes(sum), magnitude: sum_lanes(magnitude), squares: sum_lanes(squares) }
}
