//! The probe's stream, and one beside it that copies results to the host, so that no copy is between a trainer's
//! kernels.

use super::{
    device::{Relaxed, is_capturing},
    driver::{failed, insist, make_current},
    pinned::Pinned,
};
use crate::{
    Error,
    device::{Buffer, Read},
    ranks::{Communicator, not_come},
};
use cudarc::driver::{
    CudaEvent, CudaStream,
    result::stream::{self, StreamKind},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// A probe's stream and the one beside it.
pub(super) struct Streams {
    pub main: Arc<CudaStream>,
    /// Owned here, though cudarc takes it for borrowed: with one of its own, cudarc would track the uses of all slices
    /// of the context by events.
    side: Arc<CudaStream>,
    /// The launches before the last copy on the side.
    launched: CudaEvent,
    copies: Mutex<Copies>,
    /// The ranks whose work is queued on the probe's stream.
    ranks: OnceLock<Arc<dyn Communicator>>,
}

/// The copies on the side.
#[derive(Default)]
struct Copies {
    /// The end of the last copy, and so of all, until the probe's stream waits for it.
    last: Option<Arc<CudaEvent>>,
    /// Whether graphs may be replayed, which do not wait: then no copy is on the side.
    graphs: bool,
}

impl Drop for Streams {
    fn drop(&mut self) {
        let _relaxed = Relaxed::new();
        // Errors have nowhere to go. Queued work is still done.
        if insist(|| make_current(self.main.context())).is_ok() {
            // SAFETY: made by `new`, and nothing else has it.
            let _ = unsafe { stream::destroy(self.side.cu_stream()) };
        }
    }
}

impl Streams {
    /// # Errors
    /// The driver's.
    pub fn new(main: &Arc<CudaStream>) -> Result<Self, Error> {
        let _relaxed = Relaxed::new();
        let context = main.context();
        let launched = context.new_event(None).map_err(failed("cuEventCreate", "making an event"))?;
        let side = stream::create(StreamKind::NonBlocking).map_err(failed("cuStreamCreate", "making a stream"))?;
        // SAFETY: a stream of the context, which `new_event` has made current; it is destroyed when this is dropped.
        let side = unsafe { context.wrap_borrowed_stream(side) };
        Ok(Self { main: Arc::clone(main), side, launched, copies: Mutex::default(), ranks: OnceLock::new() })
    }

    /// Notes that other ranks have work on the stream from here on.
    pub fn watch(&self, ranks: &Arc<dyn Communicator>) {
        let _ = self.ranks.set(Arc::clone(ranks));
    }

    /// Whether a copy that was asked for then is over, or may still be waited for: as long as other ranks may take.
    /// After that they are aborted, so that nothing waits any more.
    ///
    /// # Errors
    /// [`Error::Communication`], and the driver's.
    fn is_over(&self, copy: &Pinned, since: Instant) -> Result<bool, Error> {
        let is_over = copy.is_over()?;
        let Some(ranks) = self.ranks.get() else { return Ok(is_over) };
        if is_over {
            // Results queued behind an aborted collective have no value.
            return ranks.status().map(|()| true);
        }
        let late = ranks.deadline().filter(|deadline| since.elapsed() > *deadline);
        let wrong = ranks.status().err().or(late.map(not_come));
        wrong.map_or(Ok(false), |error| {
            ranks.abort();
            Err(error)
        })
    }

    fn copies(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes later work, which may change the memory being copied on the side, wait for the copies. The host waits only
    /// during a capture, which cannot wait for work outside it.
    ///
    /// # Errors
    /// The driver's.
    pub fn await_copies(&self) -> Result<(), Error> {
        let mut copies = self.copies();
        if let Some(last) = &copies.last {
            if is_capturing(&self.main)? {
                let _relaxed = Relaxed::new();
                last.synchronize().map_err(failed("cuEventSynchronize", "waiting for a copy before a capture"))?;
            } else {
                self.main.wait(last).map_err(failed("cuStreamWaitEvent", "having the stream wait for a copy"))?;
            }
            copies.last = None;
        }
        Ok(())
    }

    /// Notes that graphs may be replayed from here on.
    ///
    /// # Errors
    /// The driver's.
    pub fn expect_graphs(&self) -> Result<(), Error> {
        self.await_copies()?;
        self.copies().graphs = true;
        Ok(())
    }

    /// Copies results to the host, after earlier launches.
    fn download(&self, from: &Buffer, to: &mut Pinned) -> Result<(), Error> {
        let mut copies = self.copies();
        if copies.graphs {
            return to.download(from, &self.main);
        }
        self.launched.record(&self.main).map_err(failed("cuEventRecord", "noting the end of launches"))?;
        self.side.wait(&self.launched).map_err(failed("cuStreamWaitEvent", "having a copy wait for launches"))?;
        to.download(from, &self.side)?;
        copies.last = Some(Arc::clone(to.event()));
        Ok(())
    }
}

/// Results on their way to the host.
pub(super) struct PinnedRead {
    memory: Pinned,
    streams: Arc<Streams>,
    /// The time of the request.
    since: Instant,
}

impl PinnedRead {
    pub fn new(memory: Pinned, streams: &Arc<Streams>) -> Self {
        Self { memory, streams: Arc::clone(streams), since: Instant::now() }
    }
}

impl Read for PinnedRead {
    fn start(&mut self, from: &Buffer) -> Result<(), Error> {
        self.since = Instant::now();
        self.streams.download(from, &mut self.memory)
    }

    fn is_complete(&self) -> Result<bool, Error> {
        self.streams.is_over(&self.memory, self.since)
    }

    fn wait(&self) -> Result<&[u8], Error> {
        // Without other ranks the driver waits, which is sooner.
        while self.streams.ranks.get().is_some() && !self.is_complete()? {
            thread::sleep(Duration::from_micros(50));
        }
        self.memory.wait()
    }
}
