//! The adapter on burn's CPU backend: the report has the bits of the probe on the CPU, the clip is torch's, nothing is
//! copied, and what does not fit is named.

use burn_core as burn;
use burn_core::{
    module::{Module, Param, ParamId},
    tensor::{DType as BurnDType, Device, Distribution, Tensor, TensorData},
};
use burn_nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn_optim::{GradientsParams, SgdConfig};
use gradprobe::{Cpu, DType, HostTensor, Plan, Probe, Record, Report, health::Cadence};
use gradprobe_burn::{BurnProbe, Clip, Config, Error, LossScale, Watch};
use half::{bf16, f16};

/// Twelve layers, so that the order of names is seen to be that of the layers, and parameters beside them.
#[derive(Module, Debug)]
struct Model {
    embedding: Param<Tensor<2>>,
    layers: Vec<Linear>,
    scale: Param<Tensor<1>>,
    unused: Option<Linear>,
}

fn device() -> Device {
    Device::default().autodiff()
}

fn parameter<const D: usize>(shape: [usize; D], dtype: BurnDType) -> Param<Tensor<D>> {
    let tensor = Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), (&device(), dtype)).require_grad();
    Param::initialized(ParamId::new(), tensor)
}

fn model() -> Model {
    let linear = || LinearConfig::new(24, 24).init(&device());
    Model {
        embedding: parameter([50, 24], BurnDType::F32),
        layers: (0..12).map(|_| linear()).collect(),
        scale: parameter([24], BurnDType::F32),
        unused: Some(linear()),
    }
}

/// The gradients of a loss that leaves `unused` out.
fn gradients(model: &Model) -> GradientsParams {
    let mut x = model.embedding.val();
    for layer in &model.layers {
        x = layer.forward(x) * 1.5;
    }
    let loss = (x * model.scale.val().unsqueeze()).powf_scalar(2.0).mean() * 1000.0;
    GradientsParams::from_grads(loss.backward(), model)
}

/// Elements of the gradients, in the order of the parameters that have one.
fn elements(model: &Model, gradients: &GradientsParams) -> Vec<Vec<f32>> {
    fn of<const D: usize>(param: &Param<Tensor<D>>, gradients: &GradientsParams) -> Option<Vec<f32>> {
        gradients.get::<D>(param.id).map(|gradient| gradient.to_data().as_slice::<f32>().unwrap().to_vec())
    }
    let mut all = vec![of(&model.embedding, gradients)];
    for layer in model.layers.iter().chain(&model.unused) {
        all.push(of(&layer.weight, gradients));
        all.push(layer.bias.as_ref().and_then(|bias| of(bias, gradients)));
    }
    let scale = all.len() - 2 * usize::from(model.unused.is_some());
    all.insert(scale, of(&model.scale, gradients));
    all.into_iter().flatten().collect()
}

fn bytes(report: &Report) -> (Vec<u8>, &[u8]) {
    (bytemuck::bytes_of(report.outputs()).to_vec(), bytemuck::cast_slice(report.records()))
}

/// What a probe on the CPU says of these tensors.
fn on_cpu(plan: &Plan, config: Config, tensors: &[HostTensor<'_>]) -> Report {
    let mut probe = Probe::new(Cpu, plan.clone(), config).unwrap();
    let tensors: Vec<&dyn gradprobe::Tensor> = tensors.iter().map(|tensor| tensor as _).collect();
    probe.measure(&tensors).unwrap();
    probe.wait().unwrap()
}

/// The records of what had a gradient.
fn present(report: &Report) -> Vec<Record> {
    report.tensors().filter(|tensor| !tensor.is_absent()).map(|tensor| *tensor.record).collect()
}

/// The report of a measurement, and of a step.
fn measure(probe: &mut BurnProbe, model: &impl Module, gradients: &mut GradientsParams) -> Result<Report, Error> {
    probe.measure(model, gradients)?;
    probe.wait()
}

fn step(probe: &mut BurnProbe, model: &impl Module, gradients: &mut GradientsParams) -> Result<Report, Error> {
    probe.step(model, gradients)?;
    probe.wait()
}

fn missing(report: &Report) -> Vec<&str> {
    report.absent().collect()
}

#[test]
fn the_report_has_the_bits_of_the_cpu_probe() {
    let model = model();
    let mut gradients = gradients(&model);
    let data = elements(&model, &gradients);
    let mut probe = BurnProbe::new(&model, Config::default()).unwrap();
    let measured = measure(&mut probe, &model, &mut gradients).unwrap();
    let there = measured.tensors().filter(|tensor| !tensor.is_absent());
    let names: Vec<&str> = there.map(|tensor| tensor.name).collect();
    let layers = (0..12).flat_map(|i| [format!("layers.{i}.weight"), format!("layers.{i}.bias")]);
    let expected: Vec<String> =
        ["embedding".to_owned()].into_iter().chain(layers).chain(["scale".to_owned()]).collect();
    assert_eq!(names, expected);
    let plan = Plan::new(names.iter().zip(&data).map(|(name, data)| (*name, DType::F32, data.len() as u64))).unwrap();
    let tensors: Vec<HostTensor<'_>> = data.iter().map(|data| HostTensor::F32(data)).collect();
    let report = on_cpu(&plan, Config::default(), &tensors);
    assert!(report.outputs().total_norm > 0.0);
    assert_eq!((measured.outputs(), present(&measured)), (report.outputs(), report.records().to_vec()));
    assert_eq!(elements(&model, &gradients), data, "measuring changes nothing");
}

#[test]
fn the_clip_is_torch_s_and_a_step_can_follow() {
    let model = model();
    let mut gradients = gradients(&model);
    let before = elements(&model, &gradients);
    let norm = before.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let mut probe = BurnProbe::new(&model, Config::default().clip(Clip::global_norm(0.5))).unwrap();
    let measured = step(&mut probe, &model, &mut gradients).unwrap();
    let outputs = measured.outputs();
    assert!((outputs.total_norm - norm).abs() < 5e-7 * norm, "{} {norm}", outputs.total_norm);
    #[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
    let coefficient = (0.5 / (outputs.total_norm + 1e-6)) as f32;
    assert!(coefficient < 1.0);
    let clipped: Vec<Vec<f32>> = before.iter().map(|data| data.iter().map(|x| x * coefficient).collect()).collect();
    assert_eq!(elements(&model, &gradients), clipped);
    let again = measure(&mut probe, &model, &mut gradients).unwrap();
    assert!((again.outputs().total_norm - 0.5).abs() < 1e-5);
    let scale = model.scale.val().to_data();
    let stepped = SgdConfig::new().init().step(0.1, model, gradients);
    assert_ne!(stepped.scale.val().to_data(), scale);
}

/// A gradient that nobody else holds is measured and scaled in the buffer it is in.
#[test]
fn nothing_is_copied() {
    let model = model();
    let values: Vec<f32> = (0..24u8).map(|i| f32::from(i) - 7.0).collect();
    let buffer = values.clone();
    let address = buffer.as_ptr() as usize;
    let mut gradients = GradientsParams::new();
    let tensor = Tensor::<1>::from_data(TensorData::new(buffer, [24]), (&Device::default(), BurnDType::F32));
    gradients.register(model.scale.id, tensor);
    let mut probe = BurnProbe::new(&model, Config::default().clip(Clip::global_norm(1.0))).unwrap();
    measure(&mut probe, &model, &mut gradients).unwrap();
    let measured = step(&mut probe, &model, &mut gradients).unwrap();
    let data = gradients.remove::<1>(model.scale.id).unwrap().into_data();
    let after = data.as_slice::<f32>().unwrap();
    assert_eq!(after[23], values[23] * measured.outputs().coefficient);
    assert_eq!(after.as_ptr() as usize, address);
}

/// And one that somebody else holds stays for them as it was; a transposed one is read in its own order.
#[test]
fn shared_and_strided_gradients_are_right() {
    let model = model();
    let mut gradients = GradientsParams::new();
    let device = Device::default();
    let held = Tensor::<1>::ones([24], &device) * 3.0;
    gradients.register(model.scale.id, held.clone());
    let mut rows = vec![0.0f32; 24 * 50];
    rows[1] = f32::NAN; // Of [24, 50]; transposed, element [1, 0], the 24th.
    let embedding = Tensor::<2>::from_data(TensorData::new(rows, [24, 50]), &device).transpose();
    gradients.register(model.embedding.id, embedding);
    let config =
        Config::default().clip(Clip::global_norm(1.0)).non_finite(gradprobe_burn::NonFinitePolicy::ZeroNonFinite);
    let mut probe = BurnProbe::new(&model, config).unwrap();
    let measured = step(&mut probe, &model, &mut gradients).unwrap();
    let records = present(&measured);
    assert_eq!((records[0].first_nonfinite(), records[1].max_abs()), (Some(24), Some(3.0)));
    assert_eq!(held.to_data().as_slice::<f32>().unwrap(), [3.0; 24]);
    let clipped = gradients.get::<1>(model.scale.id).unwrap().to_data();
    assert!(clipped.as_slice::<f32>().unwrap().iter().all(|&x| (x - 1.0 / 24f32.sqrt()).abs() < 1e-6));
}

#[test]
fn a_missing_gradient_is_missing_and_not_zero() {
    let model = model();
    let mut probe = BurnProbe::new(&model, Config::default()).unwrap();
    assert_eq!(probe.probe().plan().tensors().len(), 28);
    let mut all = gradients(&model);
    let measured = measure(&mut probe, &model, &mut all).unwrap();
    assert_eq!(missing(&measured), ["unused.weight", "unused.bias"]);
    assert_eq!((measured.records().len(), present(&measured).len()), (28, 26));
    // Another one goes missing, and comes back: steps go on.
    let gradient = all.remove::<1>(model.scale.id).unwrap();
    let measured = measure(&mut probe, &model, &mut all).unwrap();
    assert_eq!((missing(&measured).len(), measured.step()), (3, 2));
    all.register(model.scale.id, gradient);
    assert_eq!(missing(&measure(&mut probe, &model, &mut all).unwrap()).len(), 2);
    assert_eq!(measure(&mut probe, &model, &mut all).unwrap().step(), 4);
}

/// The loss scale is the trainer's, whatever the set of gradients.
#[test]
fn another_set_of_gradients_goes_on_with_the_loss_scale() {
    let model = model();
    let scale = LossScale::dynamic().initial(4.0).growth_interval(1);
    let mut probe = BurnProbe::new(&model, Config::default().loss_scale(scale)).unwrap();
    let mut all = gradients(&model);
    let mut scales = Vec::new();
    for step in 0..4 {
        if step == 2 {
            all.remove::<1>(model.scale.id).unwrap();
        }
        let outputs = *measure(&mut probe, &model, &mut all).unwrap().outputs();
        scales.push((outputs.loss_scale, outputs.next_loss_scale));
    }
    assert_eq!(scales, [(4.0, 8.0), (8.0, 16.0), (16.0, 32.0), (32.0, 64.0)]);
}

#[test]
fn a_clip_that_looks_back_goes_on_with_another_set_of_gradients() {
    let model = model();
    let clip = Clip::TensorEma { smoothing: 0.98, threshold: 1.05, warmup: 1, max_norm: None };
    let mut probe = BurnProbe::new(&model, Config::default().clip(clip).history(4)).unwrap();
    let mut all = gradients(&model);
    step(&mut probe, &model, &mut all).unwrap();
    let addresses = probe.probe().addresses();
    let gradient = all.remove::<1>(model.scale.id).unwrap();
    step(&mut probe, &model, &mut all).unwrap();
    // A hundred times what it was when it had one last.
    all.register(model.scale.id, gradient * 100.0);
    let report = step(&mut probe, &model, &mut all).unwrap();
    assert_eq!((report.step(), report.outputs().action), (3, gradprobe::StepOutputs::ACTION_SCALE_TENSORS));
    assert_eq!(probe.probe().history().unwrap().report().unwrap().steps().len(), 3);
    assert_eq!(probe.probe().addresses(), addresses, "it is the same memory");
}

#[test]
fn a_changed_model_is_an_error_that_names_the_parameter() {
    let model = model();
    let mut probe = BurnProbe::new(&model, Config::default().clip(Clip::global_norm(1e-3))).unwrap();
    let without = Model { unused: None, ..model.clone() };
    let longer = Model { scale: parameter([25], BurnDType::F32), ..model.clone() };
    let halved = Model { scale: parameter([24], BurnDType::F16), ..model.clone() };
    for (changed, name, what) in [
        (without, "unused.weight", "the module has nothing"),
        (longer, "scale", "the plan has [24] F32, the module has [25] F32"),
        (halved, "scale", "the module has [24] F16"),
    ] {
        let mut gradients = gradients(&model);
        let before = elements(&model, &gradients);
        let refused = probe.step(&changed, &mut gradients).unwrap_err();
        assert!(matches!(&refused, Error::Changed { name: of, .. } if of == name), "{refused}");
        assert!(refused.to_string().contains(what), "{refused}");
        assert_eq!(elements(&model, &gradients), before, "nothing is clipped");
    }
    let mut layers = model.layers.clone();
    layers.push(LinearConfig::new(24, 24).init(&device()));
    let more = Model { layers, ..model.clone() };
    let refused = probe.measure(&more, &mut gradients(&more)).unwrap_err();
    assert!(refused.to_string().contains("\"layers.12.weight\": the plan has nothing"), "{refused}");
}

#[test]
fn gradients_that_do_not_belong_are_errors() {
    let model = model();
    let mut probe = BurnProbe::new(&model, Config::default()).unwrap();
    let mut strange = gradients(&model);
    strange.register(ParamId::new(), Tensor::<1>::ones([3], &Device::default()));
    let refused = probe.measure(&model, &mut strange).unwrap_err();
    assert!(matches!(refused, Error::UnknownGradients { count: 1 }), "{refused}");
    let mut short = gradients(&model);
    short.register(model.scale.id, Tensor::<1>::ones([23], &Device::default()));
    let refused = probe.measure(&model, &mut short).unwrap_err();
    assert_eq!(refused.to_string(), "parameter \"scale\" is [24] F32, its gradient [23] F32");
    let refused = probe.measure(&model, &mut GradientsParams::new()).unwrap_err();
    assert!(matches!(refused, Error::Probe(gradprobe::Error::AllAbsent)), "{refused}");
}

#[derive(Module, Debug)]
struct Mixed {
    half: Param<Tensor<1>>,
    brain: Param<Tensor<2>>,
    tied: Param<Tensor<2>>,
}

#[test]
fn half_precision_is_measured_and_a_shared_parameter_once() {
    let brain = parameter([3, 5], BurnDType::BF16);
    let model = Mixed { half: parameter([40], BurnDType::F16), tied: brain.clone(), brain };
    let halves: Vec<f16> = (0..40u8).map(|i| f16::from_f32(f32::from(i) * 1500.0)).collect();
    let brains: Vec<bf16> = (0..15u8).map(|i| bf16::from_f32(f32::from(i) * 1e-30)).collect();
    let mut gradients = GradientsParams::new();
    let device = Device::default();
    let tensor = Tensor::<1>::from_data(TensorData::new(halves.clone(), [40]), (&device, BurnDType::F16));
    gradients.register(model.half.id, tensor);
    let tensor = Tensor::<2>::from_data(TensorData::new(brains.clone(), [3, 5]), (&device, BurnDType::BF16));
    gradients.register(model.brain.id, tensor);
    let config = Config::default().clip(Clip::global_norm(1.0));
    let mut probe = BurnProbe::new(&model, config.clone()).unwrap();
    let measured = step(&mut probe, &model, &mut gradients).unwrap();
    assert_eq!(missing(&measured), [""; 0]);
    let plan = Plan::new([("half", DType::F16, 40), ("brain", DType::BF16, 15)]).unwrap();
    let plan = plan.with_shapes([vec![40], vec![3, 5]]).unwrap();
    let tensors = [HostTensor::F16(&halves), HostTensor::BF16(&brains)];
    let report = on_cpu(&plan, config, &tensors);
    assert_eq!(measured.plan(), &plan);
    assert_eq!(bytes(&measured), bytes(&report));
    let clipped = gradients.get::<1>(model.half.id).unwrap();
    assert_eq!(clipped.dtype(), BurnDType::F16);
    let clipped = clipped.to_data().as_slice::<f16>().unwrap()[39].to_f32();
    assert!((clipped / (58500.0 * report.outputs().coefficient) - 1.0).abs() < 1e-3, "{clipped}");
}

#[derive(Module, Debug)]
struct Double {
    fine: Param<Tensor<1>>,
    wide: Param<Tensor<1>>,
}

#[test]
fn another_dtype_is_refused_by_the_parameter_s_name() {
    let model = Double { fine: parameter([3], BurnDType::F32), wide: parameter([3], BurnDType::F64) };
    let refused = BurnProbe::new(&model, Config::default()).unwrap_err();
    assert_eq!(refused.to_string(), "parameter \"wide\": F64 is not measured; f32, f16 and bf16 are");
    // One that needs no gradient may be of any type.
    let frozen = Double { wide: model.wide.clone().set_require_grad(false), ..model };
    let probe = BurnProbe::new(&frozen, Config::default()).unwrap();
    let mut probe = probe;
    assert_eq!(probe.probe().plan().tensors()[0].name, "fine");
    assert_eq!(probe.probe().plan().tensors().len(), 1);
}

/// The outputs' dimension comes first: in burn's linear layers it is the last, in a table it is the first already.
#[test]
fn shapes_have_the_outputs_first() {
    #[derive(Module, Debug)]
    struct Words {
        table: Embedding,
        head: Linear,
    }
    let model =
        Words { table: EmbeddingConfig::new(50, 24).init(&device()), head: LinearConfig::new(24, 3).init(&device()) };
    let probe = BurnProbe::new(&model, Config::default()).unwrap();
    assert_eq!(probe.plan().shapes().unwrap(), [vec![50, 24], vec![3, 24], vec![3]]);
}

#[test]
fn a_run_is_watched_and_written() {
    let folder = tempfile::tempdir().unwrap();
    let model = model();
    let mut watch = Watch::new(&model, Config::full().history(4).clip(Clip::global_norm(1e-3))).unwrap();
    watch.quiet();
    watch.write_to(folder.path()).unwrap();
    watch.details(Cadence::every(6).unwrap()).unwrap();
    for step in 1..=16 {
        let mut gradients = gradients(&model);
        if step == 15 {
            let bad = gradients.remove::<1>(model.scale.id).unwrap() * f32::NAN;
            gradients.register(model.scale.id, bad);
        }
        let before = elements(&model, &gradients);
        let seen = watch.step(step, &model, &mut gradients, [("loss", 2.0)]).unwrap().unwrap();
        assert_eq!((seen.step(), seen.skip(), seen.changed().is_some()), (step, step == 15, step == 15));
        assert_eq!(elements(&model, &gradients)[0] != before[0], step != 15);
    }
    let history = watch.probe().probe().history().unwrap().report().unwrap();
    assert_eq!(history.steps().map(|(step, _)| step.outputs.step).collect::<Vec<_>>(), [13, 14, 15, 16]);
    watch.finish().unwrap();
    let lines = std::fs::read_to_string(folder.path().join("steps.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let with = |key: &str| -> Vec<usize> { (0..16).filter(|&index| !lines[index][key].is_null()).collect() };
    assert_eq!((with("gsnr"), with("histogram"), with("tensors")), (vec![5, 11], vec![5, 11], vec![5, 11, 14]));
    assert_eq!(lines[14]["findings"][0]["tensor"], "scale");
}
