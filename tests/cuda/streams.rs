//! What waits for what: reports, moved gradients, other streams.

use super::*;

/// Holds a stream until it is opened, or for so long that something must have waited for the stream.
struct Gate {
    open: AtomicBool,
    gave_up: AtomicBool,
}

impl Gate {
    fn shut(stream: &CudaStream) -> Arc<Self> {
        unsafe extern "C" fn hold(gate: *mut c_void) {
            // SAFETY: it was made from an Arc below, and the driver calls this once.
            let gate = unsafe { Arc::from_raw(gate.cast_const().cast::<Gate>()) };
            let start = Instant::now();
            while !gate.open.load(Ordering::Acquire) {
                if start.elapsed() > Duration::from_secs(20) {
                    gate.gave_up.store(true, Ordering::Release);
                    break;
                }
                thread::sleep(Duration::from_micros(100));
            }
        }
        let gate = Arc::new(Self { open: AtomicBool::new(false), gave_up: AtomicBool::new(false) });
        let argument = Arc::into_raw(Arc::clone(&gate)).cast_mut().cast();
        // SAFETY: the stream is alive, and the function makes no call of CUDA.
        unsafe { result::stream::launch_host_function(stream.cu_stream(), hold, argument) }.unwrap();
        gate
    }

    /// Lets the stream go on, and says whether nothing has waited for it so far.
    fn open(&self) -> bool {
        self.open.store(true, Ordering::Release);
        !self.gave_up.load(Ordering::Acquire)
    }
}

/// The next report, once it is there.
fn next_report(probe: &mut Probe) -> Report {
    let start = Instant::now();
    loop {
        if let Some(report) = probe.poll().unwrap() {
            return report;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no report came");
        thread::yield_now();
    }
}

#[test]
fn polling_every_step_gives_every_report_in_order_and_never_waits() {
    let Some(context) = device() else { return };
    if short() {
        return pointless("the tools GRADPROBE_SHORT is for may wait for launches");
    }
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
    assert!(probe.poll().unwrap().is_none(), "nothing was measured");
    assert!(matches!(probe.wait(), Err(Error::NotMeasured)));

    let steps: Vec<_> = (1..=6).map(Tensors::of).collect();
    let sources: Vec<_> = steps.iter().map(|tensors| OnDevice::new(&stream, tensors)).collect();
    let mut place = OnDevice::new(&stream, &steps[0]);
    probe.bind(&place.slices()).unwrap();
    stream.synchronize().unwrap();

    // The host runs six steps ahead of the device. Four reports can be on their way.
    let gate = Gate::shut(&stream);
    for source in &sources {
        place.copy(source);
        probe.measure(&place.slices()).unwrap();
        probe.clip(&mut [&mut place.f32, &mut place.f16, &mut place.bf16]).unwrap();
        assert!(probe.poll().unwrap().is_none(), "a report of a step that has not run");
    }
    assert!(gate.open(), "something waited for the device");
    let expected: Vec<_> = steps.into_iter().map(|tensors| reference.step(tensors)).collect();
    for step in [1, 2, 3, 4, 6] {
        let report = next_report(&mut probe);
        assert_eq!(report.step(), step);
        assert_same_bits(&report, &expected[usize::try_from(step).unwrap() - 1].0);
    }
    stream.synchronize().unwrap();
    assert!(probe.poll().unwrap().is_none(), "no report comes twice");
    assert!(place.get() == expected[5].1, "the clip of the last step");

    // Near the device, every step is reported.
    let mut reported = Vec::new();
    for source in &sources {
        place.copy(source);
        probe.measure(&place.slices()).unwrap();
        stream.synchronize().unwrap();
        reported.extend(probe.poll().unwrap().map(|report| report.step()));
    }
    stream.synchronize().unwrap();
    reported.extend(std::iter::from_fn(|| probe.poll().unwrap()).map(|report| report.step()));
    assert_eq!(reported, [7, 8, 9, 10, 11, 12]);

    let last = probe.wait().unwrap();
    assert_eq!(last.step(), 12, "the last measurement again");
    let unclipped = Reference::new(clipping()).step(Tensors::of(6)).0;
    assert_eq!(last.outputs().total_norm.to_bits(), unclipped.outputs().total_norm.to_bits());
}

#[test]
fn a_step_whose_gradients_have_moved_does_not_wait() {
    let Some(context) = device() else { return };
    if short() {
        return pointless("the tools GRADPROBE_SHORT is for may wait for launches");
    }
    let stream = context.new_stream().unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
    let places: Vec<_> = (0..5).map(|seed| OnDevice::new(&stream, &Tensors::of(seed))).collect();
    probe.measure(&places[0].slices()).unwrap();
    stream.synchronize().unwrap();
    let gate = Gate::shut(&stream);
    for place in &places[1..] {
        probe.measure(&place.slices()).unwrap();
    }
    assert!(gate.open(), "something waited for the device");
    let last = Reference::new(clipping()).step(Tensors::of(4)).0;
    assert_eq!(
        bytemuck::cast_slice::<_, u8>(probe.wait().unwrap().records()),
        bytemuck::cast_slice::<_, u8>(last.records())
    );
}

/// By cudarc's events, whatever comes first on either stream.
#[test]
fn other_streams_wait_for_the_probe_and_it_waits_for_them() {
    let Some(context) = device() else { return };
    if short() {
        return pointless("the tools GRADPROBE_SHORT is for may wait for launches");
    }
    let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let mut reference = Reference::new(clipping());
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
    let sources = [1, 2].map(|seed| OnDevice::new(&other, &Tensors::of(seed)));
    let mut place = OnDevice::new(&other, &Tensors::of(0));
    probe.bind(&place.slices()).unwrap();
    other.synchronize().unwrap();

    // A write that has yet to run, a measurement of what it writes, and a write that must not come before that.
    let gate = Gate::shut(&other);
    place.copy(&sources[0]);
    probe.measure(&place.slices()).unwrap();
    place.copy(&sources[1]);
    assert!(gate.open(), "something waited for the device");
    assert_same_bits(&probe.wait().unwrap(), &reference.step(Tensors::of(1)).0);

    // A read of what a clip has yet to write.
    let (report, clipped) = reference.step(Tensors::of(2));
    probe.measure(&place.slices()).unwrap();
    probe.clip(&mut [&mut place.f32, &mut place.f16, &mut place.bf16]).unwrap();
    assert!(place.get() == clipped, "read after the clip");
    assert_same_bits(&probe.wait().unwrap(), &report);
}
