//! Handles: numbers in the shape of pointers, never the same twice, so that one that is gone, or of another kind, is
//! noticed.

use crate::die;
use std::{
    collections::BTreeMap,
    ptr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// All live objects of one kind.
pub struct Registry<T> {
    kind: &'static str,
    live: Mutex<BTreeMap<usize, Arc<T>>>,
}

impl<T> Registry<T> {
    /// None so far; `kind` is for messages.
    pub const fn new(kind: &'static str) -> Self {
        Self { kind, live: Mutex::new(BTreeMap::new()) }
    }

    /// A handle for this object. `H` is the C type that stands for it.
    pub fn insert<H>(&self, object: T) -> *mut H {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let handle = NEXT.fetch_add(1, Ordering::Relaxed) << 4;
        self.live.lock().unwrap().insert(handle, Arc::new(object));
        ptr::without_provenance_mut(handle)
    }

    /// The object of this handle.
    pub fn get<H>(&self, handle: *mut H) -> Arc<T> {
        self.live.lock().unwrap().get(&handle.addr()).cloned().unwrap_or_else(|| self.gone(handle))
    }

    /// The same, and the handle is gone.
    pub fn remove<H>(&self, handle: *mut H) -> Arc<T> {
        self.live.lock().unwrap().remove(&handle.addr()).unwrap_or_else(|| self.gone(handle))
    }

    /// The object whose handle has this number, if there still is one.
    pub fn find(&self, handle: usize) -> Option<Arc<T>> {
        self.live.lock().unwrap().get(&handle).cloned()
    }

    /// Keeps only these.
    pub fn retain(&self, keep: impl Fn(&T) -> bool) {
        self.live.lock().unwrap().retain(|_, object| keep(object));
    }

    /// All objects.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.live.lock().unwrap().values().cloned().collect()
    }

    fn gone<H>(&self, handle: *mut H) -> ! {
        die(&format!("{handle:p} is no {} that lives", self.kind))
    }
}
