//! Copies to and from the host: beside the trainer's kernels, never before their time, and never too late.

use super::*;
use gradprobe::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD,
};

/// A tensor whose norm tells which step was measured, and a probe of it.
struct Small {
    stream: Arc<CudaStream>,
    slice: CudaSlice<f32>,
    probe: Probe,
}

impl Small {
    const LENGTH: usize = 64;

    fn new(stream: &Arc<CudaStream>) -> Self {
        let plan = Plan::new([("w", DType::F32, Self::LENGTH as u64)]).unwrap();
        Self {
            stream: Arc::clone(stream),
            slice: stream.clone_htod(&[1.0; Self::LENGTH]).unwrap(),
            probe: Probe::new(Cuda::new(stream).unwrap(), plan, Config::new()).unwrap(),
        }
    }

    fn raw(&self) -> RawTensor {
        // SAFETY: the slice has these elements, and lives and is used as long as probe and graphs, on one stream.
        unsafe { RawTensor::new(self.slice.device_ptr(&self.stream).0, Self::LENGTH as u64, DType::F32) }
    }

    /// Sets all elements to 0, as a trainer's next kernel might: whether that runs.
    fn clear(&mut self) -> bool {
        self.stream.memset_zeros(&mut self.slice).unwrap();
        is_done(&self.stream, ENOUGH)
    }

    /// Asserts that the reports of two steps have come whole: of the ones, and of what [`clear`](Self::clear) left.
    fn assert_reports(&mut self) {
        let start = Instant::now();
        let first = loop {
            if let Some(report) = self.probe.poll().unwrap() {
                break report;
            }
            assert!(start.elapsed() < ENOUGH, "no report came");
        };
        assert_eq!((first.step(), first.outputs().total_norm), (1, 8.0), "overwritten before it was copied");
        let second = self.probe.wait().unwrap();
        assert_eq!((second.step(), second.outputs().total_norm), (2, 0.0));
    }
}

#[test]
fn what_follows_a_poll_runs_while_its_copy_is_under_way_and_only_the_next_measurement_waits() {
    let Some((trace, stream)) = driver() else { return };
    let context = CudaContext::new(0).unwrap();
    for stream in [stream, context.default_stream()] {
        let mut small = Small::new(&stream);
        small.probe.measure(&[&small.slice]).unwrap();
        let held = trace.hold_copies();
        assert!(small.probe.poll().unwrap().is_none());
        assert!(small.clear(), "the copy is between a trainer's kernels");
        small.probe.measure(&[&small.slice]).unwrap();
        assert!(!is_done(&stream, A_WHILE), "results are overwritten before they are copied");
        drop(held);
        small.assert_reports();
    }
}

/// A graph cannot wait for a copy that is beside its stream.
#[test]
fn copies_are_in_line_once_graphs_may_be_replayed() {
    let Some((trace, stream)) = driver() else { return };
    for bound_in_capture in [false, true] {
        let mut small = Small::new(&stream);
        let raw = small.raw();
        small.probe.measure(&[&raw]).unwrap();
        let held = trace.hold_copies();
        assert!(small.probe.poll().unwrap().is_none());
        assert!(small.clear());
        // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
        let bind = |probe: &mut Probe| unsafe { probe.bind(&[&raw], &[]) }.unwrap();
        if !bound_in_capture {
            bind(&mut small.probe);
        }
        stream.begin_capture(THIS_THREAD).unwrap();
        let mut held = Some(held);
        if bound_in_capture {
            // What is captured cannot wait for what is not, so `bind` does.
            thread::scope(|scope| {
                let start = Instant::now();
                let held = held.take();
                scope.spawn(move || {
                    thread::sleep(A_WHILE);
                    drop(held);
                });
                bind(&mut small.probe);
                assert!(start.elapsed() >= A_WHILE);
            });
        }
        small.probe.measure(&[&raw]).unwrap();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
        graph.launch().unwrap();
        assert_eq!(is_done(&stream, A_WHILE), bound_in_capture, "a replay comes after the copy");
        drop(held);
        small.assert_reports();

        let held = trace.hold_copies();
        graph.launch().unwrap();
        assert!(small.probe.poll().unwrap().is_none());
        assert!(!is_done(&stream, A_WHILE), "a replay could come before the copy is over");
        drop(held);
        assert_eq!(small.probe.wait().unwrap().step(), 3);
    }
}

/// The driver ends the process when a copy runs whose memory was freed before.
#[test]
fn memory_is_not_freed_under_a_copy() {
    let Some((trace, stream)) = driver() else { return };
    let device = Cuda::new(&stream).unwrap();
    let buffer = device.allocate(64).unwrap();
    device.upload(&[7; 64], &buffer).unwrap();
    let mut read = device.read(64).unwrap();
    let held = trace.hold_copies();
    read.start(&buffer).unwrap();
    drop(buffer);
    assert!(!is_done(&stream, A_WHILE));
    drop(held);
    assert_eq!(read.wait().unwrap(), [7; 64]);

    // All of a probe, and a read whose memory on the host must stay as well.
    let mut small = Small::new(&stream);
    small.probe.measure(&[&small.slice]).unwrap();
    let held = trace.hold_copies();
    assert!(small.probe.poll().unwrap().is_none());
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(A_WHILE);
            drop(held);
        });
        drop(small);
    });
    assert!(is_done(&stream, ENOUGH));
}

/// Far ahead of the device, and each time from elsewhere.
#[test]
fn a_step_whose_gradients_have_moved_uploads_their_addresses_once() {
    let Some((trace, stream)) = driver() else { return };
    let mut places: Vec<Gradients> = (0..8).map(|_| Gradients::new(&stream)).collect();
    for (place, value) in places.iter_mut().zip(1u8..) {
        stream.memcpy_htod(&vec![f32::from(value); LENGTH], &mut place.f32).unwrap();
    }
    let mut probe = probe(&stream, clipping());
    for round in 0..2 {
        let held = Held::new(&stream);
        let mut more = 0;
        for (step, place) in places.iter_mut().enumerate() {
            let (mut calls, _) = place.step(&trace, &mut probe);
            // There is memory for four uploads on their way, and for more once there have been more.
            if round == 0 && step >= 4 {
                more += calls.iter().filter(|call| *call == "cuMemHostAlloc 4096 bytes").count();
                calls.retain(|call| !["cuMemHostAlloc 4096 bytes", "cuEventCreate"].contains(&call.as_str()));
            }
            let report = if step < 4 { &[REPORT][..] } else { &[] };
            assert_calls(&format!("moved, step {step}"), &calls, &[&[ADDRESSES, MEASURE, CLIP], report].concat());
        }
        assert!(round > 0 || (1..=4).contains(&more), "{more} pieces of memory");
        drop(held);
        stream.synchronize().unwrap();
        // Each step has found its own gradients.
        for value in 1u8..=4 {
            let report = probe.poll().unwrap().unwrap();
            if round == 0 {
                assert_eq!(report.records()[0].max_abs(), Some(f32::from(value)));
            }
        }
        drop(probe.wait().unwrap());
    }
}
