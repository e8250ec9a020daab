//! Calls that fail, or whose work comes late, because a test wants to see what becomes of it.
//!
//! A test that knows how many calls a script makes runs it once for each of them and for each kind of fault:
//! `gradprobe_host_driver_faults_begin` says which call is to fail and how, `…_end` which calls there were.
//!
//! A call that releases something has released it when it fails: NVIDIA documents that such calls "may also return error codes
//! from previous, asynchronous launches".

use crate::{context, stream};
use cudarc::driver::sys::CUresult;
use std::{
    cell::Cell,
    slice,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this code and does nothing.
    Refuse(CUresult),
    /// It does what it should, and then fails with this code.
    ReleaseAndRefuse(CUresult),
    /// The context is lost with this code, as after an illegal address: nothing that is queued in it runs any more, and every
    /// call in it fails, this one first.
    Lose(CUresult),
    /// What it queues next comes late; a query says that the moment has not come.
    Delay,
    /// From here on nothing can be allocated.
    Exhaust,
    /// Of NCCL: it answers that it is in progress, and is done after the second question.
    Progress,
    /// Of NCCL: the collective never comes to its end by itself.
    Hang,
    /// Of NCCL: as [`Hang`](Self::Hang), and whoever asks hears of a peer that is gone.
    LosePeer,
    /// Of NCCL: it comes with another count than its peers, which then never meet.
    OtherCount,
}

/// Calls that release: their object is gone whatever they return.
const RELEASING: [&str; 10] = [
    "cuMemFreeAsync",
    "cuMemFree_v2",
    "cuMemFreeHost",
    "cuStreamDestroy_v2",
    "cuEventDestroy_v2",
    "cuModuleUnload",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
    "ncclCommAbort",
    "ncclCommDestroy",
];

/// Calls that allocate.
const ALLOCATING: [&str; 4] = ["cuMemAllocAsync", "cuMemAlloc_v2", "cuMemHostAlloc", "cuModuleLoadData"];

struct Plan {
    /// The call that is to fail, from 0, and how.
    planned: Option<(usize, u32, CUresult)>,
    /// The calls so far.
    calls: Vec<&'static str>,
    exhausted: bool,
    is_paused: bool,
}

static PLAN: Mutex<Option<Plan>> = Mutex::new(None);

thread_local! {
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
    static OF_THIS_CALL: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// The fault of the call that this thread is in.
pub fn of_this_call() -> Option<Fault> {
    OF_THIS_CALL.get()
}

fn plan() -> MutexGuard<'static, Option<Plan>> {
    PLAN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a query waits for its event while calls are counted.
pub fn time_of_queries() -> Option<Duration> {
    let plan = plan();
    let plan = plan.as_ref()?;
    // Nobody comes to a collective that hangs.
    let hangs = plan.planned.is_some_and(|(call, kind, _)| kind >= 5 && call < plan.calls.len());
    Some(Duration::from_millis(if hangs { 20 } else { 5000 }))
}

/// What is to become of this call.
pub fn next(name: &'static str) -> Option<Fault> {
    let fault = planned(name);
    OF_THIS_CALL.set(fault);
    fault
}

fn planned(name: &'static str) -> Option<Fault> {
    if EXEMPT.get() {
        return None;
    }
    let mut plan = plan();
    let plan = plan.as_mut().filter(|plan| !plan.is_paused)?;
    let index = plan.calls.len();
    plan.calls.push(name);
    let fault = match plan.planned {
        Some((planned, kind, code)) if planned == index => match kind {
            0 if releases(name) => Some(Fault::ReleaseAndRefuse(code)),
            0 => Some(Fault::Refuse(code)),
            1 => Some(Fault::Lose(code)),
            2 => Some(Fault::Delay),
            3 => Some(Fault::Exhaust),
            4 => Some(Fault::Progress),
            5 => Some(Fault::Hang),
            6 => Some(Fault::LosePeer),
            _ => Some(Fault::OtherCount),
        },
        _ => None,
    };
    if fault == Some(Fault::Exhaust) {
        plan.exhausted = true;
    }
    let no_memory = plan.exhausted && ALLOCATING.contains(&name);
    if no_memory { Some(Fault::Refuse(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) } else { fault }
}

/// Whether a call's object is gone whatever it returns.
pub fn releases(name: &str) -> bool {
    RELEASING.contains(&name)
}

/// For a call's beginning: what it returns at once, if it does nothing; and for its end, what it returns instead of success.
pub fn before(name: &'static str) -> (Result<(), CUresult>, Option<CUresult>) {
    let fault = next(name);
    match fault {
        Some(Fault::Refuse(code)) => return (Err(code), None),
        Some(Fault::Lose(code)) => context::lose(code),
        Some(Fault::Delay) if name == "cuEventQuery" => return (Err(CUresult::CUDA_ERROR_NOT_READY), None),
        Some(Fault::Delay) => stream::delay_next(),
        _ => {}
    }
    let lost = context::lost();
    match (fault, lost) {
        (Some(Fault::ReleaseAndRefuse(code)), _) => (Ok(()), Some(code)),
        (_, Some(lost)) if releases(name) => (Ok(()), Some(lost)),
        (_, Some(lost)) if !survives(name) => (Err(lost), None),
        _ => (Ok(()), None),
    }
}

/// Calls that a lost context does not concern.
fn survives(name: &str) -> bool {
    let prefixes = ["cuInit", "cuDevice", "cuGetError", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuThreadExchange"];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// From here on calls are counted, but for those of exempt threads, and the one with this number, from 0, has a fault of this
/// kind: 0 fails with the code, 1 loses the context with it, 2 comes late, 3 and after it no memory, and of NCCL 4 in progress,
/// 5 hangs, 6 a peer is lost, 7 another count. A number below 0 means none.
#[unsafe(no_mangle)]
pub extern "C" fn gradprobe_host_driver_faults_begin(call: i64, kind: u32, code: CUresult) {
    let planned = usize::try_from(call).ok().map(|call| (call, kind, code));
    *plan() = Some(Plan { planned, calls: Vec::new(), exhausted: false, is_paused: false });
}

/// For a while no calls are counted, of whatever thread, or again all.
#[unsafe(no_mangle)]
pub extern "C" fn gradprobe_host_driver_faults_pause(pause: bool) {
    if let Some(plan) = &mut *plan() {
        plan.is_paused = pause;
    }
}

/// Calls that were counted so far.
#[unsafe(no_mangle)]
pub extern "C" fn gradprobe_host_driver_faults_count() -> usize {
    plan().as_ref().map_or(0, |plan| plan.calls.len())
}

/// There is memory again.
#[unsafe(no_mangle)]
pub extern "C" fn gradprobe_host_driver_faults_pass() {
    if let Some(plan) = &mut *plan() {
        plan.exhausted = false;
    }
}

/// Whether the calls of this thread are a test's own, which are not counted and do not fail.
#[unsafe(no_mangle)]
pub extern "C" fn gradprobe_host_driver_faults_exempt(exempt: bool) {
    EXEMPT.set(exempt);
}

/// Ends what was begun, and writes the names of the calls, one a line, as far as there is room; gives back their length.
///
/// # Safety
/// `capacity` bytes can be written at `buffer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradprobe_host_driver_faults_end(buffer: *mut u8, capacity: usize) -> usize {
    let calls = plan().take().map(|plan| plan.calls).unwrap_or_default();
    // SAFETY: the caller's word.
    unsafe { write_text(&calls.join("\n"), buffer, capacity) }
}

/// Writes what has been made and not released, by kind and number, and gives back the length of the text: 0 if nothing is left.
///
/// # Safety
/// `capacity` bytes can be written at `buffer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradprobe_host_driver_left(buffer: *mut u8, capacity: usize) -> usize {
    // SAFETY: the caller's word.
    unsafe { write_text(&context::left(), buffer, capacity) }
}

/// # Safety
/// `capacity` bytes can be written at `buffer`.
pub unsafe fn write_text(text: &str, buffer: *mut u8, capacity: usize) -> usize {
    let bytes = text.len().min(capacity);
    // SAFETY: no more than the capacity, which is the caller's word.
    let buffer = unsafe { slice::from_raw_parts_mut(buffer, bytes) };
    buffer.copy_from_slice(&text.as_bytes()[..bytes]);
    text.len()
}
