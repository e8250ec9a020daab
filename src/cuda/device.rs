//! A CUDA stream as a [`Device`]: everything is ordered on it, and nothing waits but `complete`.

use super::{driver::failed, module};
use crate::{
    Error,
    launch::{Arguments, Device, Kernel},
};
use cudarc::driver::{
    CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, result,
    sys::{CUdevice_attribute_enum as Attribute, CUstreamCaptureStatus},
};
use std::{cell::Cell, ptr::NonNull, sync::Arc};

// SAFETY: a `repr(C)` struct of integers and a float without padding, as the kernels declare it.
unsafe impl DeviceRepr for Arguments {}

/// The kernels on a stream of the caller's.
pub struct Cuda {
    stream: Arc<CudaStream>,
    /// In the order of [`Kernel::ALL`], with the blocks that fill the device.
    kernels: [(CudaFunction, u32); Kernel::ALL.len()],
}

impl Cuda {
    /// Loads the kernels into the stream's context.
    pub(super) fn new(stream: Arc<CudaStream>) -> Result<Self, Error> {
        let context = stream.context();
        let module = module::load(context)?;
        let multiprocessors = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("asking for the multiprocessors"))?;
        let multiprocessors = u32::try_from(multiprocessors).unwrap_or(1);
        let function = |kernel: Kernel| {
            let function = module.load_function(kernel.entry()).map_err(failed("looking up a kernel"))?;
            let blocks = function
                .occupancy_max_active_blocks_per_multiprocessor(Kernel::THREADS, 0, None)
                .map_err(failed("asking for the occupancy"))?;
            Ok::<_, Error>((function, blocks * multiprocessors))
        };
        let [measure, clip, update, gsnr, adam] = Kernel::ALL.map(function);
        Ok(Self { kernels: [measure?, clip?, update?, gsnr?, adam?], stream })
    }

    /// The stream everything is ordered on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    fn bind(&self) -> Result<(), Error> {
        self.stream.context().bind_to_thread().map_err(failed("making the context current"))
    }

    fn kernel(&self, kernel: Kernel) -> &(CudaFunction, u32) {
        &self.kernels[kernel as usize]
    }
}

/// Page-locked memory a copy arrives in, and the event that says it has. cudarc's own `PinnedHostSlice` records no
/// event in a context with one stream, and its memory is write-combined, which is slow to read.
pub struct PinnedRead {
    memory: NonNull<u8>,
    bytes: usize,
    event: CudaEvent,
    /// Whether the event is known to have come: what is asked for once is not asked for again.
    arrived: Cell<bool>,
}

// SAFETY: the memory belongs to this value alone; the device writes to it only between `start_read` and the event.
unsafe impl Send for PinnedRead {}

impl Drop for PinnedRead {
    fn drop(&mut self) {
        // A copy may be under way. Errors have nowhere to go, and memory that may still be written is better left.
        if self.event.synchronize().is_ok() {
            // SAFETY: allocated by `malloc_host`, and no copy to it is under way.
            let _ = unsafe { result::free_host(self.memory.as_ptr().cast()) };
        }
    }
}

impl Device for Cuda {
    type Buffer = (CudaSlice<u8>, u64);
    type Read = PinnedRead;

    fn allocate(&self, bytes: usize) -> Result<Self::Buffer, Error> {
        // SAFETY: the callers write before they read, or leave that to the kernels.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) }.map_err(failed("allocating device memory"))?;
        let address = slice.device_ptr(&self.stream).0;
        Ok((slice, address))
    }

    fn address(&self, buffer: &Self::Buffer) -> u64 {
        buffer.1
    }

    fn upload(&self, bytes: &[u8], to: &mut Self::Buffer) -> Result<(), Error> {
        debug_assert!(bytes.len() <= to.0.num_bytes());
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the buffer holds that many bytes. From pageable memory the driver copies to a buffer of its own
        // before it returns, so `bytes` may go; on the device the copy is ordered by the stream.
        unsafe { result::memcpy_htod_async(to.1, bytes, self.stream.cu_stream()) }
            .map_err(failed("copying to the device"))
    }

    fn launch(&self, kernel: Kernel, blocks: u32, arguments: &Arguments) -> Result<(), Error> {
        let mut builder = self.stream.launch_builder(&self.kernel(kernel).0);
        builder.arg(arguments);
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (Kernel::THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes `Arguments` by value; the addresses in it are those of live buffers of the probe,
        // and the tensors' are vouched for by the callers of the probe's unsafe calls.
        unsafe { builder.launch(config) }.map(drop).map_err(failed(kernel.entry()))
    }

    fn resident_blocks(&self, kernel: Kernel) -> u32 {
        self.kernel(kernel).1
    }

    fn is_capturing(&self) -> Result<bool, Error> {
        let status = self.stream.capture_status().map_err(failed("asking for the capture status"))?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    fn prepare_read(&self, bytes: usize) -> Result<PinnedRead, Error> {
        self.bind()?;
        // SAFETY: freed in `drop`, once.
        let memory = unsafe { result::malloc_host(bytes, 0) }.map_err(failed("allocating page-locked memory"))?;
        let memory = NonNull::new(memory.cast::<u8>()).ok_or(Error::OutOfMemory { bytes })?;
        // SAFETY: `bytes` bytes were just allocated there.
        unsafe { memory.write_bytes(0, bytes) };
        let event = self.stream.context().new_event(None).map_err(failed("making an event"))?;
        Ok(PinnedRead { memory, bytes, event, arrived: Cell::new(true) })
    }

    fn start_read(&self, from: &Self::Buffer, read: &mut PinnedRead) -> Result<(), Error> {
        self.bind()?;
        read.arrived.set(false);
        // SAFETY: the memory holds that many bytes, and no copy to it is under way: DeviceProbe starts only idle reads.
        let memory = unsafe { std::slice::from_raw_parts_mut(read.memory.as_ptr(), read.bytes) };
        // SAFETY: the buffer holds at least as many bytes, and `read` outlives the copy: its `drop` waits for it.
        unsafe { result::memcpy_dtoh_async(memory, from.1, self.stream.cu_stream()) }
            .map_err(failed("copying the results to the host"))?;
        read.event.record(&self.stream).map_err(failed("recording an event"))
    }

    fn is_complete(&self, read: &PinnedRead) -> Result<bool, Error> {
        if !read.arrived.get() {
            read.arrived.set(read.event.try_is_complete().map_err(failed("asking for an event"))?);
        }
        Ok(read.arrived.get())
    }

    fn complete<'a>(&self, read: &'a PinnedRead) -> Result<&'a [u8], Error> {
        if !read.arrived.get() {
            read.event.synchronize().map_err(failed("waiting for the results"))?;
            read.arrived.set(true);
        }
        // SAFETY: initialised when allocated, and the copy recorded before the event has arrived.
        Ok(unsafe { std::slice::from_raw_parts(read.memory.as_ptr(), read.bytes) })
    }
}
