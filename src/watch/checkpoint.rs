//! A watched run that is interrupted and goes on.

use super::{Watch, told::Told};
use crate::{
    Error, Probe, ProbeState,
    probe::{load, save},
    write::{Background, Entry, Sink},
};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// All that reaches from one step to the next.
#[derive(Serialize, Deserialize)]
struct WatchState {
    probe: ProbeState,
    of_steps: Told,
    of_looks: Told,
    learning_rate: Option<f64>,
}

impl<P: AsMut<Probe>> Watch<P> {
    /// Saves all that reaches from one step to the next into a file: the probe's [state](ProbeState) and what has been told. Waits
    /// for the last step. The weights, and an optimizer that is not the probe's, are the trainer's to save.
    ///
    /// # Errors
    /// [`Error::Unwritable`], [`Error::WaitInCapture`], or the device's.
    pub fn save(&mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.wait()?;
        // So that files do not end before the checkpoint.
        self.writers.iter().for_each(Background::flush);
        let probe = self.probe.as_mut().state()?;
        let Self { of_steps, of_looks, learning_rate, .. } = self;
        let (of_steps, of_looks) = (of_steps.clone(), of_looks.clone());
        save(&WatchState { probe, of_steps, of_looks, learning_rate: *learning_rate }, path.as_ref())
    }

    /// Goes on from there, with the bits of a run that was not interrupted, in a watch that is declared as that was. Before the first step.
    /// Gives the number of the last step. Files that have steps after the checkpoint keep them: those steps are the same, and not
    /// written again.
    ///
    /// # Errors
    /// [`Error::Unreadable`] for a file that is none of this version, [`Error::InvalidConfig`] after the first step, and those of
    /// [`Probe::restore`]. Nothing is changed then, but where the device fails.
    pub fn restore(&mut self, path: impl AsRef<Path>) -> Result<u64, Error> {
        if self.has_begun {
            let value = "after a step".to_owned();
            return Err(Error::InvalidConfig { option: "restore", expected: "before the first step", value });
        }
        let state: WatchState = load(path.as_ref(), "watched run")?;
        let probe = self.probe.as_mut();
        let before = probe.health().map(|health| health.rules().clone()).ok();
        if let (Some(rules), Some(rate)) = (&before, state.learning_rate) {
            probe.set_rules(rules.clone().learning_rate(rate))?;
        }
        let restored = probe.restore(&state.probe);
        if let (Err(_), Some(rules)) = (&restored, before) {
            probe.set_rules(rules)?;
        }
        restored?;
        (self.of_steps, self.of_looks, self.learning_rate) = (state.of_steps, state.of_looks, state.learning_rate);
        self.is_resumed = true;
        Ok(self.probe.as_mut().last_step())
    }
}

/// A sink that has some of the steps already.
pub(super) struct Resumed {
    pub sink: Box<dyn Sink>,
    pub last: u64,
}

impl Sink for Resumed {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        if entry.step() > self.last { self.sink.write(entry) } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.sink.finish()
    }
}
