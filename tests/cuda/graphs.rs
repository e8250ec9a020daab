//! Steps captured into graphs and replayed.

use super::*;
use gradprobe::optim::AdamW;

#[test]
fn a_graph_measures_and_clips_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = probe(&stream, clipping());
    let mut places = [0, 1].map(|seed| OnDevice::new(&stream, &Tensors::of(seed)));
    // Before the capture: to take an address makes cudarc wait for events, which a capture does not allow.
    let addresses = [0, 1].map(|place: usize| places[place].raw());

    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&refs(&addresses[0]), &[]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    let moved = probe.measure(&refs(&addresses[1]));
    probe.measure(&refs(&addresses[0])).unwrap();
    clip_at(&mut probe, &addresses[0]).unwrap();
    let polled = probe.poll();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(moved, Err(Error::AddressesChangedInCapture));
    assert!(polled.unwrap().is_none(), "nothing has been measured yet");
    assert_eq!(nodes(&graph), TWO_KERNELS, "no copies, no allocations");

    // In place, moved, in place again, and back.
    for (step, place) in [0, 0, 0, 1, 1, 0].into_iter().enumerate() {
        let tensors = Tensors::of(10 + step as u64);
        places[place].set(&tensors);
        // SAFETY: as above.
        unsafe { probe.bind(&refs(&addresses[place]), &[]) }.unwrap();
        graph.launch().unwrap();
        let (report, clipped) = reference.step(tensors);
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(places[place].get() == clipped, "step {step}: clipped at place {place}");
    }
}

/// A replay measures without the probe's knowing, so that a clip may follow each.
#[test]
fn a_clip_follows_each_replay_of_a_measurement_alone() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = probe(&stream, clipping());
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();
    probe.measure(&refs(&addresses)).unwrap();
    clip_at(&mut probe, &addresses).unwrap();
    assert!(matches!(clip_at(&mut probe, &addresses), Err(Error::AlreadyClipped { .. })));
    // The reference counts that step as well.
    reference.step(Tensors::of(0));
    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&refs(&addresses), &[]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    probe.measure(&refs(&addresses)).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    for step in 1..4 {
        let tensors = Tensors::of(step);
        place.set(&tensors);
        graph.launch().unwrap();
        clip_at(&mut probe, &addresses).unwrap();
        let (report, clipped) = reference.step(tensors);
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(place.get() == clipped, "step {step}");
    }
}

/// Nobody has said that what the graph would keep stays.
#[test]
fn nothing_is_captured_that_was_not_bound() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config =
        clipping().histogram().dot().samples(SampleConfig::new(10, 2)).micro_batches(2).optimizer(AdamW::new(1e-3));
    let config =
        config.tracking(GsnrConfig::new()).adaptive_clip(AdaptiveClip::new(LENGTHS.map(|length| length as u64)));
    let mut probe = probe(&stream, config);
    let [place, weights] = [0, 1].map(|seed| OnDevice::new(&stream, &Tensors::of(seed)));
    let (addresses, weights) = (place.raw(), weights.raw());
    let adaptive = |probe: &mut Probe| {
        let mut tensors = addresses;
        let mut tensors = tensors.each_mut().map(|tensor| tensor as &mut dyn TensorMut);
        probe.adaptive_clip().unwrap().clip(&mut tensors, &refs(&weights))
    };
    let update = |probe: &mut Probe| {
        let mut weights = weights;
        let mut weights = weights.each_mut().map(|tensor| tensor as &mut dyn TensorMut);
        probe.update(&refs(&addresses), &mut weights)
    };
    type Call<'a> = (&'a str, &'a dyn Fn(&mut Probe) -> Result<(), Error>);
    let calls: [Call; 10] = [
        ("measure", &|probe| probe.measure(&refs(&addresses))),
        ("clip", &|probe| clip_at(probe, &addresses)),
        ("step", &|probe| {
            let mut tensors = addresses;
            probe.step(&mut tensors.each_mut().map(|tensor| tensor as &mut dyn TensorMut))
        }),
        ("histogram", &|probe| probe.histogram()?.launch(&refs(&addresses))),
        ("dot", &|probe| probe.dot()?.launch(&refs(&addresses), &refs(&weights))),
        ("samples", &|probe| probe.samples()?.take(&refs(&addresses))),
        ("micro-batch", &|probe| probe.micro_batches()?.measure(&refs(&addresses))),
        ("gsnr", &|probe| probe.gsnr()?.launch()),
        ("adaptive clip", &adaptive),
        ("update", &update),
    ];
    // Where the tensors are, the device knows.
    for (what, call) in calls {
        assert_eq!(call(&mut probe), Ok(()), "{what}");
    }
    let before = probe.wait().unwrap().step();
    for (what, call) in calls {
        stream.begin_capture(THIS_THREAD).unwrap();
        let refused = call(&mut probe);
        // The capture has survived it, with no kernel in it.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
        assert_eq!(refused, Err(Error::NotBound), "{what}");
        let kernel = CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL;
        assert!(graph.is_none_or(|graph| !nodes(&graph).contains(&kernel)), "{what}");
    }
    assert_eq!(probe.wait().unwrap().step(), before);
    // SAFETY: memory and probe live as long as the graphs, and are used on this stream only.
    unsafe { probe.bind(&refs(&addresses), &[]) }.unwrap();
    for (what, call) in calls {
        stream.begin_capture(THIS_THREAD).unwrap();
        let captured = call(&mut probe);
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
        assert_eq!(captured, Ok(()), "{what}");
        assert!(!nodes(&graph).is_empty(), "{what}");
    }
}

#[test]
fn a_graph_tracks_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config = clipping().tracking(GsnrConfig::new().tensors(["F*", "BF16"]).window(5));
    let mut reference = Reference::new(config.clone());
    let mut probe = probe(&stream, config);
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();

    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&refs(&addresses), &[]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    probe.measure(&refs(&addresses)).unwrap();
    clip_at(&mut probe, &addresses).unwrap();
    let waited = probe.gsnr_report();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(waited.err(), Some(Error::WaitInCapture));
    assert_eq!(nodes(&graph), THREE_KERNELS, "no copies, no allocations");

    // Past an Inf, into a second window, and on from a reset.
    for step in 0..12 {
        let mut tensors = Tensors::of(20 + step);
        if step == 3 {
            tensors.bf16[60_000] = bf16::INFINITY;
        }
        if step == 9 {
            probe.gsnr().unwrap().reset().unwrap();
            reference.0.gsnr().unwrap().reset().unwrap();
        }
        place.set(&tensors);
        graph.launch().unwrap();
        let (report, clipped) = reference.step(tensors);
        demand_none(&gsnr::same_report(&probe.gsnr_report(), &reference.0.gsnr_report()));
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(place.get() == clipped, "step {step}");
    }
}

/// The bins and the counters of a reduction are used again by the next, whichever block was the last of each.
#[test]
fn a_reduction_leaves_nothing_for_the_next() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config = Config::default().tracking(GsnrConfig::new());
    let (mut cpu, mut probe) = (cpu(config.clone()), probe(&stream, config));
    for seed in 0..4 {
        let tensors = Tensors::of(seed);
        cpu.measure_host(&tensors.hosts()).unwrap();
        probe.measure(&OnDevice::new(&stream, &tensors).slices()).unwrap();
    }
    let expected = cpu.gsnr_report();
    for _ in 0..if short() { 3 } else { 300 } {
        // One that nobody reads.
        probe.gsnr().unwrap().launch().unwrap();
        demand_none(&gsnr::same_report(&probe.gsnr_report(), &expected));
    }
}

/// Every policy, and the history with its tags, in a replayed graph: what a step decides depends on those before.
#[test]
fn policies_and_history_are_those_of_the_cpu_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();
    for clip in [
        Clip::Value { max_abs: 0.3 },
        Clip::TensorNorm { max_norm: 30.0 },
        Clip::Quantile { quantile: 0.8 },
        Clip::Percentile { percentile: 40.0, history: 4, max_norm: None },
        Clip::ZScore { smoothing: 0.9, threshold: 1.0, warmup: 3, max_norm: None },
        Clip::TensorEma { smoothing: 0.9, threshold: 1.05, warmup: 2, max_norm: None },
    ] {
        let config = Config::default().clip(clip).history(3).rules(Rules::default());
        let mut reference = Reference::new(config.clone());
        let mut probe = probe(&stream, config);
        // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
        unsafe { probe.bind(&refs(&addresses), &[]) }.unwrap();
        stream.begin_capture(THIS_THREAD).unwrap();
        probe.measure(&refs(&addresses)).unwrap();
        clip_at(&mut probe, &addresses).unwrap();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
        // Only a quantile takes a launch of its own, and a memset before it.
        let histogram = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET, CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL];
        let own: &[_] = if matches!(clip, Clip::Quantile { .. }) { &histogram } else { &[] };
        assert_eq!(nodes(&graph), [own, &TWO_KERNELS].concat());
        for seed in [3, 2, 4, 9, 1, 2, 8, 3] {
            let mut tensors = Tensors::of(seed);
            if seed == 9 {
                tensors.bf16[5] = bf16::INFINITY;
            }
            place.set(&tensors);
            probe.history().unwrap().tag(seed).unwrap();
            reference.0.history().unwrap().tag(seed).unwrap();
            graph.launch().unwrap();
            let (report, clipped) = reference.step(tensors);
            let seen = probe.wait().unwrap();
            assert_same_bits(&seen, &report);
            assert!(seen.health_words().is_some_and(|words| Some(words) == report.health_words()));
            let found = |report: &Report| report.diagnosis().map(|diagnosis| diagnosis.findings().to_vec());
            assert_eq!(found(&seen), found(&report));
            assert!(place.get() == clipped, "{clip:?}: clipped");
        }
        let bytes = |report: &HistoryReport| -> Vec<u8> {
            let line = |(step, tensors): (&HistoryStep, &[HistoryTensor])| {
                [bytemuck::bytes_of(step), bytemuck::cast_slice(tensors)].concat()
            };
            report.steps().flat_map(line).collect()
        };
        let (seen, expected) = (probe.history_report().unwrap(), reference.0.history_report().unwrap());
        assert_eq!(seen.steps().map(|(step, _)| step.tag).collect::<Vec<_>>(), [2, 8, 3]);
        assert!(bytes(&seen) == bytes(&expected), "{clip:?}: history");
    }
}

#[test]
fn the_safe_calls_can_be_captured_without_event_tracking() {
    let Some(context) = device() else { return };
    // SAFETY: everything below is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = probe(&stream, clipping());
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let elsewhere = OnDevice::new(&stream, &Tensors::of(0));
    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&place.slices(), &[]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.bind(&elsewhere.slices(), &[]) };
    probe.measure(&place.slices()).unwrap();
    probe.clip(&mut place.slices_mut()).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(moved, Err(Error::AddressesChangedInCapture));
    assert_eq!(nodes(&graph), TWO_KERNELS, "no copies, no allocations");
    for step in 0..3 {
        let tensors = Tensors::of(step);
        place.set(&tensors);
        graph.launch().unwrap();
        let (report, clipped) = reference.step(tensors);
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(place.get() == clipped, "step {step}");
    }
}
