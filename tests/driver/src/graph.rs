//! Work for streams, captures of it, and graphs made of captures.

use crate::{
    Outcome, die,
    handles::Registry,
    memory::{self, demand_at_work},
    nccl::Rank,
    stream::STREAMS,
};
use cudarc::driver::sys::{CUgraphNode, CUgraphNodeType, CUresult, CUstreamCaptureMode};
use gradprobe::{
    AdaptiveRecord, Dot, GsnrRecord, Histogram, Record, StepOutputs,
    launch::{Arguments, Device, Kernel},
};
use gradprobe_simt::{Schedule, Simt, UserKernel, launch_user};
use std::{
    env,
    ffi::c_void,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
};

/// What a stream does and a graph holds.
#[derive(Clone, Copy)]
#[expect(clippy::large_enum_variant, reason = "most work is kernels, and there is little of it")]
pub enum Work {
    /// Runs a kernel of the module with this handle.
    Kernel { module: usize, kernel: Kernel, blocks: u32, arguments: Arguments },
    /// The same with parameters of its own, the bytes of each in a word.
    User { module: usize, kernel: UserKernel, blocks: u32, parameters: [u64; UserKernel::MAX_PARAMETERS] },
    /// Copies bytes.
    Copy { to: u64, from: u64, bytes: usize },
    /// Sets bytes.
    Set { to: u64, value: u8, bytes: usize },
    /// Exchanges bytes with other streams.
    Gather { rank: &'static Rank, from: u64, to: u64, bytes: usize },
    /// Calls a function of the host, with the address of its argument.
    Host { function: unsafe extern "C" fn(*mut c_void), argument: usize },
}

impl Work {
    /// Does it, on the stream's thread.
    pub fn run(self) {
        match self {
            Work::Kernel { kernel, blocks, arguments, .. } => run_kernel(kernel, blocks, &arguments),
            Work::User { kernel, blocks, parameters, .. } => {
                let parameters = &parameters[..kernel.parameter_bytes().len()];
                // SAFETY: whoever launched it vouches for the parameters, whose addresses are of device memory: the host's.
                if let Err(error) = unsafe { launch_user(kernel, blocks, parameters, next_schedule()) } {
                    die(&format!("{}: {error}", kernel.name()));
                }
            }
            Work::Copy { to, from, bytes } => {
                memory::demand_not_freed(to);
                memory::demand_not_freed(from);
                // SAFETY: one side was live device memory when the copy was asked for, the other the caller's, and both
                // are still there. They may overlap.
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
            }
            Work::Set { to, value, bytes } => {
                demand_at_work("the target of a memset", to, bytes);
                // SAFETY: it is live device memory.
                unsafe { (to as *mut u8).write_bytes(value, bytes) };
            }
            Work::Gather { rank, from, to, bytes } => rank.gather(from, to, bytes),
            // SAFETY: whoever queued it vouches for the function and its argument.
            Work::Host { function, argument } => unsafe { function(argument as *mut c_void) },
        }
    }

    /// The module it needs.
    pub fn module(self) -> Option<usize> {
        match self {
            Work::Kernel { module, .. } | Work::User { module, .. } => Some(module),
            Work::Copy { .. } | Work::Set { .. } | Work::Gather { .. } | Work::Host { .. } => None,
        }
    }

    /// The kind of node it is in a graph.
    pub fn node_type(self) -> CUgraphNodeType {
        match self {
            Work::Kernel { .. } | Work::User { .. } | Work::Gather { .. } => CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL,
            Work::Copy { .. } => CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY,
            Work::Set { .. } => CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET,
            Work::Host { .. } => CUgraphNodeType::CU_GRAPH_NODE_TYPE_HOST,
        }
    }
}

/// Another order each time.
fn next_schedule() -> Schedule {
    static SEED: LazyLock<AtomicU64> = LazyLock::new(|| {
        AtomicU64::new(env::var("GRADPROBE_HOST_DRIVER_SEED").map_or(0, |seed| seed.parse().expect("a number")))
    });
    Schedule::Shuffled(SEED.fetch_add(1, Ordering::Relaxed))
}

/// Runs a kernel in emulation, after a look at whether its tables are there.
fn run_kernel(kernel: Kernel, blocks: u32, arguments: &Arguments) {
    /// Of a tensor's entry in its table: kernels/arguments.cuh.
    const TENSOR_ENTRY: usize = 24;

    let (tensors, chunks) = (arguments.tensor_count as usize, arguments.chunk_count as usize);
    // In a measurement with weights, theirs are behind those of the tensors.
    let lists = if matches!(kernel, Kernel::Measure | Kernel::Merge) && arguments.weights != 0 { 2 } else { 1 };
    let (of_tensors, of_chunks) = (lists * tensors, lists * chunks);
    for (what, address, bytes) in [
        ("the addresses", arguments.addresses, of_tensors * 8),
        ("the tensors' entries", arguments.tensors, of_tensors * TENSOR_ENTRY),
        ("the chunks' tensors", arguments.chunk_tensors, of_chunks * 4),
        ("the chunks' parts", arguments.chunk_parts, of_chunks * size_of::<Record>()),
        ("the tensors' records", arguments.records, of_tensors * size_of::<Record>()),
        ("the outputs", arguments.outputs, size_of::<StepOutputs>()),
        ("the chunks' counters", arguments.chunks_done, of_chunks * 4),
        ("the tensors' counters", arguments.tensors_done, (of_tensors + 1) * 4),
    ] {
        demand_at_work(what, address, bytes);
    }
    // What is tracked across steps is there as a whole or not at all. The sizes are those of kernels/gsnr.cuh; how long
    // the state is, and how many of the tensors have bins, its tracks alone know.
    let mut across_steps = Vec::new();
    if kernel == Kernel::Adam {
        across_steps.push(("Adam's step and moments", arguments.adam, 48 + tensors * 16));
        across_steps.push(("the bins", arguments.gsnr_bins, tensors * 4096 * 4));
    } else if arguments.tracks != 0 || matches!(kernel, Kernel::Update | Kernel::Gsnr) {
        across_steps.push(("the tracks", arguments.tracks, tensors * 40));
        across_steps.push(("the means", arguments.means, 1));
        across_steps.push(("the deviations", arguments.deviations, 1));
        across_steps.push(("the bins", arguments.gsnr_bins, 1));
    }
    if !across_steps.is_empty() {
        across_steps.push(("the records across steps", arguments.gsnr_records, tensors * size_of::<GsnrRecord>()));
    }
    for (what, address, bytes) in across_steps {
        demand_at_work(what, address, bytes);
    }
    if kernel == Kernel::Merge {
        let lists = (arguments.list_count * arguments.list_length) as usize;
        demand_at_work("the ranks' records", arguments.lists, lists * size_of::<Record>());
        demand_at_work("the placements", arguments.placements, tensors * 8);
        demand_at_work("the counter of replicas", arguments.differing, 4);
    }
    if matches!(kernel, Kernel::Measure | Kernel::Merge) && arguments.loss_scale != 0 {
        demand_at_work("the loss scale", arguments.loss_scale, 32);
    }
    let histograms = if arguments.one_histogram != 0 { 1 } else { tensors };
    if matches!(kernel, Kernel::Measure | Kernel::Merge) && arguments.health_rules != 0 {
        demand_at_work("the rules", arguments.health_rules, 2048 + tensors * 4);
        demand_at_work("the last norms", arguments.last_norms, (tensors + 1) * 8);
        demand_at_work("the verdict words", arguments.health_words, tensors * 4);
    }
    let more: &[(&str, u64, usize)] = match kernel {
        Kernel::Sample => &[("what is sampled", arguments.samples, 32)],
        Kernel::Adaptive => &[
            ("the units", arguments.adaptive, 32 + (tensors + 1) * 32),
            ("what became of the units", arguments.adaptive_records, tensors * size_of::<AdaptiveRecord>()),
        ],
        Kernel::Histogram => &[("the histograms", arguments.histograms, histograms * size_of::<Histogram>())],
        Kernel::Dot => &[
            ("the second list", arguments.others, tensors * 16),
            ("the chunks' dot products", arguments.chunk_dots, chunks * size_of::<Dot>()),
            ("the dot products", arguments.dots, tensors * size_of::<Dot>()),
        ],
        _ => &[],
    };
    for &(what, address, bytes) in more {
        demand_at_work(what, address, bytes);
    }
    if let Err(error) = (Simt { schedule: next_schedule(), blocks: 0 }).launch(kernel, blocks, arguments) {
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

/// For calls that are not allowed while a capture is going on, on whatever stream: on this thread, or in global mode
/// anywhere.
pub fn refuse_in_any_capture() -> Outcome {
    for stream in STREAMS.all() {
        if let Some(capture) = &mut *stream.capture() {
            let forbidden = match capture.mode {
                CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL => true,
                CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL => capture.thread == thread::current().id(),
                CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED => false,
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
        self.nodes().into_iter().map(|node| *NODES.get(node)).collect()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.nodes().into_iter().for_each(|node| drop::<Arc<Work>>(NODES.remove(node)));
    }
}
