//! `examples/adamw` as a whole: NVRTC compiles its kernels; on a GPU, or in CI on the host driver, its graph trains as f64
//! does, skips the step that must be skipped and clips without a launch; and the program, with and without a driver.
#![cfg(feature = "cuda")]
#![allow(unsafe_code, reason = "looks at a graph's nodes")]

#[path = "common/adamw.rs"]
mod common;
#[path = "../examples/adamw/data.rs"]
mod data;
mod require;
#[path = "../examples/adamw/training.rs"]
mod training;

use common::{Bounded, Parameter, Settings, exact, loss_and_gradient};
use data::{BATCH, BATCHES, DECAYED, INPUTS, PARAMETERS, Samples, initial_parameters};
use gradprobe::{
    Error, FindingKind, StepOutputs, Verdict,
    cudarc::driver::{
        CudaGraph,
        sys::{self, CUgraphNodeType},
    },
};
use require::{pointless, skipped};
use std::{
    path::Path,
    process::{Command, Output},
    ptr,
};
use training::{BETA1, BETA2, EPSILON, LEARNING_RATE, MAX_NORM, State, Training, WEIGHT_DECAY};

const KERNELS: [&str; 6] =
    ["forward_hidden", "forward_output", "backward_output", "backward_hidden", "count_step", "adamw"];

/// How the error begins where a kernel cannot be compiled.
const NO_NVRTC: &str = "no NVRTC";

/// Whether this error says that there is no device to run on.
fn is_missing(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(Error::DriverNotFound { .. } | Error::DeviceNotFound { .. }))
}

/// The example's training, where there is a device.
fn training() -> Option<Training> {
    match Training::new() {
        Ok(training) => Some(training),
        Err(error) if is_missing(&*error) => {
            skipped(require::GPU, &error.to_string());
            None
        }
        Err(error) if error.to_string().starts_with(NO_NVRTC) => {
            skipped(require::NVCC, &error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The kinds of a graph's nodes.
fn nodes(graph: &CudaGraph) -> Vec<CUgraphNodeType> {
    let mut count = 0;
    // SAFETY: the graph is alive; without room for nodes only their number is written.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), ptr::null_mut(), &raw mut count) }.result().unwrap();
    let mut nodes = vec![ptr::null_mut(); count];
    // SAFETY: and there is room for that number now.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), nodes.as_mut_ptr(), &raw mut count) }.result().unwrap();
    let kind = |node| {
        let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: the node is one of the graph's.
        unsafe { sys::cuGraphNodeGetType(node, &raw mut kind) }.result().unwrap();
        kind
    };
    nodes.into_iter().map(kind).collect()
}

/// The example's training in f64.
struct Reference {
    samples: Samples,
    parameters: Vec<Parameter>,
    steps: u64,
}

impl Reference {
    fn new() -> Self {
        let zero = Bounded::exact(0.0);
        let of = |value| Parameter { value, exp_avg: zero, exp_avg_sq: zero };
        Self {
            samples: Samples::new(),
            parameters: exact(&initial_parameters()).into_iter().map(of).collect(),
            steps: 0,
        }
    }

    /// Loss and norm of the next step, on this batch.
    fn step(&mut self, batch: usize) -> (f64, f64) {
        const SETTINGS: Settings = Settings {
            learning_rate: LEARNING_RATE,
            beta1: BETA1,
            beta2: BETA2,
            epsilon: EPSILON,
            weight_decay: WEIGHT_DECAY,
        };
        // Only values: bounds would grow from step to step.
        let exactly = |value: f64| Bounded { value, bound: 0.0 };
        let parameters: Vec<Bounded> = self.parameters.iter().map(|parameter| exactly(parameter.value.value)).collect();
        let inputs = &self.samples.inputs[batch * BATCH * INPUTS..][..BATCH * INPUTS];
        let (loss, gradient) = loss_and_gradient(&parameters, inputs, &self.samples.targets[batch * BATCH..][..BATCH]);
        let norm = gradient.iter().map(|derivative| derivative.value.powi(2)).sum::<f64>().sqrt();
        let coefficient = exactly((MAX_NORM / (norm + 1e-6)).min(1.0));
        self.steps += 1;
        for (index, (parameter, derivative)) in self.parameters.iter_mut().zip(gradient).enumerate() {
            let after = parameter.after(index < DECAYED, exactly(derivative.value), coefficient, self.steps, &SETTINGS);
            *parameter = Parameter {
                value: exactly(after.value.value),
                exp_avg: exactly(after.exp_avg.value),
                exp_avg_sq: exactly(after.exp_avg_sq.value),
            };
        }
        (loss.value, norm)
    }
}

/// Over some epochs, with a broken sample in a step of the first. What f32 rounds differently grows from step to step, and
/// by the order of the sums on a GPU; a wrong coefficient, a miscounted step or a skipped one that was not would be
/// hundreds of times as far off.
#[test]
fn the_graph_trains_as_f64_does_and_skips_what_is_broken() {
    const TOLERANCE: f64 = 1e-4;
    const BROKEN_STEP: usize = 7;
    let Some(mut training) = training() else { return };
    assert_eq!(
        nodes(&training.graph),
        [CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL; KERNELS.len() + 1],
        "the kernels and the measurement: no copy, no allocation, no clip"
    );
    let mut reference = Reference::new();
    let (mut clipped, mut first, mut last, mut worst) = (0, 0.0, 0.0, 0.0f64);
    for step in 1..=4 * BATCHES {
        let batch = (step - 1) % BATCHES;
        if step == BROKEN_STEP {
            let (sample, before) = (batch * BATCH + 3, training.state().unwrap());
            training.set_target(sample, f32::NAN).unwrap();
            training.step().unwrap();
            training.set_target(sample, reference.samples.targets[sample]).unwrap();
            let report = training.probe.wait().unwrap();
            assert_eq!((report.outputs().skip, report.step()), (1, step as u64));
            assert_eq!(report.outputs().flags, StepOutputs::FLAG_NAN | StepOutputs::FLAG_SKIP);
            let diagnosis = report.diagnosis().unwrap();
            let of_nan = diagnosis.findings().iter().find(|finding| finding.kind == FindingKind::Nan).unwrap();
            assert_eq!((diagnosis.verdict(), of_nan.tensors().count()), (Verdict::Critical, 4), "{diagnosis}");
            let frontier = diagnosis.frontier().unwrap();
            assert_eq!((frontier.step, frontier.element), (step as u64, 0), "{diagnosis}");
            let after = training.state().unwrap();
            let bits = |state: &State| {
                let buffers = [&state.parameters, &state.exp_avg, &state.exp_avg_sq];
                buffers.into_iter().flatten().map(|value| value.to_bits()).collect::<Vec<_>>()
            };
            assert!(bits(&after) == bits(&before), "a skipped step has changed something");
            assert_eq!((after.steps, before.steps), (step as u64 - 1, step as u64 - 1));
            continue;
        }
        training.step().unwrap();
        let (loss, norm) = reference.step(batch);
        let report = training.probe.wait().unwrap();
        let outputs = report.outputs();
        let seen = f64::from(training.losses().unwrap()[batch]);
        for (what, seen, expected) in [
            ("loss", seen, loss),
            ("norm", outputs.total_norm, norm),
            ("coefficient", f64::from(outputs.coefficient), (MAX_NORM / (norm + 1e-6)).min(1.0)),
        ] {
            let off = (seen / expected - 1.0).abs();
            assert!(off < TOLERANCE, "step {step}: {what} {seen:e}, not {expected:e}");
            worst = worst.max(off);
        }
        clipped += usize::from(outputs.coefficient < 1.0);
        (first, last) = (if step == 1 { loss } else { first }, loss);
    }
    println!("at most {worst:e} from f64; {clipped} steps were clipped");
    assert!(clipped > 5 && clipped < 4 * BATCHES - 5, "{clipped}");
    assert!(last < 0.2 * first, "{first} {last}");
    let state = training.state().unwrap();
    assert_eq!(state.steps, 4 * BATCHES as u64 - 1);
    assert_eq!(state.parameters.len(), PARAMETERS);
    for (index, (&seen, expected)) in state.parameters.iter().zip(&reference.parameters).enumerate() {
        let expected = expected.value.value;
        assert!((f64::from(seen) - expected).abs() < TOLERANCE, "parameter {index}: {seen:e}, not {expected:e}");
    }
}

#[test]
fn nvrtc_compiles_the_kernels_for_old_and_new_gpus() {
    for capability in [(7, 5), (8, 0), (9, 0), (12, 0)] {
        match training::compile(capability) {
            Ok(ptx) => {
                let ptx = ptx.to_src();
                assert_eq!(ptx.matches(".visible .entry ").count(), KERNELS.len());
                for kernel in KERNELS {
                    assert!(ptx.contains(&format!(".visible .entry {kernel}(")), "{capability:?}: no {kernel}");
                }
            }
            Err(error) if error.to_string().starts_with(NO_NVRTC) => {
                return skipped(require::NVCC, &error.to_string());
            }
            Err(error) => panic!("{capability:?}: {error}"),
        }
    }
}

/// The program, which cargo builds beside the tests, as a bundle has it too.
fn program() -> Output {
    let test = std::env::current_exe().unwrap();
    let name = format!("adamw{}", std::env::consts::EXE_SUFFIX);
    let folders = test.parent().and_then(Path::parent).unwrap();
    let program = folders.join("examples").join(name);
    assert!(program.exists(), "{} is missing: cargo build --example adamw", program.display());
    Command::new(program).output().unwrap()
}

#[test]
fn the_program_says_in_one_line_that_there_is_no_driver() {
    if Training::new().err().is_none_or(|error| !is_missing(&*error)) {
        return pointless("there is a CUDA driver");
    }
    let output = program();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    assert!(complaint.starts_with("error: no CUDA d") && complaint.ends_with('\n'), "{complaint:?}");
    assert_eq!(complaint.matches('\n').count(), 1, "{complaint:?}");
    assert!(output.stdout.is_empty());
}

#[test]
fn the_program_trains_and_tells_of_the_broken_step() {
    if training().is_none() {
        return;
    }
    let output = program();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    println!("{text}");
    let lines: Vec<&str> = text.lines().collect();
    // Each epoch: its number, the mean loss, and what was measured.
    let losses: Vec<f64> = lines
        .iter()
        .filter_map(|line| line.strip_prefix("  ").filter(|line| line.contains(" × ")))
        .map(|line| line.split_whitespace().nth(1).unwrap().parse().unwrap())
        .collect();
    assert_eq!(losses.len(), 12);
    assert!(losses.is_sorted_by(|a, b| b < a) && losses[11] < 0.1 * losses[0], "{losses:?}");
    for needle in [
        "step 37: critical (4 of 4 tensors)",
        "  began at step 37 in output.bias, element 0 (nan); nothing before it is clean",
        "  skipped by AdamW: parameters, moments and its count of 36 steps are as before",
    ] {
        assert!(lines.contains(&needle), "{needle:?} is not in {text}");
    }
}
