//! The loop, which keeps the gradients of some steps and the held-out loss of all.

use crate::{
    Result,
    architecture::{Architecture, Network, Plan},
    fault::Fault,
    mlp, weights,
};
use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD, VarBuilder, VarMap, loss::cross_entropy};
use fastrand::Rng;
use std::{
    collections::{BTreeMap, HashMap},
    sync::PoisonError,
};

/// Steps in a row whose gradients are kept.
pub const KEPT: usize = 6;
/// Held-out samples.
const HELD_OUT: usize = 300;
/// The seed of those: the same for every training of an architecture.
const HELD_OUT_SEED: u64 = 1_000_003;

/// How a training went.
pub struct History {
    /// On held-out samples: before the first step, and after each.
    pub losses: Vec<f32>,
    /// By their first step.
    pub windows: BTreeMap<usize, Window>,
}

/// Weights before a step, and the gradients of that and the next ones, by their names in a file.
pub type Window = HashMap<String, Tensor>;

/// Trains a model. `fault` has the step of those that happen at one; `starts` are the first steps of the windows.
pub fn train(
    architecture: Architecture,
    seed: u64,
    fault: Option<(Fault, usize)>,
    starts: &[usize],
) -> Result<History> {
    let plan = architecture.plan();
    let mut variables = VarMap::new();
    let builder = VarBuilder::from_varmap(&variables, plan.dtype, &Device::Cpu);
    let fault_kind = fault.map(|(fault, _)| fault);
    let network = architecture.network(&builder, fault_kind, seed)?;
    begin(&mut variables, fault_kind, seed)?;
    let mut parameters = Parameters::new(&variables, &plan, fault_kind)?;

    let held_out = architecture.batch(HELD_OUT, true, &mut Rng::with_seed(HELD_OUT_SEED))?;
    let held_out_loss = || -> Result<f32> {
        Ok(cross_entropy(&scores(&*network, &held_out.inputs, false)?, &held_out.targets)?.to_scalar()?)
    };
    // Apart from that of the weights: a fault that takes another model must see the same batches as its twin.
    let mut random = Rng::with_seed(seed + 1_000);
    let mut history = History { losses: vec![held_out_loss()?], windows: BTreeMap::new() };
    for step in 0..plan.steps {
        let now = fault.filter(|&(_, moment)| step == moment).map(|(fault, _)| fault);
        let mut batch = architecture.batch(plan.batch, false, &mut random)?;
        if let Some(Fault::CorruptedBatch(factor)) = now {
            batch.inputs = (batch.inputs * factor)?;
        }
        let loss = cross_entropy(&scores(&*network, &batch.inputs, now == Some(Fault::Nan))?, &batch.targets)?;
        let too_large = fault.is_some_and(|(fault, moment)| fault == Fault::LossFactor && step >= moment);
        let scale = if too_large { 1e4 } else { parameters.loss_scale };
        let mut gradients = parameters.gradients(&(loss * scale)?.backward()?)?;
        if let Some(Fault::BitFlip(name)) = now {
            let place = parameters.place(name)?;
            gradients[place] = with_flipped_bit(&gradients[place])?;
        }
        for &start in starts.iter().filter(|&&start| (start..start + KEPT).contains(&step)) {
            let window = history.windows.entry(start).or_default();
            if step == start {
                parameters.keep(window)?;
            }
            for (name, gradient) in parameters.names.iter().zip(&gradients) {
                window.insert(format!("{}/{name}", step - start), gradient.clone());
            }
        }
        parameters.step(&gradients)?;
        history.losses.push(held_out_loss()?);
    }
    Ok(history)
}

/// The names of all variables, in one order.
pub fn names(variables: &VarMap) -> Vec<String> {
    let mut names: Vec<String> =
        variables.data().lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
    names.sort();
    names
}

/// Gives all variables their first values.
fn begin(variables: &mut VarMap, fault: Option<Fault>, seed: u64) -> Result<()> {
    let names = names(variables);
    let factor = fault.map_or(1.0, Fault::of_weights);
    weights::fill(variables, &names, &mut Rng::with_seed(seed), |name, usual| {
        // LoRA begins as the model that it is beside.
        let zero = name.contains("lora_up") || (name.contains("lora_down") && fault == Some(Fault::ZeroFactors));
        if zero { 0.0 } else { factor * usual }
    })?;
    if fault == Some(Fault::DeadRelu) {
        weights::set(variables, "0.bias", &Tensor::full(-100f32, mlp::WIDTH, &Device::Cpu)?)?;
    }
    Ok(())
}

/// The scores as f32, of which the loss is made.
fn scores(network: &dyn Network, inputs: &Tensor, broken: bool) -> candle_core::Result<Tensor> {
    network.scores(inputs, broken)?.to_dtype(DType::F32)
}

/// The variables, and what moves them.
struct Parameters {
    names: Vec<String>,
    variables: Vec<Var>,
    /// The same in f32, which the optimizer moves: the variables themselves, if they are f32.
    masters: Vec<Var>,
    optimizer: Choice,
    loss_scale: f64,
}

enum Choice {
    Sgd(SGD),
    Adam(AdamW),
}

impl Parameters {
    fn new(map: &VarMap, plan: &Plan, fault: Option<Fault>) -> Result<Self> {
        let names = names(map);
        let variables: Vec<Var> = {
            let data = map.data().lock().unwrap_or_else(PoisonError::into_inner);
            names.iter().map(|name| data[name].clone()).collect()
        };
        let master = |variable: &Var| match variable.dtype() {
            DType::F32 => Ok(variable.clone()),
            _ => Var::from_tensor(&variable.to_dtype(DType::F32)?),
        };
        let masters: Vec<Var> = variables.iter().map(master).collect::<candle_core::Result<_>>()?;
        let rate = plan.learning_rate * fault.map_or(1.0, Fault::of_learning_rate);
        let optimizer = if plan.adam {
            let parameters = ParamsAdamW { lr: rate, weight_decay: 0.0, ..ParamsAdamW::default() };
            Choice::Adam(AdamW::new(masters.clone(), parameters)?)
        } else {
            Choice::Sgd(SGD::new(masters.clone(), rate)?)
        };
        let loss_scale = if fault == Some(Fault::Overflow) { f64::from(1 << 24) } else { plan.loss_scale };
        Ok(Self { names, variables, masters, optimizer, loss_scale })
    }

    /// A gradient for each variable: 0 for those that got none.
    fn gradients(&self, store: &GradStore) -> candle_core::Result<Vec<Tensor>> {
        let of = |variable: &Var| store.get(variable).cloned().map_or_else(|| variable.zeros_like(), Ok);
        self.variables.iter().map(of).collect()
    }

    fn place(&self, name: &str) -> Result<usize> {
        Ok(self.names.iter().position(|other| other == name).ok_or_else(|| format!("there is no parameter {name}"))?)
    }

    /// Keeps the weights as they are now.
    fn keep(&self, window: &mut Window) -> candle_core::Result<()> {
        for (name, master) in self.names.iter().zip(&self.masters) {
            window.insert(format!("params/{name}"), master.copy()?);
        }
        Ok(())
    }

    /// Moves the weights; f16 ones not by gradients that overflowed.
    fn step(&mut self, gradients: &[Tensor]) -> candle_core::Result<()> {
        let mut store = GradStore::default();
        for ((variable, master), gradient) in self.variables.iter().zip(&self.masters).zip(gradients) {
            if variable.dtype() == DType::F32 {
                store.insert(master, gradient.clone());
                continue;
            }
            let gradient = gradient.to_dtype(DType::F32)?;
            if !gradient.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
                return Ok(());
            }
            store.insert(master, (gradient / self.loss_scale)?);
        }
        match &mut self.optimizer {
            Choice::Sgd(sgd) => sgd.step(&store)?,
            Choice::Adam(adam) => adam.step(&store)?,
        }
        for (variable, master) in self.variables.iter().zip(&self.masters) {
            if variable.dtype() != DType::F32 {
                variable.set(&master.to_dtype(variable.dtype())?)?;
            }
        }
        Ok(())
    }
}

/// The same, but for the highest bit of the exponent of its first element that is not 0.
fn with_flipped_bit(gradient: &Tensor) -> candle_core::Result<Tensor> {
    let mut values = gradient.flatten_all()?.to_vec1::<f32>()?;
    if let Some(value) = values.iter_mut().find(|value| **value != 0.0) {
        *value = f32::from_bits(value.to_bits() ^ 1 << 30);
    }
    Tensor::from_vec(values, gradient.shape(), gradient.device())
}
