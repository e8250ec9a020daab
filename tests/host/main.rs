//! What needs no kernel: the CPU against the oracle, the oracle and the checkers themselves, the host's own calculations,
//! and what a probe asks of a device. One program, as `tests/kernels` is, for the time that it takes to build.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/health.rs"]
mod models;
#[path = "../on_cpu/mod.rs"]
mod on_cpu;

mod absent;
mod accumulation;
mod accuracy;
mod checkers;
mod checkers_gsnr;
mod cpu;
mod declared;
mod harness;
mod health;
mod health_default;
mod health_run;
mod health_updates;
mod misuse;
mod oracle;
mod peers;
mod processes;
mod properties;
mod reads;
mod state;
mod watch;
