//! Sampled elements over steps, and their mean correlation: known answers, and the kernel on the host against the CPU.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "small numbers"
)]

use crate::common::{
    cases::{Data, Tensor, normal},
    host::OnHost,
    tensors,
};
use gradprobe::{
    Absent, Config, Cpu, DType, Error, Plan, Probe,
    samples::{SampleConfig, SampleReport},
};
use gradprobe_simt::{Schedule, Simt};

const LENGTHS: [usize; 5] = [3, 0, 700, 40_000, 1];

fn plan() -> Plan {
    let tensors = LENGTHS.iter().enumerate();
    Plan::new(tensors.map(|(t, &len)| (format!("t{t}"), DType::ALL[t % 3], len as u64))).unwrap()
}

/// A step of tensors that share a direction to some degree.
fn step(number: u64, shared: f64) -> Vec<Data> {
    let direction = normal(77, number as usize);
    let tensor = |(t, &len): (usize, &usize)| {
        let value = move |i: usize| shared * direction + (1.0 - shared) * normal(1000 * number + t as u64, i);
        Tensor::of_values(DType::ALL[t % 3], len, value).data()
    };
    LENGTHS.iter().enumerate().map(tensor).collect()
}

/// That samples these.
fn config(elements: u32, steps: u32) -> Config {
    Config::new().samples(SampleConfig::new(elements, steps))
}

/// A probe on the CPU, and one on the kernels.
fn probes(plan: &Plan, config: &Config) -> [Probe; 2] {
    let on_cpu = Probe::new(Cpu, plan.clone(), config.clone()).unwrap();
    [on_cpu, Probe::new(Simt::default(), plan.clone(), config.clone()).unwrap()]
}

fn run(mut probe: Probe, steps: &[Vec<Data>]) -> SampleReport {
    for step in steps {
        probe.measure_host(&tensors(step)).unwrap();
        probe.sample_host(&tensors(step)).unwrap();
    }
    probe.sample_report().unwrap()
}

/// Pearson's correlation of every pair of the elements chosen, one by one.
fn by_pairs(report: &SampleReport, chosen: impl Fn(usize) -> bool) -> f64 {
    let columns: Vec<Vec<f64>> = (0..report.places().len())
        .filter(|&element| chosen(element))
        .map(|element| report.steps().map(|(_, values)| f64::from(values[element])).collect())
        .collect();
    let centred = |column: &Vec<f64>| {
        let mean = column.iter().sum::<f64>() / column.len() as f64;
        column.iter().map(|x| x - mean).collect::<Vec<f64>>()
    };
    let columns: Vec<Vec<f64>> = columns.iter().map(centred).filter(|c| c.iter().any(|&x| x != 0.0)).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (mut sum, mut pairs) = (0.0, 0.0);
    for (i, a) in columns.iter().enumerate() {
        for b in &columns[..i] {
            sum += dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
            pairs += 1.0;
        }
    }
    sum / pairs
}

#[test]
fn the_mean_correlation_is_that_of_all_pairs() {
    for (shared, low, high) in [(0.0, -0.01, 0.01), (0.5, 0.4, 0.6), (0.9, 0.97, 1.0)] {
        let steps: Vec<Vec<Data>> = (0..40).map(|number| step(number, shared)).collect();
        let report = run(Probe::new(Cpu, plan(), config(200, 40)).unwrap(), &steps);
        let (seen, expected) = (report.mean_correlation().unwrap(), by_pairs(&report, |_| true));
        assert!((seen - expected).abs() < 1e-9, "{seen}, should be {expected}");
        assert!((low..high).contains(&seen), "{shared}: {seen}");
    }
}

#[test]
fn elements_are_spread_evenly_and_their_values_are_exact() {
    let steps: Vec<Vec<Data>> = (0..3).map(|number| step(number, 0.3)).collect();
    let report = run(Probe::new(Cpu, plan(), config(500, 2)).unwrap(), &steps);
    assert_eq!(report.places().len(), 500);
    assert_eq!(report.steps().map(|(number, _)| number).collect::<Vec<_>>(), [2, 3], "the last two");
    let begin = |tensor: u32| LENGTHS[..tensor as usize].iter().sum::<usize>() as u64;
    let all = LENGTHS.iter().sum::<usize>() as f64;
    for (k, place) in report.places().iter().enumerate() {
        assert!(place.index < LENGTHS[place.tensor as usize] as u64);
        let expected = k as f64 * all / 500.0;
        assert!(((begin(place.tensor) + place.index) as f64 - expected).abs() < 1.0, "{place:?}");
    }
    for ((_, values), step) in report.steps().zip(&steps[1..]) {
        let wide: Vec<Vec<f32>> = step.iter().map(|data| data.tensor().to_f32()).collect();
        for (value, place) in values.iter().zip(report.places()) {
            assert_eq!(*value, wide[place.tensor as usize][place.index as usize]);
        }
    }
    // No more than there are.
    let small = Plan::new([("a", DType::F32, 2), ("none", DType::F16, 0), ("b", DType::F32, 1)]).unwrap();
    let mut probe = Probe::new(Cpu, small, config(1000, 2)).unwrap();
    let report = probe.sample_report().unwrap();
    let places: Vec<_> = report.places().iter().map(|place| (place.tensor, place.index)).collect();
    assert_eq!(places, [(0, 0), (0, 1), (2, 0)]);
}

#[test]
fn the_kernel_keeps_the_same() {
    let mut steps: Vec<Vec<Data>> = (0..7).map(|number| step(number, 0.3)).collect();
    steps[4][3] = Data::of_bits(DType::F32, (0..40_000).map(|i| if i == 9 { 0x7fc0_0000 } else { 0 }));
    for (elements, window) in [(1, 2), (333, 5), (65_536, 7)] {
        let config = config(elements, window);
        let expected = run(Probe::new(Cpu, plan(), config.clone()).unwrap(), &steps);
        assert_eq!(
            (expected.skipped(), expected.steps().len()),
            if window == 2 { (0, 2) } else { (1, window as usize - 1) }
        );
        for (schedule, blocks) in [(Schedule::Forward, 0), (Schedule::Shuffled(1), 1), (Schedule::Reverse, 300)] {
            let probe = Probe::new(Simt { schedule, blocks, ..Simt::default() }, plan(), config.clone()).unwrap();
            assert_eq!(run(probe, &steps), expected);
        }
    }
}

#[test]
fn the_elements_of_a_tensor_that_is_absent_are_nan_and_no_part_of_the_correlation() {
    let steps: Vec<Vec<Data>> = (0..6).map(|number| step(number, 0.3)).collect();
    let mut reports = Vec::new();
    for mut probe in probes(&plan(), &config(600, 6)) {
        for (number, step) in steps.iter().enumerate() {
            let [a, none, b, c, d] = &tensors(step)[..] else { panic!("five") };
            // Measured with all, and sampled without some: in the third step without the third tensor, and so on.
            probe.measure_host(&tensors(step)).unwrap();
            match number {
                2 => probe.samples().unwrap().take(&[a, none, &Absent, c, d]).unwrap(),
                3 => probe.samples().unwrap().take(&[&Absent, none, b, c, &Absent]).unwrap(),
                _ => probe.sample_host(&tensors(step)).unwrap(),
            }
        }
        let all = probe.samples().unwrap().take(&[&Absent, &Absent, &Absent, &Absent, &Absent]);
        assert_eq!(all, Err(Error::AllAbsent));
        let report = probe.sample_report().unwrap();
        assert_eq!((report.steps().len(), report.skipped()), (6, 0));
        let absent = |step: usize, tensor: u32| matches!((step, tensor), (2, 2) | (3, 0 | 4));
        for (number, (_, values)) in report.steps().enumerate() {
            for (value, place) in values.iter().zip(report.places()) {
                let whole = steps[number][place.tensor as usize].tensor().to_f32()[place.index as usize];
                let expected = if absent(number, place.tensor) { f32::NAN } else { whole };
                assert!(value.to_bits() == expected.to_bits(), "step {number}, {place:?}: {value}");
            }
        }
        reports.push(report);
    }
    // What is left is the correlation of the one tensor that was always there.
    let [on_cpu, in_kernels] = [0, 1].map(|device| reports[device].mean_correlation().unwrap());
    assert_eq!(on_cpu.to_bits(), in_kernels.to_bits());
    let expected = by_pairs(&reports[0], |element| reports[0].places()[element].tensor == 3);
    assert!((on_cpu - expected).abs() < 1e-9, "{on_cpu}, should be {expected}");
}

#[test]
fn what_cannot_be_right_is_refused() {
    let data = step(0, 0.0);
    let undeclared = || Error::NotDeclared { declare: "Config::samples" };
    for mut probe in probes(&plan(), &Config::new()) {
        assert_eq!(probe.sample_host(&tensors(&data)), Err(undeclared()));
        assert_eq!(probe.sample_report(), Err(undeclared()));
    }
    for (config, wrong) in [(config(0, 2), "elements"), (config(65_537, 2), "elements"), (config(1, 1), "steps")] {
        let refused = [
            Probe::new(Cpu, plan(), config.clone()).map(drop),
            Probe::new(Simt::default(), plan(), config.clone()).map(drop),
            config.bytes(&plan()).map(drop),
        ];
        for refused in refused {
            assert!(matches!(&refused, Err(Error::InvalidConfig { option, .. }) if *option == wrong), "{refused:?}");
        }
    }
    for mut probe in probes(&plan(), &config(10, 4)) {
        assert_eq!(probe.sample_host(&tensors(&data)), Err(Error::NotMeasured));
        probe.measure_host(&tensors(&data)).unwrap();
        let refused = probe.sample_host(&tensors(&data[..2]));
        assert_eq!(refused, Err(Error::TensorCount { planned: 5, given: 2, first: Some("t2".to_owned()) }));
        assert_eq!(probe.sample_report().unwrap().mean_correlation(), None, "no step yet");
        // Elements that never change have no correlation.
        for _ in 0..3 {
            probe.measure_host(&tensors(&data)).unwrap();
            probe.sample_host(&tensors(&data)).unwrap();
        }
        let report = probe.sample_report().unwrap();
        assert_eq!((report.steps().len(), report.mean_correlation()), (3, None));
    }
}
