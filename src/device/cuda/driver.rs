//! Checks that CUDA's libraries are there before the first call of cudarc, which panics without them.

use crate::Error;
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys::CUresult};
use std::{error::Error as _, fmt::Display, sync::Arc};

/// Names of the driver's library, in the order in which cudarc looks for it.
const DRIVER: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };
/// The same for NVRTC.
const NVRTC: &[&str] = if cfg!(windows) {
    &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "nvrtc64_112_0.dll"]
} else {
    &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11"]
};

/// Loads the first library of `names` that exists. Otherwise gives the names and the loader's last message.
pub(super) fn find(names: &[&str]) -> Result<(), (String, String)> {
    let mut reason = String::new();
    for name in names {
        // SAFETY: loading runs the library's initialisers: NVIDIA's, which cudarc would run next.
        match unsafe { libloading::Library::new(*name) } {
            // Kept loaded: cudarc loads it again at once.
            Ok(library) => {
                std::mem::forget(library);
                return Ok(());
            }
            // The loader's message: the error itself says only that it failed.
            Err(error) => reason = error.source().map_or_else(|| error.to_string(), ToString::to_string),
        }
    }
    Err((names.join(", "), reason))
}

/// Makes a new stream on a device. The device is the `ordinal`-th, from 0, that CUDA shows. Gives an error without a
/// driver, where cudarc panics.
///
/// # Errors
/// [`Error::DriverNotFound`], [`Error::DeviceNotFound`], and the driver's.
pub fn stream(ordinal: usize) -> Result<Arc<CudaStream>, Error> {
    find(DRIVER).map_err(|(searched, reason)| Error::DriverNotFound { searched, reason })?;
    let context = CudaContext::new(ordinal).map_err(|error| match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_INVALID_DEVICE | CUresult::CUDA_ERROR_STUB_LIBRARY => {
            Error::DeviceNotFound { ordinal, reason: format!("{:?}", error.0) }
        }
        _ => failed("cuDevicePrimaryCtxRetain", "opening the device")(error),
    })?;
    context.new_stream().map_err(failed("cuStreamCreate", "making a stream"))
}

/// Makes a context current on this thread, as every call needs it.
///
/// # Errors
/// The driver's.
pub(super) fn make_current(context: &CudaContext) -> Result<(), Error> {
    earlier_errors(context)?;
    context.bind_to_thread().map_err(failed("cuCtxSetCurrent", "making the context current"))
}

/// # Errors
/// The last error that cudarc could not return, of a `drop` or of the record of a slice's use. cudarc returns it once,
/// with the next call of any kind; it is taken out here to be told apart.
pub(super) fn earlier_errors(context: &CudaContext) -> Result<(), Error> {
    context.check_err().map_err(failed("an earlier call", "cudarc dropped something or noted the use of a slice"))
}

/// Asks twice before memory is freed: the first answer may be the error of an earlier call, which cudarc gives once.
/// Where the second is an error too, the context is lost, and nothing in it runs any more.
pub(super) fn insist<T>(ask: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
    ask().or_else(|_| ask())
}

/// Fails without NVRTC.
pub(super) fn require_nvrtc() -> Result<(), Error> {
    find(NVRTC).map_err(|(searched, reason)| {
        Error::KernelLoad(format!("no NVRTC to compile them: none of {searched} could be loaded ({reason})"))
    })
}

/// Makes the error of a driver call. Not by the error's `Display`, which asks the driver and panics without one.
pub(super) fn failed(call: &'static str, doing: impl Display) -> impl Fn(DriverError) -> Error {
    move |error| Error::Driver { call, doing: doing.to_string(), code: format!("{:?}", error.0) }
}

/// Makes the error of a call that allocates so many bytes.
pub(super) fn not_allocated(call: &'static str, doing: &'static str, bytes: usize) -> impl Fn(DriverError) -> Error {
    move |error| match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes: bytes as u64 },
        _ => failed(call, doing)(error),
    }
}
