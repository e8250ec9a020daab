//! The CUDA backend on a GPU: the same bits as the CPU's, in streams and graphs, over cudarc's slices and bare
//! addresses, with nothing that waits. Skipped where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(unsafe_code, reason = "graphs, host functions and bare addresses are the driver's")]

mod beside;
mod bits;
#[path = "../common/mod.rs"]
mod common;
mod documented;
mod graphs;
mod loss_scale;
mod moments;
mod optimizer;
#[path = "../require/mod.rs"]
mod require;
mod streams;
mod tensors;

use common::{Effort, demand_none, gsnr, host::OnHost, run_all, short};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Element, Error, HostTensor, HostTensorMut, Plan, Probe, RawTensor, Record,
    Report, Rules, StepOutputs, Tensor, TensorMut,
    clip::{AdaptiveClip, LossScale},
    cuda::{self, Cuda},
    cudarc::driver::{
        CudaContext, CudaGraph, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, result,
        sys::{
            self, CUcontext, CUdevice, CUgraphInstantiate_flags, CUgraphNodeType, CUresult,
            CUstreamCaptureMode::{
                CU_STREAM_CAPTURE_MODE_GLOBAL as ALL_THREADS, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD,
            },
        },
    },
    dot::Dot,
    gsnr::{AdamMoments, AdamStep, GsnrConfig, GsnrReport},
    histogram::Histogram,
    history::{HistoryReport, HistoryStep, HistoryTensor},
    samples::SampleConfig,
};
use half::{bf16, f16};
use require::{pointless, skipped};
use std::{
    ffi::{c_uint, c_void},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The first device, if there is one. A context object of the caller's own: cudarc keeps errors and its event tracking
/// in it.
fn device() -> Option<Arc<CudaContext>> {
    match cuda::stream(0) {
        Ok(_) => Some(CudaContext::new(0).unwrap()),
        Err(error @ (Error::DriverNotFound { .. } | Error::DeviceNotFound { .. })) => {
            skipped(require::GPU, &error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The elements of one tensor of each dtype, some chunks long.
#[derive(Clone, Debug, PartialEq)]
struct Tensors {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
}

const LENGTHS: [usize; 3] = [100_003, 40_000, 65_537];

impl Tensors {
    /// Others for each seed.
    fn of(seed: u64) -> Self {
        let value = |tensor: u64, index: usize| {
            let z = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (seed << 8 | tensor);
            let z = (z ^ z >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            ((z >> 40) as f32 / 16_777_216.0 - 0.5) * (1.0 + seed as f32)
        };
        Self {
            f32: (0..LENGTHS[0]).map(|i| value(0, i)).collect(),
            f16: (0..LENGTHS[1]).map(|i| f16::from_f32(value(1, i))).collect(),
            bf16: (0..LENGTHS[2]).map(|i| bf16::from_f32(value(2, i))).collect(),
        }
    }

    fn plan() -> Plan {
        Plan::new(DType::ALL.into_iter().zip(LENGTHS).map(|(dtype, len)| (dtype.name(), dtype, len as u64))).unwrap()
    }

    fn hosts(&self) -> [HostTensor<'_>; 3] {
        [HostTensor::F32(&self.f32), HostTensor::F16(&self.f16), HostTensor::BF16(&self.bf16)]
    }

    fn hosts_mut(&mut self) -> [HostTensorMut<'_>; 3] {
        [HostTensorMut::F32(&mut self.f32), HostTensorMut::F16(&mut self.f16), HostTensorMut::BF16(&mut self.bf16)]
    }
}

/// [`Tensors`] on the device.
struct OnDevice {
    stream: Arc<CudaStream>,
    f32: CudaSlice<f32>,
    f16: CudaSlice<f16>,
    bf16: CudaSlice<bf16>,
}

impl OnDevice {
    fn new(stream: &Arc<CudaStream>, tensors: &Tensors) -> Self {
        Self {
            stream: Arc::clone(stream),
            f32: stream.clone_htod(&tensors.f32).unwrap(),
            f16: stream.clone_htod(&tensors.f16).unwrap(),
            bf16: stream.clone_htod(&tensors.bf16).unwrap(),
        }
    }

    /// Other elements in the same memory.
    fn set(&mut self, tensors: &Tensors) {
        self.stream.memcpy_htod(&tensors.f32, &mut self.f32).unwrap();
        self.stream.memcpy_htod(&tensors.f16, &mut self.f16).unwrap();
        self.stream.memcpy_htod(&tensors.bf16, &mut self.bf16).unwrap();
    }

    /// Other elements in the same memory, from the device: nothing about this waits.
    fn copy(&mut self, from: &Self) {
        self.stream.memcpy_dtod(&from.f32, &mut self.f32).unwrap();
        self.stream.memcpy_dtod(&from.f16, &mut self.f16).unwrap();
        self.stream.memcpy_dtod(&from.bf16, &mut self.bf16).unwrap();
    }

    fn get(&self) -> Tensors {
        let tensors = Tensors {
            f32: self.stream.clone_dtoh(&self.f32).unwrap(),
            f16: self.stream.clone_dtoh(&self.f16).unwrap(),
            bf16: self.stream.clone_dtoh(&self.bf16).unwrap(),
        };
        self.stream.synchronize().unwrap();
        tensors
    }

    fn slices(&self) -> [&dyn Tensor; 3] {
        [&self.f32, &self.f16, &self.bf16]
    }

    fn slices_mut(&mut self) -> [&mut dyn TensorMut; 3] {
        [&mut self.f32, &mut self.f16, &mut self.bf16]
    }

    /// Their addresses, for tests that keep the memory as long as probes and graphs, and use it on its stream only.
    fn raw(&self) -> [RawTensor; 3] {
        [raw(&self.stream, &self.f32), raw(&self.stream, &self.f16), raw(&self.stream, &self.bf16)]
    }
}

fn raw<T: Element>(stream: &CudaStream, slice: &CudaSlice<T>) -> RawTensor {
    // SAFETY: the slice has these elements, and the tests keep it and its order.
    unsafe { RawTensor::new(slice.device_ptr(stream).0, slice.len() as u64, T::DTYPE) }
}

/// Bare addresses as probes take them.
fn refs<const N: usize>(tensors: &[RawTensor; N]) -> [&dyn Tensor; N] {
    tensors.each_ref().map(|tensor| tensor as &dyn Tensor)
}

/// Clips what lies at bare addresses.
fn clip_at<const N: usize>(probe: &mut Probe, tensors: &[RawTensor; N]) -> Result<(), Error> {
    let mut tensors = *tensors;
    probe.clip(&mut tensors.each_mut().map(|tensor| tensor as &mut dyn TensorMut))
}

/// A probe of [`Tensors`].
fn probe(stream: &Arc<CudaStream>, config: Config) -> Probe {
    Probe::new(Cuda::new(stream).unwrap(), Tensors::plan(), config).unwrap()
}

/// The same on the CPU.
fn cpu(config: Config) -> Probe {
    Probe::new(Cpu, Tensors::plan(), config).unwrap()
}

/// The CPU's word on what a step should leave.
struct Reference(Probe);

impl Reference {
    fn new(config: Config) -> Self {
        Self(cpu(config))
    }

    /// The report of the next step on these tensors, and the tensors after the clip.
    fn step(&mut self, mut tensors: Tensors) -> (Report, Tensors) {
        let report = self.0.measure_host(&tensors.hosts()).unwrap();
        self.0.clip_host(&mut tensors.hosts_mut()).unwrap();
        (report, tensors)
    }
}

/// A config under which every step of [`Tensors::of`] is clipped.
fn clipping() -> Config {
    Config::default().clip(Clip::global_norm(1.0))
}

#[track_caller]
fn assert_same_bits(seen: &Report, expected: &Report) {
    let bytes = |report: &Report| {
        let records = bytemuck::cast_slice::<Record, u8>(report.records()).to_vec();
        (bytemuck::bytes_of(report.outputs()).to_vec(), records)
    };
    assert!(bytes(seen) == bytes(expected), "the GPU's\n{seen}\nshould be the CPU's\n{expected}");
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

const TWO_KERNELS: [CUgraphNodeType; 2] = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL; 2];
const THREE_KERNELS: [CUgraphNodeType; 3] = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL; 3];
