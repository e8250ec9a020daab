//! A CUDA stream as a [`Device`]: everything is ordered on it, and the host waits only in a read's `wait`.

use super::{
    driver::{failed, insist, make_current},
    memory::Memory,
    module,
    pinned::{Pinned, Uploads},
    streams::{PinnedRead, Streams},
};
use crate::{
    Error,
    device::{Buffer, Device, Kernel, Read},
    ranks::Communicator,
    tensor::Place,
};
use cudarc::driver::{
    CudaFunction, CudaStream, result,
    sys::{self, CUdevice_attribute_enum as Attribute, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus as Status},
};
use std::{cell::RefCell, mem, sync::Arc};

/// Runs a probe on a stream of a CUDA device.
pub struct Cuda {
    streams: Arc<Streams>,
    uploads: RefCell<Uploads>,
    /// In the order of [`Kernel::ALL`], with the blocks that fill the device.
    kernels: Vec<(CudaFunction, u32)>,
}

impl Cuda {
    /// Loads the kernels into the stream's context. All work of the probe is ordered on the stream.
    ///
    /// # Errors
    /// [`Error::KernelLoad`], or the driver's.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, Error> {
        let _relaxed = Relaxed::new();
        let context = stream.context();
        make_current(context)?;
        let module = module::load(context)?;
        let multiprocessors = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("cuDeviceGetAttribute", "asking for the multiprocessors"))?;
        let multiprocessors = u32::try_from(multiprocessors).unwrap_or(1);
        let function = |kernel: Kernel| {
            let function =
                module.load_function(kernel.entry()).map_err(failed("cuModuleGetFunction", "looking up a kernel"))?;
            let blocks = function.occupancy_max_active_blocks_per_multiprocessor(kernel.threads(), 0, None).map_err(
                failed("cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", "asking how many blocks fit"),
            )?;
            Ok::<_, Error>((function, blocks * multiprocessors))
        };
        let kernels = Kernel::ALL.iter().map(|&kernel| function(kernel)).collect::<Result<_, _>>()?;
        Ok(Self { streams: Arc::new(Streams::new(stream)?), uploads: RefCell::default(), kernels })
    }

    /// The stream, for work that may change results.
    fn stream(&self) -> Result<&Arc<CudaStream>, Error> {
        let stream = &self.streams.main;
        make_current(stream.context())?;
        self.streams.await_copies()?;
        Ok(stream)
    }

    fn kernel(&self, kernel: Kernel) -> &(CudaFunction, u32) {
        &self.kernels[kernel as usize]
    }
}

/// A module must not be unloaded while its kernels are queued, or captured. The probe drops its device last.
impl Drop for Cuda {
    fn drop(&mut self) {
        let _relaxed = Relaxed::new();
        let stream = &self.streams.main;
        let wait =
            || stream.synchronize().map_err(failed("cuStreamSynchronize", "waiting before kernels are unloaded"));
        // Waiting would break a capture. Where this fails twice the context is lost, and nothing runs any more.
        if insist(|| is_capturing(stream)) == Ok(true) {
            mem::forget(mem::take(&mut self.kernels));
        } else {
            let _ = insist(wait);
        }
        // Here, since unloading them would end the captures of other streams.
        self.kernels.clear();
    }
}

pub(super) fn is_capturing(stream: &CudaStream) -> Result<bool, Error> {
    let status =
        stream.capture_status().map_err(failed("cuStreamIsCapturing", "asking whether the stream captures"))?;
    Ok(status != Status::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// Memory that a copy beside the stream may still read.
struct Freed {
    _memory: Memory,
    streams: Arc<Streams>,
}

impl Drop for Freed {
    fn drop(&mut self) {
        // Where that fails twice the context is lost, and there are no copies any more.
        let _ = insist(|| self.streams.await_copies());
    }
}

/// Lets this thread make calls that would break captures of other streams, although they do not concern them: the
/// driver refuses those calls to all threads while one captures in global mode.
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

// SAFETY: buffers are allocations of their own, freed in the order of the stream, and so not before work that uses
// them; reads wait for their copies; the module outlives its kernels.
unsafe impl Device for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn place(&self) -> Place {
        Place::Stream(Arc::clone(&self.streams.main))
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        let memory = Memory::new(&self.streams.main, bytes)?;
        let (address, streams) = (memory.address(), Arc::clone(&self.streams));
        // SAFETY: so many bytes lie there until the owner is dropped.
        Ok(unsafe { Buffer::new(address, bytes, Freed { _memory: memory, streams }) })
    }

    fn upload(&self, bytes: &[u8], to: &Buffer) -> Result<(), Error> {
        self.uploads.borrow_mut().upload(bytes, to, self.stream()?)
    }

    fn clear(&self, buffer: &Buffer) -> Result<(), Error> {
        let stream = self.stream()?;
        // SAFETY: the buffer has that many bytes.
        unsafe { result::memset_d8_async(buffer.address(), 0, buffer.bytes(), stream.cu_stream()) }
            .map_err(failed("cuMemsetD8Async", "clearing device memory"))
    }

    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        let memory = Pinned::new(self.streams.main.context(), bytes)?;
        Ok(Box::new(PinnedRead::new(memory, &self.streams)))
    }

    unsafe fn launch(&self, kernel: Kernel, blocks: u32, arguments: &[u8]) -> Result<(), Error> {
        let stream = self.stream()?;
        let (grid, block) = ((blocks, 1, 1), (kernel.threads(), 1, 1));
        let mut parameters = [arguments.as_ptr().cast_mut().cast()];
        let function = self.kernel(kernel).0.cu_function();
        // SAFETY: the kernel takes one struct by value, of as many bytes, and the caller vouches for the addresses in it.
        unsafe { result::launch_kernel(function, grid, block, 0, stream.cu_stream(), &mut parameters) }
            .map_err(failed("cuLaunchKernel", format_args!("launching {}", kernel.entry())))
    }

    fn resident_blocks(&self, kernel: Kernel) -> u32 {
        self.kernel(kernel).1
    }

    fn is_capturing(&self) -> Result<bool, Error> {
        is_capturing(&self.streams.main)
    }

    fn expect_graphs(&self) -> Result<(), Error> {
        self.streams.expect_graphs()
    }

    fn watch(&self, ranks: &Arc<dyn Communicator>) {
        self.streams.watch(ranks);
    }
}
