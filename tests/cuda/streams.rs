//! What waits for what: reports, moved gradients, other streams.

use super::*;

/// Holds a stream until it is opened, or for so long that something must have waited for the stream.
pub struct Gate {
    open: AtomicBool,
    gave_up: AtomicBool,
}

impl Gate {
    pub fn shut(stream: &CudaStream) -> Arc<Self> {
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
    pub fn open(&self) -> bool {
        self.open.store(true, Ordering::Release);
        !self.gave_up.load(Ordering::Acquire)
    }

    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// The same in a while, for what has to wait for the stream until then.
    pub fn open_later(self: &Arc<Self>) -> thread::JoinHandle<bool> {
        let gate = Arc::clone(self);
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            gate.open()
        })
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
    let mut probe = probe(&stream, clipping());
    assert!(probe.poll().unwrap().is_none(), "nothing was measured");
    assert!(matches!(probe.wait(), Err(Error::NotMeasured)));

    let steps: Vec<_> = (1..=6).map(Tensors::of).collect();
    let sources: Vec<_> = steps.iter().map(|tensors| OnDevice::new(&stream, tensors)).collect();
    let mut place = OnDevice::new(&stream, &steps[0]);
    // SAFETY: there are no graphs.
    unsafe { probe.bind(&place.slices(), &[]) }.unwrap();
    stream.synchronize().unwrap();

    // The host runs six steps ahead of the device. Four reports can be on their way.
    let gate = Gate::shut(&stream);
    for source in &sources {
        place.copy(source);
        probe.measure(&place.slices()).unwrap();
        probe.clip(&mut place.slices_mut()).unwrap();
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
    let mut probe = probe(&stream, clipping());
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
    let mut probe = probe(&stream, clipping());
    let sources = [1, 2].map(|seed| OnDevice::new(&other, &Tensors::of(seed)));
    let mut place = OnDevice::new(&other, &Tensors::of(0));
    // SAFETY: there are no graphs.
    unsafe { probe.bind(&place.slices(), &[]) }.unwrap();
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
    probe.clip(&mut place.slices_mut()).unwrap();
    assert!(place.get() == clipped, "read after the clip");
    assert_same_bits(&probe.wait().unwrap(), &report);
}

/// Kernels that are queued need their module, and the memory of the probe.
#[test]
fn a_probe_is_dropped_when_what_it_has_launched_has_run() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    for polled in [false, true] {
        let mut probe = probe(&stream, clipping());
        let mut place = OnDevice::new(&stream, &Tensors::of(1));
        stream.synchronize().unwrap();
        let gate = Gate::shut(&stream);
        probe.step(&mut place.slices_mut()).unwrap();
        if polled {
            // A report is on its way.
            probe.poll().unwrap();
        }
        let opened = gate.open_later();
        drop(probe);
        assert!(gate.is_open(), "dropped while its kernels were queued");
        assert!(opened.join().unwrap(), "the gate was shut for too long");
        assert!(place.get() == Reference::new(clipping()).step(Tensors::of(1)).1);
    }
}

/// So is one with other ranks, whose communicator cudarc would abort, and with it what is queued on it.
#[cfg(feature = "nccl")]
#[test]
fn a_probe_with_other_ranks_is_dropped_when_what_it_has_launched_has_run() {
    use gradprobe::{
        cuda::NcclCommunicator,
        ranks::{Along, Mesh, Ranks},
    };
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let id = match NcclCommunicator::unique_id() {
        Ok(id) => id,
        Err(error) => return pointless(&error.to_string()),
    };
    let communicator = NcclCommunicator::new(&stream, 0, 1, id).unwrap();
    let mesh = Mesh::new([("dp", 1)]).unwrap();
    let ranks = Ranks::alike(communicator, &mesh, mesh.layout([("dp", Along::Sharded)]).unwrap());
    let mut probe = probe(&stream, clipping().ranks(ranks));
    let mut place = OnDevice::new(&stream, &Tensors::of(1));
    stream.synchronize().unwrap();
    let gate = Gate::shut(&stream);
    probe.step(&mut place.slices_mut()).unwrap();
    let opened = gate.open_later();
    drop(probe);
    assert!(gate.is_open(), "dropped while its kernels were queued");
    assert!(opened.join().unwrap(), "the gate was shut for too long");
    assert!(place.get() == Reference::new(clipping()).step(Tensors::of(1)).1);
}

/// The driver refuses to tell of events, and to free page-locked memory, while any thread captures in global mode, and ends
/// that capture: which is some other part of the program's.
#[test]
fn captures_of_other_streams_survive_what_a_probe_asks() {
    let Some(context) = device() else { return };
    let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let mut reference = Reference::new(clipping());
    let mut probe = probe(&stream, clipping());
    let addresses = OnDevice::new(&stream, &Tensors::of(1));
    let place = addresses.raw();
    let words = other.alloc_zeros::<u32>(4).unwrap();
    let address = words.device_ptr(&other).0;
    probe.measure(&refs(&place)).unwrap();
    let expected = reference.step(Tensors::of(1)).0;
    stream.synchronize().unwrap();
    other.synchronize().unwrap();
    for this_thread in [true, false] {
        other.begin_capture(ALL_THREADS).unwrap();
        // SAFETY: the words are there as long as the graph.
        unsafe { result::memset_d8_async(address, 0, 16, other.cu_stream()) }.unwrap();
        let mut ask = || {
            probe.measure(&refs(&place)).unwrap();
            let polled = next_report(&mut probe);
            let waited = probe.wait().unwrap();
            assert_eq!(polled.step(), waited.step());
            waited
        };
        let seen = if this_thread {
            ask()
        } else {
            thread::scope(|scope| {
                scope
                    .spawn(|| {
                        context.bind_to_thread().unwrap();
                        ask()
                    })
                    .join()
                    .unwrap()
            })
        };
        assert_eq!(bytemuck::cast_slice::<_, u8>(seen.records()), bytemuck::cast_slice::<_, u8>(expected.records()));
        let graph = other.end_capture(CUgraphInstantiate_flags(0)).expect("it is whole").expect("it has a node");
        assert_eq!(nodes(&graph), [CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET]);
    }
    // Nor does the end of a probe break one.
    other.begin_capture(ALL_THREADS).unwrap();
    probe.measure(&refs(&place)).unwrap();
    probe.poll().unwrap();
    drop(probe);
    assert!(other.end_capture(CUgraphInstantiate_flags(0)).is_ok());

    // The driver means it: a thread that has not said that it knows better is refused, and the capture is lost.
    let event = context.new_event(None).unwrap();
    event.record(&stream).unwrap();
    stream.synchronize().unwrap();
    other.begin_capture(ALL_THREADS).unwrap();
    // SAFETY: the event is alive.
    let asked = unsafe { sys::cuEventQuery(event.cu_event()) };
    assert_eq!(asked, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert!(other.end_capture(CUgraphInstantiate_flags(0)).is_err());
}
