//! Which calls of the CUDA driver a step makes, one by one, as the host driver in `crates/driver` counts them: no more
//! launches and copies than are promised, no allocation, nothing that waits. Skipped on any other driver.
#![cfg(feature = "cuda")]
#![allow(unsafe_code, reason = "calls functions of the host driver, and holds a stream by a host function")]

mod copies;
#[allow(dead_code)] // The example's own.
#[path = "../../examples/adamw/data.rs"]
mod data;
#[path = "../require/mod.rs"]
mod require;
mod tracking;
#[allow(dead_code)]
#[path = "../../examples/adamw/training.rs"]
mod training;

use gradprobe::{
    Clip, Config, DType, Error, Plan, Probe, RawTensor, Record, StepOutputs, Tensor, TensorMut,
    clip::AdaptiveClip,
    cuda::{self, Cuda},
    cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, result, sys},
    device::Device,
    gsnr::GsnrConfig,
    optim::AdamW,
};
use half::{bf16, f16};
use require::{pointless, skipped};
use std::{
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// cudarc's and ours, neither of which starts or moves anything: which context is current, whether a capture is going
/// on and what it lets this thread do, and the events by which cudarc orders streams and a probe learns of its reports.
const BYSTANDERS: [&str; 6] = [
    "cuCtxGetCurrent",
    "cuStreamIsCapturing",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamWaitEvent",
    "cuEventRecord",
    "cuEventQuery",
];

/// The calls that do start something. A grid fills the host driver's device.
const MEASURE: &str = "cuLaunchKernel gradprobe_measure of 12 blocks";
const CLIP: &str = "cuLaunchKernel gradprobe_clip of 12 blocks";
const UPDATE: &str = "cuLaunchKernel gradprobe_update of 12 blocks";
const GSNR: &str = "cuLaunchKernel gradprobe_gsnr of 12 blocks";
const ADDRESSES: &str = "cuMemcpyHtoDAsync_v2 24 bytes page-locked";
/// A copy of [`report`]s, of three tensors and of the example's four.
const REPORT: &str = "report of 3 tensors";
const EXAMPLE_REPORT: &str = "report of 4 tensors";
/// Three records of 104 bytes.
const GSNR_REPORT: &str = "cuMemcpyDtoHAsync_v2 312 bytes page-locked";

/// The host driver's trace, which is that of all threads: one test has it at a time.
struct Trace {
    _alone: MutexGuard<'static, ()>,
    begin: unsafe extern "C" fn(),
    end: unsafe extern "C" fn(*mut u8, usize) -> usize,
    hold_copies: unsafe extern "C" fn(bool),
}

impl Trace {
    /// The calls made by `step`.
    fn of(&self, step: impl FnOnce()) -> Vec<String> {
        let mut text = vec![0; 1 << 20];
        // SAFETY: no obligations.
        unsafe { (self.begin)() };
        step();
        // SAFETY: the buffer has that size.
        let length = unsafe { (self.end)(text.as_mut_ptr(), text.len()) };
        assert!(length <= text.len(), "a trace of {length} bytes");
        String::from_utf8_lossy(&text[..length]).lines().map(str::to_owned).collect()
    }

    /// Copies to page-locked memory do not run until what this gives is dropped.
    fn hold_copies(&self) -> HeldCopies<'_> {
        // SAFETY: no obligations.
        unsafe { (self.hold_copies)(true) };
        HeldCopies(self)
    }
}

struct HeldCopies<'a>(&'a Trace);

impl Drop for HeldCopies<'_> {
    fn drop(&mut self) {
        // SAFETY: no obligations.
        unsafe { (self.0.hold_copies)(false) };
    }
}

/// Whether what is queued so far is done before the time is over.
fn is_done(stream: &CudaStream, within: Duration) -> bool {
    let (event, start) = (stream.record_event(None).unwrap(), Instant::now());
    while !event.try_is_complete().unwrap() {
        if start.elapsed() > within {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Time enough for what does not wait, and for what does to be seen doing so.
const ENOUGH: Duration = Duration::from_secs(20);
const A_WHILE: Duration = Duration::from_millis(200);

/// The host driver's trace and a stream, if that is the driver.
fn driver() -> Option<(Trace, Arc<CudaStream>)> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let stream = match cuda::stream(0) {
        Ok(stream) => stream,
        Err(error) => {
            assert!(matches!(error, Error::DriverNotFound { .. } | Error::DeviceNotFound { .. }), "{error}");
            skipped(require::GPU, &error.to_string());
            return None;
        }
    };
    // SAFETY: the driver is there.
    let library = unsafe { sys::culib() };
    // SAFETY: only the host driver has a function of this name, and it has this type.
    let begin = unsafe { library.get(b"gradprobe_host_driver_trace_begin\0") };
    // SAFETY: the same.
    let end = unsafe { library.get(b"gradprobe_host_driver_trace_end\0") };
    // SAFETY: the same.
    let hold_copies = unsafe { library.get(b"gradprobe_host_driver_hold_copies\0") };
    let (Ok(begin), Ok(end), Ok(hold_copies)) = (begin, end, hold_copies) else {
        pointless("the driver keeps no trace of its calls");
        return None;
    };
    Some((Trace { _alone: alone, begin: *begin, end: *end, hold_copies: *hold_copies }, stream))
}

/// Holds a stream until it is dropped, or for so long that something must have waited for the stream.
struct Held(#[expect(dead_code, reason = "its drop is what counts")] Sender<()>);

impl Held {
    fn new(stream: &CudaStream) -> Self {
        unsafe extern "C" fn hold(until: *mut c_void) {
            // SAFETY: it was made from a box below, and the driver calls this once.
            let until = unsafe { Box::from_raw(until.cast::<Receiver<()>>()) };
            // An error when the other end is dropped, and when the time is over.
            let _ = until.recv_timeout(Duration::from_secs(5));
        }
        // So that nothing before it is under way: no step then takes more memory for uploads.
        stream.synchronize().unwrap();
        let (held, until) = channel::<()>();
        let until = Box::into_raw(Box::new(until)).cast();
        // SAFETY: the stream is alive, and the function makes no call of CUDA.
        unsafe { result::stream::launch_host_function(stream.cu_stream(), hold, until) }.unwrap();
        Self(held)
    }
}

/// Gradients, of each type more chunks than a third of the grid.
struct Gradients {
    f32: CudaSlice<f32>,
    f16: CudaSlice<f16>,
    bf16: CudaSlice<bf16>,
}

const LENGTH: usize = 200_000;

impl Gradients {
    fn plan() -> Plan {
        Plan::new(DType::ALL.map(|dtype| (dtype.name(), dtype, LENGTH as u64))).unwrap()
    }

    fn new(stream: &Arc<CudaStream>) -> Self {
        Self {
            f32: stream.clone_htod(&vec![0.5; LENGTH]).unwrap(),
            f16: stream.clone_htod(&vec![f16::ONE; LENGTH]).unwrap(),
            bf16: stream.clone_htod(&vec![bf16::ONE; LENGTH]).unwrap(),
        }
    }

    /// A step as a trainer makes it: which calls it made, and of which step it got the report.
    fn step(&mut self, trace: &Trace, probe: &mut Probe) -> (Vec<String>, Option<u64>) {
        let mut reported = None;
        let calls = trace.of(|| {
            probe.measure(&[&self.f32, &self.f16, &self.bf16]).unwrap();
            probe.clip(&mut [&mut self.f32, &mut self.f16, &mut self.bf16]).unwrap();
            reported = probe.poll().unwrap().map(|report| report.step());
        });
        (calls, reported)
    }
}

/// A probe of [`Gradients`], whose tables are on the device: while one is on its way, the next upload takes memory of its own.
fn probe(stream: &Arc<CudaStream>, config: Config) -> Probe {
    let probe = Probe::new(Cuda::new(stream).unwrap(), Gradients::plan(), config).unwrap();
    stream.synchronize().unwrap();
    probe
}

/// A config under which every step is clipped.
fn clipping() -> Config {
    Config::new().clip(Clip::global_norm(1.0))
}

/// Outputs, and a record and a health word of each tensor.
fn report(tensors: usize) -> String {
    let bytes = size_of::<StepOutputs>() + tensors * (size_of::<Record>() + size_of::<u32>());
    format!("cuMemcpyDtoHAsync_v2 {bytes} bytes page-locked")
}

/// Compares the calls of a step, but for those of [`BYSTANDERS`].
#[track_caller]
fn assert_calls(step: &str, calls: &[String], expected: &[&str]) {
    println!("{step}:");
    calls.iter().for_each(|call| println!("    {call}"));
    let seen: Vec<&str> = calls.iter().map(String::as_str).filter(|call| !BYSTANDERS.contains(call)).collect();
    let expected: Vec<String> = expected
        .iter()
        .map(|&call| match call {
            REPORT => report(3),
            EXAMPLE_REPORT => report(4),
            _ => call.to_owned(),
        })
        .collect();
    assert_eq!(seen, expected, "{step}");
}

#[test]
fn a_step_is_two_launches_and_a_copy_of_the_report() {
    let Some((trace, stream)) = driver() else { return };
    let mut gradients = Gradients::new(&stream);
    let mut probe = probe(&stream, clipping());
    // The first step tells the device where the gradients are.
    let (calls, _) = gradients.step(&trace, &mut probe);
    assert_calls("the first step", &calls, &[ADDRESSES, MEASURE, CLIP, REPORT]);
    probe.wait().unwrap();

    // The device does nothing meanwhile. Four reports can be on their way.
    let held = Held::new(&stream);
    for step in 2..=7 {
        let (calls, reported) = gradients.step(&trace, &mut probe);
        let expected = [MEASURE, CLIP, REPORT];
        assert_calls(&format!("step {step}"), &calls, if step <= 5 { &expected } else { &expected[..2] });
        assert_eq!(reported, None, "step {step}");
    }
    drop(held);
    stream.synchronize().unwrap();

    // One step behind, which gives a report.
    let held = Held::new(&stream);
    let (calls, reported) = gradients.step(&trace, &mut probe);
    assert_calls("step 8, with the report of step 2", &calls, &[MEASURE, CLIP]);
    assert_eq!(reported, Some(2));
    let (calls, reported) = gradients.step(&trace, &mut probe);
    assert_calls("step 9, with the report of step 3", &calls, &[MEASURE, CLIP, REPORT]);
    assert_eq!(reported, Some(3));
    drop(held);
}

/// Nothing is read, and nobody waits, between a rank's sums and those of all; and no rank waits for others before the clip
/// where every one has all tensors.
#[cfg(feature = "nccl")]
#[test]
fn a_step_of_many_ranks_is_a_reduction_and_a_launch_more() {
    use gradprobe::{
        cuda::NcclCommunicator,
        ranks::{Along, Mesh, Ranks},
    };
    let Some((trace, stream)) = driver() else { return };
    let mesh = Mesh::new([("dp", 1)]).unwrap();
    let communicator = || NcclCommunicator::new(&stream, 0, 1, NcclCommunicator::unique_id().unwrap()).unwrap();
    let sharded = || Ranks::alike(communicator(), &mesh, mesh.layout([("dp", Along::Sharded)]).unwrap());
    let merge = "cuLaunchKernel gradprobe_merge of 1 blocks";
    // 240 bytes, whatever the number of tensors and ranks, and 736 a tensor where whole ones are asked for.
    let sums = "ncclAllReduce 30 words";
    let contribute = "cuLaunchKernel gradprobe_contribute of 3 blocks";
    let cases: [(Ranks, &[&str]); 3] = [
        (sharded(), &[MEASURE, sums, merge]),
        (
            sharded().whole_tensors(),
            &[MEASURE, sums, contribute, "ncclAllReduce 267 words", "ncclAllReduce 9 words", merge],
        ),
        (Ranks::data_parallel(communicator()), &[MEASURE]),
    ];
    for (ranks, of_step) in cases {
        let mut gradients = Gradients::new(&stream);
        let mut probe = probe(&stream, clipping().ranks(ranks));
        gradients.step(&trace, &mut probe);
        probe.wait().unwrap();
        let _held = Held::new(&stream);
        for step in 2..=4 {
            let (calls, _) = gradients.step(&trace, &mut probe);
            // With what was found when ranks were compared; and whoever asks for it hears of errors.
            let report = ["cuMemcpyDtoHAsync_v2 400 bytes page-locked", "ncclCommGetAsyncError"];
            assert_calls(&format!("step {step}"), &calls, &[of_step, &[CLIP], &report].concat());
        }
    }
}

#[test]
fn a_histogram_and_a_dot_product_are_a_launch_each() {
    let Some((trace, stream)) = driver() else { return };
    let gradients = Gradients::new(&stream);
    let tensors: [&dyn Tensor; 3] = [&gradients.f32, &gradients.f16, &gradients.bf16];
    let mut probe = probe(&stream, Config::new().histogram().dot());
    let _held = Held::new(&stream);
    for (call, addresses, others) in
        [(0, &[ADDRESSES][..], &["cuMemcpyHtoDAsync_v2 48 bytes page-locked"][..]), (1, &[], &[])]
    {
        let calls = trace.of(|| probe.histogram().unwrap().launch(&tensors).unwrap());
        let histogram = ["cuMemsetD8Async 24576 bytes", "cuLaunchKernel gradprobe_histogram of 12 blocks"];
        assert_calls(&format!("histogram {call}"), &calls, &[addresses, &histogram].concat());
        let calls = trace.of(|| probe.dot().unwrap().launch(&tensors, &tensors).unwrap());
        let dot = ["cuLaunchKernel gradprobe_dot of 12 blocks"];
        assert_calls(&format!("dot {call}"), &calls, &[others, &dot].concat());
    }
}

/// Statistics, clip and update are two launches; the learning rate is an upload of 4 bytes.
#[test]
fn an_update_is_two_launches() {
    let Some((trace, stream)) = driver() else { return };
    let (gradients, mut weights) = (Gradients::new(&stream), Gradients::new(&stream));
    let mut probe = probe(&stream, clipping().optimizer(AdamW::new(1e-3)));
    let mut update = |probe: &mut Probe| {
        let weights = &mut [&mut weights.f32 as _, &mut weights.f16 as _, &mut weights.bf16 as _];
        trace.of(|| probe.update(&[&gradients.f32, &gradients.f16, &gradients.bf16], weights).unwrap())
    };
    update(&mut probe);
    probe.wait().unwrap();
    let _held = Held::new(&stream);
    let optimizer = "cuLaunchKernel gradprobe_optimizer of 12 blocks";
    for step in 2..=4 {
        assert_calls(&format!("step {step}"), &update(&mut probe), &[MEASURE, optimizer]);
        let calls = trace.of(|| probe.optimizer().unwrap().set_learning_rate(0.5).unwrap());
        assert_calls("learning rate", &calls, &["cuMemcpyHtoDAsync_v2 4 bytes page-locked"]);
    }
}

#[test]
fn without_a_clip_a_step_is_one_launch() {
    let Some((trace, stream)) = driver() else { return };
    let mut gradients = Gradients::new(&stream);
    let mut probe = probe(&stream, Config::new());
    gradients.step(&trace, &mut probe);
    let _held = Held::new(&stream);
    let (calls, _) = gradients.step(&trace, &mut probe);
    assert_calls("without a clip", &calls, &[MEASURE, REPORT]);
}

#[test]
fn an_adaptive_clip_is_a_launch() {
    let Some((trace, stream)) = driver() else { return };
    let mut gradients = Gradients::new(&stream);
    let weights = Gradients::new(&stream);
    let weights: [&dyn Tensor; 3] = [&weights.f32, &weights.f16, &weights.bf16];
    let units = Gradients::plan().tensors().iter().map(|tensor| tensor.len).collect::<Vec<_>>();
    let mut probe = probe(&stream, Config::new().adaptive_clip(AdaptiveClip::new(units)));
    probe.measure(&[&gradients.f32, &gradients.f16, &gradients.bf16]).unwrap();
    let _held = Held::new(&stream);
    for table in [&["cuMemcpyHtoDAsync_v2 128 bytes page-locked"][..], &[]] {
        let calls = trace.of(|| {
            let tensors = &mut [&mut gradients.f32 as _, &mut gradients.f16 as _, &mut gradients.bf16 as _];
            probe.adaptive_clip().unwrap().clip(tensors, &weights).unwrap();
        });
        let launch = ["cuMemsetD8Async 72 bytes", "cuLaunchKernel gradprobe_adaptive of 3 blocks"];
        assert_calls("an adaptive clip", &calls, &[table, &launch].concat());
    }
}

#[test]
fn weights_are_measured_in_the_launch_of_their_gradients() {
    let Some((trace, stream)) = driver() else { return };
    let gradients = Gradients::new(&stream);
    let tensors: [&dyn Tensor; 3] = [&gradients.f32, &gradients.f16, &gradients.bf16];
    let plan = Gradients::plan();
    let plan = plan.clone().with_weights(plan.tensors().iter().map(|tensor| tensor.dtype)).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), plan, Config::default()).unwrap();
    let _held = Held::new(&stream);
    for addresses in [&["cuMemcpyHtoDAsync_v2 48 bytes page-locked"][..], &[]] {
        let calls = trace.of(|| probe.measure_with_weights(&tensors, &tensors).unwrap());
        let measure = [MEASURE];
        assert_calls("with weights", &calls, &[addresses, &measure].concat());
    }
}

#[test]
fn a_tracked_step_is_one_launch_more() {
    let Some((trace, stream)) = driver() else { return };
    let mut gradients = Gradients::new(&stream);
    let mut probe = probe(&stream, clipping().tracking(GsnrConfig::new()));
    let (calls, _) = gradients.step(&trace, &mut probe);
    assert_calls("the first tracked step", &calls, &[ADDRESSES, MEASURE, UPDATE, CLIP, REPORT]);
    let held = Held::new(&stream);
    let (calls, _) = gradients.step(&trace, &mut probe);
    assert_calls("a tracked step", &calls, &[MEASURE, UPDATE, CLIP, REPORT]);
    let calls = trace.of(|| probe.gsnr().unwrap().launch().unwrap());
    assert_calls("a reduction", &calls, &[GSNR]);
    drop(held);
    let mut calls = trace.of(|| drop(probe.gsnr().unwrap().report().unwrap()));
    // Unless the copy has arrived already.
    calls.retain(|call| call != "cuEventSynchronize waits");
    assert_calls("a reduction that is read", &calls, &[GSNR, GSNR_REPORT]);
}

/// A step of the example with AdamW is one call, in which the device is told nothing; what is reported is copied as ever.
#[test]
fn a_replayed_training_step_is_one_call() {
    let Some((trace, _)) = driver() else { return };
    let mut training = training::Training::new().unwrap();
    let held = Held::new(&training.stream);
    let calls = trace.of(|| {
        training.step().unwrap();
        assert!(training.probe.poll().unwrap().is_none());
    });
    assert_calls("a training step", &calls, &["cuGraphLaunch", EXAMPLE_REPORT]);
    // A report is on its way already.
    let calls = trace.of(|| {
        training.step().unwrap();
        assert!(training.probe.poll().unwrap().is_none());
    });
    assert_calls("the next training step", &calls, &["cuGraphLaunch"]);
    drop(held);
    assert_eq!((training.state().unwrap().steps, training.probe.wait().unwrap().step()), (2, 2));
}
