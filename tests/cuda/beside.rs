//! What is measured beside the step: histograms, dot products, units, samples, weights.

use super::*;

#[test]
fn histograms_and_dot_products_have_the_bits_of_the_cpu() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut first, mut second) = (Tensors::of(1), Tensors::of(2));
    first.f16[7] = f16::NEG_INFINITY;
    second.bf16[LENGTHS[2] - 1] = bf16::NAN;
    let mut cpu = Probe::new(Cpu, Tensors::plan(), Config::default()).unwrap();
    cpu.enable_histogram();
    cpu.enable_dot();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), Config::default()).unwrap();
    let [a, b] = [&first, &second].map(|tensors| OnDevice::new(&stream, tensors));
    assert_eq!(probe.histogram(&a.slices()).map(drop), Err(Error::NotEnabled { what: "histogram" }));
    assert_eq!(probe.dot(&a.slices(), &b.slices()).map(drop), Err(Error::NotEnabled { what: "dot" }));
    probe.enable_histogram().unwrap();
    probe.enable_dot().unwrap();
    // Twice each: nothing stays behind.
    for (tensors, place) in [(&first, &a), (&second, &b), (&first, &a)] {
        let expected = cpu.histogram(&tensors.hosts()).unwrap();
        assert!(probe.histogram(&place.slices()).unwrap().histograms() == expected.histograms());
        let expected = cpu.dot(&tensors.hosts(), &second.hosts()).unwrap();
        let seen = probe.dot(&place.slices(), &b.slices()).unwrap();
        assert_eq!(bytemuck::cast_slice::<_, u8>(seen.records()), bytemuck::cast_slice::<_, u8>(expected.records()));
    }
    // A second list of other types, as weights are beside gradients: the f32 tensor's elements begin all three.
    let parts = LENGTHS.map(|length| &second.f32[..length]);
    let expected = cpu.dot(&first.hosts(), &parts.map(HostTensor::F32)).unwrap();
    let views = LENGTHS.map(|length| b.f32.slice(..length));
    let seen = probe.dot(&a.slices(), &[&views[0], &views[1], &views[2]]).unwrap();
    assert_eq!(bytemuck::cast_slice::<_, u8>(seen.records()), bytemuck::cast_slice::<_, u8>(expected.records()));
    let short = probe.dot(&a.slices(), &[&views[0], &views[1], &views[1]]).map(drop);
    assert!(matches!(short, Err(Error::TensorMismatch { name, .. }) if name == "BF16"));
}

#[test]
fn adaptive_clips_have_the_bits_of_the_cpu_also_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut gradients, weights) = (Tensors::of(1), Tensors::of(2));
    let rule = AdaptiveClip::new([100_003, 400, 65_537]).clipping(0.1);
    let mut cpu = Probe::new(Cpu, Tensors::plan(), Config::default()).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), Config::default()).unwrap();
    let [mut a, b] = [&gradients, &weights].map(|tensors| OnDevice::new(&stream, tensors));
    assert_eq!(probe.adaptive_clip().map(drop), Err(Error::NotEnabled { what: "adaptive_clip" }));
    cpu.enable_adaptive_clip(&rule).unwrap();
    probe.enable_adaptive_clip(&rule).unwrap();
    probe.measure(&a.slices()).unwrap();
    assert_eq!(probe.adaptive_clip().map(drop), Err(Error::NotMeasured));
    cpu.measure(&gradients.hosts()).unwrap();
    probe.clip_adaptively(&mut [&mut a.f32, &mut a.f16, &mut a.bf16], &b.slices()).unwrap();
    let expected = cpu.clip_adaptively(&mut gradients.hosts_mut(), &weights.hosts()).unwrap();
    assert!(expected.records().iter().any(|record| record.clipped > 0));
    assert_eq!(probe.adaptive_clip().unwrap().records(), expected.records());
    assert_eq!(a.get(), gradients);

    // In a graph, with the measurement whose flag it obeys.
    let (a_raw, b_raw) = (a.raw(), b.raw());
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().measure_raw(&a_raw) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().clip_adaptively_raw(&a_raw, &b_raw) }.unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.raw().clip_adaptively_raw(&a_raw, &[b_raw[0], b_raw[1], a_raw[0]]) };
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert!(matches!(moved, Err(Error::TensorMismatch { .. })));
    for replay in 0..2 {
        let mut fresh = Tensors::of(3);
        if replay == 1 {
            fresh.bf16[9] = bf16::NAN;
        }
        a.set(&fresh);
        graph.launch().unwrap();
        let before = fresh.clone();
        cpu.measure(&fresh.hosts()).unwrap();
        let expected = cpu.clip_adaptively(&mut fresh.hosts_mut(), &weights.hosts()).unwrap();
        assert_eq!(probe.adaptive_clip().unwrap().records(), expected.records());
        let seen = a.get();
        if replay == 0 {
            assert_eq!(seen, fresh);
        } else {
            // NaN is not equal to itself.
            assert_eq!((&seen.f32, &seen.f16), (&before.f32, &before.f16), "a step to skip");
        }
    }
}

#[test]
fn samples_are_those_of_the_cpu_also_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config = SampleConfig::new(1000, 3);
    let mut cpu = Probe::new(Cpu, Tensors::plan(), Config::default()).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), Config::default()).unwrap();
    cpu.enable_samples(&config).unwrap();
    probe.enable_samples(&config).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().bind_raw(&addresses) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().measure_raw(&addresses) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().sample_raw(&addresses) }.unwrap();
    let refused = probe.sample_report().map(drop);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(refused, Err(Error::WaitInCapture));
    assert_eq!(nodes(&graph), TWO_KERNELS);
    for seed in 1..=4 {
        let mut tensors = Tensors::of(seed);
        if seed == 3 {
            tensors.f16[0] = f16::INFINITY;
        }
        place.set(&tensors);
        graph.launch().unwrap();
        cpu.measure(&tensors.hosts()).unwrap();
        cpu.sample(&tensors.hosts()).unwrap();
        assert_eq!(probe.sample_report().unwrap(), cpu.sample_report().unwrap());
    }
    // And by the safe calls.
    probe.measure(&place.slices()).unwrap();
    probe.sample(&place.slices()).unwrap();
    cpu.measure(&Tensors::of(4).hosts()).unwrap();
    cpu.sample(&Tensors::of(4).hosts()).unwrap();
    assert_eq!(probe.sample_report().unwrap(), cpu.sample_report().unwrap());
}

#[test]
fn weights_beside_gradients_have_the_bits_of_the_cpu_also_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let plan = || Tensors::plan().with_weights(DType::ALL).unwrap();
    let (gradients, mut weights) = (Tensors::of(1), Tensors::of(2));
    weights.f16[7] = f16::NAN;
    let mut cpu = Probe::new(Cpu, plan(), clipping()).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), plan(), clipping()).unwrap();
    let [a, b] = [&gradients, &weights].map(|tensors| OnDevice::new(&stream, tensors));
    let assert_same = |seen: &Report, expected: &Report| {
        assert_same_bits(seen, expected);
        let bytes = |report: &Report| report.weights().map(|weights| bytemuck::cast_slice::<_, u8>(weights).to_vec());
        assert_eq!(bytes(seen), bytes(expected));
    };
    for with_weights in [true, false, true] {
        let expected = if with_weights {
            probe.measure_with_weights(&a.slices(), &b.slices()).unwrap();
            cpu.measure_with_weights(&gradients.hosts(), &weights.hosts()).unwrap()
        } else {
            probe.measure(&a.slices()).unwrap();
            cpu.measure(&gradients.hosts()).unwrap()
        };
        assert_eq!(expected.weights().is_some(), with_weights);
        assert_same(&probe.wait().unwrap(), &expected);
    }

    let (a_raw, b_raw) = (a.raw(), b.raw());
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().measure_with_weights_raw(&a_raw, &b_raw) }.unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.raw().measure_with_weights_raw(&a_raw, &a_raw) };
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(moved, Err(Error::AddressesChangedInCapture));
    assert_eq!(nodes(&graph), TWO_KERNELS[..1]);
    // The weights move before the replay.
    probe.bind_with_weights(&a.slices(), &a.slices()).unwrap();
    graph.launch().unwrap();
    let expected = cpu.measure_with_weights(&gradients.hosts(), &gradients.hosts()).unwrap();
    assert_same(&probe.wait().unwrap(), &expected);
}

#[test]
fn a_graph_counts_and_multiplies_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), Config::default()).unwrap();
    let [mut a, b] = [0, 1].map(|seed| OnDevice::new(&stream, &Tensors::of(seed)));
    let (a_raw, b_raw) = (a.raw(), b.raw());
    probe.enable_histogram().unwrap();
    probe.enable_dot().unwrap();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().launch_dot_raw(&a_raw, &b_raw) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().launch_histogram_raw(&a_raw) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().launch_dot_raw(&a_raw, &b_raw) }.unwrap();
    // SAFETY: as above.
    let moved = unsafe { probe.raw().launch_dot_raw(&a_raw, &a_raw) };
    // SAFETY: as above.
    let waited = unsafe { probe.raw().histogram_raw(&a_raw) }.map(drop);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!((moved, waited), (Err(Error::AddressesChangedInCapture), Err(Error::WaitInCapture)));
    let [kernel, memset] = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL, CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET];
    assert_eq!(nodes(&graph), [memset, kernel, kernel], "no copies, no allocations");

    let mut cpu = Probe::new(Cpu, Tensors::plan(), Config::default()).unwrap();
    cpu.enable_histogram();
    cpu.enable_dot();
    for seed in 5..8 {
        let tensors = Tensors::of(seed);
        a.set(&tensors);
        graph.launch().unwrap();
        stream.synchronize().unwrap();
        let (mut histograms, mut dots) = (vec![Histogram::default(); 3], vec![Dot::default(); 3]);
        let addresses = (probe.raw().histograms_address().unwrap(), probe.raw().dots_address().unwrap());
        // SAFETY: the probe has that many there, and the stream was waited for.
        unsafe { result::memcpy_dtoh_sync(&mut histograms, addresses.0) }.unwrap();
        // SAFETY: as above.
        unsafe { result::memcpy_dtoh_sync(&mut dots, addresses.1) }.unwrap();
        assert!(histograms == cpu.histogram(&tensors.hosts()).unwrap().histograms());
        assert_eq!(dots, cpu.dot(&tensors.hosts(), &Tensors::of(1).hosts()).unwrap().records());
    }
}
