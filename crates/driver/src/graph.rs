//! Work for streams, captures of it, and graphs made of captures.

use crate::{
    Outcome, context, die,
    functions::Function,
    handles::Registry,
    hold,
    memory::{self, demand_at_work},
    nccl::{Announced, Rank},
};
use cudarc::driver::sys::{CUgraphNode, CUgraphNodeType, CUresult, CUstreamCaptureMode};
use gradprobe_ptx::{Options, memory::written};
use std::{
    cell::Cell,
    env,
    ffi::c_void,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
};

/// What a stream does and a graph holds.
#[derive(Clone)]
pub enum Work {
    /// Runs a kernel of a module, each parameter given by its bytes.
    Kernel { function: Arc<Function>, blocks: u32, threads: u32, parameters: Arc<[Vec<u8>]> },
    /// Copies bytes.
    Copy { to: u64, from: u64, bytes: usize },
    /// Sets bytes.
    Set { to: u64, value: u8, bytes: usize },
    /// Exchanges bytes with other streams.
    Gather { rank: &'static Rank, from: u64, to: u64, bytes: usize, meeting: Announced },
    /// Adds words up with those of other streams, or takes the largest.
    Reduce { rank: &'static Rank, at: u64, words: usize, takes_largest: bool, meeting: Announced },
    /// Calls a function of the host, with the address of its argument.
    Host { function: unsafe extern "C" fn(*mut c_void), argument: usize },
}

impl Work {
    /// Does it, on the stream's thread.
    pub fn run(&self) {
        match *self {
            Work::Kernel { ref function, blocks, threads, ref parameters } => {
                run_kernel(function, blocks, threads, parameters);
            }
            Work::Copy { to, from, bytes } => {
                if memory::is_page_locked(to, bytes) {
                    hold::wait();
                }
                memory::demand_not_freed(to);
                memory::demand_not_freed(from);
                // SAFETY: one side was live device memory when the copy was asked for, the other the caller's, and both
                // are still there. They may overlap.
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
                written(to, bytes);
            }
            Work::Set { to, value, bytes } => {
                demand_at_work("the target of a memset", to, bytes);
                // SAFETY: it is live device memory.
                unsafe { (to as *mut u8).write_bytes(value, bytes) };
                written(to, bytes);
            }
            Work::Gather { rank, from, to, bytes, meeting } => rank.gather(from, to, bytes, meeting),
            Work::Reduce { rank, at, words, takes_largest, meeting } => rank.reduce(at, words, takes_largest, meeting),
            // SAFETY: whoever queued it vouches for the function and its argument.
            Work::Host { function, argument } => unsafe { function(argument as *mut c_void) },
        }
    }

    /// The module it needs.
    pub fn module(&self) -> Option<usize> {
        match self {
            Work::Kernel { function, .. } => Some(function.module),
            Work::Copy { .. } | Work::Set { .. } | Work::Gather { .. } | Work::Reduce { .. } | Work::Host { .. } => {
                None
            }
        }
    }

    /// The kind of node it is in a graph.
    pub fn node_type(&self) -> CUgraphNodeType {
        match self {
            Work::Kernel { .. } | Work::Gather { .. } | Work::Reduce { .. } => {
                CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL
            }
            Work::Copy { .. } => CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY,
            Work::Set { .. } => CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET,
            Work::Host { .. } => CUgraphNodeType::CU_GRAPH_NODE_TYPE_HOST,
        }
    }
}

/// Runs a kernel's PTX, in another order each time; whatever no kernel may do ends the process.
fn run_kernel(function: &Function, blocks: u32, threads: u32, parameters: &[Vec<u8>]) {
    static SEED: LazyLock<AtomicU64> = LazyLock::new(|| {
        AtomicU64::new(env::var("GRADPROBE_HOST_DRIVER_SEED").map_or(0, |seed| seed.parse().expect("a number")))
    });
    let options = Options { seed: SEED.fetch_add(1, Ordering::Relaxed), ..Options::default() };
    let parameters: Vec<&[u8]> = parameters.iter().map(Vec::as_slice).collect();
    // SAFETY: addresses are those of device memory, the host's, or refused.
    if let Err(error) = unsafe { function.kernel().launch(blocks, threads, &parameters, options) } {
        die(&error.to_string());
    }
}

/// Work that is recorded in place of being done.
pub struct Capture {
    id: u64,
    mode: CUstreamCaptureMode,
    thread: ThreadId,
    nodes: Vec<Work>,
    invalidated: bool,
}

impl Capture {
    /// One that begins on this thread.
    pub fn begin(mode: CUstreamCaptureMode) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (id, thread) = (NEXT.fetch_add(1, Ordering::Relaxed), thread::current().id());
        Self { id, mode, thread, nodes: Vec::new(), invalidated: false }
    }

    /// By which events know it; an error if it is beyond use.
    pub fn id(&self) -> Outcome<u64> {
        if self.invalidated { Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED) } else { Ok(self.id) }
    }

    pub fn add(&mut self, work: Work) -> Outcome {
        self.id()?;
        self.nodes.push(work);
        Ok(())
    }

    /// Puts it beyond use because of `error`, and says what the call that did so should return.
    pub fn invalidate(&mut self, error: CUresult) -> CUresult {
        let result = self.id().map_or_else(|invalidated| invalidated, |_| error);
        self.invalidated = true;
        result
    }

    /// What was captured.
    pub fn end(self) -> Outcome<Vec<Work>> {
        if self.thread != thread::current().id() && self.mode != CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED {
            return Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        }
        self.id()?;
        Ok(self.nodes)
    }
}

thread_local! {
    /// Which captures keep this thread from calls that are not safe beside them.
    static MODE: Cell<CUstreamCaptureMode> = const { Cell::new(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL) };
}

/// Puts this thread into another mode, and gives the one it was in.
pub fn exchange_mode(mode: CUstreamCaptureMode) -> CUstreamCaptureMode {
    MODE.replace(mode)
}

/// For calls that are not allowed while a capture is going on, on whatever stream: on this thread, or in global mode
/// anywhere. A thread that has put itself into another mode heeds the former only, or none.
pub fn refuse_in_any_capture() -> Outcome {
    use CUstreamCaptureMode::{
        CU_STREAM_CAPTURE_MODE_GLOBAL as GLOBAL, CU_STREAM_CAPTURE_MODE_RELAXED as RELAXED,
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THREAD_LOCAL,
    };
    let mode = MODE.get();
    for stream in context::all_streams() {
        if let Some(capture) = &mut *stream.capture() {
            let of_this_thread = capture.thread == thread::current().id();
            let forbidden = match (mode, capture.mode) {
                (RELAXED, _) | (_, RELAXED) => false,
                (GLOBAL, GLOBAL) => true,
                (THREAD_LOCAL, _) | (GLOBAL, THREAD_LOCAL) => of_this_thread,
            };
            if forbidden {
                return Err(capture.invalidate(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
            }
        }
    }
    Ok(())
}

pub static NODES: Registry<Work> = Registry::new("graph node");
pub static GRAPHS: Registry<Graph> = Registry::new("graph");
pub static EXECUTABLES: Registry<Vec<Work>> = Registry::new("executable graph");

/// The handles of its nodes, in the order of their capture.
pub struct Graph(Vec<usize>);

impl Graph {
    pub fn new(nodes: Vec<Work>) -> Self {
        Self(nodes.into_iter().map(|work| NODES.insert::<()>(work).addr()).collect())
    }

    pub fn nodes(&self) -> Vec<CUgraphNode> {
        self.0.iter().map(|&node| std::ptr::without_provenance_mut(node)).collect()
    }

    pub fn work(&self) -> Vec<Work> {
        self.nodes().into_iter().map(|node| (*NODES.get(node)).clone()).collect()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.nodes().into_iter().for_each(|node| drop::<Arc<Work>>(NODES.remove(node)));
    }
}
