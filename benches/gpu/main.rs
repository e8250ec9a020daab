//! Device time of the kernels on a GPU, beside the most the same card can do in the same run (`ceiling.rs`). `peers.py`
//! times other libraries on the same cases and the same data.
//!
//! Times are those between two events on the device, but for `small/host`, which is what the calls cost the host. Large
//! cases take turns between copies of their data, 4 GiB in all, so that nothing of the last turn is in the cache. What a
//! clip does is undone before the next turn, outside the time.
//!
//! `--counters` only runs a step of `cached`, for a profiler to look at; `--variants DIR` times what `variants.py` has
//! built there. Without a GPU nothing is measured.
#![allow(unsafe_code, reason = "launches the ceiling's kernels, and measures parts of one allocation")]

mod ceiling;
mod clock;
mod gradients;
mod variants;

use ceiling::Ceiling;
use clock::Clock;
use criterion::{Criterion, Throughput};
use gradients::{Gradients, transformer_lengths};
use gradprobe::{
    Clip, Config, DType, Element, Error, Plan, Probe, RawTensor, Tensor, TensorMut,
    cuda::{self, Cuda},
    cudarc::driver::{
        CudaContext, CudaSlice, CudaStream, DeviceRepr,
        sys::{CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD},
    },
    gsnr::GsnrConfig,
};
use half::{bf16, f16};
use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// The part of the data's norm that is allowed where a step clips, and where it does not.
const CLIPS: f64 = 0.5;
const DOES_NOT_CLIP: f64 = 1e9;

/// Tensors small enough to stay in the cache of a large card.
fn cached(stream: &Arc<CudaStream>) -> Gradients<bf16> {
    Gradients::new(stream, vec![500_000; 50], 1, 0, bf16::from_f32)
}

fn small(stream: &Arc<CudaStream>) -> Gradients<f32> {
    Gradients::new(stream, vec![1024; 1000], 1, 0, |x| x)
}

/// A probe for tensors that stay where they are.
fn probe(stream: &Arc<CudaStream>, tensors: &[RawTensor], config: Config) -> Probe {
    let plan = tensors.iter().enumerate().map(|(t, tensor)| {
        let (dtype, len) = tensor.shape().unwrap();
        (t.to_string(), dtype, len)
    });
    Probe::new(Cuda::new(stream).unwrap(), Plan::new(plan).unwrap(), config).unwrap()
}

/// A config under which this norm is allowed.
fn clipping(max_norm: f64) -> Config {
    Config::new().clip(Clip::global_norm(max_norm))
}

/// The tensors in each place and a probe for them: one a place, so that no address is uploaded between turns.
fn probes<T: Element + DeviceRepr + Into<f32>>(
    stream: &Arc<CudaStream>,
    gradients: &Gradients<T>,
    config: &Config,
) -> Vec<(Probe, Vec<RawTensor>)> {
    let tensors = (0..gradients.places()).map(|place| gradients.tensors(place));
    tensors.map(|tensors| (probe(stream, &tensors, config.clone()), tensors)).collect()
}

/// The tensors, as probes take them.
fn refs(tensors: &[RawTensor]) -> Vec<&dyn Tensor> {
    tensors.iter().map(|tensor| tensor as _).collect()
}

fn measure(probe: &mut Probe, tensors: &[RawTensor]) {
    probe.measure(&refs(tensors)).unwrap();
}

fn clip(probe: &mut Probe, tensors: &mut [RawTensor]) {
    let mut tensors: Vec<&mut dyn TensorMut> = tensors.iter_mut().map(|tensor| tensor as _).collect();
    probe.clip(&mut tensors).unwrap();
}

struct Bench<'c> {
    criterion: &'c mut Criterion,
    stream: Arc<CudaStream>,
    clock: Clock,
    /// Of the data of each case: with the same norm another library has measured the same data.
    norms: BTreeMap<String, f64>,
}

impl Bench<'_> {
    /// Times one case; see [`Clock::turns`].
    fn time(&mut self, group: &str, name: &str, bytes: u64, mut launch: impl FnMut(usize, &dyn Fn())) {
        let mut group = self.criterion.benchmark_group(group);
        group.throughput(Throughput::BytesDecimal(bytes));
        group.bench_function(name, |bencher| {
            bencher
                .iter_custom(|turns| self.clock.turns(usize::try_from(turns).unwrap(), &mut launch).into_iter().sum());
        });
    }

    fn ceilings(&mut self) {
        let mut ceiling = Ceiling::new(&self.stream);
        let bytes = ceiling::BYTES as u64;
        let sum = ceiling.fastest(&self.clock, "sum", Ceiling::sum);
        self.time("ceiling", "sum", bytes, |turn, begin| {
            begin();
            ceiling.sum(turn, &sum);
        });
        let scale = ceiling.fastest(&self.clock, "scale", Ceiling::scale);
        self.time("ceiling", "scale", 2 * bytes, |turn, begin| {
            begin();
            ceiling.scale(turn, &scale);
        });
        self.time("ceiling", "copy", 2 * bytes, |turn, begin| {
            begin();
            ceiling.copy(turn);
        });
    }

    /// All statistics of `gradients`, in each place in turn.
    fn measure<T: Element + DeviceRepr + Into<f32>>(&mut self, group: &str, name: &str, gradients: &Gradients<T>) {
        self.norms.insert(format!("{group}/{name}"), gradients.max_norm(1.0));
        let mut places = probes(&self.stream, gradients, &Config::new());
        let count = places.len();
        self.time(group, name, gradients.bytes(), |turn, begin| {
            let (probe, tensors) = &mut places[turn % count];
            begin();
            measure(probe, tensors);
        });
    }

    /// A tracked step: the measurement, and the update of every element's mean and deviations.
    fn tracked<T: Element + DeviceRepr + Into<f32>>(&mut self, name: &str, gradients: &Gradients<T>) {
        let mut places = probes(&self.stream, gradients, &Config::new().tracking(GsnrConfig::new()));
        let count = places.len();
        self.time("tracked", name, gradients.bytes(), |turn, begin| {
            let (probe, tensors) = &mut places[turn % count];
            begin();
            measure(probe, tensors);
        });
    }

    /// Histograms of the exponents.
    fn counts<T: Element + DeviceRepr + Into<f32>>(&mut self, name: &str, gradients: &Gradients<T>) {
        let mut places = probes(&self.stream, gradients, &Config::new().histogram());
        let count = places.len();
        self.time("histogram", name, gradients.bytes(), |turn, begin| {
            let (probe, tensors) = &mut places[turn % count];
            begin();
            probe.histogram().unwrap().launch(&refs(tensors)).unwrap();
        });
    }

    /// One tensor of 1 GiB.
    fn one_tensor<T: Element + DeviceRepr + Into<f32>>(
        &mut self,
        name: &str,
        offset: usize,
        convert: impl Fn(f32) -> T + Sync,
    ) {
        let gradients = Gradients::new(&self.stream, vec![(1 << 30) / size_of::<T>()], 4, offset, convert);
        self.measure("measure", name, &gradients);
    }

    /// Measure and clip, with a norm of at most `share` of the data's own.
    fn step<T: Element + DeviceRepr + Into<f32>>(
        &mut self,
        group: &str,
        name: &str,
        gradients: &mut Gradients<T>,
        share: f64,
    ) {
        self.norms.insert(format!("{group}/{name}"), gradients.max_norm(1.0));
        let mut places = probes(&self.stream, gradients, &clipping(gradients.max_norm(share)));
        let count = places.len();
        self.time(group, name, gradients.bytes(), |turn, begin| {
            if share < 1.0 {
                // The place of the turn after the next: what is restored last would be in the cache.
                gradients.restore((turn + 1) % count);
            }
            let (probe, tensors) = &mut places[turn % count];
            begin();
            measure(probe, tensors);
            clip(probe, tensors);
        });
    }

    /// The same as a captured graph.
    fn graph<T: Element + DeviceRepr + Into<f32>>(&mut self, group: &str, name: &str, gradients: &mut Gradients<T>) {
        self.norms.insert(format!("{group}/{name}"), gradients.max_norm(1.0));
        let (mut probe, mut tensors) = probes(&self.stream, gradients, &clipping(gradients.max_norm(CLIPS))).remove(0);
        // SAFETY: probe and gradients are there until the graph is dropped, and are used on this stream alone.
        unsafe { probe.bind(&refs(&tensors), &[]) }.unwrap();
        self.stream.begin_capture(THIS_THREAD).unwrap();
        measure(&mut probe, &tensors);
        clip(&mut probe, &mut tensors);
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
        self.time(group, name, gradients.bytes(), |_, begin| {
            gradients.restore(0);
            begin();
            graph.launch().unwrap();
        });
    }

    /// Tensors of two types in turn, and the same tensors by type.
    fn mixed(&mut self) {
        let f32s = Gradients::new(&self.stream, vec![1 << 20; 128], 1, 0, |x| x);
        let bf16s = Gradients::new(&self.stream, vec![1 << 20; 128], 1, 0, bf16::from_f32);
        let sorted = [f32s.tensors(0), bf16s.tensors(0)].concat();
        let interleaved: Vec<RawTensor> = (0..256).map(|t| sorted[t % 2 * 128 + t / 2]).collect();
        for (name, tensors) in [("interleaved", interleaved), ("sorted", sorted)] {
            let mut probe = probe(&self.stream, &tensors, Config::new());
            self.time("mixed", name, f32s.bytes() + bf16s.bytes(), |_, begin| {
                begin();
                measure(&mut probe, &tensors);
            });
        }
    }

    /// What the calls of a step cost the host, with a list of slices made for each, as a trainer makes it.
    fn host(&mut self, name: &str, stream: &Arc<CudaStream>) {
        let mut slices: Vec<CudaSlice<f32>> = (0..1000).map(|_| stream.alloc_zeros(1024).unwrap()).collect();
        let plan = Plan::new((0..slices.len()).map(|t| (t.to_string(), DType::F32, 1024))).unwrap();
        let mut probe = Probe::new(Cuda::new(stream).unwrap(), plan, clipping(1.0)).unwrap();
        let mut step = || {
            let start = Instant::now();
            let tensors: Vec<&dyn Tensor> = slices.iter().map(|slice| slice as _).collect();
            probe.measure(&tensors).unwrap();
            let mut tensors: Vec<&mut dyn TensorMut> = slices.iter_mut().map(|slice| slice as _).collect();
            probe.clip(&mut tensors).unwrap();
            start.elapsed()
        };
        self.criterion.benchmark_group("small").bench_function(name, |bencher| {
            bencher.iter_custom(|turns| {
                let mut total = Duration::ZERO;
                for turn in 0..turns {
                    total += step();
                    // A full queue would make the calls wait.
                    if turn % 16 == 15 {
                        stream.synchronize().unwrap();
                    }
                }
                total
            });
        });
    }

    fn all(&mut self) {
        self.ceilings();
        self.one_tensor("f32", 0, |x| x);
        self.one_tensor("bf16", 0, bf16::from_f32);
        self.one_tensor("f16", 0, f16::from_f32);
        self.one_tensor("bf16-misaligned", 1, bf16::from_f32);
        let stream = Arc::clone(&self.stream);
        {
            let mut gradients = Gradients::new(&stream, transformer_lengths(), 2, 0, bf16::from_f32);
            self.step("step", "clips", &mut gradients, CLIPS);
            self.step("step", "does-not-clip", &mut gradients, DOES_NOT_CLIP);
        }
        {
            // A gradient of 1 GiB, whose state is 2 GiB in f32 and 4 GiB in bf16.
            let gradients = Gradients::new(&stream, vec![1 << 28], 2, 0, |x| x);
            self.tracked("f32", &gradients);
            self.counts("f32", &gradients);
        }
        {
            let gradients = Gradients::new(&stream, vec![1 << 29], 2, 0, bf16::from_f32);
            self.tracked("bf16", &gradients);
            self.counts("bf16", &gradients);
        }
        self.mixed();
        self.measure("cached", "measure", &cached(&stream));
        self.step("cached", "step", &mut cached(&stream), CLIPS);
        self.step("small", "device", &mut small(&stream), CLIPS);
        self.graph("small", "graph", &mut small(&stream));
        self.host("host", &stream);
        // With cudarc's event tracking, as a context has it by default: two driver calls a tensor.
        let context = CudaContext::new(0).unwrap();
        self.host("host-tracked", &context.new_stream().unwrap());
    }
}

fn main() {
    match cuda::stream(0) {
        Ok(_) => {}
        Err(error @ (Error::DriverNotFound { .. } | Error::DeviceNotFound { .. })) => {
            eprintln!("nothing to measure: {error}");
            let required = std::env::var("GRADPROBE_REQUIRE_GPU").as_deref() == Ok("1");
            std::process::exit(i32::from(required));
        }
        Err(error) => panic!("{error}"),
    }
    let context = CudaContext::new(0).unwrap();
    // SAFETY: everything is on one stream; the one other, of `host-tracked`, has a context object of its own.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let clock = Clock::new(&stream);
    let mut arguments = std::env::args().skip_while(|argument| argument != "--variants");
    if let (Some(_), Some(folder)) = (arguments.next(), arguments.next()) {
        return variants::run(&stream, &clock, folder.as_ref());
    }
    if std::env::args().any(|argument| argument == "--counters") {
        let mut gradients = cached(&stream);
        let (mut probe, mut tensors) = probes(&stream, &gradients, &clipping(gradients.max_norm(CLIPS))).remove(0);
        for _ in 0..2 {
            gradients.restore(0);
            measure(&mut probe, &tensors);
            clip(&mut probe, &mut tensors);
        }
        return stream.synchronize().unwrap();
    }
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(1200))
        .configure_from_args();
    let mut bench = Bench { criterion: &mut criterion, stream, clock, norms: BTreeMap::new() };
    bench.all();
    // Beside criterion's own results, for record.py.
    if let Some(folder) = std::env::var_os("CRITERION_HOME") {
        let norms = serde_json::to_vec(&bench.norms).unwrap();
        std::fs::write(Path::new(&folder).join("norms.json"), norms).unwrap();
    }
    criterion.final_summary();
}
