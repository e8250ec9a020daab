//! Which calls were made, for a test that counts them.

use std::sync::Mutex;

/// One line a call, while someone wants to know.
static TRACE: Mutex<Option<String>> = Mutex::new(None);

/// Notes a call and what matters about it.
pub fn call(name: &str, detail: impl FnOnce() -> String) {
    if let Some(trace) = &mut *TRACE.lock().unwrap() {
        *trace += format!("{name} {}", detail()).trim_end();
        trace.push('\n');
    }
}

/// From here on calls are noted.
#[unsafe(no_mangle)]
pub extern "C" fn gradprobe_host_driver_trace_begin() {
    *TRACE.lock().unwrap() = Some(String::new());
}

/// Writes the calls since the beginning, one a line, each with what matters about it, as far as there is room; and
/// gives back their length.
///
/// # Safety
/// `capacity` bytes can be written at `buffer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradprobe_host_driver_trace_end(buffer: *mut u8, capacity: usize) -> usize {
    let trace = TRACE.lock().unwrap().take().unwrap_or_default();
    // SAFETY: the caller's word.
    unsafe { crate::faults::write_text(&trace, buffer, capacity) }
}
