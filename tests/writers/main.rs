//! The writers: what they write, as others read it.

#[path = "../entries/mod.rs"]
mod entries;
#[path = "../require/mod.rs"]
mod require;

mod charts;
mod live;
mod readers;
mod write;
