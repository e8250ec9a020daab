//! What a step costs in candle: its own AdamW and nothing else, beside statistics, global clip and AdamW of gradprobe. 64 variables
//! of 1 Mi f32.

use candle_core::{Device, Result, Tensor, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use criterion::{Criterion, criterion_group, criterion_main};
use gradprobe_candle::{CandleProbe, Clip, Config, adamw};

const VARIABLES: usize = 64;
const ELEMENTS: usize = 1 << 20;

/// Variables with their names, and a gradient of each.
fn model() -> Result<(Vec<(String, Var)>, GradStore)> {
    let mut gradients = GradStore::default();
    let variable = |index| {
        let variable = Var::from_tensor(&Tensor::full(0.02f32, ELEMENTS, &Device::Cpu)?)?;
        gradients.insert(&variable, Tensor::randn(0f32, 1e-3, ELEMENTS, &Device::Cpu)?);
        Ok((format!("layer.{index}"), variable))
    };
    let variables = (0..VARIABLES).map(variable).collect::<Result<_>>()?;
    Ok((variables, gradients))
}

fn benches(criterion: &mut Criterion) {
    let parameters = ParamsAdamW::default();
    let mut group = criterion.benchmark_group("adamw");
    group.sample_size(10);
    let (variables, gradients) = model().unwrap();
    let mut optimizer = AdamW::new(variables.into_iter().map(|(_, v)| v).collect(), parameters.clone()).unwrap();
    group.bench_function("candle", |b| b.iter(|| optimizer.step(&gradients).unwrap()));
    drop((optimizer, gradients));
    let (variables, gradients) = model().unwrap();
    let config = Config::new().clip(Clip::global_norm(1.0)).optimizer(adamw(&parameters));
    let mut probe = CandleProbe::of_variables(variables, config).unwrap();
    group.bench_function("gradprobe", |b| b.iter(|| probe.update(&gradients).unwrap()));
    group.finish();
}

criterion_group!(adamw_of_both, benches);
criterion_main!(adamw_of_both);
