//! Gradients that torch computed, given to candle: the report is that of the inspector to the last digit.

use candle_core::{Device, Var, backprop::GradStore, safetensors::load};
use candle_nn::VarMap;
use gradprobe::{
    Cpu, HostTensor, Plan, Probe, Report, Tensor,
    write::{Entry, json_line},
};
use gradprobe_candle::{CandleProbe, Config};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::fs;

/// All three types in one file; and a step that has turned NaN.
const FILES: [&str; 2] = ["gpt-mixed-step0", "exploding-step3"];

fn path(name: &str) -> String {
    format!("{}/../../tests/data/{name}.safetensors", env!("CARGO_MANIFEST_DIR"))
}

/// What is in the file, read without candle.
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Elements {
    fn new(view: &TensorView<'_>) -> Self {
        let bytes = view.data();
        let words = || bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]]));
        match view.dtype() {
            Dtype::F32 => {
                Self::F32(bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect())
            }
            Dtype::F16 => Self::F16(words().map(f16::from_bits).collect()),
            Dtype::BF16 => Self::BF16(words().map(bf16::from_bits).collect()),
            dtype => panic!("{dtype:?}"),
        }
    }

    fn view(&self) -> HostTensor<'_> {
        match self {
            Self::F32(elements) => HostTensor::F32(elements),
            Self::F16(elements) => HostTensor::F16(elements),
            Self::BF16(elements) => HostTensor::BF16(elements),
        }
    }
}

/// As `inspect` measures it: tensors sorted by their names.
fn inspected(name: &str) -> Report {
    let bytes = fs::read(path(name)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, Elements)> =
        file.tensors().iter().map(|(name, view)| (name.clone(), Elements::new(view))).collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let views: Vec<HostTensor<'_>> = tensors.iter().map(|(_, elements)| elements.view()).collect();
    let specs = tensors.iter().zip(&views).map(|((name, _), view)| (name.as_str(), view.dtype(), view.len() as u64));
    let plan = Plan::new(specs).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::default()).unwrap();
    probe.measure(&views.iter().map(|view| view as &dyn Tensor).collect::<Vec<_>>()).unwrap();
    probe.wait().unwrap()
}

/// As candle has it, in a model of variables of the same names.
fn measured(name: &str) -> Report {
    let map = VarMap::new();
    let mut gradients = GradStore::default();
    for (name, gradient) in load(path(name), &Device::Cpu).unwrap() {
        let variable = Var::from_tensor(&gradient.ones_like().unwrap()).unwrap();
        gradients.insert(&variable, gradient);
        map.data().lock().unwrap().insert(name, variable);
    }
    let mut probe = CandleProbe::new(&map, Config::default()).unwrap();
    probe.measure(&gradients).unwrap();
    probe.poll().unwrap().unwrap()
}

#[test]
fn the_report_is_the_inspector_s() {
    for name in FILES {
        let (measured, inspected) = (measured(name), inspected(name));
        assert!(inspected.records().len() > 20);
        assert_eq!(
            bytemuck::cast_slice::<_, u8>(measured.records()),
            bytemuck::cast_slice::<_, u8>(inspected.records())
        );
        assert_eq!(bytemuck::bytes_of(measured.outputs()), bytemuck::bytes_of(inspected.outputs()));
        assert_eq!(json_line(&Entry::new(measured)), json_line(&Entry::new(inspected)));
    }
}
