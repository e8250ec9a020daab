//! Waits and records of events: cudarc's, which cost by the tensor, and ours, which do not.

use super::*;

const LENGTH: usize = 8;

/// The event calls of a step.
#[derive(Debug, PartialEq)]
struct Events {
    waits: usize,
    records: usize,
}

impl Events {
    fn of(trace: &Trace, step: impl FnOnce()) -> Self {
        let calls = trace.of(step);
        let count = |name| calls.iter().filter(|call| *call == name).count();
        Self { waits: count("cuStreamWaitEvent"), records: count("cuEventRecord") }
    }
}

const NONE: Events = Events { waits: 0, records: 0 };

fn slices(count: usize, stream: &Arc<CudaStream>) -> Vec<CudaSlice<f32>> {
    (0..count).map(|_| stream.clone_htod(&[1f32; LENGTH]).unwrap()).collect()
}

fn plan(count: usize) -> Plan {
    Plan::new((0..count).map(|tensor| (tensor.to_string(), DType::F32, LENGTH as u64))).unwrap()
}

/// A measurement and a whole step of so many slices that were made on the probe's stream.
fn of_slices(count: usize, trace: &Trace, stream: &Arc<CudaStream>) -> [Events; 2] {
    let mut slices = slices(count, stream);
    let mut probe = Probe::new(Cuda::new(stream).unwrap(), plan(count), clipping()).unwrap();
    let measure = Events::of(trace, || {
        let tensors: Vec<_> = slices.iter().map(|slice| slice as &dyn Tensor).collect();
        probe.measure(&tensors).unwrap();
    });
    // The upload of the addresses, which have not moved since.
    let measure = Events { records: measure.records - 1, ..measure };
    let step = Events::of(trace, || {
        let mut tensors: Vec<_> = slices.iter_mut().map(|slice| slice as &mut dyn TensorMut).collect();
        probe.step(&mut tensors).unwrap();
    });
    [measure, step]
}

/// A slice's own events are the only word of what other streams do with it, and the only word to them.
#[test]
fn cudarc_waits_and_records_for_each_slice_where_there_are_streams_to_wait_for() {
    let Some((trace, stream)) = driver() else { return };
    let many = |n| [Events { waits: n, records: n }, Events { waits: 2 * n, records: n }];
    assert_eq!(of_slices(1000, &trace, &stream), many(1000));

    let default = |context: &Arc<CudaContext>| of_slices(50, &trace, &context.default_stream());
    let context = CudaContext::new(0).unwrap();
    assert_eq!(default(&context), [NONE, NONE], "a context whose one stream is the default one");
    let _other = context.new_stream().unwrap();
    assert_eq!(default(&context), many(50), "beside another stream");

    // SAFETY: what follows is on one stream.
    unsafe { context.disable_event_tracking() };
    assert_eq!(default(&context), [NONE, NONE], "without tracking");
}

#[test]
fn bare_addresses_are_waited_for_by_nobody() {
    let Some((trace, stream)) = driver() else { return };
    let slices = slices(50, &stream);
    // SAFETY: the slices have these elements, and live and are used as long as the probe, on one stream.
    let raw =
        |slice: &CudaSlice<f32>| unsafe { RawTensor::new(slice.device_ptr(&stream).0, LENGTH as u64, DType::F32) };
    let mut raw: Vec<_> = slices.iter().map(raw).collect();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), plan(50), clipping()).unwrap();
    // The first uploads the addresses. A copy's stream waits for the step, and the next step for the copy.
    for (poll, events) in [
        (false, Events { waits: 0, records: 1 }),
        (false, NONE),
        (true, Events { waits: 1, records: 2 }),
        (true, Events { waits: 2, records: 2 }),
        (false, Events { waits: 1, records: 0 }),
    ] {
        let seen = Events::of(&trace, || {
            probe.step(&mut raw.iter_mut().map(|raw| raw as &mut dyn TensorMut).collect::<Vec<_>>()).unwrap();
            if poll {
                probe.poll().unwrap();
            }
        });
        assert_eq!(seen, events);
        stream.synchronize().unwrap();
    }
}
