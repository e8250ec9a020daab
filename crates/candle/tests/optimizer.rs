//! The optimizer in the place of candle's: the same weights within the roundings, in place, and what it refuses.

mod common;

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::{AdamW as CandleAdamW, Optimizer, ParamsAdamW, VarMap};
use common::{gradients, loss, model, names, put, variable};
use gradprobe::optim::{AdamW as Rule, Group, Lion};
use gradprobe_candle::{AdamW, CandleProbe, Clip, Config, Error};

/// The variables' values, by name.
fn values(map: &VarMap) -> Vec<(String, Vec<f32>)> {
    let data = map.data().lock().unwrap();
    let mut all: Vec<_> =
        data.iter().map(|(name, var)| (name.clone(), var.flatten_all().unwrap().to_vec1().unwrap())).collect();
    all.sort_by(|a: &(String, _), b| a.0.cmp(&b.0));
    all
}

/// The same model, with the same values in other memory.
fn twin(map: &VarMap) -> VarMap {
    let twin = VarMap::new();
    for (name, var) in map.data().lock().unwrap().iter() {
        put(&twin, name, Var::from_tensor(&var.copy().unwrap()).unwrap());
    }
    twin
}

/// Each optimizer trains a model of its own.
fn trained(map: &VarMap, mut optimizer: impl Optimizer) {
    for step in 0..20 {
        if step == 10 {
            optimizer.set_learning_rate(5e-4);
        }
        optimizer.backward_step(&loss(map)).unwrap();
    }
}

#[test]
fn the_weights_are_those_of_candle_within_the_roundings() {
    let ours = model(&Device::Cpu);
    let theirs = twin(&ours);
    let before = values(&ours);
    let parameters = ParamsAdamW { lr: 1e-3, weight_decay: 0.05, ..ParamsAdamW::default() };
    trained(&ours, AdamW::new(ours.all_vars(), parameters.clone()).unwrap());
    trained(&theirs, CandleAdamW::new(theirs.all_vars(), parameters).unwrap());
    for (((name, ours), (_, theirs)), (_, before)) in values(&ours).iter().zip(&values(&theirs)).zip(&before) {
        let moved = ours.iter().zip(before).any(|(a, b)| a != b);
        assert_eq!(moved, name != "unused.weight", "{name}");
        let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Two steps of 1e-3 in another direction would be more.
        assert!(worst < 1e-3, "{name}: {worst}");
        let mean = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).sum::<f32>() / ours.len() as f32;
        assert!(mean < 2e-5, "{name}: {mean}");
    }
    assert!(f64::from(loss(&ours).to_scalar::<f32>().unwrap()).is_finite());
}

#[test]
fn variables_are_changed_where_they_are_and_gradients_are_not() {
    let map = model(&Device::Cpu);
    // What a layer keeps of the variable.
    let kept = variable(&map, "scale").as_tensor().clone();
    let before: Vec<f32> = kept.to_vec1().unwrap();
    let rule = Rule::new(1e-2).group(Group::new("*.bias").weight_decay(0.0));
    let config = Config::new().clip(Clip::global_norm(1.0)).optimizer(rule);
    let mut probe = CandleProbe::new(&map, config).unwrap();
    let gradients = gradients(&map);
    let gradient: Vec<f32> = gradients.get(&variable(&map, "scale")).unwrap().to_vec1().unwrap();
    probe.update(&gradients).unwrap();
    let report = probe.wait().unwrap();
    assert!(report.outputs().coefficient < 1.0);
    let after: Vec<f32> = kept.to_vec1().unwrap();
    assert!(after.iter().zip(&before).all(|(a, b)| ((a - b).abs() - 1e-2).abs() < 1e-3), "{after:?}, {before:?}");
    assert_eq!(gradients.get(&variable(&map, "scale")).unwrap().to_vec1::<f32>().unwrap(), gradient);
    let updated: Vec<&str> = report.tensors().filter(|t| t.update.is_some()).map(|t| t.name).collect();
    assert_eq!(updated, names());
    assert!(report.to_string().lines().next().unwrap().contains(" update "), "{report}");

    // A step that is to be skipped moves nothing.
    let mut bad = common::gradients(&map);
    let scale = variable(&map, "scale");
    bad.insert(&scale, (scale.as_tensor() * f64::NAN).unwrap());
    let before = values(&map);
    probe.update(&bad).unwrap();
    assert!(probe.wait().unwrap().skip() && values(&map) == before);
    // A gradient in the memory of its variable.
    let mut shared = common::gradients(&map);
    shared.insert(&scale, scale.as_tensor().clone());
    probe.update(&shared).unwrap();
    assert_ne!(values(&map), before);
}

#[test]
fn sixteen_bits_have_masters_that_go_on_below_their_last_place() {
    let map = VarMap::new();
    let weight = Var::from_tensor(&Tensor::ones(100, DType::BF16, &Device::Cpu).unwrap()).unwrap();
    put(&map, "weight", weight.clone());
    let mut probe = CandleProbe::new(&map, Config::new().optimizer(Lion::new(1e-3))).unwrap();
    let mut store = GradStore::default();
    store.insert(&weight, Tensor::ones(100, DType::BF16, &Device::Cpu).unwrap());
    // The next bf16 below 1 is 0.996, and half way there a step of 1e-3 alone would be lost.
    for _ in 0..8 {
        probe.update(&store).unwrap();
    }
    let values: Vec<half::bf16> = weight.to_vec1().unwrap();
    assert_eq!(values[0].to_f32(), 0.992_187_5);
    let report = probe.wait().unwrap();
    assert_eq!(report.updates().unwrap()[0].lost, 0);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let map = model(&Device::Cpu);
    let before = values(&map);
    let store = gradients(&map);
    let mut without = CandleProbe::new(&map, Config::new()).unwrap();
    let refused = without.update(&store).unwrap_err();
    let declare = "Config::optimizer";
    assert!(matches!(refused, Error::Probe(gradprobe::Error::NotDeclared { declare: d }) if d == declare), "{refused}");
    let mut optimizer = AdamW::new_lr(map.all_vars(), 1e-3).unwrap();
    optimizer.set_learning_rate(f64::NAN);
    let refused = optimizer.step(&store).unwrap_err().to_string();
    assert!(refused.contains("learning_rate must be finite and not negative, not NaN"), "{refused}");
    optimizer.step(&GradStore::default()).unwrap_err();
    optimizer.set_learning_rate(1e-3);
    optimizer.step(&GradStore::default()).unwrap();
    assert_eq!((values(&map), optimizer.learning_rate()), (before, 1e-3));
    let bad = ParamsAdamW { beta1: 1.0, ..ParamsAdamW::default() };
    let refused = AdamW::new(map.all_vars(), bad).unwrap_err().to_string();
    assert!(refused.contains("beta must be at least 0 and below 1, not 1"), "{refused}");
    let mut none = AdamW::new_lr(Vec::new(), 1e-3).unwrap();
    none.step(&store).unwrap();
    assert!(none.probe().is_none());
}
