//! All that gradprobe does in the run, and how long it takes of it.

use crate::{
    Result,
    options::{Choice, Options},
};
use candle_core::{Device, backprop::GradStore};
use candle_nn::{ParamsAdamW, VarMap};
use gradprobe::{
    gsnr::{AccumulationNoise, GsnrReport},
    health::Diagnosis,
    write::{Finished, charts::ChartFolder},
};
use gradprobe_candle::{CandleProbe, Clip, Config, GsnrConfig, NonFinitePolicy, WatchedStep, adamw};
use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

/// Norm to which the gradients are clipped together.
pub const MAX_NORM: f64 = 1.0;
/// Steps over which signal and noise are told apart, before that begins anew: the weights change meanwhile.
const WINDOW: u32 = 25;
/// The same of accumulations: how much an earlier one weighs against the next.
const DECAY: f64 = 0.95;

/// Measures, clips, diagnoses and writes.
pub struct Watch {
    watch: gradprobe_candle::Watch,
    /// Whether its optimizer moves the weights.
    updates: bool,
    /// On the sums of micro-batches, when there are several in a step.
    accumulation: Option<Accumulation>,
    noise: Noise,
    time: Duration,
}

/// Signal and noise as they were last looked at.
#[derive(Clone, Copy, Default)]
pub struct Noise {
    /// The median over the tensors of the median signal-to-noise ratio of their elements.
    pub gsnr: Option<f64>,
    /// tr Σ / |G|², in batches.
    pub scale: Option<f64>,
}

struct Accumulation {
    probe: CandleProbe,
    noise: AccumulationNoise,
    micro_batches: u32,
}

impl Watch {
    pub fn new(variables: &VarMap, options: &Options, parameters: &ParamsAdamW, device: &Device) -> Result<Self> {
        let updates = options.optimizer != Choice::Candle;
        // On a GPU the word that a step is to be skipped comes after it, for an optimizer that does not read it there: what is
        // not finite is left out of it instead.
        let late = device.is_cuda() && !updates;
        let non_finite = if late { NonFinitePolicy::ZeroNonFinite } else { NonFinitePolicy::Skip };
        let config = Config::full()
            .clip(Clip::global_norm(MAX_NORM))
            .non_finite(non_finite)
            .tracking(GsnrConfig::new().window(WINDOW));
        // An update measures its weights anyway.
        let probe = if updates {
            CandleProbe::new(variables, config.optimizer(adamw(parameters)))?
        } else {
            CandleProbe::new(variables, config)?.with_weights()?
        };
        let accumulation = match options.accumulate {
            1 => None,
            micro_batches => {
                let probe = CandleProbe::new(variables, Config::new())?;
                let noise = AccumulationNoise::new(probe.plan().clone(), micro_batches)?.decay(DECAY)?;
                Some(Accumulation { probe, noise, micro_batches })
            }
        };
        remove_earlier(&options.out)?;
        let pictures = ChartFolder::create(options.out.join("pictures"), probe.plan())?;
        let mut watch = gradprobe_candle::Watch::from(probe);
        watch.write_to(&options.out)?;
        watch.sink(pictures);
        // The table and the summary tell.
        watch.quiet();
        Ok(Self { watch, updates, accumulation, noise: Noise::default(), time: Duration::ZERO })
    }

    /// The names of the variables, in their natural order.
    pub fn names(&mut self) -> Vec<String> {
        self.watch.probe().plan().tensors().iter().map(|tensor| tensor.name.clone()).collect()
    }

    /// Looks at the sum of the first micro-batches of a step.
    pub fn micro_batch(&mut self, gradients: &GradStore) -> Result<()> {
        let start = Instant::now();
        if let Some(Accumulation { probe, noise, micro_batches }) = &mut self.accumulation {
            probe.measure(gradients)?;
            while let Some(measured) = probe.poll()? {
                let before = (measured.step() - 1) % u64::from(*micro_batches);
                noise.add(1 + u32::try_from(before)?, &measured)?;
            }
        }
        self.time += start.elapsed();
        Ok(())
    }

    /// Measures the gradients of a step, clips them or moves the weights by them at this learning rate, and gives the last step whose
    /// report has arrived: on the CPU this one.
    pub fn step(
        &mut self,
        step: u64,
        gradients: &mut GradStore,
        loss: f32,
        learning_rate: f64,
    ) -> Result<Option<WatchedStep>> {
        let start = Instant::now();
        let scalars = [("loss", loss.into()), ("lr", learning_rate)];
        let seen = if self.updates {
            self.watch.probe().probe().optimizer()?.set_learning_rate(learning_rate)?;
            self.watch.update(step, gradients, scalars)?
        } else {
            self.watch.step(step, gradients, scalars)?
        };
        self.time += start.elapsed();
        Ok(seen)
    }

    /// The last step, if it was still on its way: after this one.
    pub fn rest(&mut self, shown: u64) -> Result<Option<WatchedStep>> {
        Ok(self.watch.wait()?.filter(|last| last.step() > shown))
    }

    /// Signal and noise up to this step.
    pub fn noise(&mut self, seen: &WatchedStep) -> Noise {
        if let Some(gsnr) = seen.entry().gsnr() {
            self.noise = Noise { gsnr: median(gsnr), scale: gsnr.noise_scale() };
        }
        let accumulated = self.accumulation.as_ref().map(|accumulation| accumulation.noise.total().noise_scale.value());
        Noise { scale: accumulated.unwrap_or(self.noise.scale), ..self.noise }
    }

    /// Host time so far.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// Writes what is left.
    pub fn finish(mut self) -> Result<Finished> {
        Ok(self.watch.finish()?)
    }
}

/// The median of the tensors' medians.
fn median(report: &GsnrReport) -> Option<f64> {
    let mut medians: Vec<f64> = report.tensors().filter_map(|(_, record)| record.median()).collect();
    medians.sort_by(f64::total_cmp);
    medians.get(medians.len() / 2).copied()
}

/// Makes room for a new run: a file of steps goes on, and no step is written twice.
fn remove_earlier(folder: &Path) -> Result<()> {
    let named = |error: io::Error| format!("{}: {error}", folder.display());
    let events = folder.join("tensorboard");
    fs::create_dir_all(&events).map_err(named)?;
    let mut old = vec![folder.join("steps.jsonl"), folder.join("pictures/first-critical.svg")];
    for file in fs::read_dir(&events).map_err(named)? {
        let file = file.map_err(named)?;
        // A trainer may have others beside ours.
        if file.file_name().to_string_lossy().contains(".gradprobe.") {
            old.push(file.path());
        }
    }
    for file in old.into_iter().filter(|file| file.exists()) {
        fs::remove_file(file).map_err(named)?;
    }
    Ok(())
}

/// The verdict with the worst finding in a few words: what is not finite, where that began.
pub fn words(diagnosis: &Diagnosis) -> String {
    let verdict = diagnosis.verdict();
    let Some(finding) = diagnosis.findings().first() else { return verdict.to_string() };
    let began = diagnosis.frontier().filter(|frontier| frontier.step == diagnosis.step());
    let tensor = began.map(|frontier| frontier.tensor.as_str()).or(finding.tensor.as_deref());
    format!("{verdict}: {} in {}", finding.kind, tensor.unwrap_or("all tensors"))
}
