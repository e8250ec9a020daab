//! The norm of the whole, and its records, however it is laid out.

use super::*;

const MESHES: [&[(&str, u32)]; 7] = [
    &[("dp", 1)],
    &[("dp", 2)],
    &[("dp", 3)],
    &[("dp", 2), ("tp", 2)],
    &[("pp", 2), ("dp", 1), ("tp", 3)],
    &[("a", 2), ("b", 2), ("c", 2)],
    &[("dp", 5)],
];

#[test]
fn any_layout_gives_the_whole_to_every_rank() {
    let mut complaints = Vec::new();
    for (mesh, seed) in MESHES.into_iter().cycle().zip(0..14) {
        let model = Model::new(mesh, seed);
        let config = Config::default().clip(Clip::global_norm(0.7));
        let truths = model.truths(&config);
        for whole_tensors in [false, true] {
            let place = format!("{mesh:?}, seed {seed}, whole tensors {whole_tensors}");
            let [on_cpu, on_simt] = DEVICES.map(|make| step(&model, make, &config, whole_tensors));
            let outputs = *on_cpu[0].0.outputs();
            for (rank, ((report, left), (of_kernels, left_by_kernels))) in on_cpu.iter().zip(&on_simt).enumerate() {
                if bytes_of(of_kernels) != bytes_of(report) {
                    complaints.push(format!("{place}: the kernels on rank {rank} have other bits"));
                }
                if bytemuck::bytes_of(report.outputs()) != bytemuck::bytes_of(&outputs) {
                    complaints.push(format!("{place}: rank {rank} has {:?} and not {outputs:?}", report.outputs()));
                }
                let check = report.rank_check().unwrap();
                if check.replicas.is_some() || check.state.is_some() {
                    complaints.push(format!("{place}: rank {rank} says {check}"));
                }
                let bytes = |data: &[Data]| data.iter().flat_map(|data| data.bytes().to_vec()).collect::<Vec<_>>();
                if bytes(left) != bytes(left_by_kernels) {
                    complaints.push(format!("{place}: rank {rank} clips otherwise"));
                }
            }
            // Against the exact statistics of the whole.
            complaints.extend(check::check_outputs(&outputs, 1, &truths, &config));
            for (rank, (report, _)) in (0..).zip(&on_cpu).filter(|_| whole_tensors) {
                for (whole, record) in model.of_rank(rank).into_iter().zip(report.records()) {
                    let index = model.tensors.iter().position(|other| other.name == whole.name).unwrap();
                    complaints.extend(check::check_tensor(&whole.name, &Seen::of(record), &truths[index]));
                }
            }
            // And what is left is the whole, clipped.
            let all: Vec<Data> = model.tensors.iter().map(|whole| whole.data.clone()).collect();
            let clipped = crate::common::clip_by_oracle(&all, &outputs);
            for (whole, clipped) in model.tensors.iter().zip(&clipped) {
                let mut left = Vec::new();
                for &rank in &whole.holders {
                    let index = model.of_rank(rank).iter().position(|other| other.name == whole.name).unwrap();
                    left.extend(on_cpu[rank as usize].1[index].bits());
                }
                if left != clipped.bits().collect::<Vec<_>>() {
                    complaints.push(format!("{place}, {}: the clipped parts are not the clipped tensor", whole.name));
                }
            }
        }
    }
    demand_none(&complaints);
}

/// Whole tensors, and shards cut between chunks, have the norm that one probe has of all, to the bit.
#[test]
fn the_norm_is_that_of_one_rank_to_the_bit() {
    const CHUNK: usize = 32 * 1024;
    let lengths = [5 * CHUNK + 77, 3 * CHUNK, 12, 2 * CHUNK + 1];
    let all: Vec<Data> = lengths
        .iter()
        .enumerate()
        .map(|(t, &len)| {
            let key = t as u64;
            Tensor::of_values(DType::ALL[t % 3], len, move |i| lognormal(key, i, 2.0)).data()
        })
        .collect();
    let name = |t: usize| format!("t{t}");
    let plan = plan_of((0..).map(name).zip(all.iter().map(Data::tensor))).unwrap();
    let config = Config::default().clip(Clip::global_norm(1.0));
    let alone = *Probe::new(Cpu, plan, config.clone()).unwrap().measure_host(&tensors(&all)).unwrap().outputs();
    for make in DEVICES {
        for ranks in [1, 2, 3, 8] {
            let mesh = Mesh::new([("dp", ranks)]).unwrap();
            let outputs = on_ranks(ranks, |rank, communicator| {
                // Chunk by chunk, as many to each rank as it takes; the last tensor is on the last rank alone.
                let cut = |len: usize, rank: u32| {
                    len.min(len.div_ceil(CHUNK).div_ceil(ranks as usize) * rank as usize * CHUNK)
                };
                let mut parts = Vec::new();
                let mut layouts = Vec::new();
                for (t, data) in all.iter().enumerate() {
                    let is_whole = t + 1 == all.len();
                    if is_whole && rank + 1 < ranks {
                        continue;
                    }
                    let len = lengths[t];
                    let range = if is_whole { 0..len } else { cut(len, rank)..cut(len, rank + 1) };
                    let how = if is_whole { Along::At(ranks - 1) } else { Along::Sharded };
                    layouts.push(
                        mesh.layout([("dp", how)]).unwrap().part(range.start as u64..range.end as u64, len as u64),
                    );
                    parts.push((name(t), part(data, range)));
                }
                let plan = plan_of(parts.iter().map(|(name, data)| (name.clone(), data.tensor()))).unwrap();
                let ranks = Ranks::new(communicator, &mesh, layouts);
                let mut probe = make(plan, config.clone().ranks(ranks), rank).unwrap();
                let parts: Vec<HostTensor> = parts.iter().map(|(_, data)| data.tensor()).collect();
                *probe.measure_host(&parts).unwrap().outputs()
            });
            for of_rank in outputs {
                assert_eq!(bytemuck::bytes_of(&of_rank), bytemuck::bytes_of(&alone), "{ranks} ranks");
            }
        }
    }
}

/// Parts of no elements have no record of their own in any step, though they have that of the whole.
#[test]
fn empty_parts_add_nothing_to_the_whole() {
    for make in DEVICES {
        let norms = on_ranks(3, |rank, communicator| {
            let config = Config::default().ranks(sharded(communicator).whole_tensors());
            let len = if rank == 1 { 2 } else { 0 };
            let mut probe = make(Plan::new([("w", DType::F32, len as u64)]).unwrap(), config, rank).unwrap();
            [1.0f32, 2.0, 3.0].map(|x| {
                let report = probe.measure_host(&[HostTensor::F32(&[3.0 * x, 4.0 * x][..len])]).unwrap();
                (report.records()[0].count, report.records()[0].l2_norm(), report.outputs().total_norm)
            })
        });
        assert!(norms.iter().all(|norms| *norms == [(2, 5.0, 5.0), (2, 10.0, 10.0), (2, 15.0, 15.0)]), "{norms:?}");
    }
}

/// The first NaN of a sharded tensor is found in the whole, by every rank.
#[test]
fn a_nan_is_found_in_the_whole() {
    let mut model = Model::empty(&[("dp", 4)]);
    let mut random = fastrand::Rng::with_seed(3);
    let tensor = Tensor::of_values(DType::BF16, 5000, |i| normal(1, i)).with(4321, 0x7fc0);
    model.add("w", tensor.data(), &[("dp", Along::Sharded)], &mut random);
    for make in DEVICES {
        let found = step(&model, make, &Config::default(), true);
        assert!(found.iter().all(|(report, _)| report.records()[0].first_nonfinite() == Some(4321)));
    }
}

#[test]
fn weights_are_laid_out_as_their_gradients() {
    let plan =
        || Plan::new([("a", DType::F32, 2), ("b", DType::F32, 1)]).unwrap().with_weights([DType::F32; 2]).unwrap();
    for make in DEVICES {
        let ranks = on_ranks(2, |rank, communicator| {
            let mesh = Mesh::new([("dp", 2)]).unwrap();
            let layouts = [Along::Sharded, Along::Replicated].map(|how| mesh.layout([("dp", how)]).unwrap());
            let ranks = Ranks::new(communicator, &mesh, layouts).whole_tensors();
            let mut probe = make(plan(), Config::default().ranks(ranks), rank).unwrap();
            let (a, w, b) = ([3.0, 0.0], [[30.0f32, 0.0], [0.0, 40.0]][rank as usize], [5.0]);
            let b_weight = [50.0 + rank as f32];
            let tensors = [HostTensor::F32(&a), HostTensor::F32(&b)];
            let weights = [HostTensor::F32(&w), HostTensor::F32(&b_weight)];
            let with = probe.measure_host_with_weights(&tensors, &weights).unwrap();
            let differing = probe.ranks().unwrap().differing_replicas().unwrap();
            let without = probe.measure_host(&tensors).unwrap();
            (with, without, differing)
        });
        for (with, without, differing) in &ranks {
            let norms = |records: &[Record]| records.iter().map(Record::l2_norm).collect::<Vec<_>>();
            assert_eq!(norms(with.records()), [18f64.sqrt(), 5.0]);
            assert_eq!(norms(with.weights().unwrap()), [50.0, 50.0]);
            assert_eq!((with.outputs().flags, with.outputs().weights), (StepOutputs::FLAG_REPLICAS, 1));
            // Of two nobody can tell which is right.
            let found = Some(Differing { ranks: vec![0, 1], tensor: Some("b".to_owned()), is_weight: true });
            assert_eq!(with.rank_check().unwrap().replicas, found);
            assert_eq!(*differing, [DifferingReplica { tensor: 1, is_weight: true, ranks: vec![0, 1] }]);
            assert!(without.weights().is_none());
            assert_eq!((without.outputs().flags, without.outputs().weights), (0, 0));
        }
    }
}

/// Plans of no tensors, and ranks that hold nothing.
#[test]
fn ranks_may_hold_nothing() {
    let mesh = Mesh::new([("pp", 2)]).unwrap();
    for make in DEVICES {
        for all_are_empty in [true, false] {
            let steps = on_ranks(2, |rank, communicator| {
                let is_empty = all_are_empty || rank == 0;
                let names: &[(&str, DType, u64)] = if is_empty { &[] } else { &[("stage", DType::F32, 4)] };
                let layouts = names.iter().map(|_| mesh.layout([("pp", Along::At(1))]).unwrap());
                let ranks = Ranks::new(communicator, &mesh, layouts);
                let config = Config::default().clip(Clip::global_norm(1.0)).ranks(ranks);
                let mut probe = make(Plan::new(names.iter().copied()).unwrap(), config, rank).unwrap();
                let data = vec![HostTensor::F32(&[2.0; 4]); names.len()];
                [(); 2].map(|()| probe.measure_host(&data).unwrap().outputs().total_norm)
            });
            assert_eq!(steps, [[if all_are_empty { 0.0 } else { 4.0 }; 2]; 2]);
        }
    }
}
