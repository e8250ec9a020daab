//! The CPU: the whole table of cases against the oracle, the same bytes however it is run, tensors of more
//! than 2^32 elements, and the settings it refuses.

use crate::common::cases::{Case, Data, Tensor, cases};
use crate::common::check;
use crate::common::host::{OnHost, plan_of};
use crate::common::oracle::Exact;
use crate::common::{Effort, Prepared, demand_none, run_all};
use gradprobe::{Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, Plan, Probe, Record, StepOutputs};
use half::bf16;
use memmap2::MmapOptions;
use rayon::{ThreadPoolBuilder, prelude::*};

#[test]
fn the_table_of_cases() {
    run_all(&mut |plan, config| Probe::new(Cpu, plan, config).unwrap(), &Effort::FULL);
}

/// One step: records, scalars, and what the clip leaves.
struct Step {
    records: Vec<Record>,
    outputs: StepOutputs,
    clipped: Vec<Data>,
}

fn step(names: &[String], data: &[Data], config: &Config) -> Step {
    let plan = plan_of(names.iter().map(String::as_str).zip(data.iter().map(Data::tensor))).unwrap();
    let mut probe = Probe::new(Cpu, plan, config.clone()).unwrap();
    let report = probe.measure_host(&data.iter().map(Data::tensor).collect::<Vec<_>>()).unwrap();
    let mut clipped = data.to_vec();
    let mut tensors: Vec<HostTensorMut<'_>> = clipped.iter_mut().map(Data::tensor_mut).collect();
    probe.clip_host(&mut tensors).unwrap();
    Step { records: report.records().to_vec(), outputs: *report.outputs(), clipped }
}

/// The cases that take little, with their data.
fn small_cases() -> Vec<(Case, Prepared)> {
    cases().into_iter().filter(|case| !case.large).map(|case| (case.clone(), Prepared::new(&case))).collect()
}

fn same_step(names: &[String], seen: &Step, expected: &Step) -> Vec<String> {
    let (a, b) = ((seen.records.as_slice(), &seen.outputs), (expected.records.as_slice(), &expected.outputs));
    let mut complaints = check::same_step(names, a, b);
    for ((name, seen), expected) in names.iter().zip(&seen.clipped).zip(&expected.clipped) {
        complaints.extend(check::same_elements(name, seen.dtype().size(), seen.bytes(), expected.bytes()));
    }
    complaints
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let cases = small_cases();
    let all = || cases.iter().map(|(case, p)| step(&p.names, &p.data, &case.config)).collect::<Vec<_>>();
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let expected = pool(1).install(all);
    for threads in [2, 3, 7] {
        for ((case, prepared), (seen, expected)) in cases.iter().zip(pool(threads).install(all).iter().zip(&expected)) {
            let complaints = same_step(&prepared.names, seen, expected);
            assert_eq!(complaints, [""; 0], "{} with {threads} threads", case.name);
        }
    }
}

#[test]
fn a_hundred_runs_give_the_same_bytes() {
    let case = cases().into_iter().find(|case| case.name == "list_of_321").unwrap();
    let Prepared { names, data, .. } = Prepared::new(&case);
    let expected = step(&names, &data, &case.config);
    ThreadPoolBuilder::new().num_threads(7).build().unwrap().install(|| {
        for run in 0..100 {
            assert_eq!(same_step(&names, &step(&names, &data, &case.config), &expected), [""; 0], "run {run}");
        }
    });
}

#[test]
fn the_order_of_tensors_changes_no_record() {
    for (case, Prepared { mut names, mut data, .. }) in small_cases() {
        let expected = step(&names, &data, &case.config);
        names.reverse();
        data.reverse();
        let mut seen = step(&names, &data, &case.config);
        names.reverse();
        seen.records.reverse();
        let same_total = &expected.outputs;
        let complaints = check::same_step(&names, (&seen.records, same_total), (&expected.records, same_total));
        assert_eq!(complaints, [""; 0], "{}", case.name);
        let [norm, other] = [&expected, &seen].map(|step| step.outputs.finite_total_norm);
        assert!((norm - other).abs() <= 1e-14 * norm, "{}: {norm:e} {other:e}", case.name);
    }
}

/// 16-bit data and the same numbers in f32 have one record, to the bit, NaN and Inf included.
#[test]
fn widened_data_have_the_same_records() {
    let mut compared = 0;
    for (case, Prepared { names, data, .. }) in small_cases() {
        let wide: Vec<Data> = data.iter().map(Data::widened).collect();
        let (narrow, wide) = (step(&names, &data, &case.config), step(&names, &wide, &case.config));
        let complaints = check::same_step(&names, (&narrow.records, &narrow.outputs), (&wide.records, &wide.outputs));
        assert_eq!(complaints, [""; 0], "{}", case.name);
        compared += data.iter().filter(|d| d.dtype() != DType::F32).count();
    }
    assert!(compared > 5_000, "{compared}");
}

/// The bits are a promise to whoever compares runs of different machines and versions: they are the same on every
/// machine, so one number stands for the records and norms of the whole table. It changes only with the reduction of
/// `src/spec.rs` or with the cases.
#[test]
fn the_bits_are_those_of_every_machine() {
    const DIGEST: u64 = 0xb9ef_bdbe_c885_a2b4;
    let words_of = |r: &Record| {
        let counts = [r.count, r.nan_count, r.inf_count, r.zero_count, r.dead_count, r.first_nonfinite_index];
        let moments = [r.mean_or_zero, r.sum_squared_deviations, r.sum_abs].map(f64::to_bits);
        let extremes = [r.max_abs_or_zero, r.min_nonzero_abs_or_infinity].map(|x| u64::from(x.to_bits()));
        counts.into_iter().chain(moments).chain(extremes)
    };
    let words_of_case = |case: &Case| {
        let data: Vec<Data> = case.tensors.iter().map(Tensor::data).collect();
        let names: Vec<String> = (0..data.len()).map(|t| t.to_string()).collect();
        let Step { records, outputs, .. } = step(&names, &data, &case.config);
        records.iter().flat_map(words_of).chain([outputs.finite_total_norm.to_bits()]).collect::<Vec<u64>>()
    };
    let words: Vec<Vec<u64>> = cases().par_iter().map(words_of_case).collect();
    // FNV-1a, over words.
    let add = |hash: u64, word: &u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3);
    let digest = words.iter().flatten().fold(0xcbf2_9ce4_8422_2325, add);
    assert_eq!(digest, DIGEST, "the digest is {digest:#018x} and not {DIGEST:#018x}");
}

/// A tensor of 2^32 + 1 elements, nearly all of them zeros that take no memory: an index cut to 32 bits, signed or
/// not, would miss elements, find them twice or place the NaN at 0.
#[test]
fn more_elements_than_32_bits_count_pytorch_169930() {
    const LENGTH: usize = (1 << 32) + 1;
    let mut map = MmapOptions::new().len(LENGTH * size_of::<bf16>()).no_reserve_swap().map_anon().unwrap();
    let elements: &mut [bf16] = bytemuck::cast_slice_mut(&mut map);
    let mut values = [0, 77, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32].map(|at| (at, bf16::ZERO));
    for (index, bits) in [0x3f81u16, 0xc0a5, 0x3f00, 0x4111, 0xbe80, 0x40ff].into_iter().enumerate() {
        values[index].1 = bf16::from_bits(bits);
    }
    let config = Config::default();
    let small = [2.0f32; 3];
    let names = ["small".to_owned(), "large".to_owned()];
    let plan = Plan::new([("small", DType::F32, 3), ("large", DType::BF16, LENGTH as u64)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, config.clone()).unwrap();
    for (turn, last) in [values[5].1, bf16::NAN].into_iter().enumerate() {
        values[5].1 = last;
        let mut exact = [Exact::new(DType::F32, config.dead_threshold), Exact::new(DType::BF16, config.dead_threshold)];
        exact[0].push_run(2.0f32.to_bits(), 3);
        let mut next = 0;
        for (index, value) in values {
            elements[index] = value;
            exact[1].push_run(0, (index - next) as u64);
            exact[1].push(value.to_bits().into());
            next = index + 1;
        }
        let truths = exact.map(|exact| exact.truth());
        assert_eq!(truths[1].first_nonfinite, last.is_nan().then_some(1 << 32));
        let report = probe.measure_host(&[HostTensor::F32(&small), HostTensor::BF16(elements)]).unwrap();
        let step = turn as u64 + 1;
        demand_none(&check::check_step(&names, report.records(), report.outputs(), step, &truths, &config));
    }
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let make = |config| Probe::new(Cpu, Plan::new([("w", DType::F32, 1)]).unwrap(), config).map(drop);
    for threshold in [f32::NAN, f32::INFINITY, -1e-10, -f32::from_bits(1)] {
        let refused = make(Config::default().dead_threshold(threshold));
        assert!(matches!(refused, Err(Error::InvalidConfig { option: "dead_threshold", .. })), "{threshold}");
    }
    for max_norm in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, -0.0] {
        let refused = make(Config::default().clip(Clip::global_norm(max_norm)));
        assert!(matches!(refused, Err(Error::InvalidConfig { option: "max_norm", .. })), "{max_norm}");
    }
    for config in [Config::default().dead_threshold(0.0), Config::default().clip(Clip::global_norm(5e-324))] {
        assert_eq!(make(config), Ok(()));
    }
}
