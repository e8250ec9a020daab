//! The last steps in a device's memory.

use super::{Arguments, Device, DeviceProbe, outside_capture, values};
use crate::{Error, HistoryReport, HistoryStep, history};
use std::sync::Arc;

/// The last steps, in device memory.
pub(super) struct History<D: Device> {
    steps: u32,
    ring: D::Buffer,
    tag: D::Buffer,
    read: D::Read,
}

impl<D: Device> History<D> {
    fn new(device: &D, steps: u32, tensors: usize) -> Result<Self, Error> {
        let bytes = history::bytes(steps, tensors)?;
        let mut tag = device.allocate(size_of::<u64>())?;
        device.upload(&[0; size_of::<u64>()], &mut tag)?;
        let mut ring = device.allocate(bytes)?;
        device.upload(&vec![0; bytes], &mut ring)?;
        Ok(Self { steps, ring, tag, read: device.prepare_read(bytes)? })
    }
}

impl<D: Device> DeviceProbe<D> {
    /// Keeps the last steps from now on, this many; what was kept before is forgotten. Allocates 112 bytes a step and 24
    /// a step and tensor of device memory; a graph captured before goes on without.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0 steps, and the device's when it has not enough memory. What was kept before then
    /// stays.
    pub fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let history = History::new(&self.device, steps, self.plan.tensors().len())?;
        let first = self.device.address(&history.ring);
        self.arguments = Arguments {
            history_steps: steps,
            history: first,
            history_tensors: first + u64::from(steps) * size_of::<HistoryStep>() as u64,
            tag: self.device.address(&history.tag),
            ..self.arguments
        };
        self.history = Some(history);
        Ok(())
    }

    /// Names the batch of the measurements that follow, for the history: one upload of 8 bytes. Replayed graphs see it
    /// too.
    ///
    /// # Errors
    /// [`Error::NoHistory`], or the device's.
    pub fn tag(&mut self, tag: u64) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let history = self.history.as_mut().ok_or(Error::NoHistory)?;
        self.device.upload(bytemuck::bytes_of(&tag), &mut history.tag)
    }

    /// The last steps. Waits for them; nothing of the history is copied before.
    ///
    /// # Errors
    /// [`Error::NoHistory`], [`Error::WaitInCapture`], or the device's.
    pub fn history(&mut self) -> Result<HistoryReport, Error> {
        outside_capture(&self.device, Error::WaitInCapture)?;
        let history = self.history.as_mut().ok_or(Error::NoHistory)?;
        self.device.start_read(&history.ring, &mut history.read)?;
        let bytes = self.device.complete(&history.read)?;
        let (steps, tensors) = bytes.split_at(history.steps as usize * size_of::<HistoryStep>());
        let (steps, tensors) = (values(steps).collect::<Vec<_>>(), values(tensors).collect::<Vec<_>>());
        Ok(HistoryReport::new(Arc::clone(&self.plan), &steps, &tensors))
    }
}
