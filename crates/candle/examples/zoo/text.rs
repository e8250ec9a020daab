//! Letters of Shakespeare: the text of the example `train`, without case and punctuation.

use crate::data::Batch;
use candle_core::{Device, Result, Tensor};
use fastrand::Rng;
use std::sync::LazyLock;

/// The letters, and whatever stands between words.
pub const ALPHABET: usize = 27;
/// Letters that the model sees before the one it is to tell.
pub const CONTEXT: usize = 8;

/// The part of the text.
#[derive(Clone, Copy)]
pub enum Part {
    /// All but the last tenth.
    Trained,
    /// The last tenth.
    HeldOut,
}

/// Each letter as its place in the alphabet; 0 is what stands between words, however many characters that are.
static LETTERS: LazyLock<Vec<u32>> = LazyLock::new(|| {
    let place =
        |byte: &u8| if byte.is_ascii_alphabetic() { u32::from(byte.to_ascii_lowercase() - b'a' + 1) } else { 0 };
    let mut letters: Vec<u32> = include_bytes!("../train/shakespeare.txt").iter().map(place).collect();
    letters.dedup_by(|next, last| *next == 0 && *last == 0);
    letters
});

/// Lines from anywhere in a part of the text, [lines, CONTEXT], and the letter that follows each of theirs, [lines · CONTEXT].
pub fn batch(lines: usize, part: Part, random: &mut Rng) -> Result<Batch> {
    let (trained, held_out) = LETTERS.split_at(LETTERS.len() / 10 * 9);
    let text = match part {
        Part::Trained => trained,
        Part::HeldOut => held_out,
    };
    let starts: Vec<usize> = (0..lines).map(|_| random.usize(..text.len() - CONTEXT)).collect();
    let letters = |shift: usize| -> Vec<u32> {
        starts.iter().flat_map(|start| &text[start + shift..start + shift + CONTEXT]).copied().collect()
    };
    Ok(Batch {
        inputs: Tensor::from_vec(letters(0), (lines, CONTEXT), &Device::Cpu)?,
        targets: Tensor::from_vec(letters(1), lines * CONTEXT, &Device::Cpu)?,
    })
}
