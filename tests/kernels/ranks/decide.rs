//! What ranks decide, and remember, from step to step, and in a run that is interrupted.

use super::*;

/// What policies remember, what is kept, judged and scaled, is the same on all ranks, step after step, and what a single
/// probe makes of the whole.
#[test]
fn what_ranks_remember_stays_the_same() {
    const RANKS: u32 = 3;
    let configs = [
        Config::default().clip(Clip::ZScore { smoothing: 0.9, threshold: 1.0, warmup: 2, max_norm: None }),
        Config::default().clip(Clip::Percentile { percentile: 50.0, history: 4, max_norm: Some(3.0) }),
        Config::default().clip(Clip::TensorEma { smoothing: 0.9, threshold: 1.05, warmup: 2, max_norm: None }),
        Config::default().clip(Clip::Value { max_abs: 0.3 }),
        Config::default().clip(Clip::Quantile { quantile: 0.9 }),
        Config::default().clip(Clip::global_norm(0.5)).loss_scale(LossScale::dynamic().initial(8.0).growth_interval(2)),
    ];
    let models: Vec<Model> = (0..9)
        .map(|step| {
            let mut model = Model::empty(&[("dp", RANKS)]);
            let mut random = fastrand::Rng::with_seed(7);
            let size = if step == 5 { 20.0 } else { 1.0 + 0.1 * step as f64 };
            for (t, how) in [Along::Sharded, Along::Replicated, Along::Sharded].into_iter().enumerate() {
                let tensor = Tensor::of_values(DType::F32, 900, move |i| size * 0.05 * normal(10 * step + t as u64, i));
                // An overflow that one rank alone sees.
                let tensor = if step == 3 && t == 2 { tensor.with(11, f32::INFINITY.to_bits()) } else { tensor };
                model.add(["a", "b", "c"][t], tensor.data(), &[("dp", how)], &mut random);
            }
            model
        })
        .collect();
    for config in configs {
        let config = config.rules(Rules::default()).history(20);
        let run = |make: Make, rank: u32, communicator: Option<Told>| {
            let (plan, config, data): (Plan, Config, Vec<Vec<Data>>) = match communicator {
                Some(communicator) => {
                    let ranks = models[0].ranks(communicator).whole_tensors();
                    let data = models.iter().map(|model| model.data(rank)).collect();
                    (models[0].plan(rank), config.clone().ranks(ranks), data)
                }
                None => {
                    let of = |model: &Model| model.tensors.iter().map(|whole| whole.data.clone()).collect();
                    let data: Vec<Vec<Data>> = models.iter().map(of).collect();
                    let names = models[0].tensors.iter().map(|whole| whole.name.clone());
                    (plan_of(names.zip(data[0].iter().map(Data::tensor))).unwrap(), config.clone(), data)
                }
            };
            let mut probe = make(plan, config, rank).unwrap();
            let steps: Vec<Report> = data.iter().map(|data| probe.measure_host(&tensors(data)).unwrap()).collect();
            let history = probe.history_report().unwrap();
            (steps, format!("{:?}", history.steps().map(|(step, _)| step.outputs).collect::<Vec<_>>()))
        };
        let whole = run(DEVICES[0], 0, None);
        let all = DEVICES.map(|make| on_ranks(RANKS, |rank, communicator| run(make, rank, Some(communicator))));
        for (rank, (steps, history)) in all.iter().flatten().enumerate() {
            assert!(*history == all[0][0].1, "{config:?}, rank {rank}");
            for ((report, of_first), of_whole) in steps.iter().zip(&all[0][0].0).zip(&whole.0) {
                let bytes = |report: &Report| bytemuck::bytes_of(report.outputs()).to_vec();
                assert!(bytes(report) == bytes(of_first), "{config:?}, rank {rank}, step {}", report.step());
                let words = |report: &Report| {
                    let mut words = report.health_words().unwrap().to_vec();
                    words.rotate_right(rank % RANKS as usize % 3);
                    words
                };
                assert_eq!(words(report), of_first.health_words().unwrap());
                let (seen, expected) = (report.outputs(), of_whole.outputs());
                let near = |a: f64, b: f64| a == b || (a / b - 1.0).abs() < 1e-5 || a.is_nan() && b.is_nan();
                assert!(near(seen.total_norm, expected.total_norm), "{seen:?}, {expected:?}");
                assert!(near(seen.coefficient_f64, expected.coefficient_f64), "{config:?}: {seen:?}, {expected:?}");
                let exact = |o: &StepOutputs| (o.skip, o.action, o.flags, o.next_loss_scale, o.health, o.step);
                assert_eq!(exact(seen), exact(expected), "{config:?}, step {}", report.step());
            }
        }
    }
}

/// A clip at a quantile is at that of all elements, each of which counts once.
#[test]
fn a_quantile_is_that_of_all_ranks() {
    let config = || Config::default().clip(Clip::Quantile { quantile: 0.7 });
    let data = |key: u64| Tensor::of_values(DType::F32, 600, move |i| lognormal(key, i, 1.0)).data();
    let mut whole = [data(1), data(2)];
    let plan = |data: &[Data]| plan_of(["a", "b"].into_iter().zip(data.iter().map(Data::tensor))).unwrap();
    let mut alone = Probe::new(Cpu, plan(&whole), config()).unwrap();
    alone.measure_host(&tensors(&whole)).unwrap();
    alone.clip_host(&mut tensors_mut(&mut whole)).unwrap();
    for make in DEVICES {
        let parts = on_ranks(3, |rank, communicator| {
            let mesh = Mesh::new([("dp", 3)]).unwrap();
            let layouts = [Along::Sharded, Along::Replicated].map(|how| mesh.layout([("dp", how)]).unwrap());
            let first = 200 * rank as usize;
            let mut own = [part(&data(1), first..first + 200), data(2)];
            let mut probe = make(plan(&own), config().ranks(Ranks::new(communicator, &mesh, layouts)), rank).unwrap();
            probe.measure_host(&tensors(&own)).unwrap();
            probe.clip_host(&mut tensors_mut(&mut own)).unwrap();
            own
        });
        let of_all: Vec<u32> = parts.iter().flat_map(|[part, _]| part.bits()).collect();
        assert!(of_all == whole[0].bits().collect::<Vec<_>>());
        assert!(parts.iter().all(|[_, replica]| replica.bytes() == whole[1].bytes()));
    }
}

/// A run that is interrupted and goes on, on as many ranks as there are then, decides as one that was not.
#[test]
fn a_run_goes_on_on_other_ranks() {
    let config = || {
        Config::default()
            .clip(Clip::Percentile { percentile: 50.0, history: 4, max_norm: Some(3.0) })
            .loss_scale(LossScale::dynamic().initial(8.0).growth_interval(3))
    };
    let whole =
        |step: u64| -> Vec<f32> { (0..12).map(|i| (1.0 + step as f32).sqrt() * normal(step, i) as f32).collect() };
    // Steps on so many ranks, from a state on.
    let run = |make: Make, ranks: u32, steps: std::ops::Range<u64>, from: Option<&ProbeState>| {
        let mut all = on_ranks(ranks, |rank, communicator| {
            let len = 12 / ranks as usize;
            let plan = Plan::new([("w", DType::F32, len as u64)]).unwrap();
            let ranks = sharded(communicator);
            let mut probe = make(plan, config().ranks(ranks), rank).unwrap();
            assert_eq!(probe.state().unwrap().measured, 0);
            if let Some(state) = from {
                probe.restore(state).unwrap();
                assert_eq!(probe.state().unwrap().common(), *state);
            }
            let outputs: Vec<StepOutputs> = steps
                .clone()
                .map(|step| {
                    let part = &whole(step)[rank as usize * len..][..len];
                    *probe.measure_host(&[HostTensor::F32(part)]).unwrap().outputs()
                })
                .collect();
            (outputs, probe.state().unwrap())
        });
        assert!(all.iter().all(|of_rank| *of_rank == all[0]));
        all.swap_remove(0)
    };
    for make in DEVICES {
        let (at_once, last) = run(make, 2, 0..9, None);
        let (first, state) = run(make, 2, 0..5, None);
        let (second, of_other) = run(make, 3, 5..9, Some(&state.common()));
        assert_eq!((state.measured, last.measured, of_other.measured), (5, 9, 9));
        for (seen, expected) in [first, second].concat().iter().zip(&at_once) {
            let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-6;
            assert!(near(seen.total_norm, expected.total_norm) && near(seen.coefficient_f64, expected.coefficient_f64));
            let exact = |o: &StepOutputs| (o.step, o.flags, o.skip, o.loss_scale, o.next_loss_scale);
            assert_eq!(exact(seen), exact(expected));
        }
        let plan = || Plan::new([("w", DType::F32, 1)]).unwrap();
        let mut other = make(plan(), Config::default(), 0).unwrap();
        let of_other_parts = other.restore(&state).unwrap_err().to_string();
        assert!(
            of_other_parts.ends_with("\"w\" of 6 F32 elements, and here \"w\" of 1 F32 elements"),
            "{of_other_parts}"
        );
        assert!(matches!(other.restore(&state.common()), Err(Error::StateOfAnotherProbe { .. })));
    }
}
