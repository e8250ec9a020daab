//! Times variants of the kernels (`variants.py`) in one run, in turns, so that what the machine does meanwhile is the
//! same for all. A table of ratios to `baseline` is printed; a variant that finds other norms is named.

use crate::{
    clock::Clock,
    gradients::{Gradients, transformer_lengths},
};
use bytemuck::{Zeroable, bytes_of, cast_slice};
use gradprobe::{
    DType, Element, RawTensor, Record, StepOutputs, Tensor,
    cudarc::{
        driver::{
            CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
            sys::{
                self, CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
                CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
            },
        },
        nvrtc::Ptx,
    },
    device::{ClipArguments, Common, Kernel, StepArguments, TensorEntry},
};
use half::{bf16, f16};
use serde_json::Value;
use std::{fs, path::Path, ptr, sync::Arc, time::Duration};

/// Elements of a chunk.
const CHUNK: u64 = 32 << 10;
/// Elements of a small tensor, which a warp measures, at most.
const TILE: u64 = 2048;

/// Turns of each variant in each case.
const TURNS: usize = 15;

/// How measure and clip are launched.
#[derive(Clone, Copy, PartialEq)]
enum Launch {
    Two,
    /// The clip may start while the measurement ends.
    Programmatic,
}

struct Variant {
    name: String,
    same_bits: bool,
    launch: Launch,
    measure: CudaFunction,
    clip: CudaFunction,
    multiprocessors: u32,
}

impl Variant {
    fn load(stream: &Arc<CudaStream>, folder: &Path, facts: &Value) -> Self {
        let context = stream.context();
        let name = facts["name"].as_str().unwrap().to_owned();
        let cubin = fs::read(folder.join(format!("{name}.cubin"))).unwrap();
        let module = context.load_module(Ptx::from_binary(cubin)).unwrap();
        let launch = match facts["launch"].as_str().unwrap() {
            "two" => Launch::Two,
            "programmatic" => Launch::Programmatic,
            other => panic!("{name}: launch {other:?}"),
        };
        Self {
            same_bits: facts["same_bits"].as_bool().unwrap(),
            measure: module.load_function("gradprobe_measure").unwrap(),
            clip: module.load_function("gradprobe_clip").unwrap(),
            multiprocessors: context.attribute(MULTIPROCESSORS).unwrap().try_into().unwrap(),
            launch,
            name,
        }
    }

    fn config(&self, kernel: Kernel, function: &CudaFunction, arguments: &Launched) -> LaunchConfig {
        let threads = kernel.threads();
        let resident = function.occupancy_max_active_blocks_per_multiprocessor(threads, 0, None).unwrap();
        let blocks = arguments.step.0.common.chunk_count.min(resident * self.multiprocessors);
        LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
    }

    fn measure(&self, stream: &CudaStream, arguments: &Launched) {
        let mut launch = stream.launch_builder(&self.measure);
        launch.arg(&arguments.step);
        // SAFETY: the kernel takes these arguments, whose tables and tensors live as long as the case.
        unsafe { launch.launch(self.config(Kernel::Measure, &self.measure, arguments)) }.unwrap();
    }

    fn step(&self, stream: &CudaStream, arguments: &Launched) {
        self.measure(stream, arguments);
        if self.launch == Launch::Programmatic {
            return self.clip_programmatically(stream, arguments);
        }
        let mut launch = stream.launch_builder(&self.clip);
        launch.arg(&arguments.clip);
        // SAFETY: as above.
        unsafe { launch.launch(self.config(Kernel::Clip, &self.clip, arguments)) }.unwrap();
    }

    /// cudarc has no call for it.
    fn clip_programmatically(&self, stream: &CudaStream, arguments: &Launched) {
        let config = self.config(Kernel::Clip, &self.clip, arguments);
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: config.grid_dim.0,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: config.block_dim.0,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: 1,
        };
        let mut parameters = [ptr::from_ref(&arguments.clip).cast_mut().cast()];
        let function = self.clip.cu_function();
        // SAFETY: as above; what the pointers point to is read before the call returns.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function, parameters.as_mut_ptr(), ptr::null_mut()) }
            .result()
            .unwrap();
    }
}

/// The arguments of both kernels.
struct Launched {
    step: Parameter<StepArguments>,
    clip: Parameter<ClipArguments>,
}

#[repr(transparent)]
struct Parameter<T>(T);

// SAFETY: `repr(C)` structs of integers and floats without padding, as the kernels declare them.
unsafe impl<T> DeviceRepr for Parameter<T> {}

/// What a launch needs, for chunks of some length.
struct Tables {
    arguments: Launched,
    outputs: CudaSlice<u8>,
    _kept: Vec<CudaSlice<u8>>,
}

impl Tables {
    fn new(stream: &Arc<CudaStream>, tensors: &[RawTensor], max_norm: f64) -> Self {
        let (mut entries, mut chunk_tensors) = (Vec::new(), Vec::new());
        for (tensor, index) in tensors.iter().zip(0u32..) {
            let (dtype, length) = tensor.shape().unwrap();
            let chunk_count = u32::try_from(length.div_ceil(CHUNK)).unwrap();
            // The magnitude of 1e-10, or the least above it.
            let dead_bits = match dtype {
                DType::F32 => 1e-10f32.to_bits(),
                DType::F16 => 1,
                DType::BF16 => (1e-10f32.to_bits() >> 16) + 1,
            };
            let first_chunk = u32::try_from(chunk_tensors.len()).unwrap();
            entries.push(TensorEntry {
                length,
                first_chunk,
                chunk_count,
                dtype: dtype as u16,
                is_uncounted: 0,
                dead_bits,
            });
            chunk_tensors.extend((0..chunk_count).map(|_| index));
        }
        let addresses: Vec<u64> = tensors.iter().map(RawTensor::address).collect();
        let (chunks, count) = (chunk_tensors.len(), tensors.len());
        let upload = |bytes: &[u8]| stream.clone_htod(bytes).unwrap();
        let kept = vec![
            upload(cast_slice(&addresses)),
            upload(cast_slice(&entries)),
            upload(cast_slice(&chunk_tensors)),
            stream.alloc_zeros(chunks * size_of::<Record>()).unwrap(),
            stream.alloc_zeros(count * size_of::<Record>()).unwrap(),
            stream.alloc_zeros((chunks + count + 1) * 4).unwrap(),
            // The clip's state, in which the steps are counted.
            stream.alloc_zeros(256).unwrap(),
        ];
        let outputs = upload(bytes_of(&StepOutputs::default()));
        let address = |slice: &CudaSlice<u8>| slice.device_ptr(stream).0;
        let common = Common {
            addresses: address(&kept[0]),
            tensors: address(&kept[1]),
            chunk_tensors: address(&kept[2]),
            chunk_parts: address(&kept[3]),
            records: address(&kept[4]),
            outputs: address(&outputs),
            chunks_done: address(&kept[5]),
            tensors_done: address(&kept[5]) + chunks as u64 * 4,
            chunk_count: u32::try_from(chunks).unwrap(),
            tensor_count: u32::try_from(count).unwrap(),
        };
        // The tensors of a case are all small, or none is.
        let is_small = entries[0].length <= TILE;
        let (clip_state, large_chunks) = (address(&kept[6]), if is_small { 0 } else { common.chunk_count });
        let step = StepArguments { common, max_norm, large_chunks, clip_state, ..StepArguments::zeroed() };
        let clip = ClipArguments { common, clip_state, ..ClipArguments::zeroed() };
        let arguments = Launched { step: Parameter(step), clip: Parameter(clip) };
        Self { arguments, outputs, _kept: kept }
    }

    /// The norm the last measurement found.
    fn norm(&self, stream: &Arc<CudaStream>) -> f64 {
        let bytes = stream.clone_dtoh(&self.outputs).unwrap();
        stream.synchronize().unwrap();
        bytemuck::pod_read_unaligned::<StepOutputs>(&bytes).finite_total_norm
    }
}

/// Times every variant on one case, and prints a line for each.
fn case<T: Element + DeviceRepr + Into<f32>>(
    (stream, clock, variants): (&Arc<CudaStream>, &Clock, &[Variant]),
    name: &str,
    gradients: &mut Gradients<T>,
    share: Option<f64>,
) {
    let max_norm = share.map_or(0.0, |share| gradients.max_norm(share));
    let places = gradients.places();
    let tables = |max_norm: f64| -> Vec<Tables> {
        (0..places).map(|place| Tables::new(stream, &gradients.tensors(place), max_norm)).collect()
    };
    let all: Vec<Vec<Tables>> = variants.iter().map(|_| tables(max_norm)).collect();
    let after = tables(0.0);

    let mut times: Vec<Vec<Duration>> = vec![Vec::new(); variants.len()];
    let mut norms = Vec::new();
    for round in 0..=TURNS {
        for (index, (variant, tables)) in variants.iter().zip(&all).enumerate() {
            let place = (round + index) % places;
            if share.is_some() {
                gradients.restore(place);
            }
            let arguments = &tables[place].arguments;
            let time = clock.turns(1, |_, begin| {
                begin();
                if share.is_some() { variant.step(stream, arguments) } else { variant.measure(stream, arguments) }
            });
            if round == 0 {
                // The first is a warm-up, and what it found is compared: the norm, and what the clip left.
                let found = tables[place].norm(stream);
                variants[0].measure(stream, &after[place].arguments);
                norms.push([found, after[place].norm(stream)]);
            } else {
                times[index].extend(time);
            }
        }
    }
    println!("{name}");
    let middle = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64()
    };
    let baseline = middle(&mut times[0]);
    for ((variant, times), found) in variants.iter().zip(&mut times).zip(&norms) {
        let time = middle(times);
        let off = found.iter().zip(&norms[0]).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
        let wrong = if off.is_nan() || off > if variant.same_bits { 0.0 } else { 1e-6 } { "  WRONG" } else { "" };
        println!("  {:22} {:9.2} us  {:.3}{wrong}", variant.name, time * 1e6, baseline / time);
    }
}

/// Times the variants in `folder`.
pub fn run(stream: &Arc<CudaStream>, clock: &Clock, folder: &Path) {
    let listing: Value = serde_json::from_slice(&fs::read(folder.join("variants.json")).unwrap()).unwrap();
    let variants: Vec<Variant> =
        listing.as_array().unwrap().iter().map(|facts| Variant::load(stream, folder, facts)).collect();
    let with = (stream, clock, &*variants);
    println!("times as fast as the baseline, in the median of {TURNS} turns");
    case(with, "measure, 1 GiB, f32", &mut Gradients::new(stream, vec![1 << 28], 4, 0, |x| x), None);
    case(with, "measure, 1 GiB, bf16", &mut Gradients::new(stream, vec![1 << 29], 4, 0, bf16::from_f32), None);
    case(with, "measure, 1 GiB, f16", &mut Gradients::new(stream, vec![1 << 29], 4, 0, f16::from_f32), None);
    let mut transformer = Gradients::new(stream, transformer_lengths(), 2, 0, bf16::from_f32);
    case(with, "measure and clip, 2 GiB in 290 tensors", &mut transformer, Some(0.5));
    case(
        with,
        "measure and clip, 50 MB",
        &mut Gradients::new(stream, vec![500_000; 50], 1, 0, bf16::from_f32),
        Some(0.5),
    );
    case(
        with,
        "measure and clip, 1000 tensors of 1024",
        &mut Gradients::new(stream, vec![1024; 1000], 1, 0, |x| x),
        Some(0.5),
    );
}
