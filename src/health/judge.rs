//! The rules in a device's memory, and the words of a step as the CPU writes them.

use super::{Diagnosis, FindingKind, Health, Rules, StepNorms, ThresholdRule, monitor::State, step_word, tensor_word};
use crate::{
    Config, Error, Plan, Probe, Record, Report,
    device::Buffer,
    features::{Feature, Saved},
    probe::{Core, copied, differs, outside_capture, uploaded, values},
};
use bytemuck::{Pod, Zeroable};
use std::collections::VecDeque;

/// Rules as a device reads them (`kernels/arguments.cuh`); the tensors' exemptions stand behind.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Table {
    pub count: u32,
    reserved: [u32; 7],
    pub rules: [ThresholdRule; MOST],
}
const _: () = assert!(size_of::<Table>() == 2048);

/// The most rules in a table.
const MOST: usize = 63;

impl Health {
    /// Makes the table, as bytes, for a device that measures these tensors.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`], and [`Error::InvalidConfig`] for more rules than there is room for.
    pub(crate) fn table_of(&self, plan: &Plan) -> Result<Vec<u8>, Error> {
        let rules = self.rules().thresholds();
        plan.check_report(self.plan())?;
        let too_many = || Error::InvalidConfig {
            option: "rules",
            expected: "at most 63 thresholds",
            value: rules.len().to_string(),
        };
        let count = u32::try_from(rules.len()).ok().filter(|_| rules.len() <= MOST).ok_or_else(too_many)?;
        let mut table = Table { count, ..Table::zeroed() };
        table.rules[..rules.len()].copy_from_slice(rules);
        let mut bytes = bytemuck::bytes_of(&table).to_vec();
        let exempt: Vec<u32> = self.exemptions().iter().map(|kinds| kinds & FindingKind::OF_WORDS).collect();
        bytes.extend_from_slice(bytemuck::cast_slice(&exempt));
        Ok(bytes)
    }
}

/// Diagnoses the steps of a probe, and holds the rules in its device's memory.
pub(crate) struct Judge {
    pub health: Health,
    /// Rules that were set while reports were on their way, each with the measurement from which it holds.
    coming: VecDeque<(u64, Rules)>,
    table: Buffer,
    last_norms: Buffer,
}

impl Feature<Rules> for Judge {
    /// # Errors
    /// Those of [`Health::new`], [`Health::backward_order`] and [`Health::table_of`], and the device's.
    fn new(core: &mut Core, rules: Rules) -> Result<Self, Error> {
        let mut health = Health::new(&core.plan, rules)?;
        if let Some(order) = core.config.backward_order.clone() {
            health = health.backward_order(order)?;
        }
        let table = uploaded(&*core.device, &health.table_of(&core.plan)?)?;
        let last_norms = uploaded(&*core.device, &vec![0; (1 + core.plan.tensors().len()) * size_of::<f64>()])?;
        core.step.health_rules = table.address();
        core.step.last_norms = last_norms.address();
        Ok(Self { health, coming: VecDeque::new(), table, last_norms })
    }
}

impl Judge {
    /// Diagnoses the report of a measurement, by the rules of then.
    ///
    /// # Errors
    /// Those of [`Health::diagnose`].
    pub fn diagnose(&mut self, report: &Report, measurement: u64) -> Result<Diagnosis, Error> {
        self.begin(measurement)?;
        self.health.diagnose(report)
    }

    /// Goes by the rules of this measurement.
    fn begin(&mut self, measurement: u64) -> Result<(), Error> {
        while let Some((_, rules)) = self.coming.front().filter(|(first, _)| *first <= measurement) {
            self.health.set_rules(rules.clone())?;
            self.coming.pop_front();
        }
        Ok(())
    }
}

/// The state of the diagnosis, and of the device for its words.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct JudgeState {
    health: State,
    /// The norm of the step, then those of the tensors.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    last_norms: Vec<f64>,
}

impl Saved for Judge {
    const DECLARE: &'static str = "Config::rules";
    type State = JudgeState;

    fn state(&mut self, core: &Core) -> Result<JudgeState, Error> {
        let last_norms = values(copied(&*core.device, &self.last_norms)?.wait()?);
        Ok(JudgeState { health: self.health.state().clone(), last_norms })
    }

    fn check(&self, core: &Core, JudgeState { health, last_norms }: &JudgeState) -> Result<(), Error> {
        if self.health.is_state(health) && last_norms.len() == 1 + core.plan.tensors().len() {
            return Ok(());
        }
        differs("what the diagnosis remembers is not of these tensors")
    }

    fn restore(&mut self, core: &Core, JudgeState { health, last_norms }: &JudgeState) -> Result<(), Error> {
        self.health.restore(health);
        core.device.upload(bytemuck::cast_slice(last_norms), &self.last_norms)
    }
}

impl Config {
    /// Declares a diagnosis of each step by these rules, when its report is read. The device evaluates those of them
    /// that are thresholds, and gives one word for the step, [`StepOutputs::health`](crate::StepOutputs::health), and
    /// one a tensor. Takes 2 KiB and 12 bytes a tensor.
    #[must_use]
    pub fn rules(mut self, rules: Rules) -> Self {
        self.features.rules = Some(rules);
        self
    }
}

impl Probe {
    /// The monitor of its steps, which can also diagnose tracked steps and histograms.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::rules`].
    pub fn health(&self) -> Result<&Health, Error> {
        let judge = self.rooms.rules.as_ref().ok_or(Error::NotDeclared { declare: Judge::DECLARE })?;
        Ok(&judge.health)
    }

    /// Changes the rules from the next step on, for another learning rate say: one upload. Keeps the state of the
    /// diagnosis.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::rules`]; those of [`Health::new`],
    /// [`Error::InvalidConfig`] for more than 63 thresholds, [`Error::UploadInCapture`], or the device's. The rules then stay.
    pub fn set_rules(&mut self, rules: Rules) -> Result<(), Error> {
        let (awaits_reports, reads_reports) = (self.awaits_reports(), self.reads_reports());
        let Self { rooms, core, .. } = self;
        let judge = rooms.rules.as_mut().ok_or(Error::NotDeclared { declare: Judge::DECLARE })?;
        outside_capture(&*core.device, Error::UploadInCapture)?;
        let mut health = judge.health.clone();
        health.set_rules(rules.clone())?;
        core.device.upload(&health.table_of(&core.plan)?, &judge.table)?;
        let measured = core.numbering.measured();
        if !awaits_reports {
            judge.coming.clear();
            judge.health = health;
            return Ok(());
        }
        if !reads_reports {
            // The next report is of the last measurement or a later one.
            judge.begin(measured)?;
        }
        judge.coming.push_back((measured + 1, rules));
        Ok(())
    }
}

/// Gives the word of the step, and writes those of its tensors into `words`. `finite` says whether all tensors are.
pub(crate) fn judge(
    (rules, exempt): (&[ThresholdRule], &[u32]),
    last_norms: &mut [f64],
    words: &mut [u32],
    (records, weights): (&[Record], Option<&[Record]>),
    (total, finite): (f64, bool),
) -> u32 {
    let Some((last_total, last_norms)) = last_norms.split_first_mut() else { return 0 };
    let mut step = StepNorms::new(total, *last_total);
    let mut united = 0;
    for (index, (record, word)) in records.iter().zip(words).enumerate() {
        step.add(record, exempt[index]);
        let param_norm = weights.map_or(0.0, |weights| weights[index].l2_norm());
        *word = tensor_word(rules, record, param_norm, last_norms[index], exempt[index]);
        united |= *word;
        // An absent tensor keeps its last norm.
        if finite && record.count > 0 {
            last_norms[index] = record.finite_l2_norm();
        }
    }
    let of_step = step_word(rules, united, &step);
    if finite {
        *last_total = total;
    }
    of_step
}
