//! The net and the AdamW of `examples/adamw` in f64, with a bound for what f32 may make of the same operations.

#![allow(dead_code)] // Each test file is a crate of its own and uses a part of this.

use crate::data::{BATCH, HIDDEN, HIDDEN_BIAS, HIDDEN_WEIGHT, INPUTS, OUTPUT_BIAS, OUTPUT_WEIGHT, PARAMETERS};
use std::ops::{Add, Div, Mul, Sub};

/// A number, and how far from it f32 may be that computes it by the same operations: each carries the bounds of its
/// operands on and adds half a unit in the last place of its own. With operations contracted to fused ones, as compilers
/// for GPUs do, there are fewer roundings, and the bound holds as well.
#[derive(Clone, Copy, Debug)]
pub struct Bounded {
    pub value: f64,
    pub bound: f64,
}

/// Half a unit in the last place, relative, and what f64 itself may be off.
const HALF_UNIT: f64 = 0.5 * f32::EPSILON as f64 * (1.0 + 1e-6);
/// A whole one where numbers are subnormal.
const SMALLEST: f64 = 1.401_298_464_324_817e-45;

impl Bounded {
    /// A number that f32 has as it is.
    pub fn exact(value: f32) -> Self {
        Self { value: f64::from(value), bound: 0.0 }
    }

    /// The result of an operation that is off by `carried` without its own rounding, and by so many halves of a unit in
    /// the last place with it.
    fn rounded(value: f64, carried: f64, halves: f64) -> Self {
        Self { value, bound: carried + halves * (HALF_UNIT * (value.abs() + carried) + SMALLEST) }
    }

    /// The root, correctly rounded.
    pub fn sqrt(self) -> Self {
        let root = self.value.sqrt();
        let (above, below) = ((self.value + self.bound).sqrt(), (self.value - self.bound).max(0.0).sqrt());
        Self::rounded(root, (above - root).max(root - below), 1.0)
    }

    /// Whose derivative is 1 at most; within two units in the last place, as CUDA and C libraries have it.
    pub fn tanh(self) -> Self {
        Self::rounded(self.value.tanh(), self.bound, 4.0)
    }

    /// Complains about a value that is not within the bound.
    pub fn check(self, what: &str, computed: f32) -> Option<String> {
        let Self { value, bound } = self;
        let off = (f64::from(computed) - value).abs();
        (off.is_nan() || off > bound).then(|| format!("{what} is {computed:e}, not {value:e} ± {bound:e}"))
    }
}

impl Add for Bounded {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self::rounded(self.value + other.value, self.bound + other.bound, 1.0)
    }
}

impl Sub for Bounded {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self::rounded(self.value - other.value, self.bound + other.bound, 1.0)
    }
}

impl Mul for Bounded {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let carried = self.value.abs() * other.bound + other.value.abs() * self.bound + self.bound * other.bound;
        Self::rounded(self.value * other.value, carried, 1.0)
    }
}

impl Div for Bounded {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let quotient = self.value / other.value;
        let carried = (self.bound + quotient.abs() * other.bound) / (other.value.abs() - other.bound);
        Self::rounded(quotient, carried, 1.0)
    }
}

/// Of exact numbers.
pub fn exact(values: &[f32]) -> Vec<Bounded> {
    values.iter().copied().map(Bounded::exact).collect()
}

/// The mean squared error of a batch, and its gradient by all parameters in the order of data.rs.
pub fn loss_and_gradient(parameters: &[Bounded], inputs: &[f32], targets: &[f32]) -> (Bounded, Vec<Bounded>) {
    let zero = Bounded::exact(0.0);
    let (two, batch) = (Bounded::exact(2.0), Bounded::exact(BATCH as f32));
    let mut gradient = vec![zero; PARAMETERS];
    let mut squares = zero;
    for (input, &target) in inputs.chunks_exact(INPUTS).zip(targets) {
        let activations: Vec<Bounded> = (0..HIDDEN)
            .map(|unit| {
                let weight = &parameters[HIDDEN_WEIGHT + unit * INPUTS..];
                let products = weight.iter().zip(input).map(|(&weight, &x)| weight * Bounded::exact(x));
                products.fold(parameters[HIDDEN_BIAS + unit], Add::add).tanh()
            })
            .collect();
        let products = activations.iter().zip(&parameters[OUTPUT_WEIGHT..]).map(|(&a, &weight)| weight * a);
        let error = products.fold(parameters[OUTPUT_BIAS], Add::add) - Bounded::exact(target);
        squares = squares + error * error;
        gradient[OUTPUT_BIAS] = gradient[OUTPUT_BIAS] + error;
        for (unit, &activation) in activations.iter().enumerate() {
            let output = &mut gradient[OUTPUT_WEIGHT + unit];
            *output = *output + error * activation;
            let back = error * (Bounded::exact(1.0) - activation * activation);
            let bias = &mut gradient[HIDDEN_BIAS + unit];
            *bias = *bias + back;
            for (i, &x) in input.iter().enumerate() {
                let weight = &mut gradient[HIDDEN_WEIGHT + unit * INPUTS + i];
                *weight = *weight + back * Bounded::exact(x);
            }
        }
    }
    for (index, derivative) in gradient.iter_mut().enumerate() {
        let unit = match index {
            OUTPUT_WEIGHT..HIDDEN_BIAS | OUTPUT_BIAS.. => None,
            HIDDEN_BIAS..OUTPUT_BIAS => Some(index - HIDDEN_BIAS),
            _ => Some(index / INPUTS),
        };
        if let Some(unit) = unit {
            *derivative = *derivative * parameters[OUTPUT_WEIGHT + unit];
        }
        *derivative = *derivative * two / batch;
    }
    (squares / batch, gradient)
}

/// What AdamW is told.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub learning_rate: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub weight_decay: f32,
}

/// 1 - beta^step, rounded to f32.
pub fn correction(beta: f32, step: u64) -> Bounded {
    let value = -(step as f64 * f64::from(beta).ln()).exp_m1();
    Bounded::rounded(value, 0.0, 1.0)
}

/// A parameter and its moments.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    pub value: Bounded,
    pub exp_avg: Bounded,
    pub exp_avg_sq: Bounded,
}

impl Parameter {
    /// These, after step `step` of AdamW with this gradient, which is multiplied by `coefficient`.
    pub fn after(self, decays: bool, gradient: Bounded, coefficient: Bounded, step: u64, settings: &Settings) -> Self {
        let Settings { learning_rate, beta1, beta2, epsilon, weight_decay } = *settings;
        let (one, gradient) = (Bounded::exact(1.0), coefficient * gradient);
        let [learning_rate, decay1, decay2, epsilon, weight_decay] =
            [learning_rate, beta1, beta2, epsilon, weight_decay].map(Bounded::exact);
        let m = decay1 * self.exp_avg + (one - decay1) * gradient;
        let v = decay2 * self.exp_avg_sq + (one - decay2) * gradient * gradient;
        let decayed = if decays { self.value - learning_rate * weight_decay * self.value } else { self.value };
        let (m_hat, v_hat) = (m / correction(beta1, step), v / correction(beta2, step));
        let value = decayed - learning_rate * m_hat / (v_hat.sqrt() + epsilon);
        Self { value, exp_avg: m, exp_avg_sq: v }
    }
}
