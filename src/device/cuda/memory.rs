//! Memory of the device.

use super::{
    device::{Relaxed, is_capturing},
    driver::{insist, make_current, not_allocated},
};
use crate::Error;
use cudarc::driver::{CudaStream, result};
use std::sync::Arc;

/// Bytes allocated and freed in the order of a stream. Not one of cudarc's slices: those have two events each, which
/// are not needed here, and lose the memory when an event cannot be made.
#[derive(Debug)]
pub(super) struct Memory {
    address: u64,
    stream: Arc<CudaStream>,
}

impl Memory {
    /// Allocates so many bytes, at least 1, with any content.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or the driver's.
    pub fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self, Error> {
        make_current(stream.context())?;
        let not_allocated = |call| not_allocated(call, "allocating device memory", bytes);
        // Without memory pools, as on some virtual GPUs, in no stream's order.
        let address = if stream.context().has_async_alloc() {
            // SAFETY: the stream is alive; the memory is written before it is read.
            unsafe { result::malloc_async(stream.cu_stream(), bytes) }.map_err(not_allocated("cuMemAllocAsync"))?
        } else {
            let _relaxed = Relaxed::new();
            // SAFETY: as above.
            unsafe { result::malloc_sync(bytes) }.map_err(not_allocated("cuMemAlloc"))?
        };
        Ok(Self { address, stream: Arc::clone(stream) })
    }

    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // In a capture the free would become a part of the graph. There, and where the state is unknown, the memory is
        // not freed.
        if insist(|| is_capturing(&self.stream)) != Ok(false) {
            return;
        }
        // Errors have nowhere to go.
        let _ = if self.stream.context().has_async_alloc() {
            // SAFETY: allocated by `new`, and freed once, after all queued work.
            unsafe { result::free_async(self.address, self.stream.cu_stream()) }
        } else {
            let _relaxed = Relaxed::new();
            // SAFETY: the same; it waits for the device.
            unsafe { result::free_sync(self.address) }
        };
    }
}
