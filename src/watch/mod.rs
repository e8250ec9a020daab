//! A trainer's steps, watched: measured, clipped, diagnosed, written and told, in one call a step.

#[cfg(feature = "checkpoint")]
mod checkpoint;
mod step;
mod told;

pub use step::WatchedStep;

use crate::{
    Diagnosis, Error, Probe, Report, Tensor, TensorMut,
    gsnr::GsnrReport,
    health::Cadence,
    histogram::HistogramReport,
    write::{Background, Entry, Finished, Sink, checked_scalars},
};
#[cfg(any(feature = "json", feature = "tensorboard"))]
use std::path::Path;
use std::{
    collections::VecDeque,
    fmt,
    io::{self, Write},
    sync::Arc,
};
use told::{Change, Told};

/// Entries that may wait for the thread that writes.
const QUEUE: usize = 64;
/// Steps from one with details to the next. A look at histograms, and at signal and noise, is a pass over memory each.
const DETAILS: u64 = 10;

/// Watches the steps of a trainer: a probe, and all that is done with its reports. Steps have the trainer's own numbers.
///
/// A step is measured and clipped, and its report read when it has arrived. With the rules of [`Config`](crate::Config) it is
/// diagnosed, and findings go to standard error: once, when they begin, and a line when all are over. Histograms and signal to noise,
/// where they are declared, are looked at in every 10th step ([`details`](Self::details)). Nothing of that waits. A thread of its own
/// writes to [`write_to`](Self::write_to) and [`sink`](Self::sink). End with [`finish`](Self::finish): reports that are still on their way are
/// lost without it.
///
/// With other [ranks](crate::ranks) every rank watches, writes and saves in a place of its own; where all tensors are replicas, rank 0 alone
/// may write. A probe whose measurements a CUDA graph replays cannot be watched: the host does not see its steps; read it with
/// [`Probe::poll`].
///
/// ```
/// use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe, Watch};
///
/// let (mut weight, mut bias) = (vec![0.3f32; 4096], vec![0.1f32; 64]);
/// let plan = Plan::new([("weight", DType::F32, 4096), ("bias", DType::F32, 64)])?;
/// let config = Config::full().clip(Clip::global_norm(1.0));
/// let mut watch = Watch::new(Probe::new(Cpu, plan, config)?);
/// # #[cfg(feature = "json")]
/// watch.write_to(std::env::temp_dir().join(format!("run-{}", std::process::id())))?;
/// for step in 0..3 {
///     // … backward …
///     let seen = watch.step(step, &mut [&mut weight, &mut bias], [("loss", 2.5), ("lr", 1e-3)])?;
///     assert!(seen.is_some_and(|seen| seen.step() == step && !seen.skip()));
/// }
/// watch.finish()?;
/// # Ok::<(), gradprobe::Error>(())
/// ```
pub struct Watch<P = Probe> {
    probe: P,
    details: Cadence,
    /// Until the first step.
    sinks: Vec<Box<dyn Sink>>,
    writers: Option<Background>,
    /// Steps measured whose reports have not come yet, the oldest first.
    waiting: VecDeque<Waiting>,
    of_steps: Told,
    of_looks: Told,
    is_quiet: bool,
    /// Whether it was told that a step was lost.
    told_lost: bool,
    /// Steps whose reports did not come.
    left_out: u64,
    last: Option<WatchedStep>,
    /// Whether a step was taken.
    has_begun: bool,
    /// The learning rate that the rules go by.
    learning_rate: Option<f64>,
    /// Whether it goes on from a checkpoint.
    #[cfg(feature = "checkpoint")]
    is_resumed: bool,
}

/// A step whose report has not come yet.
struct Waiting {
    step: u64,
    scalars: Vec<(String, f64)>,
    has_details: bool,
    look: Look,
}

/// What is looked at beside the step.
#[derive(Default)]
struct Look {
    /// Whether they are still on their way.
    has_histogram: bool,
    has_gsnr: bool,
    histogram: Option<HistogramReport>,
    gsnr: Option<GsnrReport>,
}

impl Look {
    fn is_under_way(&self) -> bool {
        self.has_histogram || self.has_gsnr
    }

    /// Waits for what is on its way.
    ///
    /// # Errors
    /// The device's.
    fn finish(&mut self, probe: &mut Probe) -> Result<(), Error> {
        if std::mem::take(&mut self.has_histogram) {
            self.histogram = Some(probe.histogram()?.finish()?);
        }
        if std::mem::take(&mut self.has_gsnr) {
            match probe.gsnr()?.finish() {
                Ok(gsnr) => self.gsnr = Some(gsnr),
                Err(Error::TooFewSteps { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl<P: AsMut<Probe>> Watch<P> {
    /// Watches the steps of this probe, or of an adapter's.
    pub fn new(probe: P) -> Self {
        Self {
            probe,
            details: Cadence::each(DETAILS),
            sinks: Vec::new(),
            writers: None,
            waiting: VecDeque::new(),
            of_steps: Told::default(),
            of_looks: Told::default(),
            is_quiet: false,
            told_lost: false,
            left_out: 0,
            last: None,
            has_begun: false,
            learning_rate: None,
            #[cfg(feature = "checkpoint")]
            is_resumed: false,
        }
    }

    /// Writes the run into this folder, made if it is not there: `steps.jsonl` with the feature `json`, for `gradprobe report` and
    /// `live`, and event files in `tensorboard` with that feature. Before the first step.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    #[cfg(any(feature = "json", feature = "tensorboard"))]
    pub fn write_to(&mut self, folder: impl AsRef<Path>) -> Result<(), Error> {
        let folder = folder.as_ref();
        crate::write::make_folder(folder)?;
        #[cfg(feature = "json")]
        self.sink(crate::write::JsonLines::open(folder.join("steps.jsonl"))?);
        #[cfg(feature = "tensorboard")]
        self.sink(crate::write::TensorBoard::create(folder.join("tensorboard"))?);
        Ok(())
    }

    /// Writes the run to this as well. Before the first step.
    pub fn sink(&mut self, sink: impl Sink + 'static) {
        self.sinks.push(Box::new(sink));
    }

    /// Sets the steps with details: their tensors are written to files that grow, and histograms, signal and noise looked at. By default
    /// every 10th. A step in which a finding begins has its tensors written all the same. A look that would have to wait for the one
    /// before is left out.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a cadence of some tensors: a step has the details of all.
    pub fn details(&mut self, cadence: Cadence) -> Result<(), Error> {
        if cadence.is_of_some_tensors() {
            let value = "one of some tensors".to_owned();
            return Err(Error::InvalidConfig { option: "details", expected: "a cadence of all tensors", value });
        }
        self.details = cadence;
        Ok(())
    }

    /// Tells nothing on standard error: [`WatchedStep::changed`] is for the trainer to show.
    pub fn quiet(&mut self) {
        self.is_quiet = true;
    }

    /// The probe, to set values and to ask for history or samples. A report or histogram that is taken from it is not written.
    pub fn probe(&mut self) -> &mut P {
        &mut self.probe
    }

    /// Takes a step as `run` does, for a trainer that needs another than `step` and `update`. `run` launches one measurement on the probe;
    /// where its second argument is true, it first calls [`histogram()?.start(…)`](crate::Room::start).
    ///
    /// `scalars` are the trainer's own numbers of the step. The diagnosis goes by the one that is called `lr` or `learning_rate`, where its
    /// rules are the default ones or know a rate already: anew when it has changed by more than a factor of 2.
    ///
    /// Gives the last step whose report has come: on the CPU this one, on a GPU this or one of the last few. With several at once, its
    /// [`changed`](WatchedStep::changed) is of all of them.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless the step is after the last, and for scalars of odd names; [`Error::StepWritten`] when the first step is
    /// not after those that are written; those of `run`, and the device's.
    pub fn step_with<'s, E: From<Error>>(
        &mut self,
        step: u64,
        scalars: impl IntoIterator<Item = (&'s str, f64)>,
        run: impl FnOnce(&mut P, bool) -> Result<(), E>,
    ) -> Result<Option<WatchedStep>, E> {
        let scalars = checked_scalars(scalars)?;
        self.probe.as_mut().set_step(step)?;
        self.open(step)?;
        self.follow_learning_rate(&scalars)?;
        self.has_begun = true;
        let probe = self.probe.as_mut();
        let has_details = self.details.includes(step);
        // There is room for one look.
        let looks = has_details && self.waiting.iter().all(|waiting| !waiting.look.is_under_way());
        let has_histogram = looks && probe.declares_histogram();
        run(&mut self.probe, has_histogram)?;
        let probe = self.probe.as_mut();
        let has_gsnr = looks && probe.declares_tracking();
        if has_gsnr {
            probe.gsnr()?.start()?;
        }
        let look = Look { has_histogram, has_gsnr, ..Look::default() };
        self.waiting.push_back(Waiting { step, scalars, has_details, look });
        self.see_all(Probe::poll).map_err(E::from)
    }

    /// Waits for all steps whose reports have not come. Gives the last step, also if it has been given before; `None` before the first.
    ///
    /// # Errors
    /// The device's.
    pub fn wait(&mut self) -> Result<Option<WatchedStep>, Error> {
        let seen = self.see_all(Probe::next_report)?;
        Ok(seen.or_else(|| self.last.clone()))
    }

    /// Waits for the last step, and until all is written. Steps after it are measured, and not written.
    ///
    /// [`Finished::dropped`] counts also the steps whose reports did not come, as the host was more than four steps ahead of the device.
    ///
    /// # Errors
    /// The first step that is lost, and why; and the device's.
    pub fn finish(&mut self) -> Result<Finished, Error> {
        self.wait()?;
        let mut finished = self.writers.take().map(Background::finish).unwrap_or_default();
        finished.dropped += self.left_out;
        if finished.dropped > 0 {
            self.say(&format!(
                "{} steps are not written: the disk or the host's reads were too slow\n",
                finished.dropped
            ));
        }
        match finished.error {
            Some(error) => Err(error),
            None => Ok(finished),
        }
    }

    /// Takes in the reports that `next` gives, and gives the last of them.
    fn see_all(
        &mut self,
        next: impl Fn(&mut Probe) -> Result<Option<Report>, Error>,
    ) -> Result<Option<WatchedStep>, Error> {
        let mut last: Option<WatchedStep> = None;
        while !self.waiting.is_empty() {
            let Some(report) = next(self.probe.as_mut())? else { break };
            let mut seen = self.see(report)?;
            if let Some(before) = last.and_then(|last| last.changed) {
                seen.changed = Some(before + seen.changed.as_deref().unwrap_or_default());
            }
            last = Some(seen);
        }
        if last.is_some() {
            self.last.clone_from(&last);
        }
        Ok(last)
    }

    /// Has the writers begin with this step.
    fn open(&mut self, step: u64) -> Result<(), Error> {
        if self.sinks.is_empty() {
            return Ok(());
        }
        #[cfg(feature = "checkpoint")]
        if self.is_resumed {
            self.sinks = std::mem::take(&mut self.sinks).into_iter().map(resumed).collect();
        }
        for sink in &self.sinks {
            if let Some((path, last)) = sink.last().filter(|&(_, last)| step <= last) {
                return Err(Error::StepWritten { path: path.to_owned(), step, last });
            }
        }
        self.writers = Some(Background::new(std::mem::take(&mut self.sinks), QUEUE)?);
        Ok(())
    }

    fn follow_learning_rate(&mut self, scalars: &[(String, f64)]) -> Result<(), Error> {
        let rate = scalars.iter().find(|(name, _)| name == "lr" || name == "learning_rate").map(|(_, rate)| *rate);
        let is_near = |rate: f64| self.learning_rate.is_some_and(|last| rate <= 2.0 * last && last <= 2.0 * rate);
        let Some(rate) = rate.filter(|&rate| !is_near(rate)) else { return Ok(()) };
        let probe = self.probe.as_mut();
        let Ok(rules) = probe.health().map(|health| health.rules().clone()) else { return Ok(()) };
        if rules.follows_learning_rate() {
            let rules = rules.learning_rate(rate);
            // A warm-up may begin with 0.
            if rules.check().is_ok() {
                probe.set_rules(rules)?;
                self.learning_rate = Some(rate);
            }
        }
        Ok(())
    }

    /// Takes in a report that has come.
    fn see(&mut self, report: Report) -> Result<WatchedStep, Error> {
        let probe = self.probe.as_mut();
        let mut waiting = None;
        // Reports of steps before it do not come any more.
        while self.waiting.front().is_some_and(|next| next.step <= report.step()) {
            self.left_out += u64::from(waiting.is_some());
            waiting = self.waiting.pop_front();
            waiting.as_mut().map_or(Ok(()), |next| next.look.finish(probe))?;
        }
        let Some(Waiting { scalars, has_details, look, .. }) = waiting.filter(|next| next.step == report.step()) else {
            return Ok(WatchedStep { entry: Arc::new(Entry::new(report)), changed: None });
        };
        let diagnosis = report.diagnosis();
        let beside = match (probe.health(), &look.gsnr) {
            (Ok(health), Some(gsnr)) => health.diagnose_gsnr(gsnr)?,
            _ => Vec::new(),
        };
        let of_step = self.of_steps.update(diagnosis.into_iter().flat_map(Diagnosis::findings));
        let of_look = if look.gsnr.is_some() { self.of_looks.update(&beside) } else { Change::None };
        let changes = [of_step, of_look];
        let is_new = changes.contains(&Change::New);
        let is_over = changes.contains(&Change::Over) && self.of_steps.is_empty() && self.of_looks.is_empty();
        let changed = if is_new {
            let diagnosis = diagnosis.filter(|_| of_step == Change::New);
            Some(step::words(report.step(), diagnosis, if of_look == Change::New { &beside } else { &[] }))
        } else {
            is_over.then(|| step::over(report.step()))
        };

        let mut entry = Entry::new(report).with_findings_beside(beside);
        entry = entry.with_checked_scalars(scalars);
        if let Some(gsnr) = look.gsnr {
            entry = entry.with_gsnr(gsnr)?;
        }
        if let Some(histogram) = look.histogram {
            entry = entry.with_own_histogram(histogram);
        }
        if !has_details && !is_new {
            entry = entry.without_details();
        }
        let seen = WatchedStep { entry: Arc::new(entry), changed };
        self.tell(&seen);
        Ok(seen)
    }

    fn tell(&mut self, seen: &WatchedStep) {
        if let Some(writers) = &mut self.writers {
            writers.send(Arc::clone(&seen.entry));
            let error = if self.told_lost { None } else { writers.error() };
            if let Some(error) = error {
                self.told_lost = true;
                self.say(&format!("{error}\n"));
            }
        }
        if let Some(changed) = seen.changed() {
            self.say(changed);
        }
    }

    fn say(&self, text: &str) {
        if !self.is_quiet {
            // Who has closed it wants to hear nothing.
            let _ = io::stderr().write_all(text.as_bytes());
        }
    }
}

/// Writes no step that is there.
#[cfg(feature = "checkpoint")]
fn resumed(sink: Box<dyn Sink>) -> Box<dyn Sink> {
    match sink.last().map(|(_, last)| last) {
        Some(last) => Box::new(checkpoint::Resumed { sink, last }),
        None => sink,
    }
}

impl Watch {
    /// Measures these gradients and clips them in place: [`Probe::step`]. Gives the last step whose report has come: on the CPU this one,
    /// on a GPU this or one of the last few.
    ///
    /// # Errors
    /// Those of [`step_with`](Self::step_with) and of [`Probe::step`].
    pub fn step<'s>(
        &mut self,
        step: u64,
        gradients: &mut [&mut dyn TensorMut],
        scalars: impl IntoIterator<Item = (&'s str, f64)>,
    ) -> Result<Option<WatchedStep>, Error> {
        self.step_with(step, scalars, |probe, has_histogram| {
            if has_histogram {
                let shared: Vec<&dyn Tensor> = gradients.iter().map(|gradient| &**gradient as &dyn Tensor).collect();
                probe.histogram()?.start(&shared)?;
            }
            probe.step(gradients)
        })
    }

    /// Measures these gradients and moves the weights by them, with the optimizer that is declared: [`Probe::update`].
    ///
    /// # Errors
    /// Those of [`step_with`](Self::step_with) and of [`Probe::update`].
    pub fn update<'s>(
        &mut self,
        step: u64,
        gradients: &[&dyn Tensor],
        weights: &mut [&mut dyn TensorMut],
        scalars: impl IntoIterator<Item = (&'s str, f64)>,
    ) -> Result<Option<WatchedStep>, Error> {
        self.step_with(step, scalars, |probe, has_histogram| {
            if has_histogram {
                probe.histogram()?.start(gradients)?;
            }
            probe.update(gradients, weights)
        })
    }
}

impl AsMut<Probe> for Probe {
    fn as_mut(&mut self) -> &mut Probe {
        self
    }
}

impl<P: fmt::Debug> fmt::Debug for Watch<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("probe", &self.probe).finish_non_exhaustive()
    }
}
