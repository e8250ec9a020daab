//! The adaptive clip on a device: its tables, the launch, and the read-out.

use super::{Arguments, Device, DeviceProbe, Kernel, RawTensor, outside_capture};
use crate::{AdaptiveClip, AdaptiveClipReport, AdaptiveRecord, Error, adaptive};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// What stands before the tensors' units (`kernels/arguments.cuh`).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Rule {
    clipping: f64,
    epsilon: f64,
    unit_count: u64,
    reserved: u64,
}

/// The units of one tensor, and where its weights are.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Units {
    address: u64,
    length: u64,
    first: u64,
    dtype: u32,
    reserved: u32,
}
const _: () = assert!(size_of::<Rule>() == 32 && size_of::<Units>() == 32);

/// Table and records in device memory, and where the records arrive on the host.
pub(super) struct AdaptiveMemory<D: Device> {
    units: adaptive::Units,
    table: D::Buffer,
    /// The units in that table.
    current: Vec<Units>,
    records: D::Buffer,
    read: D::Read,
}

impl<D: Device> DeviceProbe<D> {
    /// Makes room for adaptive clips by this rule; what another made before is gone. Allocates 56 bytes a tensor of
    /// device memory.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::TensorCount`], [`Error::UnitLength`], and the device's when it has not enough
    /// memory.
    pub fn enable_adaptive_clip(&mut self, clip: &AdaptiveClip) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let units = clip.of(&self.plan)?;
        let tensors = units.lengths.len();
        let table = self.device.allocate(size_of::<Rule>() + (tensors + 1) * size_of::<Units>())?;
        let bytes = (tensors * size_of::<AdaptiveRecord>()).max(1);
        let records = self.device.allocate(bytes)?;
        let read = self.device.prepare_read(bytes)?;
        self.arguments = Arguments {
            adaptive: self.device.address(&table),
            adaptive_records: self.device.address(&records),
            ..self.arguments
        };
        self.adaptive = Some(AdaptiveMemory { units, table, current: Vec::new(), records, read });
        Ok(())
    }

    /// Launches the adaptive clip of these tensors by the weights whose gradients they are, both in the plan's order, in
    /// place; the weights may be of any dtypes. Leaves what the last measurement said to skip. Does not wait. One upload
    /// of 32 bytes a tensor when weights have moved since the last call, beside that of [`bind_raw`](Self::bind_raw).
    ///
    /// # Safety
    /// As for [`clip_raw`](Self::clip_raw), and for the weights as for [`measure_raw`](Self::measure_raw).
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], [`Error::Overlap`], those of [`bind_raw`](Self::bind_raw) for
    /// either list, and the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn clip_adaptively_raw(&mut self, tensors: &[RawTensor], weights: &[RawTensor]) -> Result<(), Error> {
        if self.adaptive.is_none() {
            return Err(NOT_ENABLED);
        }
        self.plan.check_lengths(weights.iter().map(|tensor| (tensor.dtype, tensor.len)))?;
        self.check_addresses(weights)?;
        // SAFETY: the caller's promise includes this one.
        unsafe { self.bind_to_change(tensors) }?;
        self.check_apart(weights)?;
        let Some(memory) = &mut self.adaptive else { return Err(NOT_ENABLED) };
        let mut first = 0;
        let mut table = Vec::with_capacity(weights.len() + 1);
        for (weight, (&length, &count)) in weights.iter().zip(memory.units.lengths.iter().zip(&memory.units.counts)) {
            table.push(Units { address: weight.address, length, first, dtype: weight.dtype.code(), reserved: 0 });
            first += count;
        }
        table.push(Units { first, ..Units::zeroed() });
        if memory.current != table {
            if self.device.is_capturing()? {
                return Err(Error::AddressesChangedInCapture);
            }
            memory.current.clear();
            let adaptive::Units { clipping, epsilon, .. } = memory.units;
            let mut bytes = bytemuck::bytes_of(&Rule { clipping, epsilon, unit_count: first, reserved: 0 }).to_vec();
            bytes.extend_from_slice(bytemuck::cast_slice(&table));
            self.device.upload(&bytes, &mut memory.table)?;
            memory.current = table;
        }
        self.device.clear(&mut memory.records)?;
        let blocks = self.blocks(Kernel::Adaptive, u32::try_from(first).unwrap_or(u32::MAX));
        self.device.launch(Kernel::Adaptive, blocks, &self.arguments)
    }

    /// What the last adaptive clip did. Waits for it.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`] when there was none, [`Error::WaitInCapture`], or the device's.
    pub fn adaptive_clip(&mut self) -> Result<AdaptiveClipReport, Error> {
        outside_capture(&self.device, Error::WaitInCapture)?;
        let Some(memory) = &mut self.adaptive else { return Err(NOT_ENABLED) };
        if memory.current.is_empty() {
            return Err(Error::NotMeasured);
        }
        self.device.start_read(&memory.records, &mut memory.read)?;
        let bytes = self.device.complete(&memory.read)?;
        let records = super::values(&bytes[..memory.units.lengths.len() * size_of::<AdaptiveRecord>()]).collect();
        Ok(AdaptiveClipReport::new(Arc::clone(&self.plan), &memory.units, records))
    }

    /// Device address of one [`AdaptiveRecord`] a tensor, in the plan's order. `None` before
    /// [`enable_adaptive_clip`](Self::enable_adaptive_clip).
    pub fn adaptive_records_address(&self) -> Option<u64> {
        self.adaptive.as_ref().map(|_| self.arguments.adaptive_records)
    }
}

const NOT_ENABLED: Error = Error::NotEnabled { what: "adaptive_clip" };
