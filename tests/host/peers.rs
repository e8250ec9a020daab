//! Failures that others have reported and no other test shows, and the table of them all, tests/PEERS.md: the tests that it
//! names exist.
#![allow(unsafe_code, reason = "a device that passes on to that of the CPU")]

use crate::common::{
    cases::{cases, normal},
    host::OnHost,
};
use crate::on_cpu::{Altered, OnCpu};
use gradprobe::{
    Config, Cpu, DType, Error, HostTensor, Plan, Probe, Tensor, TensorMut,
    device::{Buffer, Device, Read},
    gsnr::GsnrConfig,
    optim::Sgd,
};
use gradprobe_simt::Simt;
use half::bf16;
use memmap2::MmapOptions;
use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// A probe on the CPU, and one on the kernels.
fn probes(plan: &Plan, config: &Config) -> [Probe; 2] {
    [
        Probe::new(Cpu, plan.clone(), config.clone()).unwrap(),
        Probe::new(Simt::default(), plan.clone(), config.clone()).unwrap(),
    ]
}

fn bf16s(len: usize) -> Plan {
    Plan::new([("w", DType::BF16, len as u64)]).unwrap()
}

/// The last length that 31 bits hold, and the next two; zeros that take no memory, and a 3 at the end.
#[test]
fn a_norm_beyond_2_31_elements() {
    const EDGE: usize = 1 << 31;
    let mut map = MmapOptions::new().len((EDGE + 1) * size_of::<bf16>()).no_reserve_swap().map_anon().unwrap();
    let elements: &mut [bf16] = bytemuck::cast_slice_mut(&mut map);
    for len in [EDGE - 1, EDGE, EDGE + 1] {
        elements[len - 1] = bf16::from_f32(3.0);
        let mut probe = Probe::new(Cpu, bf16s(len), Config::new()).unwrap();
        let record = probe.measure_host(&[HostTensor::BF16(&elements[..len])]).unwrap().records()[0];
        assert_eq!((record.count, record.zero_count), (len as u64, len as u64 - 1));
        assert_eq!((record.finite_l2_norm(), record.max_abs()), (3.0, Some(3.0)));
        elements[len - 1] = bf16::ZERO;
    }
}

/// In f32, 2^24 and 1 is 2^24.
#[test]
fn ones_beyond_2_24_are_all_counted() {
    const EDGE: u32 = 1 << 24;
    let ones = vec![bf16::ONE; EDGE as usize + 1];
    for len in [EDGE - 1, EDGE, EDGE + 1] {
        let elements = &ones[..len as usize];
        for mut probe in probes(&bf16s(elements.len()), &Config::new()) {
            let record = probe.measure_host(&[HostTensor::BF16(elements)]).unwrap().records()[0];
            assert_eq!((record.count, record.mean(), record.variance()), (len.into(), Some(1.0), Some(0.0)));
            assert_eq!(record.finite_l2_norm(), f64::from(len).sqrt());
        }
    }
}

/// First, last, side by side, and 30th and 36th, the last places in the tables of TransformerEngine's launches.
#[test]
fn empty_tensors_skip_no_update() {
    let len = |t: usize| if [0, 1, 29, 35, 79].contains(&t) { 0 } else { 1 + 37 * t };
    let gradients: Vec<Vec<f32>> = (0..80).map(|t| vec![1.0; len(t)]).collect();
    let plan = Plan::new((0..80).map(|t| (t.to_string(), DType::F32, len(t) as u64))).unwrap();
    for mut probe in probes(&plan, &Config::new().optimizer(Sgd::new(0.25))) {
        let mut weights = gradients.clone();
        let from: Vec<&dyn Tensor> = gradients.iter().map(|tensor| tensor as _).collect();
        let mut to: Vec<&mut dyn TensorMut> = weights.iter_mut().map(|tensor| tensor as _).collect();
        probe.update(&from, &mut to).unwrap();
        assert!(weights.iter().flatten().all(|&weight| weight == 0.75));
    }
}

/// That of a loss that is a mean over 32 samples, and that of their sum.
#[test]
fn signal_over_noise_is_that_of_a_scaled_loss() {
    let of_scale = |scale: f64| {
        let plan = Plan::new([("w", DType::F32, 1000)]).unwrap();
        let mut probe = Probe::new(Cpu, plan, Config::new().tracking(GsnrConfig::new())).unwrap();
        for step in 0..5 {
            #[expect(clippy::cast_possible_truncation, reason = "rounded as gradients are")]
            let gradient: Vec<f32> = (0..1000).map(|i| (scale * (0.5 + normal(step, i))) as f32).collect();
            probe.measure(&[&gradient]).unwrap();
        }
        probe.gsnr_report().unwrap().tensors().next().unwrap().1.mean().unwrap()
    };
    assert_eq!(of_scale(1.0), of_scale(1.0 / 32.0));
}

/// Copies that arrive when the test says so.
struct Late(Arc<AtomicBool>);

struct LateRead(Box<dyn Read>, Arc<AtomicBool>);

impl Read for LateRead {
    fn start(&mut self, from: &Buffer) -> Result<(), Error> {
        self.0.start(from)
    }
    fn is_complete(&self) -> Result<bool, Error> {
        Ok(self.1.load(Ordering::Relaxed))
    }
    fn wait(&self) -> Result<&[u8], Error> {
        assert!(self.is_complete()?, "read before it has arrived");
        self.0.wait()
    }
}

// SAFETY: the CPU's device, but for copies that say later that they have arrived.
unsafe impl Altered for Late {
    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        Ok(Box::new(LateRead(Cpu.read(bytes)?, Arc::clone(&self.0))))
    }
}

#[test]
fn a_norm_is_not_read_before_it_arrives() {
    let arrived = Arc::new(AtomicBool::new(false));
    let plan = Plan::new([("w", DType::F32, 2)]).unwrap();
    let mut probe = Probe::new(OnCpu(Late(Arc::clone(&arrived))), plan, Config::new()).unwrap();
    for step in [1.0f32, 2.0, 3.0] {
        probe.measure(&[&[3.0 * step, 4.0 * step]]).unwrap();
        assert!(probe.poll().unwrap().is_none());
    }
    arrived.store(true, Ordering::Relaxed);
    for norm in [5.0, 10.0, 15.0] {
        assert_eq!(probe.poll().unwrap().unwrap().outputs().total_norm, norm);
    }
}

/// Whether a source has a test of this name.
fn has_test(source: &str, name: &str) -> bool {
    let begins = format!("fn {name}(");
    source.split("#[test]").skip(1).any(|test| test.find("fn ").is_some_and(|at| test[at..].starts_with(&begins)))
}

#[test]
fn every_row_of_the_table_names_a_test_that_exists() {
    let cases: Vec<String> = cases().into_iter().map(|case| case.name).collect();
    let mut named = 0;
    for row in include_str!("../PEERS.md").lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [_, _, tests] = cells[..] else { panic!("not three cells: {row}") };
        let tests: Vec<_> = tests.split('`').filter_map(|test| test.split_once("::")).collect();
        assert!(!tests.is_empty() || cells[2].starts_with("Does not apply: "), "no test: {row}");
        for (file, name) in tests {
            let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect(file);
            let is_case = file == "tests/common/cases.rs" && cases.iter().any(|case| case == name);
            assert!(is_case || has_test(&source, name), "{file} has no {name}");
            named += 1;
        }
    }
    assert!(named > 60, "{named} tests are named");
}
