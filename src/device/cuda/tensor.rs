//! cudarc's slices and views as tensors, of any element type.

use super::driver::earlier_errors;
use crate::{
    DType, Element, Error, Tensor, TensorMut,
    tensor::{Lent, Place},
};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};
use std::sync::Arc;

/// Gives the stream on which kernels read the slice, if it is of the slice's own context.
///
/// # Errors
/// [`Error::WrongDevice`].
fn stream_of<'a, T>(slice: &impl DeviceSlice<T>, place: &'a Place) -> Result<&'a Arc<CudaStream>, Error> {
    let wrong = |what| Err(Error::WrongDevice { name: String::new(), what });
    match place {
        // Not by value: two contexts of one device are equal, and neither waits for the other's streams.
        Place::Stream(stream) if Arc::ptr_eq(slice.stream().context(), stream.context()) => Ok(stream),
        Place::Stream(_) => wrong("belongs to another `CudaContext` than the probe's stream: make both from one"),
        Place::Host => wrong("lies on a CUDA device, and the probe is on the CPU: make it with `Cuda::new`"),
    }
}

/// Lets cudarc record the use of a slice.
///
/// # Errors
/// The driver's. Without the record, other streams do not wait for the use.
pub(crate) fn note(note: SyncOnDrop<'_>, stream: &CudaStream) -> Result<(), Error> {
    drop(note);
    earlier_errors(stream.context())
}

macro_rules! tensor {
    ($($tensor:ty),*) => {
        // SAFETY: a slice of that type and length, in memory of this context; cudarc has the stream wait for its writers,
        // notes the read when the guard is dropped, and frees memory in the order of its stream.
        $(unsafe impl<T: Element> Tensor for $tensor {
            fn shape(&self) -> Option<(DType, u64)> {
                Some((T::DTYPE, DeviceSlice::len(self) as u64))
            }
            fn lend<'a>(&'a self, place: &'a Place) -> Result<Lent<'a>, Error> {
                let stream = stream_of(self, place)?;
                let (address, note) = self.device_ptr(stream);
                Ok(Lent::noted(address, note, stream))
            }
        })*
    };
}
tensor!(CudaSlice<T>, CudaView<'_, T>, CudaViewMut<'_, T>);

macro_rules! tensor_mut {
    ($($tensor:ty),*) => {
        // SAFETY: as above, and the slice is borrowed mutably.
        $(unsafe impl<T: Element> TensorMut for $tensor {
            fn lend_mut<'a>(&'a mut self, place: &'a Place) -> Result<Lent<'a>, Error> {
                let stream = stream_of(self, place)?;
                let (address, note) = self.device_ptr_mut(stream);
                Ok(Lent::noted(address, note, stream))
            }
        })*
    };
}
tensor_mut!(CudaSlice<T>, CudaViewMut<'_, T>);
