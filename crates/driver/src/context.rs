//! Contexts: the primary one, which is counted, and others; and which of them is current on a thread.

use crate::{
    Outcome, die, die_at_exit,
    handles::Registry,
    memory,
    stream::{EVENTS, STREAMS, Stream},
};
use cudarc::driver::sys::{CUcontext, CUresult};
use std::{
    cell::Cell,
    ptr,
    sync::{Arc, Mutex},
};

/// By its handle's number a context is known to all that is made in it.
pub type Id = usize;

/// Each with its default stream, which is made when it is first used.
static CONTEXTS: Registry<Mutex<Option<Arc<Stream>>>> = Registry::new("context");
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

/// The current context's default stream.
pub fn default_stream() -> Arc<Stream> {
    let id = current();
    let stream = CONTEXTS.get(handle(id));
    let mut stream = stream.lock().unwrap();
    Arc::clone(stream.get_or_insert_with(|| Arc::new(Stream::new(id))))
}

/// A new context, current on this thread.
pub fn create() -> CUcontext {
    let context = CONTEXTS.insert(Mutex::new(None));
    set_current(context);
    context
}

/// Ends a context; nothing made in it may be left.
pub fn destroy(context: CUcontext) {
    let id = context.addr();
    if let Some(stream) = CONTEXTS.remove(context).lock().unwrap().take() {
        stream.wait();
    }
    let streams = STREAMS.all().iter().filter(|stream| stream.context == id).count();
    let events = EVENTS.all().iter().filter(|event| event.context == id).count();
    let blocks = memory::count(id);
    if (streams, events, blocks) != (0, 0, 0) {
        die_at_exit(&format!(
            "a context ends before {streams} streams, {events} events and {blocks} allocations made in it"
        ));
    }
    if CURRENT.get() == id {
        CURRENT.set(0);
    }
}

/// The primary context, made when it is not there.
pub fn retain_primary() -> CUcontext {
    let mut primary = PRIMARY.lock().unwrap();
    let (id, count) = primary.get_or_insert_with(|| (CONTEXTS.insert::<()>(Mutex::new(None)).addr(), 0));
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
