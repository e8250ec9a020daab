//! `kernels/include/gradprobe_epilogue.cuh`: a kernel such as users write leaves the record of what it wrote, held against
//! the CPU backend's record of that buffer, on the host emulation; and nvcc compiles such a kernel where there is one.
#![allow(unsafe_code, reason = "launches kernels with addresses")]

mod require;
mod users;

use bytemuck::Zeroable;
use gradprobe::{Config, Cpu, DType, Plan, Probe, Record};
use gradprobe_simt::{Entry, Schedule, launch};

/// Threads of a block.
const THREADS: u32 = 128;
const DEAD_THRESHOLD: f32 = 1e-10;

/// Kernels of crates/simt/epilogue.cu.
const EPILOGUE: &str = "gradprobe_simt_epilogue";
const EPILOGUE_TILES: &str = "gradprobe_simt_epilogue_tiles";
const EPILOGUE_MERGE: &str = "gradprobe_simt_epilogue_merge";

/// Runs one of them, by the C++ compiler or as PTX.
fn run_kernel(name: &str, blocks: u32, parameters: &[&[u8]], schedule: Schedule) {
    match users::kernels("crates/simt/epilogue.cu") {
        Some(ptx) => users::launch(ptx, name, blocks, schedule, parameters),
        // SAFETY: the tests give kernels what they expect, with addresses of vectors as long as they take them.
        None => unsafe { launch(Entry::find(name).unwrap(), blocks, THREADS, parameters, schedule) }.unwrap(),
    }
}

/// What the kernel wrote, and the record of each block.
fn run(kernel: &str, input: &[f32], blocks: u32, schedule: Schedule) -> (Vec<f32>, Vec<Record>) {
    let mut output = vec![f32::from_bits(0xdead_beef); input.len()];
    let mut slots = vec![Record { count: 77, ..Record::EMPTY }; blocks as usize];
    let addresses = [input.as_ptr() as u64, output.as_mut_ptr() as u64, slots.as_mut_ptr() as u64];
    let [from, to, records] = addresses.map(u64::to_ne_bytes);
    let (length, threshold) = ((input.len() as u64).to_ne_bytes(), DEAD_THRESHOLD.to_ne_bytes());
    let _lent = (users::lend(input, false), users::lend(&output, true), users::lend(&slots, true));
    run_kernel(kernel, blocks, &[&from, &to, &length, &threshold, &records], schedule);
    (output, slots)
}

/// The slots merged by the device's code: as runs, and as parts.
fn merged_on_the_device(slots: &[Record]) -> [Record; 2] {
    let mut all = slots.to_vec();
    all.extend([Record::zeroed(); 2]);
    let (address, count) = (all.as_mut_ptr() as u64, u32::try_from(slots.len()).unwrap());
    let _lent = users::lend(&all, true);
    run_kernel(EPILOGUE_MERGE, 1, &[&address.to_ne_bytes(), &count.to_ne_bytes()], Schedule::Forward);
    [all[slots.len()], all[slots.len() + 1]]
}

fn of_the_cpu(elements: &[f32]) -> Record {
    let plan = Plan::new([("output", DType::F32, elements.len() as u64)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::default().dead_threshold(DEAD_THRESHOLD)).unwrap();
    probe.measure(&[&elements]).unwrap();
    probe.wait().unwrap().records()[0]
}

/// Sum of squared deviations and mean, of the finite elements, by two passes in f64 around a first estimate.
fn moments(elements: &[f32]) -> (f64, f64) {
    let finite: Vec<f64> = elements.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x)).collect();
    let count = finite.len().max(1) as f64;
    let rough = finite.iter().sum::<f64>() / count;
    let correction = finite.iter().map(|x| x - rough).sum::<f64>() / count;
    let squares: f64 = finite.iter().map(|x| (x - rough) * (x - rough)).sum();
    (rough + correction, squares - count * correction * correction)
}

/// Complaints about a record of these elements, by the bounds in the header.
fn complaints(record: &Record, elements: &[f32], blocks: u32) -> Vec<String> {
    let expected = of_the_cpu(elements);
    let mut complaints = Vec::new();
    let exact = |r: &Record| {
        let counts = (r.count, r.nan_count, r.inf_count, r.zero_count, r.dead_count, r.first_nonfinite_index);
        (counts, r.max_abs_or_zero.to_bits(), r.min_nonzero_abs_or_infinity.to_bits())
    };
    if exact(record) != exact(&expected) {
        complaints.push(format!("{record:?} is not exact: {expected:?}"));
    }
    let mut within = |what: &str, value: f64, of: f64, bound: f64| {
        if (value - of).abs() > bound || value.is_nan() {
            complaints.push(format!("{what} {value:e} is not {of:e} ± {bound:e}"));
        }
    };
    let unit = f64::EPSILON / 2.0;
    let steps = elements.len().div_ceil((THREADS * blocks) as usize) as f64 + 1.0;
    let linear = (steps + f64::from(blocks) + 40.0) * unit;
    let square = 4.0 * steps * linear;
    let sum_abs: f64 = elements.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x.abs())).sum();
    let finite = record.finite_count().max(1) as f64;
    let (mean, deviations) = moments(elements);
    let std = (deviations / finite).sqrt();
    let offset = if std > 0.0 { mean.abs() / std } else { 0.0 };
    // What the oracle itself may be off, in f64.
    let own = finite * unit;
    within("sum_abs", record.sum_abs, sum_abs, sum_abs * (linear + own));
    within("mean", record.mean_or_zero, mean, sum_abs / finite * (square + own));
    let bound = deviations * (square + 8.0 * unit * offset + own);
    within("deviations", record.sum_squared_deviations, deviations, bound);
    // And the CPU backend's, which promises less.
    within("mean_abs of the CPU", record.sum_abs, expected.sum_abs, 5.1e-7 * sum_abs);
    within("mean of the CPU", record.mean_or_zero, expected.mean_or_zero, 5.1e-7 * sum_abs / finite);
    let bound = deviations * (1.1e-6 + 1.1e-7 * offset);
    within("deviations of the CPU", record.sum_squared_deviations, expected.sum_squared_deviations, bound);
    complaints
}

/// Inputs with what can go wrong: offsets, outliers before and behind, nothing finite, subnormals, whole blocks empty.
fn inputs() -> Vec<(&'static str, Vec<f32>)> {
    let mut random = fastrand::Rng::with_seed(11);
    let mut normal = |length: usize| -> Vec<f32> {
        let mut one = || (0..12).map(|_| random.f32()).sum::<f32>() - 6.0;
        (0..length).map(|_| one()).collect()
    };
    let mut inputs: Vec<(&str, Vec<f32>)> =
        [0, 1, 31, 127, 128, 129, 1000, 5000].map(|length| ("normal", normal(length))).into();
    let with = |values: &[(usize, f32)], mut elements: Vec<f32>| {
        values.iter().for_each(|&(index, value)| elements[index] = value);
        elements
    };
    inputs.push(("far from 0", normal(4000).iter().map(|x| x + 100_000.0).collect()));
    inputs.push(("constant", vec![0.1; 3001]));
    inputs.push(("outlier first", with(&[(0, 1e30)], normal(3000))));
    inputs.push(("outlier last", with(&[(2999, -3e38)], normal(3000))));
    inputs.push(("largest", vec![f32::MAX; 700]));
    inputs.push(("smallest", (0..900).map(|i| f32::from_bits(i % 5)).collect()));
    inputs.push(("dead", with(&[(5, 0.0), (6, -0.0), (7, 9e-11), (8, 1e-10), (9, -1e-11)], normal(300))));
    let bad = [(1234, f32::NAN), (700, f32::INFINITY), (2040, f32::NEG_INFINITY), (2041, -f32::NAN)];
    inputs.push(("non-finite", with(&bad, normal(2500))));
    inputs.push(("first is NaN", with(&[(0, f32::NAN), (128, f32::INFINITY)], normal(400))));
    inputs.push(("all NaN", vec![f32::NAN; 200]));
    inputs.push(("all zero", vec![-0.0; 200]));
    inputs
}

#[test]
fn runs_merge_to_the_record_of_the_buffer() {
    let mut found = Vec::new();
    for (name, input) in inputs() {
        for blocks in [1, 2, 7, 40] {
            let (output, slots) = run(EPILOGUE, &input, blocks, Schedule::Shuffled(3));
            // "NaN inputs yield an unspecified NaN" (PTX ISA, "neg").
            let bits = |x: f32| if x.is_nan() { 0 } else { x.to_bits() };
            let negated: Vec<u32> = input.iter().map(|x| bits(-x)).collect();
            assert_eq!(output.iter().map(|&x| bits(x)).collect::<Vec<_>>(), negated, "{name}");
            let merged = slots.iter().fold(Record::EMPTY, |all, slot| all.merge(slot));
            found.extend(complaints(&merged, &output, blocks).iter().map(|c| format!("{name}, {blocks} blocks: {c}")));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn tiles_merge_to_the_record_of_the_buffer() {
    let mut found = Vec::new();
    for (name, input) in inputs() {
        for blocks in [1, 3, 8] {
            let (output, mut slots) = run(EPILOGUE_TILES, &input, blocks, Schedule::Shuffled(4));
            // Any fixed order will do.
            slots.reverse();
            let [_, merged] = merged_on_the_device(&slots);
            found.extend(complaints(&merged, &output, blocks).iter().map(|c| format!("{name}, {blocks} blocks: {c}")));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// What a missing barrier would change.
#[test]
fn no_order_of_threads_changes_a_bit() {
    let (_, input) = inputs().into_iter().find(|(name, _)| *name == "non-finite").unwrap();
    let schedules = [Schedule::Reverse].into_iter().chain((0..8).map(Schedule::Shuffled));
    for kernel in [EPILOGUE, EPILOGUE_TILES] {
        let (_, first) = run(kernel, &input, 5, Schedule::Forward);
        for schedule in schedules.clone() {
            let (_, again) = run(kernel, &input, 5, schedule);
            let bytes = |slots: &[Record]| bytemuck::cast_slice::<_, u8>(slots).to_vec();
            assert_eq!(bytes(&again), bytes(&first), "{schedule:?}");
        }
    }
}

#[test]
fn the_merge_has_the_bits_of_the_host_s() {
    for (name, input) in inputs() {
        let (_, slots) = run(EPILOGUE, &input, 9, Schedule::Forward);
        let expected = slots.iter().fold(Record::EMPTY, |all, slot| all.merge(slot));
        let [merged, _] = merged_on_the_device(&slots);
        assert_eq!(bytemuck::bytes_of(&merged), bytemuck::bytes_of(&expected), "{name}");
    }
}

const KERNEL: &str = r#"
#include <gradprobe_epilogue.cuh>
typedef uint64_t u64; // As programs have it that include other headers: the names here must not meet theirs.
struct Record {};
extern "C" __global__ void backward(const float *input, float *gradient, u64 length, gradprobe_record *slots,
                                    const gradprobe_step_outputs *step) {
    __shared__ gradprobe::BlockScratch<256> scratch;
    gradprobe::Accumulator statistics;
    if (step->skip) return;
    u64 run = (length + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * run;
    for (u64 i = begin + threadIdx.x; i < begin + run && i < length; i += 256) {
        gradient[i] = input[i] * step->coefficient;
        statistics.add(gradient[i], i - begin);
    }
    gradprobe::write_record<256>(statistics, threadIdx.x, scratch, &slots[blockIdx.x]);
}
"#;

#[test]
fn nvcc_compiles_a_kernel_with_the_epilogue() {
    let Some(nvcc) = require::nvcc() else { return };
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("backward.cu");
    std::fs::write(&source, KERNEL).unwrap();
    for options in [&["-arch=sm_80"][..], &["-arch=sm_90", "--use_fast_math"]] {
        let code = nvcc.compile(&source, options);
        assert!(code.windows(8).any(|name| name == b"backward"), "{} bytes", code.len());
    }
}
