//! One step with everything that is known of it, owned, so that it can go to another thread.

use crate::{
    Error, Finding, Report, TensorReport, Verdict,
    gsnr::{GsnrRecord, GsnrReport},
    health::Diagnosis,
    histogram::{Histogram, HistogramReport},
};

/// What a step has to say: its report and, where they were made, its diagnosis, signal and noise, and histograms.
#[derive(Clone, Debug)]
pub struct Entry {
    report: Report,
    verdict: Option<Verdict>,
    /// One a tensor, or none at all.
    verdicts: Vec<Verdict>,
    findings: Vec<Finding>,
    gsnr: Option<GsnrReport>,
    histogram: Option<HistogramReport>,
}

/// One tensor of an entry.
#[derive(Clone, Copy, Debug)]
pub struct EntryTensor<'a> {
    /// Its name, type and statistics.
    pub report: TensorReport<'a>,
    /// How it is, if the step was diagnosed.
    pub verdict: Option<Verdict>,
    /// Its signal and noise, if it is tracked and the entry has them.
    pub gsnr: Option<&'a GsnrRecord>,
    /// Its histogram, if the entry has them.
    pub histogram: Option<&'a Histogram>,
}

impl<'a> From<TensorReport<'a>> for EntryTensor<'a> {
    /// A tensor of which only the statistics are known.
    fn from(report: TensorReport<'a>) -> Self {
        Self { report, verdict: None, gsnr: None, histogram: None }
    }
}

impl Entry {
    /// A step of which only the statistics are known.
    pub fn new(report: Report) -> Self {
        Self { report, verdict: None, verdicts: Vec::new(), findings: Vec::new(), gsnr: None, histogram: None }
    }

    /// With the diagnosis of the step.
    ///
    /// # Errors
    /// [`Error::EntryOfAnotherPlan`] and [`Error::EntryOfAnotherStep`] when it is of other tensors or of another step.
    pub fn with_diagnosis(self, diagnosis: &Diagnosis) -> Result<Self, Error> {
        let entry = "diagnosis";
        self.report.plan().check_entry(diagnosis.plan(), entry)?;
        if diagnosis.step() != self.step() {
            return Err(Error::EntryOfAnotherStep { entry, step: diagnosis.step(), reported: self.step() });
        }
        self.with_findings(diagnosis.verdict(), diagnosis.verdicts(), diagnosis.findings())
    }

    /// With what is known otherwise of the step, of each tensor in the plan's order, and why; in place of what was
    /// known.
    ///
    /// # Errors
    /// [`Error::TensorCount`] when there are not as many verdicts as tensors.
    pub fn with_findings(
        self,
        verdict: Verdict,
        tensors: impl Into<Vec<Verdict>>,
        findings: impl Into<Vec<Finding>>,
    ) -> Result<Self, Error> {
        let verdicts: Vec<Verdict> = tensors.into();
        self.report.plan().check_count(verdicts.len())?;
        Ok(Self { verdict: Some(verdict), verdicts, findings: findings.into(), ..self })
    }

    /// With signal and noise up to this step.
    ///
    /// # Errors
    /// [`Error::EntryOfAnotherPlan`] when they are of other tensors.
    pub fn with_gsnr(self, gsnr: GsnrReport) -> Result<Self, Error> {
        self.report.plan().check_entry(gsnr.plan(), "signal-to-noise report")?;
        Ok(Self { gsnr: Some(gsnr), ..self })
    }

    /// With the histograms of the gradients that the report is of: measured before the clip, and on ranks of whole tensors as
    /// the report, or of parts as it.
    ///
    /// # Errors
    /// [`Error::EntryOfAnotherPlan`] when they are of other tensors, [`Error::HistogramOfOtherGradients`] when counts or
    /// extremes of a tensor say that they are of other elements. One that a clip by less than a quarter left in the same bins is
    /// not found.
    pub fn with_histogram(self, histogram: HistogramReport) -> Result<Self, Error> {
        self.report.plan().check_entry(histogram.plan(), "histogram")?;
        histogram.check(&self.report)?;
        Ok(Self { histogram: Some(histogram), ..self })
    }

    /// A copy without the histograms, which are most of an entry.
    #[cfg(any(feature = "charts", feature = "live"))]
    pub(super) fn without_histogram(&self) -> Self {
        Self {
            report: self.report.clone(),
            verdict: self.verdict,
            verdicts: self.verdicts.clone(),
            findings: self.findings.clone(),
            gsnr: self.gsnr.clone(),
            histogram: None,
        }
    }

    /// The statistics.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Which measurement of its probe this is, from 1.
    pub fn step(&self) -> u64 {
        self.report.step()
    }

    /// How the step is, if it was diagnosed.
    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// What is wrong; empty also where nobody looked.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Signal and noise up to this step.
    pub fn gsnr(&self) -> Option<&GsnrReport> {
        self.gsnr.as_ref()
    }

    /// The histograms.
    pub fn histogram(&self) -> Option<&HistogramReport> {
        self.histogram.as_ref()
    }

    /// The tensors with all that is known of each, in the plan's order.
    pub fn tensors(&self) -> impl Iterator<Item = EntryTensor<'_>> {
        // Tracked tensors are some of the plan's, in its order.
        let mut tracked = self.gsnr.iter().flat_map(GsnrReport::tensors).peekable();
        self.report.tensors().enumerate().map(move |(index, report)| EntryTensor {
            report,
            verdict: self.verdicts.get(index).copied(),
            gsnr: tracked.next_if(|&(name, _)| name == report.name).map(|(_, record)| record),
            histogram: self.histogram.as_ref().map(|report| &report.histograms()[index]),
        })
    }
}
