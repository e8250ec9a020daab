//! What a step has to say, written down: JSON lines, CSV, Prometheus' text, TensorBoard's event files, pictures and a
//! view in the terminal.
//!
//! An [`Entry`] holds all there is of a step; a [`Sink`] writes entries; [`Background`] has sinks write on a thread of
//! its own, so that no disk and no terminal ever holds up training. NaN, Inf and names of any characters are data for
//! all of them.
//!
//! # What is there afterwards
//!
//! * Steps rise, and none is written twice. A file of JSON lines or CSV, and the event files of a folder, are one run: they are
//!   continued after the last step that is whole. A step that is not after it is refused by [`Error::StepWritten`], and what is
//!   there stays. So a run that begins anew needs a place of its own, and one that goes on from a checkpoint restores its
//!   probe's state ([`Probe::restore`](crate::Probe::restore)): the steps between the checkpoint and the end of what is written
//!   are refused and count as lost, those after it continue it. Prometheus' file, pictures and the view show the run at hand alone, and begin anew
//!   with it.
//! * An entry is there whole or not at all: on a full disk, after a process that was killed, and when there is room again.
//!   (A process that is killed may leave a part of its last entry, which opening the file again takes away.) Where
//!   `ulimit -f` limits files, a process must ignore `SIGXFSZ`, which otherwise ends it.
//! * What is lost is told: [`Background::error`] and [`Finished`] have the first step that is, its file and why, and count all.
//!   A file that was removed is made anew; while that cannot be, entries are lost.
//! * No two sinks or processes write to a file of lines at one time: the second is refused. Readers hinder nobody.
//!
//! ```
//! use gradprobe::{Config, Cpu, DType, Plan, Probe, write::{Background, Entry, Prometheus}};
//!
//! let folder = std::env::temp_dir();
//! let plan = Plan::new([("weight", DType::F32, 3)])?;
//! let mut probe = Probe::new(Cpu, plan, Config::new())?;
//! let mut writers = Background::new(vec![Box::new(Prometheus::create(folder.join("gradients.prom"))?)], 16)?;
//! // every step, or every n-th:
//! probe.measure(&[&[1.0, f32::NAN, 2.0]])?;
//! writers.send(Entry::new(probe.wait()?)); // or what `poll` gives, which never waits
//! // at the end:
//! let finished = writers.finish();
//! assert_eq!((finished.error, finished.dropped), (None, 0));
//! # Ok::<(), gradprobe::Error>(())
//! ```

#[cfg(any(feature = "json", feature = "csv", feature = "tensorboard"))]
mod append;
mod background;
#[cfg(feature = "charts")]
pub mod charts;
#[cfg(feature = "csv")]
mod csv;
mod entry;
pub(crate) mod file;
#[cfg(feature = "json")]
mod json;
#[cfg(feature = "live")]
pub mod live;
mod prometheus;
#[cfg(feature = "tensorboard")]
mod tensorboard;

#[cfg(feature = "csv")]
pub use self::csv::Csv;
pub use background::{Background, Finished};
pub(crate) use entry::checked_scalars;
pub use entry::{Entry, EntryTensor};
#[cfg(any(feature = "json", feature = "tensorboard"))]
pub(crate) use file::folder as make_folder;
#[cfg(feature = "json")]
pub use json::{JsonLines, json_gsnr, json_line, json_number, json_tensor};
pub use prometheus::{Prometheus, prometheus_text};
#[cfg(feature = "tensorboard")]
pub use tensorboard::TensorBoard;

use crate::Error;
use std::path::Path;

/// Something that entries are written to.
///
/// A sink that fails is given the next entry all the same: a full disk may have room again.
pub trait Sink: Send {
    /// Writes one entry, whole or not at all.
    ///
    /// # Errors
    /// Usually [`Error::Unwritable`], which names the file.
    fn write(&mut self, entry: &Entry) -> Result<(), Error>;

    /// The file, and the last step that is in it, where steps are not written twice.
    fn last(&self) -> Option<(&Path, u64)> {
        None
    }

    /// Completes what is written. Called once, after the last entry.
    ///
    /// # Errors
    /// Those of [`write`](Self::write).
    fn finish(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
