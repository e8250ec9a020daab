//! Moves weights by AdamW, SGD and Lion. The optimizer reads the decision of the measurement, so that the clip costs no
//! pass.
//!
//! [`Probe::update`](crate::Probe::update) measures the gradients and moves the weights, in two launches for all
//! tensors. The optimizer applies clip coefficient, loss scale, skip, coefficients of tensors and clamp to each
//! gradient as it reads it. No pass clips, and the gradients stay as they are. The same read gives an [`UpdateRecord`]
//! for each weight: how far the step has moved it.
//!
//! ```
//! use gradprobe::{Clip, Config, Cpu, DType, Plan, Probe, optim::{AdamW, Group}};
//!
//! let (gradient, mut weight) = (vec![0.3f32; 4096], vec![1.0f32; 4096]);
//! let plan = Plan::new([("linear.weight", DType::F32, 4096)])?;
//! let adamw = AdamW::new(1e-3).group(Group::new("*bias").weight_decay(0.0).if_any());
//! let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::global_norm(1.0)).optimizer(adamw))?;
//! // every step:
//! probe.update(&[&gradient], &mut [&mut weight])?;
//! let report = probe.wait()?;
//! assert!((report.updates().unwrap()[0].ratio().unwrap() - 1e-3).abs() < 1e-4);
//! # Ok::<(), gradprobe::Error>(())
//! ```
//!
//! # Formulas
//!
//! g is the gradient of an element, η the learning rate times its group's factor, λ the decay of its group and t the
//! step of its tensor. All is in f32, operation by operation as written; `fma` rounds once:
//!
//! | | moments | direction d |
//! |---|---|---|
//! | [`AdamW`] | m ← fma(β1, m, (1−β1)·g), v ← fma(β2, v, ((1−β2)·g)·g) | m / fma(√v, (1−β1^t)/√(1−β2^t), (1−β1^t)·ε) |
//! | [`Sgd`] | m ← fma(μ, m, g); none where μ is 0 | m; with Nesterov fma(μ, m, g) |
//! | [`Lion`] | c = fma(β1, m, (1−β1)·g), then m ← fma(β2, m, (1−β2)·g) | sign c |
//!
//! and w ← fma(−η, fma(λ, w, d), w). The decay is decoupled in all of them: it is no part of the moments. Weights of
//! f16 and bf16 have an f32 master each. The master moves, and the weight is its nearest value. A weight that is no
//! longer the nearest was set from outside, from a checkpoint say, and its master starts anew from it.
//!
//! A NaN that reaches a weight or moment, under [`NonFinitePolicy::Propagate`](crate::NonFinitePolicy::Propagate), has
//! the bits of the machine; all else has the same bits on every device.

pub(crate) mod cpu;
mod record;
mod room;
mod rules;
mod state;

pub use record::UpdateRecord;
pub use room::OptimizerMemory;
pub use state::{OptimizerState, TensorState};

pub(crate) use room::OptimizerArguments;

use crate::{Error, Plan, measure::narrow};
use bytemuck::{Pod, Zeroable};
use wildmatch::WildMatch;

/// Names an optimizer and its parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    rule: Rule,
    learning_rate: f64,
    betas: [f64; 2],
    epsilon: f64,
    weight_decay: f64,
    groups: Vec<Group>,
}

/// The optimizer's number in the kernel, and its name in a saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Rule {
    AdamW = 0,
    Momentum = 1,
    Nesterov = 2,
    Sgd = 3,
    Lion = 4,
}

impl Rule {
    /// Moments an element.
    fn moments(self) -> usize {
        Self::moments_of(self as u32)
    }

    /// Does the same by its number.
    pub fn moments_of(rule: u32) -> usize {
        match rule {
            rule if rule == Self::AdamW as u32 => 2,
            rule if rule == Self::Sgd as u32 => 0,
            _ => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::Momentum | Self::Nesterov => "sgd with momentum",
            Self::Sgd => "sgd",
            Self::Lion => "lion",
        }
    }
}

/// Gives some tensors a learning rate and decay of their own. Where several groups match a tensor's name, the last
/// counts.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, optim::{Group, Sgd}};
///
/// let sgd = Sgd::new(0.1).group(Group::new("*bias").learning_rate_factor(0.0));
/// let plan = Plan::new([("weight", DType::F32, 1), ("bias", DType::F32, 1)])?;
/// let mut probe = Probe::new(Cpu, plan, Config::new().optimizer(sgd))?;
/// let (mut weight, mut bias) = ([1.0f32], [1.0f32]);
/// probe.update(&[&[1.0f32], &[1.0f32]], &mut [&mut weight, &mut bias])?;
/// assert_eq!((weight, bias), ([0.9], [1.0]));
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pattern: String,
    learning_rate_factor: f64,
    weight_decay: Option<f64>,
    must_match: bool,
}

impl Group {
    /// Selects the tensors whose names match: `*` stands for any characters, `?` for one.
    pub fn new(pattern: impl Into<String>) -> Self {
        Self { pattern: pattern.into(), learning_rate_factor: 1.0, weight_decay: None, must_match: true }
    }

    /// Multiplies the learning rate by this factor.
    #[must_use]
    pub fn learning_rate_factor(self, factor: f64) -> Self {
        Self { learning_rate_factor: factor, ..self }
    }

    /// Sets the decay.
    #[must_use]
    pub fn weight_decay(self, weight_decay: f64) -> Self {
        Self { weight_decay: Some(weight_decay), ..self }
    }

    /// Allows plans in which no name matches. They are refused otherwise.
    #[must_use]
    pub fn if_any(self) -> Self {
        Self { must_match: false, ..self }
    }
}

/// The methods that all optimizers have.
macro_rules! common {
    ($optimizer:ident) => {
        impl $optimizer {
            /// Sets the decay, which is decoupled: each step subtracts learning rate · decay · weight.
            #[must_use]
            pub fn weight_decay(mut self, weight_decay: f64) -> Self {
                self.0.weight_decay = weight_decay;
                self
            }

            /// Adds a group of tensors with parameters of their own: no decay on norms and biases, say.
            #[must_use]
            pub fn group(mut self, group: Group) -> Self {
                self.0.groups.push(group);
                self
            }
        }

        impl From<$optimizer> for Optimizer {
            fn from(optimizer: $optimizer) -> Self {
                optimizer.0
            }
        }
    };
}

/// AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019), algorithm 2, as PyTorch has it: the decay
/// is multiplied by the learning rate. Keeps two f32 an element.
///
/// ```
/// use gradprobe::{Config, Cpu, DType, Plan, Probe, optim::AdamW};
///
/// let adamw = AdamW::new(0.1).betas(0.9, 0.95).weight_decay(0.0);
/// let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new().optimizer(adamw))?;
/// let mut weight = [1.0f32, 1.0];
/// probe.update(&[&[0.5f32, -0.5]], &mut [&mut weight])?;
/// assert!((weight[0] - 0.9).abs() < 1e-6 && (weight[1] - 1.1).abs() < 1e-6); // the first step is that of the sign
/// # Ok::<(), gradprobe::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW(Optimizer);
common!(AdamW);

impl AdamW {
    /// Makes AdamW with PyTorch's defaults: β 0.9 and 0.999, ε 1e-8 and a decay of 0.01.
    pub fn new(learning_rate: f64) -> Self {
        Self(Optimizer::new(Rule::AdamW, learning_rate, [0.9, 0.999], 0.01))
    }

    /// Sets the decays of the moments, from 0 to below 1.
    #[must_use]
    pub fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        self.0.betas = [beta1, beta2];
        self
    }

    /// Sets ε, which is added to the root of the second moment.
    #[must_use]
    pub fn epsilon(mut self, epsilon: f64) -> Self {
        self.0.epsilon = epsilon;
        self
    }
}

/// Stochastic gradient descent: plain, with momentum, or with Nesterov's (Sutskever et al., "On the importance of
/// initialization and momentum in deep learning", ICML 2013), as PyTorch has it without dampening; its decay is decoupled.
/// Keeps one f32 an element where there is momentum, else nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Sgd(Optimizer);
common!(Sgd);

impl Sgd {
    /// Makes SGD without momentum or decay.
    pub fn new(learning_rate: f64) -> Self {
        Self(Optimizer::new(Rule::Sgd, learning_rate, [0.0; 2], 0.0))
    }

    /// Sets the momentum, from 0 to below 1.
    #[must_use]
    pub fn momentum(self, momentum: f64) -> Self {
        self.with(momentum, Rule::Momentum)
    }

    /// Sets Nesterov's momentum, from 0 to below 1.
    #[must_use]
    pub fn nesterov(self, momentum: f64) -> Self {
        self.with(momentum, Rule::Nesterov)
    }

    fn with(mut self, momentum: f64, rule: Rule) -> Self {
        self.0.betas[0] = momentum;
        self.0.rule = if momentum == 0.0 { Rule::Sgd } else { rule };
        self
    }
}

/// Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms" (NeurIPS 2023), algorithm 2. Keeps one f32 an element.
#[derive(Clone, Debug, PartialEq)]
pub struct Lion(Optimizer);
common!(Lion);

impl Lion {
    /// Makes Lion with the paper's defaults: β 0.9 and 0.99 and no decay.
    pub fn new(learning_rate: f64) -> Self {
        Self(Optimizer::new(Rule::Lion, learning_rate, [0.9, 0.99], 0.0))
    }

    /// Sets the decays, from 0 to below 1: of the direction's mean, and of the moment.
    #[must_use]
    pub fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        self.0.betas = [beta1, beta2];
        self
    }
}

/// The state of a tensor from step to step, as the kernel reads it (`kernels/optimizer.cu`).
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct OptimizerTensor {
    /// Place of its first element in the moments.
    pub offset: u64,
    /// Place of its first element in the masters, if it has them.
    pub master_offset: u64,
    /// β1^t and β2^t of the next step.
    powers: [f64; 2],
    /// (1 − β1^t) / √(1 − β2^t) and 1 − β1^t of the next step.
    pub corrections: [f32; 2],
    pub learning_rate_factor: f32,
    pub weight_decay: f32,
    pub steps: u32,
    reserved: [u32; 3],
}
const _: () = {
    assert!(size_of::<OptimizerTensor>() == 64);
    assert!(std::mem::offset_of!(OptimizerTensor, corrections) == 32);
    assert!(std::mem::offset_of!(OptimizerTensor, steps) == 48);
};

impl OptimizerTensor {
    /// Gives the state after so many steps: by multiplication, step by step, as the kernel does it.
    fn after(self, steps: u32, betas: [f64; 2]) -> Self {
        let mut state = Self { powers: [1.0; 2], ..self };
        for _ in 0..=steps {
            let next = state.next(betas);
            // Once the powers no longer change, the rest is skipped: four billion steps would take ten seconds.
            if std::mem::replace(&mut state, next).powers == next.powers {
                break;
            }
        }
        Self { steps, ..state }
    }

    /// Gives the state one step later.
    pub fn next(self, betas: [f64; 2]) -> Self {
        let powers = [self.powers[0] * betas[0], self.powers[1] * betas[1]];
        let corrections = [narrow((1.0 - powers[0]) / (1.0 - powers[1]).sqrt()), narrow(1.0 - powers[0])];
        Self { powers, corrections, steps: self.steps.wrapping_add(1), ..self }
    }
}

impl Optimizer {
    fn new(rule: Rule, learning_rate: f64, betas: [f64; 2], weight_decay: f64) -> Self {
        Self { rule, learning_rate, betas, epsilon: 1e-8, weight_decay, groups: Vec::new() }
    }

    /// The factors of the old average and of the gradient: β and 1 − β; for momentum, which is a sum, μ and 1.
    fn shares(&self) -> [[f32; 2]; 2] {
        let [first, second] = self.betas.map(|beta| [narrow(beta), narrow(1.0 - beta)]);
        match self.rule {
            Rule::Momentum | Rule::Nesterov => [[first[0], 0.0], [first[0], 1.0]],
            _ => [first, second],
        }
    }

    /// β1 and β2, of AdamW.
    fn adam_betas(&self) -> Option<[f64; 2]> {
        (self.rule == Rule::AdamW).then_some(self.betas)
    }

    /// # Errors
    /// [`Error::InvalidConfig`] for a number outside its range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let invalid =
            |option, expected, value: f64| Err(Error::InvalidConfig { option, expected, value: value.to_string() });
        check_learning_rate(self.learning_rate)?;
        if let Some(&beta) = self.betas.iter().find(|beta| !(0.0..1.0).contains(*beta)) {
            let option = if matches!(self.rule, Rule::AdamW | Rule::Lion) { "beta" } else { "momentum" };
            return invalid(option, "at least 0 and below 1", beta);
        }
        // Below this, a weight without a gradient would become 0/0.
        if !(self.epsilon.is_finite() && narrow(self.epsilon) >= f32::MIN_POSITIVE) {
            return invalid("epsilon", "a normal f32 above 0", self.epsilon);
        }
        let decays = self.groups.iter().filter_map(|group| group.weight_decay).chain([self.weight_decay]);
        for decay in decays {
            if !(narrow(decay).is_finite() && decay >= 0.0) {
                return invalid("weight_decay", "finite and not negative", decay);
            }
        }
        for Group { learning_rate_factor, .. } in &self.groups {
            if !(narrow(*learning_rate_factor).is_finite() && *learning_rate_factor >= 0.0) {
                return invalid("learning_rate_factor", "finite and not negative", *learning_rate_factor);
            }
        }
        Ok(())
    }

    /// Gives the factor of the learning rate and the decay of each tensor.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a group that must match and matches none.
    fn of_tensors(&self, plan: &Plan) -> Result<Vec<(f32, f32)>, Error> {
        let groups: Vec<_> = self.groups.iter().map(|group| (WildMatch::new(&group.pattern), group)).collect();
        let is_unused = |(pattern, group): &&(WildMatch, &Group)| {
            group.must_match && !plan.tensors().iter().any(|t| pattern.matches(&t.name))
        };
        if let Some((_, group)) = groups.iter().find(is_unused) {
            return Err(Error::NoSuchTensor { pattern: group.pattern.clone() });
        }
        let of = |name: &str| {
            let group = groups.iter().rfind(|(pattern, _)| pattern.matches(name)).map(|(_, group)| *group);
            let factor = group.map_or(1.0, |group| group.learning_rate_factor);
            (narrow(factor), narrow(group.and_then(|group| group.weight_decay).unwrap_or(self.weight_decay)))
        };
        Ok(plan.tensors().iter().map(|tensor| of(&tensor.name)).collect())
    }
}

/// # Errors
/// [`Error::InvalidConfig`].
fn check_learning_rate(learning_rate: f64) -> Result<(), Error> {
    if narrow(learning_rate).is_finite() && learning_rate >= 0.0 {
        return Ok(());
    }
    let (expected, value) = ("finite and not negative", learning_rate.to_string());
    Err(Error::InvalidConfig { option: "learning_rate", expected, value })
}
