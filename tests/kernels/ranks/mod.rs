//! Many ranks, as threads: however tensors are spread over them, every rank has the norm of the whole within the bounds, the
//! same bits as every other rank, and the same decision; on the CPU and in the kernels on the host.
#![allow(unsafe_code, reason = "exchanges device memory, which is the host's")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

mod asked;
mod compare;
mod decide;
mod norm;
mod simulated;
mod together;

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

/// Of a mesh of one dimension, along which all tensors are cut.
fn sharded(communicator: impl Communicator + 'static) -> Ranks {
    let mesh = Mesh::new([("dp", communicator.ranks())]).unwrap();
    let layout = mesh.layout([("dp", Along::Sharded)]).unwrap();
    Ranks::alike(communicator, &mesh, layout)
}
