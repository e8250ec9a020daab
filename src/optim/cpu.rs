//! The optimizers on the CPU: `kernels/optimizer.cu` has the same sums in the same order.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::{
    OptimizerArguments, OptimizerTensor, Rule, UpdateRecord,
    rules::{AdamW, Direction, Lion, Momentum, Sgd},
};
use crate::{
    DType, Element, HostTensor, HostTensorMut, StepOutputs,
    clip::{ClipHeader, Clipping, divisor},
    device::cpu::{
        dispatch::{self, InstructionSet, Work},
        memory::{Tables, tensor_mut, tensors},
    },
    probe::Other,
    spec::{self, CHUNK, LANES, PACKET, ROW, TILE, WARP},
    tensor::with_elements,
};
use rayon::prelude::*;

const RUN: usize = WARP * PACKET;
const WARPS: usize = ROW / TILE;
/// Elements of a run that are in registers together.
const TOGETHER: usize = 16;
/// Elements that are asked for before they are needed, across tiles. The sums leave the machine no room to look so far
/// ahead by itself: from memory, on one core of family 26, an element takes 0.59 ns with it and 0.85 without; without
/// the sums 0.50.
const AHEAD: usize = 512;
type Tile = [f32; TILE];

/// Does as `gradprobe_optimizer`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn run(a: &OptimizerArguments) {
    let count = a.common.tensor_count as usize;
    // SAFETY: the caller's promise.
    let (outputs, updates): (&[StepOutputs], &mut [UpdateRecord]) =
        unsafe { Tables::at(((a.common.outputs, 1), (a.updates, count))) };
    let outputs = &outputs[0];
    if outputs.skip != 0 {
        updates.fill(UpdateRecord::default());
        return;
    }
    // SAFETY: the caller's promise.
    let (states, others, coefficients): (&mut [OptimizerTensor], &[Other], &[f32]) =
        unsafe { Tables::at(((a.states, count), (a.weights, count), (a.coefficients, count))) };
    // SAFETY: the caller's promise.
    let (learning_rate, header): (&[f32], &[ClipHeader]) =
        unsafe { Tables::at(((a.learning_rate, 1), (a.clip_state, 1))) };
    // SAFETY: the caller's promise.
    let (gradients, entries) = unsafe { tensors(&a.common) };
    let (learning_rate, how) = (learning_rate[0], Clipping::of(outputs, header));
    let unscale = 1.0 / divisor(outputs.loss_scale);
    let tensors = gradients.into_par_iter().zip(entries).zip(others).zip(states).zip(updates).zip(coefficients);
    // No chunk would set the record of a tensor without elements.
    let tensors = tensors.filter(|(((((_, entry), _), _), _), _)| entry.length > 0);
    tensors.for_each(|(((((gradient, entry), other), state), update), coefficient)| {
        let count = gradient.len();
        // State that is not kept has no memory, or its address is another tensor's.
        let kept = |is_kept: bool, address: u64, offset: u64| {
            (address + offset * size_of::<f32>() as u64, if is_kept { count } else { 0 })
        };
        let moments = Rule::moments_of(a.rule);
        // SAFETY: the caller's promise; each tensor has other memory.
        let (first, second, masters): (&mut [f32], &mut [f32], &mut [f32]) = unsafe {
            Tables::at((
                kept(moments > 0, a.first, state.offset),
                kept(moments > 1, a.second, state.offset),
                kept(other.dtype != DType::F32.code(), a.masters, state.master_offset),
            ))
        };
        let tensor = Moved {
            gradient,
            // SAFETY: weights are as long as their gradients, and share no memory with any or with one another.
            weight: unsafe { tensor_mut(other.address, entry.length, other.dtype) },
            first,
            second,
            masters,
            how: how.of_tensor(outputs, *coefficient),
            rate: learning_rate * state.learning_rate_factor,
            decay: state.weight_decay,
            unscale,
        };
        *update = tensor.update(a, state, outputs.step);
        if count > 0 {
            *state = state.next(a.betas);
        }
    });
}

/// A tensor, its state, and its update.
struct Moved<'a> {
    gradient: HostTensor<'a>,
    weight: HostTensorMut<'a>,
    first: &'a mut [f32],
    second: &'a mut [f32],
    masters: &'a mut [f32],
    how: Clipping,
    /// Learning rate.
    rate: f32,
    decay: f32,
    /// 1 / loss scale.
    unscale: f64,
}

impl Moved<'_> {
    fn update(self, a: &OptimizerArguments, state: &OptimizerTensor, step: u64) -> UpdateRecord {
        let (rate, unscale, has_gradient) = (f64::from(self.rate), self.unscale, !self.gradient.is_empty());
        let [[beta1, rest1], [beta2, rest2]] = a.shares;
        let sums = match a.rule {
            rule if rule == Rule::AdamW as u32 => {
                let [root_factor, epsilon_factor] = state.corrections;
                self.by(AdamW { beta1, rest1, beta2, rest2, root_factor, epsilon: a.epsilon * epsilon_factor })
            }
            rule if rule == Rule::Momentum as u32 => self.by(Momentum::<false> { momentum: beta1 }),
            rule if rule == Rule::Nesterov as u32 => self.by(Momentum::<true> { momentum: beta1 }),
            rule if rule == Rule::Sgd as u32 => self.by(Sgd),
            _ => self.by(Lion { beta1, rest1, beta2, rest2 }),
        };
        let plain = |sum: f64| if sum.is_nan() { f64::NAN } else { sum };
        UpdateRecord {
            step,
            steps: state.steps.wrapping_add(has_gradient.into()),
            lost: if rate == 0.0 { 0 } else { sums.lost },
            update_squares: plain(sums.update_squares * rate * rate),
            weight_squares: plain(sums.weight_squares),
            dot: plain(sums.dot * rate * unscale),
            first_squares: plain(sums.first_squares),
            second_sum: plain(sums.second_sum),
            ..sums
        }
    }

    /// Moves all chunks by this rule.
    fn by<R: Direction>(self, rule: R) -> UpdateRecord {
        let Self { gradient, weight, first, second, masters, how, rate, decay, .. } = self;
        with_elements!(HostTensor, gradient, gradients => with_elements!(HostTensorMut, weight, weights => {
            let count = gradients.len().div_ceil(CHUNK);
            let state = chunks(first, count).zip(chunks(second, count)).zip(chunks(masters, count));
            let pairs = gradients.par_chunks(CHUNK).zip(weights.par_chunks_mut(CHUNK));
            let chunks = pairs.zip(state).map(|((gradients, weights), ((first, second), masters))| {
                let lists = Lists { gradients, weights, first, second, masters };
                dispatch::run(Move { lists, mover: Mover { how, rate, decay, rule } })
            });
            let chunks: Vec<UpdateRecord> = chunks.collect();
            spec::fold_spans(chunks.len(), |chunk| chunks[chunk], UpdateRecord::merge).unwrap_or_default()
        }))
    }
}

/// Gives the chunks of a list, as many as there are; those of an absent list are empty.
fn chunks(kept: &mut [f32], count: usize) -> impl IndexedParallelIterator<Item = &mut [f32]> {
    let mut chunks: Vec<&mut [f32]> = kept.chunks_mut(CHUNK).collect();
    chunks.resize_with(count, Default::default);
    chunks.into_par_iter()
}

/// Moves at most one chunk.
struct Move<'a, G, W, R> {
    lists: Lists<'a, G, W>,
    mover: Mover<R>,
}

/// The values of a chunk's elements, or the rest of them. Absent values are empty.
struct Lists<'a, G, W> {
    gradients: &'a [G],
    weights: &'a mut [W],
    first: &'a mut [f32],
    second: &'a mut [f32],
    masters: &'a mut [f32],
}

impl<'a, G: Element, W: Element> Lists<'a, G, W> {
    /// Takes the first elements of each list.
    #[inline(always)]
    fn take(&mut self, count: usize) -> Self {
        fn of<'a, T>(list: &mut &'a mut [T], count: usize) -> &'a mut [T] {
            let count = count.min(list.len());
            let (taken, rest) = std::mem::take(list).split_at_mut(count);
            *list = rest;
            taken
        }
        let (gradients, rest) = self.gradients.split_at(count);
        self.gradients = rest;
        Self {
            gradients,
            weights: of(&mut self.weights, count),
            first: of(&mut self.first, count),
            second: of(&mut self.second, count),
            masters: of(&mut self.masters, count),
        }
    }

    /// Borrows the same lists again.
    fn again(&mut self) -> Lists<'_, G, W> {
        let Self { gradients, weights, first, second, masters } = self;
        Lists { gradients, weights, first, second, masters }
    }

    /// Copies as many elements as the shorter of both has.
    fn copy_to(&self, to: &mut Lists<'_, G, W>) {
        fn of<T: Copy>(from: &[T], to: &mut [T]) {
            let count = from.len().min(to.len());
            to[..count].copy_from_slice(&from[..count]);
        }
        of(self.weights, to.weights);
        of(self.first, to.first);
        of(self.second, to.second);
        of(self.masters, to.masters);
    }
}

impl<G: Element, W: Element, R: Direction> Work for Move<'_, G, W, R> {
    type Output = UpdateRecord;

    #[inline(always)]
    fn run(self, set: impl InstructionSet) -> UpdateRecord {
        let Self { mut lists, mover } = self;
        let count = lists.gradients.len();
        let (mut sums, mut room) = (Sums::ZERO, Room::default());
        for warp in (0..count / TILE).map(|tile| tile % WARPS) {
            mover.tile(&mut lists, &mut room, &mut sums, Part { warp, elements: TILE }, set);
        }
        if !lists.gradients.is_empty() {
            // The rest are zeros, which stay zeros.
            let (mut gradients, mut weights) = ([G::ZERO; TILE], [W::ZERO; TILE]);
            let [mut first, mut second, mut masters] = [[0.0; TILE]; 3];
            gradients[..lists.gradients.len()].copy_from_slice(lists.gradients);
            let mut tile = Lists {
                gradients: &gradients,
                weights: &mut weights,
                first: &mut first,
                second: &mut second,
                masters: &mut masters,
            };
            lists.copy_to(&mut tile);
            let part = Part { warp: count / TILE % WARPS, elements: lists.gradients.len() };
            mover.tile(&mut tile.again(), &mut room, &mut sums, part, set);
            tile.copy_to(&mut lists);
        }
        sums.record(count)
    }
}

/// The values that all elements of a tensor share.
#[derive(Clone, Copy)]
struct Mover<R> {
    how: Clipping,
    /// Learning rate.
    rate: f32,
    decay: f32,
    rule: R,
}

/// The place of a tile, and the number of its elements that are no padding.
#[derive(Clone, Copy)]
struct Part {
    warp: usize,
    elements: usize,
}

/// The sums of a tile, in whole lines: a tenth faster with vectors of a line. They are not a multiple of 4 KiB apart,
/// where loads may wait for stores to other sums.
#[repr(align(64))]
struct Slots([[f32; RUN + TOGETHER]; 5]);

/// Sums of directions' and weights' squares, of directions times gradients, of the first moment's squares, and of the second.
const UPDATE: usize = 0;
const WEIGHT: usize = 1;
const DOT: usize = 2;
const FIRST: usize = 3;
const SECOND: usize = 4;

impl<R: Direction> Mover<R> {
    /// Takes a whole tile off the lists, that of a warp.
    #[inline(always)]
    fn tile<G: Element, W: Element>(
        &self,
        lists: &mut Lists<'_, G, W>,
        room: &mut Room,
        sums: &mut Sums,
        part: Part,
        set: impl InstructionSet,
    ) {
        let Lists { gradients, weights, first, second, masters } = lists.take(TILE);
        let (gradient_lines, weight_lines) = (gradients.as_ptr(), weights.as_ptr());
        let kept_lines = [first.as_ptr(), second.as_ptr(), masters.as_ptr()];
        let is_kept = [R::MOMENTS > 0, R::MOMENTS > 1, W::DTYPE != DType::F32];
        let ask = move |element: usize| {
            set.prefetch_line(gradient_lines.wrapping_add(element + AHEAD));
            set.prefetch_line(weight_lines.wrapping_add(element + AHEAD));
            for (lines, _) in kept_lines.into_iter().zip(is_kept).filter(|(_, is_kept)| *is_kept) {
                set.prefetch_line(lines.wrapping_add(element + AHEAD));
            }
        };
        let Room { wide, taken, stored, first: none1, second: none2 } = room;
        let first: &mut Tile = first.try_into().unwrap_or_else(|_| tile_of(none1));
        let second: &mut Tile = second.try_into().unwrap_or_else(|_| tile_of(none2));
        let gradients: &Tile = if G::DTYPE == DType::F32 {
            bytemuck::cast_slice(gradients).try_into().expect("a tile")
        } else {
            let wide = tile_of(wide);
            G::widen(gradients, wide, set);
            wide
        };
        if W::DTYPE == DType::F32 {
            let kept: &mut Tile = bytemuck::cast_slice_mut(weights).try_into().expect("a tile");
            self.move_tile::<true>(gradients, taken, kept, first, second, sums, part, ask);
            sums.count_nonfinite(kept, part.warp);
            return;
        }
        let (kept, stored): (&mut Tile, &mut Tile) = (masters.try_into().expect("a tile"), tile_of(stored));
        begin_anew(kept, weights, stored, set);
        self.move_tile::<false>(gradients, taken, kept, first, second, sums, part, ask);
        W::narrow(kept, weights, set);
        W::widen(weights, stored, set);
        let mut slots = [0.0; RUN];
        for packet in stored.as_chunks::<RUN>().0 {
            for (slot, weight) in slots.iter_mut().zip(packet) {
                *slot = weight.mul_add(*weight, *slot);
            }
        }
        sums.add(WEIGHT, &slots, part.warp);
        sums.count_nonfinite(stored, part.warp);
    }

    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "what a tile has")]
    fn move_tile<const STORED: bool>(
        &self,
        gradients: &Tile,
        taken: &mut Vec<(f32, f32)>,
        kept: &mut Tile,
        first: &mut Tile,
        second: &mut Tile,
        sums: &mut Sums,
        part: Part,
        ask: impl Fn(usize),
    ) {
        let Clipping { coefficient, limit, zero_nonfinite } = self.how;
        if zero_nonfinite || limit < f32::INFINITY {
            let taken = tile_of(taken);
            self.take(gradients, taken);
            self.runs::<STORED>(|i| taken[i], kept, first, second, sums, part, ask);
        } else {
            let product = |i: usize| (gradients[i], gradients[i] * coefficient);
            self.runs::<STORED>(product, kept, first, second, sums, part, ask);
        }
    }

    /// Gives the measured and the taken value of gradients, where that is more than a product.
    #[inline(always)]
    fn take(&self, gradients: &Tile, taken: &mut [(f32, f32); TILE]) {
        for (x, to) in gradients.iter().zip(taken) {
            let measured = if self.how.zero_nonfinite && !x.is_finite() { 0.0 } else { *x };
            *to = (measured, self.how.taken(*x));
        }
    }

    /// Moves the state of a tile's weights. `gradient` gives the measured and the taken value of each; `ask` is told
    /// the place, to ask for later memory. With `STORED` the weights are the state themselves, and their squares are
    /// added up too.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "what a tile has")]
    fn runs<const STORED: bool>(
        &self,
        gradient: impl Fn(usize) -> (f32, f32),
        kept: &mut Tile,
        first: &mut Tile,
        second: &mut Tile,
        sums: &mut Sums,
        part: Part,
        ask: impl Fn(usize),
    ) {
        let (rate, decay) = (-self.rate, self.decay);
        let Slots(slots) = &mut Slots([[0.0; RUN + TOGETHER]; 5]);
        let mut lost = [0u32; TOGETHER];
        for run in (0..part.elements).step_by(RUN) {
            for lane in (0..RUN).step_by(TOGETHER) {
                ask(run + lane);
                // Copies, so that no two of the lists can be the same memory.
                let at = run + lane..run + lane + TOGETHER;
                let of = |list: &Tile| -> [f32; TOGETHER] { list[at.clone()].try_into().expect("so many") };
                let (mut w, mut m, mut v) = (of(kept), of(first), of(second));
                for i in 0..TOGETHER {
                    let ((measured, taken), slot) = (gradient(run + lane + i), lane + i);
                    let before = w[i];
                    let direction = decay.mul_add(before, self.rule.direction(taken, &mut m[i], &mut v[i]));
                    w[i] = rate.mul_add(direction, before);
                    slots[UPDATE][slot] = direction.mul_add(direction, slots[UPDATE][slot]);
                    slots[DOT][slot] = direction.mul_add(measured, slots[DOT][slot]);
                    if STORED {
                        slots[WEIGHT][slot] = w[i].mul_add(w[i], slots[WEIGHT][slot]);
                    }
                    if R::MOMENTS > 1 {
                        slots[FIRST][slot] = m[i].mul_add(m[i], slots[FIRST][slot]);
                        slots[SECOND][slot] += v[i];
                    }
                    lost[i] += u32::from(w[i] == before && direction != 0.0);
                }
                kept[at.clone()].copy_from_slice(&w);
                if R::MOMENTS > 0 {
                    first[at.clone()].copy_from_slice(&m);
                }
                if R::MOMENTS > 1 {
                    second[at].copy_from_slice(&v);
                }
            }
        }
        for (sum, slots) in slots.iter().enumerate() {
            sums.add(sum, &slots[..RUN], part.warp);
        }
        sums.lost += lost.iter().map(|&lost| u64::from(lost)).sum::<u64>();
    }
}

/// The sums of the lanes over a chunk.
struct Sums {
    lanes: [[f64; LANES]; 5],
    lost: u64,
    nonfinite_count: u64,
}

impl Sums {
    const ZERO: Self = Self { lanes: [[0.0; LANES]; 5], lost: 0, nonfinite_count: 0 };

    /// Adds a tile's slots to the lanes of a warp. They merge in pairs.
    #[inline(always)]
    fn add(&mut self, sum: usize, slots: &[f32], warp: usize) {
        let mut tile = [0.0; WARP];
        for (tile, s) in tile.iter_mut().zip(slots.as_chunks::<PACKET>().0) {
            *tile = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
        }
        for (lane, tile) in self.lanes[sum][warp * WARP..][..WARP].iter_mut().zip(&tile) {
            *lane += f64::from(*tile);
        }
    }

    /// Counts the weights of a tile that are not finite, if there are any in its warp.
    #[inline(always)]
    fn count_nonfinite(&mut self, weights: &Tile, warp: usize) {
        if !self.lanes[WEIGHT][warp * WARP..][..WARP].iter().all(|sum| sum.is_finite()) {
            self.nonfinite_count += weights.iter().filter(|weight| !weight.is_finite()).count() as u64;
        }
    }

    #[inline(always)]
    fn record(&self, count: usize) -> UpdateRecord {
        let sum = |of: usize| spec::fold_lanes(self.lanes[of]);
        UpdateRecord {
            count: count as u64,
            lost: self.lost,
            nonfinite_count: self.nonfinite_count,
            update_squares: sum(UPDATE),
            weight_squares: sum(WEIGHT),
            dot: sum(DOT),
            first_squares: sum(FIRST),
            second_sum: sum(SECOND),
            ..UpdateRecord::default()
        }
    }
}

/// Workspace for a tile.
#[derive(Default)]
struct Room {
    /// Gradients of 16 bits.
    wide: Vec<f32>,
    /// Measured and taken values of gradients.
    taken: Vec<(f32, f32)>,
    /// Weights of 16 bits.
    stored: Vec<f32>,
    /// Stands for moments that do not exist.
    first: Vec<f32>,
    second: Vec<f32>,
}

fn tile_of<T: Copy + Default>(room: &mut Vec<T>) -> &mut [T; TILE] {
    room.resize(TILE, T::default());
    room.as_mut_slice().try_into().expect("a tile")
}

/// Starts a master anew where its weight is no longer the nearest value: the weight was set from outside.
#[inline(always)]
fn begin_anew<W: Element>(masters: &mut Tile, weights: &[W], stored: &mut Tile, set: impl InstructionSet) {
    let mut nearest = [W::ZERO; TILE];
    W::narrow(masters, &mut nearest, set);
    W::widen(weights, stored, set);
    for (((master, nearest), weight), stored) in masters.iter_mut().zip(&nearest).zip(weights).zip(&*stored) {
        *master = if nearest.bits() == weight.bits() { *master } else { *stored };
    }
}
