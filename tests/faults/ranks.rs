//! What a trainer does on GPUs of which each has a rank, with NCCL. A rank that has an error goes no further; its launcher ends
//! what its peer waits for, where NCCL itself does not.

use crate::{
    driver::driver,
    every_call,
    run::{Kind, Run, aside, own},
    scenes::{Trainer, bits, plan, refs, refs_mut},
};
use gradprobe::{
    Clip, Config, Error, Probe,
    cuda::{Cuda, NcclCommunicator},
    cudarc::driver::sys::{
        CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD,
    },
    ranks::{AbortHandle, Along, Mesh, Ranks, ReplicaCheck},
};
use std::{
    sync::{Condvar, Mutex},
    thread,
    time::Duration,
};

/// After how long a rank that hangs is given up: soon where one does.
fn deadline(run: &Run) -> Duration {
    Duration::from_millis(if run.kind().is_some_and(Kind::is_of_peers) { 250 } else { 30_000 })
}

/// Who makes the calls of a rank.
enum Rank<'r> {
    /// Whose calls count, and may fail.
    Counted(&'r mut Run),
    /// Whose calls do not.
    Peer,
}

impl Rank<'_> {
    fn call<T>(&mut self, what: &'static str, call: impl FnOnce() -> Result<T, Error>) -> Option<T> {
        match self {
            Self::Counted(run) => run.call(what, call),
            Self::Peer => call().ok(),
        }
    }

    fn end<T>(&mut self, made: T) {
        match self {
            Self::Counted(run) => run.end(made),
            Self::Peer => drop(made),
        }
    }
}

/// A probe is made, and dropped: the ranks come together.
fn come_together(rank: &mut Rank<'_>, trainer: &Trainer, ranks: Ranks) -> Vec<u8> {
    let Ok(device) = own(|| Cuda::new(&trainer.stream)) else { return Vec::new() };
    let config = Config::new().ranks(ranks);
    let Some(probe) = rank.call("making a probe", || Probe::new(device, plan(), config)) else { return Vec::new() };
    rank.end(probe);
    b"made".to_vec()
}

/// Steps of a rank, and a histogram of all; the reports, up to the first error.
fn steps(rank: &mut Rank<'_>, trainer: &Trainer, ranks: Ranks, has_whole_tensors: bool) -> Vec<u8> {
    let mut reports = Vec::new();
    let config = Config::new().clip(Clip::global_norm(1.0)).histogram().ranks(ranks);
    // The other rank may have lost the device already.
    let Ok(mut probe) = trainer.probe(plan(), config) else { return reports };
    let mut script = || {
        for step in &trainer.steps[..2] {
            let mut raw = own(|| step.raw(&trainer.stream));
            rank.call("measure", || probe.measure(&refs(&raw)))?;
            rank.call("clip", || probe.clip(&mut refs_mut(&mut raw)))?;
            reports.extend(bits(&rank.call("wait", || probe.wait())?));
        }
        let raw = own(|| trainer.known.raw(&trainer.stream));
        let of_own = rank.call("histogram", || probe.histogram()?.measure(&refs(&raw)))?;
        let of_all = rank.call("histogram of all", || probe.ranks()?.histograms(&of_own))?;
        reports.extend(bytemuck::cast_slice::<_, u8>(of_all.histograms()));
        if has_whole_tensors {
            let of_model = rank.call("model", || probe.ranks()?.model())?;
            reports.extend(of_model.iter().flat_map(|(_, record)| bytemuck::bytes_of(record)));
        }
        rank.call("replicas", || probe.ranks()?.differing_replicas())
    };
    script();
    rank.end(probe);
    reports
}

/// The same, captured and replayed.
fn replays(rank: &mut Rank<'_>, trainer: &Trainer, ranks: Ranks) -> Vec<u8> {
    let mut reports = Vec::new();
    let Ok(mut probe) = trainer.probe(plan(), Config::new().clip(Clip::global_norm(1.0)).ranks(ranks)) else {
        return reports;
    };
    let mut raw = own(|| trainer.steps[0].raw(&trainer.stream));
    let mut script = || {
        // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
        rank.call("bind", || unsafe { probe.bind(&refs(&raw), &[]) })?;
        own(|| trainer.stream.begin_capture(THIS_THREAD)).ok()?;
        let measured = rank.call("measure", || probe.measure(&refs(&raw)));
        let clipped = measured.and_then(|()| rank.call("clip", || probe.clip(&mut refs_mut(&mut raw))));
        let graph = own(|| trainer.stream.end_capture(CUgraphInstantiate_flags(0))).ok().flatten();
        clipped?;
        let graph = graph?;
        for _ in 0..2 {
            own(|| graph.launch()).ok()?;
            reports.extend(bits(&rank.call("wait", || probe.wait())?));
        }
        // NCCL waits for the graph to go before a communicator does.
        own(|| drop(graph));
        Some(())
    };
    script();
    rank.end(probe);
    reports
}

/// Two ranks of one device, of which the calls of the first count: each report that either has is as without a fault, and where
/// the first goes no further, so does the other.
fn pair(
    run: &mut Run,
    ranks_of: impl Fn(NcclCommunicator) -> Ranks + Sync,
    script: impl Fn(&mut Rank<'_>, &Trainer, Ranks) -> Vec<u8> + Sync,
) {
    let id = own(NcclCommunicator::unique_id).unwrap();
    let deadline = deadline(run);
    // NCCL makes a communicator on a thread of the library's: not a call of the script's here, but in `alone`.
    let driver = driver().expect("it runs on it");
    driver.pause(true);
    let ranks = |trainer: &Trainer, rank: u32| {
        let made = NcclCommunicator::new(&trainer.stream, rank, 2, id);
        ranks_of(made.unwrap().with_deadline(deadline))
    };
    let (handle, is_there) = (Mutex::new(None::<AbortHandle>), Condvar::new());
    let (own_reports, of_peer) = thread::scope(|scope| {
        let peer = scope.spawn(|| {
            let trainer = Trainer::new();
            driver.exempt(true);
            let ranks = ranks(&trainer, 1);
            *handle.lock().unwrap() = Some(ranks.abort_handle());
            is_there.notify_all();
            script(&mut Rank::Peer, &trainer, ranks)
        });
        let trainer = Trainer::new();
        let ranks = ranks(&trainer, 0);
        let handle = is_there.wait_while(handle.lock().unwrap(), |handle| handle.is_none()).unwrap();
        driver.pause(false);
        let reports = script(&mut Rank::Counted(run), &trainer, ranks);
        if run.has_an_error() && !run.kind().is_some_and(Kind::is_of_peers) {
            own(|| handle.as_ref().expect("was waited for").abort());
        }
        drop(handle);
        (reports, peer.join().unwrap())
    });
    own(|| drop(handle));
    if run.kind().is_some_and(Kind::is_of_peers) && !run.has_an_error() {
        run.complain("a rank waits for its peer in vain and has no error");
    }
    run.compare("the rank", own_reports);
    run.compare("its peer", of_peer);
}

every_call! {
    /// One rank, and the communicator that it makes.
    alone = |run| {
        let trainer = Trainer::new();
        let made = run.made("making a communicator", || {
            let id = NcclCommunicator::unique_id()?;
            NcclCommunicator::new(&trainer.stream, 0, 1, id)
        });
        let Some(communicator) = made else { return };
        let ranks = own(|| {
            let mesh = Mesh::new([("dp", 1)]).unwrap();
            Ranks::alike(communicator.with_deadline(deadline(run)), &mesh, mesh.layout([("dp", Along::Sharded)]).unwrap())
        });
        let config = Config::new().clip(Clip::global_norm(1.0)).ranks(ranks);
        let made = run.made("making a probe", || Probe::new(aside(|| Cuda::new(&trainer.stream))?, plan(), config.clone()));
        own(|| drop(config));
        let Some(mut probe) = made else { return };
        run.call("measure", || probe.measure(&trainer.steps[0].all()));
        run.call("wait", || probe.wait());
        run.check("measuring again", || {
            probe.measure(&trainer.known.all())?;
            Ok(bits(&probe.wait()?))
        });
        run.end(probe);
    }

    /// Two ranks come together.
    coming_together = |run| {
        pair(run, Ranks::data_parallel, come_together);
    }

    /// Shards, with whole tensors.
    shards = |run| {
        let ranks_of = |communicator| {
            let mesh = Mesh::new([("dp", 2)]).unwrap();
            Ranks::alike(communicator, &mesh, mesh.layout([("dp", Along::Sharded)]).unwrap()).whole_tensors()
        };
        pair(run, ranks_of, |rank, trainer, ranks| steps(rank, trainer, ranks, true));
    }

    /// Replicas, which wait for one another only where they are compared strictly.
    replicas = |run| {
        let ranks_of = |communicator| Ranks::data_parallel(communicator).replica_check(ReplicaCheck::Strict);
        pair(run, ranks_of, |rank, trainer, ranks| steps(rank, trainer, ranks, false));
    }

    /// Plain data parallelism.
    data_parallel = |run| {
        pair(run, Ranks::data_parallel, |rank, trainer, ranks| steps(rank, trainer, ranks, false));
    }

    /// In graphs, of which the collectives are a part.
    in_graphs = |run| {
        let ranks_of = |communicator| {
            let mesh = Mesh::new([("dp", 2)]).unwrap();
            Ranks::alike(communicator, &mesh, mesh.layout([("dp", Along::Sharded)]).unwrap())
        };
        pair(run, ranks_of, replays);
    }
}
