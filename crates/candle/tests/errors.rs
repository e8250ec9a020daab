//! What does not fit is named, and nothing is clipped then.

mod common;

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_nn::VarMap;
use common::{arrived, elements, gradients, missing, model, names, put, variable};
use gradprobe_candle::{CandleProbe, Clip, Config, Error, GsnrConfig};

fn probe(map: &VarMap) -> CandleProbe {
    CandleProbe::new(map, Config::default().clip(Clip::global_norm(1e-3))).unwrap()
}

/// What the probe says of these gradients, which it leaves alone.
fn refused(probe: &mut CandleProbe, map: &VarMap, gradients: &mut GradStore) -> Error {
    let before = elements(map, &names(), gradients);
    let refused = probe.step(gradients).unwrap_err();
    assert_eq!(elements(map, &names(), gradients), before, "nothing is clipped");
    assert_eq!(probe.measure(gradients).unwrap_err().to_string(), refused.to_string());
    let lent = probe.lend(gradients, |_, _| -> Result<(), gradprobe::Error> { panic!("nothing is lent") });
    assert_eq!(lent.unwrap_err().to_string(), refused.to_string());
    refused
}

#[test]
fn a_missing_gradient_is_missing_and_not_zero() {
    let map = model(&Device::Cpu);
    let mut probe = CandleProbe::new(&map, Config::default()).unwrap();
    assert_eq!(probe.plan().tensors().len(), 27);
    let mut all = gradients(&map);
    probe.measure(&all).unwrap();
    let measured = probe.poll().unwrap().unwrap();
    assert_eq!((missing(&measured), measured.records().len()), (vec!["unused.weight"], 27));
    let unused = measured.tensors().find(|tensor| tensor.name == "unused.weight").unwrap();
    assert_eq!((unused.record.count, unused.remarks().as_str()), (0, "no gradient"));
    // Another one goes missing, and comes back.
    let scale = variable(&map, "scale");
    let mut seen = Vec::new();
    for is_there in [true, false, true, true] {
        let gradient = all.remove(&scale).unwrap();
        if is_there {
            all.insert(&scale, gradient.clone());
        }
        probe.measure(&all).unwrap();
        let measured = probe.poll().unwrap().unwrap();
        seen.push((missing(&measured).len(), measured.step()));
        all.insert(&scale, gradient);
    }
    assert_eq!(seen, [(1, 2), (2, 3), (1, 4), (1, 5)]);
    // And those who wait get the last.
    all.remove(&scale).unwrap();
    probe.measure(&all).unwrap();
    assert_eq!(missing(&arrived(&mut probe)), ["scale", "unused.weight"]);
    assert!(probe.poll().unwrap().is_none());
}

#[test]
fn a_changed_model_is_an_error_that_names_the_variable() {
    let cpu = &Device::Cpu;
    let cases: [(&str, Option<Var>, &str); 4] = [
        ("unused.weight", None, "the plan has [24, 24] f32 on cpu, the model has nothing"),
        (
            "scale",
            Some(Var::zeros(25, DType::F32, cpu).unwrap()),
            "the plan has [24] f32 on cpu, the model has [25] f32 on cpu",
        ),
        ("scale", Some(Var::zeros(24, DType::F16, cpu).unwrap()), "the model has [24] f16 on cpu"),
        (
            "layers.12.weight",
            Some(Var::zeros(3, DType::U32, cpu).unwrap()),
            "the plan has nothing, the model has [3] u32 on cpu",
        ),
    ];
    for (name, changed, what) in cases {
        let map = model(cpu);
        let mut probe = probe(&map);
        let mut gradients = gradients(&map);
        match changed {
            Some(changed) => put(&map, name, changed),
            None => drop(map.data().lock().unwrap().remove(name)),
        }
        let refused = refused(&mut probe, &map, &mut gradients);
        assert!(matches!(&refused, Error::Changed { name: of, .. } if of == name), "{refused}");
        assert!(refused.to_string().contains(what), "{refused}");
    }
}

#[test]
fn a_variable_in_the_place_of_another_and_one_of_two_names_are_no_change() {
    let map = model(&Device::Cpu);
    put(&map, "tied", variable(&map, "scale"));
    let mut probe = CandleProbe::new(&map, Config::default()).unwrap();
    let names = probe.plan().tensors().iter().map(|tensor| tensor.name.as_str());
    assert_eq!(names.filter(|name| ["tied", "scale"].contains(name)).collect::<Vec<_>>(), ["scale"]);
    put(&map, "scale", Var::ones(24, DType::F32, &Device::Cpu).unwrap());
    put(&map, "tied", variable(&map, "scale"));
    probe.measure(&gradients(&map)).unwrap();
    assert_eq!(missing(&arrived(&mut probe)), ["unused.weight"]);
}

#[test]
fn gradients_that_do_not_belong_are_errors() {
    let map = model(&Device::Cpu);
    let mut probe = probe(&map);
    let mut short = gradients(&map);
    short.insert(&variable(&map, "scale"), Tensor::ones(23, DType::F32, &Device::Cpu).unwrap());
    let told = refused(&mut probe, &map, &mut short).to_string();
    assert_eq!(told, "variable \"scale\" is [24] f32 on cpu, its gradient [23] f32 on cpu");
    let mut wide = gradients(&map);
    wide.insert(&variable(&map, "scale"), Tensor::ones(24, DType::F64, &Device::Cpu).unwrap());
    let told = refused(&mut probe, &map, &mut wide).to_string();
    assert!(told.ends_with("its gradient [24] f64 on cpu"), "{told}");

    let other = model(&Device::Cpu);
    let refused = refused(&mut probe, &map, &mut gradients(&other));
    assert!(matches!(&refused, Error::NoGradients { variables: 27, .. }), "{refused}");
    assert!(
        refused.to_string().contains("none of the 27 variables has a gradient, \"embedding\" the first"),
        "{refused}"
    );
}

#[test]
fn what_cannot_be_measured_is_refused_when_the_probe_is_made() {
    let empty = VarMap::new();
    let refused = CandleProbe::new(&empty, Config::default()).unwrap_err();
    assert!(matches!(&refused, Error::NoVariables) && refused.to_string().contains("VarMap"), "{refused}");

    for (dtype, word) in [(DType::F64, "f64"), (DType::U32, "u32"), (DType::F8E4M3, "f8e4m3")] {
        let map = model(&Device::Cpu);
        let wide = Var::from_tensor(&Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap().to_dtype(dtype).unwrap());
        put(&map, "layers.3.wide", wide.unwrap());
        let refused = CandleProbe::new(&map, Config::default()).unwrap_err();
        assert!(matches!(&refused, Error::Dtype { name, .. } if name == "layers.3.wide"), "{refused}");
        assert!(refused.to_string().contains(&format!("{word} is not measured")), "{refused}");
        // The others can be measured without it.
        let rest = names().into_iter().map(|name| (name.clone(), variable(&map, &name)));
        let mut probe = CandleProbe::of_variables(rest, Config::default()).unwrap();
        probe.measure(&gradients(&map)).unwrap();
        assert_eq!(missing(&arrived(&mut probe)), [""; 0]);
    }
}

#[test]
fn the_probe_s_own_errors_pass_through() {
    let map = model(&Device::Cpu);
    let refused = CandleProbe::new(&map, Config::default().clip(Clip::global_norm(-1.0))).unwrap_err();
    assert!(matches!(&refused, Error::Probe(gradprobe::Error::InvalidConfig { option: "max_norm", .. })), "{refused}");
    let twice = [("scale", variable(&map, "scale")), ("scale", variable(&map, "embedding"))];
    let refused = CandleProbe::of_variables(twice, Config::default()).unwrap_err();
    assert!(matches!(refused, Error::Probe(gradprobe::Error::DuplicateTensor { .. })), "{refused}");
    let mut probe = probe(&map);
    let is = |error: Error, expected: gradprobe::Error| {
        assert!(matches!(&error, Error::Probe(error) if *error == expected), "{error}");
    };
    let not_declared = |declare| gradprobe::Error::NotDeclared { declare };
    is(probe.probe().history().map(drop).unwrap_err().into(), not_declared("Config::history"));
    let histogram = probe.lend(&gradients(&map), |probe, tensors| probe.histogram()?.measure(tensors));
    is(histogram.unwrap_err(), not_declared("Config::histogram"));
    let pattern = || "nowhere.*".to_owned();
    let tracking = Config::default().tracking(GsnrConfig::new().tensors([pattern()]));
    is(CandleProbe::new(&map, tracking).unwrap_err(), gradprobe::Error::NoSuchTensor { pattern: pattern() });
    assert!(probe.poll().unwrap().is_none());
    is(probe.wait().unwrap_err(), gradprobe::Error::NotMeasured);
}
