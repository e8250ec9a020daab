//! What the statistics cost beside a plain read of the same bytes, in one run: group `measure` against `ceiling`; and a
//! tracked step beside a plain loop that moves the same bytes: group `gsnr`, `step` against `plain`; and the clip beside
//! a plain loop that reads and writes them: group `clip`, `clip` against `plain`; and AdamW likewise: group `optimizer`.
//!
//! 64 tensors of 1 Mi elements each, or as many as `GRADPROBE_BENCH_TENSORS` says: where the last cache is larger than they
//! are, a plain read is not one of memory. The ratio of two medians is the figure; either alone is the machine's. With
//! `GRADPROBE_CPU=avx2` in the environment no wider instructions are used. `benches/peers_cpu.py` runs this beside
//! PyTorch and makes one table.
//!
//! Group `diagnose` is what the rules take on the host for a step of 1000 tensors, of which none or all are unhealthy. Group `watch` is what
//! watching and writing take of the training thread for 1000 tensors: `watch` against `probe`.

use bytemuck::Pod;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gradprobe::{
    Clip, Config, Cpu, DType, Element, Plan, Probe, Tensor, TensorMut, Watch,
    clip::LossScale,
    gsnr::GsnrConfig,
    health::{Health, Rules},
    optim::AdamW,
};
use half::{bf16, f16};
use rayon::prelude::*;
use std::{hint::black_box, time::Instant};

const ELEMENTS: usize = 1 << 20;

/// How many tensors there are.
fn tensor_count() -> usize {
    std::env::var("GRADPROBE_BENCH_TENSORS").map_or(64, |count| count.parse().expect("a count of tensors"))
}

/// Numbers of the size and spread of a gradient: the sum of four uniforms, times 1e-3.
fn gradient(seed: usize) -> Vec<f32> {
    let mut state = seed as u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..ELEMENTS).map(|_| 1e-3 * (uniform() + uniform() + uniform() + uniform())).collect()
}

/// The fastest plain read the compiler writes: every 64-bit word into a vector of sums, all threads.
fn read<T: Pod + Sync>(tensors: &[Vec<T>]) -> u64 {
    let sum_words = |chunk: &[T]| {
        let mut lanes = [0u64; 32];
        let (blocks, _) = bytemuck::cast_slice::<T, u64>(chunk).as_chunks::<32>();
        for block in blocks {
            for (lane, word) in lanes.iter_mut().zip(block) {
                *lane = lane.wrapping_add(*word);
            }
        }
        lanes.into_iter().fold(0, u64::wrapping_add)
    };
    tensors.par_iter().flat_map(|t| t.par_chunks(1 << 15)).map(sum_words).reduce(|| 0, u64::wrapping_add)
}

/// The same with each word written back, another one: what clipping moves.
fn rewrite<T: Pod + Send>(tensors: &mut [Vec<T>]) {
    let change = |chunk: &mut [T]| {
        for word in bytemuck::cast_slice_mut::<T, u64>(chunk) {
            *word ^= 0x0001_0001_0001_0001;
        }
    };
    tensors.par_iter_mut().flat_map(|t| t.par_chunks_mut(1 << 15)).for_each(change);
}

/// Reads every gradient as a word `W`, and reads and writes two words of 32 bits beside it, all threads: what tracking
/// moves, with the least arithmetic that needs all of it.
fn plain_update<T: Pod + Sync, W: Pod + Sync + Into<u32>>(gradients: &[Vec<T>], states: &mut [[Vec<u32>; 2]]) {
    const CHUNK: usize = 1 << 15;
    gradients.par_iter().zip(states).for_each(|(gradients, [means, deviations])| {
        let state = means.par_chunks_mut(CHUNK).zip(deviations.par_chunks_mut(CHUNK));
        bytemuck::cast_slice::<T, W>(gradients).par_chunks(CHUNK).zip(state).for_each(
            |(words, (means, deviations))| {
                for ((&word, mean), deviation) in words.iter().zip(means).zip(deviations) {
                    *mean = mean.wrapping_add(word.into());
                    *deviation ^= *mean;
                }
            },
        );
    });
}

/// `W` is an integer as wide as `T`.
fn benches_of<T: Element, W: Pod + Sync + Into<u32>>(
    criterion: &mut Criterion,
    name: &str,
    convert: impl Fn(f32) -> T + Sync,
) {
    let count = tensor_count();
    let mut data: Vec<Vec<T>> =
        (0..count).into_par_iter().map(|seed| gradient(seed).into_iter().map(&convert).collect()).collect();
    let elements = count * ELEMENTS;
    let bytes = (elements * size_of::<T>()) as u64;

    let mut group = criterion.benchmark_group("ceiling");
    group.throughput(Throughput::BytesDecimal(bytes)).sample_size(20);
    group.bench_function(BenchmarkId::new(name, elements), |b| b.iter(|| black_box(read(black_box(&data)))));
    group.finish();

    let plan = Plan::new((0..count).map(|t| (format!("layer.{t}"), T::DTYPE, ELEMENTS as u64))).unwrap();
    let config = Config::new().histogram().dot();
    let mut tracking = Probe::new(Cpu, plan.clone(), config.clone().tracking(GsnrConfig::new())).unwrap();
    let mut probe = Probe::new(Cpu, plan.clone(), config).unwrap();
    fn refs<T: Element>(data: &[Vec<T>]) -> Vec<&dyn Tensor> {
        data.iter().map(|t| t as &dyn Tensor).collect()
    }

    let mut group = criterion.benchmark_group("measure");
    group.throughput(Throughput::BytesDecimal(bytes)).sample_size(20);
    group.bench_function(BenchmarkId::new(name, elements), |b| {
        let tensors = refs(&data);
        b.iter(|| {
            probe.measure(black_box(&tensors)).unwrap();
            black_box(probe.wait().unwrap())
        });
    });
    group.finish();

    let mut group = criterion.benchmark_group("gsnr");
    group.throughput(Throughput::BytesDecimal(bytes + 16 * elements as u64)).sample_size(20);
    let mut states: Vec<_> = (0..count).map(|_| [(); 2].map(|()| vec![0u32; ELEMENTS])).collect();
    group.bench_function(BenchmarkId::new(format!("{name}/plain"), elements), |b| {
        b.iter(|| plain_update::<T, W>(black_box(&data), black_box(&mut states)));
    });
    drop(states);
    group.bench_function(BenchmarkId::new(format!("{name}/step"), elements), |b| {
        let tensors = refs(&data);
        b.iter(|| {
            tracking.measure(black_box(&tensors)).unwrap();
            black_box(tracking.wait().unwrap())
        });
    });
    drop(tracking);
    group.finish();

    let mut group = criterion.benchmark_group("histogram");
    group.throughput(Throughput::BytesDecimal(bytes)).sample_size(20);
    group.bench_function(BenchmarkId::new(name, elements), |b| {
        let tensors = refs(&data);
        b.iter(|| black_box(probe.histogram().unwrap().measure(black_box(&tensors)).unwrap()));
    });
    group.finish();

    // The list with itself, reversed: as many bytes again.
    let mut group = criterion.benchmark_group("dot");
    group.throughput(Throughput::BytesDecimal(2 * bytes)).sample_size(20);
    group.bench_function(BenchmarkId::new(name, elements), |b| {
        let tensors = refs(&data);
        let others: Vec<&dyn Tensor> = tensors.iter().rev().copied().collect();
        b.iter(|| black_box(probe.dot().unwrap().measure(black_box(&tensors), black_box(&others)).unwrap()));
    });
    group.finish();

    // Each clip takes a thousandth off, of whatever norm: less would be left of the data, after some iterations of which each
    // divides by a hundred, than subnormals, each of which costs an Intel machine as much as a hundred others.
    let mut probe = Probe::new(Cpu, plan, Config::new().loss_scale(LossScale::fixed(1.001))).unwrap();

    let mut group = criterion.benchmark_group("clip");
    group.throughput(Throughput::BytesDecimal(2 * bytes)).sample_size(20);
    group.bench_function(BenchmarkId::new(format!("{name}/plain"), elements), |b| {
        b.iter(|| rewrite(black_box(&mut data)));
    });
    group.bench_function(BenchmarkId::new(format!("{name}/clip"), elements), |b| {
        // One measurement is clipped by once.
        let mut time = || {
            probe.measure(&refs(&data)).unwrap();
            let mut tensors: Vec<&mut dyn TensorMut> = data.iter_mut().map(|t| t as _).collect();
            let start = Instant::now();
            probe.clip(black_box(&mut tensors)).unwrap();
            start.elapsed()
        };
        b.iter_custom(|turns| (0..turns).map(|_| time()).sum());
    });
    group.finish();
}

/// Reads gradient, weight and two moments, and writes the last three: the 28 bytes an element of AdamW.
fn plain_optimizer(gradients: &[Vec<f32>], kept: &mut [[Vec<f32>; 3]]) {
    const CHUNK: usize = 1 << 15;
    gradients.par_iter().zip(kept).for_each(|(gradients, kept)| {
        let [weights, first, second] = kept.each_mut().map(|list| list.par_chunks_mut(CHUNK));
        let chunks = gradients.par_chunks(CHUNK).zip(weights).zip(first.zip(second));
        chunks.for_each(|((gradients, weights), (first, second))| {
            for (((g, w), m), v) in gradients.iter().zip(weights).zip(first).zip(second) {
                *m = 0.9 * *m + g;
                *v += *m;
                *w -= *v;
            }
        });
    });
}

/// `step` is AdamW after a measurement, `update` both.
fn optimizer(criterion: &mut Criterion) {
    let count = tensor_count();
    let gradients: Vec<Vec<f32>> = (0..count).into_par_iter().map(gradient).collect();
    let elements = count * ELEMENTS;
    let mut group = criterion.benchmark_group("optimizer");
    group.throughput(Throughput::BytesDecimal(28 * elements as u64)).sample_size(20);
    let mut kept: Vec<_> = (0..count).map(|_| [(); 3].map(|()| vec![0f32; ELEMENTS])).collect();
    group.bench_function(BenchmarkId::new("cpu/f32/plain", elements), |b| {
        b.iter(|| plain_optimizer(black_box(&gradients), black_box(&mut kept)));
    });
    drop(kept);
    let plan = Plan::new((0..count).map(|t| (format!("layer.{t}"), DType::F32, ELEMENTS as u64))).unwrap();
    let config = Config::new().clip(Clip::global_norm(1.0)).optimizer(AdamW::new(1e-3));
    let mut probe = Probe::new(Cpu, plan, config).unwrap();
    let mut weights: Vec<Vec<f32>> = (0..count).map(|_| vec![0.02; ELEMENTS]).collect();
    let gradients: Vec<&dyn Tensor> = gradients.iter().map(|t| t as _).collect();
    let mut weights: Vec<&mut dyn TensorMut> = weights.iter_mut().map(|t| t as _).collect();
    group.bench_function(BenchmarkId::new("cpu/f32/update", elements), |b| {
        b.iter(|| probe.update(black_box(&gradients), black_box(&mut weights)).unwrap());
    });
    probe.measure(&gradients).unwrap();
    group.bench_function(BenchmarkId::new("cpu/f32/step", elements), |b| {
        b.iter(|| probe.optimizer().unwrap().step(black_box(&gradients), black_box(&mut weights)).unwrap());
    });
    group.finish();
}

fn diagnose(criterion: &mut Criterion) {
    let parts = ["attn.q", "attn.k", "attn.v", "attn.o", "ln1", "mlp.up", "mlp.down", "ln2"];
    let names = (0..125).flat_map(|layer| parts.map(|part| format!("blocks.{layer}.{part}.weight")));
    let plan = Plan::new(names.map(|name| (name, DType::F32, 16))).unwrap();
    let mut group = criterion.benchmark_group("diagnose");
    for (name, value) in [("healthy", 1e-3), ("unhealthy", 1e20), ("nan", f32::NAN)] {
        let tensor = [value; 16];
        let mut probe = Probe::new(Cpu, plan.clone(), Config::default()).unwrap();
        probe.measure(&vec![&tensor as &dyn Tensor; plan.tensors().len()]).unwrap();
        let report = probe.wait().unwrap();
        let mut health = Health::new(&plan, Rules::default()).unwrap();
        group.bench_function(name, |b| b.iter(|| health.diagnose(black_box(&report)).unwrap()));
    }
    group.finish();
}

/// What a watched step of 1000 tensors costs the training thread beside the probe's own: `watch` against `probe`. Of the two cores, writers have
/// one; every 10th step has details.
fn watch(criterion: &mut Criterion) {
    const TENSORS: usize = 1000;
    let plan = || Plan::new((0..TENSORS).map(|i| (format!("layers.{i}.weight"), DType::F32, 16))).unwrap();
    let mut gradients: Vec<Vec<f32>> = (0..TENSORS).map(|i| vec![1e-3 + 1e-6 * i as f32; 16]).collect();
    let mut gradients: Vec<&mut dyn TensorMut> = gradients.iter_mut().map(|gradient| gradient as _).collect();
    let config = || Config::new().rules(Rules::default());
    let mut group = criterion.benchmark_group("watch");
    let mut probe = Probe::new(Cpu, plan(), config()).unwrap();
    group.bench_function("probe", |b| {
        b.iter(|| {
            probe.step(&mut gradients).unwrap();
            black_box(probe.poll().unwrap())
        });
    });
    let folder = tempfile::tempdir().unwrap();
    let mut watch = Watch::new(Probe::new(Cpu, plan(), config()).unwrap());
    watch.write_to(folder.path()).unwrap();
    let mut step = 0;
    group.bench_function("watch", |b| {
        b.iter(|| {
            step += 1;
            black_box(watch.step(step, &mut gradients, [("loss", 2.5), ("lr", 1e-3)]).unwrap())
        });
    });
    let finished = watch.finish().unwrap();
    group.finish();
    let bytes = std::fs::metadata(folder.path().join("steps.jsonl")).unwrap().len();
    println!(
        "{} steps written, {} dropped, {} bytes a step",
        finished.written,
        finished.dropped,
        bytes / finished.written
    );
}

fn benches(criterion: &mut Criterion) {
    println!("instruction set: {}", Cpu.instruction_set());
    diagnose(criterion);
    watch(criterion);
    optimizer(criterion);
    benches_of::<f32, u32>(criterion, "cpu/f32", |x| x);
    benches_of::<bf16, u16>(criterion, "cpu/bf16", bf16::from_f32);
    benches_of::<f16, u16>(criterion, "cpu/f16", f16::from_f32);
}

criterion_group!(group, benches);
criterion_main!(group);
