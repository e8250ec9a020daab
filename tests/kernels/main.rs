//! The kernels on the host, feature by feature, against the CPU and the oracle: one program, of which `.ci/run` runs all
//! modules on PTX, and most under the sanitizers. Each on its own, these modules took twice the time to build, three times
//! in a run of CI.

#[path = "../common/mod.rs"]
mod common;
#[path = "../require/mod.rs"]
mod require;

mod adam;
mod adaptive;
mod dot;
mod gsnr;
mod health_words;
mod histogram;
mod history;
mod layouts;
mod loss_scale;
mod micro_batches;
mod optimizer;
mod policies;
mod ranks;
mod samples;
mod simt;
mod weights;
