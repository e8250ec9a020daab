//! Contexts: the primary one, which is counted, and others; which of them is current on a thread, and which are lost.

use crate::{
    Outcome, die, die_at_exit, functions, graph,
    handles::Registry,
    memory, nccl,
    stream::{EVENTS, Kind, Moment, STREAMS, Stream},
};
use cudarc::driver::sys::{CUcontext, CUresult};
use std::{
    cell::Cell,
    collections::HashMap,
    ptr,
    sync::{Arc, Mutex},
    thread::{self, ThreadId},
};

/// By its handle's number a context is known to all that is made in it.
pub type Id = usize;

/// What a context has beside what is made in it.
#[derive(Default)]
struct Context {
    /// Each default stream is made when it is first used.
    legacy: Mutex<Option<Arc<Stream>>>,
    per_thread: Mutex<HashMap<ThreadId, Arc<Stream>>>,
    /// The ends of what is queued in streams that are destroyed.
    ends: Mutex<Vec<Arc<Moment>>>,
    /// Why nothing runs in it any more.
    lost: Mutex<Option<CUresult>>,
}

static CONTEXTS: Registry<Context> = Registry::new("context");
/// The primary context and how often it was retained.
static PRIMARY: Mutex<Option<(Id, usize)>> = Mutex::new(None);

thread_local! {
    static CURRENT: Cell<Id> = const { Cell::new(0) };
}

fn handle(context: Id) -> CUcontext {
    ptr::without_provenance_mut(context)
}

/// The current context's handle, or null.
pub fn current_handle() -> CUcontext {
    handle(CURRENT.get())
}

/// Makes a context, or none, current on this thread.
pub fn set_current(context: CUcontext) {
    if !context.is_null() {
        CONTEXTS.get(context);
    }
    CURRENT.set(context.addr());
}

/// The current context, which every call needs that has to do with memory or streams.
pub fn current() -> Id {
    let context = CURRENT.get();
    if context == 0 {
        die("a call without a current context");
    }
    CONTEXTS.get(handle(context));
    context
}

/// The current context's legacy default stream.
pub fn legacy_stream() -> Arc<Stream> {
    legacy_stream_of(current())
}

fn legacy_stream_of(id: Id) -> Arc<Stream> {
    let context = CONTEXTS.get(handle(id));
    let mut stream = context.legacy.lock().unwrap();
    Arc::clone(stream.get_or_insert_with(|| Arc::new(Stream::new(id, Kind::Legacy))))
}

/// The default stream that this thread has for itself in the current context.
pub fn per_thread_stream() -> Arc<Stream> {
    let id = current();
    let context = CONTEXTS.get(handle(id));
    let mut streams = context.per_thread.lock().unwrap();
    let stream = streams.entry(thread::current().id());
    Arc::clone(stream.or_insert_with(|| Arc::new(Stream::new(id, Kind::Blocking))))
}

/// All streams but the legacy ones.
pub fn all_streams() -> Vec<Arc<Stream>> {
    let mut all = STREAMS.all();
    for context in CONTEXTS.all() {
        all.extend(context.per_thread.lock().unwrap().values().cloned());
    }
    all
}

/// Those of a context.
pub fn streams(context: Id) -> Vec<Arc<Stream>> {
    all_streams().into_iter().filter(|stream| stream.context == context).collect()
}

/// A stream is no more; what is queued in it runs nevertheless.
pub fn stream_ends(stream: &Stream) {
    CONTEXTS.get(handle(stream.context)).ends.lock().unwrap().push(stream.moment());
}

/// Waits for all that is queued in a context.
pub fn synchronize(context: Id) {
    legacy_stream_of(context).wait();
    streams(context).iter().for_each(|stream| stream.wait());
    let ends: Vec<_> = CONTEXTS.get(handle(context)).ends.lock().unwrap().drain(..).collect();
    ends.iter().for_each(|end| end.wait());
}

/// The current context, or where there is none the primary one, is lost. Nothing that is queued in it runs any more.
pub fn lose(code: CUresult) {
    let primary = PRIMARY.lock().unwrap().map(|(id, _)| id);
    if let Some(context) = CONTEXTS.find(CURRENT.get()).or_else(|| CONTEXTS.find(primary?)) {
        context.lost.lock().unwrap().get_or_insert(code);
        nccl::end_all();
    }
}

/// Why the current context is lost, if it is.
pub fn lost() -> Option<CUresult> {
    why_lost(CURRENT.get())
}

/// The same of any context.
pub fn why_lost(context: Id) -> Option<CUresult> {
    CONTEXTS.find(context).and_then(|context| *context.lost.lock().unwrap())
}

/// A new context, current on this thread.
pub fn create() -> CUcontext {
    let context = CONTEXTS.insert(Context::default());
    set_current(context);
    context
}

/// Ends a context; nothing made in it may be left, unless it is lost: then all of it goes.
pub fn destroy(context: CUcontext) {
    let id = context.addr();
    synchronize(id);
    if CONTEXTS.remove(context).lost.lock().unwrap().is_some() {
        STREAMS.retain(|stream| stream.context != id);
        EVENTS.retain(|event| event.context != id);
        functions::forget(id);
        memory::forget(id);
    } else {
        let left = left_in(Some(id));
        if !left.is_empty() {
            die_at_exit(&format!("a context ends before what was made in it: {left}"));
        }
    }
    if CURRENT.get() == id {
        CURRENT.set(0);
    }
}

/// What was made and is still there, in this context or in all.
fn left_in(context: Option<Id>) -> String {
    let within = |id: Id| context.is_none_or(|context| context == id);
    let counts = [
        (STREAMS.all().iter().filter(|stream| within(stream.context)).count(), "streams"),
        (EVENTS.all().iter().filter(|event| within(event.context)).count(), "events"),
        (memory::count(within), "allocations"),
        (functions::modules(within), "modules"),
    ];
    let left = counts.iter().filter(|(count, _)| *count > 0);
    left.map(|(count, kind)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ")
}

/// What is left of all that was made, contexts, graphs and communicators too.
pub fn left() -> String {
    let counts = [
        (CONTEXTS.all().len(), "contexts"),
        (graph::GRAPHS.all().len() + graph::EXECUTABLES.all().len(), "graphs"),
        (nccl::communicators(), "communicators"),
    ];
    let others = counts.iter().filter(|(count, _)| *count > 0).map(|(count, kind)| format!("{count} {kind}"));
    let in_contexts = Some(left_in(None)).filter(|left| !left.is_empty());
    in_contexts.into_iter().chain(others).collect::<Vec<_>>().join(", ")
}

/// The primary context, made when it is not there.
pub fn retain_primary() -> CUcontext {
    let mut primary = PRIMARY.lock().unwrap();
    let (id, count) = primary.get_or_insert_with(|| (CONTEXTS.insert::<()>(Context::default()).addr(), 0));
    *count += 1;
    handle(*id)
}

/// Takes back one [`retain_primary`]; with the last the context ends.
pub fn release_primary() -> Outcome {
    let mut primary = PRIMARY.lock().unwrap();
    let Some((id, count)) = primary.as_mut() else { return Err(CUresult::CUDA_ERROR_INVALID_CONTEXT) };
    *count -= 1;
    if *count == 0 {
        destroy(handle(*id));
        *primary = None;
    }
    Ok(())
}
