//! Whether CUDA's libraries are there, asked before cudarc is: its first call panics when they are not.

use crate::Error;
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys::CUresult};
use std::{error::Error as _, sync::Arc};

/// Names under which the driver is installed, in the order cudarc looks for it.
const DRIVER: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };
/// The same for NVRTC.
const NVRTC: &[&str] = if cfg!(windows) {
    &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "nvrtc64_112_0.dll"]
} else {
    &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11"]
};

/// Loads the first library of `names` that there is; what was searched and the loader's last word, if none.
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
            // What the loader said; the error itself says no more than that it failed.
            Err(error) => reason = error.source().map_or_else(|| error.to_string(), ToString::to_string),
        }
    }
    Err((names.join(", "), reason))
}

/// A new stream of a device, for those who have none yet: it also finds out whether there is a driver, which cudarc answers
/// with a panic. The device is the `ordinal`-th, from 0, that CUDA shows.
///
/// # Errors
/// [`Error::DriverNotFound`], [`Error::DeviceNotFound`], and the driver's.
pub fn stream(ordinal: usize) -> Result<Arc<CudaStream>, Error> {
    find(DRIVER).map_err(|(searched, reason)| Error::DriverNotFound { searched, reason })?;
    let context = CudaContext::new(ordinal).map_err(|error| match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_INVALID_DEVICE | CUresult::CUDA_ERROR_STUB_LIBRARY => {
            Error::DeviceNotFound { ordinal, reason: format!("{:?}", error.0) }
        }
        _ => failed("opening the device")(error),
    })?;
    context.new_stream().map_err(failed("making a stream"))
}

/// An error when NVRTC is not there.
pub(super) fn require_nvrtc() -> Result<(), Error> {
    find(NVRTC).map_err(|(searched, reason)| {
        Error::KernelLoad(format!("no NVRTC to compile them: none of {searched} could be loaded ({reason})"))
    })
}

/// What became of a driver call. Not by the error's `Display`, which asks the driver and panics without one.
pub(super) fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Driver { call, code: format!("{:?}", error.0) }
}
