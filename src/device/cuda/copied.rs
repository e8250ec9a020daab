//! Tensors that lie on the host, copied to the device for a call and, if they were changed, back: for tools and tests. A
//! trainer's gradients are on the device already.

use super::{
    driver::{failed, insist},
    memory::Memory,
};
use crate::{
    Error,
    tensor::{Lent, Until},
};
use cudarc::driver::{CudaStream, result};
use std::sync::Arc;

/// A tensor's elements in device memory of their own, with the same misalignment as on the host.
#[derive(Debug)]
pub(crate) struct Copied<'a> {
    _memory: Memory,
    address: u64,
    back: Option<&'a mut [u8]>,
    stream: Arc<CudaStream>,
}

impl<'a> Copied<'a> {
    /// Makes a copy to be read.
    ///
    /// # Errors
    /// The driver's.
    pub fn of(bytes: &'a [u8], stream: &Arc<CudaStream>) -> Result<Lent<'a>, Error> {
        Self::new(bytes, stream).map(Self::lent)
    }

    /// Makes a copy to be changed, which [`finish`](Self::finish) copies back.
    ///
    /// # Errors
    /// The driver's.
    pub fn of_mut(bytes: &'a mut [u8], stream: &Arc<CudaStream>) -> Result<Lent<'a>, Error> {
        let copied = Self::new(bytes, stream)?;
        Ok(Self { back: Some(bytes), ..copied }.lent())
    }

    fn new(bytes: &[u8], stream: &Arc<CudaStream>) -> Result<Self, Error> {
        const ALIGNMENT: usize = 16;
        let memory = Memory::new(stream, bytes.len() + ALIGNMENT)?;
        let address = memory.address() + (bytes.as_ptr() as usize % ALIGNMENT) as u64;
        if !bytes.is_empty() {
            // SAFETY: there is room for so many bytes from there on, and they stay until the copy is waited for.
            unsafe { result::memcpy_htod_async(address, bytes, stream.cu_stream()) }
                .map_err(failed("cuMemcpyHtoDAsync", "copying a tensor to the device"))?;
            // From page-locked memory the copy may still run when the call returns.
            over(stream)?;
        }
        Ok(Self { _memory: memory, address, back: None, stream: Arc::clone(stream) })
    }

    fn lent(self) -> Lent<'a> {
        Lent { address: self.address, until: Until::Copied(Box::new(self)) }
    }

    /// Copies back a tensor to be changed, and waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn finish(self) -> Result<(), Error> {
        let Self { address, back, stream, _memory } = self;
        let Some(bytes) = back.filter(|bytes| !bytes.is_empty()) else { return Ok(()) };
        // SAFETY: the copy has as many bytes there, and is waited for.
        unsafe { result::memcpy_dtoh_async(bytes, address, stream.cu_stream()) }
            .map_err(failed("cuMemcpyDtoHAsync", "copying a tensor to the host"))?;
        over(&stream)
    }
}

/// Waits for a copy from or to memory that is lent no longer.
fn over(stream: &CudaStream) -> Result<(), Error> {
    insist(|| stream.synchronize().map_err(failed("cuStreamSynchronize", "waiting for the copy of a tensor")))
}
