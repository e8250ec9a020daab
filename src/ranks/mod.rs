//! Many GPUs: each rank measures what it holds, and every rank has the norms, the clip and the report of the whole model.
//!
//! A probe declared with [`Config::ranks`](crate::Config::ranks) leaves one [`Record`] a tensor in each step, which are
//! gathered from all ranks and merged **in the order of the ranks**, on the device where there is one. So all ranks hold
//! the same bits, take the same decision and clip by the same coefficient, and no host takes part. Where the elements of
//! a tensor are, its [`Placement`] says, which a [`Mesh`] of named dimensions works out:
//!
//! | trainer | [`Mesh`] | a tensor's placement |
//! |---|---|---|
//! | data parallel, after the all-reduce | `dp` | `mesh.placement([])` |
//! | fully sharded (FSDP, ZeRO) | `dp` | `mesh.placement([("dp", Sharded)])` |
//! | sharded in a node, replicated over nodes (HSDP) | `replicate`, `shard` | `mesh.placement([("shard", Sharded)])` |
//! | tensor and data parallel: a matrix that is cut | `dp`, `tp` | `mesh.placement([("tp", Sharded)])` |
//! | … a norm, which every rank has | `dp`, `tp` | `mesh.placement([])` |
//! | fully sharded and tensor parallel | `dp`, `tp` | `mesh.placement([("dp", Sharded), ("tp", Sharded)])` |
//! | pipeline stage 2, data parallel | `pp`, `dp` | `mesh.placement([("pp", At(2))])` |
//! | … fully sharded | `pp`, `dp` | `mesh.placement([("pp", At(2)), ("dp", Sharded)])` |
//! | an expert on rank 1 of its dimension | `dp`, `ep` | `mesh.placement([("ep", At(1))])` |
//! | all experts in one tensor | `dp`, `ep` | `mesh.placement([("ep", Sharded)])` |
//! | embeddings tied over the first and last stage, which have summed their gradients | `pp`, `dp` | `mesh.placement([("pp", At(0))])` |
//!
//! Every rank plans the same tensors in the same order, with the lengths it holds, 0 where it holds nothing. That their
//! plans, placements and settings agree is found out when the probes are made, by hashes, before anything is merged.
//!
//! Nothing goes through a max- or sum-reduction of floats, in which NaN may get lost and the order is not known. Replicas
//! of one tensor have records of the same bits, or they are not replicas:
//! [`StepOutputs::differing_replicas`](crate::StepOutputs::differing_replicas) counts those, and
//! [`FLAG_REPLICAS`](crate::StepOutputs::FLAG_REPLICAS) says so.
//!
//! ```
//! use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe, ranks::{Placement, Ranks, ThreadCommunicator}};
//!
//! let shards = [[3.0f32, 0.0], [0.0, 4.0]];
//! std::thread::scope(|scope| {
//!     for (communicator, shard) in ThreadCommunicator::group(2).into_iter().zip(&shards) {
//!         scope.spawn(move || {
//!             let plan = Plan::new([("weight", DType::F32, 2)])?;
//!             let ranks = Ranks::new(communicator, [Placement::Sharded]);
//!             let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::global_norm(1.0)).ranks(ranks))?;
//!             probe.measure(&[shard])?;
//!             assert_eq!(probe.wait()?.outputs().total_norm, 5.0); // on both
//!             Ok::<(), gradprobe::Error>(())
//!         });
//!     }
//! });
//! ```
//!
//! Making the probe and measuring are then collective calls: all ranks make them, in the same order. A rank that fails
//! before its measurement leaves the others waiting, as in any collective of NCCL's. The clips of elements and units,
//! histograms, dot products and tracked elements are of what a rank holds.

mod agreement;
pub(crate) mod cpu;
mod mesh;
mod report;
mod room;
mod threads;

pub use mesh::{Along, Mesh};
pub use report::RankReport;
pub use room::RankLists;

pub(crate) use room::MergeArguments;
pub use threads::ThreadCommunicator;

pub(crate) use agreement::{agree, checked};

use crate::{Error, Record, tensor::Place};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// Where the elements of a tensor are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Placement {
    /// Every rank holds all of them, the same. Counted once: from rank 0, or where the replicas differ from the first rank
    /// whose replica is not finite.
    Replicated,
    /// Every rank holds a part, some perhaps none. The tensor is the parts in the order of the ranks.
    Sharded,
    /// These ranks hold a part each, and the tensor is the parts in this order. What other ranks hold under the name is
    /// measured by nobody but them.
    Ranks(Vec<u32>),
}

/// The other ranks, and where each tensor's elements are: [`Config::ranks`](crate::Config::ranks).
#[derive(Clone, Debug)]
pub struct Ranks {
    communicator: Arc<dyn Communicator>,
    placements: Vec<Placement>,
}

impl Ranks {
    /// The ranks of a communicator, and one placement a tensor of the plan, in its order.
    pub fn new(communicator: impl Communicator + 'static, placements: impl IntoIterator<Item = Placement>) -> Self {
        Self { communicator: Arc::new(communicator), placements: placements.into_iter().collect() }
    }
}

/// How ranks exchange bytes between the memories of their devices: on the host [`ThreadCommunicator`], on CUDA devices
/// [`NcclCommunicator`](crate::cuda::NcclCommunicator).
///
/// # Safety
/// `all_gather` writes nothing but what it says, and only until the copy has run in the order of the device's launches.
#[allow(unsafe_code, reason = "the probe's memory is written by it")]
pub unsafe trait Communicator: std::fmt::Debug + Send + Sync {
    /// The number of this rank, from 0.
    fn rank(&self) -> u32;

    /// How many ranks there are.
    fn ranks(&self) -> u32;

    /// Fails unless it reaches memory of a device whose kernels find tensors there, in the order of their launches.
    ///
    /// # Errors
    /// [`Error::Communication`].
    fn check(&self, place: &Place) -> Result<(), Error>;

    /// Copies `bytes` bytes at the device address `from` of each rank to the address `to` of every rank, in the order of
    /// the ranks; ordered as a launch on the probe's device is, and legal in a graph capture if a launch is.
    ///
    /// # Safety
    /// `from` has that many bytes and `to` that many for each rank, in this device's memory, apart from each other and
    /// until the copy has run.
    ///
    /// # Errors
    /// When the communication fails.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    unsafe fn all_gather(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error>;
}

/// A placement as the kernels read it (`kernels/merge.cu`): a run of the table of ranks behind all placements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Run {
    first: u32,
    count: u32,
}

impl Run {
    const REPLICATED: u32 = 0;
    const ALL: u32 = u32::MAX;

    /// Where its ranks end in the table; `None` where it needs none.
    pub(crate) fn end(&self) -> Option<usize> {
        (self.count != Self::ALL).then(|| (self.first + self.count) as usize)
    }
}

/// The placements of a plan as the kernels read them.
#[expect(clippy::cast_possible_truncation, reason = "ranks of all tensors are fewer than 2^32")]
pub(crate) fn table(placements: &[Placement]) -> Vec<u8> {
    let (mut runs, mut ranks) = (Vec::new(), Vec::new());
    for placement in placements {
        let count = match placement {
            Placement::Replicated => Run::REPLICATED,
            Placement::Sharded => Run::ALL,
            Placement::Ranks(of) => of.len() as u32,
        };
        runs.push(Run { first: ranks.len() as u32, count });
        if let Placement::Ranks(of) = placement {
            ranks.extend(of);
        }
    }
    [bytemuck::cast_slice(&runs), bytemuck::cast_slice::<u32, u8>(&ranks)].concat()
}

/// The record of a tensor from the ranks' records of it, and whether replicas differ. `table` has the ranks that hold parts.
fn merged(placement: Run, table: &[u32], of: impl Fn(usize) -> Record, ranks: usize) -> (Record, bool) {
    let fold = |mut records: &mut dyn Iterator<Item = Record>| {
        let first = records.next().unwrap_or(Record::EMPTY);
        (&mut records).fold(first, |all, next| all.merge(&next))
    };
    match placement.count {
        Run::ALL => (fold(&mut (0..ranks).map(of)), false),
        Run::REPLICATED => {
            let same = |rank: usize| bytemuck::bytes_of(&of(rank)) == bytemuck::bytes_of(&of(0));
            let nonfinite = (0..ranks).find(|&rank| of(rank).has_nonfinite());
            (of(nonfinite.unwrap_or(0)), !(1..ranks).all(same))
        }
        count => {
            let owners = &table[placement.first as usize..][..count as usize];
            (fold(&mut owners.iter().map(|&rank| of(rank as usize))), false)
        }
    }
}
