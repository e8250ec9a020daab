//! The loop.

use crate::{
    Result,
    fault::{self, Fault},
    model::{self, Model},
    options::{Choice, Options},
    report,
    summary::{Costs, Summary},
    table::Table,
    text::Text,
    watch::Watch,
};
use candle_core::{DType, Device, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss::cross_entropy};
use gradprobe_candle::WatchedStep;
use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

/// Steps at either end of the run whose losses the summary gives.
const ENDS: usize = 10;
/// Steps in which the learning rate rises to its value.
const WARM_UP: u32 = 20;

pub fn run(options: &Options, device: &Device) -> Result<()> {
    let text = Text::new();
    let mut random = fastrand::Rng::with_seed(options.seed);
    let mut variables = VarMap::new();
    let builder = VarBuilder::from_varmap(&variables, DType::F32, device);
    let model = Model::new(text.alphabet(), options.fault == Some(Fault::Sigmoid), &builder)?;
    let parameters = ParamsAdamW { lr: options.lr, weight_decay: 0.0, ..ParamsAdamW::default() };
    let mut watch = Watch::new(&variables, options, &parameters, device)?;
    model::seed(&mut variables, &watch.names(), &mut random)?;
    let mut candle = Candle::new(&variables, options.optimizer, parameters)?;

    let mut rate = options.lr;
    let middle = options.steps.div_ceil(2);
    let mut training = Training {
        losses: Vec::new(),
        shown: 0,
        table: Table::new(options.steps.into())?,
        summary: Summary::default(),
    };
    let mut time = Duration::ZERO;
    for step in 1..=options.steps {
        let strikes = |fault| step == middle && options.fault == Some(fault);
        if strikes(Fault::Lr) {
            rate *= fault::RATE;
        }
        let warm = rate * f64::from(step.min(WARM_UP)) / f64::from(WARM_UP);
        if strikes(Fault::Dead) {
            fault::kill_units(&variables)?;
        }
        let start = Instant::now();
        let mut sum = GradStore::default();
        let mut losses = 0.0;
        for _ in 0..options.accumulate {
            let (inputs, targets) = text.batch(options.batch as usize, &mut random, device)?;
            let scores = model.forward(&inputs, strikes(Fault::Nan))?;
            let loss = (cross_entropy(&scores, &targets)? / f64::from(options.accumulate))?;
            add(&mut sum, loss.backward()?, &variables)?;
            // On a GPU this waits, as every trainer does that prints its loss.
            losses += loss.to_scalar::<f32>()?;
            watch.micro_batch(&sum)?;
        }
        training.losses.push(losses);
        // By turns, so that neither has the caches always after the other.
        let beside = options.optimizer == Choice::Both && step % 2 == 0;
        let mut other = if beside { candle.step(&sum, warm)? } else { Duration::ZERO };
        let seen = watch.step(step.into(), &mut sum, losses, warm)?;
        if !beside && !seen.as_ref().is_some_and(WatchedStep::skip) {
            other += candle.step(&sum, warm)?;
        }
        time += start.elapsed();
        if options.optimizer == Choice::Both {
            time -= other;
        }
        training.show(seen, &mut watch)?;
    }
    training.show(watch.rest(training.shown)?, &mut watch)?;
    let costs = Costs { steps: time, gradprobe: watch.time(), candle: candle.time, optimizer: options.optimizer };
    let finished = watch.finish()?;
    report::make(&[&options.out], &options.out.join("report.html"), true)?;
    let ends = training.ends();
    let said = training.summary.text(ends, &costs, &finished, &options.out);
    io::stdout().write_all(said.as_bytes())?;
    Ok(())
}

/// Candle's AdamW, if it is wanted: on the variables, or on copies of them.
struct Candle {
    optimizer: Option<AdamW>,
    /// The variables, and what it moves of each.
    variables: Vec<(Var, Var)>,
    time: Duration,
}

impl Candle {
    fn new(variables: &VarMap, choice: Choice, parameters: ParamsAdamW) -> Result<Self> {
        let of = |variable: Var| -> Result<(Var, Var)> {
            let moved = if choice == Choice::Both { Var::from_tensor(&variable.copy()?)? } else { variable.clone() };
            Ok((variable, moved))
        };
        let variables = variables.all_vars().into_iter().map(of).collect::<Result<Vec<_>>>()?;
        let moved = variables.iter().map(|(_, moved)| moved.clone()).collect();
        let optimizer = if choice == Choice::Gradprobe { None } else { Some(AdamW::new(moved, parameters)?) };
        Ok(Self { optimizer, variables, time: Duration::ZERO })
    }

    /// Takes a step, and gives the time of all that.
    fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<Duration> {
        let Some(optimizer) = &mut self.optimizer else { return Ok(Duration::ZERO) };
        let begin = Instant::now();
        let mut own = GradStore::default();
        for (variable, moved) in &self.variables {
            if let Some(gradient) = gradients.get(variable) {
                own.insert(moved, gradient.clone());
            }
        }
        optimizer.set_learning_rate(learning_rate);
        let start = Instant::now();
        optimizer.step(&own)?;
        self.time += start.elapsed();
        Ok(begin.elapsed())
    }
}

/// What is shown of a run.
struct Training {
    losses: Vec<f32>,
    /// The last step that was shown.
    shown: u64,
    table: Table,
    summary: Summary,
}

impl Training {
    fn show(&mut self, seen: Option<WatchedStep>, watch: &mut Watch) -> Result<()> {
        let Some(seen) = seen else { return Ok(()) };
        self.shown = seen.step();
        let diagnosis = seen.report().diagnosis().ok_or("no rules were given")?;
        self.summary.add(&seen, diagnosis);
        let noise = watch.noise(&seen);
        if self.table.shows(&seen, diagnosis) {
            let loss = self.losses[usize::try_from(seen.step() - 1)?];
            self.table.line(&seen, diagnosis, (loss, noise))?;
        }
        Ok(())
    }

    /// The mean losses of the first and the last steps.
    fn ends(&self) -> (f32, f32) {
        let count = self.losses.len().min(ENDS);
        let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
        (mean(&self.losses[..count]), mean(&self.losses[self.losses.len() - count..]))
    }
}

/// Adds the gradients of the variables; candle leaves others in the store, of inputs.
fn add(sum: &mut GradStore, mut gradients: GradStore, variables: &VarMap) -> Result<()> {
    for variable in variables.all_vars() {
        let Some(gradient) = gradients.remove(&variable) else { continue };
        let gradient = match sum.get(&variable) {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        sum.insert(&variable, gradient);
    }
    Ok(())
}
