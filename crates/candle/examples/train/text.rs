//! What is learned: the first 300 KB of the plays of Shakespeare, which are in the public domain, as Andrej Karpathy's
//! char-rnn has them in `data/tinyshakespeare`.

use candle_core::{Device, Result, Tensor};

/// Characters that the model sees before the one it is to tell.
pub const CONTEXT: usize = 64;

/// The text, each character as its place in the alphabet.
pub struct Text {
    characters: Vec<u8>,
    alphabet: usize,
}

impl Text {
    pub fn new() -> Self {
        let text = include_bytes!("shakespeare.txt");
        let alphabet: Vec<u8> = (0..=u8::MAX).filter(|character| text.contains(character)).collect();
        let mut places = [0u8; 256];
        for (place, &character) in (0..).zip(&alphabet) {
            places[usize::from(character)] = place;
        }
        Self { characters: text.iter().map(|&c| places[usize::from(c)]).collect(), alphabet: alphabet.len() }
    }

    /// How many different characters there are.
    pub fn alphabet(&self) -> usize {
        self.alphabet
    }

    /// Lines from anywhere in the text, [lines, CONTEXT], and the character that follows each of theirs, [lines · CONTEXT].
    pub fn batch(&self, lines: usize, random: &mut fastrand::Rng, device: &Device) -> Result<(Tensor, Tensor)> {
        let starts: Vec<usize> = (0..lines).map(|_| random.usize(..self.characters.len() - CONTEXT)).collect();
        let windows = |shift: usize| -> Vec<u32> {
            let windows = starts.iter().flat_map(|start| &self.characters[start + shift..start + shift + CONTEXT]);
            windows.map(|&place| place.into()).collect()
        };
        let inputs = Tensor::from_vec(windows(0), (lines, CONTEXT), device)?;
        Ok((inputs, Tensor::from_vec(windows(1), lines * CONTEXT, device)?))
    }
}
