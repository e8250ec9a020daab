//! A loss scale that adapts on the device, in replayed graphs too; and that nothing is set up during a capture.

use super::*;

/// Gradients that overflow now and then, under a scale that the device adapts and the host sets once.
#[test]
fn the_scale_adapts_in_a_graph_as_on_the_cpu() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config = clipping().loss_scale(LossScale::dynamic().initial(8.0).growth_interval(2));
    let config = config.tracking(GsnrConfig::default());
    let mut cpu = cpu(config.clone());
    let mut probe = probe(&stream, config);
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();
    // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
    unsafe { probe.bind(&refs(&addresses), &[]) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    probe.measure(&refs(&addresses)).unwrap();
    clip_at(&mut probe, &addresses).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    assert_eq!(nodes(&graph), THREE_KERNELS, "the tracked step is one more");
    for step in 0..9 {
        let mut tensors = Tensors::of(step);
        if step % 4 == 2 {
            tensors.f16[5] = f16::INFINITY;
        }
        if step == 6 {
            cpu.set_loss_scale(1000.0).unwrap();
            probe.set_loss_scale(1000.0).unwrap();
        }
        place.set(&tensors);
        graph.launch().unwrap();
        let expected = cpu.measure_host(&tensors.hosts()).unwrap();
        cpu.clip_host(&mut tensors.hosts_mut()).unwrap();
        assert_same_bits(&probe.wait().unwrap(), &expected);
        assert!(place.get() == tensors, "step {step}");
        // What the next loss is to be multiplied by is where the device finds it.
        let scale = probe.addresses().loss_scale.unwrap();
        let mut bytes = [0; 4];
        // SAFETY: four bytes of device memory that live as long as the probe.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, scale) }.unwrap();
        assert_eq!(expected.outputs().next_loss_scale, f32::from_ne_bytes(bytes));
    }
    let bytes = |report: &GsnrReport| report.tensors().map(|(_, r)| bytemuck::bytes_of(r).to_vec()).collect::<Vec<_>>();
    assert_eq!(bytes(&probe.gsnr_report().unwrap()), bytes(&cpu.gsnr_report().unwrap()));
}

/// It would be an upload at every replay, from memory that is gone; and real drivers end the capture.
#[test]
fn nothing_is_uploaded_during_a_capture() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config = Config::default().loss_scale(LossScale::dynamic()).history(2).tracking(GsnrConfig::default());
    let mut probe = probe(&stream, config);
    stream.begin_capture(THIS_THREAD).unwrap();
    let refused = [probe.gsnr().unwrap().reset(), probe.history().unwrap().tag(1), probe.set_loss_scale(2.0)];
    // The capture has survived them all.
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
    assert!(refused.iter().all(|result| *result == Err(Error::UploadInCapture)), "{refused:?}");
    assert!(graph.is_none_or(|graph| nodes(&graph).is_empty()));
}

/// Its memory would be the graph's, and its tables would be uploaded at every replay.
#[test]
fn no_probe_is_made_during_a_capture_of_its_stream() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    let config = Config::default().history(2).histogram().dot().samples(SampleConfig::new(1, 2)).micro_batches(2);
    let refused = [Config::default(), config.rules(Rules::default()).tracking(GsnrConfig::default())]
        .map(|config| Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), config).map(drop));
    // The capture has survived them.
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
    assert!(refused.iter().all(|result| *result == Err(Error::UploadInCapture)), "{refused:?}");
    assert!(graph.is_none_or(|graph| nodes(&graph).is_empty()));
}
