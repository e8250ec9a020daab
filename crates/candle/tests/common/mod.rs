//! Models and their gradients, as the tests of both devices use them.

#![allow(dead_code)] // Each test file is a crate of its own and uses a part of this.

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::{Init, VarMap};
use gradprobe::{Cpu, HostTensor, Plan, Probe, Report};
use gradprobe_candle::{CandleProbe, Config};

/// Twelve layers, so that the order of names is seen to be that of the layers, and variables beside them, one of which no
/// loss needs.
pub fn model(device: &Device) -> VarMap {
    let map = VarMap::new();
    let add = |name: &str, shape: &[usize]| {
        let init = Init::Randn { mean: 0.0, stdev: 0.2 };
        map.get(shape, name, init, DType::F32, device).unwrap();
    };
    add("scale", &[24]);
    add("unused.weight", &[24, 24]);
    for layer in 0..12 {
        add(&format!("layers.{layer}.weight"), &[24, 24]);
        add(&format!("layers.{layer}.bias"), &[24]);
    }
    add("embedding", &[50, 24]);
    map
}

/// The names of the model's variables that a loss needs, in their natural order.
pub fn names() -> Vec<String> {
    let layers = (0..12).flat_map(|i| [format!("layers.{i}.bias"), format!("layers.{i}.weight")]);
    ["embedding".to_owned()].into_iter().chain(layers).chain(["scale".to_owned()]).collect()
}

pub fn variable(map: &VarMap, name: &str) -> Var {
    map.data().lock().unwrap()[name].clone()
}

/// Puts a variable into a map, or in the place of another.
pub fn put(map: &VarMap, name: &str, variable: Var) {
    map.data().lock().unwrap().insert(name.to_owned(), variable);
}

/// The loss of the model, a thousand times as large as usual.
pub fn loss(map: &VarMap) -> Tensor {
    let mut x = variable(map, "embedding").as_tensor().clone();
    for layer in 0..12 {
        let [weight, bias] = ["weight", "bias"].map(|what| variable(map, &format!("layers.{layer}.{what}")));
        x = x.matmul(&weight).unwrap().broadcast_add(&bias).unwrap();
    }
    (x.broadcast_mul(&variable(map, "scale")).unwrap().sqr().unwrap().mean_all().unwrap() * 1000.0).unwrap()
}

pub fn gradients(map: &VarMap) -> GradStore {
    loss(map).backward().unwrap()
}

/// A gradient of its own for a variable: 1, 2, 3 and so on.
pub fn counting(variable: &Var) -> Tensor {
    let count = u32::try_from(variable.elem_count()).unwrap();
    let numbers = Tensor::arange(1, count + 1, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let shaped = numbers.to_dtype(variable.dtype()).unwrap().reshape(variable.shape()).unwrap();
    shaped.to_device(variable.device()).unwrap()
}

pub fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// Elements of the gradients that there are, by the names given.
pub fn elements(map: &VarMap, names: &[String], gradients: &GradStore) -> Vec<Vec<f32>> {
    names.iter().filter_map(|name| gradients.get(&variable(map, name)).map(floats)).collect()
}

pub fn tensors(data: &[Vec<f32>]) -> Vec<HostTensor<'_>> {
    data.iter().map(|data| HostTensor::F32(data)).collect()
}

/// What is the same to the bit when two reports are.
pub fn bytes(report: &Report) -> (Vec<u8>, &[u8]) {
    (bytemuck::bytes_of(report.outputs()).to_vec(), bytemuck::cast_slice(report.records()))
}

/// The report of the step just measured.
pub fn arrived(probe: &mut CandleProbe) -> Report {
    probe.wait().unwrap()
}

/// The names of the variables that had no gradient.
pub fn missing(report: &Report) -> Vec<&str> {
    report.absent().collect()
}

/// What is the same to the bit when two reports are, of the tensors that one of them has.
pub fn bytes_of_present(report: &Report) -> (Vec<u8>, Vec<u8>) {
    let present = report.tensors().filter(|tensor| !tensor.is_absent()).map(|tensor| *tensor.record);
    let records: Vec<gradprobe::Record> = present.collect();
    (bytemuck::bytes_of(report.outputs()).to_vec(), bytemuck::cast_slice(&records).to_vec())
}

/// What a probe on the CPU says of these tensors.
pub fn measured(plan: &Plan, config: Config, data: &[HostTensor<'_>]) -> Report {
    let mut probe = Probe::new(Cpu, plan.clone(), config).unwrap();
    let tensors: Vec<&dyn gradprobe::Tensor> = data.iter().map(|tensor| tensor as _).collect();
    probe.measure(&tensors).unwrap();
    probe.wait().unwrap()
}
