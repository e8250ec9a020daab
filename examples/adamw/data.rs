//! What the example learns, and the net it begins with: the same numbers in every run.

use std::array;

/// Shapes, which adamw.cu has too: of a net with one output, and of the data.
pub const INPUTS: usize = 2;
pub const HIDDEN: usize = 50;
pub const BATCH: usize = 64;
pub const BATCHES: usize = 16;

/// Where each tensor of the net begins in a buffer of all [`PARAMETERS`]. The weights come first, since AdamW lets them
/// decay and not the biases.
pub const HIDDEN_WEIGHT: usize = 0;
pub const OUTPUT_WEIGHT: usize = HIDDEN_WEIGHT + HIDDEN * INPUTS;
pub const HIDDEN_BIAS: usize = OUTPUT_WEIGHT + HIDDEN;
pub const OUTPUT_BIAS: usize = HIDDEN_BIAS + HIDDEN;
pub const PARAMETERS: usize = OUTPUT_BIAS + 1;
/// Parameters that decay.
pub const DECAYED: usize = HIDDEN_BIAS;

/// Places in the square from -1 to 1, [`INPUTS`] numbers each, and the value of a smooth function in each of them.
pub struct Samples {
    pub inputs: Vec<f32>,
    pub targets: Vec<f32>,
}

impl Samples {
    /// [`BATCHES`] batches of [`BATCH`].
    pub fn new() -> Self {
        let mut random = 1;
        let places: Vec<[f32; INPUTS]> =
            (0..BATCHES * BATCH).map(|_| array::from_fn(|_| uniform(&mut random))).collect();
        let targets = places.iter().map(|[x, y]| (3.0 * x).sin() * (2.0 * y).cos() + 0.5).collect();
        Self { inputs: places.concat(), targets }
    }
}

/// Weights that keep the variance of what they multiply, and biases of 0.
pub fn initial_parameters() -> Vec<f32> {
    let mut random = 2;
    let mut parameters = vec![0.0; PARAMETERS];
    for (weights, inputs) in [(HIDDEN_WEIGHT..OUTPUT_WEIGHT, INPUTS), (OUTPUT_WEIGHT..HIDDEN_BIAS, HIDDEN)] {
        // A uniform distribution from -a to a has the variance a²/3.
        let bound = (3.0 / inputs as f32).sqrt();
        parameters[weights].fill_with(|| bound * uniform(&mut random));
    }
    parameters
}

/// The next number between -1 and 1, by SplitMix64.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}
