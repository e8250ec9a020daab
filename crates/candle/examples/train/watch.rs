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
    histogram::HistogramReport,
    write::{Background, Entry, Finished, JsonLines, Sink, TensorBoard, charts::ChartFolder},
};
use gradprobe_candle::{CandleProbe, Clip, Config, GsnrConfig, NonFinitePolicy, Report, Rules, adamw};
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
/// Steps from one look at elements to the next, histogram and signal to noise: reads of their own, each a quarter of a
/// millisecond here.
const LOOKS: u64 = 10;

/// Measures, clips, diagnoses and writes.
pub struct Watch {
    probe: CandleProbe,
    /// Whether its optimizer moves the weights.
    updates: bool,
    /// On the sums of micro-batches, when there are several in a step.
    accumulation: Option<Accumulation>,
    writers: Background,
    steps: u64,
    /// The last that was given.
    given: u64,
    /// Of this step, until its report comes.
    histogram: Option<(u64, HistogramReport)>,
    noise: Noise,
    time: Duration,
}

/// Signal and noise as they were last looked at.
#[derive(Clone, Copy, Default)]
struct Noise {
    gsnr: Option<f64>,
    scale: Option<f64>,
}

struct Accumulation {
    probe: CandleProbe,
    noise: AccumulationNoise,
    micro_batches: u32,
}

/// What a step's report says.
pub struct Seen {
    pub step: u64,
    pub norm: f64,
    pub coefficient: f64,
    /// Whether the optimizer should leave the step out.
    pub skip: bool,
    /// The median over the tensors of the median signal-to-noise ratio of their elements.
    pub gsnr: Option<f64>,
    /// tr Σ / |G|², in batches.
    pub noise_scale: Option<f64>,
    pub diagnosis: Diagnosis,
}

impl Watch {
    pub fn new(variables: &VarMap, options: &Options, parameters: &ParamsAdamW, device: &Device) -> Result<Self> {
        let updates = options.optimizer != Choice::Candle;
        // On a GPU the word that a step is to be skipped comes after it, for an optimizer that does not read it there: what is
        // not finite is left out of it instead.
        let late = device.is_cuda() && !updates;
        let non_finite = if late { NonFinitePolicy::ZeroNonFinite } else { NonFinitePolicy::Skip };
        let config = if updates { Config::new().optimizer(adamw(parameters)) } else { Config::new() };
        let config = config
            .clip(Clip::global_norm(MAX_NORM))
            .non_finite(non_finite)
            .tracking(GsnrConfig::new().window(WINDOW))
            .histogram()
            .rules(Rules::default().learning_rate(options.lr));
        let probe = CandleProbe::new(variables, config)?;
        // An update measures its weights anyway.
        let probe = if updates { probe } else { probe.with_weights()? };
        let accumulation = match options.accumulate {
            1 => None,
            micro_batches => {
                let probe = CandleProbe::new(variables, Config::new())?;
                let noise = AccumulationNoise::new(probe.plan().clone(), micro_batches)?.decay(DECAY)?;
                Some(Accumulation { probe, noise, micro_batches })
            }
        };
        let writers = Background::new(sinks(&options.out, &probe)?, 256)?;
        Ok(Self {
            probe,
            updates,
            accumulation,
            writers,
            steps: 0,
            given: 0,
            histogram: None,
            noise: Noise::default(),
            time: Duration::ZERO,
        })
    }

    /// The names of the variables, in their natural order.
    pub fn names(&self) -> Vec<String> {
        self.probe.plan().tensors().iter().map(|tensor| tensor.name.clone()).collect()
    }

    /// Lets the diagnosis know the learning rate, by which it tells what is too large a gradient.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        Ok(self.probe.probe().set_rules(Rules::default().learning_rate(learning_rate))?)
    }

    /// Sets the learning rate of its optimizer.
    pub fn set_rate(&mut self, learning_rate: f64) -> Result<()> {
        let start = Instant::now();
        if self.updates {
            self.probe.probe().optimizer()?.set_learning_rate(learning_rate)?;
        }
        self.time += start.elapsed();
        Ok(())
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

    /// Measures the gradients of a step, clips them or moves the weights by them, and gives the reports that have arrived: on
    /// the CPU this step's.
    pub fn step(&mut self, gradients: &mut GradStore) -> Result<Vec<Seen>> {
        let start = Instant::now();
        self.steps += 1;
        // In the pictures one column of many.
        if self.steps.is_multiple_of(LOOKS) {
            self.histogram =
                Some((self.steps, self.probe.lend(gradients, |probe, tensors| probe.histogram()?.measure(tensors))?));
        }
        if self.updates {
            self.probe.update(gradients)?;
        } else {
            self.probe.step(gradients)?;
        }
        let mut seen = Vec::new();
        while let Some(measured) = self.probe.poll()? {
            seen.push(self.seen(measured)?);
        }
        self.time += start.elapsed();
        Ok(seen)
    }

    /// The report that is still on its way.
    pub fn rest(&mut self) -> Result<Vec<Seen>> {
        let last = self.probe.wait()?;
        if last.step() == self.given { Ok(Vec::new()) } else { Ok(vec![self.seen(last)?]) }
    }

    fn seen(&mut self, measured: Report) -> Result<Seen> {
        let step = measured.step();
        self.given = step;
        let gsnr = if step.is_multiple_of(LOOKS) { self.tracked()? } else { None };
        if let Some(gsnr) = &gsnr {
            self.noise = Noise { gsnr: median(gsnr), scale: gsnr.noise_scale() };
        }
        let diagnosis = measured.diagnosis().ok_or("no rules were given")?.clone();
        let outputs = *measured.outputs();
        let accumulated = self.accumulation.as_ref().map(|accumulation| accumulation.noise.total().noise_scale.value());
        let seen = Seen {
            step,
            norm: outputs.total_norm,
            coefficient: outputs.coefficient_f64,
            skip: outputs.skip != 0,
            gsnr: self.noise.gsnr,
            noise_scale: accumulated.unwrap_or(self.noise.scale),
            diagnosis,
        };
        let mut entry = Entry::new(measured).with_diagnosis(&seen.diagnosis)?;
        if let Some(gsnr) = gsnr {
            entry = entry.with_gsnr(gsnr)?;
        }
        if let Some((_, histogram)) = self.histogram.take_if(|(of, _)| *of == step) {
            entry = entry.with_histogram(histogram)?;
        }
        self.writers.send(entry);
        Ok(seen)
    }

    /// Signal and noise of what is tracked.
    fn tracked(&mut self) -> Result<Option<GsnrReport>> {
        match self.probe.probe().gsnr()?.report() {
            Ok(gsnr) => Ok(Some(gsnr)),
            Err(gradprobe::Error::TooFewSteps { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Host time so far.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// Writes what is left.
    pub fn finish(self) -> Finished {
        self.writers.finish()
    }
}

/// The median of the tensors' medians.
fn median(report: &GsnrReport) -> Option<f64> {
    let mut medians: Vec<f64> = report.tensors().filter_map(|(_, record)| record.median()).collect();
    medians.sort_by(f64::total_cmp);
    medians.get(medians.len() / 2).copied()
}

/// TensorBoard events, JSON lines and pictures, in place of those of an earlier run.
fn sinks(folder: &Path, probe: &CandleProbe) -> Result<Vec<Box<dyn Sink>>> {
    let lines = folder.join("steps.jsonl");
    let events = folder.join("tensorboard");
    let named = |error: io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(&events).map_err(named)?;
    for file in fs::read_dir(&events).map_err(named)? {
        let file = file.map_err(named)?;
        if file.file_name().to_string_lossy().contains(".gradprobe.") {
            fs::remove_file(file.path()).map_err(named)?;
        }
    }
    let pictures = folder.join("pictures");
    for old in [&lines, &pictures.join("first-critical.svg")] {
        if old.exists() {
            fs::remove_file(old).map_err(named)?;
        }
    }
    Ok(vec![
        Box::new(TensorBoard::create(events)?),
        Box::new(JsonLines::open(lines)?),
        Box::new(ChartFolder::create(pictures, probe.plan())?),
    ])
}

/// The verdict with the worst finding in a few words: what is not finite, where that began.
pub fn words(diagnosis: &Diagnosis) -> String {
    let verdict = diagnosis.verdict();
    let Some(finding) = diagnosis.findings().first() else { return verdict.to_string() };
    let began = diagnosis.frontier().filter(|frontier| frontier.step == diagnosis.step());
    let tensor = began.map(|frontier| frontier.tensor.as_str()).or(finding.tensor.as_deref());
    format!("{verdict}: {} in {}", finding.kind, tensor.unwrap_or("all tensors"))
}
