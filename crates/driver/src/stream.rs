//! Streams, each a thread that does what is in its queue, and events.

use crate::{
    Outcome, context,
    graph::{Capture, Work},
    handles::Registry,
};
use cudarc::driver::sys::{CUresult, CUstream};
use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        mpsc::{Sender, channel},
    },
    thread,
};

pub static STREAMS: Registry<Stream> = Registry::new("stream");
pub static EVENTS: Registry<Event> = Registry::new("event");

/// A queue, and what is captured instead of queued.
pub struct Stream {
    pub context: context::Id,
    queue: Sender<Box<dyn FnOnce() + Send>>,
    capture: Mutex<Option<Capture>>,
}

/// The stream of a handle, or the default stream.
pub fn stream(handle: CUstream) -> Arc<Stream> {
    if handle.is_null() { context::default_stream() } else { STREAMS.get(handle) }
}

impl Stream {
    /// The thread ends when the stream is dropped and its queue is empty.
    pub fn new(context: context::Id) -> Self {
        let (queue, jobs) = channel::<Box<dyn FnOnce() + Send>>();
        thread::spawn(move || jobs.into_iter().for_each(|job| job()));
        Self { context, queue, capture: Mutex::new(None) }
    }

    /// Has the thread do this after all it was given before.
    pub fn enqueue(&self, job: impl FnOnce() + Send + 'static) {
        self.queue.send(Box::new(job)).expect("the thread lives as long as the stream");
    }

    /// Waits until the queue is empty.
    pub fn wait(&self) {
        let (done, wait) = channel();
        self.enqueue(move || done.send(()).expect("is waited for"));
        wait.recv().expect("the thread lives as long as the stream");
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
                self.enqueue(move || work.run());
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
struct Moment {
    has_come: Mutex<bool>,
    changed: Condvar,
}

impl Moment {
    fn come(&self) {
        *self.has_come.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
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
            None => {
                let moment = Arc::new(Moment::default());
                let comes = Arc::clone(&moment);
                stream.enqueue(move || comes.come());
                Recorded::At(moment)
            }
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
