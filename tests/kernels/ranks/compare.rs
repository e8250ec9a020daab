//! Replicas and states that differ: found, named, skipped.

use super::*;

/// A plan of two replicas and a shard, on four ranks.
fn replicated_and_sharded(communicator: Told, check: ReplicaCheck) -> (Plan, Ranks) {
    let mesh = Mesh::new([("dp", 4)]).unwrap();
    let [replica, shard] = [Along::Replicated, Along::Sharded].map(|how| mesh.layout([("dp", how)]).unwrap());
    let plan = Plan::new([("a", DType::F32, 3), ("b", DType::F32, 2), ("c", DType::F32, 1)]).unwrap();
    (plan, Ranks::new(communicator, &mesh, [replica.clone(), replica, shard]).replica_check(check))
}

#[test]
fn replicas_that_differ_are_found_and_named() {
    for (make, check) in DEVICES
        .into_iter()
        .flat_map(|make| [ReplicaCheck::Reported, ReplicaCheck::Strict, ReplicaCheck::Off].map(|check| (make, check)))
    {
        let ranks = on_ranks(4, |rank, communicator| {
            let (plan, ranks) = replicated_and_sharded(communicator, check);
            let config = Config::default().clip(Clip::global_norm(1.0)).ranks(ranks);
            let mut probe = make(plan, config, rank).unwrap();
            let mut step = |a: [f32; 3], b: [f32; 2]| {
                let c = [rank as f32];
                let tensors = [HostTensor::F32(&a), HostTensor::F32(&b), HostTensor::F32(&c)];
                let report = probe.measure_host(&tensors).unwrap();
                (report, probe.ranks().unwrap().differing_replicas())
            };
            let same = step([1.0, 2.0, 3.0], [0.5, 0.5]);
            // The last bit of one element on one rank; a NaN on another; and two tensors, on three ranks.
            let last_bit = step([1.0, 2.0, if rank == 2 { 3f32.next_up() } else { 3.0 }], [0.5, 0.5]);
            let nan = step([1.0, 2.0, 3.0], [0.5, if rank == 3 { f32::NAN } else { 0.5 }]);
            let several = step([1.0 + rank as f32 / 2.0, 2.0, 3.0], [if rank == 1 { 7.0 } else { 0.5 }, 0.5]);
            let again = step([1.0, 2.0, 3.0], [0.5, 0.5]);
            [same, last_bit, nan, several, again]
        });
        for (rank, steps) in ranks.iter().enumerate() {
            let outputs = steps.each_ref().map(|(report, _)| *report.outputs());
            let bits = |flag: u32| outputs.map(|outputs| u32::from(outputs.flags & flag != 0));
            let is_compared = u32::from(check != ReplicaCheck::Off);
            let is_strict = u32::from(check == ReplicaCheck::Strict);
            let differ = [0, is_compared, is_compared, is_compared, 0];
            assert_eq!(bits(StepOutputs::FLAG_REPLICAS), differ, "rank {rank}");
            assert_eq!(bits(StepOutputs::FLAG_STATE), [0; 5]);
            // The NaN is on a replica that counts nowhere: it is in no norm, and the step is skipped on all ranks.
            assert_eq!(outputs.map(|outputs| outputs.skip.cast_unsigned()), [0, is_strict, 1, is_strict, 0]);
            assert!(outputs.iter().all(|outputs| (outputs.found_inf == 1.0) == (outputs.skip == 1)));
            // 14 + 0.5 of the replicas, once, and 0 + 1 + 4 + 9 of the shards.
            assert_eq!(outputs[0].total_norm, 28.5f64.sqrt());
            assert_eq!(outputs[1].total_norm, outputs[0].total_norm);
            if check == ReplicaCheck::Off {
                assert_eq!(steps[1].1, Err(Error::NotDeclared { declare: "Ranks::replica_check" }));
                continue;
            }
            let found = steps.each_ref().map(|(report, _)| report.rank_check().unwrap().replicas.clone());
            let named = |rank, tensor: &str| {
                Some(Differing { ranks: vec![rank], tensor: Some(tensor.to_owned()), is_weight: false })
            };
            let expected = [None, named(2, "a"), named(3, "b"), Some(Differing::default()), None];
            assert_eq!(found, expected, "rank {rank}");
            let all = steps.each_ref().map(|(_, differing)| differing.clone().unwrap());
            let of = |tensor, ranks: &[u32]| DifferingReplica { tensor, is_weight: false, ranks: ranks.to_vec() };
            let expected =
                [vec![], vec![of(0, &[2])], vec![of(1, &[3])], vec![of(0, &[0, 1, 2, 3]), of(1, &[1])], vec![]];
            assert_eq!(all, expected);
            let text = steps[1].0.to_string();
            assert!(text.contains("replicas differ in step 2 on rank 2, in a\n"), "{text}");
        }
    }
}

/// Groups of as many ranks do not take each other's for their own.
#[test]
fn a_rank_of_another_group_is_not_named() {
    for make in DEVICES {
        let found = on_ranks(8, |rank, communicator| {
            let mesh = Mesh::new([("replicate", 4), ("shard", 2)]).unwrap();
            let sharded = mesh.layout([("shard", Along::Sharded)]).unwrap();
            let config = Config::default().ranks(Ranks::alike(communicator, &mesh, sharded));
            let mut probe = make(Plan::new([("w", DType::F32, 3)]).unwrap(), config, rank).unwrap();
            let odd = if rank == 2 { 1f32.next_up() } else { 1.0 };
            let report = probe.measure_host(&[HostTensor::F32(&[odd, 2.0, (rank % 2) as f32])]).unwrap();
            let differing = probe.ranks().unwrap().differing_replicas().unwrap();
            (report.rank_check().unwrap().replicas.clone().unwrap(), differing)
        });
        for (rank, (named, differing)) in found.into_iter().enumerate() {
            let own = Differing { ranks: vec![2], tensor: Some("w".to_owned()), is_weight: false };
            assert_eq!(named, if rank % 2 == 0 { own } else { Differing::default() }, "rank {rank}");
            let own = DifferingReplica { tensor: 0, is_weight: false, ranks: vec![2] };
            assert_eq!(differing, if rank % 2 == 0 { vec![own] } else { vec![] }, "rank {rank}");
        }
    }
}

/// Where nobody has to be waited for, the word of a step comes with the next.
#[test]
fn plain_data_parallelism_hears_a_step_later() {
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let plan = Plan::new([("w", DType::BF16, 40_000)]).unwrap();
            let mut probe = make(plan, Config::default().ranks(Ranks::data_parallel(communicator)), rank).unwrap();
            let steps = [0, 1, 2, 3].map(|step| {
                let data = Tensor::of_values(DType::BF16, 40_000, |i| normal(5, i)).data();
                let mut bits: Vec<u32> = data.bits().collect();
                if step == 1 && rank == 1 {
                    bits[35_000] ^= 1;
                }
                let data = Data::of_bits(DType::BF16, bits.into_iter());
                let report = probe.measure_host(&tensors(std::slice::from_ref(&data))).unwrap();
                (report.outputs().flags, report.rank_check().unwrap().clone())
            });
            steps.map(|(flags, check)| (flags & StepOutputs::FLAG_REPLICAS, check.step, check.replicas))
        });
        let one = Some(Differing { ranks: vec![1], tensor: Some("w".to_owned()), is_weight: false });
        let expected = [(0, 0, None), (0, 1, None), (StepOutputs::FLAG_REPLICAS, 2, one), (0, 3, None)];
        assert!(found.iter().all(|steps| *steps == expected), "{found:?}");
    }
}

/// One flipped bit of 32768 normal numbers, wherever it is, is found and named; and nothing is found where there is none.
#[test]
fn a_flipped_bit_is_found_every_time() {
    let tries = if std::env::var_os("GRADPROBE_SHORT").is_some() { 100 } else { 1000 };
    let found = on_ranks(3, |rank, communicator| {
        let plan = Plan::new([("w", DType::F32, 32_768)]).unwrap();
        let mut random = fastrand::Rng::with_seed(9);
        let mut numbers: Vec<f32> = (0..32_768).map(|i| normal(1, i) as f32).collect();
        let ranks = Ranks::data_parallel(communicator).replica_check(ReplicaCheck::Strict);
        let mut probe = Probe::new(Cpu, plan, Config::default().ranks(ranks)).unwrap();
        let mut found = 0;
        for _ in 0..tries {
            let (at, bit, odd) = (random.usize(..numbers.len()), random.u32(..32), random.u32(..3));
            let before = numbers[at];
            if odd == rank {
                numbers[at] = f32::from_bits(before.to_bits() ^ 1 << bit);
            }
            let report = probe.measure_host(&[HostTensor::F32(&numbers)]).unwrap();
            let replicas = report.rank_check().unwrap().replicas.clone();
            found += u32::from(replicas.is_some_and(|replicas| replicas.ranks == [odd] && report.outputs().skip == 1));
            numbers[at] = before;
            let report = probe.measure_host(&[HostTensor::F32(&numbers)]).unwrap();
            assert_eq!((report.rank_check().unwrap().replicas.clone(), report.outputs().skip), (None, 0));
        }
        found
    });
    assert_eq!(found, [tries; 3]);
}

/// A rank that comes to a step with another state is named on all.
#[test]
fn another_state_is_named() {
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let plan = Plan::new([("w", DType::F32, 2)]).unwrap();
            let ranks = sharded(communicator).replica_check(ReplicaCheck::Strict);
            let config = Config::default().clip(Clip::global_norm(1.0)).loss_scale(LossScale::dynamic().initial(8.0));
            let mut probe = make(plan, config.ranks(ranks), rank).unwrap();
            let mut step = |scale: f32| {
                let address = probe.addresses().loss_scale.unwrap();
                // SAFETY: the probe's f32, in the memory of the host, while nothing runs.
                unsafe { *(address as *mut f32) = scale };
                gradprobe_simt::ptx::memory::written(address, 4);
                let report = probe.measure_host(&[HostTensor::F32(&[1.0, 2.0])]).unwrap();
                (report.outputs().flags, report.outputs().skip, report.rank_check().unwrap().state.clone())
            };
            [step(8.0), step(if rank == 2 { 4.0 } else { 8.0 }), step(8.0)]
        });
        for steps in found {
            let (bits, skip) = (StepOutputs::FLAG_STATE | StepOutputs::FLAG_SKIP, 1);
            let state = Some(Differing { ranks: vec![2], ..Differing::default() });
            assert_eq!((steps[1].0 & bits, steps[1].1, &steps[1].2), (bits, skip, &state));
            for of_step in [&steps[0], &steps[2]] {
                assert_eq!((of_step.0 & bits, of_step.1, &of_step.2), (0, 0, &None));
            }
        }
    }
}

/// One that is not restored as the others are is named in the first step.
#[test]
fn a_rank_that_is_restored_otherwise_is_named() {
    for make in DEVICES {
        let found = on_ranks(3, |rank, communicator| {
            let config = Config::default().rules(Rules::default()).ranks(sharded(communicator));
            let mut probe = make(Plan::new([("w", DType::F32, 1)]).unwrap(), config, rank).unwrap();
            let mut state = probe.state().unwrap();
            state.measured = if rank == 1 { 41 } else { 40 };
            probe.restore(&state).unwrap();
            let report = probe.measure_host(&[HostTensor::F32(&[1.0])]).unwrap();
            let diagnosis = report.diagnosis().unwrap();
            let finding = diagnosis.findings().iter().find(|found| found.kind == FindingKind::RanksDiffer).unwrap();
            assert_eq!(diagnosis.verdict(), Verdict::Critical);
            (report.rank_check().unwrap().state.clone(), finding.message.clone())
        });
        for (rank, (state, message)) in found.into_iter().enumerate() {
            assert_eq!(state, Some(Differing { ranks: vec![1], ..Differing::default() }));
            let step = if rank == 1 { 42 } else { 41 };
            assert_eq!(message, format!("the state differs in step {step} on rank 1"));
        }
    }
}

/// A rank that leaves a step out has the gradients of the next: its replicas are others, and at the end it is missed.
#[test]
fn a_rank_that_skips_a_step_is_named() {
    let found = on_ranks(3, |rank, communicator| {
        let Told(communicator) = communicator;
        let communicator = communicator.with_deadline(Duration::from_millis(300));
        let plan = Plan::new([("w", DType::F32, 8)]).unwrap();
        let ranks = Ranks::data_parallel(communicator).replica_check(ReplicaCheck::Strict);
        let mut probe = Probe::new(Cpu, plan, Config::default().ranks(ranks)).unwrap();
        let mut named = Vec::new();
        for step in (0..4u16).filter(|&step| rank != 2 || step != 1) {
            let gradient = [f32::from(step) + 0.5; 8];
            match probe.measure(&[&gradient]) {
                Ok(()) => named.extend(probe.wait().unwrap().rank_check().unwrap().replicas.clone()),
                Err(error) => return (named, Some(error.to_string())),
            }
        }
        // It goes on with something else.
        std::thread::sleep(Duration::from_secs(2));
        (named, None)
    });
    let odd = Differing { ranks: vec![2], tensor: Some("w".to_owned()), is_weight: false };
    let late = "the ranks cannot communicate: rank 2 has not come within 300ms".to_owned();
    let late_too = Some(late);
    assert_eq!(found[2], (vec![odd.clone(); 2], None));
    assert_eq!(found[..2], [(vec![odd.clone(); 2], late_too.clone()), (vec![odd; 2], late_too)]);
}
