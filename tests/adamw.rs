//! The kernels of `examples/adamw`, on the host emulation: AdamW and the net against f64, within the bounds of rounding;
//! what a skipped step leaves; and nvcc compiles them where there is one.
#![allow(unsafe_code, reason = "launches kernels with addresses")]

#[path = "common/adamw.rs"]
mod common;
#[path = "../examples/adamw/data.rs"]
mod data;
mod require;
mod users;

use common::{Bounded, Parameter, Settings, correction, exact, loss_and_gradient};
use data::{BATCH, BATCHES, DECAYED, HIDDEN, HIDDEN_BIAS, INPUTS, OUTPUT_BIAS, OUTPUT_WEIGHT, PARAMETERS, Samples};
use gradprobe::StepOutputs;
use gradprobe_simt::{Entry, Schedule, launch, ptx::memory};
use std::{cell::RefCell, path::Path};

const SOURCE: &str = include_str!("../examples/adamw/adamw.cu");
const KERNELS: [&str; 6] =
    ["forward_hidden", "forward_output", "backward_output", "backward_hidden", "count_step", "adamw"];

const SETTINGS: Settings = Settings { learning_rate: 0.01, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };

/// Runs a kernel; addresses and numbers alike are words.
#[track_caller]
fn run(name: &str, blocks: u32, schedule: Schedule, parameters: &[u64]) {
    let kernel = Entry::find(name).expect(name);
    assert_eq!(parameters.len(), kernel.parameter_bytes().len(), "{name}");
    let words: Vec<[u8; 8]> = parameters.iter().map(|word| word.to_le_bytes()).collect();
    let parameters = words.iter().zip(kernel.parameter_bytes()).map(|(word, &bytes)| &word[..bytes as usize]);
    let parameters: Vec<&[u8]> = parameters.collect();
    if let Some(ptx) = users::kernels("examples/adamw/adamw.cu") {
        let _lent = memory::lend(NAMED.with_borrow(Clone::clone));
        return users::launch(ptx, name, blocks, schedule, &parameters);
    }
    // SAFETY: each test gives the kernel what it has in adamw.cu, with addresses of vectors as long as it takes them.
    unsafe { launch(kernel, blocks, 128, &parameters, schedule) }.unwrap();
}

thread_local! {
    /// Memory that this test has named for kernels, which PTX wants lent.
    static NAMED: RefCell<Vec<(u64, u64, bool)>> = const { RefCell::new(Vec::new()) };
}

fn read<T>(values: &[T]) -> u64 {
    let address = values.as_ptr() as u64;
    NAMED.with_borrow_mut(|named| named.push((address, size_of_val(values) as u64, false)));
    address
}

fn write<T>(values: &mut [T]) -> u64 {
    let address = values.as_mut_ptr() as u64;
    NAMED.with_borrow_mut(|named| named.push((address, size_of_val(values) as u64, true)));
    address
}

fn word(value: f32) -> u64 {
    u64::from(value.to_bits())
}

/// Outputs of a step that is not skipped.
fn outputs(coefficient: f32) -> StepOutputs {
    StepOutputs { coefficient, coefficient_f64: f64::from(coefficient), ..StepOutputs::default() }
}

/// What lies before and behind each buffer, and must stay.
const GUARD: f32 = -77.5;
const GUARDS: usize = 8;

/// Parameters and moments, as far from a multiple of 16 bytes as a test wants, between guards; and AdamW's count.
#[derive(Clone, Debug, PartialEq)]
struct State {
    start: usize,
    length: usize,
    buffers: [Vec<f32>; 3],
    step: u64,
    corrections: [f32; 2],
}

impl State {
    /// Parameters as given, moments of 0.
    fn new(parameters: &[f32], offset: usize) -> Self {
        let (start, length) = (GUARDS + offset, parameters.len());
        let guarded = |values: &[f32]| [&vec![GUARD; start], values, &[GUARD; GUARDS]].concat();
        let zeros = vec![0.0; length];
        let buffers = [guarded(parameters), guarded(&zeros), guarded(&zeros)];
        Self { start, length, buffers, step: 0, corrections: [f32::NAN; 2] }
    }

    fn values(&self, buffer: usize) -> &[f32] {
        &self.buffers[buffer][self.start..][..self.length]
    }

    fn parameter(&self, index: usize) -> Parameter {
        let [value, exp_avg, exp_avg_sq] = [0, 1, 2].map(|buffer| Bounded::exact(self.values(buffer)[index]));
        Parameter { value, exp_avg, exp_avg_sq }
    }

    /// A step by the kernels.
    fn step(&mut self, outputs: &StepOutputs, gradient: &[f32], decayed: usize, settings: &Settings, blocks: u32) {
        let Settings { learning_rate, beta1, beta2, epsilon, weight_decay } = *settings;
        let schedule = Schedule::Shuffled(self.step);
        let outputs = std::slice::from_ref(outputs);
        let (step, corrections) = (write(std::slice::from_mut(&mut self.step)), write(&mut self.corrections));
        run("count_step", blocks, schedule, &[read(outputs), step, corrections, word(beta1), word(beta2)]);
        let [parameters, exp_avg, exp_avg_sq] = self.buffers.each_mut().map(|buffer| write(&mut buffer[self.start..]));
        let numbers = [learning_rate, beta1, beta2, epsilon, weight_decay].map(word);
        let addresses = [read(outputs), read(&self.corrections), parameters, read(gradient), exp_avg, exp_avg_sq];
        let lengths = [gradient.len() as u64, decayed as u64];
        run("adamw", blocks, schedule, &[&addresses[..], &lengths, &numbers].concat());
    }

    fn bits(&self) -> (Vec<u32>, u64, [u32; 2]) {
        let bits = self.buffers.iter().flatten().map(|value| value.to_bits()).collect();
        (bits, self.step, self.corrections.map(f32::to_bits))
    }
}

/// Numbers of that magnitude, zeros among them.
fn numbers(seed: u64, length: usize, magnitude: f32) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut one = || if random.u32(..10) == 0 { 0.0 } else { magnitude * (2.0 * random.f32() - 1.0) };
    (0..length).map(|_| one()).collect()
}

#[test]
fn adamw_is_that_of_f64_within_the_bounds_of_rounding() {
    let mut complaints = Vec::new();
    let cases = [(1, 1), (127, 1), (128, 2), (129, 1), (PARAMETERS, 2), (1000, 3), (3001, 7)];
    for (case, (length, blocks)) in cases.into_iter().enumerate() {
        for (offset, coefficient, magnitude) in
            [(0, 1.0, 1.0), (1, 0.3, 1e-3), (2, 1e-4, 3e4), (3, 0.7, 1e-12), (1, 3e-9, 1e9), (5, 0.5, 1e-30)]
        {
            let seed = case as u64;
            let decayed = [0, DECAYED.min(length), length / 3][case % 3];
            let mut state = State::new(&numbers(seed, length, 2.0), offset);
            // The last with a gradient that is 0 throughout: Adam goes on by its momentum.
            for step in 1..=4 {
                let magnitude = if step == 4 { 0.0 } else { magnitude };
                let gradient = numbers(100 * seed + step, length, magnitude);
                let before = state.clone();
                state.step(&outputs(coefficient), &gradient, decayed, &SETTINGS, blocks);
                assert_eq!(state.step, step);
                for index in 0..length {
                    let (decays, gradient) = (index < decayed, Bounded::exact(gradient[index]));
                    let expected =
                        before.parameter(index).after(decays, gradient, Bounded::exact(coefficient), step, &SETTINGS);
                    let name = |what| format!("{what} {index} of {length}, step {step}, gradients of {magnitude:e}");
                    complaints.extend(expected.value.check(&name("parameter"), state.values(0)[index]));
                    complaints.extend(expected.exp_avg.check(&name("m"), state.values(1)[index]));
                    complaints.extend(expected.exp_avg_sq.check(&name("v"), state.values(2)[index]));
                }
                for buffer in &state.buffers {
                    let behind = &buffer[state.start + length..];
                    assert!(buffer[..state.start].iter().chain(behind).all(|&guard| guard == GUARD), "{length}");
                }
            }
        }
    }
    assert!(
        complaints.is_empty(),
        "{} complaints:\n{}",
        complaints.len(),
        complaints[..complaints.len().min(20)].join("\n")
    );
}

/// Of a constant gradient g, both corrected averages are those of g, however many steps were made: every step is
/// learning_rate · g / (|g| + epsilon).
#[test]
fn a_constant_gradient_moves_a_parameter_by_the_learning_rate() {
    let settings = Settings { weight_decay: 0.0, epsilon: 0.5, ..SETTINGS };
    let gradients = [3.0, -0.25, 1e-3, 0.0];
    let mut state = State::new(&[1.0; 4], 0);
    for step in 1..=50 {
        // As large as before, after the clip.
        let coefficient = 1.0 / (1 << (step % 3)) as f32;
        let gradient = gradients.map(|gradient| gradient / coefficient);
        state.step(&outputs(coefficient), &gradient, 4, &settings, 1);
        for (&parameter, gradient) in state.values(0).iter().zip(gradients) {
            let gradient = f64::from(gradient);
            let moved = f64::from(step) * f64::from(settings.learning_rate) * gradient / (gradient.abs() + 0.5);
            assert!((f64::from(parameter) - (1.0 - moved)).abs() < 1e-6 * f64::from(step), "step {step}: {parameter}");
        }
    }
}

/// Decay is decoupled: it takes its part of the parameter, whatever the moments are.
#[test]
fn weights_decay_and_biases_do_not() {
    let mut state = State::new(&[2.0; 300], 1);
    for step in 1..=30 {
        state.step(&outputs(1.0), &[0.0; 300], 200, &SETTINGS, 2);
        let decayed = 2.0 * (1.0 - 0.01f64 * 0.1).powi(step);
        let (weights, biases) = state.values(0).split_at(200);
        assert!(weights.iter().all(|&weight| (f64::from(weight) - decayed).abs() < 1e-5), "step {step}: {weights:?}");
        assert!(biases.iter().all(|&bias| bias == 2.0), "step {step}");
    }
}

#[test]
fn the_corrections_are_those_of_the_step_s_number() {
    let mut complaints = Vec::new();
    for before in [0, 1, 2, 9, 99, 999, 12_344, 1 << 40] {
        for (beta1, beta2) in [(0.9, 0.999), (0.5, 0.99), (0.0, 0.999_999)] {
            let (outputs, mut step, mut corrections) = ([outputs(1.0)], [before], [f32::NAN; 2]);
            let parameters = [read(&outputs), write(&mut step), write(&mut corrections)];
            // More threads than one, which counts.
            let parameters = [&parameters[..], &[word(beta1), word(beta2)]].concat();
            run("count_step", 3, Schedule::Shuffled(before), &parameters);
            assert_eq!(step, [before + 1]);
            for (beta, computed) in [(beta1, corrections[0]), (beta2, corrections[1])] {
                // The powers are of f64, so that 1 minus one that is almost 1 is off by 1e-10 at most.
                let Bounded { value, bound } = correction(beta, before + 1);
                let expected = Bounded { value, bound: bound + 1e-10 * value };
                complaints.extend(expected.check(&format!("1 - {beta}^{}", before + 1), computed));
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// The step after a skipped one is what it would have been without it.
#[test]
fn a_skipped_step_leaves_every_bit_and_is_not_counted() {
    let skip = StepOutputs { skip: 1, coefficient: f32::NAN, found_inf: 1.0, ..StepOutputs::default() };
    let mut gradient = numbers(3, 1000, 1.0);
    let mut state = State::new(&numbers(4, 1000, 1.0), 1);
    state.step(&outputs(0.5), &gradient, 500, &SETTINGS, 3);
    let before = state.bits();
    let mut without = state.clone();
    for bad in [f32::NAN, f32::INFINITY, 1.0] {
        let good = std::mem::replace(&mut gradient[700], bad);
        state.step(&skip, &gradient, 500, &SETTINGS, 3);
        gradient[700] = good;
        assert!(state.bits() == before, "{bad}");
    }
    state.step(&outputs(0.5), &gradient, 500, &SETTINGS, 3);
    without.step(&outputs(0.5), &gradient, 500, &SETTINGS, 3);
    assert!(state.bits() == without.bits() && state.bits() != before);
}

/// The loss of each batch and the gradient, in the order of data.rs, as the kernels have them of this batch.
fn net(parameters: &[f32], samples: &Samples, step: u64, schedule: Schedule) -> (Vec<f32>, Vec<f32>) {
    let outputs = [StepOutputs { step, ..outputs(1.0) }];
    let (outputs, inputs, targets) = (read(&outputs), read(&samples.inputs), read(&samples.targets));
    let (mut activations, mut errors) = (vec![f32::NAN; BATCH * HIDDEN], vec![f32::NAN; BATCH]);
    let (mut losses, mut gradient) = (vec![GUARD; BATCHES], vec![f32::NAN; PARAMETERS]);
    let tensors = |all: u64| [0, OUTPUT_WEIGHT, HIDDEN_BIAS, OUTPUT_BIAS].map(|start| all + 4 * start as u64);
    let [hidden_weight, output_weight, hidden_bias, output_bias] = tensors(read(parameters));
    let [hidden_weight_gradient, output_weight_gradient, hidden_bias_gradient, output_bias_gradient] =
        tensors(write(&mut gradient));
    let (activations, errors) = (write(&mut activations), write(&mut errors));
    // One block more than there need be.
    let run = |kernel, threads: usize, parameters: &[u64]| {
        run(kernel, u32::try_from(threads.div_ceil(128) + 1).unwrap(), schedule, parameters);
    };
    run("forward_hidden", BATCH * HIDDEN, &[outputs, inputs, hidden_weight, hidden_bias, activations]);
    run("forward_output", BATCH, &[outputs, targets, activations, output_weight, output_bias, errors]);
    let of_output = [activations, errors, output_weight_gradient, output_bias_gradient, write(&mut losses)];
    run("backward_output", HIDDEN + 1, &[&[outputs][..], &of_output].concat());
    let of_hidden = [inputs, activations, errors, output_weight, hidden_weight_gradient, hidden_bias_gradient];
    run("backward_hidden", HIDDEN * (INPUTS + 1), &[&[outputs][..], &of_hidden].concat());
    (losses, gradient)
}

/// Those of data.rs and, since its biases are 0, others.
fn nets() -> [Vec<f32>; 2] {
    [data::initial_parameters(), numbers(5, PARAMETERS, 0.8)]
}

#[test]
fn the_net_is_that_of_f64_within_the_bounds_of_rounding() {
    let samples = Samples::new();
    let mut complaints = Vec::new();
    for parameters in nets() {
        for (step, batch) in [(0, 0), (1, 1), (15, 15), (16, 0), (3 + 16 * (1 << 40), 3)] {
            let inputs = &samples.inputs[batch * BATCH * INPUTS..][..BATCH * INPUTS];
            let targets = &samples.targets[batch * BATCH..][..BATCH];
            let (loss, gradient) = loss_and_gradient(&exact(&parameters), inputs, targets);
            let (losses, computed) = net(&parameters, &samples, step, Schedule::Shuffled(step));
            assert!(losses.iter().enumerate().all(|(place, &loss)| (place == batch) != (loss == GUARD)), "{losses:?}");
            complaints.extend(loss.check(&format!("step {step}: the loss"), losses[batch]));
            for (index, (expected, &computed)) in gradient.iter().zip(&computed).enumerate() {
                complaints.extend(expected.check(&format!("step {step}: derivative {index}"), computed));
            }
            // A bound that lets everything pass would be none.
            let largest = gradient.iter().map(|derivative| derivative.value.abs()).fold(0.0, f64::max);
            assert!(gradient.iter().all(|derivative| derivative.bound < 1e-4 * largest), "step {step}");
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// So that the kernels and the reference are not wrong alike: the reference's gradient against differences of its loss.
#[test]
fn the_gradient_is_the_derivative_of_the_loss() {
    let samples = Samples::new();
    let (inputs, targets) = (&samples.inputs[..BATCH * INPUTS], &samples.targets[..BATCH]);
    for parameters in nets() {
        let (_, gradient) = loss_and_gradient(&exact(&parameters), inputs, targets);
        for index in 0..PARAMETERS {
            let loss_at = |difference: f64| {
                let mut parameters = exact(&parameters);
                parameters[index].value += difference;
                loss_and_gradient(&parameters, inputs, targets).0.value
            };
            let slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5;
            let Bounded { value, .. } = gradient[index];
            assert!((slope - value).abs() < 1e-8, "derivative {index}: {value}, but the loss rises by {slope}");
        }
    }
}

/// What a race would change.
#[test]
fn no_order_of_threads_changes_a_bit() {
    let [parameters, _] = nets();
    let samples = Samples::new();
    let first = net(&parameters, &samples, 2, Schedule::Forward);
    for schedule in [Schedule::Reverse].into_iter().chain((0..8).map(Schedule::Shuffled)) {
        assert_eq!(net(&parameters, &samples, 2, schedule), first, "{schedule:?}");
    }
}

#[test]
fn the_kernels_have_the_shapes_of_the_host() {
    let shapes =
        format!("constexpr unsigned INPUTS = {INPUTS}, HIDDEN = {HIDDEN}, BATCH = {BATCH}, BATCHES = {BATCHES};\n");
    assert!(SOURCE.contains(&shapes), "{shapes}");
    assert_eq!(SOURCE.matches("__global__").count(), KERNELS.len());
}

#[test]
fn nvcc_compiles_the_kernels() {
    let Some(nvcc) = require::nvcc() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for options in [&["-arch=sm_75"][..], &["-arch=sm_90"], &["-arch=sm_90", "--use_fast_math"]] {
        let code = nvcc.compile(&root.join("examples/adamw/adamw.cu"), options);
        for kernel in KERNELS {
            let section = format!(".text.{kernel}\0");
            assert!(code.windows(section.len()).any(|name| name == section.as_bytes()), "{kernel}");
        }
    }
}
