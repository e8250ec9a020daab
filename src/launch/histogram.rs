//! Histograms on a device: their memory, the launch that counts, and the read-out.

use super::{Arguments, Device, DeviceProbe, Kernel, RawTensor, outside_capture};
use crate::{Error, Histogram, HistogramReport};
use std::sync::Arc;

/// The histograms in device memory, and where they arrive on the host.
pub(super) struct HistogramMemory<D: Device> {
    histograms: D::Buffer,
    read: D::Read,
}

impl<D: Device> DeviceProbe<D> {
    /// Makes room for histograms, once: allocates [`Histogram::bytes`] of device memory.
    ///
    /// # Errors
    /// The device's when it has not enough memory.
    pub fn enable_histogram(&mut self) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        if self.histogram.is_some() {
            return Ok(());
        }
        let bytes = self.plan.tensors().len() * size_of::<Histogram>();
        let histograms = self.device.allocate(bytes.max(1))?;
        let read = self.device.prepare_read(bytes)?;
        self.arguments = Arguments { histograms: self.device.address(&histograms), ..self.arguments };
        self.histogram = Some(HistogramMemory { histograms, read });
        Ok(())
    }

    /// Counts the elements of these tensors, in the plan's order, by their magnitudes: clears the histograms and launches
    /// one kernel. They are then at [`histograms_address`](Self::histograms_address), for those who read them on the
    /// device; does not wait. A measurement on the side: no step, and what the clip does is unchanged.
    ///
    /// # Safety
    /// As for [`measure_raw`](Self::measure_raw).
    ///
    /// # Errors
    /// [`Error::NotEnabled`], those of [`bind_raw`](Self::bind_raw), and the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn launch_histogram_raw(&mut self, tensors: &[RawTensor]) -> Result<(), Error> {
        if self.histogram.is_none() {
            return Err(NOT_ENABLED);
        }
        // SAFETY: the caller's promise is the same.
        unsafe { self.bind_raw(tensors) }?;
        let Some(memory) = &mut self.histogram else { return Err(NOT_ENABLED) };
        self.device.clear(&mut memory.histograms)?;
        self.launch(Kernel::Histogram)
    }

    /// Counts all tensors in one histogram, for the clip's policy: where that keeps it, behind a header.
    pub(super) fn launch_histogram_of_all(&mut self) -> Result<(), Error> {
        self.device.clear(&mut self.clip_state)?;
        let histograms = self.arguments.clip_state + CLIP_STATE_HEADER;
        let arguments = Arguments { histograms, one_histogram: 1, ..self.arguments };
        self.device.launch(Kernel::Histogram, self.blocks(Kernel::Histogram, arguments.chunk_count), &arguments)
    }

    /// The histograms of these tensors, in the plan's order. Waits for them.
    ///
    /// # Safety
    /// As for [`measure_raw`](Self::measure_raw).
    ///
    /// # Errors
    /// Those of [`launch_histogram_raw`](Self::launch_histogram_raw), and [`Error::WaitInCapture`].
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn histogram_raw(&mut self, tensors: &[RawTensor]) -> Result<HistogramReport, Error> {
        outside_capture(&self.device, Error::WaitInCapture)?;
        // SAFETY: the caller's promise is the same.
        unsafe { self.launch_histogram_raw(tensors) }?;
        let Some(memory) = &mut self.histogram else { return Err(NOT_ENABLED) };
        self.device.start_read(&memory.histograms, &mut memory.read)?;
        let mut histograms = vec![Histogram::default(); self.plan.tensors().len()];
        bytemuck::cast_slice_mut(&mut histograms).copy_from_slice(self.device.complete(&memory.read)?);
        Ok(HistogramReport::new(Arc::clone(&self.plan), histograms))
    }

    /// Device address of one [`Histogram`] a tensor, in the plan's order. `None` before
    /// [`enable_histogram`](Self::enable_histogram).
    pub fn histograms_address(&self) -> Option<u64> {
        self.histogram.as_ref().map(|_| self.arguments.histograms)
    }
}

/// Bytes of a policy's state before its histogram: `ClipState` in kernels/arguments.cuh.
const CLIP_STATE_HEADER: u64 = 32;

const NOT_ENABLED: Error = Error::NotEnabled { what: "histogram" };
