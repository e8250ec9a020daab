//! What is measured beside the step: histograms, dot products, units, samples, weights.

use super::*;

#[test]
fn histograms_and_dot_products_have_the_bits_of_the_cpu() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut first, mut second) = (Tensors::of(1), Tensors::of(2));
    first.f16[7] = f16::NEG_INFINITY;
    second.bf16[LENGTHS[2] - 1] = bf16::NAN;
    let config = Config::default().histogram().dot();
    let mut cpu = cpu(config.clone());
    let [a, b] = [&first, &second].map(|tensors| OnDevice::new(&stream, tensors));
    let mut without = probe(&stream, Config::default());
    assert_eq!(without.histogram().map(drop), Err(Error::NotDeclared { declare: "Config::histogram" }));
    assert_eq!(without.dot().map(drop), Err(Error::NotDeclared { declare: "Config::dot" }));
    let mut probe = probe(&stream, config);
    // Twice each: nothing stays behind.
    for (tensors, place) in [(&first, &a), (&second, &b), (&first, &a)] {
        let expected = cpu.histogram_host(&tensors.hosts()).unwrap();
        let seen = probe.histogram().unwrap().measure(&place.slices()).unwrap();
        assert!(seen.histograms() == expected.histograms());
        let expected = cpu.dot_host(&tensors.hosts(), &second.hosts()).unwrap();
        let seen = probe.dot().unwrap().measure(&place.slices(), &b.slices()).unwrap();
        assert_eq!(bytemuck::cast_slice::<_, u8>(seen.records()), bytemuck::cast_slice::<_, u8>(expected.records()));
    }
    // A second list of other types, as weights are beside gradients: the f32 tensor's elements begin all three.
    let parts = LENGTHS.map(|length| &second.f32[..length]);
    let expected = cpu.dot_host(&first.hosts(), &parts.map(HostTensor::F32)).unwrap();
    let views = LENGTHS.map(|length| b.f32.slice(..length));
    let mut dot = probe.dot().unwrap();
    let seen = dot.measure(&a.slices(), &[&views[0], &views[1], &views[2]]).unwrap();
    assert_eq!(bytemuck::cast_slice::<_, u8>(seen.records()), bytemuck::cast_slice::<_, u8>(expected.records()));
    let short = dot.measure(&a.slices(), &[&views[0], &views[1], &views[1]]).map(drop);
    assert!(matches!(short, Err(Error::TensorMismatch { name, .. }) if name == "BF16"));
}

#[test]
fn adaptive_clips_have_the_bits_of_the_cpu_also_in_a_graph() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut gradients, weights) = (Tensors::of(1), Tensors::of(2));
    let config = Config::default().adaptive_clip(AdaptiveClip::new([100_003, 400, 65_537]).clipping(0.1));
    let mut without = probe(&stream, Config::default());
    assert_eq!(without.adaptive_clip().map(drop), Err(Error::NotDeclared { declare: "Config::adaptive_clip" }));
    let mut cpu = cpu(config.clone());
    let mut probe = probe(&stream, config);
    let [mut a, b, elsewhere] = [&gradients, &weights, &weights].map(|tensors| OnDevice::new(&stream, tensors));
    probe.measure(&a.slices()).unwrap();
    assert_eq!(probe.adaptive_clip().unwrap().report().map(drop), Err(Error::NotMeasured));
    cpu.measure_host(&gradients.hosts()).unwrap();
    probe.adaptive_clip().unwrap().clip(&mut a.slices_mut(), &b.slices()).unwrap();
    let expected = cpu.clip_adaptively_host(&mut gradients.hosts_mut(), &weights.hosts()).unwrap();
    assert!(expected.records().iter().any(|record| record.clipped > 0));
    assert_eq!(probe.adaptive_clip().unwrap().report().unwrap().records(), expected.records());
    assert_eq!(a.get(), gradients);

    // In a graph, with the measurement whose flag it obeys.
    let (a_raw, b_raw, elsewhere) = (a.raw(), b.raw(), elsewhere.raw());
    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&refs(&a_raw), &[]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    probe.measure(&refs(&a_raw)).unwrap();
    let clip = |probe: &mut Probe, weights: &[RawTensor; 3]| {
        let mut tensors = a_raw;
        let mut tensors = tensors.each_mut().map(|tensor| tensor as &mut dyn TensorMut);
        probe.adaptive_clip().unwrap().clip(&mut tensors, &refs(weights))
    };
    clip(&mut probe, &b_raw).unwrap();
    let mismatched = clip(&mut probe, &[b_raw[0], b_raw[1], a_raw[0]]);
    let moved = clip(&mut probe, &elsewhere);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert!(matches!(mismatched, Err(Error::TensorMismatch { .. })));
    assert_eq!(moved, Err(Error::AddressesChangedInCapture));
    for replay in 0..2 {
        let mut fresh = Tensors::of(3);
        if replay == 1 {
            fresh.bf16[9] = bf16::NAN;
        }
        a.set(&fresh);
        graph.launch().unwrap();
        let before = fresh.clone();
        cpu.measure_host(&fresh.hosts()).unwrap();
        let expected = cpu.clip_adaptively_host(&mut fresh.hosts_mut(), &weights.hosts()).unwrap();
        assert_eq!(probe.adaptive_clip().unwrap().report().unwrap().records(), expected.records());
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
    let config = Config::default().samples(SampleConfig::new(1000, 3));
    let mut cpu = cpu(config.clone());
    let mut probe = probe(&stream, config);
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();
    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&refs(&addresses), &[]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    probe.measure(&refs(&addresses)).unwrap();
    probe.samples().unwrap().take(&refs(&addresses)).unwrap();
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
        cpu.measure_host(&tensors.hosts()).unwrap();
        cpu.sample_host(&tensors.hosts()).unwrap();
        assert_eq!(probe.sample_report().unwrap(), cpu.sample_report().unwrap());
    }
    // And by slices.
    probe.measure(&place.slices()).unwrap();
    probe.samples().unwrap().take(&place.slices()).unwrap();
    cpu.measure_host(&Tensors::of(4).hosts()).unwrap();
    cpu.sample_host(&Tensors::of(4).hosts()).unwrap();
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
            cpu.measure_host_with_weights(&gradients.hosts(), &weights.hosts()).unwrap()
        } else {
            probe.measure(&a.slices()).unwrap();
            cpu.measure_host(&gradients.hosts()).unwrap()
        };
        assert_eq!(expected.weights().is_some(), with_weights);
        assert_same(&probe.wait().unwrap(), &expected);
    }

    let (a_raw, b_raw) = (a.raw(), b.raw());
    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&refs(&a_raw), &refs(&b_raw)) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    probe.measure_with_weights(&refs(&a_raw), &refs(&b_raw)).unwrap();
    let moved = probe.measure_with_weights(&refs(&a_raw), &refs(&a_raw));
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(moved, Err(Error::AddressesChangedInCapture));
    assert_eq!(nodes(&graph), TWO_KERNELS[..1]);
    // The weights move before the replay.
    // SAFETY: as above.
    unsafe { probe.bind(&a.slices(), &a.slices()) }.unwrap();
    graph.launch().unwrap();
    let expected = cpu.measure_host_with_weights(&gradients.hosts(), &gradients.hosts()).unwrap();
    assert_same(&probe.wait().unwrap(), &expected);
}

#[test]
fn a_graph_counts_and_multiplies_what_it_finds_at_each_replay() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config = Config::default().histogram().dot();
    let mut probe = probe(&stream, config.clone());
    let [mut a, b] = [0, 1].map(|seed| OnDevice::new(&stream, &Tensors::of(seed)));
    let (a_raw, b_raw) = (a.raw(), b.raw());
    let (a_refs, b_refs) = (refs(&a_raw), refs(&b_raw));
    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&a_refs, &[]) }.unwrap();
    // Where the second list is, the device is told by a launch.
    probe.dot().unwrap().launch(&a_refs, &b_refs).unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    probe.histogram().unwrap().launch(&a_refs).unwrap();
    probe.dot().unwrap().launch(&a_refs, &b_refs).unwrap();
    let moved = probe.dot().unwrap().launch(&a_refs, &a_refs);
    let waited = probe.histogram().unwrap().measure(&a_refs).map(drop);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!((moved, waited), (Err(Error::AddressesChangedInCapture), Err(Error::WaitInCapture)));
    let [kernel, memset] = [CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL, CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET];
    assert_eq!(nodes(&graph), [memset, kernel, kernel], "no copies, no allocations");

    let mut cpu = cpu(config);
    for seed in 5..8 {
        let tensors = Tensors::of(seed);
        a.set(&tensors);
        graph.launch().unwrap();
        stream.synchronize().unwrap();
        let (mut histograms, mut dots) = (vec![Histogram::default(); 3], vec![Dot::default(); 3]);
        let addresses = (probe.histogram().unwrap().address(), probe.dot().unwrap().address());
        // SAFETY: the probe has that many there, and the stream was waited for.
        unsafe { result::memcpy_dtoh_sync(&mut histograms, addresses.0) }.unwrap();
        // SAFETY: as above.
        unsafe { result::memcpy_dtoh_sync(&mut dots, addresses.1) }.unwrap();
        assert!(histograms == cpu.histogram_host(&tensors.hosts()).unwrap().histograms());
        assert_eq!(dots, cpu.dot_host(&tensors.hosts(), &Tensors::of(1).hosts()).unwrap().records());
    }
}
