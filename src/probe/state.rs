//! What a probe has learnt, for a run that is interrupted and goes on, on as many ranks as there are then.

use super::{Probe, outside_capture, values};
use crate::{Error, StepOutputs, clip::check_scale};

/// What decides the next step beside its gradients: [`Probe::state`], [`Probe::restore`]. Plain numbers, for a checkpoint of
/// whatever format. What is tracked across steps, the history, the moments of an optimizer and what a diagnosis has learnt
/// are not in it.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ProbeState {
    /// The number of the last step: [`Probe::set_step`].
    pub step: u64,
    /// Steps measured.
    pub measurements: u64,
    /// What the clip remembers, as the device has it: the same on all ranks, but for averages of a rank's own tensors.
    pub clip: Vec<u64>,
    /// The loss scale of the next step, and the steps without NaN or Inf since it last changed.
    pub loss_scale: Option<(f32, u32)>,
}

/// No probe comes that far; steps behind it would have no number.
pub(super) const LAST: u64 = 1 << 62;

impl Probe {
    /// What has been learnt up to the last step that was launched, for which it waits.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn state(&mut self) -> Result<ProbeState, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        if self.core.measured {
            self.wait()?;
        }
        let measurements = self.reports.reported();
        let step = self.core.numbering.of(measurements);
        let Self { core, rooms, .. } = self;
        core.clip_read.start(&core.clip_state)?;
        let clip = values(core.clip_read.wait()?);
        let loss_scale = match &mut rooms.loss_scale {
            Some(memory) => Some(memory.current(&*core.device)?),
            None => None,
        };
        Ok(ProbeState { step, measurements, clip, loss_scale })
    }

    /// Goes on from there: the next step is the one after, and decided as it would have been. On many ranks all do this, with
    /// the state of any: one with another is named in the next step, or where ranks compare a step later in the one after, by
    /// [`FLAG_STATE`](StepOutputs::FLAG_STATE).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a state of a probe with another clip, or with a loss scale where this has none, or the other
    /// way round; [`Error::UploadInCapture`], or the device's.
    pub fn restore(&mut self, state: &ProbeState) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        let Self { reports, core, rooms } = self;
        let is_of_clip = core.config.clip.is_state(core.plan.tensors().len(), &state.clip);
        // The first word of a clip is the number of the steps that it has learnt from.
        let is_late = [state.step, state.measurements].iter().chain(state.clip.first()).any(|&steps| steps > LAST);
        if !is_of_clip || is_late || rooms.loss_scale.is_some() != state.loss_scale.is_some() {
            let ProbeState { step, clip, loss_scale, .. } = state;
            let value = format!("of step {step}, {} words, loss scale {loss_scale:?}", clip.len());
            let expected = "of a probe with the same clip, plan and loss scale";
            return Err(Error::InvalidConfig { option: "state", expected, value });
        }
        if let (Some(memory), Some((scale, growth_tracker))) = (&rooms.loss_scale, state.loss_scale) {
            check_scale(scale)?;
            memory.set(&*core.device, scale, growth_tracker)?;
        }
        core.device.upload(bytemuck::cast_slice(&state.clip), &core.clip_state)?;
        core.numbering.restore(state.measurements, state.step);
        reports.restore(&*core.device, StepOutputs { step: state.measurements, ..StepOutputs::default() })
    }
}
