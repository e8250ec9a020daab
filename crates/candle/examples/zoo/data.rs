//! What is learned, drawn as it is needed.

use crate::weights::normal;
use candle_core::{Device, Result, Tensor};
use fastrand::Rng;

/// Some samples, and the class of each.
pub struct Batch {
    pub inputs: Tensor,
    pub targets: Tensor,
}

/// Arms of the spiral.
pub const ARMS: u8 = 3;
/// Kinds of picture.
pub const SHAPES: usize = 4;
/// Pixels along an edge of a picture.
const EDGE: usize = 8;
/// Symbols of a sequence.
pub const SYMBOLS: usize = 4;
/// Symbols in a sequence.
const LENGTH: usize = 8;
/// Users, and as many items.
pub const IDS: u32 = 30;

/// Points in the plane, [samples, 2], on one of three arms of a spiral that is turned by an angle.
pub fn spirals(samples: usize, turn: f32, random: &mut Rng) -> Result<Batch> {
    let (mut points, mut arms) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let arm = random.u8(..ARMS);
        let radius = 0.2 + 0.8 * random.f32();
        let angle = std::f32::consts::TAU * f32::from(arm) / f32::from(ARMS) + 3.0 * radius + turn;
        let angle = angle + 0.2 * normal(random);
        points.extend([2.0 * radius * angle.cos(), 2.0 * radius * angle.sin()]);
        arms.push(u32::from(arm));
    }
    batch(points, &[samples, 2], arms)
}

/// Pictures, [samples, 1, EDGE, EDGE], of a bar that lies, a bar that stands, a cross or a frame, in noise.
pub fn pictures(samples: usize, random: &mut Rng) -> Result<Batch> {
    const SIZE: usize = 5;
    let (mut pixels, mut shapes) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let shape = random.u32(..4);
        let [top, left] = [(); 2].map(|()| random.usize(..=EDGE - SIZE));
        let mut picture = [0.0f32; EDGE * EDGE];
        picture.fill_with(|| 0.3 * normal(random));
        for along in 0..SIZE {
            let lies = (SIZE / 2, along);
            let stands = (along, SIZE / 2);
            let frame = [(0, along), (SIZE - 1, along), (along, 0), (along, SIZE - 1)];
            let drawn = match shape {
                0 => &[lies][..],
                1 => &[stands],
                2 => &[lies, stands],
                _ => &frame,
            };
            for &(row, column) in drawn {
                picture[(top + row) * EDGE + left + column] += 1.0;
            }
        }
        pixels.extend(picture);
        shapes.push(shape);
    }
    batch(pixels, &[samples, 1, EDGE, EDGE], shapes)
}

/// Sequences of symbols, [samples, LENGTH, SYMBOLS], a 1 for each. The class of a sequence is its first symbol.
pub fn sequences(samples: usize, random: &mut Rng) -> Result<Batch> {
    let mut ones = vec![0.0; samples * LENGTH * SYMBOLS];
    let mut first = Vec::new();
    for (place, symbols) in ones.chunks_exact_mut(SYMBOLS).enumerate() {
        let symbol = random.u8(..4);
        symbols[usize::from(symbol)] = 1.0;
        if place % LENGTH == 0 {
            first.push(u32::from(symbol));
        }
    }
    batch(ones, &[samples, LENGTH, SYMBOLS], first)
}

/// Pairs of a user and an item, [samples, 2], and whether the one clicked on the other. Both have tastes that nobody knows. Few
/// of them are in most pairs, so that a batch lacks many.
pub fn clicks(samples: usize, random: &mut Rng) -> Result<Batch> {
    // Always the same tastes.
    let mut tastes = Rng::with_seed(7);
    let mut tastes_of = || -> Vec<[f32; 2]> { (0..IDS).map(|_| [normal(&mut tastes), normal(&mut tastes)]).collect() };
    let (users, items) = (tastes_of(), tastes_of());
    let (mut ids, mut clicked) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let mut id = || random.u32(..IDS).min(random.u32(..IDS));
        let (user, item) = (id(), id());
        ids.extend([user, item]);
        let ([a, b], [c, d]) = (users[user as usize], items[item as usize]);
        clicked.push(u32::from(a * c + b * d + 0.3 * normal(random) > 0.0));
    }
    Ok(Batch {
        inputs: Tensor::from_vec(ids, (samples, 2), &Device::Cpu)?,
        targets: Tensor::from_vec(clicked, samples, &Device::Cpu)?,
    })
}

fn batch(inputs: Vec<f32>, shape: &[usize], targets: Vec<u32>) -> Result<Batch> {
    let samples = targets.len();
    Ok(Batch {
        inputs: Tensor::from_vec(inputs, shape, &Device::Cpu)?,
        targets: Tensor::from_vec(targets, samples, &Device::Cpu)?,
    })
}
