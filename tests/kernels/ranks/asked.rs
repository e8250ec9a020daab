//! What of all ranks there is where it is asked for.

use super::*;

/// What other ranks have alone is known to all, where whole tensors are asked for.
#[test]
fn every_rank_can_have_the_records_of_the_model() {
    for make in DEVICES {
        let seen = on_ranks(2, |rank, communicator| {
            let mesh = Mesh::new([("pp", 2)]).unwrap();
            let (name, own) = [("first", 1.0f32), ("last stage", 3.0)][rank as usize];
            let layouts = [Along::At(rank), Along::Sharded].map(|how| mesh.layout([("pp", how)]).unwrap());
            let ranks = Ranks::new(communicator, &mesh, layouts).whole_tensors();
            let plan = Plan::new([(name, DType::F32, 2), ("both", DType::F32, 1)]).unwrap();
            let mut probe = make(plan, Config::default().ranks(ranks), rank).unwrap();
            assert_eq!(probe.ranks().unwrap().model(), Err(Error::NotMeasured));
            probe.measure_host(&[HostTensor::F32(&[own, -own]), HostTensor::F32(&[own])]).unwrap();
            let mut model = probe.ranks().unwrap().model().unwrap();
            model.sort_by(|a, b| a.0.cmp(&b.0));
            model.into_iter().map(|(name, record)| (name, record.count, record.max_abs().unwrap())).collect::<Vec<_>>()
        });
        let expected = [("both", 2, 3.0f32), ("first", 2, 1.0), ("last stage", 2, 3.0)];
        let expected: Vec<_> = expected.map(|(name, count, max)| (name.to_owned(), count, max)).into();
        assert!(seen.iter().all(|seen| *seen == expected), "{seen:?}");
    }
}

/// The noise scale of samples with a known one, from norms before and after the mean over ranks.
#[test]
fn the_noise_scale_comes_of_samples_and_their_mean() {
    const LEN: usize = 4000;
    let all = on_ranks(4, |rank, communicator| {
        let mesh = Mesh::new([("dp", 2), ("tp", 2)]).unwrap();
        // A matrix that is cut, and a bias on both.
        let layouts = [mesh.layout([("tp", Along::Sharded)]).unwrap(), mesh.layout([]).unwrap()];
        let plan = Plan::new([("w", DType::F32, LEN as u64), ("b", DType::F32, 10)]).unwrap();
        let config = Config::default().micro_batches(2).ranks(Ranks::new(communicator, &mesh, layouts));
        let mut probe = Probe::new(Cpu, plan, config).unwrap();
        let [dp, tp] = mesh.coordinates(rank)[..] else { unreachable!() };
        // Of mean 0.5 and variance 4 each: |G|² = 0.25 · 8010, tr Σ = 4 · 8010.
        let sample = |step: u64, sample: u32, of: u32, len: usize| -> Vec<f32> {
            let key = step * 100 + u64::from(sample * 10 + of);
            (0..len).map(|i| (0.5 + 2.0 * normal(key, i)) as f32).collect()
        };
        let mut noise = SampleNoise::new();
        let mut seen = Vec::new();
        for step in 0..20 {
            for micro in 0..2 {
                let (w, b) = (sample(step, 2 * dp + micro, tp, LEN), sample(step, 2 * dp + micro, 5, 10));
                probe.micro_batches().unwrap().measure(&[&w, &b]).unwrap();
            }
            let mean = |of: u32, len: usize| -> Vec<f32> {
                let samples: Vec<Vec<f32>> = (0..4).map(|index| sample(step, index, of, len)).collect();
                (0..len).map(|i| samples.iter().map(|sample| sample[i]).sum::<f32>() / 4.0).collect()
            };
            probe.measure(&[&mean(tp, LEN), &mean(5, 10)]).unwrap();
            let samples = probe.micro_batches().unwrap().report().unwrap();
            let report = probe.wait().unwrap();
            let squares = probe.ranks().unwrap().sample_squares(&samples, &["dp"]).unwrap();
            assert_eq!(squares.samples, 4);
            noise.add(&squares, &report);
            seen.push(squares.mean.to_bits());
            let mut refused = |data: &[&str]| probe.ranks().unwrap().sample_squares(&samples, data).unwrap_err();
            assert!(matches!(refused(&["pp"]), Error::InvalidConfig { option: "data", .. }));
            assert!(matches!(refused(&["tp"]), Error::InvalidConfig { option: "data", .. }));
        }
        (noise.estimate(), seen)
    });
    for (estimate, seen) in &all {
        assert_eq!(*seen, all[0].1);
        let (signal, variance) = (estimate.squared_gradient.unwrap(), estimate.sum_variance.unwrap());
        let elements = 2.0 * LEN as f64 + 10.0;
        assert!((signal.value / (0.25 * elements) - 1.0).abs() < 0.05, "{signal:?}");
        assert!((variance.value / (4.0 * elements) - 1.0).abs() < 0.02, "{variance:?}");
        assert!((estimate.noise_scale.value().unwrap() / 16.0 - 1.0).abs() < 0.06);
    }
}

/// Histograms, and signal over noise, of parts make up those of the whole.
#[test]
fn what_is_asked_for_is_that_of_the_whole() {
    let whole = |step: u64| Tensor::of_values(DType::F32, 9000, move |i| 0.3 + normal(step, i)).data();
    let bias = |step: u64| Tensor::of_values(DType::BF16, 30, move |i| normal(77 + step, i)).data();
    let features = |config: Config| config.histogram().tracking(GsnrConfig::new());
    let seen = |probe: &mut Probe, data: &dyn Fn(u64) -> [Data; 2]| {
        for step in 0..4 {
            probe.measure_host(&tensors(&data(step))).unwrap();
        }
        let last = data(4);
        (probe.histogram_host(&tensors(&last)).unwrap(), probe.gsnr_report().unwrap())
    };
    let names = ["w", "b"];
    let plan = |data: &[Data; 2]| plan_of(names.into_iter().zip(data.iter().map(Data::tensor))).unwrap();
    let all = |step| [whole(step), bias(step)];
    let alone = seen(&mut Probe::new(Cpu, plan(&all(0)), features(Config::default())).unwrap(), &all);
    for make in DEVICES {
        let ranks = on_ranks(3, |rank, communicator| {
            let mesh = Mesh::new([("dp", 3)]).unwrap();
            let layouts = [mesh.layout([("dp", Along::Sharded)]).unwrap(), mesh.layout([]).unwrap()];
            let own =
                |step: u64| [part(&whole(step), 2500 * rank as usize..[2500, 5000, 9000][rank as usize]), bias(step)];
            let config = features(Config::default()).ranks(Ranks::new(communicator, &mesh, layouts));
            let mut probe = make(plan(&own(0)), config, rank).unwrap();
            let (histograms, gsnr) = seen(&mut probe, &own);
            let mut room = probe.ranks().unwrap();
            (room.histograms(&histograms).unwrap(), room.gsnr(&gsnr).unwrap())
        });
        for (histograms, gsnr) in ranks {
            assert!(histograms.histograms() == alone.0.histograms());
            for ((name, seen), (_, expected)) in gsnr.tensors().zip(alone.1.tensors()) {
                let near = |a: Option<f64>, b: Option<f64>| (a.unwrap() / b.unwrap() - 1.0).abs() < 1e-4;
                assert!(near(seen.mean(), expected.mean()), "{name}");
                assert!(near(Some(seen.sum_variance), Some(expected.sum_variance)), "{name}");
                assert_eq!((seen.defined, seen.below_one), (expected.defined, expected.below_one));
                assert_eq!(seen.median(), expected.median().filter(|_| name == "b"));
            }
            assert!((gsnr.noise_scale().unwrap() / alone.1.noise_scale().unwrap() - 1.0).abs() < 1e-3);
        }
    }
}
