//! Ranks that add up their sums by NCCL: the bits and decisions that ranks on the CPU have, launch by launch and in a
//! replayed graph, with nothing that waits. As many ranks as there are GPUs; in CI the host driver, which is NCCL too, has
//! three on its one device. Skipped where there is no GPU or no NCCL.
#![cfg(feature = "nccl")]
#![allow(unsafe_code, reason = "bare addresses and graphs are the driver's")]

mod common;
mod require;

use common::{
    cases::{Data, Tensor, normal},
    host::{OnHost, plan_of},
};
use gradprobe::{
    Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, Plan, Probe, RawTensor, Report, TensorMut,
    clip::LossScale,
    cuda::{self, Cuda, NcclCommunicator},
    cudarc::{
        driver::{
            CudaContext, CudaSlice, CudaStream,
            sys::{CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD},
        },
        nccl::safe::{Comm, Id, ReduceOp},
    },
    ranks::{Along, Communicator, Layout, Mesh, Ranks, ThreadCommunicator},
};
use require::{pointless, skipped};
use std::{sync::Arc, thread, time::Duration};

/// Set to a number on the host driver: so many ranks, all on the first device, which NVIDIA's NCCL refuses.
const RANKS: &str = "GRADPROBE_NCCL_RANKS";

const STEPS: u64 = 5;

/// The devices of the ranks, and how they find each other; none where something is missing.
fn devices() -> Option<(Vec<usize>, Id)> {
    if let Err(error) = cuda::stream(0) {
        assert!(matches!(error, Error::DriverNotFound { .. } | Error::DeviceNotFound { .. }), "{error}");
        skipped(require::GPU, &error.to_string());
        return None;
    }
    let id = match NcclCommunicator::unique_id() {
        Ok(id) => id,
        Err(error @ Error::NcclNotFound { .. }) => {
            assert!(std::env::var(RANKS).is_err(), "{error}");
            // A machine with a GPU may well be without it.
            pointless(&error.to_string());
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let devices = match std::env::var(RANKS) {
        Ok(ranks) => vec![0; ranks.parse().expect("a number of ranks")],
        Err(_) => (0..usize::try_from(CudaContext::device_count().unwrap()).unwrap()).collect(),
    };
    Some((devices, id))
}

/// A probe on this stream.
fn probe(stream: &Arc<CudaStream>, plan: Plan, config: Config) -> Result<Probe, Error> {
    Probe::new(Cuda::new(stream).unwrap(), plan, config)
}

/// What each rank makes of it, as threads, in their order.
fn on_ranks<T: Send, E: Send>(ends: Vec<E>, run: impl Fn(u32, E) -> T + Sync) -> Vec<T> {
    let run = &run;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..).zip(ends).map(|(rank, end)| scope.spawn(move || run(rank, end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

const NAMES: [&str; 4] = ["sharded", "replicated", "of the last", "none"];

/// Whole tensors of a step: a shard, a replica, what the last rank alone has, and nothing.
fn ranks_of(communicator: impl Communicator + 'static) -> Ranks {
    let mesh = Mesh::new([("dp", communicator.ranks())]).unwrap();
    let how = [Along::Sharded, Along::Replicated, Along::At(communicator.ranks() - 1), Along::Sharded];
    let is_held = |how: &Along| !matches!(how, Along::At(at) if *at != communicator.rank());
    let layouts: Vec<Layout> = how.into_iter().filter(is_held).map(|how| mesh.layout([("dp", how)]).unwrap()).collect();
    Ranks::new(communicator, &mesh, layouts).whole_tensors()
}

/// Shards alone.
fn sharded(communicator: impl Communicator + 'static) -> Ranks {
    let mesh = Mesh::new([("dp", communicator.ranks())]).unwrap();
    let layout = mesh.layout([("dp", Along::Sharded)]).unwrap();
    Ranks::alike(communicator, &mesh, layout)
}

/// The gradients of a rank in a step: shards of other lengths on each, a replica, and what one alone has, with an overflow
/// in the third step.
fn gradients(rank: u32, ranks: u32, step: u64) -> Vec<Data> {
    let key = 100 * step + u64::from(rank);
    let size = 0.1 + step as f64;
    let shard = Tensor::of_values(DType::F32, 40_000 + 1000 * rank as usize, move |i| size * normal(key, i));
    let replica = Tensor::of_values(DType::BF16, 5000, move |i| size * normal(7 + step, i));
    let owned = Tensor::of_values(DType::F16, if rank + 1 == ranks { 333 } else { 0 }, move |i| 8.0 * normal(key, i));
    let owned = if step == 2 && rank + 1 == ranks { owned.with(5, 0x7c00) } else { owned };
    let mut all = vec![shard.data(), replica.data(), owned.data(), Tensor::empty(DType::F32).data()];
    if rank + 1 < ranks {
        all.remove(2);
    }
    all
}

fn config() -> Config {
    Config::default().clip(Clip::global_norm(3.0)).loss_scale(LossScale::dynamic().initial(4.0).growth_interval(2))
}

fn plan(data: &[Data]) -> Plan {
    let names = NAMES.into_iter().filter(|name| data.len() == NAMES.len() || *name != NAMES[2]);
    plan_of(names.zip(data.iter().map(Data::tensor))).unwrap()
}

fn bytes_of(report: &Report) -> Vec<u8> {
    [bytemuck::bytes_of(report.outputs()), bytemuck::cast_slice(report.records())].concat()
}

/// Reports and clipped gradients of a rank's steps.
type Run = Vec<(Vec<u8>, Vec<u8>)>;

fn on_cpus(ranks: u32) -> Vec<Run> {
    on_ranks(ThreadCommunicator::group(ranks), |rank, communicator| {
        let config = config().ranks(ranks_of(communicator));
        let mut probe = Probe::new(Cpu, plan(&gradients(rank, ranks, 0)), config).unwrap();
        let step = |step| {
            let mut data = gradients(rank, ranks, step);
            let report = probe.measure_host(&data.iter().map(Data::tensor).collect::<Vec<HostTensor>>()).unwrap();
            probe.clip_host(&mut data.iter_mut().map(Data::tensor_mut).collect::<Vec<HostTensorMut>>()).unwrap();
            (bytes_of(&report), data.iter().flat_map(|data| data.bytes().to_vec()).collect())
        };
        (0..STEPS).map(step).collect()
    })
}

/// A rank's tensors in one piece of device memory, each from a multiple of 16 bytes on.
struct OnDevice {
    memory: CudaSlice<u8>,
    raw: Vec<RawTensor>,
    places: Vec<std::ops::Range<usize>>,
}

impl OnDevice {
    fn new(stream: &Arc<CudaStream>, data: &[Data]) -> Self {
        use gradprobe::cudarc::driver::DevicePtr;
        let mut places = Vec::new();
        let mut end = 0usize;
        for data in data {
            let start = end.next_multiple_of(16);
            end = start + data.bytes().len();
            places.push(start..end);
        }
        let memory = stream.alloc_zeros::<u8>(end).unwrap();
        let address = memory.device_ptr(stream).0;
        let of = |(data, place): (&Data, &std::ops::Range<usize>)| {
            // SAFETY: the memory is that long, lives longer than the probes, and is used on this stream only.
            unsafe { RawTensor::new(address + place.start as u64, data.len() as u64, data.dtype()) }
        };
        let raw = data.iter().zip(&places).map(of).collect();
        Self { memory, raw, places }
    }

    fn measure(&self, probe: &mut Probe) {
        probe.measure(&self.refs()).unwrap();
    }

    fn clip(&self, probe: &mut Probe) {
        let mut tensors = self.raw.clone();
        let mut tensors: Vec<&mut dyn TensorMut> = tensors.iter_mut().map(|tensor| tensor as _).collect();
        probe.clip(&mut tensors).unwrap();
    }

    fn refs(&self) -> Vec<&dyn gradprobe::Tensor> {
        self.raw.iter().map(|tensor| tensor as _).collect()
    }

    fn set(&mut self, stream: &Arc<CudaStream>, data: &[Data]) {
        let mut bytes = vec![0; self.places.last().map_or(0, |place| place.end)];
        for (data, place) in data.iter().zip(&self.places) {
            bytes[place.clone()].copy_from_slice(data.bytes());
        }
        stream.memcpy_htod(&bytes, &mut self.memory).unwrap();
    }

    fn get(&self, stream: &Arc<CudaStream>) -> Vec<u8> {
        let bytes = stream.clone_dtoh(&self.memory).unwrap();
        self.places.iter().flat_map(|place| bytes[place.clone()].to_vec()).collect()
    }
}

#[test]
fn ranks_on_gpus_have_the_bits_of_ranks_on_cpus() {
    let Some((devices, id)) = devices() else { return };
    let ranks = u32::try_from(devices.len()).unwrap();
    let expected = on_cpus(ranks);
    let seen: Vec<[Run; 2]> = on_ranks(devices, |rank, device| {
        let stream = cuda::stream(device).unwrap();
        let first = gradients(rank, ranks, 0);
        let mut tensors = OnDevice::new(&stream, &first);
        let new = |id| {
            let communicator = NcclCommunicator::new(&stream, rank, ranks, id).unwrap();
            let config = config().ranks(ranks_of(communicator));
            probe(&stream, plan(&first), config).unwrap()
        };
        let mut probe = new(id);
        let mut launched = Run::new();
        for step in 0..STEPS {
            tensors.set(&stream, &gradients(rank, ranks, step));
            tensors.measure(&mut probe);
            tensors.clip(&mut probe);
            launched.push((bytes_of(&probe.wait().unwrap()), tensors.get(&stream)));
        }
        assert_eq!(probe.ranks().unwrap().differing_replicas(), Ok(vec![]));

        // The same from the start, in a graph. One communicator a device at a time would do; two on one stream are in order
        // all the same.
        let mut probe = new(share(rank, || NcclCommunicator::unique_id().unwrap()));
        // SAFETY: probe and tensors live longer than the graph.
        unsafe { probe.bind(&tensors.refs(), &[]) }.unwrap();
        stream.begin_capture(THIS_THREAD).unwrap();
        tensors.measure(&mut probe);
        tensors.clip(&mut probe);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
        let mut replayed = Run::new();
        for step in 0..STEPS {
            tensors.set(&stream, &gradients(rank, ranks, step));
            graph.launch().unwrap();
            replayed.push((bytes_of(&probe.wait().unwrap()), tensors.get(&stream)));
        }
        [launched, replayed]
    });
    for (rank, (seen, expected)) in seen.iter().zip(&expected).enumerate() {
        for (how, run) in ["launched", "replayed"].into_iter().zip(seen) {
            for (step, (seen, expected)) in run.iter().zip(expected).enumerate() {
                assert!(seen.0 == expected.0, "rank {rank}, step {step}, {how}: another report");
                assert!(seen.1 == expected.1, "rank {rank}, step {step}, {how}: other gradients");
            }
        }
    }
}

/// The id that rank 0 makes, on all ranks of a process.
fn share(rank: u32, make: impl FnOnce() -> Id) -> Id {
    use std::sync::{Condvar, Mutex};
    static SHARED: Mutex<Option<Id>> = Mutex::new(None);
    static MADE: Condvar = Condvar::new();
    let mut shared = SHARED.lock().unwrap();
    if rank == 0 {
        *shared = Some(make());
        MADE.notify_all();
    }
    let shared = MADE.wait_while(shared, |id| id.is_none()).unwrap();
    (*shared).expect("was waited for")
}

#[test]
fn ranks_that_differ_are_errors_on_all() {
    let Some((devices, id)) = devices() else { return };
    let ranks = u32::try_from(devices.len()).unwrap();
    let errors = on_ranks(devices, |rank, device| {
        let stream = cuda::stream(device).unwrap();
        // The last has another type; where it is the only one, it agrees with itself.
        let dtype = if rank + 1 == ranks { DType::F16 } else { DType::BF16 };
        let communicator = NcclCommunicator::new(&stream, rank, ranks, id).unwrap();
        let config = Config::default().ranks(sharded(communicator));
        probe(&stream, Plan::new([("w", dtype, 1)]).unwrap(), config).err()
    });
    for error in errors {
        match error {
            None => assert_eq!(ranks, 1),
            // Of two nobody can tell which is odd.
            Some(Error::RankDiffers { rank, .. }) => assert_eq!(rank, ranks - 1),
            Some(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_communicator_of_another_stream_is_refused() {
    let Some((_, id)) = devices() else { return };
    let one = || Plan::new([("w", DType::F32, 1)]).unwrap();
    let [own, other] = [(); 2].map(|()| cuda::stream(0).unwrap());
    let refused = NcclCommunicator::new(&own, 1, 1, id).unwrap_err();
    assert_eq!(refused.to_string(), "the ranks cannot communicate: there is no rank 1 of 1");
    let communicator = NcclCommunicator::new(&other, 0, 1, id).unwrap();
    let config = Config::default().ranks(sharded(communicator));
    for refused in [probe(&own, one(), config.clone()), Probe::new(Cpu, one(), config)] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Communication { .. }), "{error}");
    }
    let mut alone = probe(&own, one(), Config::default()).unwrap();
    assert_eq!(alone.ranks().map(drop), Err(Error::NotDeclared { declare: "Config::ranks" }));
    // And the other way round: threads exchange memory of the host.
    let threads = ThreadCommunicator::group(1).remove(0);
    let config = Config::default().ranks(sharded(threads));
    let error = probe(&own, one(), config).unwrap_err();
    assert!(matches!(error, Error::Communication { .. }), "{error}");
}

/// A rank that does not come is an error on those that wait for it, and nothing hangs, not even a drop.
#[test]
fn a_rank_that_does_not_come_is_an_error_after_the_deadline() {
    let Some((devices, id)) = devices() else { return };
    let ranks = u32::try_from(devices.len()).unwrap();
    if ranks == 1 {
        return;
    }
    let deadline = Duration::from_millis(700);
    let begun = std::sync::Mutex::new(None);
    let errors = on_ranks(devices, |rank, device| {
        let stream = cuda::stream(device).unwrap();
        let communicator = NcclCommunicator::new(&stream, rank, ranks, id).unwrap().with_deadline(deadline);
        let ranks_of = sharded(communicator);
        let data = [Tensor::of_values(DType::F32, 8, |_| 2.0).data()];
        let config = Config::default().ranks(ranks_of);
        let mut probe = probe(&stream, Plan::new([("w", DType::F32, 8)]).unwrap(), config).unwrap();
        let mut tensors = OnDevice::new(&stream, &data);
        tensors.set(&stream, &data);
        tensors.measure(&mut probe);
        assert_eq!(probe.wait().unwrap().outputs().total_norm, (32.0 * f64::from(ranks)).sqrt());
        // In a graph, which NCCL waits for when it is to give up a communicator.
        // SAFETY: probe and tensors live longer than the graph.
        unsafe { probe.bind(&tensors.refs(), &[]) }.unwrap();
        stream.begin_capture(THIS_THREAD).unwrap();
        tensors.measure(&mut probe);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
        begun.lock().unwrap().get_or_insert_with(std::time::Instant::now);
        if rank + 1 == ranks {
            // It hangs, and is dropped long after.
            thread::sleep(3 * deadline);
            drop(graph);
            return Ok(());
        }
        graph.launch().unwrap();
        // One asks now and then, the other waits.
        let error = loop {
            match probe.poll() {
                Ok(None) if rank == 0 => thread::sleep(Duration::from_millis(10)),
                Ok(_) => break probe.wait().map(drop),
                Err(error) => break Err(error),
            }
        };
        assert!(probe.measure(&tensors.refs()).is_err() && probe.wait().is_err(), "of no more use");
        drop(graph);
        error
    });
    let took = begun.into_inner().unwrap().unwrap().elapsed();
    assert!(took < 8 * deadline, "{took:?}");
    for (rank, error) in errors.into_iter().enumerate() {
        match error {
            Ok(()) => assert_eq!(rank + 1, ranks as usize),
            Err(error) => {
                let expected = "the ranks cannot communicate: some rank has not come within 700ms";
                assert_eq!(error.to_string(), expected);
            }
        }
    }
}

/// Nor does one hang that is alone when ranks come together.
#[test]
fn ranks_that_never_come_together_are_an_error_after_the_deadline() {
    if devices().is_none() {
        return;
    }
    let (stream, id) = (cuda::stream(0).unwrap(), NcclCommunicator::unique_id().unwrap());
    let error = NcclCommunicator::within(Duration::from_millis(300), &stream, 0, 2, id).unwrap_err();
    assert_eq!(error.to_string(), "the ranks cannot communicate: some rank has not come within 300ms");
}

/// The trainer's communicator, which it goes on using.
#[test]
fn a_communicator_may_be_shared() {
    let Some((devices, id)) = devices() else { return };
    let ranks = u32::try_from(devices.len()).unwrap();
    let norms = on_ranks(devices, |rank, device| {
        let stream = cuda::stream(device).unwrap();
        let comm = Comm::from_rank(Arc::clone(&stream), rank as usize, ranks as usize, id).unwrap();
        #[allow(clippy::arc_with_non_send_sync)]
        let comm = Arc::new(comm);
        // SAFETY: both stay in this thread, and are waited for before they go.
        let shared = unsafe { NcclCommunicator::shared(Arc::clone(&comm)) };
        let config = Config::default().ranks(sharded(shared));
        let mut probe = probe(&stream, Plan::new([("w", DType::F32, 1)]).unwrap(), config).unwrap();
        let mut slice = stream.clone_htod(&[1f32]).unwrap();
        probe.step(&mut [&mut slice]).unwrap();
        let norm = probe.wait().unwrap().outputs().total_norm;
        drop(probe);
        let mut own = stream.clone_htod(&[u64::from(rank)]).unwrap();
        comm.all_reduce_in_place(&mut own, &ReduceOp::Sum).unwrap();
        (norm, stream.clone_dtoh(&own).unwrap()[0])
    });
    let sum = u64::from(ranks) * (u64::from(ranks) - 1) / 2;
    assert!(norms.iter().all(|&seen| seen == (f64::from(ranks).sqrt(), sum)), "{norms:?}");
}

/// Where there is none, an error and no panic.
#[test]
fn a_missing_library_is_an_error() {
    if let Err(error) = NcclCommunicator::unique_id() {
        assert!(matches!(error, Error::NcclNotFound { .. }), "{error}");
        assert!(error.to_string().starts_with("no NCCL: none of libnccl.so could be loaded ("), "{error}");
    }
}
