//! The state of a probe, for a run that is interrupted and goes on, on any number of ranks.

use super::{
    Core, Probe,
    numbering::{Jumps, Numbering},
    outside_capture, values,
};
#[cfg(feature = "checkpoint")]
use crate::write::file::{replace, unwritable};
use crate::{
    Error, Plan, StepOutputs, TensorSpec,
    features::{Rooms, Saved},
    gsnr::Tracking,
    health::Judge,
    history::History,
    optim::OptimizerMemory,
    samples::Samples,
};
#[cfg(feature = "checkpoint")]
use std::path::Path;

/// Holds all that reaches from one step to the next beside the gradients and the weights: [`Probe::state`],
/// [`Probe::restore`]. A run that is interrupted and goes on from it has the bits of one that was not: of reports,
/// clips and loss scale, diagnoses, history, samples, signal and noise, and the weights that an optimizer moves.
///
/// The declaration is no part of it, nor are later settings: the rules, and the learning rate. Declare and set them as
/// they were before [`Probe::restore`]. Micro-batches of an accumulation that no step has ended are left out as well.
///
/// # Files
/// With the feature `serde` it can be serialized in any format: numbers as their bits, and lists as bytes, in the
/// machine's byte order. With the feature `checkpoint`, `save` and `load` write it to a file and read it back:
///
#[cfg_attr(feature = "checkpoint", doc = "```")]
#[cfg_attr(not(feature = "checkpoint"), doc = "```ignore")]
/// use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe, ProbeState, Rules};
///
/// let path = std::env::temp_dir().join("gradprobe.state");
/// let make = || {
///     let plan = Plan::new([("weight", DType::F32, 3)])?;
///     let clip = Clip::Percentile { percentile: 10.0, history: 100, max_norm: None };
///     Probe::new(Cpu, plan, Config::new().clip(clip).history(64).rules(Rules::default()))
/// };
/// let mut probe = make()?;
/// probe.measure(&[&[1.0f32, 2.0, 3.0]])?;
/// probe.state()?.save(&path)?;
/// // another day:
/// let mut probe = make()?;
/// probe.restore(&ProbeState::load(&path)?)?;
/// probe.measure(&[&[1.0f32, 2.0, 3.0]])?;
/// assert_eq!(probe.wait()?.step(), 2);
/// # std::fs::remove_file(&path).unwrap();
/// # Ok::<(), gradprobe::Error>(())
/// ```
///
/// # Ranks
/// A state is of one rank's plan, and goes to any rank with the same plan. Replicas all take the same state, however
/// many there are. Where ranks have tensors of their own, each saves its own. With another number of such ranks, or
/// with other parts, they go on from the [`common`](Self::common) state of any: step, clip and loss scale.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ProbeState {
    version: Version,
    /// Steps measured.
    pub measured: u64,
    /// The trainer's numbers of them, as far as they are still needed.
    numbering: Jumps,
    /// The clip's state, as the device has it: the same on all ranks, but for averages of a rank's own tensors.
    #[cfg_attr(feature = "serde", serde(with = "super::bytes"))]
    pub clip: Vec<u64>,
    /// The loss scale of the next step, and the steps without NaN or Inf since it last changed.
    pub loss_scale: Option<(f32, u32)>,
    own: Option<Own>,
}

/// The part that belongs to the tensors of one plan.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Own {
    plan: Vec<TensorSpec>,
    rules: Option<<Judge as Saved>::State>,
    history: Option<<History as Saved>::State>,
    tracking: Option<<Tracking as Saved>::State>,
    samples: Option<<Samples as Saved>::State>,
    optimizer: Option<<OptimizerMemory as Saved>::State>,
}

/// The version of the format, with which a serialized state begins. A change of any field needs a new one.
const VERSION: u32 = 1;

/// Serializes as [`VERSION`], and reads nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(into = "u32", try_from = "u32"))]
struct Version;

impl From<Version> for u32 {
    fn from(_: Version) -> Self {
        VERSION
    }
}

impl TryFrom<u32> for Version {
    type Error = Error;

    fn try_from(version: u32) -> Result<Self, Error> {
        if version == VERSION {
            Ok(Self)
        } else {
            differs(format!("it has version {version}, and this reads {VERSION}"))
        }
    }
}

/// No probe comes that far; steps behind it would have no number.
pub(super) const LAST: u64 = 1 << 62;

/// # Errors
/// [`Error::StateOfAnotherProbe`], always.
pub(crate) fn differs<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::StateOfAnotherProbe { what: what.into() })
}

/// Gives the state of a feature, if it is declared.
fn state_of<M: Saved>(core: &Core, memory: &mut Option<M>) -> Result<Option<M::State>, Error> {
    memory.as_mut().map(|memory| memory.state(core)).transpose()
}

fn check<M: Saved>(core: &Core, memory: &Option<M>, state: &Option<M::State>) -> Result<(), Error> {
    let declare = M::DECLARE;
    match (memory, state) {
        (Some(memory), Some(state)) => memory.check(core, state),
        (None, None) => Ok(()),
        (Some(_), None) => differs(format!("`{declare}` is declared here, and was not where it was saved")),
        (None, Some(_)) => differs(format!("`{declare}` is not declared here, and was where it was saved")),
    }
}

fn restore<M: Saved>(core: &Core, memory: &mut Option<M>, state: &Option<M::State>) -> Result<(), Error> {
    memory.as_mut().zip(state.as_ref()).map_or(Ok(()), |(memory, state)| memory.restore(core, state))
}

impl Own {
    fn of(core: &Core, rooms: &mut Rooms) -> Result<Self, Error> {
        Ok(Self {
            plan: core.plan.tensors().to_vec(),
            rules: state_of(core, &mut rooms.rules)?,
            history: state_of(core, &mut rooms.history)?,
            tracking: state_of(core, &mut rooms.tracking)?,
            samples: state_of(core, &mut rooms.samples)?,
            optimizer: state_of(core, &mut rooms.optimizer)?,
        })
    }

    fn check(&self, core: &Core, rooms: &Rooms) -> Result<(), Error> {
        check_plan(&self.plan, &core.plan)?;
        check(core, &rooms.rules, &self.rules)?;
        check(core, &rooms.history, &self.history)?;
        check(core, &rooms.tracking, &self.tracking)?;
        check(core, &rooms.samples, &self.samples)?;
        check(core, &rooms.optimizer, &self.optimizer)
    }

    fn restore(&self, core: &Core, rooms: &mut Rooms) -> Result<(), Error> {
        restore(core, &mut rooms.rules, &self.rules)?;
        restore(core, &mut rooms.history, &self.history)?;
        restore(core, &mut rooms.tracking, &self.tracking)?;
        restore(core, &mut rooms.samples, &self.samples)?;
        restore(core, &mut rooms.optimizer, &self.optimizer)
    }
}

/// # Errors
/// [`Error::StateOfAnotherProbe`], with the first tensor that differs.
fn check_plan(saved: &[TensorSpec], plan: &Plan) -> Result<(), Error> {
    let own = plan.tensors();
    let count = saved.len().max(own.len());
    let Some(place) = (0..count).find(|&place| saved.get(place) != own.get(place)) else { return Ok(()) };
    let said = |spec: Option<&TensorSpec>| {
        spec.map_or("none".to_owned(), |TensorSpec { name, dtype, len }| format!("{name:?} of {len} {dtype} elements"))
    };
    differs(format!("tensor {place} of its plan is {}, and here {}", said(saved.get(place)), said(own.get(place))))
}

impl ProbeState {
    /// Gives the part that ranks have in common with any tensors: step, clip and loss scale. A clip by averages of
    /// tensors still keeps those of a rank's own.
    #[must_use]
    pub fn common(&self) -> Self {
        Self { own: None, ..self.clone() }
    }
}

impl Probe {
    /// Gives the state after the last launched step, for which it waits. Takes as much memory of the host as the
    /// features keep on the device.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn state(&mut self) -> Result<ProbeState, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        if self.core.measured {
            self.wait()?;
        }
        let measured = self.reports.reported();
        let Self { core, rooms, .. } = self;
        core.clip_read.start(&core.clip_state)?;
        let clip = values(core.clip_read.wait()?);
        let loss_scale = state_of(core, &mut rooms.loss_scale)?;
        let (numbering, own) = (core.numbering.jumps(), Some(Own::of(core, rooms)?));
        Ok(ProbeState { version: Version, measured, numbering, clip, loss_scale, own })
    }

    /// Goes on from this state: the next step is the one after it, and gives the same bits. Parts that the state does
    /// not have, as in a [`common`](ProbeState::common) one, stay as they are. All ranks must do this from the same
    /// step. [`FLAG_STATE`](StepOutputs::FLAG_STATE) names one that differs in the next step or, where ranks compare a
    /// step later, in the one after.
    ///
    /// # Errors
    /// [`Error::StateOfAnotherProbe`], which names the first tensor of another plan, a feature with another
    /// declaration, or an impossible value. [`Error::InvalidConfig`] for an invalid loss scale.
    /// [`Error::UploadInCapture`], or the device's. Nothing is changed unless the device fails.
    pub fn restore(&mut self, state: &ProbeState) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        let Self { reports, core, rooms } = self;
        let ProbeState { measured, numbering, clip, loss_scale, own, .. } = state;
        own.as_ref().map_or(Ok(()), |own| own.check(core, rooms))?;
        check(core, &rooms.loss_scale, loss_scale)?;
        if !core.config.clip.is_state(core.plan.tensors().len(), clip) {
            let words = clip.len();
            return differs(format!("its clip has {words} words that {:?} cannot have kept", core.config.clip));
        }
        // The first word of a clip is the number of steps that it has learnt from.
        if [*measured].iter().chain(clip.first()).any(|&steps| steps > LAST) {
            return differs(format!("it is of {measured} steps, and its clip of {:?}", clip.first()));
        }
        let Some(numbering) = Numbering::restored(*measured, numbering) else {
            return differs(format!("it has other numbers than rising ones of {measured} steps"));
        };
        restore(core, &mut rooms.loss_scale, loss_scale)?;
        core.numbering = numbering;
        // There is no measurement to wait for, or to clip by; but a graph may replay one.
        core.measured &= core.promised;
        core.device.upload(bytemuck::cast_slice(clip), &core.clip_state)?;
        own.as_ref().map_or(Ok(()), |own| own.restore(core, rooms))?;
        reports.restore(&*core.device, StepOutputs { step: *measured, ..StepOutputs::default() })
    }
}

#[cfg(feature = "checkpoint")]
impl ProbeState {
    /// Writes the state to a file. The file then has all of it or, after an error, its old content.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        save(self, path.as_ref())
    }

    /// Reads a state that [`save`](Self::save) has written.
    ///
    /// # Errors
    /// [`Error::Unreadable`], which describes the content where that is no state of this version.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        load(path.as_ref(), "probe")
    }
}

/// Writes a state that begins with a [`Version`] to a file, whole or not at all.
///
/// # Errors
/// [`Error::Unwritable`].
#[cfg(feature = "checkpoint")]
pub(crate) fn save(state: &impl serde::Serialize, path: &Path) -> Result<(), Error> {
    let bytes = postcard::to_stdvec(state).map_err(|error| unwritable(path, error))?;
    replace(path, &bytes)
}

/// Reads the state of `whose`.
///
/// # Errors
/// [`Error::Unreadable`], which describes the content where that is no state of this version.
#[cfg(feature = "checkpoint")]
pub(crate) fn load<T: serde::de::DeserializeOwned>(path: &Path, whose: &str) -> Result<T, Error> {
    let unreadable = |reason: String| Error::Unreadable { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
    // Another version may have other fields behind its number.
    let version = postcard::take_from_bytes::<u32>(&bytes).map(|(version, _)| version);
    if let Some(error) = version.ok().and_then(|version| Version::try_from(version).err()) {
        return Err(unreadable(error.to_string()));
    }
    match postcard::take_from_bytes(&bytes) {
        Ok((state, [])) => Ok(state),
        Ok((_, rest)) => Err(unreadable(format!("no state of a {whose}: {} bytes are left behind one", rest.len()))),
        Err(error) => Err(unreadable(format!("no state of a {whose}: {error}"))),
    }
}
