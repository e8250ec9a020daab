//! Time on the device.

use gradprobe::cudarc::driver::{CudaEvent, CudaStream, sys::CUevent_flags::CU_EVENT_DEFAULT};
use std::{cell::Cell, sync::Arc, time::Duration};

/// Events at one time on the stream.
const BATCH: usize = 64;

/// Times turns of some work by a pair of events around each.
pub struct Clock {
    stream: Arc<CudaStream>,
    events: Vec<[CudaEvent; 2]>,
    /// Turns so far: they are counted on, so that no turn begins where the last of an earlier call was.
    turns: Cell<usize>,
}

impl Clock {
    pub fn new(stream: &Arc<CudaStream>) -> Self {
        let event = || stream.context().new_event(Some(CU_EVENT_DEFAULT)).unwrap();
        let events = (0..BATCH).map(|_| [event(), event()]).collect();
        Self { stream: Arc::clone(stream), events, turns: Cell::new(0) }
    }

    /// What each turn took on the device. `launch` gets the number of the turn; it calls the function it is given where
    /// the time begins. The host runs ahead, so that no turn waits for it if it can be avoided.
    pub fn turns(&self, count: usize, mut launch: impl FnMut(usize, &dyn Fn())) -> Vec<Duration> {
        let mut times = Vec::with_capacity(count);
        while times.len() < count {
            let batch = &self.events[..BATCH.min(count - times.len())];
            for [begin, end] in batch {
                launch(self.turns.get(), &|| begin.record(&self.stream).unwrap());
                end.record(&self.stream).unwrap();
                self.turns.set(self.turns.get() + 1);
            }
            let elapsed = |[begin, end]: &[CudaEvent; 2]| begin.elapsed_ms(end).unwrap();
            times.extend(batch.iter().map(|pair| Duration::from_secs_f64(f64::from(elapsed(pair)) / 1e3)));
        }
        times
    }
}
