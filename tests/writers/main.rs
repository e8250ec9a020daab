//! The writers: what they write, as others read it.

#[path = "../entries/mod.rs"]
mod entries;
#[path = "../require/mod.rs"]
mod require;
#[cfg(unix)]
#[path = "../terminal/mod.rs"]
mod terminal;

mod charts;
#[cfg(target_os = "linux")]
mod faults;
#[cfg(target_os = "linux")]
mod kept;
#[cfg(target_os = "linux")]
mod killed;
mod live;
mod readers;
mod write;
