//! Ranks that add up their sums by NCCL, on the probe's stream.

use super::{
    device::{Relaxed, is_capturing},
    driver::{failed, find, insist, make_current},
};
use crate::{
    Error,
    ranks::{Communicator, DEADLINE, Reduction, not_come},
    tensor::Place,
};
use cudarc::{
    driver::{CudaContext, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop},
    nccl::{
        result::{self, NcclError, NcclStatus},
        safe::{Comm, Id, ReduceOp},
        sys::{self, cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId},
    },
};
use std::{
    ffi::c_void,
    marker::PhantomData,
    mem, ptr,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Names of NCCL's library in its packages, of those that cudarc looks for.
const NCCL: &[&str] = if cfg!(windows) { &["nccl.dll"] } else { &["libnccl.so"] };

/// Joins a NCCL communicator as a rank, for [`Ranks::new`](crate::ranks::Ranks::new). It is best one of the probe's
/// own: work on one communicator is in one order on all ranks, and with several streams only the user can ensure that.
///
/// ```no_run
/// use gradprobe::{Clip, Config, DType, Plan, Probe, ranks::{Along, Mesh, Ranks}, cuda::{self, Cuda, NcclCommunicator}};
///
/// # let (rank, ranks, device) = (0, 2, 0);
/// // On rank 0, which sends `id.internal()` to the others: by MPI, a socket, a file.
/// let id = NcclCommunicator::unique_id()?;
/// // On every rank, with the lengths of its own parts.
/// let stream = cuda::stream(device)?;
/// let plan = Plan::new([("block.0.weight", DType::BF16, 1 << 20), ("norm.weight", DType::F32, 4096)])?;
/// let communicator = NcclCommunicator::new(&stream, rank, ranks, id)?;
/// let mesh = Mesh::new([("dp", ranks)])?;
/// let ranks = Ranks::new(communicator, &mesh, [mesh.layout([("dp", Along::Sharded)])?, mesh.layout([])?]);
/// let config = Config::new().clip(Clip::global_norm(1.0)).ranks(ranks);
/// let mut probe = Probe::new(Cuda::new(&stream)?, plan, config)?;
/// // `measure` is a collective call; `clip` and `poll` are as ever.
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct NcclCommunicator {
    handle: Mutex<Handle>,
    stream: Arc<CudaStream>,
    rank: u32,
    ranks: u32,
    deadline: Duration,
}

#[derive(Debug)]
enum Handle {
    /// A communicator made here.
    Own(ncclComm_t),
    /// The trainer's communicator.
    Shared(Arc<Comm>),
    Aborted,
}

// SAFETY: a communicator may be used by any thread, by one at a time, which the lock ensures; for a shared one the
// caller has promised it.
unsafe impl Send for NcclCommunicator {}
// SAFETY: as above.
unsafe impl Sync for NcclCommunicator {}

/// Waits for queued work before the communicator goes. Then aborts it, which waits for no peer, as `ncclCommDestroy`
/// does.
impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        let _relaxed = Relaxed::new();
        let handle = mem::replace(self.handle.get_mut().unwrap_or_else(PoisonError::into_inner), Handle::Aborted);
        let Handle::Own(raw) = handle else { return };
        // A capture waits for nothing; and where waiting fails twice the device is lost. Errors have nowhere to go.
        if insist(|| is_capturing(&self.stream)) == Ok(true) {
            return;
        }
        let wait = || self.stream.synchronize().map_err(failed("cuStreamSynchronize", "waiting for collectives"));
        let _ = insist(wait);
        // SAFETY: it is not used again.
        let _ = unsafe { result::comm_abort(raw) };
    }
}

impl NcclCommunicator {
    /// Makes the id that rank 0 sends to the others before they make their communicators: 128 bytes, [`Id::internal`].
    ///
    /// # Errors
    /// [`Error::NcclNotFound`], where cudarc panics, and NCCL's.
    pub fn unique_id() -> Result<Id, Error> {
        find(NCCL).map_err(|(searched, reason)| Error::NcclNotFound { searched, reason })?;
        Id::new().map_err(nccl("making a unique id"))
    }

    /// Joins as rank `rank` of `ranks`, on a probe's stream. Waits up to ten minutes for the other ranks, which are on
    /// other devices.
    ///
    /// # Errors
    /// [`Error::NcclNotFound`], where cudarc panics, NCCL's, and [`Error::Communication`] when a rank does not come.
    pub fn new(stream: &Arc<CudaStream>, rank: u32, ranks: u32, id: Id) -> Result<Self, Error> {
        Self::within(DEADLINE, stream, rank, ranks, id)
    }

    /// Does the same with another deadline, for the ranks to come and for a probe's later waits.
    ///
    /// # Errors
    /// As there.
    pub fn within(deadline: Duration, stream: &Arc<CudaStream>, rank: u32, ranks: u32, id: Id) -> Result<Self, Error> {
        find(NCCL).map_err(|(searched, reason)| Error::NcclNotFound { searched, reason })?;
        // NCCL refuses more ranks than an i32 counts.
        let (Ok(count), Ok(index), true) = (i32::try_from(ranks), i32::try_from(rank), rank < ranks) else {
            return Err(Error::Communication { what: format!("there is no rank {rank} of {ranks}") });
        };
        let (context, id) = (Arc::clone(stream.context()), ncclUniqueId { internal: *id.internal() });
        // In a thread of its own: NCCL waits without end for a rank that does not come.
        let (made, wait) = mpsc::sync_channel(0);
        let make = move || {
            let communicator = init(&context, count, id, index, deadline).map(Raw);
            if let Err(mpsc::SendError(Ok(Raw(raw)))) = made.send(communicator) {
                // SAFETY: nothing waits for it any more.
                let _ = unsafe { result::comm_abort(raw) };
            }
        };
        let thread = thread::Builder::new().name("gradprobe-nccl".to_owned()).spawn(make);
        thread.map_err(|error| Error::Thread { reason: error.to_string() })?;
        let Raw(raw) = wait.recv_timeout(deadline).map_err(|_| not_come(deadline))??;
        let stream = Arc::clone(stream);
        Ok(Self { handle: Mutex::new(Handle::Own(raw)), stream, rank, ranks, deadline })
    }

    /// Takes the trainer's communicator, whose stream is the probe's. It stays the trainer's, and cannot be aborted
    /// from here.
    ///
    /// # Safety
    /// As long as this lives, no two threads use the communicator at once: `Comm` is not `Sync`, and this may be sent
    /// to another thread. All ranks queue their work on it in the same order. It is not aborted, as cudarc does when
    /// the last `Arc` is dropped, while queued or captured work has yet to run. One that hangs is the exception: abort
    /// it before the probe is dropped, since that waits.
    #[expect(clippy::cast_possible_truncation, reason = "NCCL numbers ranks in i32")]
    pub unsafe fn shared(comm: Arc<Comm>) -> Self {
        let (stream, rank, ranks) = (comm.stream(), comm.rank() as u32, comm.world_size() as u32);
        Self { handle: Mutex::new(Handle::Shared(comm)), stream, rank, ranks, deadline: DEADLINE }
    }

    /// Sets the longest wait of a probe for the GPUs, in place of ten minutes. After that the communicator is aborted,
    /// and every call is an error.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The stream that it works on.
    pub fn stream(&self) -> Arc<CudaStream> {
        Arc::clone(&self.stream)
    }

    /// Queues work with this context current.
    fn queue(
        &self,
        own: impl FnOnce(ncclComm_t, cudaStream_t) -> Result<NcclStatus, NcclError>,
        shared: impl FnOnce(&Comm) -> Result<NcclStatus, NcclError>,
        call: &'static str,
    ) -> Result<(), Error> {
        make_current(self.stream.context())?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        match &*handle {
            Handle::Own(raw) => {
                let queued = own(*raw, self.stream.cu_stream().cast()).map_err(nccl(call))?;
                settled(*raw, queued, self.deadline).map_err(nccl(call))
            }
            Handle::Shared(comm) => match shared(comm).map_err(nccl(call))? {
                NcclStatus::InProgress => Err(nccl(call)(NcclError(ncclResult_t::ncclInProgress))),
                _ => Ok(()),
            },
            Handle::Aborted => Err(aborted()),
        }
    }
}

/// Makes a communicator on this thread.
fn init(
    context: &CudaContext,
    ranks: i32,
    id: ncclUniqueId,
    rank: i32,
    deadline: Duration,
) -> Result<ncclComm_t, Error> {
    make_current(context)?;
    let mut raw = ptr::null_mut();
    // SAFETY: a variable of this function, and an id that NCCL has made.
    let made = unsafe { result::comm_init_rank(&raw mut raw, ranks, id, rank) };
    made.and_then(|status| settled(raw, status, deadline)).map_err(|error| {
        if !raw.is_null() {
            // SAFETY: NCCL has given it, and it is not used again.
            let _ = unsafe { result::comm_abort(raw) };
        }
        nccl("making a communicator")(error)
    })?;
    Ok(raw)
}

/// Gives the state of a communicator's work so far.
fn asynchronous(raw: ncclComm_t) -> Result<NcclStatus, NcclError> {
    let mut found = ncclResult_t::ncclSuccess;
    // SAFETY: the callers' communicators live; a variable of this function.
    unsafe { sys::ncclCommGetAsyncError(raw, &raw mut found) }.result()?;
    found.result()
}

/// Waits for a communicator that does not block, as `NCCL_COMM_BLOCKING=0` makes all of them, until its call is no
/// longer in progress: only then is the work queued, and before later launches.
fn settled(raw: ncclComm_t, mut status: NcclStatus, deadline: Duration) -> Result<(), NcclError> {
    let since = Instant::now();
    while matches!(status, NcclStatus::InProgress) {
        if since.elapsed() > deadline {
            return Err(NcclError(ncclResult_t::ncclInProgress));
        }
        thread::sleep(Duration::from_micros(20));
        status = asynchronous(raw)?;
    }
    Ok(())
}

/// A communicator on its way to another thread.
struct Raw(ncclComm_t);

// SAFETY: nothing else has it, and any thread may use it.
unsafe impl Send for Raw {}

fn aborted() -> Error {
    Error::Communication { what: "NCCL: this rank has aborted".to_owned() }
}

/// Makes the error of a call of NCCL's. Its own `Debug` leaves out the code.
fn nccl(call: &'static str) -> impl Fn(NcclError) -> Error {
    move |error| Error::Communication { what: format!("NCCL: {call} failed with {:?}", error.0) }
}

/// Device memory by its address, ordered by the communicator's stream.
struct Words<T> {
    address: u64,
    count: usize,
    stream: Arc<CudaStream>,
    _of: PhantomData<T>,
}

impl<T> Words<T> {
    fn new(address: u64, count: usize, stream: &Arc<CudaStream>) -> Self {
        Self { address, count, stream: Arc::clone(stream), _of: PhantomData }
    }
}

impl<T> DeviceSlice<T> for Words<T> {
    fn len(&self) -> usize {
        self.count
    }

    fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl<T> DevicePtr<T> for Words<T> {
    fn device_ptr<'a>(&'a self, _: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}

impl<T> DevicePtrMut<T> for Words<T> {
    fn device_ptr_mut<'a>(&'a mut self, _: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}

// SAFETY: NCCL writes only the given memory, in the order of the stream.
unsafe impl Communicator for NcclCommunicator {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn ranks(&self) -> u32 {
        self.ranks
    }

    fn check(&self, place: &Place) -> Result<(), Error> {
        let what = match place {
            Place::Stream(stream) if Arc::ptr_eq(stream, &self.stream) => return Ok(()),
            Place::Stream(_) => "NCCL's communicator is of another stream than the probe: make both with one",
            Place::Host => "NCCL exchanges memory of CUDA devices, and the probe is on the CPU",
        };
        Err(Error::Communication { what: what.to_owned() })
    }

    unsafe fn all_gather(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        let own = |raw, stream| {
            // SAFETY: the communicator lives as long as the lock is held; of the memory the caller vouches.
            unsafe {
                result::all_gather(
                    from as *const c_void,
                    to as *mut c_void,
                    bytes,
                    ncclDataType_t::ncclUint8,
                    raw,
                    stream,
                )
            }
        };
        let shared = |comm: &Comm| {
            let given = Words::<u8>::new(from, bytes, &self.stream);
            let mut all = Words::new(to, bytes * self.ranks as usize, &self.stream);
            comm.all_gather(&given, &mut all)
        };
        self.queue(own, shared, "an all-gather")
    }

    unsafe fn all_reduce(&self, at: u64, words: usize, reduction: Reduction) -> Result<(), Error> {
        if words == 0 {
            return Ok(());
        }
        let (raw_reduction, reduction) = match reduction {
            Reduction::Sum => (ncclRedOp_t::ncclSum, ReduceOp::Sum),
            Reduction::Max => (ncclRedOp_t::ncclMax, ReduceOp::Max),
        };
        let own = |raw, stream| {
            let at = at as *mut c_void;
            // SAFETY: the communicator lives as long as the lock is held; of the memory the caller vouches.
            unsafe { result::all_reduce(at, at, words, ncclDataType_t::ncclUint64, raw_reduction, raw, stream) }
        };
        let shared =
            |comm: &Comm| comm.all_reduce_in_place(&mut Words::<u64>::new(at, words, &self.stream), &reduction);
        self.queue(own, shared, "an all-reduce")
    }

    fn deadline(&self) -> Option<Duration> {
        Some(self.deadline)
    }

    fn status(&self) -> Result<(), Error> {
        match &*self.handle.lock().unwrap_or_else(PoisonError::into_inner) {
            Handle::Own(raw) => asynchronous(*raw).map(drop).map_err(nccl("a collective")),
            // cudarc gives no state.
            Handle::Shared(_) => Ok(()),
            Handle::Aborted => Err(aborted()),
        }
    }

    fn abort(&self) {
        let mut handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Handle::Own(raw) = *handle {
            *handle = Handle::Aborted;
            drop(handle);
            let (raw, context) = (Raw(raw), Arc::clone(self.stream.context()));
            // The kernels end at once; but the call waits for graphs that have captured a collective to be destroyed.
            thread::spawn(move || {
                let Raw(raw) = { raw };
                // Errors have nowhere to go.
                let _ = insist(|| make_current(&context));
                // SAFETY: it is not used again.
                let _ = unsafe { result::comm_abort(raw) };
            });
        }
    }
}
