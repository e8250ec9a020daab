//! Writes steps down: JSON lines, CSV, Prometheus' text, TensorBoard's event files, pictures and a view in the
//! terminal.
//!
//! An [`Entry`] holds the numbers of a step; a [`Sink`] writes entries; [`Background`] runs sinks on a thread of its
//! own, so that no disk and no terminal ever holds up training. All of them accept NaN, Inf and names of any
//! characters.
//!
//! # Guarantees
//!
//! * Steps rise, and none is written twice. A file of JSON lines or CSV, and the event files of a folder, are one run:
//!   they are continued after their last whole step. A step that is not after it is refused by [`Error::StepWritten`],
//!   and the content stays. So a new run needs a place of its own. A run that goes on from a checkpoint restores its
//!   probe's state ([`Probe::restore`](crate::Probe::restore)): the steps between the checkpoint and the last written
//!   one are refused and count as lost, those after it continue the file. ([`Watch`](crate::Watch) leaves them out.) Prometheus' file, pictures and the view show
//!   the present run alone, and begin anew with it.
//! * An entry is there whole or not at all: on a full disk, after a process was killed, and when there is room again.
//!   (A killed process may leave a part of its last entry; opening the file again removes it.) Where `ulimit -f` limits
//!   files, a process must ignore `SIGXFSZ`, which otherwise ends it.
//! * Losses are reported: [`Background::error`] and [`Finished`] give the first lost step, its file and the reason, and
//!   count all. A removed file is made anew; while that fails, entries are lost.
//! * No two sinks or processes write to a file of lines at one time: the second is refused. Readers do not block
//!   writers.
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
//! writers.send(Entry::new(probe.wait()?)); // or the report of `poll`, which never waits
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

/// Takes entries and writes them.
///
/// A sink that fails is still given the next entry: a full disk may have room again.
pub trait Sink: Send {
    /// Writes one entry, whole or not at all.
    ///
    /// # Errors
    /// Usually [`Error::Unwritable`], which names the file.
    fn write(&mut self, entry: &Entry) -> Result<(), Error>;

    /// The file and its last step, where steps are not written twice.
    fn last(&self) -> Option<(&Path, u64)> {
        None
    }

    /// Completes the files. Called once, after the last entry.
    ///
    /// # Errors
    /// Those of [`write`](Self::write).
    fn finish(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
