//! cudarc's slices and views as tensors, whatever their element type.

use crate::{DType, Element};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop,
};
use std::sync::Arc;

/// Elements in device memory that can be measured: `CudaSlice`, `CudaView` and `CudaViewMut` of an [`Element`].
pub trait DeviceTensor {
    /// Type of the elements.
    fn dtype(&self) -> DType;
    /// Number of elements.
    fn element_count(&self) -> usize;
    /// The context the memory belongs to.
    fn context(&self) -> &Arc<CudaContext>;
    /// The address, with `stream` made to wait for writes by other streams as cudarc tracks them. Drop the guard once
    /// the read is launched.
    fn read_address<'a>(&'a self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>);
}

/// Elements in device memory that can be clipped in place.
pub trait DeviceTensorMut: DeviceTensor {
    /// The address, with `stream` made to wait for other uses. Drop the guard once the write is launched.
    fn write_address<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>);
}

macro_rules! device_tensor {
    ($($tensor:ty),*) => {
        $(impl<T: Element> DeviceTensor for $tensor {
            fn dtype(&self) -> DType {
                T::DTYPE
            }
            fn element_count(&self) -> usize {
                DeviceSlice::len(self)
            }
            fn context(&self) -> &Arc<CudaContext> {
                DeviceSlice::stream(self).context()
            }
            fn read_address<'a>(&'a self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
                self.device_ptr(stream)
            }
        })*
    };
}
device_tensor!(CudaSlice<T>, CudaView<'_, T>, CudaViewMut<'_, T>);

macro_rules! device_tensor_mut {
    ($($tensor:ty),*) => {
        $(impl<T: Element> DeviceTensorMut for $tensor {
            fn write_address<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
                self.device_ptr_mut(stream)
            }
        })*
    };
}
device_tensor_mut!(CudaSlice<T>, CudaViewMut<'_, T>);
