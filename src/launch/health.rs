//! Verdict words on a device: the rules in its memory.

use super::{Arguments, Device, DeviceProbe, outside_capture, uploaded};
use crate::{Error, health::Health};

/// Rules, exemptions and the norms of the last clean step, in device memory.
pub(super) struct HealthMemory<D: Device> {
    _rules: D::Buffer,
    _last_norms: D::Buffer,
}

impl<D: Device> DeviceProbe<D> {
    /// Has every measurement from now on judge its step by the threshold rules of `health`, on the device: one verdict
    /// word for the step, [`StepOutputs::health`](crate::StepOutputs::health), and one a tensor, which
    /// [`Report::health_words`](crate::Report::health_words) has and which lie at
    /// [`health_words_address`](Self::health_words_address). They are those of
    /// [`Health::diagnose`](crate::health::Health::diagnose) for the same steps; what was judged before is forgotten.
    /// Allocates 2 KiB and 12 bytes a tensor of device memory; a graph captured before goes on without.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`] for the health of other tensors, [`Error::InvalidConfig`] for more than 63 rules,
    /// and the device's when it has not enough memory.
    pub fn judge_by(&mut self, health: &Health) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let bytes = health.table_of(&self.plan)?;
        let rules = uploaded(&self.device, &bytes)?;
        let last_norms = uploaded(&self.device, &vec![0; (1 + self.plan.tensors().len()) * size_of::<f64>()])?;
        self.arguments = Arguments {
            health_rules: self.device.address(&rules),
            last_norms: self.device.address(&last_norms),
            ..self.arguments
        };
        self.health = Some(HealthMemory { _rules: rules, _last_norms: last_norms });
        Ok(())
    }

    /// Device address of one verdict word a tensor, in the plan's order, set by each measurement. `None` before
    /// [`judge_by`](Self::judge_by).
    pub fn health_words_address(&self) -> Option<u64> {
        self.health.as_ref().map(|_| self.arguments.health_words)
    }
}
