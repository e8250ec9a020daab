//! Many ranks, as threads: however tensors are spread over them, every rank has the norm of the whole within the bounds, the
//! same bits as every other rank, and the same decision; on the CPU and in the kernels on the host.
#![allow(unsafe_code, reason = "exchanges device memory, which is the host's")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

use crate::common::host::{OnHost, plan_of};
use crate::common::{
    cases::{Data, Tensor, lognormal, normal, random_bits},
    check::{self, Seen},
    demand_none, oracle,
};
use gradprobe::{
    Clip, Config, Cpu, DType, Error, FindingKind, HostTensor, HostTensorMut, Plan, Probe, ProbeState, Record, Report,
    Rules, StepOutputs, Verdict,
    clip::LossScale,
    gsnr::{GsnrConfig, SampleNoise},
    ranks::{
        Along, Communicator, Differing, DifferingReplica, Layout, Mesh, Ranks, Reduction, ReplicaCheck,
        ThreadCommunicator, Transport,
    },
    tensor::Place,
};
use gradprobe_simt::{Schedule, Simt};
use std::{
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

/// Threads whose devices' memory is the host's, of which PTX has to be told what is written.
#[derive(Debug)]
pub struct Told(pub ThreadCommunicator);

// SAFETY: as the one within.
unsafe impl Communicator for Told {
    fn rank(&self) -> u32 {
        Transport::rank(&self.0)
    }

    fn ranks(&self) -> u32 {
        Transport::ranks(&self.0)
    }

    fn check(&self, place: &Place) -> Result<(), Error> {
        self.0.check(place)
    }

    unsafe fn all_gather(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { Communicator::all_gather(&self.0, from, to, bytes) }?;
        gradprobe_simt::ptx::memory::written(to, bytes * Communicator::ranks(self) as usize);
        Ok(())
    }

    unsafe fn all_reduce(&self, at: u64, words: usize, reduction: Reduction) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { Communicator::all_reduce(&self.0, at, words, reduction) }?;
        gradprobe_simt::ptx::memory::written(at, words * size_of::<u64>());
        Ok(())
    }
}

pub type Make = fn(Plan, Config, u32) -> Result<Probe, Error>;
pub const DEVICES: [Make; 2] = [
    |plan, config, _| Probe::new(Cpu, plan, config),
    |plan, config, rank| {
        let device = Simt { schedule: Schedule::Shuffled(rank.into()), blocks: 2, ..Simt::default() };
        Probe::new(device, plan, config)
    },
];

/// What each rank makes of it, in their order.
pub fn on_ranks<T: Send>(ranks: u32, run: impl Fn(u32, Told) -> T + Sync) -> Vec<T> {
    let run = &run;
    thread::scope(|scope| {
        let ends = ThreadCommunicator::group(ranks).into_iter();
        let threads: Vec<_> = ends.map(|end| scope.spawn(move || run(Transport::rank(&end), Told(end)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// One tensor of a model, and what each rank holds of it.
struct Whole {
    name: String,
    data: Data,
    layout: Layout,
    parts: Vec<Option<Data>>,
    /// The last rank that holds each part.
    holders: Vec<u32>,
}

/// A model on a mesh.
struct Model {
    mesh: Mesh,
    tensors: Vec<Whole>,
}

fn part(data: &Data, range: std::ops::Range<usize>) -> Data {
    Data::of_bits(data.dtype(), data.bits().skip(range.start).take(range.len()))
}

impl Model {
    fn empty(dimensions: &[(&str, u32)]) -> Self {
        Self { mesh: Mesh::new(dimensions.iter().copied()).unwrap(), tensors: Vec::new() }
    }

    /// Tensors of all kinds and sizes, laid out and cut by chance.
    fn new(dimensions: &[(&str, u32)], seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut model = Self::empty(dimensions);
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
            let along: Vec<(&str, Along)> = dimensions
                .iter()
                .map(|&(name, length)| {
                    let how = [Along::Replicated, Along::Sharded, Along::At(random.u32(..length))];
                    (name, how[random.usize(..3)])
                })
                .collect();
            model.add(&format!("tensor {t}"), tensor.data(), &along, &mut random);
        }
        model
    }

    fn add(&mut self, name: &str, data: Data, along: &[(&str, Along)], random: &mut fastrand::Rng) {
        let layout = self.mesh.layout(along.iter().copied()).unwrap();
        let lengths = self.mesh.dimensions().to_vec();
        let how: Vec<Along> = lengths
            .iter()
            .map(|(name, _)| along.iter().find(|(other, _)| other == name).map_or(Along::Replicated, |&(_, how)| how))
            .collect();
        let is_sharded = |how: &Along| *how == Along::Sharded;
        let count: u32 =
            how.iter().zip(&lengths).filter(|(how, _)| is_sharded(how)).map(|(_, (_, length))| length).product();
        let len = data.bits().count();
        let mut cuts: Vec<usize> = (1..count).map(|_| random.usize(0..=len)).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        // Where it is at one coordinate, another may hold the same.
        let tied: Vec<u32> = lengths.iter().map(|&(_, length)| random.u32(..length)).collect();
        let mut holders = vec![0; count as usize];
        let parts = (0..self.mesh.ranks()).map(|rank| {
            let coordinates = self.mesh.coordinates(rank);
            let mut at = 0;
            let mut is_there = true;
            for (dimension, how) in how.iter().enumerate() {
                match how {
                    Along::Sharded => at = at * lengths[dimension].1 + coordinates[dimension],
                    Along::At(owner) => is_there &= [*owner, tied[dimension]].contains(&coordinates[dimension]),
                    _ => {}
                }
            }
            is_there.then(|| {
                holders[at as usize] = rank;
                part(&data, cuts[at as usize]..cuts[at as usize + 1])
            })
        });
        let parts = parts.collect();
        self.tensors.push(Whole { name: name.to_owned(), data, layout, parts, holders });
    }

    /// The tensors of which a rank holds something; in another order on each.
    fn of_rank(&self, rank: u32) -> Vec<&Whole> {
        let mut held: Vec<&Whole> = self.tensors.iter().filter(|whole| whole.parts[rank as usize].is_some()).collect();
        let by = rank as usize % held.len().max(1);
        held.rotate_left(by);
        held
    }

    fn data(&self, rank: u32) -> Vec<Data> {
        self.of_rank(rank).into_iter().filter_map(|whole| whole.parts[rank as usize].clone()).collect()
    }

    fn plan(&self, rank: u32) -> Plan {
        let held = self.of_rank(rank);
        let data = self.data(rank);
        plan_of(held.iter().map(|whole| whole.name.clone()).zip(data.iter().map(Data::tensor))).unwrap()
    }

    fn ranks(&self, communicator: Told) -> Ranks {
        let layouts: Vec<Layout> =
            self.of_rank(Communicator::rank(&communicator)).into_iter().map(|whole| whole.layout.clone()).collect();
        Ranks::new(communicator, &self.mesh, layouts)
    }

    fn truths(&self, config: &Config) -> Vec<oracle::Truth> {
        let of = |whole: &Whole| oracle::truth(whole.data.dtype(), config.dead_threshold, whole.data.bits());
        self.tensors.iter().map(of).collect()
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
fn step(model: &Model, make: Make, config: &Config, whole_tensors: bool) -> Vec<(Report, Vec<Data>)> {
    on_ranks(model.mesh.ranks(), |rank, communicator| {
        let mut data = model.data(rank);
        let ranks = model.ranks(communicator);
        let ranks = if whole_tensors { ranks.whole_tensors() } else { ranks };
        let mut probe = make(model.plan(rank), config.clone().ranks(ranks), rank).unwrap();
        let report = probe.measure_host(&tensors(&data)).unwrap();
        probe.clip_host(&mut tensors_mut(&mut data)).unwrap();
        (report, data)
    })
}

const MESHES: [&[(&str, u32)]; 7] = [
    &[("dp", 1)],
    &[("dp", 2)],
    &[("dp", 3)],
    &[("dp", 2), ("tp", 2)],
    &[("pp", 2), ("dp", 1), ("tp", 3)],
    &[("a", 2), ("b", 2), ("c", 2)],
    &[("dp", 5)],
];

#[test]
fn any_layout_gives_the_whole_to_every_rank() {
    let mut complaints = Vec::new();
    for (mesh, seed) in MESHES.into_iter().cycle().zip(0..14) {
        let model = Model::new(mesh, seed);
        let config = Config::default().clip(Clip::global_norm(0.7));
        let truths = model.truths(&config);
        for whole_tensors in [false, true] {
            let place = format!("{mesh:?}, seed {seed}, whole tensors {whole_tensors}");
            let [on_cpu, on_simt] = DEVICES.map(|make| step(&model, make, &config, whole_tensors));
            let outputs = *on_cpu[0].0.outputs();
            for (rank, ((report, left), (of_kernels, left_by_kernels))) in on_cpu.iter().zip(&on_simt).enumerate() {
                if bytes_of(of_kernels) != bytes_of(report) {
                    complaints.push(format!("{place}: the kernels on rank {rank} have other bits"));
                }
                if bytemuck::bytes_of(report.outputs()) != bytemuck::bytes_of(&outputs) {
                    complaints.push(format!("{place}: rank {rank} has {:?} and not {outputs:?}", report.outputs()));
                }
                let check = report.rank_check().unwrap();
                if check.replicas.is_some() || check.state.is_some() {
                    complaints.push(format!("{place}: rank {rank} says {check}"));
                }
                let bytes = |data: &[Data]| data.iter().flat_map(|data| data.bytes().to_vec()).collect::<Vec<_>>();
                if bytes(left) != bytes(left_by_kernels) {
                    complaints.push(format!("{place}: rank {rank} clips otherwise"));
                }
            }
            // Against the exact statistics of the whole.
            complaints.extend(check::check_outputs(&outputs, 1, &truths, &config));
            for (rank, (report, _)) in (0..).zip(&on_cpu).filter(|_| whole_tensors) {
                for (whole, record) in model.of_rank(rank).into_iter().zip(report.records()) {
                    let index = model.tensors.iter().position(|other| other.name == whole.name).unwrap();
                    complaints.extend(check::check_tensor(&whole.name, &Seen::of(record), &truths[index]));
                }
            }
            // And what is left is the whole, clipped.
            let all: Vec<Data> = model.tensors.iter().map(|whole| whole.data.clone()).collect();
            let clipped = crate::common::clip_by_oracle(&all, &outputs);
            for (whole, clipped) in model.tensors.iter().zip(&clipped) {
                let mut left = Vec::new();
                for &rank in &whole.holders {
                    let index = model.of_rank(rank).iter().position(|other| other.name == whole.name).unwrap();
                    left.extend(on_cpu[rank as usize].1[index].bits());
                }
                if left != clipped.bits().collect::<Vec<_>>() {
                    complaints.push(format!("{place}, {}: the clipped parts are not the clipped tensor", whole.name));
                }
            }
        }
    }
    demand_none(&complaints);
}

/// Whole tensors, and shards cut between chunks, have the norm that one probe has of all, to the bit.
#[test]
fn the_norm_is_that_of_one_rank_to_the_bit() {
    const CHUNK: usize = 32 * 1024;
    let lengths = [5 * CHUNK + 77, 3 * CHUNK, 12, 2 * CHUNK + 1];
    let all: Vec<Data> = lengths
        .iter()
        .enumerate()
        .map(|(t, &len)| {
            let key = t as u64;
            Tensor::of_values(DType::ALL[t % 3], len, move |i| lognormal(key, i, 2.0)).data()
        })
        .collect();
    let name = |t: usize| format!("t{t}");
    let plan = plan_of((0..).map(name).zip(all.iter().map(Data::tensor))).unwrap();
    let config = Config::default().clip(Clip::global_norm(1.0));
    let alone = *Probe::new(Cpu, plan, config.clone()).unwrap().measure_host(&tensors(&all)).unwrap().outputs();
    for make in DEVICES {
        for ranks in [1, 2, 3, 8] {
            let mesh = Mesh::new([("dp", ranks)]).unwrap();
            let outputs = on_ranks(ranks, |rank, communicator| {
                // Chunk by chunk, as many to each rank as it takes; the last tensor is on the last rank alone.
                let cut = |len: usize, rank: u32| {
                    len.min(len.div_ceil(CHUNK).div_ceil(ranks as usize) * rank as usize * CHUNK)
                };
                let mut parts = Vec::new();
                let mut layouts = Vec::new();
                for (t, data) in all.iter().enumerate() {
                    let is_whole = t + 1 == all.len();
                    if is_whole && rank + 1 < ranks {
                        continue;
                    }
                    let len = lengths[t];
                    let range = if is_whole { 0..len } else { cut(len, rank)..cut(len, rank + 1) };
                    let how = if is_whole { Along::At(ranks - 1) } else { Along::Sharded };
                    layouts.push(
                        mesh.layout([("dp", how)]).unwrap().part(range.start as u64..range.end as u64, len as u64),
                    );
                    parts.push((name(t), part(data, range)));
                }
                let plan = plan_of(parts.iter().map(|(name, data)| (name.clone(), data.tensor()))).unwrap();
                let ranks = Ranks::new(communicator, &mesh, layouts);
                let mut probe = make(plan, config.clone().ranks(ranks), rank).unwrap();
                let parts: Vec<HostTensor> = parts.iter().map(|(_, data)| data.tensor()).collect();
                *probe.measure_host(&parts).unwrap().outputs()
            });
            for of_rank in outputs {
                assert_eq!(bytemuck::bytes_of(&of_rank), bytemuck::bytes_of(&alone), "{ranks} ranks");
            }
        }
    }
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
        Config::default().clip(Clip::Quantile { quantile: 0.9 }),
        Config::default().clip(Clip::global_norm(0.5)).loss_scale(LossScale::dynamic().initial(8.0).growth_interval(2)),
    ];
    let models: Vec<Model> = (0..9)
        .map(|step| {
            let mut model = Model::empty(&[("dp", RANKS)]);
            let mut random = fastrand::Rng::with_seed(7);
            let size = if step == 5 { 20.0 } else { 1.0 + 0.1 * step as f64 };
            for (t, how) in [Along::Sharded, Along::Replicated, Along::Sharded].into_iter().enumerate() {
                let tensor = Tensor::of_values(DType::F32, 900, move |i| size * 0.05 * normal(10 * step + t as u64, i));
                // An overflow that one rank alone sees.
                let tensor = if step == 3 && t == 2 { tensor.with(11, f32::INFINITY.to_bits()) } else { tensor };
                model.add(["a", "b", "c"][t], tensor.data(), &[("dp", how)], &mut random);
            }
            model
        })
        .collect();
    for config in configs {
        let config = config.rules(Rules::default()).history(20);
        let run = |make: Make, rank: u32, communicator: Option<Told>| {
            let (plan, config, data): (Plan, Config, Vec<Vec<Data>>) = match communicator {
                Some(communicator) => {
                    let ranks = models[0].ranks(communicator).whole_tensors();
                    let data = models.iter().map(|model| model.data(rank)).collect();
                    (models[0].plan(rank), config.clone().ranks(ranks), data)
                }
                None => {
                    let of = |model: &Model| model.tensors.iter().map(|whole| whole.data.clone()).collect();
                    let data: Vec<Vec<Data>> = models.iter().map(of).collect();
                    let names = models[0].tensors.iter().map(|whole| whole.name.clone());
                    (plan_of(names.zip(data[0].iter().map(Data::tensor))).unwrap(), config.clone(), data)
                }
            };
            let mut probe = make(plan, config, rank).unwrap();
            let steps: Vec<Report> = data.iter().map(|data| probe.measure_host(&tensors(data)).unwrap()).collect();
            let history = probe.history_report().unwrap();
            (steps, format!("{:?}", history.steps().map(|(step, _)| step.outputs).collect::<Vec<_>>()))
        };
        let whole = run(DEVICES[0], 0, None);
        let all = DEVICES.map(|make| on_ranks(RANKS, |rank, communicator| run(make, rank, Some(communicator))));
        for (rank, (steps, history)) in all.iter().flatten().enumerate() {
            assert!(*history == all[0][0].1, "{config:?}, rank {rank}");
            for ((report, of_first), of_whole) in steps.iter().zip(&all[0][0].0).zip(&whole.0) {
                let bytes = |report: &Report| bytemuck::bytes_of(report.outputs()).to_vec();
                assert!(bytes(report) == bytes(of_first), "{config:?}, rank {rank}, step {}", report.step());
                let words = |report: &Report| {
                    let mut words = report.health_words().unwrap().to_vec();
                    words.rotate_right(rank % RANKS as usize % 3);
                    words
                };
                assert_eq!(words(report), of_first.health_words().unwrap());
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

/// A plan of two replicas and a shard, on four ranks.
fn replicated_and_sharded(communicator: Told, check: ReplicaCheck) -> (Plan, Ranks) {
    let mesh = Mesh::new([("dp", 4)]).unwrap();
    let [replica, shard] = [Along::Replicated, Along::Sharded].map(|how| mesh.layout([("dp", how)]).unwrap());
    let plan = Plan::new([("a", DType::F32, 3), ("b", DType::F32, 2), ("c", DType::F32, 1)]).unwrap();
    (plan, Ranks::new(communicator, &mesh, [replica.clone(), replica, shard]).replica_check(check))
}

#[test]
fn replicas_that_differ_are_found_and_named() {
    for (make, check) in DEVICES
        .into_iter()
        .flat_map(|make| [ReplicaCheck::Reported, ReplicaCheck::Strict, ReplicaCheck::Off].map(|check| (make, check)))
    {
        let ranks = on_ranks(4, |rank, communicator| {
            let (plan, ranks) = replicated_and_sharded(communicator, check);
            let config = Config::default().clip(Clip::global_norm(1.0)).ranks(ranks);
            let mut probe = make(plan, config, rank).unwrap();
            let mut step = |a: [f32; 3], b: [f32; 2]| {
                let c = [rank as f32];
                let tensors = [HostTensor::F32(&a), HostTensor::F32(&b), HostTensor::F32(&c)];
                let report = probe.measure_host(&tensors).unwrap();
                (report, probe.ranks().unwrap().differing_replicas())
            };
            let same = step([1.0, 2.0, 3.0], [0.5, 0.5]);
            // The last bit of one element on one rank; a NaN on another; and two tensors, on three ranks.
            let last_bit = step([1.0, 2.0, if rank == 2 { 3f32.next_up() } else { 3.0 }], [0.5, 0.5]);
            let nan = step([1.0, 2.0, 3.0], [0.5, if rank == 3 { f32::NAN } else { 0.5 }]);
            let several = step([1.0 + rank as f32 / 2.0, 2.0, 3.0], [if rank == 1 { 7.0 } else { 0.5 }, 0.5]);
            let again = step([1.0, 2.0, 3.0], [0.5, 0.5]);
            [same, last_bit, nan, several, again]
        });
        for (rank, steps) in ranks.iter().enumerate() {
            let outputs = steps.each_ref().map(|(report, _)| *report.outputs());
            let bits = |flag: u32| outputs.map(|outputs| u32::from(outputs.flags & flag != 0));
            let is_compared = u32::from(check != ReplicaCheck::Off);
            let is_strict = u32::from(check == ReplicaCheck::Strict);
            let differ = [0, is_compared, is_compared, is_compared, 0];
            assert_eq!(bits(StepOutputs::FLAG_REPLICAS), differ, "rank {rank}");
            assert_eq!(bits(StepOutputs::FLAG_STATE), [0; 5]);
            // The NaN is on a replica that counts nowhere: it is in no norm, and the step is skipped on all ranks.
            assert_eq!(outputs.map(|outputs| outputs.skip.cast_unsigned()), [0, is_strict, 1, is_strict, 0]);
            assert!(outputs.iter().all(|outputs| (outputs.found_inf == 1.0) == (outputs.skip == 1)));
            // 14 + 0.5 of the replicas, once, and 0 + 1 + 4 + 9 of the shards.
            assert_eq!(outputs[0].total_norm, 28.5f64.sqrt());
            assert_eq!(outputs[1].total_norm, outputs[0].total_norm);
            if check == ReplicaCheck::Off {
                assert_eq!(steps[1].1, Err(Error::NotDeclared { declare: "Ranks::replica_check" }));
                continue;
            }
            let found = steps.each_ref().map(|(report, _)| report.rank_check().unwrap().replicas.clone());
            let named = |rank, tensor: &str| {
                Some(Differing { ranks: vec![rank], tensor: Some(tensor.to_owned()), is_weight: false })
            };
            let expected = [None, named(2, "a"), named(3, "b"), Some(Differing::default()), None];
            assert_eq!(found, expected, "rank {rank}");
            let all = steps.each_ref().map(|(_, differing)| differing.clone().unwrap());
            let of = |tensor, ranks: &[u32]| DifferingReplica { tensor, is_weight: false, ranks: ranks.to_vec() };
            let expected =
                [vec![], vec![of(0, &[2])], vec![of(1, &[3])], vec![of(0, &[0, 1, 2, 3]), of(1, &[1])], vec![]];
            assert_eq!(all, expected);
            let text = steps[1].0.to_string();
            assert!(text.contains("replicas differ in step 2 on rank 2, in a\n"), "{text}");
        }
    }
}

/// Groups of as many ranks do not take each other's for their own.
#[test]
fn a_rank_of_another_group_is_not_named() {
    for make in DEVICES {
        let found = on_ranks(8, |rank, communicator| {
            let mesh = Mesh::new([("replicate", 4), ("shard", 2)]).unwrap();
            let sharded = mesh.layout([("shard", Along::Sharded)]).unwrap();
            let config = Config::default().ranks(Ranks::alike(communicator, &mesh, sharded));
            let mut probe = make(Plan::new([("w", DType::F32, 3)]).unwrap(), config, rank).unwrap();
            let odd = if rank == 2 { 1f32.next_up() } else { 1.0 };
            let report = probe.measure_host(&[HostTensor::F32(&[odd, 2.0, (rank % 2) as f32])]).unwrap();
            let differing = probe.ranks().unwrap().differing_replicas().unwrap();
            (report.rank_check().unwrap().replicas.clone().unwrap(), differing)
        });
        for (rank, (named, differing)) in found.into_iter().enumerate() {
            let own = Differing { ranks: vec![2], tensor: Some("w".to_owned()), is_weight: false };
            assert_eq!(named, if rank % 2 == 0 { own } else { Differing::default() }, "rank {rank}");
            let own = DifferingReplica { tensor: 0, is_weight: false, ranks: vec![2] };
            assert_eq!(differing, if rank % 2 == 0 { vec![own] } else { vec![] }, "rank {rank}");
        }
    }
}

/// What other ranks have alone is known to all, where whole tensors are asked for.
#[test]
fn every_rank_can_have_the_records_of_the_model() {
    for make in DEVICES {
        let seen = on_ranks(2, |rank, communicator| {
            let mesh = Mesh::new([("pp", 2)]).unwrap();
            let (name, own) = [("first", 1.0f32), ("last stage", 3.0)][rank as usize];
            let layouts = [Along::At(rank), Along::Sharded].map(|how| mesh.layout([("pp", how)]).unwrap());
            let ranks = Ranks::new(communicator, &mesh, layouts).whole_tensors();
            let plan = Plan::new([(name, DType::F32, 2), ("both", DType::F32, 1)]).unwrap();
            let mut probe = make(plan, Config::default().ranks(ranks), rank).unwrap();
            assert_eq!(probe.ranks().unwrap().model(), Err(Error::NotMeasured));
            probe.measure_host(&[HostTensor::F32(&[own, -own]), HostTensor::F32(&[own])]).unwrap();
            let mut model = probe.ranks().unwrap().model().unwrap();
            model.sort_by(|a, b| a.0.cmp(&b.0));
            model.into_iter().map(|(name, record)| (name, record.count, record.max_abs().unwrap())).collect::<Vec<_>>()
        });
        let expected = [("both", 2, 3.0f32), ("first", 2, 1.0), ("last stage", 2, 3.0)];
        let expected: Vec<_> = expected.map(|(name, count, max)| (name.to_owned(), count, max)).into();
        assert!(seen.iter().all(|seen| *seen == expected), "{seen:?}");
    }
}

/// Parts of no elements have no record of their own in any step, though they have that of the whole.
#[test]
fn empty_parts_add_nothing_to_the_whole() {
    for make in DEVICES {
        let norms = on_ranks(3, |rank, communicator| {
            let mesh = Mesh::new([("dp", 3)]).unwrap();
            let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
            let config = Config::default().ranks(Ranks::alike(communicator, &mesh, sharded).whole_tensors());
            let len = if rank == 1 { 2 } else { 0 };
            let mut probe = make(Plan::new([("w", DType::F32, len as u64)]).unwrap(), config, rank).unwrap();
            [1.0f32, 2.0, 3.0].map(|x| {
                let report = probe.measure_host(&[HostTensor::F32(&[3.0 * x, 4.0 * x][..len])]).unwrap();
                (report.records()[0].count, report.records()[0].l2_norm(), report.outputs().total_norm)
            })
        });
        assert!(norms.iter().all(|norms| *norms == [(2, 5.0, 5.0), (2, 10.0, 10.0), (2, 15.0, 15.0)]), "{norms:?}");
    }
}

/// A clip at a quantile is at that of all elements, each of which counts once.
#[test]
fn a_quantile_is_that_of_all_ranks() {
    let config = || Config::default().clip(Clip::Quantile { quantile: 0.7 });
    let data = |key: u64| Tensor::of_values(DType::F32, 600, move |i| lognormal(key, i, 1.0)).data();
    let mut whole = [data(1), data(2)];
    let plan = |data: &[Data]| plan_of(["a", "b"].into_iter().zip(data.iter().map(Data::tensor))).unwrap();
    let mut alone = Probe::new(Cpu, plan(&whole), config()).unwrap();
    alone.measure_host(&tensors(&whole)).unwrap();
    alone.clip_host(&mut tensors_mut(&mut whole)).unwrap();
    for make in DEVICES {
        let parts = on_ranks(3, |rank, communicator| {
            let mesh = Mesh::new([("dp", 3)]).unwrap();
            let layouts = [Along::Sharded, Along::Replicated].map(|how| mesh.layout([("dp", how)]).unwrap());
            let first = 200 * rank as usize;
            let mut own = [part(&data(1), first..first + 200), data(2)];
            let mut probe = make(plan(&own), config().ranks(Ranks::new(communicator, &mesh, layouts)), rank).unwrap();
            probe.measure_host(&tensors(&own)).unwrap();
            probe.clip_host(&mut tensors_mut(&mut own)).unwrap();
            own
        });
        let of_all: Vec<u32> = parts.iter().flat_map(|[part, _]| part.bits()).collect();
        assert!(of_all == whole[0].bits().collect::<Vec<_>>());
        assert!(parts.iter().all(|[_, replica]| replica.bytes() == whole[1].bytes()));
    }
}

/// Where nobody has to be waited for, the word of a step comes with the next.
#[test]
fn plain_data_parallelism_hears_a_step_later() {
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let plan = Plan::new([("w", DType::BF16, 40_000)]).unwrap();
            let mut probe = make(plan, Config::default().ranks(Ranks::data_parallel(communicator)), rank).unwrap();
            let steps = [0, 1, 2, 3].map(|step| {
                let data = Tensor::of_values(DType::BF16, 40_000, |i| normal(5, i)).data();
                let mut bits: Vec<u32> = data.bits().collect();
                if step == 1 && rank == 1 {
                    bits[35_000] ^= 1;
                }
                let data = Data::of_bits(DType::BF16, bits.into_iter());
                let report = probe.measure_host(&tensors(std::slice::from_ref(&data))).unwrap();
                (report.outputs().flags, report.rank_check().unwrap().clone())
            });
            steps.map(|(flags, check)| (flags & StepOutputs::FLAG_REPLICAS, check.step, check.replicas))
        });
        let one = Some(Differing { ranks: vec![1], tensor: Some("w".to_owned()), is_weight: false });
        let expected = [(0, 0, None), (0, 1, None), (StepOutputs::FLAG_REPLICAS, 2, one), (0, 3, None)];
        assert!(found.iter().all(|steps| *steps == expected), "{found:?}");
    }
}

/// One flipped bit of 32768 normal numbers, wherever it is, is found and named; and nothing is found where there is none.
#[test]
fn a_flipped_bit_is_found_every_time() {
    let tries = if std::env::var_os("GRADPROBE_SHORT").is_some() { 100 } else { 1000 };
    let found = on_ranks(3, |rank, communicator| {
        let plan = Plan::new([("w", DType::F32, 32_768)]).unwrap();
        let mut random = fastrand::Rng::with_seed(9);
        let mut numbers: Vec<f32> = (0..32_768).map(|i| normal(1, i) as f32).collect();
        let ranks = Ranks::data_parallel(communicator).replica_check(ReplicaCheck::Strict);
        let mut probe = Probe::new(Cpu, plan, Config::default().ranks(ranks)).unwrap();
        let mut found = 0;
        for _ in 0..tries {
            let (at, bit, odd) = (random.usize(..numbers.len()), random.u32(..32), random.u32(..3));
            let before = numbers[at];
            if odd == rank {
                numbers[at] = f32::from_bits(before.to_bits() ^ 1 << bit);
            }
            let report = probe.measure_host(&[HostTensor::F32(&numbers)]).unwrap();
            let replicas = report.rank_check().unwrap().replicas.clone();
            found += u32::from(replicas.is_some_and(|replicas| replicas.ranks == [odd] && report.outputs().skip == 1));
            numbers[at] = before;
            let report = probe.measure_host(&[HostTensor::F32(&numbers)]).unwrap();
            assert_eq!((report.rank_check().unwrap().replicas.clone(), report.outputs().skip), (None, 0));
        }
        found
    });
    assert_eq!(found, [tries; 3]);
}

/// A rank that comes to a step with another state is named on all.
#[test]
fn another_state_is_named() {
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let plan = Plan::new([("w", DType::F32, 2)]).unwrap();
            let mesh = Mesh::new([("dp", 3)]).unwrap();
            let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
            let ranks = Ranks::alike(communicator, &mesh, sharded).replica_check(ReplicaCheck::Strict);
            let config = Config::default().clip(Clip::global_norm(1.0)).loss_scale(LossScale::dynamic().initial(8.0));
            let mut probe = make(plan, config.ranks(ranks), rank).unwrap();
            let mut step = |scale: f32| {
                let address = probe.addresses().loss_scale.unwrap();
                // SAFETY: the probe's f32, in the memory of the host, while nothing runs.
                unsafe { *(address as *mut f32) = scale };
                gradprobe_simt::ptx::memory::written(address, 4);
                let report = probe.measure_host(&[HostTensor::F32(&[1.0, 2.0])]).unwrap();
                (report.outputs().flags, report.outputs().skip, report.rank_check().unwrap().state.clone())
            };
            [step(8.0), step(if rank == 2 { 4.0 } else { 8.0 }), step(8.0)]
        });
        for steps in found {
            let (bits, skip) = (StepOutputs::FLAG_STATE | StepOutputs::FLAG_SKIP, 1);
            let state = Some(Differing { ranks: vec![2], ..Differing::default() });
            assert_eq!((steps[1].0 & bits, steps[1].1, &steps[1].2), (bits, skip, &state));
            for of_step in [&steps[0], &steps[2]] {
                assert_eq!((of_step.0 & bits, of_step.1, &of_step.2), (0, 0, &None));
            }
        }
    }
}

/// A run that is interrupted and goes on, on as many ranks as there are then, decides as one that was not.
#[test]
fn a_run_goes_on_on_other_ranks() {
    let config = || {
        Config::default()
            .clip(Clip::Percentile { percentile: 50.0, history: 4, max_norm: Some(3.0) })
            .loss_scale(LossScale::dynamic().initial(8.0).growth_interval(3))
    };
    let whole =
        |step: u64| -> Vec<f32> { (0..12).map(|i| (1.0 + step as f32).sqrt() * normal(step, i) as f32).collect() };
    // Steps on so many ranks, from a state on.
    let run = |make: Make, ranks: u32, steps: std::ops::Range<u64>, from: Option<&ProbeState>| {
        let mesh = Mesh::new([("dp", ranks)]).unwrap();
        let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
        let mut all = on_ranks(ranks, |rank, communicator| {
            let len = 12 / ranks as usize;
            let plan = Plan::new([("w", DType::F32, len as u64)]).unwrap();
            let ranks = Ranks::alike(communicator, &mesh, sharded.clone());
            let mut probe = make(plan, config().ranks(ranks), rank).unwrap();
            assert_eq!(probe.state().unwrap().step, 0);
            if let Some(state) = from {
                probe.restore(state).unwrap();
                assert_eq!(probe.state().as_ref(), Ok(state));
            }
            let outputs: Vec<StepOutputs> = steps
                .clone()
                .map(|step| {
                    let part = &whole(step)[rank as usize * len..][..len];
                    *probe.measure_host(&[HostTensor::F32(part)]).unwrap().outputs()
                })
                .collect();
            (outputs, probe.state().unwrap())
        });
        assert!(all.iter().all(|of_rank| *of_rank == all[0]));
        all.swap_remove(0)
    };
    for make in DEVICES {
        let (at_once, last) = run(make, 2, 0..9, None);
        let (first, state) = run(make, 2, 0..5, None);
        let (second, of_other) = run(make, 3, 5..9, Some(&state));
        assert_eq!((state.step, last.step, of_other.step), (5, 9, 9));
        for (seen, expected) in [first, second].concat().iter().zip(&at_once) {
            let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-6;
            assert!(near(seen.total_norm, expected.total_norm) && near(seen.coefficient_f64, expected.coefficient_f64));
            let exact = |o: &StepOutputs| (o.step, o.flags, o.skip, o.loss_scale, o.next_loss_scale);
            assert_eq!(exact(seen), exact(expected));
        }
        let plan = || Plan::new([("w", DType::F32, 1)]).unwrap();
        let mut other = make(plan(), Config::default(), 0).unwrap();
        assert!(matches!(other.restore(&state), Err(Error::InvalidConfig { option: "state", .. })));
    }
}

/// One that is not restored as the others are is named in the first step.
#[test]
fn a_rank_that_is_restored_otherwise_is_named() {
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let mesh = Mesh::new([("dp", 3)]).unwrap();
            let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
            let config = Config::default().rules(Rules::default()).ranks(Ranks::alike(communicator, &mesh, sharded));
            let mut probe = make(Plan::new([("w", DType::F32, 1)]).unwrap(), config, rank).unwrap();
            let mut state = probe.state().unwrap();
            state.step = if rank == 1 { 41 } else { 40 };
            probe.restore(&state).unwrap();
            let report = probe.measure_host(&[HostTensor::F32(&[1.0])]).unwrap();
            let diagnosis = report.diagnosis().unwrap();
            let finding = diagnosis.findings().iter().find(|found| found.kind == FindingKind::RanksDiffer).unwrap();
            assert_eq!(diagnosis.verdict(), Verdict::Critical);
            (report.rank_check().unwrap().state.clone(), finding.message.clone())
        });
        for (rank, (state, message)) in found.into_iter().enumerate() {
            assert_eq!(state, Some(Differing { ranks: vec![1], ..Differing::default() }));
            let step = if rank == 1 { 42 } else { 41 };
            assert_eq!(message, format!("the state differs in step {step} on rank 1"));
        }
    }
}

/// A rank that leaves a step out has the gradients of the next: its replicas are others, and at the end it is missed.
#[test]
fn a_rank_that_skips_a_step_is_named() {
    let found = on_ranks(3, |rank, communicator| {
        let Told(communicator) = communicator;
        let communicator = communicator.with_deadline(Duration::from_millis(300));
        let plan = Plan::new([("w", DType::F32, 8)]).unwrap();
        let ranks = Ranks::data_parallel(communicator).replica_check(ReplicaCheck::Strict);
        let mut probe = Probe::new(Cpu, plan, Config::default().ranks(ranks)).unwrap();
        let mut named = Vec::new();
        for step in (0..4u16).filter(|&step| rank != 2 || step != 1) {
            let gradient = [f32::from(step) + 0.5; 8];
            match probe.measure(&[&gradient]) {
                Ok(()) => named.extend(probe.wait().unwrap().rank_check().unwrap().replicas.clone()),
                Err(error) => return (named, Some(error.to_string())),
            }
        }
        // It goes on with something else.
        std::thread::sleep(Duration::from_secs(2));
        (named, None)
    });
    let odd = Differing { ranks: vec![2], tensor: Some("w".to_owned()), is_weight: false };
    let late = "the ranks cannot communicate: rank 2 has not come within 300ms".to_owned();
    let late_too = Some(late);
    assert_eq!(found[2], (vec![odd.clone(); 2], None));
    assert_eq!(found[..2], [(vec![odd.clone(); 2], late_too.clone()), (vec![odd; 2], late_too)]);
}

/// The noise scale of samples with a known one, from norms before and after the mean over ranks.
#[test]
fn the_noise_scale_comes_of_samples_and_their_mean() {
    const LEN: usize = 4000;
    let all = on_ranks(4, |rank, communicator| {
        let mesh = Mesh::new([("dp", 2), ("tp", 2)]).unwrap();
        // A matrix that is cut, and a bias on both.
        let layouts = [mesh.layout([("tp", Along::Sharded)]).unwrap(), mesh.layout([]).unwrap()];
        let plan = Plan::new([("w", DType::F32, LEN as u64), ("b", DType::F32, 10)]).unwrap();
        let config = Config::default().micro_batches(2).ranks(Ranks::new(communicator, &mesh, layouts));
        let mut probe = Probe::new(Cpu, plan, config).unwrap();
        let [dp, tp] = mesh.coordinates(rank)[..] else { unreachable!() };
        // Of mean 0.5 and variance 4 each: |G|² = 0.25 · 8010, tr Σ = 4 · 8010.
        let sample = |step: u64, sample: u32, of: u32, len: usize| -> Vec<f32> {
            let key = step * 100 + u64::from(sample * 10 + of);
            (0..len).map(|i| (0.5 + 2.0 * normal(key, i)) as f32).collect()
        };
        let mut noise = SampleNoise::new();
        let mut seen = Vec::new();
        for step in 0..20 {
            for micro in 0..2 {
                let (w, b) = (sample(step, 2 * dp + micro, tp, LEN), sample(step, 2 * dp + micro, 5, 10));
                probe.micro_batches().unwrap().measure(&[&w, &b]).unwrap();
            }
            let mean = |of: u32, len: usize| -> Vec<f32> {
                let samples: Vec<Vec<f32>> = (0..4).map(|index| sample(step, index, of, len)).collect();
                (0..len).map(|i| samples.iter().map(|sample| sample[i]).sum::<f32>() / 4.0).collect()
            };
            probe.measure(&[&mean(tp, LEN), &mean(5, 10)]).unwrap();
            let samples = probe.micro_batches().unwrap().report().unwrap();
            let report = probe.wait().unwrap();
            let squares = probe.ranks().unwrap().sample_squares(&samples, &["dp"]).unwrap();
            assert_eq!(squares.samples, 4);
            noise.add(&squares, &report);
            seen.push(squares.mean.to_bits());
            let mut refused = |data: &[&str]| probe.ranks().unwrap().sample_squares(&samples, data).unwrap_err();
            assert!(matches!(refused(&["pp"]), Error::InvalidConfig { option: "data", .. }));
            assert!(matches!(refused(&["tp"]), Error::InvalidConfig { option: "data", .. }));
        }
        (noise.estimate(), seen)
    });
    for (estimate, seen) in &all {
        assert_eq!(*seen, all[0].1);
        let (signal, variance) = (estimate.squared_gradient.unwrap(), estimate.sum_variance.unwrap());
        let elements = 2.0 * LEN as f64 + 10.0;
        assert!((signal.value / (0.25 * elements) - 1.0).abs() < 0.05, "{signal:?}");
        assert!((variance.value / (4.0 * elements) - 1.0).abs() < 0.02, "{variance:?}");
        assert!((estimate.noise_scale.value().unwrap() / 16.0 - 1.0).abs() < 0.06);
    }
}

/// Histograms, and signal over noise, of parts make up those of the whole.
#[test]
fn what_is_asked_for_is_that_of_the_whole() {
    let whole = |step: u64| Tensor::of_values(DType::F32, 9000, move |i| 0.3 + normal(step, i)).data();
    let bias = |step: u64| Tensor::of_values(DType::BF16, 30, move |i| normal(77 + step, i)).data();
    let features = |config: Config| config.histogram().tracking(GsnrConfig::new());
    let seen = |probe: &mut Probe, data: &dyn Fn(u64) -> [Data; 2]| {
        for step in 0..4 {
            probe.measure_host(&tensors(&data(step))).unwrap();
        }
        let last = data(4);
        (probe.histogram_host(&tensors(&last)).unwrap(), probe.gsnr_report().unwrap())
    };
    let names = ["w", "b"];
    let plan = |data: &[Data; 2]| plan_of(names.into_iter().zip(data.iter().map(Data::tensor))).unwrap();
    let all = |step| [whole(step), bias(step)];
    let alone = seen(&mut Probe::new(Cpu, plan(&all(0)), features(Config::default())).unwrap(), &all);
    for make in DEVICES {
        let ranks = on_ranks(3, |rank, communicator| {
            let mesh = Mesh::new([("dp", 3)]).unwrap();
            let layouts = [mesh.layout([("dp", Along::Sharded)]).unwrap(), mesh.layout([]).unwrap()];
            let own =
                |step: u64| [part(&whole(step), 2500 * rank as usize..[2500, 5000, 9000][rank as usize]), bias(step)];
            let config = features(Config::default()).ranks(Ranks::new(communicator, &mesh, layouts));
            let mut probe = make(plan(&own(0)), config, rank).unwrap();
            let (histograms, gsnr) = seen(&mut probe, &own);
            let mut room = probe.ranks().unwrap();
            (room.histograms(&histograms).unwrap(), room.gsnr(&gsnr).unwrap())
        });
        for (histograms, gsnr) in ranks {
            assert!(histograms.histograms() == alone.0.histograms());
            for ((name, seen), (_, expected)) in gsnr.tensors().zip(alone.1.tensors()) {
                let near = |a: Option<f64>, b: Option<f64>| (a.unwrap() / b.unwrap() - 1.0).abs() < 1e-4;
                assert!(near(seen.mean(), expected.mean()), "{name}");
                assert!(near(Some(seen.sum_variance), Some(expected.sum_variance)), "{name}");
                assert_eq!((seen.defined, seen.below_one), (expected.defined, expected.below_one));
                assert_eq!(seen.median(), expected.median().filter(|_| name == "b"));
            }
            assert!((gsnr.noise_scale().unwrap() / alone.1.noise_scale().unwrap() - 1.0).abs() < 1e-3);
        }
    }
}

/// As many ranks as there are GPUs in the largest clusters: what they add up has the same bits in any tree, and is the norm of
/// all their elements.
#[test]
fn the_sum_of_16384_ranks_has_no_order() {
    const TENSORS: usize = 2000;
    const EACH: usize = 8;
    let ranks: u32 = if std::env::var_os("GRADPROBE_SHORT").is_some() { 512 } else { 16_384 };
    let alone = Simulated { ranks, given: Arc::default(), total: Arc::default() };
    let (given, total) = (Arc::clone(&alone.given), Arc::clone(&alone.total));
    let mesh = Mesh::new([("dp", ranks)]).unwrap();
    let names = (0..TENSORS).map(|t| (format!("t{t}"), DType::F32, EACH as u64));
    let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
    let begun = Instant::now();
    let config = Config::default().ranks(Ranks::alike(alone, &mesh, sharded));
    let mut probe = Probe::new(Cpu, Plan::new(names).unwrap(), config).unwrap();
    println!("{ranks} ranks with {TENSORS} tensors come together in {:.1?}", begun.elapsed());
    let mut random = fastrand::Rng::with_seed(5);
    let mut squares = 0u64;
    let mut elements = vec![[0f32; EACH]; TENSORS];
    for _ in 0..ranks {
        for x in elements.as_flattened_mut() {
            // Small integers, of which the exact sum of squares is known; of many sizes, so that tensors are.
            let n = random.i16(-255..256) >> random.u8(..8);
            squares += u64::from(n.unsigned_abs()) * u64::from(n.unsigned_abs());
            *x = f32::from(n);
        }
        let tensors: Vec<HostTensor> = elements.iter().map(|tensor| HostTensor::F32(tensor)).collect();
        probe.measure(&crate::common::host::refs(&tensors)).unwrap();
    }
    let all = std::mem::take(&mut *given.lock().unwrap());
    assert_eq!((all.len(), all[0].len()), (ranks as usize, 30));
    let trees: Vec<Vec<u64>> = (0..5)
        .map(|_| {
            let mut left = all.clone();
            while left.len() > 1 {
                let a = left.swap_remove(random.usize(..left.len()));
                let b = left.swap_remove(random.usize(..left.len()));
                left.push(a.iter().zip(&b).map(|(a, b)| a.wrapping_add(*b)).collect());
            }
            left.swap_remove(0)
        })
        .collect();
    assert!(trees.iter().all(|tree| *tree == trees[0]));
    *total.lock().unwrap() = Some(trees[0].clone());
    let report =
        probe.measure_host(&elements.iter().map(|tensor| HostTensor::F32(tensor)).collect::<Vec<_>>()).unwrap();
    let expected = (squares as f64).sqrt();
    assert!((report.outputs().total_norm / expected - 1.0).abs() < 1e-14, "{} {expected}", report.outputs().total_norm);
}

/// One, 8 or 4096 ranks give the same norm.
#[test]
fn the_norm_of_4096_ranks_is_that_of_one() {
    for ranks in [8u32, 4096] {
        let names = ["a", "b", "c"].map(|name| (name, DType::F32, 8u64));
        let alone = Simulated { ranks, given: Arc::default(), total: Arc::default() };
        let (given, total) = (Arc::clone(&alone.given), Arc::clone(&alone.total));
        let mesh = Mesh::new([("dp", ranks)]).unwrap();
        let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
        let config = Config::default().ranks(Ranks::alike(alone, &mesh, sharded));
        let mut probe = Probe::new(Cpu, Plan::new(names).unwrap(), config).unwrap();
        let all: Vec<[f32; 8]> =
            (0..3 * ranks as usize).map(|t| std::array::from_fn(|i| lognormal(t as u64, i, 5.0) as f32)).collect();
        let tensors: Vec<HostTensor> = all.iter().map(|tensor| HostTensor::F32(tensor)).collect();
        for of_rank in tensors.chunks(3) {
            probe.measure(&crate::common::host::refs(of_rank)).unwrap();
        }
        let sum = given
            .lock()
            .unwrap()
            .iter()
            .fold(vec![0u64; 30], |sum, words| sum.iter().zip(words).map(|(a, b)| a.wrapping_add(*b)).collect());
        *total.lock().unwrap() = Some(sum);
        let of_ranks = probe.measure_host(&tensors[..3]).unwrap().outputs().total_norm;
        let plan = plan_of((0..).map(|t: usize| format!("t{t}")).zip(tensors.iter().copied())).unwrap();
        let of_one =
            Probe::new(Cpu, plan, Config::default()).unwrap().measure_host(&tensors).unwrap().outputs().total_norm;
        assert_eq!(of_ranks.to_bits(), of_one.to_bits(), "{ranks} ranks");
    }
}

/// One rank of many that all have the same plan. It notes what the ranks give one after the other, in steps of one probe, and
/// then gives what they add up to.
#[derive(Debug)]
struct Simulated {
    ranks: u32,
    given: Arc<Mutex<Vec<Vec<u64>>>>,
    total: Arc<Mutex<Option<Vec<u64>>>>,
}

impl Transport for Simulated {
    fn rank(&self) -> u32 {
        0
    }

    fn ranks(&self) -> u32 {
        self.ranks
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(own.repeat(self.ranks as usize))
    }

    fn all_reduce(&self, words: &mut [u64], reduction: Reduction) -> Result<(), Error> {
        assert_eq!(reduction, Reduction::Sum);
        // While they come together, a name.
        if words.len() != 30 {
            return Ok(());
        }
        match &*self.total.lock().unwrap() {
            Some(total) => words.copy_from_slice(total),
            None => self.given.lock().unwrap().push(words.to_vec()),
        }
        Ok(())
    }
}

/// The first NaN of a sharded tensor is found in the whole, by every rank.
#[test]
fn a_nan_is_found_in_the_whole() {
    let mut model = Model::empty(&[("dp", 4)]);
    let mut random = fastrand::Rng::with_seed(3);
    let tensor = Tensor::of_values(DType::BF16, 5000, |i| normal(1, i)).with(4321, 0x7fc0);
    model.add("w", tensor.data(), &[("dp", Along::Sharded)], &mut random);
    for make in DEVICES {
        let found = step(&model, make, &Config::default(), true);
        assert!(found.iter().all(|(report, _)| report.records()[0].first_nonfinite() == Some(4321)));
    }
}

#[test]
fn weights_are_laid_out_as_their_gradients() {
    let plan =
        || Plan::new([("a", DType::F32, 2), ("b", DType::F32, 1)]).unwrap().with_weights([DType::F32; 2]).unwrap();
    for make in DEVICES {
        let ranks = on_ranks(2, |rank, communicator| {
            let mesh = Mesh::new([("dp", 2)]).unwrap();
            let layouts = [Along::Sharded, Along::Replicated].map(|how| mesh.layout([("dp", how)]).unwrap());
            let ranks = Ranks::new(communicator, &mesh, layouts).whole_tensors();
            let mut probe = make(plan(), Config::default().ranks(ranks), rank).unwrap();
            let (a, w, b) = ([3.0, 0.0], [[30.0f32, 0.0], [0.0, 40.0]][rank as usize], [5.0]);
            let b_weight = [50.0 + rank as f32];
            let tensors = [HostTensor::F32(&a), HostTensor::F32(&b)];
            let weights = [HostTensor::F32(&w), HostTensor::F32(&b_weight)];
            let with = probe.measure_host_with_weights(&tensors, &weights).unwrap();
            let differing = probe.ranks().unwrap().differing_replicas().unwrap();
            let without = probe.measure_host(&tensors).unwrap();
            (with, without, differing)
        });
        for (with, without, differing) in &ranks {
            let norms = |records: &[Record]| records.iter().map(Record::l2_norm).collect::<Vec<_>>();
            assert_eq!(norms(with.records()), [18f64.sqrt(), 5.0]);
            assert_eq!(norms(with.weights().unwrap()), [50.0, 50.0]);
            assert_eq!((with.outputs().flags, with.outputs().weights), (StepOutputs::FLAG_REPLICAS, 1));
            // Of two nobody can tell which is right.
            let found = Some(Differing { ranks: vec![0, 1], tensor: Some("b".to_owned()), is_weight: true });
            assert_eq!(with.rank_check().unwrap().replicas, found);
            assert_eq!(*differing, [DifferingReplica { tensor: 1, is_weight: true, ranks: vec![0, 1] }]);
            assert!(without.weights().is_none());
            assert_eq!((without.outputs().flags, without.outputs().weights), (0, 0));
        }
    }
}

/// Plans of no tensors, and ranks that hold nothing.
#[test]
fn ranks_may_hold_nothing() {
    let mesh = Mesh::new([("pp", 2)]).unwrap();
    for make in DEVICES {
        for all_are_empty in [true, false] {
            let steps = on_ranks(2, |rank, communicator| {
                let is_empty = all_are_empty || rank == 0;
                let names: &[(&str, DType, u64)] = if is_empty { &[] } else { &[("stage", DType::F32, 4)] };
                let layouts = names.iter().map(|_| mesh.layout([("pp", Along::At(1))]).unwrap());
                let ranks = Ranks::new(communicator, &mesh, layouts);
                let config = Config::default().clip(Clip::global_norm(1.0)).ranks(ranks);
                let mut probe = make(Plan::new(names.iter().copied()).unwrap(), config, rank).unwrap();
                let data = vec![HostTensor::F32(&[2.0; 4]); names.len()];
                [(); 2].map(|()| probe.measure_host(&data).unwrap().outputs().total_norm)
            });
            assert_eq!(steps, [[if all_are_empty { 0.0 } else { 4.0 }; 2]; 2]);
        }
    }
}

/// What a probe without other ranks says when it is asked for them.
const NOT_DECLARED: Error = Error::NotDeclared { declare: "Config::ranks" };

/// What a rank brings: its tensors, their layouts, its settings.
type Brought = (Vec<(&'static str, DType, u64)>, Vec<Layout>, Config);

/// Every rank learns who is wrong and in what, whoever it is, and stays alone.
#[test]
fn ranks_that_do_not_fit_are_named() {
    let mesh = Mesh::new([("pp", 2), ("dp", 2)]).unwrap();
    let along = |along: &[(&'static str, Along)]| mesh.layout(along.iter().copied()).unwrap();
    let sharded = along(&[("pp", Along::Sharded), ("dp", Along::Sharded)]);
    let everywhere = along(&[]);
    let with = |change: &dyn Fn(&mut Brought)| {
        let tensors = vec![("a", DType::F32, 3), ("b", DType::BF16, 2)];
        let mut rank =
            (tensors, vec![sharded.clone(), everywhere.clone()], Config::default().clip(Clip::global_norm(1.0)));
        change(&mut rank);
        rank
    };
    let part = |range, whole| sharded.clone().part(range, whole);
    type Change<'a> = Box<dyn Fn(&mut Brought, u32) + Sync + 'a>;
    // Who does what, who is named, and why.
    let wrong: Vec<(Change, u32, &str)> = vec![
        (
            Box::new(|own, rank| {
                if rank == 2 {
                    own.0[0].1 = DType::F16
                }
            }),
            2,
            "tensor \"a\" is of another type or layout there",
        ),
        (
            Box::new(|own, rank| {
                if rank == 1 {
                    own.1[0] = everywhere.clone()
                }
            }),
            1,
            "tensor \"a\" is of another type or layout there",
        ),
        (
            Box::new(|own, rank| {
                if rank == 3 {
                    own.0[0].0 = "c"
                }
            }),
            3,
            "tensor \"a\" is not in the plan there",
        ),
        (
            Box::new(|own, rank| {
                if rank == 3 {
                    own.0.remove(1);
                    own.1.remove(1);
                }
            }),
            3,
            "tensor \"b\" is not in the plan there",
        ),
        (
            Box::new(|own, rank| {
                if rank == 0 {
                    own.0[1].2 = 5
                }
            }),
            0,
            "tensor \"b\" has another length there than its replicas",
        ),
        // Two that own one, and none that does.
        (
            Box::new(|own, rank| own.1[1] = along(&[("pp", Along::At(rank / 2))])),
            2,
            "tensor \"b\" is of another type or layout there",
        ),
        (
            Box::new(|own, rank| {
                own.1[1] = along(&[("pp", Along::At(1))]);
                if rank >= 2 {
                    own.0.remove(1);
                    own.1.remove(1);
                }
            }),
            2,
            "tensor \"b\" is not in the plan there",
        ),
        // Parts that are not those of a whole.
        (
            Box::new(|own, rank| {
                let first = 3 * u64::from(rank) - u64::from(rank == 2);
                own.1[0] = part(first..first + 3, 12);
            }),
            2,
            "tensor \"a\" has elements from 5 there, which another rank has up to 6",
        ),
        (
            Box::new(|own, rank| {
                let first = 3 * u64::from(rank) + u64::from(rank == 3);
                own.1[0] = part(first..first + 3, 13);
            }),
            3,
            "tensor \"a\" has elements from 10 there, and those from 9 are on no rank",
        ),
        (
            Box::new(|own, rank| own.1[0] = part(3 * u64::from(rank)..3 * u64::from(rank) + 3, 11)),
            3,
            "tensor \"a\" has elements up to 12 there, of 11",
        ),
        (
            Box::new(|own, rank| own.1[0] = part(3 * u64::from(rank)..3 * u64::from(rank) + 3, 14)),
            3,
            "tensor \"a\" ends at 12 there, and should have 14 elements",
        ),
        (
            Box::new(|own, rank| {
                if rank == 1 {
                    own.2 = Config::default().clip(Clip::global_norm(2.0))
                }
            }),
            1,
            "has other settings",
        ),
        // What one alone finds out is told to all.
        (
            Box::new(|own, rank| {
                if rank == 2 {
                    own.1.truncate(1)
                }
            }),
            2,
            "the plan has 2 tensors, the step gave 1",
        ),
        (
            Box::new(|own, rank| {
                if rank == 2 {
                    own.1[0] = part(0..4, 12)
                }
            }),
            2,
            "tensor \"a\" cannot be laid out of elements 0..4, where 3 are planned",
        ),
        (
            Box::new(|own, rank| {
                if rank == 3 {
                    own.2 = Config::default().dead_threshold(-1.0)
                }
            }),
            3,
            "dead_threshold must be finite and not negative, not -1",
        ),
    ];
    for make in DEVICES {
        for (change, culprit, message) in &wrong {
            let errors = on_ranks(4, |rank, communicator| {
                let (tensors, layouts, config) = with(&|own| change(own, rank));
                let plan = Plan::new(tensors).unwrap();
                let ranks = Ranks::new(communicator, &mesh, layouts);
                let error = make(plan.clone(), config.clone().ranks(ranks), rank).unwrap_err();
                // Alone, it measures as ever.
                if config.dead_threshold >= 0.0 {
                    let mut probe = make(plan.clone(), config, rank).unwrap();
                    let data: Vec<Data> = plan.tensors().iter().map(|t| Data::zeros(t.dtype, t.len as usize)).collect();
                    assert!(probe.measure_host(&self::tensors(&data)).is_ok());
                    assert_eq!(probe.ranks().map(drop), Err(NOT_DECLARED));
                }
                error
            });
            for (rank, error) in (0..).zip(errors) {
                match &error {
                    Error::RankDiffers { rank, what } => {
                        assert_eq!((rank, what.starts_with(message)), (culprit, true), "{error}, not {message}");
                    }
                    own => {
                        assert_eq!(rank, *culprit, "{own}");
                        assert!(own.to_string().starts_with(message), "{own}, not {message}");
                    }
                }
            }
        }
    }
}

/// A rank of another version: of the words in which ranks tell what must be equal, the first says which it is.
#[derive(Debug)]
struct Older(ThreadCommunicator);

impl Transport for Older {
    fn rank(&self) -> u32 {
        Transport::rank(&self.0)
    }

    fn ranks(&self) -> u32 {
        Transport::ranks(&self.0)
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>, Error> {
        let mut own = own.to_vec();
        if Transport::rank(self) == 1 && own.len() == 32 {
            own[0] ^= 1;
        }
        Transport::all_gather(&self.0, &own)
    }
}

#[test]
fn another_version_is_named() {
    let errors = on_ranks(3, |_, Told(communicator)| {
        let ranks = Ranks::data_parallel(Older(communicator));
        Probe::new(Cpu, Plan::new([("w", DType::F32, 1)]).unwrap(), Config::default().ranks(ranks)).unwrap_err()
    });
    let expected = Error::RankDiffers { rank: 1, what: "has another version of gradprobe".to_owned() };
    assert!(errors.iter().all(|error| *error == expected), "{errors:?}");
}

#[test]
fn what_cannot_be_is_refused() {
    let plan = || Plan::new([("w", DType::F32, 1)]).unwrap();
    let mesh = Mesh::new([("dp", 1)]).unwrap();
    for make in DEVICES {
        let alone = || Told(ThreadCommunicator::group(1).swap_remove(0));
        let refused = |config: Config, mesh: &Mesh, layouts: &[Layout]| {
            let ranks = Ranks::new(alone(), mesh, layouts.iter().cloned());
            make(plan(), config.ranks(ranks), 0).unwrap_err().to_string()
        };
        let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
        let of_more = Mesh::new([("dp", 2)]).unwrap();
        let error = refused(Config::default(), &of_more, &[of_more.layout([]).unwrap()]);
        assert_eq!(error, "mesh must be of all ranks of the communicator, not 2 of 1 ranks");
        let other = Mesh::new([("dp", 1), ("tp", 1)]).unwrap();
        assert_eq!(
            refused(Config::default(), &mesh, &[other.layout([]).unwrap()]),
            "tensor \"w\" cannot be laid out of another mesh"
        );
        assert_eq!(refused(Config::default(), &mesh, &[]), "the plan has 1 tensors, the step gave 0");
        let by_tensor = Config::default().clip(Clip::TensorNorm { max_norm: 1.0 });
        let error = refused(by_tensor, &mesh, std::slice::from_ref(&sharded));
        assert!(error.starts_with("clip must be one that does not look at tensors that are parts here"), "{error}");
        let mut probe = make(plan(), Config::default(), 0).unwrap();
        assert_eq!(probe.ranks().map(drop), Err(NOT_DECLARED));
        let mut probe = make(plan(), Config::default().ranks(Ranks::alike(alone(), &mesh, sharded)), 0).unwrap();
        assert_eq!(probe.ranks().unwrap().differing_replicas(), Err(Error::NotMeasured));
    }
}

/// A rank that fails or ends is an error on those that wait for it, and they go on as they were.
#[test]
fn a_rank_that_is_gone_keeps_nobody_waiting() {
    let mesh = Mesh::new([("dp", 3)]).unwrap();
    let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let config = Config::default().ranks(Ranks::alike(communicator, &mesh, sharded.clone()));
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

#[test]
fn parts_of_other_lengths_are_an_error_on_every_rank() {
    let errors = on_ranks(2, |rank, end| Transport::all_gather(&end.0, &vec![0; 1 + rank as usize]).unwrap_err());
    for error in errors {
        assert_eq!(error.to_string(), "the ranks cannot communicate: rank 1 gave 2 bytes, rank 0 1");
    }
    // After one that is late no call succeeds, on any rank.
    let errors = on_ranks(2, |rank, Told(end)| {
        let end = end.with_deadline(Duration::from_millis(100));
        thread::sleep(Duration::from_millis(if rank == 1 { 400 } else { 0 }));
        Transport::all_gather(&end, &[1]).unwrap_err().to_string()
    });
    assert_eq!(errors, ["the ranks cannot communicate: rank 1 has not come within 100ms"; 2]);
    // And others gather as ever, in the order of the ranks.
    let all = on_ranks(5, |rank, end| {
        (0..50u8).map(|i| Transport::all_gather(&end.0, &[rank as u8, i]).unwrap()).collect::<Vec<_>>()
    });
    for rank in all {
        assert!((0..50).all(|i| rank[usize::from(i)] == [0, i, 1, i, 2, i, 3, i, 4, i]));
    }
}
