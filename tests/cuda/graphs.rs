//! Steps captured into graphs and replayed.

use super::*;

#[test]
fn a_graph_measures_and_clips_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
    let mut places = [0, 1].map(|seed| OnDevice::new(&stream, &Tensors::of(seed)));
    // Before the capture: to take an address makes cudarc wait for events, which a capture does not allow.
    let addresses = [0, 1].map(|place: usize| places[place].raw());

    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().bind_raw(&addresses[0]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.raw().measure_raw(&addresses[1]) };
    // SAFETY: as above.
    unsafe { probe.raw().measure_raw(&addresses[0]) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().clip_raw(&addresses[0]) }.unwrap();
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
        unsafe { probe.raw().bind_raw(&addresses[place]) }.unwrap();
        graph.launch().unwrap();
        let (report, clipped) = reference.step(tensors);
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(places[place].get() == clipped, "step {step}: clipped at place {place}");
    }
}

#[test]
fn a_graph_tracks_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut reference, config) = (Reference::new(clipping()), GsnrConfig::new().tensors(["F*", "BF16"]).window(5));
    reference.0.track(&config).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
    probe.track(&config).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();

    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().bind_raw(&addresses) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().measure_raw(&addresses) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().clip_raw(&addresses) }.unwrap();
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
            probe.reset_tracking().unwrap();
            reference.0.reset_tracking().unwrap();
        }
        place.set(&tensors);
        graph.launch().unwrap();
        let (report, clipped) = reference.step(tensors);
        demand_none(&gsnr::same_report(&probe.gsnr_report(), &reference.0.gsnr()));
        assert_same_bits(&probe.wait().unwrap(), &report);
        assert!(place.get() == clipped, "step {step}");
    }
}

/// The bins and the counters of a reduction are used again by the next, whichever block was the last of each.
#[test]
fn a_reduction_leaves_nothing_for_the_next() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut cpu, mut probe) = (
        Probe::new(Cpu, Tensors::plan(), Config::default()).unwrap(),
        Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), Config::default()).unwrap(),
    );
    cpu.track(&GsnrConfig::new()).unwrap();
    probe.track(&GsnrConfig::new()).unwrap();
    for seed in 0..4 {
        let tensors = Tensors::of(seed);
        cpu.measure(&tensors.hosts()).unwrap();
        probe.measure(&OnDevice::new(&stream, &tensors).slices()).unwrap();
    }
    let expected = cpu.gsnr();
    for _ in 0..if short() { 3 } else { 300 } {
        // One that nobody reads.
        probe.raw().launch_gsnr().unwrap();
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
        Clip::Percentile { percentile: 40.0, history: 4 },
        Clip::ZScore { smoothing: 0.9, threshold: 1.0, warmup: 3 },
        Clip::TensorEma { smoothing: 0.9, threshold: 1.05, warmup: 2 },
    ] {
        let config = Config::default().clip(clip);
        let mut reference = Reference::new(config);
        reference.0.keep_history(3).unwrap();
        let health = Health::new(&Tensors::plan(), Rules::default()).unwrap();
        reference.0.judge_by(&health).unwrap();
        let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), config).unwrap();
        probe.keep_history(3).unwrap();
        probe.judge_by(&health).unwrap();
        // SAFETY: the memory lives as long as the graph, and is used on this stream only.
        unsafe { probe.raw().bind_raw(&addresses) }.unwrap();
        stream.begin_capture(THIS_THREAD).unwrap();
        // SAFETY: as above.
        unsafe { probe.raw().measure_raw(&addresses) }.unwrap();
        // SAFETY: as above.
        unsafe { probe.raw().clip_raw(&addresses) }.unwrap();
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
            probe.tag(seed).unwrap();
            reference.0.tag(seed).unwrap();
            graph.launch().unwrap();
            let (report, clipped) = reference.step(tensors);
            let seen = probe.wait().unwrap();
            assert_same_bits(&seen, &report);
            assert!(seen.health_words().is_some_and(|words| Some(words) == report.health_words()));
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
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let elsewhere = OnDevice::new(&stream, &Tensors::of(0));
    probe.bind(&place.slices()).unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    let moved = probe.bind(&elsewhere.slices());
    probe.measure(&place.slices()).unwrap();
    probe.clip(&mut [&mut place.f32, &mut place.f16, &mut place.bf16]).unwrap();
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
