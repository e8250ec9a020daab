//! Reads every gradient once: statistics, norms and the global clip. The GPU works without the host waiting; the CPU
//! gives the same bits.
//!
//! ```
//! use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe};
//!
//! let (mut weight, mut bias) = (vec![0.3f32; 4096], vec![half::bf16::from_f32(-4.0); 64]);
//! let plan = Plan::new([("weight", DType::F32, 4096), ("bias", DType::BF16, 64)])?;
//! let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::global_norm(1.0)))?;
//! // every step:
//! probe.step(&mut [&mut weight, &mut bias])?;
//! let report = probe.wait()?; // or `poll`, which never waits
//! assert!((report.outputs().total_norm - 37.3).abs() < 0.1);
//! # Ok::<(), gradprobe::Error>(())
//! ```
//!
//! A [`Probe`] works on a device: [`Cpu`] and, with the `cuda` feature, [`Cuda`](cuda::Cuda) compute the same numbers
//! to the bit. A [`Plan`] lists the tensors, a [`Config`] declares the work, and a [`Report`] gives a [`Record`] for
//! each tensor.

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod clip;
mod config;
#[doc(hidden)]
pub mod device;
pub mod dot;
mod dtype;
mod error;
mod features;
pub mod gsnr;
#[cfg(any(doc, doctest))]
pub mod guide;
pub mod health;
pub mod histogram;
pub mod history;
mod measure;
pub mod micro_batches;
pub mod optim;
mod plan;
mod probe;
pub mod ranks;
pub mod samples;
mod spec;
pub mod statistics;
pub mod tensor;
mod watch;
pub mod write;

pub use clip::Clip;
pub use config::{Config, NonFinitePolicy};
#[cfg(feature = "cuda")]
pub use cudarc;
pub use device::Cpu;
#[cfg(feature = "cuda")]
pub use device::cuda;
pub use dtype::{DType, Element};
pub use error::Error;
pub use health::{Diagnosis, Finding, FindingKind, Rules, Verdict};
pub use measure::{Record, Report, StepOutputs, TensorReport};
pub use plan::{Plan, TensorSpec};
pub use probe::{Addresses, Probe, ProbeState, Room};
pub use tensor::{Absent, HostTensor, HostTensorMut, RawTensor, Tensor, TensorMut};
pub use watch::{Watch, WatchedStep};

/// The text of `gradprobe.h`, which declares [`StepOutputs`] and [`Record`] for C, C++ and CUDA. Put it in place of the
/// `#include` in a kernel that NVRTC compiles: NVRTC would look for the file in a folder.
pub const HEADER: &str = include_str!("../kernels/include/gradprobe.h");
