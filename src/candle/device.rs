//! Gradients on candle's CUDA device: measured where they are, on candle's own stream, and taken out of their tensors for
//! the clip. Only the owner of the memory moves, the memory does not.

use crate::gradients::{locked, range};
use candle_core::{
    CpuStorage, CudaStorage, InplaceOp1, Layout, Result as CandleResult, Storage, StorageRef, Tensor, bail,
    cuda_backend::{CudaDevice, CudaStorageSlice},
};
use gradprobe::{
    Config, CudaProbe, Error, HistogramReport, Plan,
    cuda::{DeviceTensor, DeviceTensorMut},
    cudarc::driver::{CudaStream, CudaView, CudaViewMut},
};
use std::{cell::RefCell, mem, ops::Range, sync::Arc};

/// A probe on candle's stream.
pub struct OnDevice {
    pub probe: CudaProbe,
    pub measured: bool,
    /// What stands in a gradient's place while it is clipped: a byte each, allocated at the first clip.
    exchanges: Vec<Exchange>,
    stream: Arc<CudaStream>,
}

impl OnDevice {
    /// # Errors
    /// Those of [`CudaProbe::new`].
    pub fn new(device: &CudaDevice, plan: Plan, config: Config) -> Result<Self, Error> {
        let stream = device.cuda_stream();
        let probe = CudaProbe::new(&stream, plan, config)?;
        Ok(Self { probe, measured: false, exchanges: Vec::new(), stream })
    }

    /// Launches the measurement of the gradients, and of the weights if there are any.
    ///
    /// # Errors
    /// The probe's.
    pub fn measure(&mut self, gradients: &[Tensor], weights: Option<&[Tensor]>) -> Result<(), Error> {
        let gradients = locked(gradients);
        let gradients: Vec<View<'_>> = gradients.iter().map(view).collect();
        let gradients: Vec<&dyn DeviceTensor> = gradients.iter().map(View::tensor).collect();
        match weights {
            None => self.probe.measure(&gradients),
            Some(weights) => {
                let weights = locked(weights);
                let weights: Vec<View<'_>> = weights.iter().map(view).collect();
                let weights: Vec<&dyn DeviceTensor> = weights.iter().map(View::tensor).collect();
                self.probe.measure_with_weights(&gradients, &weights)
            }
        }?;
        self.measured = true;
        Ok(())
    }

    /// The histograms of the gradients. Waits for them.
    ///
    /// # Errors
    /// The probe's.
    pub fn histogram(&mut self, gradients: &[Tensor]) -> Result<HistogramReport, Error> {
        let gradients = locked(gradients);
        let gradients: Vec<View<'_>> = gradients.iter().map(view).collect();
        let gradients: Vec<&dyn DeviceTensor> = gradients.iter().map(View::tensor).collect();
        self.probe.histogram(&gradients)
    }

    /// Launches the clip of the gradients, each in memory of its own, by the last measurement.
    ///
    /// # Errors
    /// The probe's.
    pub fn clip(&mut self, gradients: &[Tensor]) -> Result<(), Error> {
        while self.exchanges.len() < gradients.len() {
            let byte = self.stream.alloc_zeros::<u8>(1).map_err(|error| Error::Driver {
                call: "allocating a byte",
                // Its `Display` asks the driver, and panics without one.
                code: format!("{:?}", error.0),
            })?;
            self.exchanges.push(Exchange(RefCell::new(CudaStorageSlice::U8(byte))));
        }
        exchange(gradients, &self.exchanges);
        let clipped = {
            let mut storages: Vec<_> = self.exchanges.iter().map(|exchange| exchange.0.borrow_mut()).collect();
            let pairs = storages.iter_mut().zip(gradients);
            let mut views: Vec<_> = pairs.map(|(storage, of)| view_mut(storage, range(of.layout()))).collect();
            let mut views: Vec<&mut dyn DeviceTensorMut> = views.iter_mut().map(ViewMut::tensor).collect();
            self.probe.clip(&mut views)
        };
        exchange(gradients, &self.exchanges);
        clipped
    }
}

/// A storage that changes places with that of a tensor: the one way to a tensor's memory that candle opens.
struct Exchange(RefCell<CudaStorageSlice>);

impl InplaceOp1 for Exchange {
    fn name(&self) -> &'static str {
        "gradprobe-exchange"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> CandleResult<()> {
        bail!("{} is for CUDA devices", self.name())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> CandleResult<()> {
        mem::swap(&mut storage.slice, &mut self.0.borrow_mut());
        Ok(())
    }
}

fn exchange(gradients: &[Tensor], exchanges: &[Exchange]) {
    for (gradient, exchange) in gradients.iter().zip(exchanges) {
        gradient.inplace_op1(exchange).expect("it is on a CUDA device, where exchanging cannot fail");
    }
}

/// Elements of a tensor in candle's memory.
enum View<'a> {
    F32(CudaView<'a, f32>),
    F16(CudaView<'a, half::f16>),
    BF16(CudaView<'a, half::bf16>),
}

/// The same to be changed.
enum ViewMut<'a> {
    F32(CudaViewMut<'a, f32>),
    F16(CudaViewMut<'a, half::f16>),
    BF16(CudaViewMut<'a, half::bf16>),
}

impl View<'_> {
    fn tensor(&self) -> &dyn DeviceTensor {
        match self {
            Self::F32(view) => view,
            Self::F16(view) => view,
            Self::BF16(view) => view,
        }
    }
}

impl ViewMut<'_> {
    fn tensor(&mut self) -> &mut dyn DeviceTensorMut {
        match self {
            Self::F32(view) => view,
            Self::F16(view) => view,
            Self::BF16(view) => view,
        }
    }
}

fn view<'a>((storage, range): &'a (StorageRef<'_>, Range<usize>)) -> View<'a> {
    let Storage::Cuda(storage) = &**storage else { unreachable!("device was checked") };
    let range = range.clone();
    match &storage.slice {
        CudaStorageSlice::F32(all) => View::F32(all.slice(range)),
        CudaStorageSlice::F16(all) => View::F16(all.slice(range)),
        CudaStorageSlice::BF16(all) => View::BF16(all.slice(range)),
        _ => unreachable!("type was checked"),
    }
}

fn view_mut(storage: &mut CudaStorageSlice, range: Range<usize>) -> ViewMut<'_> {
    match storage {
        CudaStorageSlice::F32(all) => ViewMut::F32(all.slice_mut(range)),
        CudaStorageSlice::F16(all) => ViewMut::F16(all.slice_mut(range)),
        CudaStorageSlice::BF16(all) => ViewMut::BF16(all.slice_mut(range)),
        _ => unreachable!("type was checked"),
    }
}
