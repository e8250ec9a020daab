//! Host memory in place of a device's.
#![allow(unsafe_code, reason = "allocates, and reads and writes what it allocated")]

use super::{Buffer, Read};
use crate::Error;
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ptr::NonNull,
};

/// Zeroed memory, aligned to 256 bytes.
#[derive(Debug)]
pub struct HostMemory {
    memory: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory.
unsafe impl Send for HostMemory {}

impl HostMemory {
    const ALIGNMENT: usize = 256;

    /// Allocates this many bytes, at least 1.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(bytes: usize) -> Result<Self, Error> {
        let layout = Layout::from_size_align(bytes.max(1), Self::ALIGNMENT)
            .map_err(|_| Error::OutOfMemory { bytes: bytes as u64 })?;
        // SAFETY: the layout has at least one byte.
        let memory = unsafe { alloc_zeroed(layout) };
        Ok(Self { memory: NonNull::new(memory).ok_or(Error::OutOfMemory { bytes: bytes as u64 })?, layout })
    }

    /// The address of the first byte.
    pub fn address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    /// Gives bytes of the host.
    ///
    /// # Safety
    /// They exist, are initialised, and do not change meanwhile.
    pub unsafe fn bytes<'a>(address: u64, count: usize) -> &'a [u8] {
        // SAFETY: the caller's promise.
        if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(address as *const u8, count) } }
    }

    /// Gives bytes of the host, to be changed.
    ///
    /// # Safety
    /// They exist, are initialised, and have no other user meanwhile.
    pub unsafe fn bytes_mut<'a>(address: u64, count: usize) -> &'a mut [u8] {
        // SAFETY: the caller's promise.
        if count == 0 { &mut [] } else { unsafe { std::slice::from_raw_parts_mut(address as *mut u8, count) } }
    }

    /// Writes to the start of a buffer, at most all of it.
    ///
    /// # Safety
    /// The buffer is memory of the host, which nothing else uses meanwhile.
    pub unsafe fn upload(bytes: &[u8], to: &Buffer) {
        let count = bytes.len().min(to.bytes());
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.address() as *mut u8, count) };
    }

    /// Fills a buffer.
    ///
    /// # Safety
    /// As for [`upload`](Self::upload).
    pub unsafe fn fill(byte: u8, buffer: &Buffer) {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::write_bytes(buffer.address() as *mut u8, byte, buffer.bytes()) };
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, once.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) };
    }
}

/// A copy of such memory, made at once.
#[derive(Debug)]
pub struct HostRead {
    memory: HostMemory,
    bytes: usize,
}

impl HostRead {
    /// Makes room for this many bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(bytes: usize) -> Result<Self, Error> {
        Ok(Self { memory: HostMemory::new(bytes)?, bytes })
    }
}

impl Read for HostRead {
    fn start(&mut self, from: &Buffer) -> Result<(), Error> {
        let count = self.bytes.min(from.bytes());
        // SAFETY: devices on the host make this of the buffers that they make, and run nothing while it copies.
        unsafe { std::ptr::copy_nonoverlapping(from.address() as *const u8, self.memory.memory.as_ptr(), count) };
        Ok(())
    }

    fn is_complete(&self) -> Result<bool, Error> {
        Ok(true)
    }

    fn wait(&self) -> Result<&[u8], Error> {
        // SAFETY: its own memory, zeroed when it was made, which only `start` changes.
        Ok(unsafe { HostMemory::bytes(self.memory.address(), self.bytes) })
    }
}
