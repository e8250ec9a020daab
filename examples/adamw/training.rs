//! A training step on the device: memory, kernels, and the graph they are captured in.
#![allow(unsafe_code, reason = "launches kernels of its own")]

use crate::data::{
    BATCH, BATCHES, DECAYED, HIDDEN, HIDDEN_BIAS, HIDDEN_WEIGHT, INPUTS, OUTPUT_BIAS, OUTPUT_WEIGHT, PARAMETERS,
    Samples, initial_parameters,
};
use gradprobe::{
    Clip, Config, DType, HEADER, Plan, Probe, Rules, Tensor,
    cuda::{self, Cuda},
    cudarc::{
        driver::{
            CudaContext, CudaFunction, CudaGraph, CudaSlice, CudaStream, CudaView, LaunchConfig, PushKernelArg,
            sys::{
                CUdevice_attribute_enum::{
                    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
                    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
                },
                CUgraphInstantiate_flags, CUstreamCaptureMode,
            },
        },
        nvrtc::{self, CompileError, CompileOptions, Ptx, compile_ptx_with_opts},
    },
};
use std::{error::Error, sync::Arc};

/// The global norm to which gradients are clipped.
pub const MAX_NORM: f64 = 0.5;
/// What AdamW is told.
pub const LEARNING_RATE: f32 = 0.01;
pub const BETA1: f32 = 0.9;
pub const BETA2: f32 = 0.999;
pub const EPSILON: f32 = 1e-8;
pub const WEIGHT_DECAY: f32 = 0.01;

/// Threads of a block, in all launches.
const THREADS: u32 = 128;

/// A net in training. A step is one launch of a graph.
pub struct Training {
    /// The launches of a step. To be dropped before what they use, as here.
    pub graph: CudaGraph,
    /// Which measures the gradients in each step.
    pub probe: Probe,
    /// To be kept as long as the graph: with its last kernel a module is unloaded.
    _kernels: Kernels,
    /// On which all of it is ordered.
    pub stream: Arc<CudaStream>,
    memory: Memory,
}

/// What a step changes, beside the gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// All [`PARAMETERS`] of them, as in the two moments.
    pub parameters: Vec<f32>,
    pub exp_avg: Vec<f32>,
    pub exp_avg_sq: Vec<f32>,
    /// Steps that AdamW has made.
    pub steps: u64,
}

impl Training {
    /// The net before its first step, on a stream of its own.
    ///
    /// # Errors
    /// When there is no driver, no device or no NVRTC, or when one of them fails.
    pub fn new() -> Result<Self, Box<dyn Error>> {
        let elements = |count: usize| count as u64;
        let plan = Plan::new([
            ("hidden.weight", DType::F32, elements(HIDDEN * INPUTS)),
            ("hidden.bias", DType::F32, elements(HIDDEN)),
            ("output.weight", DType::F32, elements(HIDDEN)),
            ("output.bias", DType::F32, elements(1)),
        ])?;
        // Asks whether there is a driver, too.
        let stream = cuda::stream(0)?;
        // A capture cannot wait for the events by which cudarc orders streams.
        // SAFETY: all memory of this context is used on this one stream.
        unsafe { stream.context().disable_event_tracking() };
        // A NaN or Inf anywhere has `skip` set, unless the configuration says otherwise.
        let config = Config::new().clip(Clip::global_norm(MAX_NORM)).rules(Rules::default());
        let mut probe = Probe::new(Cuda::new(&stream)?, plan, config)?;
        let kernels = Kernels::load(stream.context())?;
        let mut memory = Memory::new(&stream)?;

        // Uploads where the gradients are, for all replays.
        // SAFETY: `Training` keeps the probe and the gradients as long as the graph, which uses them on this one stream.
        unsafe { probe.bind(&Tensors::of(&memory.gradients).in_the_order_of_the_plan(), &[]) }?;
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let captured = launch_step(&stream, &kernels, &mut memory, &mut probe);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        captured?;
        let graph = graph?.ok_or("the capture of a step is empty")?;
        Ok(Self { graph, probe, _kernels: kernels, stream, memory })
    }

    /// Launches a step. Nothing is told to the device but that: which batch it is and which step, it knows.
    ///
    /// # Errors
    /// The driver's.
    pub fn step(&self) -> Result<(), Box<dyn Error>> {
        Ok(self.graph.launch()?)
    }

    /// The loss of each batch when its turn came last. Waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn losses(&self) -> Result<Vec<f32>, Box<dyn Error>> {
        Ok(self.stream.clone_dtoh(&self.memory.losses)?)
    }

    /// Parameters, moments and AdamW's count after the steps launched so far. Waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn state(&self) -> Result<State, Box<dyn Error>> {
        let Memory { parameters, exp_avg, exp_avg_sq, step, .. } = &self.memory;
        Ok(State {
            parameters: self.stream.clone_dtoh(parameters)?,
            exp_avg: self.stream.clone_dtoh(exp_avg)?,
            exp_avg_sq: self.stream.clone_dtoh(exp_avg_sq)?,
            steps: self.stream.clone_dtoh(step)?[0],
        })
    }

    /// Puts another value in the place of a sample's, for the steps launched from now on.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When there is no such sample.
    pub fn set_target(&mut self, sample: usize, value: f32) -> Result<(), Box<dyn Error>> {
        let mut target = self.memory.targets.slice_mut(sample..=sample);
        Ok(self.stream.memcpy_htod(&[value], &mut target)?)
    }
}

/// Device memory, none of which is allocated in a step.
struct Memory {
    inputs: CudaSlice<f32>,
    targets: CudaSlice<f32>,
    /// Of a batch, from the forward pass for the backward pass.
    activations: CudaSlice<f32>,
    errors: CudaSlice<f32>,
    losses: CudaSlice<f32>,
    /// Each of all tensors in one piece, so that AdamW is one launch.
    parameters: CudaSlice<f32>,
    gradients: CudaSlice<f32>,
    exp_avg: CudaSlice<f32>,
    exp_avg_sq: CudaSlice<f32>,
    /// AdamW's step, and what its averages are divided by in it.
    step: CudaSlice<u64>,
    corrections: CudaSlice<f32>,
}

impl Memory {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, Box<dyn Error>> {
        let Samples { inputs, targets } = Samples::new();
        Ok(Self {
            inputs: stream.clone_htod(&inputs)?,
            targets: stream.clone_htod(&targets)?,
            activations: stream.alloc_zeros(BATCH * HIDDEN)?,
            errors: stream.alloc_zeros(BATCH)?,
            losses: stream.alloc_zeros(BATCHES)?,
            parameters: stream.clone_htod(&initial_parameters())?,
            gradients: stream.alloc_zeros(PARAMETERS)?,
            exp_avg: stream.alloc_zeros(PARAMETERS)?,
            exp_avg_sq: stream.alloc_zeros(PARAMETERS)?,
            step: stream.alloc_zeros(1)?,
            corrections: stream.alloc_zeros(2)?,
        })
    }
}

/// The tensors in a buffer of all parameters, or of their gradients.
struct Tensors<V> {
    hidden_weight: V,
    hidden_bias: V,
    output_weight: V,
    output_bias: V,
}

impl<'a> Tensors<CudaView<'a, f32>> {
    fn of(all: &'a CudaSlice<f32>) -> Self {
        Self {
            hidden_weight: all.slice(HIDDEN_WEIGHT..OUTPUT_WEIGHT),
            output_weight: all.slice(OUTPUT_WEIGHT..HIDDEN_BIAS),
            hidden_bias: all.slice(HIDDEN_BIAS..OUTPUT_BIAS),
            output_bias: all.slice(OUTPUT_BIAS..),
        }
    }

    fn in_the_order_of_the_plan(&self) -> [&dyn Tensor; 4] {
        [&self.hidden_weight, &self.hidden_bias, &self.output_weight, &self.output_bias]
    }
}

/// The kernels of adamw.cu.
struct Kernels {
    forward_hidden: CudaFunction,
    forward_output: CudaFunction,
    backward_output: CudaFunction,
    backward_hidden: CudaFunction,
    count_step: CudaFunction,
    adamw: CudaFunction,
}

impl Kernels {
    fn load(context: &Arc<CudaContext>) -> Result<Self, Box<dyn Error>> {
        let module = context.load_module(compile((context.attribute(MAJOR)?, context.attribute(MINOR)?))?)?;
        Ok(Self {
            forward_hidden: module.load_function("forward_hidden")?,
            forward_output: module.load_function("forward_output")?,
            backward_output: module.load_function("backward_output")?,
            backward_hidden: module.load_function("backward_hidden")?,
            count_step: module.load_function("count_step")?,
            adamw: module.load_function("adamw")?,
        })
    }
}

/// Has NVRTC compile adamw.cu for a compute capability such as (9, 0).
///
/// # Errors
/// What NVRTC says, or that there is none.
pub fn compile((major, minor): (i32, i32)) -> Result<Ptx, Box<dyn Error>> {
    // Asked before cudarc needs it, which panics when it is missing.
    // SAFETY: loading runs the library's initialisers: NVIDIA's, which cudarc would run next.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err("no NVRTC to compile the kernels: libnvrtc could not be loaded".into());
    }
    // The program may run where no folder has the header.
    let source = include_str!("adamw.cu").replace("#include <gradprobe.h>", HEADER);
    let options = CompileOptions {
        options: vec!["--std=c++17".to_owned(), format!("--gpu-architecture=compute_{major}{minor}")],
        name: Some("adamw.cu".to_owned()),
        ..CompileOptions::default()
    };
    compile_ptx_with_opts(source, options).map_err(|error| match error {
        CompileError::CompileError { log, .. } => log.to_string_lossy().into(),
        other => other.into(),
    })
}

/// At least so many threads.
fn threads(count: usize) -> LaunchConfig {
    let blocks = u32::try_from(count.div_ceil(THREADS as usize)).expect("a small net");
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

/// The launches of a step.
fn launch_step(
    stream: &Arc<CudaStream>,
    kernels: &Kernels,
    memory: &mut Memory,
    probe: &mut Probe,
) -> Result<(), Box<dyn Error>> {
    let Memory {
        inputs,
        targets,
        activations,
        errors,
        losses,
        parameters,
        gradients,
        exp_avg,
        exp_avg_sq,
        step,
        corrections,
    } = memory;
    // Where the device has `StepOutputs`: up to `measure` those of the step before.
    let outputs = probe.addresses().outputs;
    let net = Tensors::of(parameters);

    let mut launch = stream.launch_builder(&kernels.forward_hidden);
    launch.arg(&outputs).arg(&*inputs).arg(&net.hidden_weight).arg(&net.hidden_bias).arg(&mut *activations);
    // SAFETY: the kernel has these parameters, and goes through them by the shapes in data.rs, by which they were made.
    unsafe { launch.launch(threads(BATCH * HIDDEN)) }?;

    let mut launch = stream.launch_builder(&kernels.forward_output);
    launch.arg(&outputs).arg(&*targets).arg(&*activations);
    launch.arg(&net.output_weight).arg(&net.output_bias).arg(&mut *errors);
    // SAFETY: as above.
    unsafe { launch.launch(threads(BATCH)) }?;

    // In the order of data.rs.
    let (mut weights, mut biases) = gradients.split_at_mut(HIDDEN_BIAS);
    let (mut hidden_weight, mut output_weight) = weights.split_at_mut(OUTPUT_WEIGHT);
    let (mut hidden_bias, mut output_bias) = biases.split_at_mut(HIDDEN);
    let mut launch = stream.launch_builder(&kernels.backward_output);
    launch.arg(&outputs).arg(&*activations).arg(&*errors);
    launch.arg(&mut output_weight).arg(&mut output_bias).arg(&mut *losses);
    // SAFETY: as above.
    unsafe { launch.launch(threads(HIDDEN + 1)) }?;

    let mut launch = stream.launch_builder(&kernels.backward_hidden);
    launch.arg(&outputs).arg(&*inputs).arg(&*activations).arg(&*errors).arg(&net.output_weight);
    launch.arg(&mut hidden_weight).arg(&mut hidden_bias);
    // SAFETY: as above.
    unsafe { launch.launch(threads(HIDDEN * (INPUTS + 1))) }?;

    // From here on `StepOutputs` are those of this step.
    probe.measure(&Tensors::of(gradients).in_the_order_of_the_plan())?;

    let mut launch = stream.launch_builder(&kernels.count_step);
    launch.arg(&outputs).arg(&mut *step).arg(&mut *corrections).arg(&BETA1).arg(&BETA2);
    // SAFETY: as above.
    unsafe { launch.launch(threads(1)) }?;

    let (length, decayed) = (PARAMETERS as u64, DECAYED as u64);
    let mut launch = stream.launch_builder(&kernels.adamw);
    launch.arg(&outputs).arg(&*corrections).arg(&mut *parameters).arg(&*gradients);
    launch.arg(&mut *exp_avg).arg(&mut *exp_avg_sq).arg(&length).arg(&decayed);
    launch.arg(&LEARNING_RATE).arg(&BETA1).arg(&BETA2).arg(&EPSILON).arg(&WEIGHT_DECAY);
    // SAFETY: the kernel has these parameters, and the four buffers are of this length.
    unsafe { launch.launch(threads(PARAMETERS)) }?;
    Ok(())
}
