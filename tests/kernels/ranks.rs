//! Many ranks, as threads: however tensors are spread over them, every rank has the records of the whole within the
//! bounds, the same bits as every other rank, and the same decision; on the CPU and in the kernels on the host.
#![allow(unsafe_code, reason = "gathers device memory, which is the host's")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

use crate::common::host::{OnHost, plan_of};
use crate::common::{
    cases::{Data, Tensor, lognormal, normal, random_bits},
    check::{self, Seen},
    demand_none, oracle,
};
use gradprobe::{
    Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, Plan, Probe, Record, Report, Rules, StepOutputs,
    clip::LossScale,
    ranks::{Communicator, Placement, RankReport, Ranks, ThreadCommunicator},
    tensor::Place,
};
use gradprobe_simt::{Schedule, Simt};
use std::thread;

/// Threads whose devices' memory is the host's, of which PTX has to be told what is written.
#[derive(Debug)]
struct Told(ThreadCommunicator);

// SAFETY: as the one within.
unsafe impl Communicator for Told {
    fn rank(&self) -> u32 {
        self.0.rank()
    }

    fn ranks(&self) -> u32 {
        self.0.ranks()
    }

    fn check(&self, place: &Place) -> Result<(), Error> {
        self.0.check(place)
    }

    unsafe fn all_gather(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.0.all_gather(from, to, bytes) }?;
        gradprobe_simt::ptx::memory::written(to, bytes * self.ranks() as usize);
        Ok(())
    }
}

/// A config with these other ranks.
pub fn joined(config: &Config, communicator: ThreadCommunicator, placements: &[Placement]) -> Config {
    config.clone().ranks(Ranks::new(Told(communicator), placements.iter().cloned()))
}

type Make = fn(Plan, Config, u32) -> Result<Probe, Error>;
const DEVICES: [Make; 2] = [
    |plan, config, _| Probe::new(Cpu, plan, config),
    |plan, config, rank| {
        let device = Simt { schedule: Schedule::Shuffled(rank.into()), blocks: 2, ..Simt::default() };
        Probe::new(device, plan, config)
    },
];

/// What each rank makes of it, in their order.
pub fn on_ranks<T: Send>(ranks: u32, run: impl Fn(u32, ThreadCommunicator) -> T + Sync) -> Vec<T> {
    let run = &run;
    thread::scope(|scope| {
        let ends = ThreadCommunicator::group(ranks).into_iter();
        let threads: Vec<_> = ends.map(|end| scope.spawn(move || run(end.rank(), end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The tensors of a model, and how each is cut into the parts of the ranks.
struct Model {
    names: Vec<String>,
    tensors: Vec<Data>,
    placements: Vec<Placement>,
    /// A part a tensor and rank.
    parts: Vec<Vec<Data>>,
}

fn part(data: &Data, range: std::ops::Range<usize>) -> Data {
    Data::of_bits(data.dtype(), data.bits().skip(range.start).take(range.len()))
}

impl Model {
    /// Tensors of all kinds and sizes, with a placement of each kind, cut by chance.
    fn new(ranks: u32, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut model = Self { names: Vec::new(), tensors: Vec::new(), placements: Vec::new(), parts: Vec::new() };
        for (t, len) in [70_001, 3, 0, 1, 40_000, 2049, 17, 500].into_iter().enumerate() {
            let t = t as u64;
            let dtype = DType::ALL[(t + seed) as usize % 3];
            let key = 1000 * seed + t;
            let tensor = match t {
                0 | 5 => Tensor::of_values(dtype, len, move |i| 1e-3 * normal(key, i) + 0.02),
                4 => Tensor::of_values(dtype, len, move |i| lognormal(key, i, 3.0)),
                // With NaN and Inf in every other model.
                6 if seed % 2 == 1 => Tensor::of_bits(dtype, len, move |i| random_bits(dtype, key, i)),
                _ => Tensor::of_values(dtype, len, move |i| normal(key, i)),
            };
            let mut owners: Vec<u32> = (0..ranks).collect();
            random.shuffle(&mut owners);
            owners.truncate(random.usize(1..=ranks as usize));
            let placement = match (t + seed) % 3 {
                0 => Placement::Sharded,
                1 => Placement::Replicated,
                _ => Placement::Ranks(owners),
            };
            model.add(&format!("tensor {t}"), tensor.data(), placement, ranks, &mut random);
        }
        model
    }

    fn add(&mut self, name: &str, data: Data, placement: Placement, ranks: u32, random: &mut fastrand::Rng) {
        let len = data.bits().count();
        let order: Vec<u32> = match &placement {
            Placement::Ranks(owners) => owners.clone(),
            _ => (0..ranks).collect(),
        };
        let mut cuts: Vec<usize> = (1..order.len()).map(|_| random.usize(0..=len)).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        // Who is none of the owners holds something else under the name.
        let stranger = Data::of_bits(data.dtype(), std::iter::repeat_n(0x7fff_u32, 3));
        let mut parts = vec![stranger; ranks as usize];
        for (place, &rank) in order.iter().enumerate() {
            parts[rank as usize] = match placement {
                Placement::Replicated => data.clone(),
                _ => part(&data, cuts[place]..cuts[place + 1]),
            };
        }
        self.names.push(name.to_owned());
        self.tensors.push(data);
        self.placements.push(placement);
        self.parts.push(parts);
    }

    fn of_rank(&self, rank: u32) -> Vec<Data> {
        self.parts.iter().map(|parts| parts[rank as usize].clone()).collect()
    }

    fn plan(&self, data: &[Data]) -> Plan {
        plan_of(self.names.iter().cloned().zip(data.iter().map(Data::tensor))).unwrap()
    }
}

fn tensors(data: &[Data]) -> Vec<HostTensor<'_>> {
    data.iter().map(Data::tensor).collect()
}

fn tensors_mut(data: &mut [Data]) -> Vec<HostTensorMut<'_>> {
    data.iter_mut().map(Data::tensor_mut).collect()
}

fn bytes_of(report: &Report) -> Vec<u8> {
    [bytemuck::bytes_of(report.outputs()), bytemuck::cast_slice(report.records())].concat()
}

/// Measured, clipped.
fn step(model: &Model, make: Make, config: &Config, ranks: u32) -> Vec<(Report, Vec<Data>)> {
    on_ranks(ranks, |rank, communicator| {
        let mut data = model.of_rank(rank);
        let mut probe = make(model.plan(&data), joined(config, communicator, &model.placements), rank).unwrap();
        let report = probe.measure_host(&tensors(&data)).unwrap();
        probe.clip_host(&mut tensors_mut(&mut data)).unwrap();
        (report, data)
    })
}

#[test]
fn any_partition_gives_the_whole_to_every_rank() {
    let mut complaints = Vec::new();
    for (ranks, seed) in [(1, 0), (1, 1), (2, 2), (2, 3), (3, 4), (3, 5), (8, 6), (8, 7), (5, 8), (4, 9)] {
        let model = Model::new(ranks, seed);
        let config = Config::default().clip(Clip::global_norm(0.7));
        let [on_cpu, on_simt] = DEVICES.map(|make| step(&model, make, &config, ranks));
        let place = format!("{ranks} ranks, seed {seed}");
        for (rank, ((report, _), (of_kernels, left))) in on_cpu.iter().zip(&on_simt).enumerate() {
            if bytes_of(report) != bytes_of(&on_cpu[0].0) || bytes_of(of_kernels) != bytes_of(report) {
                complaints.push(format!("{place}: rank {rank} has other bits"));
            }
            let bytes = |data: &[Data]| data.iter().flat_map(|data| data.bytes().to_vec()).collect::<Vec<_>>();
            if bytes(left) != bytes(&on_cpu[rank].1) {
                complaints.push(format!("{place}: rank {rank} clips otherwise"));
            }
        }
        // Against the exact statistics of the whole.
        let report = &on_cpu[0].0;
        let of = |data: &Data| oracle::truth(data.dtype(), config.dead_threshold, data.bits());
        let truths: Vec<_> = model.tensors.iter().map(of).collect();
        complaints.extend(check::check_outputs(report.outputs(), 1, &truths, &config));
        for ((name, record), truth) in model.names.iter().zip(report.records()).zip(&truths) {
            complaints.extend(check::check_tensor(name, &Seen::of(record), truth));
        }
        // The bits are those of `Record::merge` in the order of the ranks.
        for (t, placement) in model.placements.iter().enumerate() {
            let of_rank = |&rank: &u32| {
                let part = &model.parts[t][rank as usize..][..1];
                let plan = plan_of([("part", part[0].tensor())]).unwrap();
                Probe::new(Cpu, plan, config.clone()).unwrap().measure_host(&tensors(part)).unwrap().records()[0]
            };
            let order: Vec<u32> = match placement {
                Placement::Ranks(owners) => owners.clone(),
                Placement::Replicated => vec![0],
                _ => (0..ranks).collect(),
            };
            let merged = order.iter().map(of_rank).reduce(|all, next| all.merge(&next)).unwrap();
            if bytemuck::bytes_of(&merged) != bytemuck::bytes_of(&report.records()[t]) {
                complaints.push(format!("{place}, tensor {t}: {merged:?} is not {:?}", report.records()[t]));
            }
        }
        // And what is left is the whole, clipped.
        let clipped = crate::common::clip_by_oracle(&model.tensors, report.outputs());
        for (t, placement) in model.placements.iter().enumerate() {
            let order: Vec<u32> = match placement {
                Placement::Ranks(owners) => owners.clone(),
                Placement::Replicated => vec![ranks - 1],
                _ => (0..ranks).collect(),
            };
            let left: Vec<u32> = order.iter().flat_map(|&rank| on_cpu[rank as usize].1[t].bits()).collect();
            if left != clipped[t].bits().collect::<Vec<_>>() {
                complaints.push(format!("{place}, tensor {t}: the clipped parts are not the clipped tensor"));
            }
        }
    }
    demand_none(&complaints);
}

/// What policies remember, what is kept, judged and scaled, is the same on all ranks, step after step, and what a single
/// probe makes of the whole.
#[test]
fn what_ranks_remember_stays_the_same() {
    const RANKS: u32 = 3;
    let configs = [
        Config::default().clip(Clip::ZScore { smoothing: 0.9, threshold: 1.0, warmup: 2, max_norm: None }),
        Config::default().clip(Clip::Percentile { percentile: 50.0, history: 4, max_norm: Some(3.0) }),
        Config::default().clip(Clip::TensorEma { smoothing: 0.9, threshold: 1.05, warmup: 2, max_norm: None }),
        Config::default().clip(Clip::Value { max_abs: 0.3 }),
        Config::default().clip(Clip::global_norm(0.5)).loss_scale(LossScale::dynamic().initial(8.0).growth_interval(2)),
    ];
    let models: Vec<Model> = (0..9)
        .map(|step| {
            let mut model = Model { names: Vec::new(), tensors: Vec::new(), placements: Vec::new(), parts: Vec::new() };
            let mut random = fastrand::Rng::with_seed(7);
            let size = if step == 5 { 20.0 } else { 1.0 + 0.1 * step as f64 };
            for (t, placement) in
                [Placement::Sharded, Placement::Replicated, Placement::Ranks(vec![2])].into_iter().enumerate()
            {
                let tensor = Tensor::of_values(DType::F32, 900, move |i| size * 0.05 * normal(10 * step + t as u64, i));
                // An overflow that one rank alone sees.
                let tensor = if step == 3 && t == 2 { tensor.with(11, f32::INFINITY.to_bits()) } else { tensor };
                model.add(["a", "b", "c"][t], tensor.data(), placement, RANKS, &mut random);
            }
            model
        })
        .collect();
    for config in configs {
        let config = config.rules(Rules::default()).history(20);
        let run = |make: Make, rank: u32, communicator: Option<ThreadCommunicator>| {
            let is_one_of_many = communicator.is_some();
            let of = |model: &Model| if is_one_of_many { model.of_rank(rank) } else { model.tensors.clone() };
            let plan = models[0].plan(&of(&models[0]));
            let config = match communicator {
                Some(communicator) => joined(&config, communicator, &models[0].placements),
                None => config.clone(),
            };
            let mut probe = make(plan, config, rank).unwrap();
            let steps: Vec<Report> =
                models.iter().map(|model| probe.measure_host(&tensors(&of(model))).unwrap()).collect();
            let history = probe.history_report().unwrap();
            (steps, format!("{:?}", history.steps().collect::<Vec<_>>()))
        };
        let whole = run(DEVICES[0], 0, None);
        let all = DEVICES.map(|make| on_ranks(RANKS, |rank, communicator| run(make, rank, Some(communicator))));
        for (rank, (steps, history)) in all.iter().flatten().enumerate() {
            assert!(*history == all[0][0].1, "{config:?}, rank {rank}");
            for ((report, of_first), of_whole) in steps.iter().zip(&all[0][0].0).zip(&whole.0) {
                assert!(bytes_of(report) == bytes_of(of_first), "{config:?}, rank {rank}, step {}", report.step());
                assert_eq!(report.health_words(), of_first.health_words());
                let (seen, expected) = (report.outputs(), of_whole.outputs());
                let near = |a: f64, b: f64| a == b || (a / b - 1.0).abs() < 1e-5 || a.is_nan() && b.is_nan();
                assert!(near(seen.total_norm, expected.total_norm), "{seen:?}, {expected:?}");
                assert!(near(seen.coefficient_f64, expected.coefficient_f64), "{config:?}: {seen:?}, {expected:?}");
                let exact = |o: &StepOutputs| (o.skip, o.action, o.flags, o.next_loss_scale, o.health, o.step);
                assert_eq!(exact(seen), exact(expected), "{config:?}, step {}", report.step());
            }
        }
    }
}

#[test]
fn replicas_that_differ_are_counted_and_found() {
    let plan = || Plan::new([("a", DType::F32, 3), ("b", DType::F32, 2), ("c", DType::F32, 1)]).unwrap();
    let placements = [Placement::Replicated, Placement::Replicated, Placement::Sharded];
    for make in DEVICES {
        let ranks = on_ranks(4, |rank, communicator| {
            let config = Config::default().clip(Clip::global_norm(1.0));
            let mut probe = make(plan(), joined(&config, communicator, &placements), rank).unwrap();
            let mut step = |a: [f32; 3], b: [f32; 2]| {
                let c = [rank as f32];
                let report =
                    probe.measure_host(&[HostTensor::F32(&a), HostTensor::F32(&b), HostTensor::F32(&c)]).unwrap();
                (report, probe.ranks().unwrap().report().unwrap())
            };
            let same = step([1.0, 2.0, 3.0], [0.5, 0.5]);
            // The last bit of one element on one rank; and a NaN on another.
            let last_bit = step([1.0, 2.0, if rank == 2 { 3f32.next_up() } else { 3.0 }], [0.5, 0.5]);
            let nan = step([1.0, 2.0, 3.0], [0.5, if rank == 3 { f32::NAN } else { 0.5 }]);
            let again = step([1.0, 2.0, 3.0], [0.5, 0.5]);
            [same, last_bit, nan, again]
        });
        for (rank, steps) in ranks.iter().enumerate() {
            let outputs = steps.each_ref().map(|(report, _)| *report.outputs());
            assert_eq!(outputs.map(|o| o.differing_replicas), [0, 1, 1, 0], "rank {rank}");
            let clipped = StepOutputs::FLAG_CLIPPED;
            let replicas = StepOutputs::FLAG_REPLICAS;
            let nan = StepOutputs::FLAG_NAN | StepOutputs::FLAG_SKIP | replicas;
            assert_eq!(outputs.map(|o| o.flags), [clipped, clipped | replicas, nan, clipped]);
            // 14 + 0.5 of the replicas, once, and 0 + 1 + 4 + 9 of the shards.
            assert_eq!(outputs[0].total_norm, 28.5f64.sqrt());
            assert_eq!((outputs[1].total_norm, outputs[2].skip, outputs[3].skip), (outputs[0].total_norm, 1, 0));
            let reports = steps.each_ref().map(|(_, report)| report);
            assert_eq!(reports.map(RankReport::ranks), [4; 4]);
            assert_eq!([0, 1, 2].map(|t| reports[1].differing(t)), [vec![2], vec![], vec![]]);
            assert_eq!([0, 1, 2].map(|t| reports[2].differing(t)), [vec![], vec![3], vec![]]);
            assert_eq!([0, 1, 2].map(|t| reports[2].first_nonfinite(t)), [None, Some((3, 1)), None]);
            assert_eq!(reports[0].records(2)[2].max_abs(), Some(2.0));
            assert_eq!(reports[0].weights(0), None);
            let text = "4 ranks\nb: the first NaN or Inf is element 1 of rank 3\nb: replicas differ from that of rank 0 on rank 3\n";
            assert_eq!(reports[2].to_string(), text);
        }
    }
}

/// The first NaN of a sharded tensor is found in the whole and on its rank.
#[test]
fn a_nan_is_found_on_its_rank() {
    let model = {
        let mut model = Model { names: Vec::new(), tensors: Vec::new(), placements: Vec::new(), parts: Vec::new() };
        let mut random = fastrand::Rng::with_seed(3);
        let tensor = Tensor::of_values(DType::BF16, 5000, |i| normal(1, i)).with(4321, 0x7fc0);
        model.add("w", tensor.data(), Placement::Ranks(vec![3, 1, 0]), 4, &mut random);
        model
    };
    let lengths: Vec<u64> = [3, 1].map(|rank: usize| model.parts[0][rank].bits().count() as u64).into();
    for make in DEVICES {
        let found = on_ranks(4, |rank, communicator| {
            let data = model.of_rank(rank);
            let config = joined(&Config::default(), communicator, &model.placements);
            let mut probe = make(model.plan(&data), config, rank).unwrap();
            let report = probe.measure_host(&tensors(&data)).unwrap();
            (report.records()[0].first_nonfinite(), probe.ranks().unwrap().report().unwrap().first_nonfinite(0))
        });
        let before = lengths.iter().scan(0, |sum, len| {
            *sum += len;
            Some(*sum)
        });
        let before: Vec<u64> = [0].into_iter().chain(before).collect();
        let place = before.iter().rposition(|&before| before <= 4321).unwrap();
        let on_its_rank = Some(([3, 1, 0][place], 4321 - before[place]));
        assert_eq!(found, vec![(Some(4321), on_its_rank); 4]);
    }
}

#[test]
fn weights_are_placed_as_their_gradients() {
    let plan =
        || Plan::new([("a", DType::F32, 2), ("b", DType::F32, 1)]).unwrap().with_weights([DType::F32; 2]).unwrap();
    for make in DEVICES {
        let ranks = on_ranks(2, |rank, communicator| {
            let placements = [Placement::Sharded, Placement::Replicated];
            let mut probe = make(plan(), joined(&Config::default(), communicator, &placements), rank).unwrap();
            let (a, w, b) = ([3.0, 0.0], [[30.0f32, 0.0], [0.0, 40.0]][rank as usize], [5.0]);
            let b_weight = [50.0 + rank as f32];
            let tensors = [HostTensor::F32(&a), HostTensor::F32(&b)];
            let weights = [HostTensor::F32(&w), HostTensor::F32(&b_weight)];
            let with = probe.measure_host_with_weights(&tensors, &weights).unwrap();
            let without = probe.measure_host(&tensors).unwrap();
            (with, without, probe.ranks().unwrap().report().unwrap())
        });
        for (with, without, report) in &ranks {
            let norms = |records: &[Record]| records.iter().map(Record::l2_norm).collect::<Vec<_>>();
            assert_eq!(norms(with.records()), [18f64.sqrt(), 5.0]);
            assert_eq!(norms(with.weights().unwrap()), [50.0, 50.0]);
            assert_eq!((with.outputs().differing_replicas, with.outputs().weights), (1, 1));
            assert!(without.weights().is_none());
            assert_eq!((without.outputs().differing_replicas, without.outputs().weights), (0, 0));
            assert_eq!(report.weights(1).unwrap()[1].max_abs(), Some(51.0));
            assert_eq!(report.differing(1), [1]);
        }
    }
}

/// A plan of no tensors, and one in which a rank holds nothing.
#[test]
fn ranks_may_hold_nothing() {
    for make in DEVICES {
        let steps = on_ranks(2, |rank, communicator| {
            let config = joined(&Config::default().clip(Clip::global_norm(1.0)), communicator, &[]);
            let mut probe = make(Plan::new::<String>([]).unwrap(), config, rank).unwrap();
            *probe.measure_host(&[]).unwrap().outputs()
        });
        assert!(steps.iter().all(|outputs| (outputs.total_norm, outputs.coefficient) == (0.0, 1.0)), "{steps:?}");
        let steps = on_ranks(2, |rank, communicator| {
            let data = vec![2.0f32; if rank == 0 { 0 } else { 4 }];
            let plan = Plan::new([("stage", DType::F32, data.len() as u64)]).unwrap();
            let config = Config::default().clip(Clip::global_norm(1.0));
            let mut probe = make(plan, joined(&config, communicator, &[Placement::Ranks(vec![1])]), rank).unwrap();
            let steps = [(); 2].map(|()| probe.measure_host(&[HostTensor::F32(&data)]).unwrap());
            steps.map(|report| (report.outputs().total_norm, report.records()[0].count))
        });
        assert_eq!(steps, [[(4.0, 4); 2]; 2]);
    }
}

/// What a probe without other ranks says when it is asked for them.
const NOT_DECLARED: Error = Error::NotDeclared { declare: "Config::ranks" };

/// Every rank learns who differs and in what, and stays alone.
#[test]
fn ranks_that_mean_something_else_are_named() {
    let base = || vec![("a", DType::F32, 3), ("b", DType::BF16, 2)];
    let sharded = || vec![Placement::Sharded, Placement::Sharded];
    type Rank = (Vec<(&'static str, DType, u64)>, Vec<Placement>, Config, bool);
    let with = |change: &dyn Fn(&mut Rank)| {
        let mut rank = (base(), sharded(), Config::default().clip(Clip::global_norm(1.0)), false);
        change(&mut rank);
        rank
    };
    let other: [(Rank, &str); 7] = [
        (with(&|rank| rank.0[1].0 = "c"), "tensor 1 is planned otherwise than on rank 0; here it is "),
        (with(&|rank| rank.0[1].1 = DType::F16), "tensor 1 is planned otherwise than on rank 0; here it is "),
        (with(&|rank| rank.1[0] = Placement::Replicated), "tensor 0 is planned otherwise than on rank 0; here it is "),
        (
            with(&|rank| rank.1[1] = Placement::Ranks(vec![1])),
            "tensor 1 is planned otherwise than on rank 0; here it is ",
        ),
        (
            with(&|rank| {
                rank.0.push(("c", DType::F32, 1));
                rank.1.push(Placement::Sharded);
            }),
            "3 tensors are planned, on rank 0 there are 2",
        ),
        (
            with(&|rank| rank.2 = Config::default().clip(Clip::global_norm(2.0))),
            "settings are others than on rank 0; here they are ",
        ),
        (with(&|rank| rank.3 = true), "settings are others than on rank 0; here they are "),
    ];
    for make in DEVICES {
        for (odd, message) in &other {
            let errors = on_ranks(3, |rank, communicator| {
                let (tensors, placements, config, weights) = if rank == 2 { odd.clone() } else { with(&|_| ()) };
                let mut plan = Plan::new(tensors.clone()).unwrap();
                if weights {
                    plan = plan.with_weights(tensors.iter().map(|tensor| tensor.1)).unwrap();
                }
                let error = make(plan.clone(), joined(&config, communicator, &placements), rank).unwrap_err();
                // Alone, it measures as ever.
                let mut probe = make(plan.clone(), config, rank).unwrap();
                let data: Vec<Data> = plan.tensors().iter().map(|t| Data::zeros(t.dtype, t.len as usize)).collect();
                let data: Vec<HostTensor> = data.iter().map(Data::tensor).collect();
                assert!(probe.measure_host(&data).is_ok());
                assert_eq!(probe.ranks().map(drop), Err(NOT_DECLARED));
                error
            });
            for error in errors {
                assert!(matches!(&error, Error::RankDiffers { rank: 2, what } if what.starts_with(message)), "{error}");
            }
        }
        // Shards may be of any lengths, replicas not.
        for (placement, refused) in [(Placement::Replicated, true), (Placement::Sharded, false)] {
            let errors = on_ranks(2, |rank, communicator| {
                let plan = Plan::new([("w", DType::F32, 5 + u64::from(rank))]).unwrap();
                make(plan, joined(&Config::default(), communicator, std::slice::from_ref(&placement)), rank).err()
            });
            assert!(errors.iter().all(|error| error.is_some() == refused), "{errors:?}");
            if let Some(Some(error)) = errors.into_iter().find(|error| error.is_some()) {
                let here = ["\"w\": 5 elements of F32, Replicated", "\"w\": 6 elements of F32, Replicated"];
                assert!(here.iter().any(|here| error.to_string().ends_with(here)), "{error}");
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused_before_anyone_waits() {
    let plan = || Plan::new([("w", DType::F32, 1)]).unwrap();
    for make in DEVICES {
        let refused = |config: Config, placements: &[Placement]| {
            // The others never come: an error that does not come before they are asked for would not come at all.
            let alone = ThreadCommunicator::group(3).swap_remove(1);
            make(plan(), joined(&config, alone, placements), 1).unwrap_err().to_string()
        };
        let placed = |ranks: &[u32]| refused(Config::default(), &[Placement::Ranks(ranks.into())]);
        assert_eq!(placed(&[]), "tensor \"w\" cannot be placed on no rank");
        assert_eq!(placed(&[0, 3]), "tensor \"w\" cannot be placed on rank 3 of 3");
        assert_eq!(placed(&[2, 0, 2]), "tensor \"w\" cannot be placed on rank 2 twice");
        assert_eq!(refused(Config::default(), &[]), "the plan has 1 tensors, the step gave 0");
        let quantile = refused(Config::default().clip(Clip::Quantile { quantile: 0.5 }), &[Placement::Sharded]);
        assert!(
            quantile.starts_with("clip must be one that does not look at the elements of other ranks"),
            "{quantile}"
        );
        let mut probe = make(plan(), Config::default(), 0).unwrap();
        assert_eq!(probe.ranks().map(drop), Err(NOT_DECLARED));
        let only = ThreadCommunicator::group(1).swap_remove(0);
        let mut probe = make(plan(), joined(&Config::default(), only, &[Placement::Replicated]), 0).unwrap();
        assert_eq!(probe.ranks().unwrap().report().unwrap_err(), Error::NotMeasured);
    }
}

/// A rank that fails or ends is an error on those that wait for it, and they go on as they were.
#[test]
fn a_rank_that_is_gone_keeps_nobody_waiting() {
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let config = joined(&Config::default(), communicator, &[Placement::Sharded]);
            let mut probe = make(Plan::new([("w", DType::F32, 1)]).unwrap(), config, rank).unwrap();
            let first = probe.measure_host(&[HostTensor::F32(&[3.0])]).unwrap();
            // Rank 1 makes a mistake, and ends.
            let second: &[HostTensor] = if rank == 1 { &[] } else { &[HostTensor::F32(&[3.0])] };
            (first.outputs().total_norm, probe.measure_host(second).unwrap_err())
        });
        for (rank, (norm, error)) in found.into_iter().enumerate() {
            assert_eq!(norm, 27f64.sqrt());
            match error {
                Error::TensorCount { .. } => assert_eq!(rank, 1),
                Error::Communication { what } => assert!(what.ends_with("is gone") && rank != 1, "{what}"),
                other => panic!("{other}"),
            }
        }
    }
}

/// What all ranks gave.
fn gather(end: &ThreadCommunicator, own: &[u8]) -> Result<Vec<u8>, Error> {
    let mut all = vec![0; own.len() * end.ranks() as usize];
    // SAFETY: the tests' own memory, as long as it says, with room for as much from each rank.
    unsafe { end.all_gather(own.as_ptr() as u64, all.as_mut_ptr() as u64, own.len()) }?;
    Ok(all)
}

#[test]
fn parts_of_other_lengths_are_an_error_on_every_rank() {
    let errors = on_ranks(2, |rank, end| gather(&end, &vec![0; 1 + rank as usize]).unwrap_err());
    for error in errors {
        assert_eq!(error.to_string(), "the ranks cannot communicate: rank 1 gave 2 bytes, rank 0 1");
    }
    // And what follows is gathered as ever, in the order of the ranks.
    let all = on_ranks(5, |rank, end| (0..50u8).map(|i| gather(&end, &[rank as u8, i]).unwrap()).collect::<Vec<_>>());
    for rank in all {
        assert!((0..50).all(|i| rank[usize::from(i)] == [0, i, 1, i, 2, i, 3, i, 4, i]));
    }
}
