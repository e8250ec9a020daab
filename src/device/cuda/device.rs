//! A CUDA stream as a [`Device`]: everything is ordered on it, and nothing waits but a read that is waited for.

use super::{driver::failed, module};
use crate::{
    Error,
    device::{Buffer, Device, Kernel, Read},
    tensor::Place,
};
use cudarc::driver::{
    CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, result,
    sys::{self, CUdevice_attribute_enum as Attribute, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus as Status},
};
use std::{cell::Cell, mem, ptr::NonNull, sync::Arc};

/// A stream of a CUDA device, as a device of a probe.
pub struct Cuda {
    stream: Arc<CudaStream>,
    /// In the order of [`Kernel::ALL`], with the blocks that fill the device.
    kernels: Vec<(CudaFunction, u32)>,
}

impl Cuda {
    /// Loads the kernels into the stream's context. All work of the probe is ordered on the stream.
    ///
    /// # Errors
    /// [`Error::KernelLoad`], or the driver's.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, Error> {
        let context = stream.context();
        let module = module::load(context)?;
        let multiprocessors = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("asking for the multiprocessors"))?;
        let multiprocessors = u32::try_from(multiprocessors).unwrap_or(1);
        let function = |kernel: Kernel| {
            let function = module.load_function(kernel.entry()).map_err(failed("looking up a kernel"))?;
            let blocks = function
                .occupancy_max_active_blocks_per_multiprocessor(kernel.threads(), 0, None)
                .map_err(failed("asking for the occupancy"))?;
            Ok::<_, Error>((function, blocks * multiprocessors))
        };
        let kernels = Kernel::ALL.iter().map(|&kernel| function(kernel)).collect::<Result<_, _>>()?;
        Ok(Self { kernels, stream: Arc::clone(stream) })
    }

    fn bind(&self) -> Result<(), Error> {
        self.stream.context().bind_to_thread().map_err(failed("making the context current"))
    }

    fn kernel(&self, kernel: Kernel) -> &(CudaFunction, u32) {
        &self.kernels[kernel as usize]
    }
}

/// A module must not be unloaded while its kernels are queued. The probe drops its device last.
impl Drop for Cuda {
    fn drop(&mut self) {
        let _relaxed = Relaxed::new();
        // Waiting would break a capture, and where it fails nothing is known: better left.
        if is_capturing(&self.stream) != Ok(false) || self.stream.synchronize().is_err() {
            mem::forget(mem::take(&mut self.kernels));
        }
        self.kernels.clear();
    }
}

fn is_capturing(stream: &CudaStream) -> Result<bool, Error> {
    let status = stream.capture_status().map_err(failed("asking for the capture status"))?;
    Ok(status != Status::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// What was allocated on a stream, and is freed in its order.
struct Freed(Option<CudaSlice<u8>>);

impl Drop for Freed {
    fn drop(&mut self) {
        // In a capture the free would become a part of the graph.
        if let Some(slice) = self.0.take()
            && is_capturing(cudarc::driver::DeviceSlice::stream(&slice)) != Ok(false)
        {
            mem::forget(slice);
        }
    }
}

/// Has this thread make calls that would break captures of other streams, which do not concern them: the driver refuses
/// those to all threads while one captures in global mode.
pub(super) struct Relaxed(CUstreamCaptureMode);

impl Relaxed {
    pub fn new() -> Self {
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a valid address; the mode is this thread's alone.
        let status = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        Self(if status == CUresult::CUDA_SUCCESS { mode } else { CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: as above. A failure has nowhere to go.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.0) };
    }
}

/// Page-locked memory a copy arrives in, and the event that says it has. cudarc's own `PinnedHostSlice` records no
/// event in a context with one stream, and its memory is write-combined, which is slow to read.
struct PinnedRead {
    memory: NonNull<u8>,
    bytes: usize,
    event: CudaEvent,
    /// Whether the event is known to have come: what is asked for once is not asked for again.
    arrived: Cell<bool>,
    stream: Arc<CudaStream>,
}

// SAFETY: the memory belongs to this value alone; the device writes to it only between `start` and the event.
unsafe impl Send for PinnedRead {}

impl Drop for PinnedRead {
    fn drop(&mut self) {
        let _relaxed = Relaxed::new();
        // A copy may be under way. Errors have nowhere to go, and memory that may still be written is better left.
        if self.arrived.get() || self.event.synchronize().is_ok() {
            // SAFETY: allocated by `malloc_host`, and no copy to it is under way.
            let _ = unsafe { result::free_host(self.memory.as_ptr().cast()) };
        }
    }
}

impl Read for PinnedRead {
    fn start(&mut self, from: &Buffer) -> Result<(), Error> {
        self.stream.context().bind_to_thread().map_err(failed("making the context current"))?;
        debug_assert!(self.bytes <= from.bytes());
        self.arrived.set(false);
        // SAFETY: the memory holds that many bytes, and no copy to it is under way: only idle reads are started.
        let memory = unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.bytes) };
        // SAFETY: the buffer holds at least as many bytes, and the memory outlives the copy: its `drop` waits for it.
        unsafe { result::memcpy_dtoh_async(memory, from.address(), self.stream.cu_stream()) }
            .map_err(failed("copying the results to the host"))?;
        self.event.record(&self.stream).map_err(failed("recording an event"))
    }

    fn is_complete(&self) -> Result<bool, Error> {
        if !self.arrived.get() {
            let _relaxed = Relaxed::new();
            self.arrived.set(self.event.try_is_complete().map_err(failed("asking for an event"))?);
        }
        Ok(self.arrived.get())
    }

    fn wait(&self) -> Result<&[u8], Error> {
        if !self.arrived.get() {
            let _relaxed = Relaxed::new();
            self.event.synchronize().map_err(failed("waiting for the results"))?;
            self.arrived.set(true);
        }
        // SAFETY: initialised when allocated, and the copy recorded before the event has arrived.
        Ok(unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.bytes) })
    }
}

// SAFETY: buffers are allocations of their own, freed in the order of the stream, and so not before what uses them; reads
// wait for their copies; the module outlives its kernels.
unsafe impl Device for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn place(&self) -> Place {
        Place::Stream(Arc::clone(&self.stream))
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        let out_of_memory = |error: cudarc::driver::DriverError| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes: bytes as u64 },
            _ => failed("allocating device memory")(error),
        };
        // SAFETY: the callers write before they read, or leave that to the kernels.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) }.map_err(out_of_memory)?;
        let address = slice.device_ptr(&self.stream).0;
        // SAFETY: so many bytes lie there until the slice is dropped.
        Ok(unsafe { Buffer::new(address, bytes, Freed(Some(slice))) })
    }

    fn upload(&self, bytes: &[u8], to: &Buffer) -> Result<(), Error> {
        let count = bytes.len().min(to.bytes());
        if count == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the buffer holds that many bytes. From pageable memory the driver copies to a buffer of its own
        // before it returns, so `bytes` may go; on the device the copy is ordered by the stream.
        unsafe { result::memcpy_htod_async(to.address(), &bytes[..count], self.stream.cu_stream()) }
            .map_err(failed("copying to the device"))
    }

    fn clear(&self, buffer: &Buffer) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: the buffer has that many bytes.
        unsafe { result::memset_d8_async(buffer.address(), 0, buffer.bytes(), self.stream.cu_stream()) }
            .map_err(failed("clearing device memory"))
    }

    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        self.bind()?;
        let _relaxed = Relaxed::new();
        let event = self.stream.context().new_event(None).map_err(failed("making an event"))?;
        let out_of_memory = |error: cudarc::driver::DriverError| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes: bytes as u64 },
            _ => failed("allocating page-locked memory")(error),
        };
        // SAFETY: freed in `drop`, once.
        let memory = unsafe { result::malloc_host(bytes, 0) }.map_err(out_of_memory)?;
        let memory = NonNull::new(memory.cast::<u8>()).ok_or(Error::OutOfMemory { bytes: bytes as u64 })?;
        // SAFETY: `bytes` bytes were just allocated there.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Box::new(PinnedRead { memory, bytes, event, arrived: Cell::new(true), stream: Arc::clone(&self.stream) }))
    }

    unsafe fn launch(&self, kernel: Kernel, blocks: u32, arguments: &[u8]) -> Result<(), Error> {
        self.bind()?;
        let (grid, block) = ((blocks, 1, 1), (kernel.threads(), 1, 1));
        let mut parameters = [arguments.as_ptr().cast_mut().cast()];
        let function = self.kernel(kernel).0.cu_function();
        // SAFETY: the kernel takes one struct by value, of as many bytes, and the caller vouches for the addresses in it.
        unsafe { result::launch_kernel(function, grid, block, 0, self.stream.cu_stream(), &mut parameters) }
            .map_err(failed(kernel.entry()))
    }

    fn resident_blocks(&self, kernel: Kernel) -> u32 {
        self.kernel(kernel).1
    }

    fn is_capturing(&self) -> Result<bool, Error> {
        is_capturing(&self.stream)
    }
}
