//! Numbers for people: bytes and seconds with three digits, in decimal units.

use std::time::Duration;

/// `read 64.3 KB in 0.12 ms: 0.54 GB/s`
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn rate(bytes: u64, time: Duration) -> String {
    // The clock may have stood still.
    let seconds = time.as_secs_f64().max(1e-9);
    let bytes = bytes as f64;
    format!("read {} in {}: {} GB/s", decimal(bytes), self::seconds(seconds), digits(bytes / seconds / 1e9))
}

fn decimal(bytes: f64) -> String {
    for (size, prefix) in [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")] {
        if bytes >= size {
            return format!("{} {prefix}B", digits(bytes / size));
        }
    }
    format!("{bytes} B")
}

fn seconds(seconds: f64) -> String {
    if seconds < 1.0 { format!("{} ms", digits(1e3 * seconds)) } else { format!("{} s", digits(seconds)) }
}

fn digits(x: f64) -> String {
    let places = if x < 10.0 { 2 } else { usize::from(x < 100.0) };
    format!("{x:.places$}")
}
