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

/// A moment in a stream.
pub struct Event {
    pub context: context::Id,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default)]
struct State {
    /// How often it was recorded, and how many of these moments have come.
    recorded: u64,
    reached: u64,
    /// The capture it was recorded in, if that was the last time.
    capture: Option<u64>,
}

impl Event {
    pub fn new(context: context::Id) -> Self {
        Self { context, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The moment that all work queued in this stream so far is done.
    pub fn record(self: &Arc<Self>, stream: &Stream) -> Outcome {
        if self.context != stream.context {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        if let Some(capture) = &*stream.capture() {
            self.state.lock().unwrap().capture = Some(capture.id()?);
            return Ok(());
        }
        let mut state = self.state.lock().unwrap();
        state.capture = None;
        state.recorded += 1;
        let (event, moment) = (Arc::clone(self), state.recorded);
        stream.enqueue(move || {
            event.state.lock().unwrap().reached = moment;
            event.changed.notify_all();
        });
        Ok(())
    }

    /// The last moment recorded; an error if that was in a capture, where it stands for no moment.
    fn moment(&self) -> Outcome<u64> {
        let state = *self.state.lock().unwrap();
        if state.capture.is_some() { Err(CUresult::CUDA_ERROR_CAPTURED_EVENT) } else { Ok(state.recorded) }
    }

    fn await_moment(&self, moment: u64) {
        drop(self.changed.wait_while(self.state.lock().unwrap(), |state| state.reached < moment).unwrap());
    }

    /// Whether the moment has come; also if there never was one.
    pub fn is_reached(&self) -> Outcome<bool> {
        let moment = self.moment()?;
        Ok(self.state.lock().unwrap().reached >= moment)
    }

    /// Waits for the moment.
    pub fn wait(&self) -> Outcome {
        self.await_moment(self.moment()?);
        Ok(())
    }

    /// Lets a stream go on only when the moment has come. In a capture that is a dependency within the graph, which
    /// nothing outside of it can be. (A stream that waits for an event of a capture would join the capture; nothing here
    /// wants to, and it is an error.)
    pub fn hold(self: &Arc<Self>, stream: &Stream) -> Outcome {
        if let Some(capture) = &mut *stream.capture() {
            let id = capture.id()?;
            let state = *self.state.lock().unwrap();
            return match state.capture {
                None if state.recorded == 0 => Ok(()),
                None => Err(capture.invalidate(CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION)),
                Some(other) if other != id => Err(capture.invalidate(CUresult::CUDA_ERROR_STREAM_CAPTURE_MERGE)),
                Some(_) => Ok(()),
            };
        }
        let (event, moment) = (Arc::clone(self), self.moment()?);
        stream.enqueue(move || event.await_moment(moment));
        Ok(())
    }
}
