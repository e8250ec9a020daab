//! A run that goes bad, watched: the gradients of a net of 12 layers, made up, of which one grows from step 60 on and
//! turns NaN at step 100. Writes everything that `gradprobe::write` can into a folder, and shows it in the terminal with
//! `--live`.
//!
//! ```sh
//! cargo run --release --features writers --example monitor -- /tmp/run
//! tensorboard --logdir /tmp/run/tensorboard
//! ```

use clap::Parser;
use gradprobe::{
    Clip, Config, Cpu, DType, Error, Plan, Probe, Tensor, Verdict,
    gsnr::GsnrConfig,
    health::Rules,
    write::{Background, Csv, Entry, JsonLines, Prometheus, Sink, TensorBoard, charts::ChartFolder, live::Live},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

/// Watches a made-up run that goes bad.
#[derive(Parser)]
struct Options {
    /// Where everything is written.
    folder: PathBuf,
    /// Shows the run in the terminal, in slow motion.
    #[arg(long)]
    live: bool,
}

const LAYERS: usize = 12;
const STEPS: u64 = 110;
const ELEMENTS: usize = 4096;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Error> {
    let folder = &options.folder;
    let tensors = (0..LAYERS).flat_map(|layer| {
        [("weight", ELEMENTS), ("bias", 64)]
            .map(|(what, len)| (format!("layers.{layer}.{what}"), DType::F32, len as u64))
    });
    let plan = Plan::new(tensors)?;
    let config =
        Config::new().clip(Clip::global_norm(1.0)).tracking(GsnrConfig::new()).histogram().rules(Rules::default());
    let mut probe = Probe::new(Cpu, plan.clone(), config)?;

    // The first makes the folder; the others need it.
    let mut sinks: Vec<Box<dyn Sink>> = vec![
        Box::new(TensorBoard::create(folder.join("tensorboard"))?),
        Box::new(ChartFolder::create(folder.join("pictures"), &plan)?),
        Box::new(JsonLines::open(folder.join("steps.jsonl"))?),
        Box::new(Csv::open(folder.join("tensors.csv"))?),
        Box::new(Prometheus::create(folder.join("gradients.prom"))?),
    ];
    if options.live {
        sinks.push(Box::new(Live::start(&plan, || std::process::exit(130))?));
    }
    let mut writers = Background::new(sinks, 128)?;
    let mut first_bad = None;
    for step in 1..=STEPS {
        let gradients: Vec<Vec<f32>> =
            plan.tensors().iter().enumerate().map(|(index, tensor)| gradient(step, index, tensor.len)).collect();
        let gradients: Vec<&dyn Tensor> = gradients.iter().map(|gradient| gradient as _).collect();
        probe.measure(&gradients)?;
        let report = probe.wait()?;
        let diagnosis = report.diagnosis().cloned();
        let mut entry = Entry::new(report);
        if let Some(diagnosis) = diagnosis {
            entry = entry.with_diagnosis(&diagnosis)?;
            if diagnosis.verdict() == Verdict::Critical && first_bad.is_none() {
                first_bad = Some(diagnosis);
            }
        }
        // What costs more than a read is for every fifth step.
        if step % 5 == 0 {
            entry =
                entry.with_histogram(probe.histogram()?.measure(&gradients)?)?.with_gsnr(probe.gsnr()?.report()?)?;
        }
        writers.send(entry);
        if options.live {
            thread::sleep(Duration::from_millis(40));
        }
    }
    let finished = writers.finish();
    if let Some(diagnosis) = first_bad {
        println!("{diagnosis}");
    }
    let (dropped, lost) = (finished.dropped, finished.lost);
    println!("{STEPS} steps, {dropped} of them dropped, {lost} lost. In {}:", folder.display());
    list(folder, folder);
    finished.error.map_or(Ok(()), Err)
}

/// Noise around a small mean; the sizes of the layers differ a little. Layer 7 goes bad.
fn gradient(step: u64, index: usize, len: u64) -> Vec<f32> {
    let layer = index / 2;
    let grows = if layer == 7 { 1.2f32.powi(i32::try_from(step.saturating_sub(60)).unwrap_or(0)) } else { 1.0 };
    let size = 1e-3 * (1.0 + 0.1 * layer as f32) * grows;
    let mut state = (step << 32) ^ ((index as u64) << 20);
    let mut gradient: Vec<f32> = (0..len).map(|_| size * (0.2 + uniform(&mut state) + uniform(&mut state))).collect();
    if step >= 100 && index == 14 {
        gradient[1234] = f32::NAN;
    }
    gradient
}

/// The next number between −1 and 1, by SplitMix64.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

/// Prints the files below a folder with their sizes.
fn list(root: &Path, folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            list(root, &path);
        } else {
            let size = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            println!("{size:>10} bytes  {}", path.strip_prefix(root).unwrap_or(&path).display());
        }
    }
}
