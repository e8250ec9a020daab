//! Turns the addresses of a launch's arguments into slices, for loops that know only slices.
#![allow(unsafe_code, reason = "makes slices of the addresses that the probe vouches for")]

use crate::{
    HostTensor, HostTensorMut,
    probe::{Common, TensorEntry},
};
use bytemuck::Pod;

/// Tables of values at addresses: `&[T]` to be read, `&mut [T]` to be changed, and tuples of them.
pub(crate) trait Tables: Sized {
    /// An address and a number of values; for a tuple those of each.
    type At;

    /// Gives the tables. The address 0 gives an empty one.
    ///
    /// # Safety
    /// That many initialised values of that type are there, as long as the tables are used. A table that is changed has
    /// no other user meanwhile.
    unsafe fn at(at: Self::At) -> Self;
}

impl<T: Pod> Tables for &[T] {
    type At = (u64, usize);

    unsafe fn at((address, count): Self::At) -> Self {
        if address == 0 || count == 0 {
            return &[];
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(address as *const T, count) }
    }
}

impl<T: Pod> Tables for &mut [T] {
    type At = (u64, usize);

    unsafe fn at((address, count): Self::At) -> Self {
        if address == 0 || count == 0 {
            return &mut [];
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(address as *mut T, count) }
    }
}

macro_rules! tuples {
    ($($($table:ident)+;)*) => {
        $(impl<$($table: Tables),+> Tables for ($($table,)+) {
            type At = ($($table::At,)+);

            #[expect(non_snake_case, reason = "a table is named as its type")]
            unsafe fn at(($($table,)+): Self::At) -> Self {
                // SAFETY: the caller's promise, of each.
                ($(unsafe { $table::at($table) },)+)
            }
        })*
    };
}
tuples! {
    A B;
    A B C;
    A B C D;
}

/// Gives the elements of a tensor; none where it is absent.
///
/// # Safety
/// As of [`Tables::at`].
pub(crate) unsafe fn tensor<'a>(address: u64, length: u64, dtype: u32) -> HostTensor<'a> {
    let at = (address, usize::try_from(length).unwrap_or(usize::MAX));
    match dtype {
        // SAFETY: the caller's promise, here and below.
        0 => HostTensor::F32(unsafe { Tables::at(at) }),
        // SAFETY: as above.
        1 => HostTensor::F16(unsafe { Tables::at(at) }),
        // SAFETY: as above.
        _ => HostTensor::BF16(unsafe { Tables::at(at) }),
    }
}

/// Gives the same, to be changed.
///
/// # Safety
/// As of [`Tables::at`].
pub(crate) unsafe fn tensor_mut<'a>(address: u64, length: u64, dtype: u32) -> HostTensorMut<'a> {
    let at = (address, usize::try_from(length).unwrap_or(usize::MAX));
    match dtype {
        // SAFETY: the caller's promise, here and below.
        0 => HostTensorMut::F32(unsafe { Tables::at(at) }),
        // SAFETY: as above.
        1 => HostTensorMut::F16(unsafe { Tables::at(at) }),
        // SAFETY: as above.
        _ => HostTensorMut::BF16(unsafe { Tables::at(at) }),
    }
}

/// Gives the tables of the tensors of a launch: their addresses and their entries.
///
/// # Safety
/// As of [`tensors`].
unsafe fn tables<'a>(a: &Common) -> (&'a [u64], &'a [TensorEntry]) {
    let count = a.tensor_count as usize;
    // SAFETY: the caller's promise.
    unsafe { Tables::at(((a.addresses, count), (a.tensors, count))) }
}

/// Gives the tensors of a launch, to be read, and their table.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch), of host memory, as long as they are used.
pub(crate) unsafe fn tensors<'a>(a: &Common) -> (Vec<HostTensor<'a>>, &'a [TensorEntry]) {
    // SAFETY: the caller's promise.
    let (addresses, entries) = unsafe { tables(a) };
    let of = |(&address, entry): (&u64, &TensorEntry)| {
        // SAFETY: the caller's promise.
        unsafe { tensor(address, entry.length, entry.dtype.into()) }
    };
    (addresses.iter().zip(entries).map(of).collect(), entries)
}

/// Gives the same, to be changed.
///
/// # Safety
/// As of [`tensors`].
pub(crate) unsafe fn tensors_mut<'a>(a: &Common) -> (Vec<HostTensorMut<'a>>, &'a [TensorEntry]) {
    // SAFETY: the caller's promise.
    let (addresses, entries) = unsafe { tables(a) };
    let of = |(&address, entry): (&u64, &TensorEntry)| {
        // SAFETY: the caller's promise; tensors to be changed do not overlap.
        unsafe { tensor_mut(address, entry.length, entry.dtype.into()) }
    };
    (addresses.iter().zip(entries).map(of).collect(), entries)
}
