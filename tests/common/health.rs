//! Reports to diagnose: of a few elements, and of the models in `tests/data`.
#![allow(dead_code)] // Each test file uses a part of this.

pub use crate::common::host;

use gradprobe::{Config, Cpu, DType, Diagnosis, FindingKind, HostTensor, Plan, Probe, Report, Verdict};
use half::{bf16, f16};
use host::{OnHost, plan_of};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

/// The report of one step with these tensors.
pub fn measure(tensors: &[(&str, &[f32])]) -> Report {
    measure_with(Config::default(), tensors)
}

/// The same under a config.
pub fn measure_with(config: Config, tensors: &[(&str, &[f32])]) -> Report {
    let plan = Plan::new(tensors.iter().map(|(name, elements)| (*name, DType::F32, elements.len() as u64))).unwrap();
    let views: Vec<HostTensor> = tensors.iter().map(|(_, elements)| HostTensor::F32(elements)).collect();
    Probe::new(Cpu, plan, config).unwrap().measure_host(&views).unwrap()
}

/// The report of a file, its tensors in the natural order of their names.
pub fn golden(name: &str) -> Report {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name).with_extension("safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<&str> = file.names();
    let number = |name: &str| name.split('.').find_map(|part| part.parse::<u32>().ok());
    names.sort_by_key(|name| (number(name), *name));
    let tensors: Vec<(DType, Vec<u8>)> = names
        .iter()
        .map(|name| {
            let tensor = file.tensor(name).unwrap();
            let dtype = match tensor.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                other => panic!("{other:?}"),
            };
            (dtype, tensor.data().to_vec())
        })
        .collect();
    let (mut f32s, mut f16s, mut bf16s) = (Vec::new(), Vec::new(), Vec::new());
    for (dtype, bytes) in &tensors {
        let pairs = || bytes.as_chunks::<2>().0.iter();
        match dtype {
            DType::F32 => f32s.push(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect::<Vec<_>>()),
            DType::F16 => f16s.push(pairs().map(|x| f16::from_le_bytes(*x)).collect::<Vec<_>>()),
            DType::BF16 => bf16s.push(pairs().map(|x| bf16::from_le_bytes(*x)).collect::<Vec<_>>()),
        }
    }
    let (mut f32s, mut f16s, mut bf16s) = (f32s.iter(), f16s.iter(), bf16s.iter());
    let views: Vec<HostTensor> = tensors
        .iter()
        .map(|(dtype, _)| match dtype {
            DType::F32 => HostTensor::F32(f32s.next().unwrap()),
            DType::F16 => HostTensor::F16(f16s.next().unwrap()),
            DType::BF16 => HostTensor::BF16(bf16s.next().unwrap()),
        })
        .collect();
    let plan = plan_of(names.iter().copied().zip(views.iter().copied())).unwrap();
    Probe::new(Cpu, plan, Config::default()).unwrap().measure_host(&views).unwrap()
}

/// Kinds and severities, in the order of the findings.
pub fn kinds(diagnosis: &Diagnosis) -> Vec<(FindingKind, Verdict)> {
    diagnosis.findings().iter().map(|finding| (finding.kind, finding.severity)).collect()
}

/// A number from 0 to 1 that this pair names (SplitMix64).
#[allow(clippy::cast_precision_loss)]
pub fn named(seed: u64, index: u64) -> f32 {
    let mut x = (seed << 32 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678_9abc_def1);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ x >> 31) >> 40) as f32 / (1u64 << 24) as f32
}
