//! One read of every gradient: statistics, norms and the global clip, on the GPU without the host waiting, with the
//! same bits from the CPU.
//!
//! ```
//! use gradprobe::{Config, CpuProbe, DType, HostTensor, HostTensorMut, Plan};
//!
//! let mut weight = vec![0.3f32; 4096];
//! let mut bias = vec![half::bf16::from_f32(-4.0); 64];
//! let plan = Plan::new([("weight", DType::F32, 4096), ("bias", DType::BF16, 64)])?;
//! let mut probe = CpuProbe::new(plan, Config::default().max_norm(1.0))?;
//! // every step:
//! let report = probe.measure(&[HostTensor::F32(&weight), HostTensor::BF16(&bias)])?;
//! assert!((report.outputs().total_norm - 37.3).abs() < 0.1);
//! probe.clip(&mut [HostTensorMut::F32(&mut weight), HostTensorMut::BF16(&mut bias)])?;
//! # Ok::<(), gradprobe::Error>(())
//! ```
//!
//! [`CpuProbe`] and, with the `cuda` feature, `CudaProbe` compute the same numbers to the bit; both are described by
//! one [`Plan`], one [`Config`] and one [`Report`] of [`Record`]s.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod accumulation;
mod adam;
mod adaptive;
mod backend;
mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dot;
mod dtype;
mod error;
mod gsnr;
pub mod health;
mod histogram;
mod history;
pub mod launch;
mod loss_scale;
mod micro_batches;
#[doc = include_str!("statistics.md")]
pub mod statistics {}
mod outputs;
mod plan;
mod policy;
pub mod ranks;
mod record;
mod report;
mod samples;
mod spec;
pub mod write;

pub use accumulation::{AccumulationNoise, Estimate, NoiseEstimate, NoiseScale};
pub use adam::{AdamMoments, AdamStep};
pub use adaptive::{AdaptiveClip, AdaptiveClipReport, AdaptiveRecord};
pub use backend::{Backend, HostTensor, HostTensorMut};
pub use config::{Config, NonFinitePolicy};
pub use cpu::CpuProbe;
#[cfg(feature = "cuda")]
pub use cuda::CudaProbe;
#[cfg(feature = "cuda")]
pub use cudarc;
pub use dot::{Dot, DotReport};
pub use dtype::{DType, Element};
pub use error::Error;
pub use gsnr::{GsnrConfig, GsnrRecord, GsnrReport};
pub use health::{Finding, FindingKind, Severity, Verdict};
pub use histogram::{Bounds, Format, FormatShares, Histogram, HistogramReport};
pub use history::{HistoryReport, HistoryStep, HistoryTensor, NormStatistics};
pub use loss_scale::LossScale;
pub use micro_batches::MicroBatchReport;
pub use outputs::StepOutputs;
pub use plan::{Plan, TensorSpec};
pub use policy::ClipPolicy;
pub use ranks::RankReport;
pub use record::Record;
pub use report::{Report, TensorReport};
pub use samples::{SampleConfig, SamplePlace, SampleReport};

/// The README's code, compiled.
#[cfg(all(doctest, feature = "cuda"))]
#[doc = include_str!("../README.md")]
mod readme {}
