//! Streams, each a thread that does what is in its queue, and events.

use crate::{
    Outcome,
    context::{self, legacy_stream, per_thread_stream},
    graph::{Capture, Work},
    handles::Registry,
};
use cudarc::driver::sys::{CUresult, CUstream};
use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
        mpsc::{Sender, channel},
    },
    thread,
    time::Duration,
};

pub static STREAMS: Registry<Stream> = Registry::new("stream");
pub static EVENTS: Registry<Event> = Registry::new("event");

/// How a stream stands to the legacy default stream of its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is that stream: what is queued in it waits for all that was queued before in blocking streams, which wait for it.
    Legacy,
    Blocking,
    NonBlocking,
}

/// A queue, and what is captured instead of queued.
pub struct Stream {
    pub context: context::Id,
    kind: Kind,
    queue: Sender<Job>,
    capture: Mutex<Option<Capture>>,
}

type Job = Box<dyn FnOnce() + Send>;

/// The stream of a handle; null and 1 are the legacy default stream, 2 is the thread's own.
///
/// # Errors
/// While a blocking stream captures, which the legacy stream would have to wait for; that ends the capture.
pub fn stream(handle: CUstream) -> Outcome<Arc<Stream>> {
    match handle.addr() {
        0 | 1 => {
            let legacy = legacy_stream();
            for stream in context::streams(legacy.context).iter().filter(|stream| stream.kind == Kind::Blocking) {
                if let Some(capture) = &mut *stream.capture() {
                    return Err(capture.invalidate(CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT));
                }
            }
            Ok(legacy)
        }
        2 => Ok(per_thread_stream()),
        _ => Ok(STREAMS.get(handle)),
    }
}

/// Whether what is queued next comes late.
static DELAYED: AtomicBool = AtomicBool::new(false);

/// What is queued next, in whatever stream, comes late: after what follows it in others.
pub fn delay_next() {
    DELAYED.store(true, Ordering::SeqCst);
}

impl Stream {
    /// The thread ends when the stream is dropped and its queue is empty.
    pub fn new(context: context::Id, kind: Kind) -> Self {
        let (queue, jobs) = channel::<Job>();
        thread::spawn(move || jobs.into_iter().for_each(|job| job()));
        Self { context, kind, queue, capture: Mutex::new(None) }
    }

    fn push(&self, job: impl FnOnce() + Send + 'static) {
        self.queue.send(Box::new(job)).expect("the thread lives as long as the stream");
    }

    /// Has the thread do this after all it was given before, and in the order of the legacy default stream.
    pub fn enqueue(&self, job: impl FnOnce() + Send + 'static) {
        static ORDER: Mutex<()> = Mutex::new(());
        let is_late = DELAYED.swap(false, Ordering::SeqCst);
        let job = move || {
            if is_late {
                thread::sleep(Duration::from_millis(15));
            }
            job();
        };
        if self.kind != Kind::Legacy {
            return self.push(job);
        }
        let _order = ORDER.lock().unwrap();
        let others: Vec<_> =
            context::streams(self.context).into_iter().filter(|stream| stream.kind == Kind::Blocking).collect();
        for other in &others {
            let moment = other.moment();
            self.push(move || moment.wait());
        }
        self.push(job);
        let moment = self.moment();
        for other in &others {
            let moment = Arc::clone(&moment);
            other.push(move || moment.wait());
        }
    }

    /// The moment at which all that is queued in this stream alone is done.
    pub fn moment(&self) -> Arc<Moment> {
        let moment = Arc::new(Moment::default());
        let comes = Arc::clone(&moment);
        self.push(move || comes.come());
        moment
    }

    /// Waits until the queue is empty.
    pub fn wait(&self) {
        self.mark().wait();
    }

    /// The moment at which all that is queued so far is done, and what the legacy default stream waits for.
    fn mark(&self) -> Arc<Moment> {
        let moment = Arc::new(Moment::default());
        let comes = Arc::clone(&moment);
        self.enqueue(move || comes.come());
        moment
    }

    /// What is being captured, if anything is.
    pub fn capture(&self) -> MutexGuard<'_, Option<Capture>> {
        self.capture.lock().unwrap()
    }

    /// Queues work, or captures it.
    pub fn submit(&self, work: Work) -> Outcome {
        match &mut *self.capture() {
            Some(capture) => capture.add(work),
            None => {
                if let Work::Gather { rank, .. } | Work::Reduce { rank, .. } = work {
                    rank.queue();
                }
                let context = self.context;
                self.enqueue(move || {
                    if context::why_lost(context).is_none() {
                        work.run();
                    }
                });
                Ok(())
            }
        }
    }

    /// For calls that no capture of this stream survives.
    pub fn refuse_capture(&self) -> Outcome {
        match &mut *self.capture() {
            Some(capture) => Err(capture.invalidate(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)),
            None => Ok(()),
        }
    }
}

/// The moment that all work queued before it in a stream is done.
#[derive(Default)]
pub struct Moment {
    has_come: Mutex<bool>,
    changed: Condvar,
}

impl Moment {
    fn come(&self) {
        *self.has_come.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// The same, but no longer than this.
    fn wait_for(&self, time: Duration) {
        let has_come = self.has_come.lock().unwrap();
        drop(self.changed.wait_timeout_while(has_come, time, |has_come| !*has_come).unwrap());
    }

    pub fn wait(&self) {
        drop(self.changed.wait_while(self.has_come.lock().unwrap(), |has_come| !*has_come).unwrap());
    }
}

/// Stands for the moment it was last recorded at. Who waits for an earlier one goes on waiting for that.
pub struct Event {
    pub context: context::Id,
    last: Mutex<Recorded>,
}

#[derive(Clone, Default)]
enum Recorded {
    #[default]
    Never,
    At(Arc<Moment>),
    /// In this capture, where it is no moment.
    Captured(u64),
}

impl Event {
    pub fn new(context: context::Id) -> Self {
        Self { context, last: Mutex::default() }
    }

    fn last(&self) -> Recorded {
        self.last.lock().unwrap().clone()
    }

    pub fn record(&self, stream: &Stream) -> Outcome {
        if self.context != stream.context {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        *self.last.lock().unwrap() = match &*stream.capture() {
            Some(capture) => Recorded::Captured(capture.id()?),
            None => Recorded::At(stream.mark()),
        };
        Ok(())
    }

    /// Whether the moment has come; also if it was never recorded.
    pub fn is_reached(&self) -> Outcome<bool> {
        match self.last() {
            Recorded::Never => Ok(true),
            Recorded::At(moment) => Ok(*moment.has_come.lock().unwrap()),
            Recorded::Captured(_) => Err(CUresult::CUDA_ERROR_CAPTURED_EVENT),
        }
    }

    /// Waits for the moment, but no longer than this.
    pub fn wait_for(&self, time: Duration) -> Outcome {
        match self.last() {
            Recorded::Never => {}
            Recorded::At(moment) => moment.wait_for(time),
            Recorded::Captured(_) => return Err(CUresult::CUDA_ERROR_CAPTURED_EVENT),
        }
        Ok(())
    }

    /// Waits for the moment.
    pub fn wait(&self) -> Outcome {
        match self.last() {
            Recorded::Never => {}
            Recorded::At(moment) => moment.wait(),
            Recorded::Captured(_) => return Err(CUresult::CUDA_ERROR_CAPTURED_EVENT),
        }
        Ok(())
    }

    /// Lets a stream go on only when the moment has come. In a capture that is a dependency within the graph, which
    /// nothing outside of it can be. (A stream that waits for an event of a capture would join the capture; nothing here
    /// wants to, and it is an error.)
    pub fn hold(&self, stream: &Stream) -> Outcome {
        match (self.last(), &mut *stream.capture()) {
            (Recorded::Never, _) => {}
            (Recorded::At(moment), None) => stream.enqueue(move || moment.wait()),
            (Recorded::Captured(_), None) => return Err(CUresult::CUDA_ERROR_CAPTURED_EVENT),
            (Recorded::At(_), Some(capture)) => {
                return Err(capture.invalidate(CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION));
            }
            (Recorded::Captured(id), Some(capture)) => {
                if capture.id()? != id {
                    return Err(capture.invalidate(CUresult::CUDA_ERROR_STREAM_CAPTURE_MERGE));
                }
            }
        }
        Ok(())
    }
}
