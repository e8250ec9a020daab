//! Page-locked memory: the only host memory whose copies do not block.

use super::{
    device::Relaxed,
    driver::{failed, insist, make_current, not_allocated},
};
use crate::{Error, device::Buffer};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result};
use std::{cell::Cell, collections::VecDeque, ptr::NonNull, sync::Arc};

/// Page-locked memory, and the event at the end of the last copy from or to it. cudarc's own `PinnedHostSlice` records
/// no event in a context with one stream, and its memory is write-combined, which is slow to read.
pub(super) struct Pinned {
    memory: NonNull<u8>,
    bytes: usize,
    over: Arc<CudaEvent>,
    /// Whether the event is known to have come, so that it is not asked again.
    is_over: Cell<bool>,
}

// SAFETY: the memory belongs to this value alone; the device uses it only until the event.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A copy may be under way. Errors have nowhere to go, and memory that may still be used is not freed.
        if insist(|| self.wait().map(drop)).is_ok() {
            let _relaxed = Relaxed::new();
            // SAFETY: allocated by `malloc_host`, and no copy from or to it is under way.
            let _ = unsafe { result::free_host(self.memory.as_ptr().cast()) };
        }
    }
}

impl Pinned {
    /// Allocates this many bytes, at least 1, all 0.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or the driver's.
    pub fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, Error> {
        let _relaxed = Relaxed::new();
        make_current(context)?;
        let over = Arc::new(context.new_event(None).map_err(failed("cuEventCreate", "making an event"))?);
        // SAFETY: freed in `drop`, once.
        let memory = unsafe { result::malloc_host(bytes, 0) }.map_err(not_allocated(
            "cuMemHostAlloc",
            "allocating page-locked memory",
            bytes,
        ))?;
        let memory = NonNull::new(memory.cast::<u8>()).ok_or(Error::OutOfMemory { bytes: bytes as u64 })?;
        // SAFETY: `bytes` bytes were just allocated there.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Self { memory, bytes, over, is_over: Cell::new(true) })
    }

    /// The event that [`download`](Self::download) records.
    pub fn event(&self) -> &Arc<CudaEvent> {
        &self.over
    }

    /// Whether no copy is under way; never waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn is_over(&self) -> Result<bool, Error> {
        if !self.is_over.get() {
            let _relaxed = Relaxed::new();
            self.is_over
                .set(self.over.try_is_complete().map_err(failed("cuEventQuery", "asking whether a copy is over"))?);
        }
        Ok(self.is_over.get())
    }

    /// Waits for the copy under way, and gives the memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(&self) -> Result<&[u8], Error> {
        if !self.is_over.get() {
            let _relaxed = Relaxed::new();
            self.over.synchronize().map_err(failed("cuEventSynchronize", "waiting for a copy"))?;
            self.is_over.set(true);
        }
        // SAFETY: initialised when allocated, and no copy is under way.
        Ok(unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.bytes) })
    }

    /// Copies the start of a buffer here, in the order of the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn download(&mut self, from: &Buffer, stream: &CudaStream) -> Result<(), Error> {
        make_current(stream.context())?;
        let count = self.bytes.min(from.bytes());
        // SAFETY: there are so many bytes, which nobody else uses.
        let memory = unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), count) };
        // SAFETY: the buffer holds as many bytes, and the memory outlives the copy: its `drop` waits for it.
        unsafe { result::memcpy_dtoh_async(memory, from.address(), stream.cu_stream()) }
            .map_err(failed("cuMemcpyDtoHAsync", "copying results to the host"))?;
        self.note(stream)
    }

    /// Copies these bytes, no more than either holds, to the start of a buffer, in the order of the stream. No copy from
    /// here may be under way.
    ///
    /// # Errors
    /// The driver's.
    fn upload(&mut self, bytes: &[u8], to: &Buffer, stream: &CudaStream) -> Result<(), Error> {
        make_current(stream.context())?;
        let count = bytes.len().min(self.bytes).min(to.bytes());
        // SAFETY: there are so many bytes, which nobody else uses.
        let memory = unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), count) };
        memory.copy_from_slice(&bytes[..count]);
        // SAFETY: the buffer holds as many bytes, and the memory outlives the copy and is not changed before its end:
        // `drop` and the next upload wait for it.
        unsafe { result::memcpy_htod_async(to.address(), memory, stream.cu_stream()) }
            .map_err(failed("cuMemcpyHtoDAsync", "copying to the device"))?;
        self.note(stream)
    }

    /// Notes that a copy has been queued.
    fn note(&mut self, stream: &CudaStream) -> Result<(), Error> {
        self.is_over.set(false);
        let recorded = self.over.record(stream);
        if recorded.is_err() {
            // The end of this copy cannot be known. If it cannot be waited for either, the context is lost, and there
            // are no copies any more.
            let _ = stream.synchronize();
        }
        recorded.map_err(failed("cuEventRecord", "noting the end of a copy"))
    }
}

/// Page-locked memory for copies to the device, used again once its copy is over. Where none is free, more is
/// allocated, without a wait: in the end as many pieces as copies were under way at one time.
#[derive(Default)]
pub(super) struct Uploads {
    /// The least recently used first.
    slots: VecDeque<Pinned>,
}

impl Uploads {
    /// Pieces that are large enough before one is used again. Making a probe's tables leaves them, so that a host no
    /// further ahead of the device allocates none in a step.
    const SLOTS: usize = 4;
    /// The memory is locked by the page.
    const PAGE: usize = 4096;

    /// Copies these bytes, no more than the buffer holds, to its start, in the order of the stream, which is the same
    /// for all copies. They may change once this returns.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or the driver's.
    pub fn upload(&mut self, bytes: &[u8], to: &Buffer, stream: &Arc<CudaStream>) -> Result<(), Error> {
        let bytes = &bytes[..bytes.len().min(to.bytes())];
        if bytes.is_empty() {
            return Ok(());
        }
        let mut slot = match self.free(bytes.len())? {
            Some(slot) => slot,
            None => Pinned::new(stream.context(), bytes.len().next_multiple_of(Self::PAGE))?,
        };
        let uploaded = slot.upload(bytes, to, stream);
        self.slots.push_back(slot);
        uploaded
    }

    /// Gives a slot of at least so many bytes without a copy under way, if there are enough. Copies of one stream end
    /// in order: if the oldest is not over, none is.
    fn free(&mut self, bytes: usize) -> Result<Option<Pinned>, Error> {
        let mut large = self.slots.iter().enumerate().filter(|(_, slot)| slot.bytes >= bytes);
        let oldest = large.next();
        if large.count() + 1 < Self::SLOTS {
            return Ok(None);
        }
        match oldest {
            Some((index, slot)) if slot.is_over()? => Ok(self.slots.remove(index)),
            _ => Ok(None),
        }
    }
}
