//! Dot products on a device: their memory, the second list's table, the launch, and the read-out.

use super::{Arguments, Device, DeviceProbe, Kernel, RawTensor, outside_capture};
use crate::{Dot, DotReport, Error, dot::Other};
use std::sync::Arc;

/// Tables, workspace and records in device memory, and where the records arrive on the host.
pub(super) struct DotMemory<D: Device> {
    others: D::Buffer,
    /// What that table holds.
    current: Vec<Other>,
    _chunks: D::Buffer,
    records: D::Buffer,
    read: D::Read,
}

impl<D: Device> DeviceProbe<D> {
    /// Makes room for dot products, once: allocates [`DotReport::bytes`] of device memory.
    ///
    /// # Errors
    /// The device's when it has not enough memory.
    pub fn enable_dot(&mut self) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        if self.dot.is_some() {
            return Ok(());
        }
        let tensors = self.plan.tensors().len();
        let bytes = tensors * size_of::<Dot>();
        let others = self.device.allocate((tensors * size_of::<Other>()).max(1))?;
        let chunks = self.device.allocate((self.plan.chunks() * size_of::<Dot>()).max(1))?;
        let mut records = self.device.allocate(bytes.max(1))?;
        // Empty tensors have no chunk whose block would set their records.
        self.device.clear(&mut records)?;
        let read = self.device.prepare_read(bytes)?;
        self.arguments = Arguments {
            others: self.device.address(&others),
            chunk_dots: self.device.address(&chunks),
            dots: self.device.address(&records),
            ..self.arguments
        };
        self.dot = Some(DotMemory { others, current: Vec::new(), _chunks: chunks, records, read });
        Ok(())
    }

    /// Launches the dot products of the plan's tensors `a` and the tensors `b`, which have the same lengths and any
    /// dtypes, and may be the same memory. They are then at [`dots_address`](Self::dots_address), for those who read them
    /// on the device; does not wait. One upload of 16 bytes a tensor when `b` has moved since the last call, beside that
    /// of [`bind_raw`](Self::bind_raw).
    ///
    /// # Safety
    /// As for [`measure_raw`](Self::measure_raw), of both lists.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], those of [`bind_raw`](Self::bind_raw) for either list, and the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn launch_dot_raw(&mut self, a: &[RawTensor], b: &[RawTensor]) -> Result<(), Error> {
        if self.dot.is_none() {
            return Err(NOT_ENABLED);
        }
        self.plan.check_lengths(b.iter().map(|tensor| (tensor.dtype, tensor.len)))?;
        self.check_addresses(b)?;
        // SAFETY: the caller's promise includes this one.
        unsafe { self.bind_raw(a) }?;
        let Some(memory) = &mut self.dot else { return Err(NOT_ENABLED) };
        let other = |tensor: &RawTensor| Other { address: tensor.address, dtype: tensor.dtype.code(), reserved: 0 };
        if !memory.current.iter().copied().eq(b.iter().map(other)) {
            if self.device.is_capturing()? {
                return Err(Error::AddressesChangedInCapture);
            }
            memory.current.clear();
            let others: Vec<Other> = b.iter().map(other).collect();
            self.device.upload(bytemuck::cast_slice(&others), &mut memory.others)?;
            memory.current = others;
        }
        self.launch(Kernel::Dot)
    }

    /// The dot products of the plan's tensors `a` and the tensors `b`. Waits for them.
    ///
    /// # Safety
    /// As for [`launch_dot_raw`](Self::launch_dot_raw).
    ///
    /// # Errors
    /// Those of [`launch_dot_raw`](Self::launch_dot_raw), and [`Error::WaitInCapture`].
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn dot_raw(&mut self, a: &[RawTensor], b: &[RawTensor]) -> Result<DotReport, Error> {
        outside_capture(&self.device, Error::WaitInCapture)?;
        // SAFETY: the caller's promise is the same.
        unsafe { self.launch_dot_raw(a, b) }?;
        let Some(memory) = &mut self.dot else { return Err(NOT_ENABLED) };
        self.device.start_read(&memory.records, &mut memory.read)?;
        let mut records = vec![Dot::default(); self.plan.tensors().len()];
        bytemuck::cast_slice_mut(&mut records).copy_from_slice(self.device.complete(&memory.read)?);
        Ok(DotReport::new(Arc::clone(&self.plan), records))
    }

    /// Device address of one [`Dot`] a tensor, in the plan's order. `None` before [`enable_dot`](Self::enable_dot).
    pub fn dots_address(&self) -> Option<u64> {
        self.dot.as_ref().map(|_| self.arguments.dots)
    }
}

const NOT_ENABLED: Error = Error::NotEnabled { what: "dot" };
