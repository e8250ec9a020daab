//! What cudarc calls of NCCL to gather and to add up the words of ranks. A rank is a stream; a collective holds each rank's
//! stream until all have come to it, as NCCL's does.
#![allow(non_snake_case, reason = "NCCL's names")]

use crate::{
    context, die,
    faults::{self, Fault},
    graph::{EXECUTABLES, Work},
    handles::Registry,
    memory,
    stream::{Stream, delay_next, stream},
    trace,
};
use cudarc::nccl::sys::{self, cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use std::{
    collections::BTreeMap,
    ffi::{c_int, c_void},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

/// The ranks of one unique id.
struct Group {
    /// Where each rank's bytes are, and how many it says it comes with.
    from: Mutex<Vec<(u64, usize)>>,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

/// Ranks that wait for each other.
#[derive(Default)]
struct Meeting {
    /// How many have come, and how many times all have.
    come: usize,
    met: u64,
}

/// How a rank comes to a meeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// With its own count.
    Truly,
    /// With another count.
    Falsely,
    /// Not at all.
    Never,
}

/// One rank of a group. Never freed: work that is captured or queued names it.
pub struct Rank {
    group: Arc<Group>,
    rank: usize,
    ranks: usize,
    /// Collectives that have yet to run.
    queued: AtomicUsize,
    /// Aborted or destroyed.
    is_gone: AtomicBool,
    /// And no graph is left.
    is_freed: AtomicBool,
    /// Its device is lost.
    is_lost: AtomicBool,
    /// How often it answers that it is in progress, and then queues this.
    in_progress: AtomicUsize,
    pending: Mutex<Option<(Arc<Stream>, Work)>>,
    has_lost_peer: AtomicBool,
}

/// How many communicators there are.
pub fn communicators() -> usize {
    COMMUNICATORS.all().len()
}

/// No collective waits any more: the device is lost.
pub fn end_all() {
    for rank in COMMUNICATORS.all() {
        rank.end(&rank.is_lost);
    }
}

static GROUPS: Mutex<BTreeMap<u64, Arc<Group>>> = Mutex::new(BTreeMap::new());
static COMMUNICATORS: Registry<&'static Rank> = Registry::new("communicator");

impl Rank {
    /// It waits for nobody from here on, for this reason.
    fn end(&self, reason: &AtomicBool) {
        let meeting = self.group.meeting.lock().unwrap();
        reason.store(true, Ordering::SeqCst);
        drop(meeting);
        self.group.changed.notify_all();
    }

    /// Comes with an address and a count to a meeting at which all have the same count; otherwise, as NCCL documents no better
    /// end, it waits until it is aborted. The addresses of all, if they have met.
    fn meet_with(&self, address: u64, count: usize, announced: Announced) -> Option<Vec<u64>> {
        if announced == Announced::Never {
            self.wait_for_abort();
            return None;
        }
        let count = count + usize::from(announced == Announced::Falsely);
        self.group.from.lock().unwrap()[self.rank] = (address, count);
        if !self.meet() {
            return None;
        }
        let all = self.group.from.lock().unwrap().clone();
        if all.iter().any(|&(_, of_rank)| of_rank != all[0].1) {
            self.wait_for_abort();
            return None;
        }
        Some(all.into_iter().map(|(address, _)| address).collect())
    }

    /// Queues a collective, or has it in progress.
    fn submit(&self, handle: cudaStream_t, work: Work) -> ncclResult_t {
        let queued = stream(handle.cast()).and_then(|stream| {
            if self.in_progress.load(Ordering::SeqCst) == 0 {
                return stream.submit(work);
            }
            *self.pending.lock().unwrap() = Some((stream, work));
            Ok(())
        });
        queued.map_or(ncclResult_t::ncclUnhandledCudaError, |()| ncclResult_t::ncclSuccess)
    }

    fn wait_for_abort(&self) {
        let meeting = self.group.meeting.lock().unwrap();
        drop(self.group.changed.wait_while(meeting, |_| !self.waits_for_nobody()).unwrap());
    }

    fn waits_for_nobody(&self) -> bool {
        self.is_gone.load(Ordering::SeqCst) || self.is_lost.load(Ordering::SeqCst)
    }

    /// A collective is queued.
    pub fn queue(&self) {
        // Before that a graph that is launched ends at once.
        if self.is_freed.load(Ordering::SeqCst) {
            die("a graph is launched after the communicator of one of its collectives was freed");
        }
        self.queued.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits for all ranks; not when this one is aborted.
    fn meet(&self) -> bool {
        let mut meeting = self.group.meeting.lock().unwrap();
        let met = meeting.met;
        meeting.come += 1;
        if meeting.come == self.ranks {
            meeting.come = 0;
            meeting.met += 1;
            self.group.changed.notify_all();
        }
        while meeting.met == met {
            if self.waits_for_nobody() {
                meeting.come -= 1;
                return false;
            }
            meeting = self.group.changed.wait(meeting).unwrap();
        }
        true
    }

    /// As NCCL's `commDestroySync`, waits until no graph is left that has captured one of its collectives.
    fn await_graphs(&self) {
        let is_held = || {
            let is_own = |work: &Work| match work {
                Work::Gather { rank, .. } | Work::Reduce { rank, .. } => std::ptr::eq(*rank, self),
                _ => false,
            };
            EXECUTABLES.all().iter().any(|works| works.iter().any(is_own))
        };
        while is_held() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.is_freed.store(true, Ordering::SeqCst);
    }

    /// Copies the bytes of all ranks, on this rank's stream.
    pub fn gather(&self, from: u64, to: u64, bytes: usize, announced: Announced) {
        memory::demand_at_work("what a rank gives", from, bytes);
        memory::demand_at_work("what a rank gets", to, bytes * self.ranks);
        let Some(all) = self.meet_with(from, bytes, announced) else { return };
        for (rank, &from) in all.iter().enumerate() {
            let to = to + (rank * bytes) as u64;
            // SAFETY: its rank has found it to be live device memory, and waits below until all have copied it.
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
            gradprobe_ptx::memory::written(to, bytes);
        }
        self.meet();
        self.queued.fetch_sub(1, Ordering::SeqCst);
    }

    /// Makes of each word that of all ranks, on this rank's stream.
    pub fn reduce(&self, at: u64, words: usize, takes_largest: bool, announced: Announced) {
        memory::demand_at_work("what a rank adds up", at, words * 8);
        let Some(all) = self.meet_with(at, words, announced) else { return };
        let mut reduced = vec![0u64; words];
        for from in all {
            // SAFETY: its rank has found it to be live device memory, and waits below until all have read it.
            let of_rank = unsafe { std::slice::from_raw_parts(from as *const u64, words) };
            for (word, &other) in reduced.iter_mut().zip(of_rank) {
                *word = if takes_largest { other.max(*word) } else { word.wrapping_add(other) };
            }
        }
        self.meet();
        // SAFETY: this rank's own, which was demanded.
        unsafe { std::ptr::copy_nonoverlapping(reduced.as_ptr(), at as *mut u64, words) };
        gradprobe_ptx::memory::written(at, words * 8);
        self.queued.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What becomes of a call before it begins.
fn begin(name: &'static str) -> Result<(), ncclResult_t> {
    match faults::next(name) {
        Some(Fault::Refuse(_)) => return Err(ncclResult_t::ncclSystemError),
        Some(Fault::Lose(code)) => context::lose(code),
        Some(Fault::Delay) => delay_next(),
        _ => {}
    }
    let is_lost = context::lost().is_some() && !faults::releases(name);
    if is_lost { Err(ncclResult_t::ncclUnhandledCudaError) } else { Ok(()) }
}

/// How the rank of this call's collective comes to it.
fn announced(rank: &Rank) -> Announced {
    match faults::of_this_call() {
        Some(Fault::Hang) => Announced::Never,
        Some(Fault::LosePeer) => {
            rank.has_lost_peer.store(true, Ordering::SeqCst);
            Announced::Never
        }
        Some(Fault::OtherCount) => Announced::Falsely,
        Some(Fault::Progress) => {
            rank.in_progress.store(2, Ordering::SeqCst);
            Announced::Truly
        }
        _ => Announced::Truly,
    }
}

/// A function of NCCL's, with the signature that cudarc calls it by.
macro_rules! entry_point {
    (fn $name:ident($($parameter:ident: $type:ty),* $(,)?) $body:block) => {
        entry_point! { fn $name($($parameter: $type),*) as String::new(), $body }
    };
    (fn $name:ident($($parameter:ident: $type:ty),* $(,)?) as $shown:expr, $body:block) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($parameter: $type),*) -> ncclResult_t {
            trace::call(stringify!($name), || $shown);
            if let Err(refused) = begin(stringify!($name)) {
                return refused;
            }
            let run = || $body;
            match (run(), faults::of_this_call()) {
                (_, Some(Fault::ReleaseAndRefuse(_))) => ncclResult_t::ncclSystemError,
                (ncclResult_t::ncclSuccess, Some(Fault::Progress)) => ncclResult_t::ncclInProgress,
                (done, _) => done,
            }
        }
        const _: unsafe fn($($type),*) -> ncclResult_t = sys::$name;
    };
}

entry_point! {
    fn ncclGetUniqueId(id: *mut ncclUniqueId) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mut internal = [0; 128];
        for (to, byte) in internal.iter_mut().zip(NEXT.fetch_add(1, Ordering::Relaxed).to_ne_bytes()) {
            *to = byte.cast_signed();
        }
        // SAFETY: the caller's variable.
        unsafe { *id = ncclUniqueId { internal } };
        ncclResult_t::ncclSuccess
    }
}

entry_point! {
    fn ncclCommInitRank(communicator: *mut ncclComm_t, ranks: c_int, id: ncclUniqueId, rank: c_int) {
        let (Ok(count), Ok(index)) = (usize::try_from(ranks), usize::try_from(rank)) else {
            return ncclResult_t::ncclInvalidArgument;
        };
        if index >= count {
            return ncclResult_t::ncclInvalidArgument;
        }
        let mut number = [0; 8];
        for (to, byte) in number.iter_mut().zip(id.internal) {
            *to = byte.cast_unsigned();
        }
        let mut groups = GROUPS.lock().unwrap();
        let group = groups.entry(u64::from_ne_bytes(number));
        let new = || {
            let from = Mutex::new(vec![(0, 0); count]);
            Arc::new(Group { from, meeting: Mutex::default(), changed: Condvar::new() })
        };
        let group = Arc::clone(group.or_insert_with(new));
        drop(groups);
        if group.from.lock().unwrap().len() != count {
            return ncclResult_t::ncclInvalidArgument;
        }
        let rank: &'static Rank = Box::leak(Box::new(Rank {
            group,
            rank: index,
            ranks: count,
            queued: AtomicUsize::new(0),
            is_gone: AtomicBool::new(false),
            is_freed: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            in_progress: AtomicUsize::new(0),
            pending: Mutex::new(None),
            has_lost_peer: AtomicBool::new(false),
        }));
        announced(rank);
        // No rank has a communicator before all have come.
        rank.meet();
        // SAFETY: the caller's variable.
        unsafe { *communicator = COMMUNICATORS.insert(rank) };
        ncclResult_t::ncclSuccess
    }
}

entry_point! {
    fn ncclCommAbort(communicator: ncclComm_t) {
        let rank = *COMMUNICATORS.remove(communicator);
        rank.end(&rank.is_gone);
        rank.await_graphs();
        ncclResult_t::ncclSuccess
    }
}

entry_point! {
    fn ncclCommDestroy(communicator: ncclComm_t) {
        let rank = *COMMUNICATORS.remove(communicator);
        rank.is_gone.store(true, Ordering::SeqCst);
        if rank.queued.load(Ordering::SeqCst) > 0 {
            die("a communicator is destroyed before what is queued on it has run");
        }
        rank.await_graphs();
        ncclResult_t::ncclSuccess
    }
}

entry_point! {
    fn ncclCommGetAsyncError(communicator: ncclComm_t, found: *mut ncclResult_t) {
        let rank = *COMMUNICATORS.get(communicator);
        let is_in_progress = rank.in_progress.load(Ordering::SeqCst) > 0;
        let status = if rank.has_lost_peer.load(Ordering::SeqCst) {
            ncclResult_t::ncclRemoteError
        } else if is_in_progress {
            if rank.in_progress.fetch_sub(1, Ordering::SeqCst) == 1
                && let Some((stream, work)) = rank.pending.lock().unwrap().take()
                && stream.submit(work).is_err()
            {
                return ncclResult_t::ncclUnhandledCudaError;
            }
            ncclResult_t::ncclInProgress
        } else {
            ncclResult_t::ncclSuccess
        };
        // SAFETY: the caller's variable.
        unsafe { *found = status };
        ncclResult_t::ncclSuccess
    }
}

entry_point! {
    fn ncclAllGather(from: *const c_void, to: *mut c_void, count: usize, dtype: ncclDataType_t, communicator: ncclComm_t, handle: cudaStream_t) {
        if dtype != ncclDataType_t::ncclUint8 {
            die("only bytes are gathered here");
        }
        let rank = *COMMUNICATORS.get(communicator);
        let (from, to) = (from as u64, to as u64);
        memory::demand(from, count);
        memory::demand(to, count * rank.ranks);
        let work = Work::Gather { rank, from, to, bytes: count, meeting: announced(rank) };
        rank.submit(handle, work)
    }
}

entry_point! {
    fn ncclAllReduce(from: *const c_void, to: *mut c_void, count: usize, dtype: ncclDataType_t, change: ncclRedOp_t, communicator: ncclComm_t, handle: cudaStream_t) as format!("{count} words"), {
        if dtype != ncclDataType_t::ncclUint64 || from != to.cast_const() {
            die("only u64 are reduced here, and in place");
        }
        let takes_largest = match change {
            ncclRedOp_t::ncclSum => false,
            ncclRedOp_t::ncclMax => true,
            _ => die("only sums and maxima are made here"),
        };
        let (rank, at) = (*COMMUNICATORS.get(communicator), to as u64);
        memory::demand(at, 8 * count);
        let work = Work::Reduce { rank, at, words: count, takes_largest, meeting: announced(rank) };
        rank.submit(handle, work)
    }
}
