//! How ranks come together, and what becomes of those that do not fit, or are gone.

use super::*;

/// What a probe without other ranks says when it is asked for them.
const NOT_DECLARED: Error = Error::NotDeclared { declare: "Config::ranks" };

/// What a rank brings: its tensors, their layouts, its settings.
type Brought = (Vec<(&'static str, DType, u64)>, Vec<Layout>, Config);

/// Every rank learns who is wrong and in what, whoever it is, and stays alone.
#[test]
fn ranks_that_do_not_fit_are_named() {
    let mesh = Mesh::new([("pp", 2), ("dp", 2)]).unwrap();
    let along = |along: &[(&'static str, Along)]| mesh.layout(along.iter().copied()).unwrap();
    let sharded = along(&[("pp", Along::Sharded), ("dp", Along::Sharded)]);
    let everywhere = along(&[]);
    let with = |change: &dyn Fn(&mut Brought)| {
        let tensors = vec![("a", DType::F32, 3), ("b", DType::BF16, 2)];
        let mut rank =
            (tensors, vec![sharded.clone(), everywhere.clone()], Config::default().clip(Clip::global_norm(1.0)));
        change(&mut rank);
        rank
    };
    let part = |range, whole| sharded.clone().part(range, whole);
    type Change<'a> = Box<dyn Fn(&mut Brought, u32) + Sync + 'a>;
    // Who does what, who is named, and why.
    let wrong: Vec<(Change, u32, &str)> = vec![
        (
            Box::new(|own, rank| {
                if rank == 2 {
                    own.0[0].1 = DType::F16
                }
            }),
            2,
            "tensor \"a\" is of another type or layout there",
        ),
        (
            Box::new(|own, rank| {
                if rank == 1 {
                    own.1[0] = everywhere.clone()
                }
            }),
            1,
            "tensor \"a\" is of another type or layout there",
        ),
        (
            Box::new(|own, rank| {
                if rank == 3 {
                    own.0[0].0 = "c"
                }
            }),
            3,
            "tensor \"a\" is not in the plan there",
        ),
        (
            Box::new(|own, rank| {
                if rank == 3 {
                    own.0.remove(1);
                    own.1.remove(1);
                }
            }),
            3,
            "tensor \"b\" is not in the plan there",
        ),
        (
            Box::new(|own, rank| {
                if rank == 0 {
                    own.0[1].2 = 5
                }
            }),
            0,
            "tensor \"b\" has another length there than its replicas",
        ),
        // Two that own one, and none that does.
        (
            Box::new(|own, rank| own.1[1] = along(&[("pp", Along::At(rank / 2))])),
            2,
            "tensor \"b\" is of another type or layout there",
        ),
        (
            Box::new(|own, rank| {
                own.1[1] = along(&[("pp", Along::At(1))]);
                if rank >= 2 {
                    own.0.remove(1);
                    own.1.remove(1);
                }
            }),
            2,
            "tensor \"b\" is not in the plan there",
        ),
        // Parts that are not those of a whole.
        (
            Box::new(|own, rank| {
                let first = 3 * u64::from(rank) - u64::from(rank == 2);
                own.1[0] = part(first..first + 3, 12);
            }),
            2,
            "tensor \"a\" has elements from 5 there, which another rank has up to 6",
        ),
        (
            Box::new(|own, rank| {
                let first = 3 * u64::from(rank) + u64::from(rank == 3);
                own.1[0] = part(first..first + 3, 13);
            }),
            3,
            "tensor \"a\" has elements from 10 there, and those from 9 are on no rank",
        ),
        (
            Box::new(|own, rank| own.1[0] = part(3 * u64::from(rank)..3 * u64::from(rank) + 3, 11)),
            3,
            "tensor \"a\" has elements up to 12 there, of 11",
        ),
        (
            Box::new(|own, rank| own.1[0] = part(3 * u64::from(rank)..3 * u64::from(rank) + 3, 14)),
            3,
            "tensor \"a\" ends at 12 there, and should have 14 elements",
        ),
        (
            Box::new(|own, rank| {
                if rank == 1 {
                    own.2 = Config::default().clip(Clip::global_norm(2.0))
                }
            }),
            1,
            "has other settings",
        ),
        // What one alone finds out is told to all.
        (
            Box::new(|own, rank| {
                if rank == 2 {
                    own.1.truncate(1)
                }
            }),
            2,
            "the plan has 2 tensors, 1 were given: the first that differs is \"b\"",
        ),
        (
            Box::new(|own, rank| {
                if rank == 2 {
                    own.1[0] = part(0..4, 12)
                }
            }),
            2,
            "tensor \"a\" cannot be laid out of elements 0..4, where 3 are planned",
        ),
        (
            Box::new(|own, rank| {
                if rank == 3 {
                    own.2 = Config::default().dead_threshold(-1.0)
                }
            }),
            3,
            "dead_threshold must be finite and not negative, not -1",
        ),
    ];
    for make in DEVICES {
        for (change, culprit, message) in &wrong {
            let errors = on_ranks(4, |rank, communicator| {
                let (tensors, layouts, config) = with(&|own| change(own, rank));
                let plan = Plan::new(tensors).unwrap();
                let ranks = Ranks::new(communicator, &mesh, layouts);
                let error = make(plan.clone(), config.clone().ranks(ranks), rank).unwrap_err();
                // Alone, it measures as ever.
                if config.dead_threshold >= 0.0 {
                    let mut probe = make(plan.clone(), config, rank).unwrap();
                    let data: Vec<Data> = plan.tensors().iter().map(|t| Data::zeros(t.dtype, t.len as usize)).collect();
                    assert!(probe.measure_host(&self::tensors(&data)).is_ok());
                    assert_eq!(probe.ranks().map(drop), Err(NOT_DECLARED));
                }
                error
            });
            for (rank, error) in (0..).zip(errors) {
                match &error {
                    Error::RankDiffers { rank, what } => {
                        assert_eq!((rank, what.starts_with(message)), (culprit, true), "{error}, not {message}");
                    }
                    own => {
                        assert_eq!(rank, *culprit, "{own}");
                        assert!(own.to_string().starts_with(message), "{own}, not {message}");
                    }
                }
            }
        }
    }
}

/// A rank of another version: of the words in which ranks tell what must be equal, the first says which it is.
#[derive(Debug)]
struct Older(ThreadCommunicator);

impl Transport for Older {
    fn rank(&self) -> u32 {
        Transport::rank(&self.0)
    }

    fn ranks(&self) -> u32 {
        Transport::ranks(&self.0)
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>, Error> {
        let mut own = own.to_vec();
        if Transport::rank(self) == 1 && own.len() == 32 {
            own[0] ^= 1;
        }
        Transport::all_gather(&self.0, &own)
    }
}

#[test]
fn another_version_is_named() {
    let errors = on_ranks(3, |_, Told(communicator)| {
        let ranks = Ranks::data_parallel(Older(communicator));
        Probe::new(Cpu, Plan::new([("w", DType::F32, 1)]).unwrap(), Config::default().ranks(ranks)).unwrap_err()
    });
    let expected = Error::RankDiffers { rank: 1, what: "has another version of gradprobe".to_owned() };
    assert!(errors.iter().all(|error| *error == expected), "{errors:?}");
}

#[test]
fn what_cannot_be_is_refused() {
    let plan = || Plan::new([("w", DType::F32, 1)]).unwrap();
    let mesh = Mesh::new([("dp", 1)]).unwrap();
    for make in DEVICES {
        let alone = || Told(ThreadCommunicator::group(1).swap_remove(0));
        let refused = |config: Config, mesh: &Mesh, layouts: &[Layout]| {
            let ranks = Ranks::new(alone(), mesh, layouts.iter().cloned());
            make(plan(), config.ranks(ranks), 0).unwrap_err().to_string()
        };
        let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
        let of_more = Mesh::new([("dp", 2)]).unwrap();
        let error = refused(Config::default(), &of_more, &[of_more.layout([]).unwrap()]);
        assert_eq!(error, "mesh must be of all ranks of the communicator, not 2 of 1 ranks");
        let other = Mesh::new([("dp", 1), ("tp", 1)]).unwrap();
        assert_eq!(
            refused(Config::default(), &mesh, &[other.layout([]).unwrap()]),
            "tensor \"w\" cannot be laid out of another mesh"
        );
        assert_eq!(
            refused(Config::default(), &mesh, &[]),
            "the plan has 1 tensors, 0 were given: the first that differs is \"w\""
        );
        let by_tensor = Config::default().clip(Clip::TensorNorm { max_norm: 1.0 });
        let error = refused(by_tensor, &mesh, std::slice::from_ref(&sharded));
        assert!(error.starts_with("clip must be one that does not look at tensors that are parts here"), "{error}");
        let mut probe = make(plan(), Config::default(), 0).unwrap();
        assert_eq!(probe.ranks().map(drop), Err(NOT_DECLARED));
        let mut probe = make(plan(), Config::default().ranks(Ranks::alike(alone(), &mesh, sharded)), 0).unwrap();
        assert_eq!(probe.ranks().unwrap().differing_replicas(), Err(Error::NotMeasured));
    }
}

/// A rank that fails or ends is an error on those that wait for it, and they go on as they were.
#[test]
fn a_rank_that_is_gone_keeps_nobody_waiting() {
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let config = Config::default().ranks(sharded(communicator));
            let mut probe = make(Plan::new([("w", DType::F32, 1)]).unwrap(), config, rank).unwrap();
            let first = probe.measure_host(&[HostTensor::F32(&[3.0])]).unwrap();
            // Rank 1 makes a mistake, and ends.
            let second: &[HostTensor] = if rank == 1 { &[] } else { &[HostTensor::F32(&[3.0])] };
            (first.outputs().total_norm, probe.measure_host(second).unwrap_err())
        });
        for (rank, (norm, error)) in found.into_iter().enumerate() {
            assert_eq!(norm, 27f64.sqrt());
            match error {
                Error::TensorCount { .. } => assert_eq!(rank, 1),
                Error::Communication { what } => assert!(what.ends_with("is gone") && rank != 1, "{what}"),
                other => panic!("{other}"),
            }
        }
    }
}

#[test]
fn parts_of_other_lengths_are_an_error_on_every_rank() {
    let errors = on_ranks(2, |rank, end| Transport::all_gather(&end.0, &vec![0; 1 + rank as usize]).unwrap_err());
    for error in errors {
        assert_eq!(error.to_string(), "the ranks cannot communicate: rank 1 gave 2 bytes, rank 0 1");
    }
    // After one that is late no call succeeds, on any rank.
    let errors = on_ranks(2, |rank, Told(end)| {
        let end = end.with_deadline(Duration::from_millis(100));
        thread::sleep(Duration::from_millis(if rank == 1 { 400 } else { 0 }));
        Transport::all_gather(&end, &[1]).unwrap_err().to_string()
    });
    assert_eq!(errors, ["the ranks cannot communicate: rank 1 has not come within 100ms"; 2]);
    // And others gather as ever, in the order of the ranks.
    let all = on_ranks(5, |rank, end| {
        (0..50u8).map(|i| Transport::all_gather(&end.0, &[rank as u8, i]).unwrap()).collect::<Vec<_>>()
    });
    for rank in all {
        assert!((0..50).all(|i| rank[usize::from(i)] == [0, i, 1, i, 2, i, 3, i, 4, i]));
    }
}
