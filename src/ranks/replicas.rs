//! The comparison of replicas, by sums of integers that do not grow with the number of ranks.
//!
//! A tensor's bits become one integer of 64 bits, its fingerprint. Each rank that holds it multiplies that by a factor
//! of its own, and the factors of all of them add up to 0. So where the fingerprints are the same, the products of all
//! ranks, and of all tensors, add up to 0 modulo 2^64. Where one differs, they add up to its difference times its
//! rank's factor. One word does this for all tensors and layouts. A second word, with other factors, names the rank if
//! it is one: only that rank has factors with the ratio of the two words. A third word, with the first factors times
//! one of the tensor's, names the tensor. The ranks' state is compared in the same way.
//!
//! A rank that differs alone is overlooked when its difference times its factor is a multiple of 2^64: one difference
//! in 2^60, and none of a single bit. Of two ranks none can tell which is right.

use crate::{
    HostTensor, StepOutputs,
    device::cpu::memory::{Tables, tensors},
    probe::Common,
    spec::{CHUNK, PACKET},
    tensor::with_elements,
};
use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;

/// The sums over all ranks, which are 0 when the ranks agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct CheckSums {
    pub state: [u64; 2],
    pub replicas: [u64; 3],
    /// Number of ranks that have added to it.
    pub ranks: u64,
}

/// The factors of a tensor's fingerprint.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Factors {
    pub rank: [u64; 2],
    pub tensor: u64,
    pub reserved: u64,
}

/// The arguments of [`Kernel::Fingerprint`](crate::device::Kernel::Fingerprint).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct FingerprintArguments {
    pub common: Common,
    /// One u64 a chunk, and behind them one a chunk of the weights.
    pub fingerprints: u64,
    /// [`Factors`] of the tensors, and behind them of their weights.
    pub factors: u64,
    /// The [`CheckSums`] to add to.
    pub check: u64,
    /// Whether the weights are read as well.
    pub weights: u32,
    pub reserved: u32,
}
// The other side is in kernels/arguments.cuh and kernels/fingerprint.cu.
const _: () = assert!(size_of::<CheckSums>() == 48 && size_of::<FingerprintArguments>() == 104);

impl CheckSums {
    /// Whether all ranks have added to it. Where one has aborted, the collective ends early. Before the first step
    /// nothing can be late.
    pub fn is_complete(&self, ranks: u32, is_late: bool) -> bool {
        self.ranks == u64::from(ranks) || is_late && self.ranks == 0
    }

    /// Gives the flags of the step.
    pub fn flags(&self, ranks: u32, is_late: bool) -> u32 {
        let flag = |differs, bit| if differs { bit } else { 0 };
        flag(self.state != [0; 2] || !self.is_complete(ranks, is_late), StepOutputs::FLAG_STATE)
            | flag(self.replicas[..2] != [0; 2], StepOutputs::FLAG_REPLICAS)
    }
}

/// Odd, with bits spread over the word: 2^64 over the golden ratio.
const PLACE_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX_FACTOR: u64 = 0xbf58_476d_1ce4_e5b9;

/// Maps 64 bits to 64 bits one to one: the finalizer of SplitMix64 (Steele, Lea and Flood, *Fast splittable
/// pseudorandom number generators*, 2014).
pub(super) fn mixed(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(MIX_FACTOR);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// Mixes words in their order.
pub(crate) fn mixed_sum(words: impl IntoIterator<Item = u64>) -> u64 {
    let place = |place: u64| place.wrapping_mul(PLACE_FACTOR);
    (0..).zip(words).fold(0, |sum, (at, word)| sum.wrapping_add(mixed(word.wrapping_add(place(at)))))
}

/// Gives the factors of these ranks, different for each group of them; for a single rank, which has nothing to compare,
/// 0.
pub(super) fn rank_factors(ranks: &[u32]) -> impl Iterator<Item = [u64; 2]> {
    let group = mixed_sum(ranks.iter().map(|&rank| rank.into()));
    let of = move |at: u64| [1, 2].map(|which| mixed(group ^ mixed(2 * at + which)) | 1);
    let but_one = (ranks.len() as u64).saturating_sub(1);
    let last = (0..but_one).map(of).fold([0u64; 2], |[a, b], [x, y]| [a.wrapping_sub(x), b.wrapping_sub(y)]);
    (0..but_one).map(of).chain([last])
}

/// Gives the ranks that may have differed alone; none when it was no single one of them.
pub(super) fn located(sums: [u64; 2], ranks: &[u32]) -> Vec<u32> {
    let fits = |factors: [u64; 2]| sums[0].wrapping_mul(factors[1]) == sums[1].wrapping_mul(factors[0]);
    ranks.iter().zip(rank_factors(ranks)).filter(|&(_, factors)| fits(factors)).map(|(&rank, _)| rank).collect()
}

/// Does as `gradprobe_fingerprint`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
#[allow(unsafe_code, reason = "finds what a launch names by its addresses")]
pub(crate) unsafe fn run(a: &FingerprintArguments) {
    let common = Common { tensor_count: a.common.tensor_count << a.weights, ..a.common };
    // SAFETY: the caller's promise: the weights' tables are behind those of the tensors.
    let (lent, entries) = unsafe { tensors(&common) };
    let chunks = (a.common.chunk_count as usize) << a.weights;
    // SAFETY: the caller's promise.
    let (of_chunks, factors, fingerprints, check): (&[u32], &[Factors], &mut [u64], &mut [CheckSums]) = unsafe {
        Tables::at(((a.common.chunk_tensors, chunks), (a.factors, lent.len()), (a.fingerprints, chunks), (a.check, 1)))
    };
    fingerprints.par_iter_mut().enumerate().for_each(|(index, fingerprint)| {
        let tensor = of_chunks[index] as usize;
        let chunk = index - entries[tensor].first_chunk as usize;
        let place = (chunk * (CHUNK / PACKET)) as u64;
        *fingerprint = with_elements!(HostTensor, &lent[tensor], elements => {
            // An absent tensor has chunks but no elements.
            let of_chunk = &elements[elements.len().min(chunk * CHUNK)..elements.len().min((chunk + 1) * CHUNK)];
            packets(of_chunk, place)
        });
    });
    let check = &mut check[0];
    for (&fingerprint, &tensor) in fingerprints.iter().zip(of_chunks) {
        let Factors { rank, tensor, .. } = factors[tensor as usize];
        for (sum, factor) in check.replicas.iter_mut().zip([rank[0], rank[1], rank[0].wrapping_mul(tensor)]) {
            *sum = sum.wrapping_add(fingerprint.wrapping_mul(factor));
        }
    }
}

/// Gives the fingerprint of a chunk whose first packet has this place in its tensor.
fn packets<E: Pod>(elements: &[E], place: u64) -> u64 {
    let packets = elements.chunks(PACKET).zip(place..).map(|(packet, place)| {
        let words = bytemuck::cast_slice::<E, u8>(packet).chunks(4).map(|bytes| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from(u32::from_le_bytes(word))
        });
        let factors = (0u32..).map(|i| u64::from(0x9e37_79b1u32.wrapping_add(0x3c6e_f372u32.wrapping_mul(i))));
        let sum = words.zip(factors).fold(0u64, |sum, (word, factor)| sum.wrapping_add(word.wrapping_mul(factor)));
        let mixed = sum.wrapping_add(place.wrapping_mul(PLACE_FACTOR)).wrapping_mul(MIX_FACTOR);
        mixed ^ mixed >> 32
    });
    packets.fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_all_ranks_add_up_to_nothing_and_name_each() {
        for count in [1usize, 2, 3, 8, 1000, 16384] {
            let ranks: Vec<u32> = (0..).step_by(3).take(count).collect();
            let factors: Vec<[u64; 2]> = rank_factors(&ranks).collect();
            let sum = factors.iter().fold([0u64; 2], |[a, b], [x, y]| [a.wrapping_add(*x), b.wrapping_add(*y)]);
            assert_eq!((factors.len(), sum), (count, [0; 2]));
            for odd in [0, count / 2, count - 1] {
                let difference = 1u64 << (odd % 48);
                let sums = factors[odd].map(|factor| factor.wrapping_mul(difference));
                let found = located(sums, &ranks);
                assert!(
                    found == [ranks[odd]] || count <= 2 && found.contains(&ranks[odd]),
                    "{ranks:?} {odd}: {found:?}"
                );
                // In another group of the same size it is nobody.
                let others: Vec<u32> = ranks.iter().map(|rank| rank + 1).collect();
                assert!(count == 1 || located(sums, &others).is_empty(), "{count}");
            }
        }
    }

    #[test]
    fn a_million_that_are_the_same_say_nothing() {
        let mut random = fastrand::Rng::with_seed(2);
        for count in [2u32, 3, 16] {
            let factors: Vec<[u64; 2]> = rank_factors(&(0..count).collect::<Vec<_>>()).collect();
            for _ in 0..1_000_000 / count {
                let fingerprint = random.u64(..);
                let sum = |which: usize| {
                    factors.iter().fold(0u64, |sum, of| sum.wrapping_add(fingerprint.wrapping_mul(of[which])))
                };
                assert_eq!([sum(0), sum(1)], [0, 0]);
            }
        }
    }

    #[test]
    fn every_flipped_bit_changes_the_fingerprint() {
        let mut random = fastrand::Rng::with_seed(3);
        let numbers: Vec<f32> = (0..CHUNK).map(|_| random.f32() - 0.5).collect();
        let whole = packets(&numbers, 0);
        for _ in 0..1000 {
            let mut other = numbers.clone();
            let (at, bit) = (random.usize(..CHUNK), random.u32(..32));
            other[at] = f32::from_bits(other[at].to_bits() ^ 1 << bit);
            assert_ne!(packets(&other, 0), whole, "bit {bit} of {at}");
            other.swap(at, (at + 1) % CHUNK);
            assert_ne!(packets(&other, 0), whole);
        }
        assert_ne!(packets(&numbers, 1), whole, "the place counts");
    }
}
