//! A device that allocates nothing and counts the bytes that a probe would.

use super::{Buffer, Device, HostRead, Kernel, Read};
use crate::{Error, tensor::Place};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The bytes that a probe has asked for.
#[derive(Clone, Default)]
pub(crate) struct Counting(pub Arc<AtomicU64>);

// SAFETY: no kernel runs, and nothing is copied.
#[allow(unsafe_code, reason = "implements a trait, and runs nothing")]
unsafe impl Device for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }

    fn place(&self) -> Place {
        Place::Host
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
        // SAFETY: nothing is read or written there.
        Ok(unsafe { Buffer::new(0, 0, ()) })
    }

    fn upload(&self, _: &[u8], _: &Buffer) -> Result<(), Error> {
        Ok(())
    }

    fn clear(&self, _: &Buffer) -> Result<(), Error> {
        Ok(())
    }

    fn read(&self, _: usize) -> Result<Box<dyn Read>, Error> {
        Ok(Box::new(HostRead::new(0)?))
    }

    unsafe fn launch(&self, _: Kernel, _: u32, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn resident_blocks(&self, _: Kernel) -> u32 {
        1
    }

    fn is_capturing(&self) -> Result<bool, Error> {
        Ok(false)
    }
}
