//! Runs the kernels on the caller's CUDA stream, over the caller's memory.
//!
//! ```no_run
//! use gradprobe::{Clip, Config, DType, Plan, Probe, cuda::{self, Cuda}};
//!
//! let stream = cuda::stream(0)?; // or a trainer's own
//! let mut weight = stream.alloc_zeros::<half::bf16>(4096)?;
//! let mut bias = stream.alloc_zeros::<f32>(64)?;
//! let plan = Plan::new([("weight", DType::BF16, 4096), ("bias", DType::F32, 64)])?;
//! let mut probe = Probe::new(Cuda::new(&stream)?, plan, Config::new().clip(Clip::global_norm(1.0)))?;
//! for _step in 0..100 {
//!     // backward(...), and then:
//!     probe.step(&mut [&mut weight, &mut bias])?; // two launches
//!     if let Some(report) = probe.poll()? {
//!         println!("{report}"); // of this step or an earlier one; never waits
//!     }
//!     // the optimizer's step: it reads `skip` at `probe.addresses().outputs`, or asks `probe.wait()?.skip()` before
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Streams and graphs
//!
//! Everything is ordered on the stream the probe was made with. Slices and views go through cudarc's own event
//! tracking; with a [`RawTensor`](crate::RawTensor) the caller keeps the order. A slice must be of the very context of
//! the stream: two `CudaContext`s of one device know nothing of each other's streams.
//!
//! Measuring and clipping can be captured into a graph on a stream that is not the default one: make the probe, and
//! [`bind`](crate::Probe::bind) the tensors, before the capture begins. A replay measures the addresses then in the
//! table, so gradients may move between replays by another `bind`. cudarc's waits on events from before a capture are
//! not legal in it: capture with its event tracking off, or give a `RawTensor`.
//!
//! [`poll`](crate::Probe::poll) copies a step's results on a stream of the probe's own, so that no copy is between a
//! trainer's kernels; the next launch waits for the copy, on the device. After the first `bind` it copies on the stream
//! of the launches: the probe does not see the replay of a graph, which would not wait.
//!
//! Uploads, such as the addresses of gradients that have moved, go through page-locked memory, which is used again when
//! its copy is over. A host that is more than four uploads ahead of the device allocates more of it and does not wait:
//! in the end as much as was under way at one time.
//!
//! Calls that set values are refused during a capture ([`Error::UploadInCapture`](crate::Error::UploadInCapture)).
//!
//! # The cost of cudarc's event tracking
//!
//! In a context with more streams than the default one, such as that of [`stream`], cudarc has the probe's stream wait
//! for the events of each slice it is given and records another. For n slices `measure` makes 2 n calls of the driver
//! beside its launch, `step` 3 n, even where all slices are of the probe's own stream. A probe cannot leave them out.
//! Safe code may have written a slice on any stream, which only the slice's events tell. The next write, on any stream,
//! waits for the probe only by the recorded event. There are three ways to avoid these calls:
//!
//! * the default stream, `context.default_stream()`, with no other stream made by cudarc in that context (the probe's own
//!   for copies does not count);
//! * `unsafe { context.disable_event_tracking() }` before the slices are made: the caller then keeps the order between
//!   streams;
//! * [`RawTensor`](crate::RawTensor), whose maker vouches for that order.
//!
//! # Errors
//!
//! An error may stem from an earlier asynchronous call, of the caller's or of a `drop`: CUDA and cudarc report those
//! with the next call of any kind.
#![allow(unsafe_code, reason = "calls the CUDA driver")]

mod copied;
mod device;
mod driver;
mod memory;
mod module;
#[cfg(feature = "nccl")]
mod nccl;
mod pinned;
mod streams;
mod tensor;

pub(crate) use copied::Copied;
pub use device::Cuda;
pub use driver::stream;
#[doc(hidden)]
pub use module::{FATBIN, compile};
#[cfg(feature = "nccl")]
pub use nccl::NcclCommunicator;
pub(crate) use tensor::note;
