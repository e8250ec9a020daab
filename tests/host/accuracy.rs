//! A search for the largest errors: thousands of random tensors from families with heavy tails, far means and odd
//! shapes, then data built to make every rounding of the reduction go the same way. What is found is printed
//! (`cargo test --test host accuracy -- --nocapture`) and must be within the contract's bounds.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // Small numbers.

use crate::common::cases::{CHUNK, Data, Tensor, cauchy, hash, lognormal, normal, random_finite_bits, uniform};
use crate::common::check::{self, Errors, Seen};
use crate::common::host::OnHost;
use crate::common::oracle::{self, power_of_two};
use gradprobe::{Config, Cpu, DType, Plan, Probe, Record};
use rayon::prelude::*;

fn measure(data: &Data) -> Record {
    let plan = Plan::new([("w", data.dtype(), data.len() as u64)]).unwrap();
    Probe::new(Cpu, plan, Config::default()).unwrap().measure_host(&[data.tensor()]).unwrap().records()[0]
}

/// The errors of one tensor, after every check has passed.
fn errors_of(name: &str, data: &Data) -> Errors {
    let truth = oracle::truth(data.dtype(), Config::default().dead_threshold, data.bits());
    let seen = Seen::of(&measure(data));
    crate::common::demand_none(&check::check_tensor(name, &seen, &truth));
    Errors::of(&seen, &truth)
}

/// The worst of each statistic, and where it was.
#[derive(Clone, Default)]
struct Worst([(f64, String); 6]);

impl Worst {
    const NAMES: [&str; 6] = [
        "norm, relative",
        "mean_abs, relative",
        "mean, of mean_abs",
        "variance, relative",
        "variance, of its bound",
        "variance of a constant, of mean²",
    ];

    fn of(errors: &Errors, name: &str) -> Self {
        let Errors { norm, mean_abs, mean, variance, variance_of_bound, constant_variance } = *errors;
        let values = [norm, mean_abs, mean, variance, variance_of_bound, constant_variance];
        Self(values.map(|value| (if value.is_nan() { 0.0 } else { value }, name.to_owned())))
    }

    fn join(mut self, other: Self) -> Self {
        for (own, other) in self.0.iter_mut().zip(other.0) {
            if other.0 > own.0 {
                *own = other;
            }
        }
        self
    }

    fn print(&self, title: &str) {
        println!("{title}");
        for (name, (error, at)) in Self::NAMES.iter().zip(&self.0) {
            println!("  {name:34} {error:10.3e}  {at}");
        }
    }
}

/// A tensor of family `family` from this seed.
fn random_tensor(family: usize, seed: u64) -> Tensor {
    let random = |k: usize| uniform(seed ^ 0x5eed, k);
    let dtype = DType::ALL[[0, 0, 1, 2][hash(seed, 1) as usize % 4]];
    // As many lengths of each size from 1 to 130,000.
    let len = power_of_two((17.0 * random(2)) as i32) * (1.0 + random(3));
    let len = (len as usize).min(if hash(seed, 4).is_multiple_of(8) { 130_000 } else { CHUNK + 500 });
    let scale = power_of_two(match dtype {
        DType::F16 => (20.0 * random(5)) as i32 - 12,
        _ => (230.0 * random(5)) as i32 - 120,
    }) * (1.0 + random(6));
    let octaves = 1.0 + 12.0 * random(7) * random(8);
    let ratio = power_of_two((24.0 * random(9)) as i32) * (1.0 + random(10));
    let (at, period) = (hash(seed, 11) as usize % len, 2 + hash(seed, 12) as usize % 5000);
    let values = |value: fn(u64, usize, [f64; 2], [usize; 3]) -> f64| {
        Tensor::of_values(dtype, len, move |i| scale * value(seed, i, [octaves, ratio], [at, period, len]))
    };
    match family {
        0 => values(|seed, i, _, _| normal(seed, i)),
        1 => values(|seed, i, [octaves, _], _| lognormal(seed, i, octaves)),
        2 => values(|seed, i, [octaves, _], _| lognormal(seed, i, octaves).abs()),
        3 => values(|seed, i, _, _| cauchy(seed, i)),
        4 => values(|seed, i, _, _| cauchy(seed, i).abs()),
        // Pareto: 1/u^2.
        5 => values(|seed, i, _, _| (uniform(seed, i) + 1e-9).powi(-2)),
        // Far from zero by every ratio up to 2^25.
        6 => values(|seed, i, [_, ratio], _| 1.0 + normal(seed, i) / ratio),
        7 => values(|seed, i, [octaves, ratio], _| 1.0 + lognormal(seed, i, octaves) / ratio),
        8 => values(|seed, i, [_, ratio], _| 1.0 + cauchy(seed, i) / ratio),
        // About as far as decides whether a chunk is read again.
        9 => values(|seed, i, _, _| 0.25 + normal(seed, i) * (1.0 + 1e-3 * uniform(seed, 0))),
        10 => values(|seed, i, [_, ratio], [at, ..]| if i == at { ratio } else { normal(seed, i) }),
        11 => {
            values(|seed, i, [_, ratio], [at, ..]| if i == at { ratio * ratio } else { 1.0 + normal(seed, i) / ratio })
        }
        12 => values(|seed, i, [_, ratio], [_, period, _]| (i / period % 7) as f64 + normal(seed, i) / ratio),
        13 => values(|seed, i, [_, ratio], [_, _, len]| i as f64 / len as f64 + normal(seed, i) / ratio),
        14 => values(|seed, i, _, _| if hash(seed, i).is_multiple_of(997) { normal(seed, i) } else { 0.0 }),
        15 => values(|_, i, [_, ratio], [_, period, _]| if i % period == 0 { ratio } else { 1.0 }),
        16 => values(|seed, i, _, _| uniform(seed, i)),
        17 => values(|_, _, [octaves, ratio], _| octaves * ratio),
        _ => Tensor::of_bits(dtype, len, move |i| random_finite_bits(dtype, seed, i)),
    }
}

const FAMILIES: usize = 19;
const TENSORS: u64 = 4000;

#[test]
fn thousands_of_random_tensors() {
    let worst = (0..TENSORS)
        .into_par_iter()
        .map(|seed| {
            let family = seed as usize % FAMILIES;
            let tensor = random_tensor(family, 1000 + seed);
            let name = format!("family {family}, seed {seed}, {} {}", tensor.len, tensor.dtype);
            Worst::of(&errors_of(&name, &tensor.data()), &name)
        })
        .reduce(Worst::default, Worst::join);
    worst.print(&format!("{TENSORS} random tensors:"));
}

/// A number as f32 arithmetic has it, and exactly.
#[derive(Clone, Copy)]
struct Rounded {
    seen: f32,
    exact: f64,
}

impl Rounded {
    fn error(self) -> f64 {
        f64::from(self.seen) / self.exact - 1.0
    }

    fn plus(self, other: Rounded) -> Rounded {
        Rounded { seen: self.seen + other.seen, exact: self.exact + other.exact }
    }

    /// Times a power of two.
    fn times(self, factor: f32) -> Rounded {
        Rounded { seen: self.seen * factor, exact: self.exact * f64::from(factor) }
    }
}

/// A subtree of the additions of one lane.
#[derive(Clone)]
struct Subtree {
    leaves: Vec<f32>,
    sum: Rounded,
    squares: Rounded,
}

impl Subtree {
    /// Two elements: the first square is rounded on its own, then once for both.
    fn pair(a: f32, b: f32) -> Self {
        let [wide_a, wide_b] = [f64::from(a), f64::from(b)];
        let sum = Rounded { seen: a + b, exact: wide_a + wide_b };
        let squares = Rounded { seen: b.mul_add(b, a * a), exact: wide_a * wide_a + wide_b * wide_b };
        Self { leaves: vec![a, b], sum, squares }
    }

    fn join(&self, other: &Self) -> Self {
        let leaves = [self.leaves.as_slice(), &other.leaves].concat();
        Self { leaves, sum: self.sum.plus(other.sum), squares: self.squares.plus(other.squares) }
    }

    /// Every element times a power of two.
    fn times(&self, factor: f32) -> Self {
        let leaves = self.leaves.iter().map(|x| x * factor).collect();
        Self { leaves, sum: self.sum.times(factor), squares: self.squares.times(factor * factor) }
    }
}

/// Grows, level by level, a lane's 256 positive elements whose roundings go the same way: of many random pairs of
/// subtrees, one of them scaled by one of `factors`, those are kept whose errors, times `aim` for their sum and for
/// the sum of their squares, add up to the most. `draw` gives the elements to begin with.
fn worst_lane(seed: u64, aim: [f64; 2], factors: &[f32], draw: impl Fn(usize) -> f32) -> Vec<f32> {
    const KEPT: usize = 1000;
    const TRIED: usize = 50_000;
    let value = |sum: Rounded, squares: Rounded| aim[0] * sum.error() + aim[1] * squares.error();
    let best = |mut tried: Vec<(f64, usize)>| {
        tried.sort_by(|a, b| b.0.total_cmp(&a.0));
        tried.truncate(KEPT);
        tried
    };
    let factor = |random: u64| factors[random as usize % factors.len()];
    let pair = |i: usize| Subtree::pair(draw(2 * i), draw(2 * i + 1) * factor(hash(!seed, i)));
    let values = (0..TRIED).map(|i| (pair(i), i)).map(|(p, i)| (value(p.sum, p.squares), i));
    let mut pool: Vec<Subtree> = best(values.collect()).into_iter().map(|(_, i)| pair(i)).collect();
    for level in 1..8 {
        let two = |i: usize| {
            let random = hash(seed + level, i);
            let [a, b] = [random as usize, (random >> 20) as usize].map(|r| &pool[r % KEPT]);
            (a, b, factor(random >> 40))
        };
        let value = |i: usize| {
            let (a, b, factor) = two(i);
            value(a.sum.plus(b.sum.times(factor)), a.squares.plus(b.squares.times(factor * factor)))
        };
        let kept = best((0..TRIED).map(|i| (value(i), i)).collect());
        let grown = kept.into_iter().map(|(_, i)| {
            let (a, b, factor) = two(i);
            a.join(&b.times(factor))
        });
        pool = grown.collect();
    }
    pool.swap_remove(0).leaves
}

/// A chunk each of whose 128 lanes holds what `lane` says, by the map of `src/spec.rs`: additions go through packets,
/// then slots, then rows.
fn chunk_of_lanes<'a>(lane: impl Fn(usize) -> (f32, &'a [f32])) -> Vec<f32> {
    let element = |i: usize| {
        let (row, warp, packet, thread, slot) = (i / 8192, i / 2048 % 4, i / 256 % 8, i / 8 % 32, i % 8);
        let (sign, elements) = lane(warp * 32 + thread);
        sign * elements[row * 64 + slot * 8 + packet]
    };
    (0..CHUNK).map(element).collect()
}

/// Data that know the order of the additions. The bounds are proofs over all data; this is how near one gets to them.
#[test]
fn data_built_against_the_reduction() {
    const LANES: usize = 128;
    let attacks_of = |seed: u64| {
        let lane = |sum: f64, squares: f64| {
            worst_lane(seed, [sum, squares], &[0.25, 0.5, 1.0, 2.0], |i| (1.0 + uniform(seed, i)) as f32)
        };
        let (up, down, more, less) = (&lane(1.0, 0.0), &lane(-1.0, 0.0), &lane(0.0, 1.0), &lane(0.0, -1.0));
        let (up_and_more, down_and_more) = (&lane(0.5, 1.0), &lane(-0.5, 1.0));
        // The first `positive` lanes as they are, the others negated.
        let split = |positive: usize, lanes: [&[f32]; 2]| {
            chunk_of_lanes(|lane| if lane < positive { (1.0, lanes[0]) } else { (-1.0, lanes[1]) })
        };
        // Negative lanes that weigh as much as the positive ones, so that the mean is near zero and the chunk is not
        // read again: all that is wrong with its sums is wrong with its mean and variance.
        let balanced = |lanes: [&[f32]; 2]| {
            let sums = lanes.map(|lane| lane.iter().sum::<f32>());
            split((LANES as f32 * sums[1] / (sums[0] + sums[1])).round() as usize, lanes)
        };
        // As far from zero as a chunk may be without being read again.
        let leaning = |lanes: [&[f32]; 2]| {
            let share = |positive: usize| {
                let elements = split(positive, lanes);
                let truth = oracle::truth(DType::F32, 0.0, elements.iter().map(|x| x.to_bits()));
                truth.mean.unwrap() / truth.variance.unwrap().sqrt()
            };
            split((0..LANES).rev().find(|&positive| share(positive) < 0.2499).unwrap(), lanes)
        };
        // Two chunks on either side of zero, each read again around its mean. Deviations and mean are multiples of
        // 2^-23, and one lane makes the deviations add up to nothing, so that the second read finds them as made.
        let grid = 8_388_608.0f32;
        let deviations = |sum: f64| {
            let draw = |i: usize| ((0.3 + 1.1 * uniform(seed, i)) as f32 * grid).round() / grid;
            worst_lane(seed, [sum, 1.0], &[1.0], draw)
        };
        let shifted = |lanes: [&[f32]; 2]| {
            let mut around = balanced(lanes);
            let mut excess: f64 = around.iter().map(|&x| f64::from(x)).sum();
            let first_lane = |i: &usize| i % 2048 % 256 < 8 && i % 8192 < 2048;
            let places: Vec<usize> = (0..CHUNK).filter(first_lane).collect();
            excess -= places.iter().map(|&i| f64::from(around[i])).sum::<f64>();
            for (left, i) in (1..=places.len()).rev().zip(places) {
                around[i] = ((-excess / left as f64) as f32 * grid).round() / grid;
                excess += f64::from(around[i]);
            }
            let rms = (around.iter().map(|x| x * x).sum::<f32>() / CHUNK as f32).sqrt();
            let mean = (0.58 * rms * grid).round() / grid;
            let one = |sign: f32| around.iter().map(|x| sign * (x + mean)).collect::<Vec<_>>();
            [one(1.0), one(-1.0)].concat()
        };
        [
            ("sums up", split(LANES, [up, up])),
            ("sums down", split(LANES, [down, down])),
            ("sums of both signs up", balanced([up, down])),
            ("squares up", balanced([more, more])),
            ("squares down", balanced([less, less])),
            ("squares up, far from zero", split(LANES, [more, more])),
            ("squares up and sums down", leaning([down_and_more, up_and_more])),
            ("around two means", shifted([&deviations(1.0), &deviations(-1.0)])),
        ]
        .map(|(name, elements)| (format!("{name}, seed {seed}"), elements))
    };
    let worst = (1..=4u64)
        .into_par_iter()
        .flat_map_iter(attacks_of)
        .map(|(name, elements)| Worst::of(&errors_of(&name, &Data::F32(elements)), &name))
        .reduce(Worst::default, Worst::join);
    worst.print("data built against the reduction:");
    let [norm, mean_abs, mean, variance, ..] = worst.0.map(|(error, _)| error);
    let reached = [norm, mean_abs, mean, variance].map(|error| error / power_of_two(-24));
    // In units of 2^-24, and twice what random data show. Below that, the attack no longer knows the additions.
    let expected = [3.0, 6.0, 6.0, 7.0];
    assert!(reached.iter().zip(expected).all(|(reached, least)| *reached > least), "{reached:?}");
}
