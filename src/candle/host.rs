//! Gradients on candle's CPU device: read where they are, and taken out of their tensors for the clip, which changes all
//! of them together while candle gives one at a time.

use crate::gradients::{locked, range};
use candle_core::{CpuStorage, InplaceOp1, Layout, Result as CandleResult, Storage, StorageRef, Tensor};
use gradprobe::{CpuProbe, Error, HistogramReport, HostTensor, HostTensorMut, Report};
use std::{cell::RefCell, mem, ops::Range};

/// Measures the gradients, and the weights if there are any.
///
/// # Errors
/// The probe's.
pub fn measure(probe: &mut CpuProbe, gradients: &[Tensor], weights: Option<&[Tensor]>) -> Result<Report, Error> {
    let gradients = locked(gradients);
    let gradients: Vec<HostTensor<'_>> = gradients.iter().map(elements).collect();
    let Some(weights) = weights else { return probe.measure(&gradients) };
    let weights = locked(weights);
    let weights: Vec<HostTensor<'_>> = weights.iter().map(elements).collect();
    probe.measure_with_weights(&gradients, &weights)
}

/// The histograms of the gradients.
///
/// # Errors
/// The probe's.
pub fn histogram(probe: &CpuProbe, gradients: &[Tensor]) -> Result<HistogramReport, Error> {
    let gradients = locked(gradients);
    let gradients: Vec<HostTensor<'_>> = gradients.iter().map(elements).collect();
    probe.histogram(&gradients)
}

/// Clips the gradients, each in memory of its own, by the last measurement.
///
/// # Errors
/// The probe's.
pub fn clip(probe: &mut CpuProbe, gradients: &[Tensor]) -> Result<(), Error> {
    let storages: Vec<Exchange> = gradients.iter().map(|_| Exchange::default()).collect();
    exchange(gradients, &storages);
    let clipped = {
        let mut storages: Vec<_> = storages.iter().map(|storage| storage.0.borrow_mut()).collect();
        let pairs = storages.iter_mut().zip(gradients);
        let mut elements: Vec<_> = pairs.map(|(storage, of)| elements_mut(storage, range(of.layout()))).collect();
        probe.clip(&mut elements)
    };
    exchange(gradients, &storages);
    clipped
}

/// A storage that changes places with that of a tensor: the one way to a tensor's memory that candle opens.
struct Exchange(RefCell<CpuStorage>);

impl Default for Exchange {
    fn default() -> Self {
        Self(RefCell::new(CpuStorage::U8(Vec::new())))
    }
}

impl InplaceOp1 for Exchange {
    fn name(&self) -> &'static str {
        "gradprobe-exchange"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> CandleResult<()> {
        mem::swap(storage, &mut self.0.borrow_mut());
        Ok(())
    }
}

fn exchange(gradients: &[Tensor], storages: &[Exchange]) {
    for (gradient, storage) in gradients.iter().zip(storages) {
        gradient.inplace_op1(storage).expect("it is on the CPU, where exchanging cannot fail");
    }
}

fn elements<'a>((storage, range): &'a (StorageRef<'_>, Range<usize>)) -> HostTensor<'a> {
    let range = range.clone();
    match &**storage {
        Storage::Cpu(CpuStorage::F32(all)) => HostTensor::F32(&all[range]),
        Storage::Cpu(CpuStorage::F16(all)) => HostTensor::F16(&all[range]),
        Storage::Cpu(CpuStorage::BF16(all)) => HostTensor::BF16(&all[range]),
        _ => unreachable!("device and type were checked"),
    }
}

fn elements_mut(storage: &mut CpuStorage, range: Range<usize>) -> HostTensorMut<'_> {
    match storage {
        CpuStorage::F32(all) => HostTensorMut::F32(&mut all[range]),
        CpuStorage::F16(all) => HostTensorMut::F16(&mut all[range]),
        CpuStorage::BF16(all) => HostTensorMut::BF16(&mut all[range]),
        _ => unreachable!("type was checked"),
    }
}
