//! Any plan, and any declaration.

use crate::{Many, Number, Rare, for_any};
use arbitrary::Arbitrary;
use gradprobe::{
    Clip, Config, DType, Error, FindingKind, NonFinitePolicy, Plan, Rules,
    clip::{AdaptiveClip, LossScale},
    gsnr::GsnrConfig,
    health::{Limits, Preset, Statistic, ThresholdRule},
    optim::{AdamW, Group, Lion, Optimizer, Sgd},
    samples::SampleConfig,
};

const NAMES: [&str; 8] = ["a.weight", "a.bias", "b.weight", "", "layer.0.\u{7}\n", "ä", "*", "h.1.weight"];
pub const DTYPES: [DType; 3] = DType::ALL;

/// One tensor: name, types of gradient and weight, length.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct AnyTensor {
    name: u8,
    pub dtype: u8,
    pub weight: u8,
    length: u8,
}

impl AnyTensor {
    pub fn dtype(&self) -> DType {
        DTYPES[self.dtype as usize % 3]
    }

    pub fn weight(&self) -> DType {
        DTYPES[self.weight as usize % 3]
    }

    pub fn len(&self) -> usize {
        const LENGTHS: [usize; 14] = [1, 2, 3, 0, 5, 8, 9, 63, 64, 65, 128, 300, 2048, 2049];
        if self.length == 255 { 32_769 } else { LENGTHS[self.length as usize % LENGTHS.len()] }
    }
}

/// Some tensors, and whether the plan knows their weights.
#[derive(Arbitrary, Clone, Debug)]
pub struct AnyPlan {
    tensors: Many<AnyTensor, 5>,
    with_weights: bool,
}

impl AnyPlan {
    pub fn tensors(&self) -> &[AnyTensor] {
        &self.tensors.0
    }

    pub fn plan(&self) -> Result<Plan, Error> {
        let name = |(place, tensor): (usize, &AnyTensor)| match tensor.name {
            0..230 => format!("{}.{}", place, NAMES[tensor.name as usize % NAMES.len()]),
            name => NAMES[name as usize % NAMES.len()].repeat(if name == 255 { 10_000 } else { 1 }),
        };
        let tensors = self.tensors().iter().enumerate().map(|of| (name(of), of.1.dtype(), of.1.len() as u64));
        let plan = Plan::new(tensors)?;
        if self.with_weights { plan.with_weights(self.tensors().iter().map(AnyTensor::weight)) } else { Ok(plan) }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum AnyClip {
    None,
    GlobalNorm(Number),
    Value(Number),
    Quantile(Number),
    TensorNorm(Number),
    Percentile(Number, u8, Option<Number>),
    ZScore(Number, Number, u8, Option<Number>),
    TensorEma(Number, Number, u8, Option<Number>),
}

impl AnyClip {
    fn clip(self) -> Clip {
        let norm = |norm: Option<Number>| norm.map(|norm| norm.or(1.0));
        match self {
            Self::None => Clip::None,
            Self::GlobalNorm(max_norm) => Clip::global_norm(max_norm.or(1.0)),
            Self::Value(max_abs) => Clip::Value { max_abs: max_abs.or(0.02) as f32 },
            Self::Quantile(quantile) => Clip::Quantile { quantile: quantile.or(0.9) },
            Self::TensorNorm(max_norm) => Clip::TensorNorm { max_norm: max_norm.or(0.05) },
            Self::Percentile(percentile, history, max_norm) => {
                Clip::Percentile { percentile: percentile.or(50.0), history: history.into(), max_norm: norm(max_norm) }
            }
            Self::ZScore(smoothing, threshold, warmup, max_norm) => Clip::ZScore {
                smoothing: smoothing.or(0.9),
                threshold: threshold.or(1.05),
                warmup: (warmup % 8).into(),
                max_norm: norm(max_norm),
            },
            Self::TensorEma(smoothing, threshold, warmup, max_norm) => Clip::TensorEma {
                smoothing: smoothing.or(0.9),
                threshold: threshold.or(1.05),
                warmup: (warmup % 8).into(),
                max_norm: norm(max_norm),
            },
        }
    }
}

#[derive(Arbitrary, Clone, Debug)]
pub struct AnyRules {
    preset: u8,
    learning_rate: Option<Number>,
    thresholds: Many<(u8, u8, bool, Number, Number), 3>,
    exempt: Rare<(u8, u8)>,
    window: u8,
    least_steps: u8,
    limits: [Rare<(Number, Number)>; 4],
}

impl AnyRules {
    pub fn rules(&self) -> Rules {
        let mut rules = Rules::preset(Preset::ALL[self.preset as usize % 5]);
        for &(statistic, kind, is_below, warning, critical) in &self.thresholds.0 {
            let statistic = Statistic::ALL[statistic as usize % Statistic::ALL.len()];
            let kind = FindingKind::ALL[kind as usize % FindingKind::ALL.len()];
            let make = if is_below { ThresholdRule::below } else { ThresholdRule::above };
            rules = rules.with(make(statistic, kind, warning.or(1.0), critical.or(1.0)));
        }
        if let Some(learning_rate) = self.learning_rate {
            rules = rules.learning_rate(learning_rate.or(1e-3));
        }
        if let Some((name, kind)) = self.exempt.0 {
            let kind = FindingKind::ALL[kind as usize % FindingKind::ALL.len()];
            rules = rules.exempt(format!("*{}", NAMES[name as usize % NAMES.len()]), &[kind]);
        }
        (rules.window, rules.least_steps) = (self.window.into(), self.least_steps.into());
        let places = [&mut rules.spike, &mut rules.variation, &mut rules.clipped_fraction, &mut rules.mean_coefficient];
        for (place, limits) in places.into_iter().zip(self.limits) {
            if let Some((warning, critical)) = limits.0 {
                *place = Limits::new(warning.or(0.5), critical.or(0.5));
            }
        }
        rules
    }
}

#[derive(Arbitrary, Clone, Debug)]
enum AnyOptimizer {
    AdamW { rate: Number, betas: Option<(Number, Number)>, epsilon: Option<Number> },
    Sgd { rate: Number, momentum: Option<Number>, nesterov: bool },
    Lion { rate: Number, betas: Option<(Number, Number)>, decay: Option<Number>, group: Rare<(u8, Number, Number)> },
}

impl AnyOptimizer {
    fn optimizer(&self) -> Optimizer {
        match *self {
            Self::AdamW { rate, betas, epsilon } => {
                let adamw = AdamW::new(rate.or(0.01));
                let adamw = betas.map_or(adamw.clone(), |(first, second)| adamw.betas(first.or(0.9), second.or(0.99)));
                epsilon.map_or(adamw.clone(), |epsilon| adamw.epsilon(epsilon.or(1e-8))).into()
            }
            Self::Sgd { rate, momentum, nesterov } => match (Sgd::new(rate.or(0.01)), momentum) {
                (sgd, None) => sgd.into(),
                (sgd, Some(momentum)) if nesterov => sgd.nesterov(momentum.or(0.9)).into(),
                (sgd, Some(momentum)) => sgd.momentum(momentum.or(0.9)).into(),
            },
            Self::Lion { rate, betas, decay, group } => {
                let lion = Lion::new(rate.or(0.01));
                let lion = betas.map_or(lion.clone(), |(first, second)| lion.betas(first.or(0.9), second.or(0.99)));
                let lion = decay.map_or(lion.clone(), |decay| lion.weight_decay(decay.or(0.1)));
                let group = group.0.map(|(name, factor, decay)| {
                    let name = format!("*{}", NAMES[name as usize % NAMES.len()]);
                    Group::new(name).learning_rate_factor(factor.or(2.0)).weight_decay(decay.or(0.0))
                });
                group.map_or(lion.clone(), |group| lion.group(group)).into()
            }
        }
    }
}

#[derive(Arbitrary, Clone, Debug)]
pub struct AnyConfig {
    dead_threshold: Option<Number>,
    clip: AnyClip,
    policy: u8,
    loss_scale: Option<(Number, Number, Number, u8)>,
    rules: Option<AnyRules>,
    order: Rare<Many<u8, 5>>,
    history: Option<u8>,
    tracking: Option<(Rare<u8>, Option<u8>)>,
    samples: Option<(u16, u8)>,
    adaptive_clip: Option<(Many<u8, 5>, Number, Number)>,
    optimizer: Option<AnyOptimizer>,
    micro_batches: Option<u8>,
    others: [bool; 3],
}

impl AnyConfig {
    pub fn config(&self, plan: &AnyPlan) -> Config {
        let policies = [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite];
        let mut config = Config::new().clip(self.clip.clip()).non_finite(policies[self.policy as usize % 3]);
        if let Some(threshold) = self.dead_threshold {
            config = config.dead_threshold(threshold.or(1e-10) as f32);
        }
        if let Some((initial, growth, backoff, interval)) = self.loss_scale {
            let scale = LossScale::fixed(initial.or(8.0) as f32).factors(growth.or(2.0) as f32, backoff.or(0.5) as f32);
            config = config.loss_scale(scale.growth_interval(interval.into()));
        }
        if let Some(rules) = &self.rules {
            config = config.rules(rules.rules());
        }
        if let Some(order) = &self.order.0 {
            config = config.backward_order(order.0.iter().map(|&place| place.into()).collect());
        }
        if let Some(steps) = self.history {
            config = config.history(steps.into());
        }
        if let Some((pattern, window)) = self.tracking {
            let tracking = pattern.0.map_or(GsnrConfig::new(), |name| {
                GsnrConfig::new().tensors([format!("*{}", NAMES[name as usize % NAMES.len()])])
            });
            config = config.tracking(window.map_or(tracking.clone(), |window| tracking.window((window % 8).into())));
        }
        if let Some((elements, steps)) = self.samples {
            config = config.samples(SampleConfig::new(elements.into(), steps.into()));
        }
        if let Some((units, clipping, epsilon)) = &self.adaptive_clip {
            // Those that fit, and others.
            let fitting = plan.tensors().iter().enumerate().map(|(place, tensor)| match units.0.get(place) {
                Some(unit) if *unit > 240 => u64::from(*unit),
                Some(unit) if unit % 3 == 0 => 1,
                Some(unit) if unit % 3 == 1 => 0,
                _ => tensor.len() as u64,
            });
            let clip = AdaptiveClip::new(fitting.take(if clipping.0 == Some(50.0) { 0 } else { usize::MAX }));
            config = config.adaptive_clip(clip.clipping(clipping.or(0.01)).epsilon(epsilon.or(1e-3)));
        }
        if let Some(optimizer) = &self.optimizer {
            config = config.optimizer(optimizer.optimizer());
        }
        if let Some(count) = self.micro_batches {
            config = config.micro_batches((count % 16).into());
        }
        let [moments, histogram, dot] = self.others;
        config = if moments { config.moments() } else { config };
        config = if histogram { config.histogram() } else { config };
        if dot { config.dot() } else { config }
    }
}

#[derive(Arbitrary, Debug)]
struct Declaration {
    plan: AnyPlan,
    config: AnyConfig,
    lengths: Many<u64, 4>,
}

/// What is said of a declaration before there is a probe: an error or how many bytes, and for plans of any lengths.
#[test]
fn any_declaration_is_counted_or_refused() {
    for_any!(Declaration, |input: Declaration| {
        let _ = Plan::new(input.lengths.0.iter().enumerate().map(|(place, &len)| (place.to_string(), DType::F32, len)));
        let Ok(plan) = input.plan.plan() else { return };
        let config = input.config.config(&input.plan);
        if let Ok(bytes) = config.bytes(&plan) {
            assert!(bytes > 0, "{input:?}");
        }
        let large = input.lengths.0.iter().take(2).enumerate();
        if let Ok(plan) = Plan::new(large.map(|(place, &len)| (place.to_string(), DType::BF16, len >> 32))) {
            let _ = config.bytes(&plan);
        }
    });
}
