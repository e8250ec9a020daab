//! The exchange between ranks.

use crate::{
    Error,
    device::{Device, HostMemory},
    probe::{ReadBack, uploaded, values},
    tensor::Place,
};
use std::time::Duration;

/// The operation that makes one word of all ranks' words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Adds them up modulo 2^64.
    Sum,
    /// Takes the largest.
    Max,
}

impl Reduction {
    pub(super) fn of(self, a: u64, b: u64) -> u64 {
        match self {
            Self::Sum => a.wrapping_add(b),
            Self::Max => a.max(b),
        }
    }
}

/// Exchanges bytes between ranks whose devices are hosts: [`ThreadCommunicator`](super::ThreadCommunicator),
/// [`TcpCommunicator`](super::TcpCommunicator), or one of your own, for MPI say. All ranks make the same calls in the
/// same order, and each call waits for the others.
pub trait Transport: std::fmt::Debug + Send + Sync {
    /// The number of this rank, from 0.
    fn rank(&self) -> u32;

    /// Number of ranks.
    fn ranks(&self) -> u32;

    /// Gives the bytes of all ranks, one behind the other in their order. All give the same number of bytes.
    ///
    /// # Errors
    /// When a rank is gone, or a deadline has passed; every call fails from then on, on all ranks.
    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>, Error>;

    /// Reduces each word over all ranks. An implementation that does it in the network is faster.
    ///
    /// # Errors
    /// Those of [`all_gather`](Self::all_gather).
    fn all_reduce(&self, words: &mut [u64], reduction: Reduction) -> Result<(), Error> {
        let all = self.all_gather(bytemuck::cast_slice(words))?;
        let all: Vec<u64> = values(&all);
        if all.len() != words.len() * self.ranks() as usize {
            let what = format!("{} words came of all ranks, and not {} of each", all.len(), words.len());
            return Err(Error::Communication { what });
        }
        let count = words.len();
        for (place, word) in words.iter_mut().enumerate() {
            let of_all = all.iter().copied().skip(place).step_by(count);
            *word = of_all.reduce(|a, b| reduction.of(a, b)).unwrap_or(*word);
        }
        Ok(())
    }

    /// Ends all waiting for other ranks, now and later, with an error, as far as possible. Any thread may call it.
    fn abort(&self) {}
}

/// Describes the error when ranks come with parts of different lengths.
pub(super) fn odd_length(mut lengths: impl Iterator<Item = usize>) -> Option<String> {
    let first = lengths.next()?;
    let (rank, odd) = (1..).zip(lengths).find(|&(_, length): &(u32, usize)| length != first)?;
    Some(format!("rank {rank} gave {odd} bytes, rank 0 {first}"))
}

/// The default wait for ranks: as long as PyTorch waits for NCCL.
pub(crate) const DEADLINE: Duration = Duration::from_secs(600);
/// The longest wait, a century: a clock does not count as far as a `Duration`.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Makes the error of a device, or NCCL, that waits in vain: it cannot name the rank.
#[cfg(feature = "cuda")]
pub(crate) fn not_come(deadline: Duration) -> Error {
    Error::Communication { what: format!("some rank has not come within {deadline:?}") }
}

/// Exchanges device memory between ranks: every [`Transport`] on hosts, and
/// [`NcclCommunicator`](crate::cuda::NcclCommunicator) on CUDA devices.
///
/// # Safety
/// Calls read and write only the memory that they describe, and only until they have run in the order of the device's
/// launches.
#[allow(unsafe_code, reason = "the probe's memory is written by it")]
pub unsafe trait Communicator: std::fmt::Debug + Send + Sync {
    /// The number of this rank, from 0.
    fn rank(&self) -> u32;

    /// Number of ranks.
    fn ranks(&self) -> u32;

    /// Fails unless it reaches the memory of a device whose kernels find tensors there, in the order of their launches.
    ///
    /// # Errors
    /// [`Error::Communication`].
    fn check(&self, place: &Place) -> Result<(), Error>;

    /// Copies `bytes` bytes at the device address `from` of each rank to the address `to` of every rank, in the order of
    /// the ranks; ordered as a launch on the probe's device is.
    ///
    /// # Safety
    /// `from` has that many bytes and `to` that many for each rank, in this device's memory, apart from each other,
    /// until the copy has run.
    ///
    /// # Errors
    /// When the communication fails.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    unsafe fn all_gather(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error>;

    /// Reduces each of so many u64 at a device address over all ranks; ordered as a launch is, and legal in a graph
    /// capture if a launch is.
    ///
    /// # Safety
    /// They are in this device's memory, until this has run.
    ///
    /// # Errors
    /// When the communication fails.
    #[allow(unsafe_code, reason = "the address is the caller's word")]
    unsafe fn all_reduce(&self, at: u64, words: usize, reduction: Reduction) -> Result<(), Error>;

    /// The longest time that the device may take for queued work, where calls do not wait for it themselves. After that
    /// it is [aborted](Self::abort).
    fn deadline(&self) -> Option<Duration> {
        None
    }

    /// Reports errors of the queued work since then.
    ///
    /// # Errors
    /// [`Error::Communication`].
    fn status(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Ends all waiting for other ranks, now and later, with an error, as far as possible. Any thread may call it.
    fn abort(&self) {}
}

// SAFETY: it copies between the hosts' memories, at once.
#[allow(unsafe_code, reason = "copies from and to addresses that the probe vouches for")]
unsafe impl<T: Transport> Communicator for T {
    fn rank(&self) -> u32 {
        Transport::rank(self)
    }

    fn ranks(&self) -> u32 {
        Transport::ranks(self)
    }

    fn check(&self, place: &Place) -> Result<(), Error> {
        match place {
            Place::Host => Ok(()),
            #[cfg(feature = "cuda")]
            Place::Stream(_) => {
                let what = "these ranks exchange memory of the host, and the probe is on a CUDA device".to_owned();
                Err(Error::Communication { what })
            }
        }
    }

    unsafe fn all_gather(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        let all = Transport::all_gather(self, unsafe { HostMemory::bytes(from, bytes) })?;
        let expected = bytes * Transport::ranks(self) as usize;
        if all.len() != expected {
            let what = format!("{} bytes came of all ranks, and not {expected}", all.len());
            return Err(Error::Communication { what });
        }
        // SAFETY: the caller's promise: room for that many.
        unsafe { HostMemory::bytes_mut(to, expected) }.copy_from_slice(&all);
        Ok(())
    }

    unsafe fn all_reduce(&self, at: u64, words: usize, reduction: Reduction) -> Result<(), Error> {
        if words == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let bytes = unsafe { HostMemory::bytes_mut(at, words * size_of::<u64>()) };
        Transport::all_reduce(self, bytemuck::cast_slice_mut(bytes), reduction)
    }

    fn abort(&self) {
        Transport::abort(self);
    }
}

/// Reduces words of the host over all ranks, through the devices' memory.
pub(super) fn reduce(
    device: &dyn Device,
    communicator: &dyn Communicator,
    own: &[u64],
    reduction: Reduction,
) -> Result<Vec<u64>, Error> {
    let mut words = ReadBack::holding(device, bytemuck::cast_slice(own))?;
    // SAFETY: a buffer of that size, which lives until it has been read.
    #[allow(unsafe_code, reason = "the address is this function's own")]
    unsafe { communicator.all_reduce(words.address(), own.len(), reduction) }?;
    Ok(values(words.wait(device)?))
}

/// Gathers words of the host through the devices' memory.
pub(super) fn gather(device: &dyn Device, communicator: &dyn Communicator, own: &[u64]) -> Result<Vec<u64>, Error> {
    let bytes = size_of_val(own);
    let from = uploaded(device, bytemuck::cast_slice(own))?;
    let mut to = ReadBack::zeroed(device, bytes * communicator.ranks() as usize)?;
    // SAFETY: both are buffers of those sizes, and live until the copy has been read.
    #[allow(unsafe_code, reason = "the addresses are this function's own")]
    unsafe { communicator.all_gather(from.address(), to.address(), bytes) }?;
    Ok(values(to.wait(device)?))
}
