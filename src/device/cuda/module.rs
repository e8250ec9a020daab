//! The kernels in a context: from the embedded fat binary, or compiled by NVRTC where there is none for the device.

use super::driver::{failed, not_allocated, require_nvrtc};
use crate::{Error, device::SOURCE};
use cudarc::{
    driver::{
        CudaContext, CudaModule, DriverError,
        sys::{CUdevice_attribute_enum as Attribute, CUresult},
    },
    nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts},
};
use std::sync::{Arc, Mutex, PoisonError};

/// Machine code for each architecture, and PTX; empty when the build found no nvcc.
pub static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gradprobe.fatbin"));

/// Compiles the kernels for a compute capability such as (9, 0).
///
/// # Errors
/// [`Error::KernelLoad`] with NVRTC's message, or when there is no NVRTC.
pub fn compile((major, minor): (i32, i32)) -> Result<Ptx, Error> {
    require_nvrtc()?;
    let options = CompileOptions {
        // As build.rs tells nvcc: one IEEE operation for each operator.
        ftz: Some(false),
        prec_sqrt: Some(true),
        prec_div: Some(true),
        fmad: Some(false),
        options: vec!["--std=c++17".to_owned(), format!("--gpu-architecture=compute_{major}{minor}")],
        name: Some("gradprobe.cu".to_owned()),
        ..CompileOptions::default()
    };
    compile_ptx_with_opts(SOURCE, options).map_err(|error| {
        Error::KernelLoad(match error {
            CompileError::CompileError { log, .. } => format!("NVRTC: {}", log.to_string_lossy()),
            other => format!("NVRTC: {other:?}"),
        })
    })
}

/// Does as [`compile`], once for each compute capability: it takes 1 to 3 seconds.
fn compile_once(capability: (i32, i32)) -> Result<Ptx, Error> {
    static COMPILED: Mutex<Vec<((i32, i32), Ptx)>> = Mutex::new(Vec::new());
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, ptx)) = compiled.iter().find(|(known, _)| *known == capability) {
        return Ok(ptx.clone());
    }
    let ptx = compile(capability)?;
    compiled.push((capability, ptx.clone()));
    Ok(ptx)
}

/// Whether another image of the kernels may fit the device, after this error.
fn is_for_others(error: DriverError) -> bool {
    matches!(
        error.0,
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_INVALID_PTX
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED
    )
}

/// Loads the kernels.
pub(super) fn load(context: &Arc<CudaContext>) -> Result<Arc<CudaModule>, Error> {
    let attribute =
        |which| context.attribute(which).map_err(failed("cuDeviceGetAttribute", "asking for the compute capability"));
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let device = format!("compute capability {}.{}", capability.0, capability.1);
    let not_loaded = not_allocated("cuModuleLoadData", "loading the kernels", FATBIN.len());
    let embedded = if FATBIN.is_empty() {
        "no binary is embedded, since the build found no nvcc".to_owned()
    } else {
        match context.load_module(Ptx::from_binary(FATBIN.to_vec())) {
            Ok(module) => return Ok(module),
            Err(error) if is_for_others(error) => format!("the embedded binary was refused with {:?}", error.0),
            Err(error) => return Err(not_loaded(error)),
        }
    };
    let ptx = compile_once(capability).map_err(|error| Error::KernelLoad(format!("{embedded} ({device}); {error}")))?;
    context.load_module(ptx).map_err(|error| {
        if is_for_others(error) {
            Error::KernelLoad(format!("{embedded} ({device}); NVRTC's was refused with {:?}", error.0))
        } else {
            not_loaded(error)
        }
    })
}
