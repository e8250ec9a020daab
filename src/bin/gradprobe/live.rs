//! `gradprobe live`
use crate::failure::Failure;
use std::path::PathBuf;
/// Follows
#[derive(clap::Args)]
pub struct Options { run: PathBuf }
pub fn run(options: &Options) -> Result<(), Failure> { Err(Failure::file(&options.run, "x")) }
