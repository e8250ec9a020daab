//! The entry of one step, owned, so that it can go to another thread.

use crate::{
    Error, Finding, Report, TensorReport, Verdict,
    gsnr::{GsnrRecord, GsnrReport},
    health::Diagnosis,
    histogram::{Histogram, HistogramReport},
    statistics,
};

/// Holds all that is written of a step: its report and, where they exist, its diagnosis, signal and noise, and
/// histograms.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, write::Entry};
///
/// let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new())?;
/// probe.measure(&[&[3.0f32, 4.0]])?;
/// let entry = Entry::new(probe.wait()?).with_scalars([("loss", 0.7), ("lr", 1e-3)])?;
/// assert_eq!((entry.step(), entry.scalars()[0].1), (1, 0.7));
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Entry {
    report: Report,
    scalars: Vec<(String, f64)>,
    /// Whether growing files get the tensors too.
    has_details: bool,
    verdict: Option<Verdict>,
    /// The verdicts of the tensors: one each, or none.
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
    /// Its verdict, if the step was diagnosed.
    pub verdict: Option<Verdict>,
    /// Its signal and noise, if it is tracked and the entry has them.
    pub gsnr: Option<&'a GsnrRecord>,
    /// Its histogram, if the entry has them.
    pub histogram: Option<&'a Histogram>,
}

impl<'a> From<TensorReport<'a>> for EntryTensor<'a> {
    /// Makes a tensor with statistics alone.
    fn from(report: TensorReport<'a>) -> Self {
        Self { report, verdict: None, gsnr: None, histogram: None }
    }
}

impl Entry {
    /// Makes the entry of a step from its report, with its diagnosis if there is one.
    pub fn new(report: Report) -> Self {
        let diagnosis = report.diagnosis();
        Self {
            verdict: diagnosis.map(Diagnosis::verdict),
            verdicts: diagnosis.map_or_else(Vec::new, |diagnosis| diagnosis.verdicts().to_vec()),
            findings: diagnosis.map_or_else(Vec::new, |diagnosis| diagnosis.findings().to_vec()),
            report,
            scalars: Vec::new(),
            has_details: true,
            gsnr: None,
            histogram: None,
        }
    }

    /// Adds the trainer's own numbers of this step, by name: loss, learning rate. Replaces earlier ones.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a name that is empty, given twice, or that of a statistic of the step.
    pub fn with_scalars<N: Into<String>>(self, scalars: impl IntoIterator<Item = (N, f64)>) -> Result<Self, Error> {
        Ok(self.with_checked_scalars(checked_scalars(scalars)?))
    }

    pub(crate) fn with_checked_scalars(self, scalars: Vec<(String, f64)>) -> Self {
        Self { scalars, ..self }
    }

    /// Adds findings to those of the step.
    pub(crate) fn with_findings_beside(mut self, findings: Vec<Finding>) -> Self {
        let worst = findings.iter().map(|finding| finding.severity).max();
        self.verdict = self.verdict.max(worst);
        self.findings.extend(findings);
        self
    }

    /// Leaves the tensors out of JSON lines, CSV and TensorBoard's event files, which then grow by the numbers of the
    /// step alone. With 1000 tensors an entry takes half a megabyte. Sinks that show the last step still get the
    /// tensors.
    #[must_use]
    pub fn without_details(self) -> Self {
        Self { has_details: false, ..self }
    }

    /// Adds the diagnosis of the step.
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

    /// Sets verdicts from elsewhere, one a tensor in the plan's order, and their findings. Replaces earlier ones.
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

    /// Adds signal and noise up to this step.
    ///
    /// # Errors
    /// [`Error::EntryOfAnotherPlan`] when they are of other tensors.
    pub fn with_gsnr(self, gsnr: GsnrReport) -> Result<Self, Error> {
        self.report.plan().check_entry(gsnr.plan(), "signal-to-noise report")?;
        Ok(Self { gsnr: Some(gsnr), ..self })
    }

    /// Adds the histograms of the report's gradients. Measure them before the clip and, on ranks, of whole tensors or
    /// of parts as in the report.
    ///
    /// # Errors
    /// [`Error::EntryOfAnotherPlan`] when they are of other tensors. [`Error::HistogramOfOtherGradients`] when counts
    /// or extremes of a tensor show that they are of other elements. A clip by less than a quarter may leave the same
    /// bins, which is not found.
    pub fn with_histogram(self, histogram: HistogramReport) -> Result<Self, Error> {
        self.report.plan().check_entry(histogram.plan(), "histogram")?;
        histogram.check(&self.report)?;
        Ok(self.with_own_histogram(histogram))
    }

    /// Adds histograms known to be of its gradients. A check of 1000 would take half a millisecond.
    pub(crate) fn with_own_histogram(self, histogram: HistogramReport) -> Self {
        Self { histogram: Some(histogram), ..self }
    }

    /// Gives a copy without the histograms, which are most of an entry.
    #[cfg(any(feature = "charts", feature = "live"))]
    pub(super) fn without_histogram(&self) -> Self {
        Self {
            report: self.report.clone(),
            scalars: self.scalars.clone(),
            has_details: self.has_details,
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

    /// The trainer's own numbers, in their order.
    pub fn scalars(&self) -> &[(String, f64)] {
        &self.scalars
    }

    /// Whether growing files get the tensors too.
    pub fn has_details(&self) -> bool {
        self.has_details
    }

    /// Its number: [`Report::step`].
    pub fn step(&self) -> u64 {
        self.report.step()
    }

    /// The verdict of the step, if it was diagnosed.
    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// The findings; empty also without a diagnosis.
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

    /// The tensors with all their numbers, in the plan's order.
    pub fn tensors(&self) -> impl Iterator<Item = EntryTensor<'_>> {
        // The tracked tensors are some of the plan's, in its order.
        let mut tracked = self.gsnr.iter().flat_map(GsnrReport::tensors).peekable();
        self.report.tensors().enumerate().map(move |(index, report)| EntryTensor {
            report,
            verdict: self.verdicts.get(index).copied(),
            gsnr: tracked.next_if(|&(name, _)| name == report.name).map(|(_, record)| record),
            histogram: self.histogram.as_ref().map(|report| &report.histograms()[index]),
        })
    }
}

/// Checks the trainer's own numbers of a step.
///
/// # Errors
/// As [`Entry::with_scalars`].
pub(crate) fn checked_scalars<N: Into<String>>(
    scalars: impl IntoIterator<Item = (N, f64)>,
) -> Result<Vec<(String, f64)>, Error> {
    let mut checked: Vec<(String, f64)> = Vec::new();
    for (name, value) in scalars {
        let name = name.into();
        if name.is_empty() || statistics::is_of_steps(&name) || checked.iter().any(|(other, _)| *other == name) {
            let expected = "names that are not empty, not twice, and not those of statistics";
            return Err(Error::InvalidConfig { option: "scalars", expected, value: format!("{name:?}") });
        }
        checked.push((name, value));
    }
    Ok(checked)
}
