//! A loss scale that adapts on the device, in replayed graphs too; and that nothing is set up during a capture.

use super::*;

/// Gradients that overflow now and then, under a scale that the device adapts and the host sets once.
#[test]
fn the_scale_adapts_in_a_graph_as_on_the_cpu() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let config = clipping().loss_scale(LossScale::dynamic().initial(8.0).growth_interval(2));
    let mut cpu = Probe::new(Cpu, Tensors::plan(), config).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), config).unwrap();
    cpu.track(&GsnrConfig::default()).unwrap();
    probe.track(&GsnrConfig::default()).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(0));
    let addresses = place.raw();
    // SAFETY: the memory lives as long as the graph, and is used on this stream only.
    unsafe { probe.raw().bind_raw(&addresses) }.unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().measure_raw(&addresses) }.unwrap();
    // SAFETY: as above.
    unsafe { probe.raw().clip_raw(&addresses) }.unwrap();
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
        let expected = cpu.measure(&tensors.hosts()).unwrap();
        cpu.clip(&mut tensors.hosts_mut()).unwrap();
        assert_same_bits(&probe.wait().unwrap(), &expected);
        assert!(place.get() == tensors, "step {step}");
        // What the next loss is to be multiplied by is where the device finds it.
        let scale = probe.raw().loss_scale_address().unwrap();
        let mut bytes = [0; 4];
        // SAFETY: four bytes of device memory that live as long as the probe.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, scale) }.unwrap();
        assert_eq!(Some(f32::from_ne_bytes(bytes)), cpu.loss_scale());
        assert_eq!(expected.outputs().next_loss_scale, f32::from_ne_bytes(bytes));
    }
    let bytes = |report: &GsnrReport| report.tensors().map(|(_, r)| bytemuck::bytes_of(r).to_vec()).collect::<Vec<_>>();
    assert_eq!(bytes(&probe.gsnr_report().unwrap()), bytes(&cpu.gsnr().unwrap()));
}

/// It would be an upload at every replay, from memory that is gone; and real drivers end the capture.
#[test]
fn nothing_is_set_up_during_a_capture() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let plan = || Plan::new([("w", DType::F32, 4)]).unwrap();
    let config = Config::default().loss_scale(LossScale::dynamic());
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), plan(), config).unwrap();
    probe.keep_history(2).unwrap();
    probe.track(&GsnrConfig::default()).unwrap();
    stream.begin_capture(THIS_THREAD).unwrap();
    let refused = [
        probe.track(&GsnrConfig::default()),
        probe.reset_tracking(),
        probe.keep_history(3),
        probe.tag(1),
        probe.set_loss_scale(2.0),
        probe.judge_by(&Health::new(&plan(), Rules::default()).unwrap()),
        probe.enable_histogram(),
        probe.enable_dot(),
        probe.enable_samples(&SampleConfig::new(1, 1)),
        probe.enable_adaptive_clip(&AdaptiveClip::new([4])),
        probe.enable_micro_batches(2),
    ];
    // The capture has survived them all.
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
    assert!(refused.iter().all(|result| *result == Err(Error::SetUpInCapture)), "{refused:?}");
    assert!(graph.is_none_or(|graph| nodes(&graph).is_empty()));
}
