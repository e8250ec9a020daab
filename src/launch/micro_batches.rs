//! Micro-batches on a device: a list of records each.

use super::{Arguments, Device, DeviceProbe, Kernel, RawTensor, outside_capture, uploaded, values};
use crate::{Error, MicroBatchReport, Record, micro_batches::Accumulation};
use std::sync::Arc;

/// The micro-batches' records, in device memory and on their way to the host.
pub(super) struct MicroBatchMemory<D: Device> {
    pub accumulation: Accumulation,
    lists: D::Buffer,
    read: D::Read,
}

impl<D: Device> DeviceProbe<D> {
    /// Makes room for the records of this many micro-batches of an accumulation: 80 bytes a micro-batch and tensor.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0, or the device's when it has not enough memory.
    pub fn enable_micro_batches(&mut self, count: u32) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let accumulation = Accumulation::new(count)?;
        let lists = vec![Record::EMPTY; accumulation.count() * self.plan.tensors().len()];
        let bytes: &[u8] = bytemuck::cast_slice(&lists);
        let (lists, read) = (uploaded(&self.device, bytes)?, self.device.prepare_read(bytes.len().max(1))?);
        self.micro_batches = Some(MicroBatchMemory { accumulation, lists, read });
        Ok(())
    }

    /// Launches the measurement of the gradients of the next micro-batch, before they are added to the sum. A measurement
    /// on the side: no step, and what the clip does is unchanged. The measurement of a step, that of the sum, ends an
    /// accumulation. Captured in a graph, micro-batches keep the places that they have in the capture.
    ///
    /// # Safety
    /// As for [`measure_raw`](Self::measure_raw).
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::TooManyMicroBatches`], those of [`bind_raw`](Self::bind_raw), and the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn measure_micro_batch_raw(&mut self, tensors: &[RawTensor]) -> Result<(), Error> {
        if self.micro_batches.is_none() {
            return Err(NOT_ENABLED);
        }
        // SAFETY: the caller's promise is the same.
        unsafe { self.bind_raw(tensors) }?;
        let Some(memory) = &mut self.micro_batches else { return Err(NOT_ENABLED) };
        let place = memory.accumulation.next()? * self.plan.tensors().len() * size_of::<Record>();
        let records = self.device.address(&memory.lists) + place as u64;
        let arguments = Arguments { records, is_part: 1, ..self.arguments };
        self.device.launch(Kernel::Measure, self.blocks(Kernel::Measure, arguments.chunk_count), &arguments)
    }

    /// The micro-batches of the accumulation under way, or of the last one. Waits for them.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`] before the first, [`Error::WaitInCapture`], or the device's.
    pub fn micro_batches(&mut self) -> Result<MicroBatchReport, Error> {
        let memory = self.micro_batches.as_mut().ok_or(NOT_ENABLED)?;
        let (taken, tensors) = (memory.accumulation.taken()?, self.plan.tensors().len());
        outside_capture(&self.device, Error::WaitInCapture)?;
        self.device.start_read(&memory.lists, &mut memory.read)?;
        let mut all = values::<Record>(self.device.complete(&memory.read)?);
        let records = (0..taken).map(|_| all.by_ref().take(tensors).collect()).collect();
        Ok(MicroBatchReport::new(Arc::clone(&self.plan), records))
    }
}

const NOT_ENABLED: Error = Error::NotEnabled { what: "micro_batches" };
