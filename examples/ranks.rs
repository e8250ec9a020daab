//! Several processes on this machine that train one model on the CPU, and what becomes of it when things go wrong:
//!
//! ```text
//! cargo run --release --example ranks -- --ranks 3
//! ```
//!
//! Each process computes the gradients of its own batch, all average them, and a probe on each clips and updates by AdamW,
//! with the same bits. In one step a bit of one rank's gradient flips, as a faulty GPU may have it: all ranks hear of it in
//! that step, skip it, and say whose it was. At last one process ends without a word, and the others are told which.

use clap::Parser;
use gradprobe::{
    Clip, Config, Cpu, DType, Error, Plan, Probe,
    optim::AdamW,
    ranks::{Ranks, ReplicaCheck, TcpCommunicator, Transport},
};
use std::{
    error::Error as Failure,
    net::TcpListener,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

#[derive(Parser)]
struct Options {
    /// How many processes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=16))]
    ranks: u32,
    /// Steps before one of them ends.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(4..))]
    steps: u64,
    /// Which of them this is; without it, it starts all.
    #[arg(long, requires = "port")]
    rank: Option<u32>,
    /// The port of rank 0, and the one after it.
    #[arg(long)]
    port: Option<u16>,
}

/// How long the others are waited for.
const DEADLINE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match (options.rank, options.port) {
        (Some(rank), Some(port)) => train(&options, rank, port),
        _ => start_all(&options),
    };
    done.map_or_else(
        |error| {
            eprintln!("{error}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

/// This program once for each rank, and how each ends.
fn start_all(options: &Options) -> Result<(), Box<dyn Failure>> {
    let port = free_ports()?;
    let program = std::env::current_exe()?;
    let mut processes = Vec::new();
    for rank in 0..options.ranks {
        let of = [
            ("--ranks", options.ranks.into()),
            ("--steps", options.steps),
            ("--rank", rank.into()),
            ("--port", port.into()),
        ];
        let arguments = of.iter().flat_map(|(name, value): &(&str, u64)| [(*name).to_owned(), value.to_string()]);
        processes.push(Command::new(&program).args(arguments).spawn()?);
    }
    for (rank, process) in processes.iter_mut().enumerate() {
        println!("rank {rank} has ended: {}", process.wait()?);
    }
    Ok(())
}

/// The first of two that nobody listens at.
fn free_ports() -> Result<u16, Box<dyn Failure>> {
    loop {
        let first = TcpListener::bind("127.0.0.1:0")?;
        let port = first.local_addr()?.port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return Ok(port);
        }
    }
}

/// Weights of a linear model, and what it learns.
const WIDTH: usize = 512;
const BATCH: u64 = 64;

/// Numbers in -1..1, the same for the same seed.
fn numbers(seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..WIDTH).map(|_| 2.0 * random.f32() - 1.0).collect()
}

/// Loss and gradients of one batch.
fn gradients(weight: &[f32], bias: f32, batch: u64) -> (f32, Vec<f32>, f32) {
    let (mut loss, mut of_weight, mut of_bias) = (0.0, vec![0.0; WIDTH], 0.0);
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let (truth, share) = (numbers(u64::MAX), 1.0 / BATCH as f32);
    for sample in batch * BATCH..(batch + 1) * BATCH {
        let x = numbers(sample);
        let error = bias + product(weight, &x) - (0.5 + product(&truth, &x));
        loss += share * error * error;
        of_weight.iter_mut().zip(&x).for_each(|(gradient, x)| *gradient += 2.0 * share * error * x);
        of_bias += 2.0 * share * error;
    }
    (loss, of_weight, of_bias)
}

/// The mean over all ranks, in their order: the same bits on each.
fn average(trainer: &TcpCommunicator, values: &mut [f32]) -> Result<(), Error> {
    let all = trainer.all_gather(bytemuck::cast_slice(values))?;
    let ranks = trainer.ranks() as usize;
    let all: Vec<f32> = all.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let length = values.len();
    for (i, value) in values.iter_mut().enumerate() {
        *value = all.iter().skip(i).step_by(length).sum::<f32>() / ranks as f32;
    }
    Ok(())
}

fn train(options: &Options, rank: u32, port: u16) -> Result<(), Box<dyn Failure>> {
    let connect = |port| TcpCommunicator::with_deadline(("127.0.0.1", port), rank, options.ranks, DEADLINE);
    // One for the trainer's own exchange, and one for the probe's.
    let (trainer, communicator) = (connect(port)?, connect(port + 1)?);
    let plan = Plan::new([("weight", DType::F32, WIDTH as u64), ("bias", DType::F32, 1)])?;
    let ranks = Ranks::data_parallel(communicator).replica_check(ReplicaCheck::Strict);
    let config = Config::new().clip(Clip::global_norm(5.0)).optimizer(AdamW::new(0.02)).ranks(ranks);
    let mut probe = Probe::new(Cpu, plan, config)?;
    let (mut weight, mut bias) = (vec![0f32; WIDTH], [0f32]);
    for step in 1.. {
        if step > options.steps && rank + 1 == options.ranks {
            println!("rank {rank}: ends without a word");
            std::process::abort();
        }
        let (loss, mut of_weight, of_bias) =
            gradients(&weight, bias[0], step * u64::from(options.ranks) + u64::from(rank));
        let mut all = [loss, of_bias];
        let begun = Instant::now();
        let averaged = average(&trainer, &mut of_weight).and_then(|()| average(&trainer, &mut all));
        if let Err(error) = averaged {
            println!("rank {rank}: {error}, noticed after {:.1?}", begun.elapsed());
            break;
        }
        if step == options.steps / 2 && rank == 1 {
            println!("rank 1: the last bit of element 300 flips");
            of_weight[300] = f32::from_bits(of_weight[300].to_bits() ^ 1);
        }
        probe.update(&[&of_weight, &[all[1]]], &mut [&mut weight, &mut bias])?;
        let report = probe.wait()?;
        let (norm, skipped) = (report.outputs().total_norm, report.outputs().skip != 0);
        // Only to show it: nobody has to ask.
        let norms = trainer.all_gather(&norm.to_le_bytes())?;
        let bits =
            if norms.chunks(8).all(|other| other == norm.to_le_bytes()) { "the same bits" } else { "other bits" };
        if rank == 0 {
            let skipped = if skipped { ", skipped" } else { "" };
            println!(
                "step {step:3}: loss {:8.3}, norm {norm:.6} with {bits} on {} ranks{skipped}",
                all[0], options.ranks
            );
        }
        if let Some(check) = report.rank_check().filter(|check| check.replicas.is_some()) {
            print!("rank {rank}: {check}");
        }
    }
    Ok(())
}
