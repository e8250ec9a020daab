//! Sinks on a thread of their own: training hands an entry over and goes on.

use super::{Entry, Sink};
use crate::Error;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
};

/// Sinks that write on a thread of their own, behind a queue of bounded length. When they cannot keep up, entries are
/// dropped and counted; [`send`](Self::send) never waits. A sink that fails neither stops the others nor training.
///
/// Dropping it writes what is in the queue and loses errors; [`finish`](Self::finish) tells them.
#[derive(Debug)]
pub struct Background {
    /// `None` once the thread is told to end.
    entries: Option<SyncSender<Entry>>,
    thread: Option<JoinHandle<()>>,
    /// The first there was.
    error: Arc<Mutex<Option<Error>>>,
    dropped: u64,
}

/// How a run of sinks ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Entries that no sink was given: the queue was full, or the thread gone.
    pub dropped: u64,
    /// The first error there was; there may have been more.
    pub error: Option<Error>,
}

impl Background {
    /// Starts the thread. `capacity` entries may wait: a plan of 1000 tensors takes 100 KB each, and 8 MB with its
    /// histograms.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a capacity of 0, [`Error::Thread`] when the system has no thread left.
    pub fn new(sinks: Vec<Box<dyn Sink>>, capacity: usize) -> Result<Self, Error> {
        if capacity == 0 {
            return Err(Error::InvalidConfig { option: "capacity", expected: "at least 1", value: "0".to_owned() });
        }
        let (entries, queue) = sync_channel::<Entry>(capacity);
        let error = Arc::new(Mutex::new(None));
        let first = Arc::clone(&error);
        let work = move || {
            let mut sinks: Vec<Option<Box<dyn Sink>>> = sinks.into_iter().map(Some).collect();
            let mut each = |does: &dyn Fn(&mut dyn Sink) -> Result<(), Error>| {
                for place in &mut sinks {
                    let Some(sink) = place else { continue };
                    // Nobody sees a sink again that panicked.
                    let done = catch_unwind(AssertUnwindSafe(|| does(sink.as_mut()))).unwrap_or_else(|_| {
                        let _ = catch_unwind(AssertUnwindSafe(|| drop(place.take())));
                        Err(Error::Thread { reason: "a sink panicked".to_owned() })
                    });
                    if let Err(error) = done {
                        first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                }
            };
            for entry in queue {
                each(&|sink| sink.write(&entry));
            }
            each(&|sink| sink.finish());
        };
        let thread = thread::Builder::new().name("gradprobe-write".to_owned()).spawn(work);
        let thread = thread.map_err(|error| Error::Thread { reason: error.to_string() })?;
        Ok(Self { entries: Some(entries), thread: Some(thread), error, dropped: 0 })
    }

    /// Hands an entry over, or drops it and says `false`. Takes microseconds.
    pub fn send(&mut self, entry: Entry) -> bool {
        let sent = self.entries.as_ref().is_some_and(|entries| entries.try_send(entry).is_ok());
        self.dropped += u64::from(!sent);
        sent
    }

    /// Entries dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The first error so far, for who wants to know before the end.
    pub fn error(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until everything in the queue is written and completed.
    pub fn finish(mut self) -> Finished {
        self.join();
        Finished { dropped: self.dropped, error: self.error() }
    }

    fn join(&mut self) {
        self.entries = None;
        // It catches panics, so that there is nothing to learn from how it ended.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.join();
    }
}
