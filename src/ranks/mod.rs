//! Measures over many GPUs: each rank measures its part, and every rank gets the norm, the clip and the verdict of the
//! whole model.
//!
//! A probe declared with [`Config::ranks`](crate::Config::ranks) adds up its squares, its counts and the values to
//! compare as integers. All ranks add those up, 240 bytes for any number of ranks, and each decides the step from the
//! sum. Sums of integers have no order. So all ranks have the same bits on any network, and whole tensors, and shards
//! cut at multiples of 32 Ki elements, have the norm that one rank would have. A step takes one launch and one
//! collective more, all in the order of the stream, and no host waits.
//!
//! Each rank plans its own tensors, in any order; those of one name on several ranks are one tensor. A [`Layout`] tells
//! where its elements are, along the named dimensions of a [`Mesh`]:
//!
//! | trainer | [`Mesh`] | a tensor's layout |
//! |---|---|---|
//! | data parallel, after the all-reduce | `dp` | `mesh.layout([])`, or [`Ranks::data_parallel`] |
//! | fully sharded (FSDP, ZeRO) | `dp` | `mesh.layout([("dp", Sharded)])` |
//! | sharded in a node, replicated over nodes (HSDP) | `replicate`, `shard` | `mesh.layout([("shard", Sharded)])` |
//! | tensor and data parallel: a matrix that is cut | `dp`, `tp` | `mesh.layout([("tp", Sharded)])` |
//! | … a norm, which every rank has | `dp`, `tp` | `mesh.layout([])` |
//! | fully sharded and tensor parallel | `dp`, `tp` | `mesh.layout([("dp", Sharded), ("tp", Sharded)])` |
//! | pipeline stage 2, data parallel | `pp`, `dp` | `mesh.layout([("pp", At(2))])` |
//! | … fully sharded | `pp`, `dp` | `mesh.layout([("pp", At(2)), ("dp", Sharded)])` |
//! | an expert on rank 1 of its dimension | `dp`, `ep` | `mesh.layout([("ep", At(1))])` |
//! | all experts in one tensor | `dp`, `ep` | `mesh.layout([("ep", Sharded)])` |
//! | embeddings tied over the first and last stage, which have summed their gradients | `pp`, `dp` | `mesh.layout([("pp", At(0))])`, planned on both |
//!
//! Parts may be of any length, 0 included. The ranks check their plans, layouts and settings when the probes are made,
//! and a rank that cannot go on is an error on all.
//!
//! # Comparison of ranks
//! Ranks compare two things. One is replicas, by the bits of their elements ([`ReplicaCheck`]). The other is the state
//! with which they decide a step: its number, the loss scale, and the state of the clip.
//! [`StepOutputs::FLAG_REPLICAS`](crate::StepOutputs::FLAG_REPLICAS) and [`FLAG_STATE`](crate::StepOutputs::FLAG_STATE)
//! report a difference. The report's [`rank_check`](crate::Report::rank_check) names the rank and the tensor, where it
//! is one, and [`Room::differing_replicas`](crate::Room::differing_replicas) all of them, by majority. A NaN or Inf on
//! any replica counts as found on all ranks, in the same step. There is one exception: where every tensor is replicated
//! on all ranks, and the check is not [`Strict`](ReplicaCheck::Strict), no step waits for others. There the comparison
//! is of the step before, and a NaN on one rank alone is a replica that differs. That rank alone skips the step, and
//! adapts its loss scale: with a scale that adapts, be strict.
//!
//! # Cost
//! 240 bytes a step and rank; with [whole tensors](Ranks::whole_tensors), 736 more a tensor of the model; with replicas that
//! are compared, a second read of the gradients. By NCCL's own model of its trees (`src/graph/tuning.cc` of 2.28: 6.8 µs, and
//! there and back 0.6 µs a GPU of a node, 1.8 times that between nodes, and 5.0 µs a doubling of the nodes), with nodes of
//! eight GPUs:
//!
//! | ranks | all-reduce of 240 bytes |
//! |---|---|
//! | 8 | 15 µs |
//! | 64 | 52 µs |
//! | 512 | 82 µs |
//! | 4096 | 112 µs |
//! | 16384 | 132 µs |
//!
//! Nothing of that has been measured. Coming together, of 16384 ranks with 2000 tensors, takes 6 s of a core of each,
//! in a simulation. To gather the records of 2000 tensors at 16384 ranks, as this crate did before, would be 2.6 GB and
//! 60 ms.
//!
//! # After an error
//! A rank that is gone, late or in disagreement is an [`Error::Communication`](crate::Error::Communication) on all that
//! wait for it. With threads and TCP it comes at once, or after a deadline, with the rank's number. With NCCL, which
//! does not know the rank at fault, it comes after the deadline. [`Ranks::abort_handle`] ends all waiting. Then drop
//! the probe, which does not hang. The remaining ranks make new communicators and probes, and go on from a
//! [`ProbeState`](crate::ProbeState): the one of their plan, or the part that is [`common`](crate::ProbeState::common)
//! to all.
//!
//! ```
//! use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe, ranks::{Along, Mesh, Ranks, ThreadCommunicator}};
//!
//! let mesh = Mesh::new([("dp", 2)])?;
//! let sharded = mesh.layout([("dp", Along::Sharded)])?;
//! let shards = [[3.0f32, 0.0], [0.0, 4.0]];
//! std::thread::scope(|scope| {
//!     for (communicator, shard) in ThreadCommunicator::group(2).into_iter().zip(&shards) {
//!         let (mesh, sharded) = (&mesh, sharded.clone());
//!         scope.spawn(move || {
//!             let plan = Plan::new([("weight", DType::F32, 2)])?;
//!             let ranks = Ranks::new(communicator, mesh, [sharded]);
//!             let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::global_norm(1.0)).ranks(ranks))?;
//!             probe.measure(&[shard])?;
//!             assert_eq!(probe.wait()?.outputs().total_norm, 5.0); // on both
//!             Ok::<(), gradprobe::Error>(())
//!         });
//!     }
//! });
//! # Ok::<(), gradprobe::Error>(())
//! ```
//!
//! Making the probe and measuring are then collective calls: all ranks make them, in the same order. A rank that fails
//! before its measurement leaves the others waiting, as in any collective of NCCL's. Records are of a rank's part. With
//! [`Ranks::whole_tensors`], [`Room::model`](crate::Room::model) also gives those of all tensors of all ranks. The
//! clips of elements and units, histograms, dot products and tracked elements are always of a rank's part. On request
//! there are [histograms](crate::Room::histograms), [signal over noise](crate::Room::gsnr) and the [noise
//! scale](crate::Room::sample_squares) of all ranks.

mod communicator;
pub(crate) mod cpu;
mod join;
mod mesh;
mod noise;
mod replicas;
mod report;
mod room;
mod tcp;
mod tensors;
mod threads;
mod whole;

pub use communicator::{Communicator, Reduction, Transport};
pub use mesh::{Along, Layout, Mesh};
pub use noise::SampleSquares;
pub use report::{Differing, DifferingReplica, RankCheck};
pub use room::RankMemory;
pub use tcp::TcpCommunicator;
pub use threads::ThreadCommunicator;

pub(crate) use replicas::{CheckSums, FingerprintArguments, mixed_sum, run as fingerprint};
pub(crate) use room::MergeArguments;
pub(crate) use whole::{ContributeArguments, contribute};

pub(crate) use communicator::DEADLINE;
#[cfg(feature = "cuda")]
pub(crate) use communicator::not_come;
use communicator::{LONGEST_WAIT, gather, odd_length};
use std::sync::Arc;

/// Chooses whether replicas are compared, by the bits of their elements. That reads all tensors a second time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplicaCheck {
    /// Compares them, and reports by [`FLAG_REPLICAS`](crate::StepOutputs::FLAG_REPLICAS). Where every tensor is
    /// replicated, ranks have nothing else to wait for, and the result of a step comes with the next.
    #[default]
    Reported,
    /// Compares them before the clip. A step in which they or the ranks' states differ is skipped.
    Strict,
    /// Does not compare them. Where all tensors are replicated on all ranks, the ranks' states are not compared either,
    /// and ranks exchange nothing.
    Off,
}

/// Describes the other ranks, and the layout of each tensor: [`Config::ranks`](crate::Config::ranks).
#[derive(Clone, Debug)]
pub struct Ranks {
    communicator: Arc<dyn Communicator>,
    mesh: Mesh,
    layouts: Layouts,
    check: ReplicaCheck,
    whole_tensors: bool,
    /// Known once the ranks have come together.
    joined: Option<Arc<join::Joined>>,
}

/// Ends all waiting for other ranks: [`Ranks::abort_handle`].
#[derive(Clone, Debug)]
pub struct AbortHandle(Arc<dyn Communicator>);

impl AbortHandle {
    /// Makes calls that wait for other ranks, now and later, fail with
    /// [`Error::Communication`](crate::Error::Communication). The probe can then only be dropped. The owner of a
    /// [shared](crate::cuda::NcclCommunicator::shared) communicator must abort it.
    pub fn abort(&self) {
        self.0.abort();
    }
}

#[derive(Clone, Debug)]
enum Layouts {
    /// One a tensor.
    Each(Vec<Layout>),
    /// The same for all.
    All(Layout),
}

impl Layouts {
    fn get(&self, index: usize) -> Option<&Layout> {
        match self {
            Self::Each(layouts) => layouts.get(index),
            Self::All(layout) => Some(layout),
        }
    }

    /// The number of layouts given; `None` where one is for all.
    fn count(&self) -> Option<usize> {
        match self {
            Self::Each(layouts) => Some(layouts.len()),
            Self::All(_) => None,
        }
    }
}

impl Ranks {
    /// Arranges the ranks of a communicator as a mesh, with one layout a tensor of this rank's plan, in its order.
    pub fn new(
        communicator: impl Communicator + 'static,
        mesh: &Mesh,
        layouts: impl IntoIterator<Item = Layout>,
    ) -> Self {
        Self::with(communicator, mesh, Layouts::Each(layouts.into_iter().collect()))
    }

    /// Does the same, with one layout for all tensors.
    pub fn alike(communicator: impl Communicator + 'static, mesh: &Mesh, layout: Layout) -> Self {
        Self::with(communicator, mesh, Layouts::All(layout))
    }

    /// Declares plain data parallelism: every rank holds all tensors, the same.
    pub fn data_parallel(communicator: impl Communicator + 'static) -> Self {
        let mesh = Mesh::line(communicator.ranks());
        let layout = Layout::replicated(&mesh);
        Self::with(communicator, &mesh, Layouts::All(layout))
    }

    fn with(communicator: impl Communicator + 'static, mesh: &Mesh, layouts: Layouts) -> Self {
        let (communicator, mesh) = (Arc::new(communicator), mesh.clone());
        Self { communicator, mesh, layouts, check: ReplicaCheck::default(), whole_tensors: false, joined: None }
    }

    /// Sets the comparison of replicas.
    #[must_use]
    pub fn replica_check(self, check: ReplicaCheck) -> Self {
        Self { check, ..self }
    }

    /// Gives the records of whole tensors on every rank that has a part, in place of the part's: for reports, and for
    /// clips of tensors on their own, which need them. Each step adds up 736 bytes a tensor of the model.
    #[must_use]
    pub fn whole_tensors(self) -> Self {
        Self { whole_tensors: true, ..self }
    }

    /// Gives the layout of a tensor of the plan. Each is known to have one.
    fn layout(&self, index: usize) -> &Layout {
        match &self.layouts {
            Layouts::Each(layouts) => &layouts[index],
            Layouts::All(layout) => layout,
        }
    }

    /// Gives a handle that ends all waiting for other ranks, from any thread: one that hears of a lost rank, say.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(Arc::clone(&self.communicator))
    }

    /// Whether every rank holds all that this one has, or, where that is known, all there is.
    fn is_replicated(&self) -> bool {
        if let Some(joined) = &self.joined {
            return joined.is_replicated;
        }
        match &self.layouts {
            Layouts::Each(layouts) => layouts.iter().all(Layout::is_replicated),
            Layouts::All(layout) => layout.is_replicated(),
        }
    }

    /// Whether a rank decides the step by its own tensors alone.
    fn is_alone(&self) -> bool {
        self.is_replicated() && self.check != ReplicaCheck::Strict
    }

    /// Whether a tensor is a replica that counts on another rank.
    pub(crate) fn is_uncounted(&self, index: usize) -> bool {
        let rank = self.communicator.rank();
        let counts_elsewhere = |layout: &Layout| layout.counted_on(&self.mesh, rank) != rank;
        !self.is_alone() && self.layouts.get(index).is_some_and(counts_elsewhere)
    }
}
