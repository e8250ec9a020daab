//! What CUDA's documentation says of streams and captures, asked of the driver: of NVIDIA's where there is a GPU, and else of
//! the one of the tests, which is to forgive no more.

use super::{streams::Gate, *};
use gradprobe::cudarc::driver::sys::CUstreamCaptureMode::{self, CU_STREAM_CAPTURE_MODE_RELAXED as NO_THREAD};

/// A stream that waits for the default stream, and it for it.
fn blocking_stream(context: &Arc<CudaContext>) -> Arc<CudaStream> {
    context.bind_to_thread().unwrap();
    let stream = result::stream::create(result::stream::StreamKind::Default).unwrap();
    // SAFETY: a stream of this context; the tests destroy it, or the process ends.
    unsafe { context.wrap_borrowed_stream(stream) }
}

/// Whether what is queued in the stream is done before long.
fn is_done_soon(stream: &CudaStream) -> bool {
    let (event, start) = (stream.record_event(None).unwrap(), Instant::now());
    while !event.try_is_complete().unwrap() {
        if start.elapsed() > Duration::from_millis(200) {
            return false;
        }
        thread::yield_now();
    }
    true
}

/// "The legacy default stream ... synchronizes with other blocking streams"; non-blocking ones stand apart.
#[test]
fn the_default_stream_and_blocking_streams_wait_for_each_other() {
    let Some(context) = device() else { return };
    let (default, blocking, other) =
        (context.default_stream(), blocking_stream(&context), context.new_stream().unwrap());
    let gate = Gate::shut(&other);
    assert!(is_done_soon(&default), "it waits for a stream that does not block");
    gate.open();
    for (held, waits) in [(&blocking, &default), (&default, &blocking)] {
        let gate = Gate::shut(held);
        assert!(!is_done_soon(waits));
        assert!(is_done_soon(&other));
        gate.open();
        waits.synchronize().unwrap();
    }
    // SAFETY: made above, and used no more.
    unsafe { result::stream::destroy(blocking.cu_stream()) }.unwrap();
}

/// "In case the device is still doing work in the stream ... the function will return immediately".
#[test]
fn what_is_queued_in_a_stream_is_done_after_it_is_destroyed() {
    let Some(context) = device() else { return };
    let stream = blocking_stream(&context);
    let memory = context.default_stream().clone_htod(&[1u8; 64]).unwrap();
    context.synchronize().unwrap();
    let gate = Gate::shut(&stream);
    let address = memory.device_ptr(&stream).0;
    // SAFETY: so many bytes of this context's.
    unsafe { result::memset_d8_async(address, 7, 64, stream.cu_stream()) }.unwrap();
    // SAFETY: made above, and used no more.
    unsafe { result::stream::destroy(stream.cu_stream()) }.unwrap();
    assert!(gate.open(), "it was waited for");
    context.synchronize().unwrap();
    assert_eq!(context.default_stream().clone_dtoh(&memory).unwrap(), [7; 64]);
}

/// A call that may wait is refused to a thread by its own mode and by that of captures, its own and others'; to be refused it
/// ends the capture.
#[test]
fn a_capture_forbids_calls_by_its_mode_and_the_threads() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let modes = [ALL_THREADS, THIS_THREAD, NO_THREAD];
    for (of_capture, of_thread, same) in modes
        .into_iter()
        .flat_map(|capture| modes.map(move |thread| (capture, thread)))
        .flat_map(|(capture, thread)| [true, false].map(|same| (capture, thread, same)))
    {
        // "Prohibited ... if the local thread has an ongoing capture sequence that was not initiated with relaxed mode, or any
        // other thread has a concurrent capture sequence initiated with global mode"; with thread-local mode only by the
        // former, with relaxed mode by none.
        let forbidden = match (of_thread, same) {
            (NO_THREAD, _) => false,
            (_, true) => of_capture != NO_THREAD,
            (THIS_THREAD, false) => false,
            (_, false) => of_capture == ALL_THREADS,
        };
        let asks = || {
            context.bind_to_thread().unwrap();
            let mut mode: CUstreamCaptureMode = of_thread;
            // SAFETY: a variable of this function.
            unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result().unwrap();
            // SAFETY: freed below.
            let allocated = unsafe { result::malloc_sync(64) };
            // SAFETY: as above.
            unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result().unwrap();
            allocated
        };
        stream.begin_capture(of_capture).unwrap();
        let allocated = if same { asks() } else { thread::scope(|scope| scope.spawn(asks).join().unwrap()) };
        let ended = stream.end_capture(CUgraphInstantiate_flags(0));
        assert_eq!(allocated.is_err(), forbidden, "{of_capture:?}, {of_thread:?}, the same thread: {same}");
        assert_eq!(ended.is_err(), forbidden, "{of_capture:?}, {of_thread:?}, the same thread: {same}");
        if let Ok(address) = allocated {
            // SAFETY: allocated above.
            unsafe { result::free_sync(address) }.unwrap();
        }
    }
}

/// The default stream would have to wait for what is only recorded.
#[test]
fn the_default_stream_ends_the_capture_of_a_blocking_stream() {
    let Some(context) = device() else { return };
    let (default, blocking) = (context.default_stream(), blocking_stream(&context));
    let mut memory = default.clone_htod(&[1u8; 64]).unwrap();
    context.synchronize().unwrap();
    blocking.begin_capture(THIS_THREAD).unwrap();
    let address = memory.device_ptr_mut(&default).0;
    // SAFETY: so many bytes of this context's.
    let refused = unsafe { result::memset_d8_async(address, 7, 64, default.cu_stream()) };
    assert_eq!(refused.unwrap_err().0, CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    assert!(blocking.end_capture(CUgraphInstantiate_flags(0)).is_err());
    // SAFETY: made above, and used no more.
    unsafe { result::stream::destroy(blocking.cu_stream()) }.unwrap();
}

/// "The per-thread default stream is an implicit stream local to both the thread and the CUcontext ... will synchronize with the
/// legacy default stream".
#[test]
fn each_thread_has_a_default_stream_of_its_own() {
    let Some(context) = device() else { return };
    let (default, own) = (context.default_stream(), context.per_thread_stream());
    let gate = Gate::shut(&own);
    let of_other = || {
        context.bind_to_thread().unwrap();
        is_done_soon(&context.per_thread_stream())
    };
    assert!(thread::scope(|scope| scope.spawn(of_other).join().unwrap()));
    assert!(!is_done_soon(&own));
    assert!(!is_done_soon(&default));
    gate.open();
    context.synchronize().unwrap();
}
