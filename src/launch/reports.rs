//! Reports on their way from a device to the host.

use super::{Device, DeviceProbe, outside_capture};
use crate::{Error, Record, Report, StepOutputs};
use std::sync::Arc;

impl<D: Device> DeviceProbe<D> {
    /// The oldest report that has arrived and was not given yet; `None` while there is none. Never waits: it starts to
    /// copy the results of the last measurement, and hands out what earlier calls started. Called every step it gives
    /// every step's report, a step or so late; when the host runs further ahead than four reports, steps are left out
    /// (their numbers tell). During a capture it does nothing.
    ///
    /// # Errors
    /// The device's.
    pub fn poll(&mut self) -> Result<Option<Report>, Error> {
        if !self.measured || self.device.is_capturing()? {
            return Ok(None);
        }
        // A replayed graph measures without our knowing: with nothing on its way there may be something new.
        if self.reads.is_empty() || self.unread {
            self.start_read()?;
        }
        while let Some(read) = self.reads.front() {
            if !self.device.is_complete(read)? {
                return Ok(None);
            }
            if let Some(report) = self.take_report()? {
                return Ok(Some(report));
            }
        }
        Ok(None)
    }

    /// Waits for the report of the last measurement.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] when there was none, [`Error::WaitInCapture`], or the device's.
    pub fn wait(&mut self) -> Result<Report, Error> {
        if !self.measured {
            return Err(Error::NotMeasured);
        }
        outside_capture(&self.device, Error::WaitInCapture)?;
        while self.idle.is_empty() {
            self.take_report()?;
        }
        self.start_read()?;
        self.reported = 0;
        let mut last = None;
        while !self.reads.is_empty() {
            last = self.take_report()?.or(last);
        }
        last.ok_or(Error::NotMeasured)
    }

    /// Starts a read, if there is memory for one more.
    fn start_read(&mut self) -> Result<(), Error> {
        if let Some(mut read) = self.idle.pop() {
            self.device.start_read(&self.results, &mut read)?;
            self.reads.push_back(read);
            self.unread = false;
        }
        Ok(())
    }

    /// Completes the oldest read; `None` if its step was reported already.
    fn take_report(&mut self) -> Result<Option<Report>, Error> {
        let Some(read) = self.reads.pop_front() else { return Ok(None) };
        let (outputs, rest) = self.device.complete(&read)?.split_at(size_of::<StepOutputs>());
        let outputs: StepOutputs = bytemuck::pod_read_unaligned(outputs);
        let mut report = None;
        if outputs.step > self.reported {
            let mut records = vec![Record::EMPTY; self.current.len()];
            let (of_records, of_words) = rest.split_at(size_of_val(records.as_slice()));
            bytemuck::cast_slice_mut(&mut records).copy_from_slice(of_records);
            let words = self.health.is_some().then(|| super::values(of_words).collect());
            let weights = records.split_off(self.plan.tensors().len());
            let weights = (outputs.weights != 0).then_some(weights);
            self.reported = outputs.step;
            report = Some(Report::new(Arc::clone(&self.plan), outputs, records, weights, words));
        }
        self.idle.push(read);
        Ok(report)
    }
}
