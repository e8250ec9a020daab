//! candle's memory for the probe: read in place, and taken out of its tensors for a clip. A clip changes all gradients
//! together, while candle gives one at a time. Only the owner of the memory moves, the memory does not.

use crate::gradients::range;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result as CandleResult, Storage, StorageRef, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, cuda_backend::CudaStorageSlice};
#[cfg(feature = "cuda")]
use gradprobe::cudarc::driver::{CudaView, CudaViewMut};
use gradprobe::{Absent, Error, HostTensor, HostTensorMut, TensorMut};
use std::{cell::RefCell, mem, ops::Range};

/// Gives the result of `does` on these contiguous tensors, each locked against writers.
pub fn with_views<R>(tensors: &[Option<Tensor>], does: impl FnOnce(&[&dyn gradprobe::Tensor]) -> R) -> R {
    let lock = |tensor| {
        let (storage, layout) = Tensor::storage_and_layout(tensor);
        (storage, range(layout))
    };
    let locked: Vec<Option<(StorageRef<'_>, Range<usize>)>> =
        tensors.iter().map(|tensor| tensor.as_ref().map(lock)).collect();
    let views: Vec<Option<View<'_>>> = locked.iter().map(|locked| locked.as_ref().map(view)).collect();
    let given: Vec<&dyn gradprobe::Tensor> =
        views.iter().map(|view| view.as_ref().map_or(&Absent as _, View::tensor)).collect();
    does(&given)
}

/// Gives the result of `does` on these contiguous tensors, each in memory of its own and taken out of its tensor
/// meanwhile. `exchanges` has one a tensor.
pub fn with_views_mut<R>(
    tensors: &[Option<Tensor>],
    exchanges: &[Exchange],
    does: impl FnOnce(&mut [&mut dyn TensorMut]) -> R,
) -> R {
    let exchange = || {
        for (tensor, exchange) in tensors.iter().zip(exchanges) {
            if let Some(tensor) = tensor {
                tensor.inplace_op1(exchange).expect("it is on the device of the exchange, which cannot fail");
            }
        }
    };
    exchange();
    let done = {
        let mut held: Vec<_> = exchanges.iter().map(|exchange| exchange.0.borrow_mut()).collect();
        let pairs = held.iter_mut().zip(tensors);
        let mut views: Vec<Option<ViewMut<'_>>> =
            pairs.map(|(held, tensor)| tensor.as_ref().map(|of| view_mut(held, range(of.layout())))).collect();
        let mut absent = vec![Absent; tensors.len()];
        let given = views.iter_mut().zip(&mut absent);
        let mut given: Vec<&mut dyn TensorMut> =
            given.map(|(view, absent)| view.as_mut().map_or(absent as _, ViewMut::tensor)).collect();
        does(&mut given)
    };
    exchange();
    done
}

/// Storage that changes places with that of a tensor: the only way to a tensor's memory that candle opens.
#[derive(Debug)]
pub struct Exchange(RefCell<Held>);

#[derive(Debug)]
enum Held {
    Cpu(CpuStorage),
    #[cfg(feature = "cuda")]
    Cuda(CudaStorageSlice),
}

impl Exchange {
    /// Makes it for a tensor on this device, which was checked. On a CUDA device a byte stands in the tensor's place.
    ///
    /// # Errors
    /// The driver's.
    pub fn on(device: &Device) -> Result<Self, Error> {
        let held = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let byte = device.cuda_stream().alloc_zeros::<u8>(1).map_err(|error| Error::Driver {
                    call: "cuMemAllocAsync",
                    doing: "allocating a byte".to_owned(),
                    // Its `Display` asks the driver, and panics without one.
                    code: format!("{:?}", error.0),
                })?;
                Held::Cuda(CudaStorageSlice::U8(byte))
            }
            _ => Held::Cpu(CpuStorage::U8(Vec::new())),
        };
        Ok(Self(RefCell::new(held)))
    }
}

impl InplaceOp1 for Exchange {
    fn name(&self) -> &'static str {
        "gradprobe-exchange"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> CandleResult<()> {
        match &mut *self.0.borrow_mut() {
            Held::Cpu(held) => mem::swap(storage, held),
            #[cfg(feature = "cuda")]
            Held::Cuda(_) => candle_core::bail!("{} is for a CUDA device", self.name()),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> CandleResult<()> {
        match &mut *self.0.borrow_mut() {
            Held::Cuda(held) => mem::swap(&mut storage.slice, held),
            Held::Cpu(_) => candle_core::bail!("{} is for the CPU", self.name()),
        }
        Ok(())
    }
}

/// Elements of a tensor in candle's memory.
enum View<'a> {
    Host(HostTensor<'a>),
    #[cfg(feature = "cuda")]
    F32(CudaView<'a, f32>),
    #[cfg(feature = "cuda")]
    F16(CudaView<'a, half::f16>),
    #[cfg(feature = "cuda")]
    BF16(CudaView<'a, half::bf16>),
}

/// The same to be changed.
enum ViewMut<'a> {
    Host(HostTensorMut<'a>),
    #[cfg(feature = "cuda")]
    F32(CudaViewMut<'a, f32>),
    #[cfg(feature = "cuda")]
    F16(CudaViewMut<'a, half::f16>),
    #[cfg(feature = "cuda")]
    BF16(CudaViewMut<'a, half::bf16>),
}

impl View<'_> {
    fn tensor(&self) -> &dyn gradprobe::Tensor {
        match self {
            Self::Host(view) => view,
            #[cfg(feature = "cuda")]
            Self::F32(view) => view,
            #[cfg(feature = "cuda")]
            Self::F16(view) => view,
            #[cfg(feature = "cuda")]
            Self::BF16(view) => view,
        }
    }
}

impl<'a> ViewMut<'a> {
    fn tensor(&mut self) -> &mut (dyn TensorMut + 'a) {
        match self {
            Self::Host(view) => view,
            #[cfg(feature = "cuda")]
            Self::F32(view) => view,
            #[cfg(feature = "cuda")]
            Self::F16(view) => view,
            #[cfg(feature = "cuda")]
            Self::BF16(view) => view,
        }
    }
}

fn view<'a>((storage, range): &'a (StorageRef<'_>, Range<usize>)) -> View<'a> {
    let range = range.clone();
    match &**storage {
        Storage::Cpu(CpuStorage::F32(all)) => View::Host(HostTensor::F32(&all[range])),
        Storage::Cpu(CpuStorage::F16(all)) => View::Host(HostTensor::F16(&all[range])),
        Storage::Cpu(CpuStorage::BF16(all)) => View::Host(HostTensor::BF16(&all[range])),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => match &storage.slice {
            CudaStorageSlice::F32(all) => View::F32(all.slice(range)),
            CudaStorageSlice::F16(all) => View::F16(all.slice(range)),
            CudaStorageSlice::BF16(all) => View::BF16(all.slice(range)),
            _ => unreachable!("type was checked"),
        },
        _ => unreachable!("device and type were checked"),
    }
}

fn view_mut(held: &mut Held, range: Range<usize>) -> ViewMut<'_> {
    match held {
        Held::Cpu(CpuStorage::F32(all)) => ViewMut::Host(HostTensorMut::F32(&mut all[range])),
        Held::Cpu(CpuStorage::F16(all)) => ViewMut::Host(HostTensorMut::F16(&mut all[range])),
        Held::Cpu(CpuStorage::BF16(all)) => ViewMut::Host(HostTensorMut::BF16(&mut all[range])),
        #[cfg(feature = "cuda")]
        Held::Cuda(CudaStorageSlice::F32(all)) => ViewMut::F32(all.slice_mut(range)),
        #[cfg(feature = "cuda")]
        Held::Cuda(CudaStorageSlice::F16(all)) => ViewMut::F16(all.slice_mut(range)),
        #[cfg(feature = "cuda")]
        Held::Cuda(CudaStorageSlice::BF16(all)) => ViewMut::BF16(all.slice_mut(range)),
        _ => unreachable!("type was checked"),
    }
}
