//! Copies to page-locked memory that come as late as a test wants: what must not go on before them is seen to.

use crate::die;
use std::{
    sync::{Condvar, Mutex},
    time::Duration,
};

static HELD: Mutex<bool> = Mutex::new(false);
static CHANGED: Condvar = Condvar::new();

/// From here on such copies are held, or no longer.
#[unsafe(no_mangle)]
pub extern "C" fn gradprobe_host_driver_hold_copies(held: bool) {
    *HELD.lock().unwrap() = held;
    CHANGED.notify_all();
}

/// Waits until copies are not held. Who holds them for a minute is waiting for one, and would for ever.
pub fn wait() {
    let held = CHANGED.wait_timeout_while(HELD.lock().unwrap(), Duration::from_secs(60), |held| *held);
    if held.unwrap().1.timed_out() {
        die("what holds a copy waits for it");
    }
}
