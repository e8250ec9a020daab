//! Keeps the last steps of a probe where the gradients are, to be read on request.
//!
//! Every measurement writes a line for the step and one for each tensor into a ring. Nothing is copied to the host
//! until a [`HistoryReport`] is requested. The raw values of all steps are kept, also of those that are not finite;
//! statistics over the window leave those out.

mod cpu;
mod room;

pub use room::History;

pub(crate) use cpu::Ring;

use crate::{Error, Plan, Record, StepOutputs, measure::narrow, probe::Numbering};
use bytemuck::{Pod, Zeroable};

/// One step of the history (112 bytes, the same on the device).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct HistoryStep {
    /// Its scalars: norms, coefficient, flags, number.
    pub outputs: StepOutputs,
    /// The trainer's tag of the batch, by `history()?.tag`; 0 without one.
    pub tag: u64,
    /// Unused; 0.
    pub reserved: u64,
}
const _: () = assert!(size_of::<HistoryStep>() == 112);

impl HistoryStep {
    /// Sets the trainer's number of the step.
    fn numbered(mut self, numbering: &Numbering) -> Self {
        self.outputs.step = numbering.of(self.outputs.step);
        self
    }
}

/// One tensor in one step of the history (24 bytes, the same on the device).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct HistoryTensor {
    /// L2 norm of the finite elements.
    pub finite_l2_norm: f64,
    /// Largest |x| over the finite elements, 0 without any.
    pub max_abs: f32,
    /// Share of the finite elements that are 0; 0 without any.
    pub zero_fraction: f32,
    /// Share of the finite elements below the dead threshold; 0 without any.
    pub dead_fraction: f32,
    /// Bits of [`StepOutputs::FLAG_NAN`], [`StepOutputs::FLAG_INF`] and [`HistoryTensor::NO_ELEMENTS`].
    pub flags: u32,
}
const _: () = assert!(size_of::<HistoryTensor>() == 24);

impl HistoryTensor {
    /// Bit of `flags`: the tensor had no elements in this step, because it was absent or has none.
    pub const NO_ELEMENTS: u32 = 1 << 31;

    /// Whether the tensor had elements in this step.
    pub fn has_elements(&self) -> bool {
        self.flags & Self::NO_ELEMENTS == 0
    }

    pub(crate) fn new(record: &Record) -> Self {
        let flag = |count: u64, bit: u32| if count > 0 { bit } else { 0 };
        let share = |count: u64| {
            #[expect(clippy::cast_precision_loss, reason = "rounded the same on every backend")]
            let share = if record.finite_count() > 0 { count as f64 / record.finite_count() as f64 } else { 0.0 };
            narrow(share)
        };
        Self {
            finite_l2_norm: record.finite_l2_norm(),
            max_abs: record.max_abs_or_zero,
            zero_fraction: share(record.zero_count),
            dead_fraction: share(record.dead_count),
            flags: flag(record.nan_count, StepOutputs::FLAG_NAN)
                | flag(record.inf_count, StepOutputs::FLAG_INF)
                | if record.count == 0 { Self::NO_ELEMENTS } else { 0 },
        }
    }
}

/// Gives the bytes that a history of so many steps takes where the gradients are.
///
/// # Errors
/// [`Error::InvalidConfig`] for 0 steps.
pub(crate) fn bytes(steps: u32, tensors: usize) -> Result<usize, Error> {
    if steps == 0 {
        return Err(Error::InvalidConfig { option: "history", expected: "at least 1", value: "0".to_owned() });
    }
    let of_a_step = size_of::<HistoryStep>() + tensors * size_of::<HistoryTensor>();
    (steps as usize).checked_mul(of_a_step).ok_or(Error::OutOfMemory { bytes: u64::MAX })
}

/// Holds the last steps, oldest first.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe};
///
/// let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new().history(3))?;
/// for scale in [1.0f32, 1.0, 2.0, 4.0] {
///     probe.measure(&[&[3.0 * scale, 4.0 * scale]])?;
/// }
/// let history = probe.history()?.report()?;
/// assert_eq!(history.steps().map(|(step, _)| step.outputs.step).collect::<Vec<_>>(), [2, 3, 4]);
/// assert_eq!(history.total_norm().change, Some(2.0));
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HistoryReport {
    plan: Plan,
    steps: Vec<HistoryStep>,
    /// Tensors of each step, one a tensor.
    tensors: Vec<Vec<HistoryTensor>>,
}

/// Summarises a norm over a window of steps, without those that are not finite or skipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormStatistics {
    /// The number of steps.
    pub steps: usize,
    /// Mean of the norm; 0 without steps.
    pub mean: f64,
    /// Coefficient of variation: std (ddof 0) / mean. `None` without steps or where the norm is always 0.
    pub cv: Option<f64>,
    /// The last norm over the one before. `None` below two steps and after a norm of 0.
    pub change: Option<f64>,
    /// Standard deviations (ddof 0) of the logarithm of the last norm above the mean of those before it: norms are
    /// positive and heavy-tailed. The deviation counts as at least 0.01, so that a run without noise does not make a
    /// spike of every change. `None` with fewer than two norms before it that are not 0, or when it is 0.
    pub log_z: Option<f64>,
}

impl NormStatistics {
    /// The least standard deviation of the logarithm: 1 % of the norm.
    const LEAST_DEVIATION: f64 = 0.01;

    #[expect(clippy::cast_precision_loss, reason = "a few steps")]
    fn of(norms: &[f64]) -> Self {
        let moments = |values: &[f64]| {
            let count = values.len().max(1) as f64;
            let mean = values.iter().sum::<f64>() / count;
            (mean, (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt())
        };
        let (mean, std) = moments(norms);
        let last = norms.last().copied();
        let before = &norms[..norms.len().saturating_sub(1)];
        let logarithms: Vec<f64> = before.iter().filter(|&&norm| norm > 0.0).map(|norm| norm.ln()).collect();
        let log_z = last.filter(|&norm| norm > 0.0 && logarithms.len() >= 2).map(|norm| {
            let (mean, std) = moments(&logarithms);
            (norm.ln() - mean) / std.max(Self::LEAST_DEVIATION)
        });
        let previous = before.last().copied().filter(|&norm| norm > 0.0);
        Self {
            steps: norms.len(),
            mean,
            cv: (mean > 0.0).then(|| std / mean),
            change: last.zip(previous).map(|(last, previous)| last / previous),
            log_z,
        }
    }
}

impl HistoryReport {
    /// Makes a report from a ring, whose empty places are 0.
    pub(crate) fn new(plan: Plan, steps: &[HistoryStep], tensors: &[HistoryTensor], numbering: &Numbering) -> Self {
        let mut places: Vec<usize> = (0..steps.len()).filter(|&place| steps[place].outputs.step > 0).collect();
        places.sort_by_key(|&place| steps[place].outputs.step);
        let count = plan.tensors().len();
        Self {
            steps: places.iter().map(|&place| steps[place].numbered(numbering)).collect(),
            tensors: places.iter().map(|&place| tensors[place * count..(place + 1) * count].to_vec()).collect(),
            plan,
        }
    }

    /// The steps, oldest first, each with one entry a tensor in the plan's order.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = (&HistoryStep, &[HistoryTensor])> {
        self.steps.iter().zip(self.tensors.iter().map(Vec::as_slice))
    }

    /// The plan of the tensors.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The steps that are finite and not skipped.
    fn clean(&self) -> impl Iterator<Item = (&HistoryStep, &[HistoryTensor])> {
        self.steps().filter(|(step, _)| step.outputs.found_inf == 0.0 && step.outputs.skip == 0)
    }

    /// Summarises the norm of all tensors.
    pub fn total_norm(&self) -> NormStatistics {
        NormStatistics::of(&self.clean().map(|(step, _)| step.outputs.finite_total_norm).collect::<Vec<_>>())
    }

    /// Summarises the norm of the tensor at `index` of the plan, over the steps in which it had a gradient. A step in
    /// which another tensor is not finite is left out as well: its gradients are of a computation that failed.
    ///
    /// # Panics
    /// When the plan has no such tensor.
    pub fn tensor_norm(&self, index: usize) -> NormStatistics {
        let there = self.clean().map(|(_, tensors)| &tensors[index]).filter(|tensor| tensor.has_elements());
        NormStatistics::of(&there.map(|tensor| tensor.finite_l2_norm).collect::<Vec<_>>())
    }

    /// Counts the steps in a row, up to the last, in which the tensor at `index` meets a condition: a norm that is too
    /// small, say. Steps that are not finite, or in which it is absent, neither count nor interrupt.
    ///
    /// # Panics
    /// When the plan has no such tensor.
    pub fn persistence(&self, index: usize, holds: impl Fn(&HistoryTensor) -> bool) -> usize {
        let there = self.clean().map(|(_, tensors)| &tensors[index]).filter(|tensor| tensor.has_elements());
        there.collect::<Vec<_>>().into_iter().rev().take_while(|tensor| holds(tensor)).count()
    }

    /// Share of the steps that were clipped. `None` without a step.
    pub fn clipped_fraction(&self) -> Option<f64> {
        let (steps, clipped) = self.clean().fold((0, 0), |(steps, clipped), (step, _)| {
            (steps + 1, clipped + u32::from(step.outputs.flags & StepOutputs::FLAG_CLIPPED != 0))
        });
        (steps > 0).then(|| f64::from(clipped) / f64::from(steps))
    }

    /// Geometric mean of the coefficients: the clip's factor on the learning rate. `None` without a step.
    #[expect(clippy::cast_precision_loss, reason = "a few steps")]
    pub fn mean_coefficient(&self) -> Option<f64> {
        let logarithms: Vec<f64> = self.clean().map(|(step, _)| step.outputs.coefficient_f64.ln()).collect();
        (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
    }
}
