//! Where addresses become slices: what a launch's arguments name, for loops that know only slices.
#![allow(unsafe_code, reason = "makes slices of the addresses that the probe vouches for")]

use crate::{
    HostTensor, HostTensorMut,
    probe::{Common, TensorEntry},
};
use bytemuck::Pod;

/// The word of whoever launches a kernel for all addresses in its arguments. Kernels ask for the tables that their
/// arguments name, by the types and lengths with which the rooms made them. When they ask for a table to change it, no
/// slice of it is in use: the compiler does not see that, and these functions are for `cpu.rs` files alone.
pub(crate) struct Memory(());

impl Memory {
    /// # Safety
    /// As of [`Device::launch`](crate::device::Device::launch), of host memory, until this is dropped.
    pub unsafe fn vouched_for() -> Self {
        Self(())
    }

    /// So many values at an address; none at 0, where there is no such table.
    pub fn slice<T: Pod>(&self, address: u64, count: usize) -> &[T] {
        if address == 0 || count == 0 {
            return &[];
        }
        // SAFETY: vouched for, with counts that are those with which the tables were made.
        unsafe { std::slice::from_raw_parts(address as *const T, count) }
    }

    /// The same, to be changed.
    #[expect(clippy::mut_from_ref, reason = "of the memory, not of this token")]
    pub fn slice_mut<T: Pod>(&self, address: u64, count: usize) -> &mut [T] {
        if address == 0 || count == 0 {
            return &mut [];
        }
        // SAFETY: as above; no two tables overlap, and no slice of this one is in use.
        unsafe { std::slice::from_raw_parts_mut(address as *mut T, count) }
    }

    /// The tensors' table.
    pub fn entries(&self, a: &Common) -> &[TensorEntry] {
        self.slice(a.tensors, a.tensor_count as usize)
    }

    /// The elements of a tensor; none where it is absent.
    pub fn tensor(&self, address: u64, length: u64, dtype: u32) -> HostTensor<'_> {
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        match dtype {
            0 => HostTensor::F32(self.slice(address, count)),
            1 => HostTensor::F16(self.slice(address, count)),
            _ => HostTensor::BF16(self.slice(address, count)),
        }
    }

    /// The same, to be changed.
    pub fn tensor_mut(&self, address: u64, length: u64, dtype: u32) -> HostTensorMut<'_> {
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        match dtype {
            0 => HostTensorMut::F32(self.slice_mut(address, count)),
            1 => HostTensorMut::F16(self.slice_mut(address, count)),
            _ => HostTensorMut::BF16(self.slice_mut(address, count)),
        }
    }

    /// The tensors, to be read.
    pub fn tensors(&self, a: &Common) -> Vec<HostTensor<'_>> {
        let addresses: &[u64] = self.slice(a.addresses, a.tensor_count as usize);
        let of = |(&address, entry): (&u64, &TensorEntry)| self.tensor(address, entry.length, entry.dtype.into());
        addresses.iter().zip(self.entries(a)).map(of).collect()
    }

    /// The tensors, to be changed.
    pub fn tensors_mut(&self, a: &Common) -> Vec<HostTensorMut<'_>> {
        let addresses: &[u64] = self.slice(a.addresses, a.tensor_count as usize);
        let of = |(&address, entry): (&u64, &TensorEntry)| self.tensor_mut(address, entry.length, entry.dtype.into());
        addresses.iter().zip(self.entries(a)).map(of).collect()
    }
}
