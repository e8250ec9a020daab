//! Ranks that add up their sums by NCCL, on the probe's stream.

use super::{
    device::Relaxed,
    driver::{failed, find},
};
use crate::{
    Error,
    ranks::{Communicator, Reduction},
    tensor::Place,
};
use cudarc::{
    driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop, sys::CUstreamCaptureStatus as Status},
    nccl::{
        result::NcclError,
        safe::{Comm, Id, ReduceOp},
    },
};
use std::{marker::PhantomData, mem::ManuallyDrop, sync::Arc};

/// The names under which cudarc looks for NCCL that are those of its packages.
const NCCL: &[&str] = if cfg!(windows) { &["nccl.dll"] } else { &["libnccl.so"] };

/// A rank of a NCCL communicator, for [`Ranks::new`](crate::ranks::Ranks::new). It is best one of the probe's own: work
/// on one communicator is in one order on all ranks, and with several streams only their user can see to that.
///
/// ```no_run
/// use gradprobe::{Clip, Config, DType, Plan, Probe, ranks::{Along, Mesh, Ranks}, cuda::{self, Cuda, NcclCommunicator}};
///
/// # let (rank, ranks, device) = (0, 2, 0);
/// // On rank 0, which sends `id.internal()` to the others: by MPI, a socket, a file.
/// let id = NcclCommunicator::unique_id()?;
/// // On every rank, with the length of what it holds.
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
pub struct NcclCommunicator(ManuallyDrop<Comm>);

// SAFETY: a communicator may be used by any thread, by one at a time: the probe that it is given to, which is not `Sync`.
unsafe impl Send for NcclCommunicator {}
// SAFETY: as above: only unsafe calls, which a probe makes, use it.
unsafe impl Sync for NcclCommunicator {}

/// cudarc aborts a communicator that it drops, and with it what is queued on it.
impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        let _relaxed = Relaxed::new();
        let stream = self.0.stream();
        let waited = stream.capture_status().is_ok_and(|status| status == Status::CU_STREAM_CAPTURE_STATUS_NONE)
            && stream.synchronize().is_ok();
        // Where that cannot be waited for it is better left.
        if waited {
            // SAFETY: it is not used again.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

impl NcclCommunicator {
    /// What rank 0 sends to the others before they make their communicators: 128 bytes, [`Id::internal`].
    ///
    /// # Errors
    /// [`Error::NcclNotFound`], where cudarc panics, and NCCL's.
    pub fn unique_id() -> Result<Id, Error> {
        find(NCCL).map_err(|(searched, reason)| Error::NcclNotFound { searched, reason })?;
        Id::new().map_err(nccl("making a unique id"))
    }

    /// Rank `rank` of `ranks`, on a probe's stream. Waits for the other ranks, which are on other devices.
    ///
    /// # Errors
    /// [`Error::NcclNotFound`], where cudarc panics, and NCCL's.
    pub fn new(stream: &Arc<CudaStream>, rank: u32, ranks: u32, id: Id) -> Result<Self, Error> {
        find(NCCL).map_err(|(searched, reason)| Error::NcclNotFound { searched, reason })?;
        stream.context().bind_to_thread().map_err(failed("making the context current"))?;
        // More ranks than an i32 counts are an error of NCCL's.
        if i32::try_from(ranks).is_err() || rank >= ranks {
            return Err(Error::Communication { what: format!("there is no rank {rank} of {ranks}") });
        }
        let comm = Comm::from_rank(Arc::clone(stream), rank as usize, ranks as usize, id);
        comm.map(Self::from).map_err(nccl("making a communicator"))
    }

    /// The stream that it works on, whose context is then the thread's.
    fn bound(&self) -> Result<Arc<CudaStream>, Error> {
        let stream = self.0.stream();
        stream.context().bind_to_thread().map_err(failed("making the context current"))?;
        Ok(stream)
    }

    /// The stream that it works on.
    pub fn stream(&self) -> Arc<CudaStream> {
        self.0.stream()
    }
}

/// One that a trainer has, whose stream is the probe's.
impl From<Comm> for NcclCommunicator {
    fn from(comm: Comm) -> Self {
        Self(ManuallyDrop::new(comm))
    }
}

/// What became of a call of NCCL's. Its error's `Debug` leaves out the code.
fn nccl(call: &'static str) -> impl Fn(NcclError) -> Error {
    move |error| Error::Communication { what: format!("NCCL: {call} failed with {:?}", error.0) }
}

/// Device memory by its address, whose order is that of the communicator's stream.
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

// SAFETY: NCCL writes what it is told, in the order of the stream.
unsafe impl Communicator for NcclCommunicator {
    #[expect(clippy::cast_possible_truncation, reason = "NCCL numbers ranks in i32")]
    fn rank(&self) -> u32 {
        self.0.rank() as u32
    }

    #[expect(clippy::cast_possible_truncation, reason = "NCCL numbers ranks in i32")]
    fn ranks(&self) -> u32 {
        self.0.world_size() as u32
    }

    fn check(&self, place: &Place) -> Result<(), Error> {
        let what = match place {
            Place::Stream(stream) if Arc::ptr_eq(stream, &self.0.stream()) => return Ok(()),
            Place::Stream(_) => "NCCL's communicator is of another stream than the probe: make both with one",
            Place::Host => "NCCL exchanges memory of CUDA devices, and the probe is on the CPU",
        };
        Err(Error::Communication { what: what.to_owned() })
    }

    // cudarc's calls are safe: the caller vouches for what they are told of the memory.
    unsafe fn all_gather(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.bound()?;
        let own = Words::<u8>::new(from, bytes, &stream);
        let mut all = Words::new(to, bytes * self.0.world_size(), &stream);
        self.0.all_gather(&own, &mut all).map(drop).map_err(nccl("an all-gather"))
    }

    unsafe fn all_reduce(&self, at: u64, words: usize, reduction: Reduction) -> Result<(), Error> {
        if words == 0 {
            return Ok(());
        }
        let stream = self.bound()?;
        let mut all = Words::<u64>::new(at, words, &stream);
        let reduction = match reduction {
            Reduction::Sum => ReduceOp::Sum,
            Reduction::Max => ReduceOp::Max,
        };
        self.0.all_reduce_in_place(&mut all, &reduction).map(drop).map_err(nccl("an all-reduce"))
    }
}
