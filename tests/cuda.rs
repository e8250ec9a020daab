//! The CUDA backend on a GPU: the same bits as the CPU's, in streams and graphs, over cudarc's slices and bare
//! addresses, with nothing that waits. Skipped where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(unsafe_code, reason = "graphs, host functions and bare addresses are the driver's")]

mod common;
mod require;

use common::{Effort, demand_none, gsnr, run_all};
use gradprobe::{
    AdamMoments, AdamStep, AdaptiveClip, ClipPolicy, Config, CpuProbe, CudaProbe, DType, Dot, Element, Error,
    GsnrConfig, GsnrReport, Histogram, HistoryReport, HistoryStep, HistoryTensor, HostTensor, HostTensorMut, Plan,
    Record, Report, SampleConfig, StepOutputs,
    cuda::{DeviceMoments, DeviceTensor},
    cudarc::driver::{
        CudaContext, CudaGraph, CudaSlice, CudaStream, DevicePtr, result,
        sys::{
            self, CUcontext, CUdevice, CUgraphInstantiate_flags, CUgraphNodeType, CUresult,
            CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD,
        },
    },
    health::{Health, Rules},
    launch::{RawMoments, RawTensor},
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
    let plan = Plan::new::<&str>([]).unwrap();
    match CudaProbe::on_device(0, plan, Config::default()) {
        Ok(_) => Some(CudaContext::new(0).unwrap()),
        Err(error @ (Error::DriverNotFound { .. } | Error::DeviceNotFound { .. })) => {
            skipped(require::GPU, &error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Whether to do less, for tools that make everything a hundred times slower.
fn short() -> bool {
    std::env::var("GRADPROBE_SHORT").as_deref() == Ok("1")
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

    fn slices(&self) -> [&dyn DeviceTensor; 3] {
        [&self.f32, &self.f16, &self.bf16]
    }

    fn raw(&self) -> [RawTensor; 3] {
        [raw(&self.stream, &self.f32), raw(&self.stream, &self.f16), raw(&self.stream, &self.bf16)]
    }
}

fn raw<T: Element>(stream: &CudaStream, slice: &CudaSlice<T>) -> RawTensor {
    RawTensor { address: slice.device_ptr(stream).0, len: slice.len() as u64, dtype: T::DTYPE }
}

/// The CPU's word on what a step should leave.
struct Reference(CpuProbe);

impl Reference {
    fn new(config: Config) -> Self {
        Self(CpuProbe::new(Tensors::plan(), config).unwrap())
    }

    /// The report of the next step on these tensors, and the tensors after the clip.
    fn step(&mut self, mut tensors: Tensors) -> (Report, Tensors) {
        let report = self.0.measure(&tensors.hosts()).unwrap();
        self.0.clip(&mut tensors.hosts_mut()).unwrap();
        (report, tensors)
    }
}

/// A config under which every step of [`Tensors::of`] is clipped.
fn clipping() -> Config {
    Config::default().max_norm(1.0)
}

#[track_caller]
fn assert_same_bits(seen: &Report, expected: &Report) {
    let bytes = |report: &Report| {
        let records = bytemuck::cast_slice::<Record, u8>(report.records()).to_vec();
        (bytemuck::bytes_of(report.outputs()).to_vec(), records)
    };
    assert!(bytes(seen) == bytes(expected), "the GPU's\n{seen}\nshould be the CPU's\n{expected}");
}

#[test]
fn every_case_has_the_bits_of_the_cpu() {
    // Kept, so that the device's primary context is not made anew for every case.
    let Some(_context) = device() else { return };
    let effort = if short() { Effort { large: false, offsets: 2 } } else { Effort::FULL };
    run_all(&mut |plan, config| Box::new(CudaProbe::on_device(0, plan, config).unwrap()), &effort);
}

#[test]
fn every_case_of_signal_and_noise_has_the_bits_of_the_cpu() {
    let Some(_context) = device() else { return };
    let effort = if short() { Effort { large: false, offsets: 1 } } else { Effort::FULL };
    gsnr::run_all(&mut |plan| Box::new(CudaProbe::on_device(0, plan, Config::default()).unwrap()), &effort);
}

/// Blocks finish in another order every time; what they write for each other must be there all the same.
#[test]
fn repeated_steps_have_the_same_bits() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let lengths: Vec<usize> = (0..100).map(|tensor| 32_768 * (tensor % 7) + 1000 * tensor + 1).collect();
    let plan = Plan::new(lengths.iter().enumerate().map(|(t, &len)| (t.to_string(), DType::F32, len as u64))).unwrap();
    let elements: Vec<f32> = (0..1_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 - 8e6).collect();
    let tensors: Vec<_> = lengths.iter().map(|&len| stream.clone_htod(&elements[..len]).unwrap()).collect();
    let tensors: Vec<&dyn DeviceTensor> = tensors.iter().map(|slice| slice as &dyn DeviceTensor).collect();

    let mut cpu = CpuProbe::new(plan.clone(), clipping()).unwrap();
    let hosts: Vec<_> = lengths.iter().map(|&len| HostTensor::F32(&elements[..len])).collect();
    let expected = cpu.measure(&hosts).unwrap();
    let mut probe = CudaProbe::new(&stream, plan, clipping()).unwrap();
    for step in 1..=if short() { 5 } else { 1000 } {
        probe.measure(&tensors).unwrap();
        let report = probe.wait().unwrap();
        assert_eq!(report.step(), step);
        let same = bytemuck::cast_slice::<_, u8>(report.records()) == bytemuck::cast_slice::<_, u8>(expected.records());
        let (seen, expected) = (report.outputs().total_norm, expected.outputs().total_norm);
        assert!(same && seen.to_bits() == expected.to_bits(), "step {step}: {seen:e}, should be {expected:e}");
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

const TWO_KERNELS: [CUgraphNodeType; 2] = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL; 2];
const THREE_KERNELS: [CUgraphNodeType; 3] = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL; 3];

#[test]
fn a_graph_measures_and_clips_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    let mut places = [0, 1].map(|seed| OnDevice::new(&stream, &Tensors::of(seed)));
    // Before the capture: to take an address makes cudarc wait for events, which a capture does not allow.
    let addresses = [0, 1].map(|place: usize| places[place].raw());

    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().bind_raw(&addresses[0]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.raw().measure_raw(&addresses[1]) };
    // SAFETY: as above.
    unsafe { probe.raw().measure_raw(&addresses[0]) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().clip_raw(&addresses[0]) }.unwrap();
    let polled = probe.poll();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(moved, Err(Error::AddressesChangedInCapture));
    assert!(polled.unwrap().is_none(), "nothing has been measured yet");
    assert_eq!(nodes(&graph), TWO_KERNELS, "no copies, no allocations");

    // In place, moved, in place again, and back.
    for (step, place) in [0, 0, 0, 1, 1, 0].into_iter().enumerate() {
        let tensors = Tensors::of(10 + step as u64);
        places[place].set(&tensors);
        // SAFETY: as above.
        unsafe { probe.raw().bind_raw(&addresses[place]) }.unwrap();
        graph.launch().unwrap();
        let (report, clipped) = reference.step(tensors);
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(places[place].get() == clipped, "step {step}: clipped at place {place}");
    }
}

#[test]
fn a_graph_tracks_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut reference, config) = (Reference::new(clipping()), GsnrConfig::new().tensors(["F*", "BF16"]).window(5));
    reference.0.track(&config).unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    probe.track(&config).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();

    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().bind_raw(&addresses) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().measure_raw(&addresses) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().clip_raw(&addresses) }.unwrap();
    let waited = probe.gsnr();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(waited.err(), Some(Error::WaitInCapture));
    assert_eq!(nodes(&graph), THREE_KERNELS, "no copies, no allocations");

    // Past an Inf, into a second window, and on from a reset.
    for step in 0..12 {
        let mut tensors = Tensors::of(20 + step);
        if step == 3 {
            tensors.bf16[60_000] = bf16::INFINITY;
        }
        if step == 9 {
            probe.reset_tracking().unwrap();
            reference.0.reset_tracking().unwrap();
        }
        place.set(&tensors);
        graph.launch().unwrap();
        let (report, clipped) = reference.step(tensors);
        demand_none(&gsnr::same_report(&probe.gsnr(), &reference.0.gsnr()));
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(place.get() == clipped, "step {step}");
    }
}

/// The bins and the counters of a reduction are used again by the next, whichever block was the last of each.
#[test]
fn a_reduction_leaves_nothing_for_the_next() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut cpu, mut probe) = (
        CpuProbe::new(Tensors::plan(), Config::default()).unwrap(),
        CudaProbe::new(&stream, Tensors::plan(), Config::default()).unwrap(),
    );
    cpu.track(&GsnrConfig::new()).unwrap();
    probe.track(&GsnrConfig::new()).unwrap();
    for seed in 0..4 {
        let tensors = Tensors::of(seed);
        cpu.measure(&tensors.hosts()).unwrap();
        probe.measure(&OnDevice::new(&stream, &tensors).slices()).unwrap();
    }
    let expected = cpu.gsnr();
    for _ in 0..if short() { 3 } else { 300 } {
        // One that nobody reads.
        probe.raw().launch_gsnr().unwrap();
        demand_none(&gsnr::same_report(&probe.gsnr(), &expected));
    }
}

/// Every policy, and the history with its tags, in a replayed graph: what a step decides depends on those before.
#[test]
fn policies_and_history_are_those_of_the_cpu_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();
    for clip in [
        ClipPolicy::Value { max_abs: 0.3 },
        ClipPolicy::TensorNorm { max_norm: 30.0 },
        ClipPolicy::Quantile { quantile: 0.8 },
        ClipPolicy::Percentile { percentile: 40.0, history: 4 },
        ClipPolicy::ZScore { smoothing: 0.9, threshold: 1.0, warmup: 3 },
        ClipPolicy::TensorEma { smoothing: 0.9, threshold: 1.05, warmup: 2 },
    ] {
        let config = Config::default().clip(clip);
        let mut reference = Reference::new(config);
        reference.0.keep_history(3).unwrap();
        let health = Health::new(&Tensors::plan(), Rules::default()).unwrap();
        reference.0.judge_by(&health).unwrap();
        let mut probe = CudaProbe::new(&stream, Tensors::plan(), config).unwrap();
        probe.keep_history(3).unwrap();
        probe.judge_by(&health).unwrap();
        // SAFETY: the memory lives as long as the graph, and is used on this stream only.
        unsafe { probe.raw().bind_raw(&addresses) }.unwrap();
        stream.begin_capture(THIS_THREAD).unwrap();
        // SAFETY: as above.
        unsafe { probe.raw().measure_raw(&addresses) }.unwrap();
        // SAFETY: as above.
        unsafe { probe.raw().clip_raw(&addresses) }.unwrap();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
        // Only a quantile takes a launch of its own, and a memset before it.
        let histogram = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET, CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL];
        let own: &[_] = if matches!(clip, ClipPolicy::Quantile { .. }) { &histogram } else { &[] };
        assert_eq!(nodes(&graph), [own, &TWO_KERNELS].concat());
        for seed in [3, 2, 4, 9, 1, 2, 8, 3] {
            let mut tensors = Tensors::of(seed);
            if seed == 9 {
                tensors.bf16[5] = bf16::INFINITY;
            }
            place.set(&tensors);
            probe.tag(seed).unwrap();
            reference.0.tag(seed).unwrap();
            graph.launch().unwrap();
            let (report, clipped) = reference.step(tensors);
            let seen = probe.wait().unwrap();
            assert_same_bits(&seen, &report);
            assert!(seen.health_words().is_some_and(|words| Some(words) == report.health_words()));
            assert!(place.get() == clipped, "{clip:?}: clipped");
        }
        let bytes = |report: &HistoryReport| -> Vec<u8> {
            let line = |(step, tensors): (&HistoryStep, &[HistoryTensor])| {
                [bytemuck::bytes_of(step), bytemuck::cast_slice(tensors)].concat()
            };
            report.steps().flat_map(line).collect()
        };
        let (seen, expected) = (probe.history().unwrap(), reference.0.history().unwrap());
        assert_eq!(seen.steps().map(|(step, _)| step.tag).collect::<Vec<_>>(), [2, 8, 3]);
        assert!(bytes(&seen) == bytes(&expected), "{clip:?}: history");
    }
}

#[test]
fn the_safe_calls_can_be_captured_without_event_tracking() {
    let Some(context) = device() else { return };
    // SAFETY: everything below is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let elsewhere = OnDevice::new(&stream, &Tensors::of(0));
    probe.bind(&place.slices()).unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    let moved = probe.bind(&elsewhere.slices());
    probe.measure(&place.slices()).unwrap();
    probe.clip(&mut [&mut place.f32, &mut place.f16, &mut place.bf16]).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(moved, Err(Error::AddressesChangedInCapture));
    assert_eq!(nodes(&graph), TWO_KERNELS, "no copies, no allocations");
    for step in 0..3 {
        let tensors = Tensors::of(step);
        place.set(&tensors);
        graph.launch().unwrap();
        let (report, clipped) = reference.step(tensors);
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(place.get() == clipped, "step {step}");
    }
}

/// Holds a stream until it is opened, or for so long that something must have waited for the stream.
struct Gate {
    open: AtomicBool,
    gave_up: AtomicBool,
}

impl Gate {
    fn shut(stream: &CudaStream) -> Arc<Self> {
        unsafe extern "C" fn hold(gate: *mut c_void) {
            // SAFETY: it was made from an Arc below, and the driver calls this once.
            let gate = unsafe { Arc::from_raw(gate.cast_const().cast::<Gate>()) };
            let start = Instant::now();
            while !gate.open.load(Ordering::Acquire) {
                if start.elapsed() > Duration::from_secs(20) {
                    gate.gave_up.store(true, Ordering::Release);
                    break;
                }
                thread::sleep(Duration::from_micros(100));
            }
        }
        let gate = Arc::new(Self { open: AtomicBool::new(false), gave_up: AtomicBool::new(false) });
        let argument = Arc::into_raw(Arc::clone(&gate)).cast_mut().cast();
        // SAFETY: the stream is alive, and the function makes no call of CUDA.
        unsafe { result::stream::launch_host_function(stream.cu_stream(), hold, argument) }.unwrap();
        gate
    }

    /// Lets the stream go on, and says whether nothing has waited for it so far.
    fn open(&self) -> bool {
        self.open.store(true, Ordering::Release);
        !self.gave_up.load(Ordering::Acquire)
    }
}

/// The next report, once it is there.
fn next_report(probe: &mut CudaProbe) -> Report {
    let start = Instant::now();
    loop {
        if let Some(report) = probe.poll().unwrap() {
            return report;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no report came");
        thread::yield_now();
    }
}

#[test]
fn polling_every_step_gives_every_report_in_order_and_never_waits() {
    let Some(context) = device() else { return };
    if short() {
        return pointless("the tools GRADPROBE_SHORT is for may wait for launches");
    }
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    assert!(probe.poll().unwrap().is_none(), "nothing was measured");
    assert!(matches!(probe.wait(), Err(Error::NotMeasured)));

    let steps: Vec<_> = (1..=6).map(Tensors::of).collect();
    let sources: Vec<_> = steps.iter().map(|tensors| OnDevice::new(&stream, tensors)).collect();
    let mut place = OnDevice::new(&stream, &steps[0]);
    probe.bind(&place.slices()).unwrap();
    stream.synchronize().unwrap();

    // The host runs six steps ahead of the device. Four reports can be on their way.
    let gate = Gate::shut(&stream);
    for source in &sources {
        place.copy(source);
        probe.measure(&place.slices()).unwrap();
        probe.clip(&mut [&mut place.f32, &mut place.f16, &mut place.bf16]).unwrap();
        assert!(probe.poll().unwrap().is_none(), "a report of a step that has not run");
    }
    assert!(gate.open(), "something waited for the device");
    let expected: Vec<_> = steps.into_iter().map(|tensors| reference.step(tensors)).collect();
    for step in [1, 2, 3, 4, 6] {
        let report = next_report(&mut probe);
        assert_eq!(report.step(), step);
        assert_same_bits(&report, &expected[usize::try_from(step).unwrap() - 1].0);
    }
    stream.synchronize().unwrap();
    assert!(probe.poll().unwrap().is_none(), "no report comes twice");
    assert!(place.get() == expected[5].1, "the clip of the last step");

    // Near the device, every step is reported.
    let mut reported = Vec::new();
    for source in &sources {
        place.copy(source);
        probe.measure(&place.slices()).unwrap();
        stream.synchronize().unwrap();
        reported.extend(probe.poll().unwrap().map(|report| report.step()));
    }
    stream.synchronize().unwrap();
    reported.extend(std::iter::from_fn(|| probe.poll().unwrap()).map(|report| report.step()));
    assert_eq!(reported, [7, 8, 9, 10, 11, 12]);

    let last = probe.wait().unwrap();
    assert_eq!(last.step(), 12, "the last measurement again");
    let unclipped = Reference::new(clipping()).step(Tensors::of(6)).0;
    assert_eq!(last.outputs().total_norm.to_bits(), unclipped.outputs().total_norm.to_bits());
}

#[test]
fn a_step_whose_gradients_have_moved_does_not_wait() {
    let Some(context) = device() else { return };
    if short() {
        return pointless("the tools GRADPROBE_SHORT is for may wait for launches");
    }
    let stream = context.new_stream().unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    let places: Vec<_> = (0..5).map(|seed| OnDevice::new(&stream, &Tensors::of(seed))).collect();
    probe.measure(&places[0].slices()).unwrap();
    stream.synchronize().unwrap();
    let gate = Gate::shut(&stream);
    for place in &places[1..] {
        probe.measure(&place.slices()).unwrap();
    }
    assert!(gate.open(), "something waited for the device");
    let last = Reference::new(clipping()).step(Tensors::of(4)).0;
    assert_eq!(
        bytemuck::cast_slice::<_, u8>(probe.wait().unwrap().records()),
        bytemuck::cast_slice::<_, u8>(last.records())
    );
}

/// By cudarc's events, whatever comes first on either stream.
#[test]
fn other_streams_wait_for_the_probe_and_it_waits_for_them() {
    let Some(context) = device() else { return };
    if short() {
        return pointless("the tools GRADPROBE_SHORT is for may wait for launches");
    }
    let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let mut reference = Reference::new(clipping());
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    let sources = [1, 2].map(|seed| OnDevice::new(&other, &Tensors::of(seed)));
    let mut place = OnDevice::new(&other, &Tensors::of(0));
    probe.bind(&place.slices()).unwrap();
    other.synchronize().unwrap();

    // A write that has yet to run, a measurement of what it writes, and a write that must not come before that.
    let gate = Gate::shut(&other);
    place.copy(&sources[0]);
    probe.measure(&place.slices()).unwrap();
    place.copy(&sources[1]);
    assert!(gate.open(), "something waited for the device");
    assert_same_bits(&probe.wait().unwrap(), &reference.step(Tensors::of(1)).0);

    // A read of what a clip has yet to write.
    let (report, clipped) = reference.step(Tensors::of(2));
    probe.measure(&place.slices()).unwrap();
    probe.clip(&mut [&mut place.f32, &mut place.f16, &mut place.bf16]).unwrap();
    assert!(place.get() == clipped, "read after the clip");
    assert_same_bits(&probe.wait().unwrap(), &report);
}

#[test]
fn slices_and_views_are_measured_and_clipped_wherever_they_begin() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let whole = Tensors::of(1);
    for [a, b, c] in [[0, 1, 3], [1, 0, 1], [3, 2, 0], [4, 8, 8]] {
        let lengths = [LENGTHS[0] - a, LENGTHS[1] - b, LENGTHS[2] - c];
        let plan = Plan::new(DType::ALL.into_iter().zip(lengths).map(|(dtype, len)| (dtype.name(), dtype, len as u64)));
        let plan = plan.unwrap();
        let mut cpu = CpuProbe::new(plan.clone(), clipping()).unwrap();
        let mut expected = whole.clone();
        let mut hosts = [
            HostTensorMut::F32(&mut expected.f32[a..]),
            HostTensorMut::F16(&mut expected.f16[b..]),
            HostTensorMut::BF16(&mut expected.bf16[c..]),
        ];
        let report = cpu.measure(&hosts.each_ref().map(HostTensorMut::as_ref)).unwrap();
        cpu.clip(&mut hosts).unwrap();

        let mut probe = CudaProbe::new(&stream, plan, clipping()).unwrap();
        let mut place = OnDevice::new(&stream, &whole);
        probe.measure(&[&place.f32.slice(a..), &place.f16.slice(b..), &place.bf16.slice_mut(c..)]).unwrap();
        assert_same_bits(&probe.wait().unwrap(), &report);
        let OnDevice { f32, f16, bf16, .. } = &mut place;
        probe.clip(&mut [&mut f32.slice_mut(a..), &mut f16.slice_mut(b..), &mut bf16.slice_mut(c..)]).unwrap();
        assert!(place.get() == expected, "clipped from {a}, {b} and {c} on, and nothing before");
    }
}

#[test]
fn what_cannot_be_right_is_an_error_that_names_the_tensor() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(1));
    let good = place.raw();

    let clip = probe.clip(&mut [&mut place.f32, &mut place.f16, &mut place.bf16]);
    assert_eq!(clip, Err(Error::NotMeasured));
    let few = probe.measure(&place.slices()[..2]);
    assert_eq!(few, Err(Error::TensorCount { planned: 3, given: 2 }));
    let mismatch = probe.measure(&[&place.f32, &place.f16.slice(1..), &place.bf16]);
    assert!(matches!(&mismatch, Err(Error::TensorMismatch { name, .. }) if name == "F16"), "{mismatch:?}");

    let mut measure = |index: usize, address: u64| {
        let mut tensors = good;
        tensors[index].address = address;
        // SAFETY: an address that is not good must be refused, and nothing launched.
        unsafe { probe.raw().measure_raw(&tensors) }
    };
    let name = |dtype: DType| dtype.name().to_owned();
    assert_eq!(measure(1, 0), Err(Error::NullPointer { name: name(DType::F16) }));
    for (index, dtype, address) in
        [(0, DType::F32, good[0].address + 2), (1, DType::F16, good[1].address + 1), (2, DType::BF16, 0xfff1)]
    {
        let expected = Error::MisalignedPointer { name: name(dtype), address, size: dtype.size() };
        assert_eq!(measure(index, address), Err(expected));
    }
    let address = u64::MAX - 3;
    let expected = Error::AddressOverflow { name: name(DType::F32), address, length: good[0].len };
    assert_eq!(measure(0, address), Err(expected));

    // To measure memory twice is fine; to scale it twice is not.
    let inside = good[0].address + 4;
    assert_eq!(measure(1, inside), Ok(()));
    let mut tensors = good;
    tensors[1].address = inside;
    // SAFETY: all of it is memory of this test.
    let clip = unsafe { probe.raw().clip_raw(&tensors) };
    assert_eq!(clip, Err(Error::Overlap { first: name(DType::F32), second: name(DType::F16) }));

    // None of this has counted as a step but the one measurement, and nothing was written.
    assert_eq!(probe.wait().unwrap().step(), 1);
    assert!(place.get() == Tensors::of(1));
}

#[test]
fn tensors_of_another_context_are_refused() {
    type Create = unsafe extern "C" fn(*mut CUcontext, c_uint, CUdevice) -> CUresult;
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    let place = OnDevice::new(&stream, &Tensors::of(1));

    // SAFETY: the driver is there.
    let driver = unsafe { sys::culib() };
    // Looked up by its name: cudarc has the call in some versions of CUDA only.
    // SAFETY: the driver has had this function under this name since CUDA 3.2.
    let Ok(create) = (unsafe { driver.get::<Create>(b"cuCtxCreate_v2\0") }) else {
        return pointless("the driver makes no second context");
    };
    let mut handle = ptr::null_mut();
    // SAFETY: the device is alive.
    if unsafe { create(&raw mut handle, 0, context.cu_device()) }.result().is_err() {
        return pointless("the driver makes no second context");
    }
    // SAFETY: it was just made, for this device, and nothing else destroys it.
    let other = unsafe { CudaContext::from_raw_context(0, context.cu_device(), handle) }.unwrap();
    let there = OnDevice::new(&other.new_stream().unwrap(), &Tensors::of(1));
    let refused = probe.measure(&[&place.f32, &there.f16, &place.bf16]);
    assert_eq!(refused, Err(Error::WrongContext { name: "F16".to_owned() }));
    let refused = probe.bind(&[&there.f32, &place.f16, &place.bf16]);
    assert_eq!(refused, Err(Error::WrongContext { name: "F32".to_owned() }));
    assert_eq!(probe.measure(&place.slices()), Ok(()));
}

#[test]
fn outputs_and_records_lie_on_the_device_where_they_are_said_to() {
    fn read<T: bytemuck::Pod>(address: u64, count: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); count];
        // SAFETY: the probe has that many values there, and the stream was waited for.
        unsafe { result::memcpy_dtoh_sync(bytemuck::cast_slice_mut::<T, u8>(&mut values), address) }.unwrap();
        values
    }
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    for seed in 1..=2 {
        let mut tensors = Tensors::of(seed);
        if seed == 2 {
            tensors.f16[7] = f16::NEG_INFINITY;
        }
        let place = OnDevice::new(&stream, &tensors);
        probe.measure(&place.slices()).unwrap();
        let report = probe.wait().unwrap();
        stream.synchronize().unwrap();
        let outputs: Vec<StepOutputs> = read(probe.raw().outputs_address(), 1);
        let records: Vec<Record> = read(probe.raw().records_address(), 3);
        assert_eq!(bytemuck::bytes_of(&outputs[0]), bytemuck::bytes_of(report.outputs()));
        assert_eq!(bytemuck::cast_slice::<_, u8>(&records), bytemuck::cast_slice::<_, u8>(report.records()));
        assert_eq!((outputs[0].skip, outputs[0].step), (i32::from(seed == 2), seed));
    }
}

#[test]
fn histograms_and_dot_products_have_the_bits_of_the_cpu() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut first, mut second) = (Tensors::of(1), Tensors::of(2));
    first.f16[7] = f16::NEG_INFINITY;
    second.bf16[LENGTHS[2] - 1] = bf16::NAN;
    let mut cpu = CpuProbe::new(Tensors::plan(), Config::default()).unwrap();
    cpu.enable_histogram();
    cpu.enable_dot();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), Config::default()).unwrap();
    let [a, b] = [&first, &second].map(|tensors| OnDevice::new(&stream, tensors));
    assert_eq!(probe.histogram(&a.slices()).map(drop), Err(Error::NotEnabled { what: "histogram" }));
    assert_eq!(probe.dot(&a.slices(), &b.slices()).map(drop), Err(Error::NotEnabled { what: "dot" }));
    probe.enable_histogram().unwrap();
    probe.enable_dot().unwrap();
    // Twice each: nothing stays behind.
    for (tensors, place) in [(&first, &a), (&second, &b), (&first, &a)] {
        let expected = cpu.histogram(&tensors.hosts()).unwrap();
        assert!(probe.histogram(&place.slices()).unwrap().histograms() == expected.histograms());
        let expected = cpu.dot(&tensors.hosts(), &second.hosts()).unwrap();
        let seen = probe.dot(&place.slices(), &b.slices()).unwrap();
        assert_eq!(bytemuck::cast_slice::<_, u8>(seen.records()), bytemuck::cast_slice::<_, u8>(expected.records()));
    }
    // A second list of other types, as weights are beside gradients: the f32 tensor's elements begin all three.
    let parts = LENGTHS.map(|length| &second.f32[..length]);
    let expected = cpu.dot(&first.hosts(), &parts.map(HostTensor::F32)).unwrap();
    let views = LENGTHS.map(|length| b.f32.slice(..length));
    let seen = probe.dot(&a.slices(), &[&views[0], &views[1], &views[2]]).unwrap();
    assert_eq!(bytemuck::cast_slice::<_, u8>(seen.records()), bytemuck::cast_slice::<_, u8>(expected.records()));
    let short = probe.dot(&a.slices(), &[&views[0], &views[1], &views[1]]).map(drop);
    assert!(matches!(short, Err(Error::TensorMismatch { name, .. }) if name == "BF16"));
}

#[test]
fn adaptive_clips_have_the_bits_of_the_cpu_also_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut gradients, weights) = (Tensors::of(1), Tensors::of(2));
    let rule = AdaptiveClip::new([100_003, 400, 65_537]).clipping(0.1);
    let mut cpu = CpuProbe::new(Tensors::plan(), Config::default()).unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), Config::default()).unwrap();
    let [mut a, b] = [&gradients, &weights].map(|tensors| OnDevice::new(&stream, tensors));
    assert_eq!(probe.adaptive_clip().map(drop), Err(Error::NotEnabled { what: "adaptive_clip" }));
    cpu.enable_adaptive_clip(&rule).unwrap();
    probe.enable_adaptive_clip(&rule).unwrap();
    probe.measure(&a.slices()).unwrap();
    assert_eq!(probe.adaptive_clip().map(drop), Err(Error::NotMeasured));
    cpu.measure(&gradients.hosts()).unwrap();
    probe.clip_adaptively(&mut [&mut a.f32, &mut a.f16, &mut a.bf16], &b.slices()).unwrap();
    let expected = cpu.clip_adaptively(&mut gradients.hosts_mut(), &weights.hosts()).unwrap();
    assert!(expected.records().iter().any(|record| record.clipped > 0));
    assert_eq!(probe.adaptive_clip().unwrap().records(), expected.records());
    assert_eq!(a.get(), gradients);

    // In a graph, with the measurement whose flag it obeys.
    let (a_raw, b_raw) = (a.raw(), b.raw());
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().measure_raw(&a_raw) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().clip_adaptively_raw(&a_raw, &b_raw) }.unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.raw().clip_adaptively_raw(&a_raw, &[b_raw[0], b_raw[1], a_raw[0]]) };
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert!(matches!(moved, Err(Error::TensorMismatch { .. })));
    for replay in 0..2 {
        let mut fresh = Tensors::of(3);
        if replay == 1 {
            fresh.bf16[9] = bf16::NAN;
        }
        a.set(&fresh);
        graph.launch().unwrap();
        let before = fresh.clone();
        cpu.measure(&fresh.hosts()).unwrap();
        let expected = cpu.clip_adaptively(&mut fresh.hosts_mut(), &weights.hosts()).unwrap();
        assert_eq!(probe.adaptive_clip().unwrap().records(), expected.records());
        let seen = a.get();
        if replay == 0 {
            assert_eq!(seen, fresh);
        } else {
            // NaN is not equal to itself.
            assert_eq!((&seen.f32, &seen.f16), (&before.f32, &before.f16), "a step to skip");
        }
    }
}

#[test]
fn samples_are_those_of_the_cpu_also_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config = SampleConfig::new(1000, 3);
    let mut cpu = CpuProbe::new(Tensors::plan(), Config::default()).unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), Config::default()).unwrap();
    cpu.enable_samples(&config).unwrap();
    probe.enable_samples(&config).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().bind_raw(&addresses) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().measure_raw(&addresses) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().sample_raw(&addresses) }.unwrap();
    let refused = probe.samples().map(drop);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(refused, Err(Error::WaitInCapture));
    assert_eq!(nodes(&graph), TWO_KERNELS);
    for seed in 1..=4 {
        let mut tensors = Tensors::of(seed);
        if seed == 3 {
            tensors.f16[0] = f16::INFINITY;
        }
        place.set(&tensors);
        graph.launch().unwrap();
        cpu.measure(&tensors.hosts()).unwrap();
        cpu.sample(&tensors.hosts()).unwrap();
        assert_eq!(probe.samples().unwrap(), cpu.samples().unwrap());
    }
    // And by the safe calls.
    probe.measure(&place.slices()).unwrap();
    probe.sample(&place.slices()).unwrap();
    cpu.measure(&Tensors::of(4).hosts()).unwrap();
    cpu.sample(&Tensors::of(4).hosts()).unwrap();
    assert_eq!(probe.samples().unwrap(), cpu.samples().unwrap());
}

#[test]
fn weights_beside_gradients_have_the_bits_of_the_cpu_also_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let plan = || Tensors::plan().with_weights(DType::ALL).unwrap();
    let (gradients, mut weights) = (Tensors::of(1), Tensors::of(2));
    weights.f16[7] = f16::NAN;
    let mut cpu = CpuProbe::new(plan(), clipping()).unwrap();
    let mut probe = CudaProbe::new(&stream, plan(), clipping()).unwrap();
    let [a, b] = [&gradients, &weights].map(|tensors| OnDevice::new(&stream, tensors));
    let assert_same = |seen: &Report, expected: &Report| {
        assert_same_bits(seen, expected);
        let bytes = |report: &Report| report.weights().map(|weights| bytemuck::cast_slice::<_, u8>(weights).to_vec());
        assert_eq!(bytes(seen), bytes(expected));
    };
    for with_weights in [true, false, true] {
        let expected = if with_weights {
            probe.measure_with_weights(&a.slices(), &b.slices()).unwrap();
            cpu.measure_with_weights(&gradients.hosts(), &weights.hosts()).unwrap()
        } else {
            probe.measure(&a.slices()).unwrap();
            cpu.measure(&gradients.hosts()).unwrap()
        };
        assert_eq!(expected.weights().is_some(), with_weights);
        assert_same(&probe.wait().unwrap(), &expected);
    }

    let (a_raw, b_raw) = (a.raw(), b.raw());
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().measure_with_weights_raw(&a_raw, &b_raw) }.unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.raw().measure_with_weights_raw(&a_raw, &a_raw) };
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(moved, Err(Error::AddressesChangedInCapture));
    assert_eq!(nodes(&graph), TWO_KERNELS[..1]);
    // The weights move before the replay.
    probe.bind_with_weights(&a.slices(), &a.slices()).unwrap();
    graph.launch().unwrap();
    let expected = cpu.measure_with_weights(&gradients.hosts(), &gradients.hosts()).unwrap();
    assert_same(&probe.wait().unwrap(), &expected);
}

#[test]
fn a_graph_counts_and_multiplies_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), Config::default()).unwrap();
    let [mut a, b] = [0, 1].map(|seed| OnDevice::new(&stream, &Tensors::of(seed)));
    let (a_raw, b_raw) = (a.raw(), b.raw());
    probe.enable_histogram().unwrap();
    probe.enable_dot().unwrap();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().launch_dot_raw(&a_raw, &b_raw) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().launch_histogram_raw(&a_raw) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().launch_dot_raw(&a_raw, &b_raw) }.unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.raw().launch_dot_raw(&a_raw, &a_raw) };
    // SAFETY: as above.
    let waited = unsafe { probe.raw().histogram_raw(&a_raw) }.map(drop);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!((moved, waited), (Err(Error::AddressesChangedInCapture), Err(Error::WaitInCapture)));
    let [kernel, memset] = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL, CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET];
    assert_eq!(nodes(&graph), [memset, kernel, kernel], "no copies, no allocations");

    let mut cpu = CpuProbe::new(Tensors::plan(), Config::default()).unwrap();
    cpu.enable_histogram();
    cpu.enable_dot();
    for seed in 5..8 {
        let tensors = Tensors::of(seed);
        a.set(&tensors);
        graph.launch().unwrap();
        stream.synchronize().unwrap();
        let (mut histograms, mut dots) = (vec![Histogram::default(); 3], vec![Dot::default(); 3]);
        let addresses = (probe.raw().histograms_address().unwrap(), probe.raw().dots_address().unwrap());
        // SAFETY: the probe has that many there, and the stream was waited for.
        unsafe { result::memcpy_dtoh_sync(&mut histograms, addresses.0) }.unwrap();
        // SAFETY: as above.
        unsafe { result::memcpy_dtoh_sync(&mut dots, addresses.1) }.unwrap();
        assert!(histograms == cpu.histogram(&tensors.hosts()).unwrap().histograms());
        assert_eq!(dots, cpu.dot(&tensors.hosts(), &Tensors::of(1).hosts()).unwrap().records());
    }
}

/// Beyond what 32 bits can count, in elements and in bytes.
/// Of one tensor, as Adam might have them, after enough steps that nothing is 0.
fn moments(seed: u64, len: usize) -> [Vec<f32>; 2] {
    let gradients = Tensors::of(seed).f32;
    let mean: Vec<f32> = gradients.iter().cycle().take(len).map(|g| 0.3 * g).collect();
    let square = gradients.iter().rev().cycle().zip(&mean).map(|(g, m)| m * m + 0.1 * g * g).collect();
    [mean, square]
}

fn records(report: &GsnrReport) -> Vec<(&str, &[u8])> {
    report.tensors().map(|(name, record)| (name, bytemuck::bytes_of(record))).collect()
}

#[test]
fn signal_and_noise_from_the_moments_of_adam_have_the_bits_of_the_cpu() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = CudaProbe::new(&stream, Tensors::plan(), clipping()).unwrap();
    let cpu = CpuProbe::new(Tensors::plan(), clipping()).unwrap();
    let step = AdamStep { step: 10, beta1: 0.9, beta2: 0.999 };
    // Twice, with others each time: nothing is left of the first. The second tensor has none.
    for seed in 1..3 {
        // One more than the tensor has, so that a view can begin at the second.
        let [first, third] = [0, 2].map(|t: usize| moments(seed, LENGTHS[t] + 1));
        let place = |moment: &Vec<f32>| stream.clone_htod(moment).unwrap();
        let on_device = [first.each_ref().map(place), third.each_ref().map(place)];
        let none = on_device[0][0].slice(..0);
        let views = [
            [on_device[0][0].slice(..LENGTHS[0]), on_device[0][1].slice(1..)],
            [on_device[1][0].slice(1..), on_device[1][1].slice(..LENGTHS[2])],
        ];
        let of = |t: usize| DeviceMoments { exp_avg: &views[t][0], exp_avg_sq: &views[t][1] };
        let seen =
            probe.adam_gsnr(&step, &[of(0), DeviceMoments { exp_avg: &none, exp_avg_sq: &none }, of(1)]).unwrap();
        let expected = [
            AdamMoments { exp_avg: &first[0][..LENGTHS[0]], exp_avg_sq: &first[1][1..] },
            AdamMoments::default(),
            AdamMoments { exp_avg: &third[0][1..], exp_avg_sq: &third[1][..LENGTHS[2]] },
        ];
        let expected = cpu.adam_gsnr(&step, &expected).unwrap();
        assert!(records(&seen) == records(&expected), "the GPU's\n{seen}\nshould be the CPU's\n{expected}");
        assert_eq!(records(&seen).len(), 2);
    }
}

#[test]
fn moments_that_cannot_be_right_are_refused() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let plan = || Plan::new([("first", DType::BF16, 32), ("second", DType::F32, 32)]).unwrap();
    let mut probe = CudaProbe::new(&stream, plan(), Config::default()).unwrap();
    let step = AdamStep { step: 10, beta1: 0.9, beta2: 0.999 };
    let host = moments(1, 32);
    let [m, v] = host.each_ref().map(|moment| stream.clone_htod(moment).unwrap());
    let halves = stream.clone_htod(&vec![f16::ONE; 32]).unwrap();
    let good = DeviceMoments { exp_avg: &m, exp_avg_sq: &v };
    let short = m.slice(..31);
    for (second, given) in [
        (DeviceMoments { exp_avg: &halves, ..good }, "exp_avg with 32 of F16 and exp_avg_sq with 32 of F32"),
        (DeviceMoments { exp_avg_sq: &halves, ..good }, "exp_avg with 32 of F32 and exp_avg_sq with 32 of F16"),
        (DeviceMoments { exp_avg_sq: &short, ..good }, "exp_avg with 32 of F32 and exp_avg_sq with 31 of F32"),
    ] {
        let planned = "32 elements, moments of F32".to_owned();
        let error = Error::TensorMismatch { name: "second".to_owned(), planned, given: given.to_owned() };
        assert_eq!(probe.adam_gsnr(&step, &[good, second]).unwrap_err(), error);
    }
    for count in [1, 3] {
        let error = Error::TensorCount { planned: 2, given: count };
        assert_eq!(probe.adam_gsnr(&step, &vec![good; count]).unwrap_err(), error);
    }
    let early = AdamStep { step: 1, ..step };
    assert_eq!(probe.adam_gsnr(&early, &[good; 2]).unwrap_err(), Error::TooFewSteps { steps: 1 });
    let raw = RawMoments { exp_avg: m.device_ptr(&stream).0, exp_avg_sq: v.device_ptr(&stream).0, len: 32 };
    let odd = RawMoments { exp_avg_sq: raw.exp_avg_sq + 2, ..raw };
    // SAFETY: refused before anything is read.
    let refused = unsafe { probe.raw().adam_gsnr_raw(&step, &[raw, odd]) };
    let error = Error::MisalignedPointer { name: "second".to_owned(), address: odd.exp_avg_sq, size: 4 };
    assert_eq!(refused.unwrap_err(), error);
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: the moments live.
    let captured = unsafe { probe.raw().adam_gsnr_raw(&step, &[raw; 2]) };
    stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
    assert_eq!(captured.unwrap_err(), Error::WaitInCapture);

    let expected = AdamMoments { exp_avg: &host[0], exp_avg_sq: &host[1] };
    let expected = CpuProbe::new(plan(), Config::default()).unwrap().adam_gsnr(&step, &[expected; 2]).unwrap();
    assert!(records(&probe.adam_gsnr(&step, &[good; 2]).unwrap()) == records(&expected));
}

#[test]
fn a_tensor_of_more_than_two_to_the_31_elements() {
    const LENGTH: usize = (1 << 31) + 5;
    let Some(context) = device() else { return };
    if short() {
        return pointless("GRADPROBE_SHORT is 1");
    }
    if context.mem_get_info().unwrap().0 < 3 * LENGTH {
        return pointless("the device has less than 6.5 GB to spare");
    }
    let stream = context.new_stream().unwrap();
    let plan = Plan::new([("huge", DType::BF16, LENGTH as u64)]).unwrap();
    let config = Config::default().max_norm(1000.0);
    let mut cpu = CpuProbe::new(plan.clone(), config).unwrap();
    let mut probe = CudaProbe::new(&stream, plan, config).unwrap();

    // Halves, and a 3 at the end. Σx² = 2^29 + 1 + 9.
    let mut host = vec![bf16::from_f32(0.5); LENGTH];
    host[LENGTH - 1] = bf16::from_f32(3.0);
    let mut huge = stream.clone_htod(&host).unwrap();
    probe.measure(&[&huge]).unwrap();
    let report = probe.wait().unwrap();
    let record = report.records()[0];
    assert_eq!((record.count, record.zero_count, record.first_nonfinite()), (LENGTH as u64, 0, None));
    assert_eq!((record.max_abs(), record.min_nonzero_abs()), (Some(3.0), Some(0.5)));
    let norm = (f64::from(1 << 29) + 10.0).sqrt();
    assert!((record.finite_l2_norm() / norm - 1.0).abs() < 5e-7, "{:e}, should be {norm:e}", record.finite_l2_norm());
    assert_same_bits(&report, &cpu.measure(&[HostTensor::BF16(&host)]).unwrap());

    probe.clip(&mut [&mut huge]).unwrap();
    cpu.clip(&mut [HostTensorMut::BF16(&mut host)]).unwrap();
    assert!(stream.clone_dtoh(&huge).unwrap() == host, "the clip");

    host[LENGTH - 1] = bf16::NAN;
    stream.memcpy_htod(&host[LENGTH - 1..], &mut huge.slice_mut(LENGTH - 1..)).unwrap();
    probe.measure(&[&huge]).unwrap();
    let report = probe.wait().unwrap();
    assert_eq!(report.records()[0].first_nonfinite(), Some(LENGTH as u64 - 1));
    assert_same_bits(&report, &cpu.measure(&[HostTensor::BF16(&host)]).unwrap());
}
