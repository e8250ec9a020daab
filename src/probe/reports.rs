//! Reports on their way from a device to the host.

use super::{Core, Probe, outside_capture, values};
use crate::{
    Error, Record, Report, StepOutputs,
    device::{Buffer, Device, Read},
    health::Diagnosis,
    optim::UpdateRecord,
    ranks::CheckSums,
};
use std::{collections::VecDeque, sync::Arc};

/// The most reports on their way to the host at one time. Further steps are measured but not reported.
const READS: usize = 4;

/// The results that reports are read from, and the reads.
pub(super) struct Reports {
    /// Outputs, then records, then words of health.
    results: Buffer,
    /// Reads under way, the oldest first, and reads free for use.
    reads: VecDeque<Box<dyn Read>>,
    idle: Vec<Box<dyn Read>>,
    /// Whether a step was launched since the last read began.
    unread: bool,
    /// The last measurement that was given or passed over.
    reported: u64,
    /// The findings of that measurement: a step is diagnosed once.
    diagnosis: Option<Arc<Diagnosis>>,
}

impl Reports {
    pub fn new(core: &mut Core) -> Result<Self, Error> {
        let (records, words) = (core.record_count(), core.plan.tensors().len());
        let mut bytes = bytemuck::bytes_of(&StepOutputs::default()).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(&vec![Record::EMPTY; records]));
        core.step.health_words = bytes.len() as u64;
        bytes.resize(bytes.len() + words * size_of::<u32>(), 0);
        if core.config.features.optimizer.is_some() {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            core.updates = bytes.len() as u64;
            bytes.resize(bytes.len() + words * size_of::<UpdateRecord>(), 0);
        }
        if core.config.features.ranks.is_some() {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            core.step.checked = bytes.len() as u64;
            bytes.resize(bytes.len() + size_of::<CheckSums>(), 0);
        }
        let results = super::uploaded(&*core.device, &bytes)?;
        core.step.common.outputs = results.address();
        core.step.common.records = results.address() + size_of::<StepOutputs>() as u64;
        core.step.health_words += results.address();
        core.updates += results.address();
        core.step.checked += results.address();
        let idle = (0..READS).map(|_| core.device.read(bytes.len())).collect::<Result<_, _>>()?;
        let reads = VecDeque::with_capacity(READS);
        Ok(Self { results, reads, idle, unread: false, reported: 0, diagnosis: None })
    }

    /// The last measurement that was given or passed over.
    pub fn reported(&self) -> u64 {
        self.reported
    }

    /// Goes on after the step with these outputs.
    pub fn restore(&mut self, device: &dyn Device, outputs: StepOutputs) -> Result<(), Error> {
        // Reads under way belong to the state before.
        while let Some(read) = self.reads.front() {
            read.wait()?;
            self.idle.extend(self.reads.pop_front());
        }
        device.upload(bytemuck::bytes_of(&outputs), &self.results)?;
        (self.reported, self.diagnosis) = (outputs.step, None);
        Ok(())
    }

    /// Notes that there is a new step to read.
    pub fn step_launched(&mut self) {
        self.unread = true;
    }

    /// Starts a read, if one is free.
    fn start(&mut self) -> Result<(), Error> {
        let Some(read) = self.idle.last_mut() else { return Ok(()) };
        read.start(&self.results)?;
        self.reads.extend(self.idle.pop());
        self.unread = false;
        Ok(())
    }
}

impl Probe {
    /// Gives the oldest report that has arrived and was not given yet, or `None`. Never waits: it starts to copy the
    /// results of the last measurement, and hands out the copies that earlier calls started. Called every step it gives
    /// every step's report, on a GPU about a step late. When the host runs more than four reports ahead, steps are left
    /// out; the step numbers show it. During a capture it does nothing.
    ///
    /// With [`Config::rules`](crate::Config::rules) a report has the step's diagnosis.
    ///
    /// # Errors
    /// The device's. A later call then gives the reports that have not arrived.
    pub fn poll(&mut self) -> Result<Option<Report>, Error> {
        if self.core.device.is_capturing()? || !self.core.measured {
            return Ok(None);
        }
        // The host does not see the measurements of a replayed graph: without a read under way there may be a new one.
        if self.reports.reads.is_empty() || self.reports.unread {
            self.reports.start()?;
        }
        while let Some(read) = self.reports.reads.front() {
            if !read.is_complete()? {
                return Ok(None);
            }
            if let Some(report) = self.take_report(false)? {
                return Ok(Some(report));
            }
        }
        Ok(None)
    }

    /// Whether there are measurements whose reports have not come.
    pub(crate) fn awaits_reports(&self) -> bool {
        self.reports.reported < self.core.numbering.measured()
    }

    /// Whether a report is on its way.
    pub(crate) fn reads_reports(&self) -> bool {
        !self.reports.reads.is_empty()
    }

    /// Waits for the oldest report that was not given; `None` when all were.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub(crate) fn next_report(&mut self) -> Result<Option<Report>, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        if self.core.measured && self.reports.unread {
            self.reports.start()?;
        }
        while !self.reports.reads.is_empty() {
            if let Some(report) = self.take_report(false)? {
                return Ok(Some(report));
            }
        }
        Ok(None)
    }

    /// Waits for the last measurement and gives its report, even if [`poll`](Self::poll) has given it before. Passes
    /// over the reports of earlier steps that were not asked for, but still diagnoses them.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] before the first measurement, [`Error::WaitInCapture`], or the device's.
    pub fn wait(&mut self) -> Result<Report, Error> {
        if !self.core.measured {
            return Err(Error::NotMeasured);
        }
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        while self.reports.idle.is_empty() {
            self.take_report(false)?;
        }
        self.reports.start()?;
        while self.reports.reads.len() > 1 {
            self.take_report(false)?;
        }
        self.take_report(true)?.ok_or(Error::NotMeasured)
    }

    /// Completes the oldest read. `None` if its step was reported already, unless it is to be given `again`.
    fn take_report(&mut self, again: bool) -> Result<Option<Report>, Error> {
        let Self { reports, core, rooms } = self;
        let judge = &mut rooms.rules;
        let Some(read) = reports.reads.front() else { return Ok(None) };
        // The read stays in its place if this fails.
        let (outputs, rest) = read.wait()?.split_at(size_of::<StepOutputs>());
        let mut outputs: StepOutputs = bytemuck::pod_read_unaligned(outputs);
        let measurement = outputs.step;
        core.numbering.seen(measurement);
        outputs.step = core.numbering.of(measurement);
        let is_new = measurement > reports.reported;
        let mut report = None;
        if is_new || again {
            let (of_records, of_words) = rest.split_at(core.record_count() * size_of::<Record>());
            let mut records: Vec<Record> = values(of_records);
            let (of_words, of_updates) = of_words.split_at(core.plan.tensors().len() * size_of::<u32>());
            let of_check = if rooms.ranks.is_some() { size_of::<CheckSums>() } else { 0 };
            let (of_updates, of_ranks) = of_updates.split_at(of_updates.len() - of_check);
            let words = judge.is_some().then(|| values(of_words));
            let updates = rooms.optimizer.as_ref().map(|optimizer| {
                let padding = of_updates.len() % size_of::<UpdateRecord>();
                let mut updates: Vec<UpdateRecord> = values(&of_updates[padding..]);
                updates.iter_mut().for_each(|update| update.step = core.numbering.of(update.step));
                (optimizer.declared(), updates)
            });
            let weights = records.split_off(core.plan.tensors().len());
            let weights = (outputs.weights != 0).then_some(weights);
            let ranks = rooms
                .ranks
                .as_ref()
                .map(|ranks| ranks.checked(core, &bytemuck::pod_read_unaligned(of_ranks), (&outputs, measurement)));
            let made = Report::new(core.plan.clone(), outputs, records, weights, words)
                .with_updates(updates)
                .with_ranks(ranks);
            if is_new {
                reports.reported = measurement;
                let diagnosis = judge.as_mut().map(|judge| judge.diagnose(&made, measurement)).transpose()?;
                reports.diagnosis = diagnosis.map(Arc::new);
            }
            report = Some(made.with_diagnosis(reports.diagnosis.clone()));
        }
        reports.idle.extend(reports.reads.pop_front());
        Ok(report)
    }
}
