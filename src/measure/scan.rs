//! Counts and extremes: integer work on magnitude bits, exact in any order.

use crate::{
    Element, Record,
    device::cpu::dispatch::InstructionSet,
    dtype::sealed::{Bits, Word},
    spec::TILE,
};

/// Counts and extremes of the magnitude bits of some elements.
#[derive(Clone, Copy)]
pub(super) struct Scan<W> {
    /// Largest magnitude; at or above the pattern of Inf when an element is not finite.
    pub max: W,
    /// Smallest non-zero magnitude minus 1; all ones when there is none. The subtraction wraps a zero to the top, so
    /// that no comparison with zero is needed.
    pub min_nonzero_less_one: W,
    /// Elements equal to 0.
    pub zeros: u64,
    /// Elements below the dead threshold, zeros included.
    pub dead: u64,
}

impl<W: Word> Scan<W> {
    pub(super) fn new() -> Self {
        Self { max: W::default(), min_nonzero_less_one: W::MAX, zeros: 0, dead: 0 }
    }

    /// Adds these elements: at most 65,535 of them, so that a 16-bit count cannot wrap.
    #[inline(always)]
    pub(super) fn add<E: Element + Bits<Word = W>>(&mut self, elements: &[E], dead_bits: W) {
        let (mut max, mut min, mut zeros, mut dead) = (W::default(), W::MAX, W::default(), W::default());
        let one_if = |condition: bool| if condition { W::ONE } else { W::default() };
        for x in elements {
            let magnitude = x.magnitude();
            max = max.max(magnitude);
            min = min.min(magnitude.decrement());
            // With these conditions a count takes two vector instructions. A minimum of 1 and a magnitude takes three,
            // and an unsigned comparison on AVX2 four.
            zeros = zeros.add(one_if(magnitude == W::default()));
            dead = dead.add(one_if(magnitude.is_below(dead_bits)));
        }
        self.max = self.max.max(max);
        self.min_nonzero_less_one = self.min_nonzero_less_one.min(min);
        self.zeros += u64::from(Into::<u32>::into(zeros));
        self.dead += u64::from(Into::<u32>::into(dead));
    }

    /// Adds the elements of a tile, and meanwhile asks for those of the next. This keeps the memory busy while the sums
    /// of this tile are made: without it, the whole took 1.2 to 1.4 times as long. It asks for a quarter of a tile at a
    /// time: fewer requests can be in flight than a tile has lines, and asking for all at once took 1.05 to 1.25 times
    /// as long.
    #[inline(always)]
    pub(super) fn add_tile<E: Element + Bits<Word = W>>(
        &mut self,
        tile: &[E],
        next: &[E],
        dead_bits: W,
        set: impl InstructionSet,
    ) {
        const PART: usize = TILE / 4;
        let mut next = next.chunks(PART);
        for part in tile.chunks(PART) {
            set.prefetch(next.next().unwrap_or_default());
            self.add(part, dead_bits);
        }
    }

    /// Gives the record, without moments, of that many elements: these and the non-finite ones.
    #[inline(always)]
    pub(super) fn record<E: Element + Bits<Word = W>>(&self, count: usize) -> Record {
        Record {
            count: count as u64,
            zero_count: self.zeros,
            dead_count: self.dead,
            max_abs_or_zero: E::widen_bits(self.max.into()),
            min_nonzero_abs_or_infinity: match self.min_nonzero_less_one {
                none if none == W::MAX => f32::INFINITY,
                less_one => E::widen_bits(Into::<u32>::into(less_one) + 1),
            },
            ..Record::EMPTY
        }
    }
}
