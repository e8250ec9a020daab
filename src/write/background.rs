//! Sinks on a thread of their own: training hands an entry over and goes on.

use super::{Entry, Sink};
use crate::Error;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
};

/// Writes entries to sinks on a thread of its own, behind a queue of bounded length. When the sinks cannot keep up,
/// entries are dropped and counted; [`send`](Self::send) never waits. A sink that fails stops neither the others nor
/// training.
///
/// [`lost`](Self::lost), [`dropped`](Self::dropped) and [`error`](Self::error) give the state while training goes on.
/// Dropping it writes the queue and loses errors; [`finish`](Self::finish) gives them.
///
/// ```
/// # use gradprobe::{Config, Cpu, DType, Plan, Probe};
/// use gradprobe::{Error, write::{Background, Entry, Sink}};
///
/// struct Print; // a sink of your own, beside those of this module
/// impl Sink for Print {
///     fn write(&mut self, entry: &Entry) -> Result<(), Error> {
///         println!("{}", entry.report());
///         Ok(())
///     }
/// }
///
/// # let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new())?;
/// # probe.measure(&[&[3.0f32, 4.0]])?;
/// let mut writers = Background::new(vec![Box::new(Print)], 16)?;
/// assert!(writers.send(Entry::new(probe.wait()?)));
/// assert_eq!(writers.finish().written, 1);
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Debug)]
pub struct Background {
    /// `None` once the thread is told to end.
    entries: Option<SyncSender<Arc<Entry>>>,
    thread: Option<JoinHandle<()>>,
    tally: Arc<Mutex<Tally>>,
    sent: u64,
    dropped: u64,
}

/// The counts of the entries handed over so far.
#[derive(Debug, Default)]
struct Tally {
    written: u64,
    lost: u64,
    error: Option<Error>,
}

/// The end of a run of sinks. Every entry that was sent is in one of the three counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Finished {
    /// Entries that every sink has written.
    pub written: u64,
    /// Entries that some sink did not write, because it failed or had panicked. Others may have written them.
    pub lost: u64,
    /// Entries dropped because the queue was full. No sink was given them.
    pub dropped: u64,
    /// The first error: [`Error::EntryLost`] with the first lost step, the file and the reason, or the error of
    /// [`Sink::finish`].
    pub error: Option<Error>,
}

impl Background {
    /// Starts the thread. `capacity` entries may wait: of a plan of 1000 tensors each takes 100 KB, and 8 MB with its
    /// histograms.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a capacity of 0, [`Error::Thread`] when the system can start no more threads.
    pub fn new(sinks: Vec<Box<dyn Sink>>, capacity: usize) -> Result<Self, Error> {
        if capacity == 0 {
            return Err(Error::InvalidConfig { option: "capacity", expected: "at least 1", value: "0".to_owned() });
        }
        let (entries, queue) = sync_channel::<Arc<Entry>>(capacity);
        let tally = Arc::new(Mutex::new(Tally::default()));
        let shared = Arc::clone(&tally);
        let work = move || {
            let mut sinks: Vec<Option<Box<dyn Sink>>> = sinks.into_iter().map(Some).collect();
            // The first error of each call, and whether every sink succeeded.
            let mut each = |does: &dyn Fn(&mut dyn Sink) -> Result<(), Error>| {
                let (mut first, mut all) = (None, true);
                for place in &mut sinks {
                    let done = place.as_mut().map(|sink| catch_unwind(AssertUnwindSafe(|| does(sink.as_mut()))));
                    all &= matches!(done, Some(Ok(Ok(()))));
                    let error = match done {
                        Some(Ok(done)) => done.err(),
                        Some(Err(_)) => {
                            // A sink that panicked is not called again.
                            let _ = catch_unwind(AssertUnwindSafe(|| drop(place.take())));
                            Some(Error::Thread { reason: "a sink panicked".to_owned() })
                        }
                        None => None,
                    };
                    first = first.or(error);
                }
                (first, all)
            };
            for entry in queue {
                let (error, all) = each(&|sink| sink.write(&entry));
                let mut tally = locked(&shared);
                *if all { &mut tally.written } else { &mut tally.lost } += 1;
                let lost = error.map(|error| Error::EntryLost { step: entry.step(), error: Box::new(error) });
                tally.error = tally.error.take().or(lost);
            }
            let (error, _) = each(&|sink| sink.finish());
            let mut tally = locked(&shared);
            tally.error = tally.error.take().or(error);
        };
        let thread = thread::Builder::new().name("gradprobe-write".to_owned()).spawn(work);
        let thread = thread.map_err(|error| Error::Thread { reason: error.to_string() })?;
        Ok(Self { entries: Some(entries), thread: Some(thread), tally, sent: 0, dropped: 0 })
    }

    /// Hands an entry over. If the queue is full, drops it and returns `false`. Takes microseconds.
    pub fn send(&mut self, entry: impl Into<Arc<Entry>>) -> bool {
        let entry = entry.into();
        let sent = self.entries.as_ref().is_some_and(|entries| entries.try_send(entry).is_ok());
        self.sent += u64::from(sent);
        self.dropped += u64::from(!sent);
        sent
    }

    /// Entries dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Entries so far that a sink could not write.
    pub fn lost(&self) -> u64 {
        locked(&self.tally).lost
    }

    /// The first error so far, for a check before the end.
    pub fn error(&self) -> Option<Error> {
        locked(&self.tally).error.clone()
    }

    /// Waits until all that was sent so far is written, or lost.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn flush(&self) {
        let is_done = || {
            let tally = locked(&self.tally);
            tally.written + tally.lost >= self.sent || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
        };
        while !is_done() {
            thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Waits until the sinks have written the whole queue and completed their files.
    pub fn finish(mut self) -> Finished {
        self.join();
        let Tally { written, lost, error } = std::mem::take(&mut *locked(&self.tally));
        Finished { written, lost, dropped: self.dropped, error }
    }

    fn join(&mut self) {
        self.entries = None;
        // The thread catches panics, so its result says nothing.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.join();
    }
}

fn locked(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}
