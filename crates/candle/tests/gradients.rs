//! The adapter on candle's CPU device: the report has the bits of the probe on the CPU, the clip is torch's, memory is
//! that of the gradients, and what is asked for beyond a step is that of the probe too.

#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use common::{
    arrived, bytes, bytes_of_present, counting, elements, floats, gradients, measured as on_cpu, missing, model, names,
    put, tensors, variable,
};
use gradprobe::{
    Cpu, DType as ProbeDType, FindingKind, HostTensor, NonFinitePolicy, Plan, Probe, Verdict,
    health::{Rules, backward_order},
};
use gradprobe_candle::{CandleProbe, Clip, Config, GsnrConfig, LossScale};
use half::{bf16, f16};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

/// Where in memory the first element of a gradient is.
fn address(gradients: &GradStore, variable: &Var) -> usize {
    let (storage, layout) = gradients.get(variable).unwrap().storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(elements)) = &*storage else { panic!("not f32 on the CPU") };
    elements[layout.start_offset()..].as_ptr() as usize
}

/// The plan of the model's gradients, made by hand.
fn plan(data: &[Vec<f32>]) -> Plan {
    Plan::new(names().iter().zip(data).map(|(name, data)| (name.as_str(), ProbeDType::F32, data.len() as u64))).unwrap()
}

#[test]
fn the_report_has_the_bits_of_the_cpu_probe() {
    let map = model(&Device::Cpu);
    let gradients = gradients(&map);
    let data = elements(&map, &names(), &gradients);
    let mut probe = CandleProbe::new(&map, Config::default()).unwrap();
    probe.measure(&gradients).unwrap();
    let measured = arrived(&mut probe);
    let present = measured.tensors().filter(|tensor| !tensor.is_absent());
    assert_eq!(present.map(|tensor| tensor.name).collect::<Vec<_>>(), names());
    let report = on_cpu(&plan(&data), Config::default(), &tensors(&data));
    assert!(report.outputs().total_norm > 0.0);
    assert_eq!(bytes_of_present(&measured), bytes_of_present(&report));
    assert_eq!(elements(&map, &names(), &gradients), data, "measuring changes nothing");
}

/// `torch.nn.utils.clip_grad_norm_`, operation by operation: the f32 norm of the f32 norms, and one coefficient.
fn clip_of_torch(data: &[Vec<f32>], max_norm: f32) -> (f32, Vec<Vec<f32>>) {
    #[expect(clippy::cast_possible_truncation, reason = "torch rounds a norm to f32")]
    let norm = |data: &[f32]| data.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt() as f32;
    let total = norm(&data.iter().map(|data| norm(data)).collect::<Vec<f32>>());
    let coefficient = (max_norm / (total + 1e-6)).min(1.0);
    (total, data.iter().map(|data| data.iter().map(|x| x * coefficient).collect()).collect())
}

#[test]
fn the_clip_is_torch_s_and_a_step_can_follow() {
    let map = model(&Device::Cpu);
    for max_norm in [0.5f32, 1e9] {
        let mut gradients = gradients(&map);
        let before = elements(&map, &names(), &gradients);
        let (total, expected) = clip_of_torch(&before, max_norm);
        let mut probe = CandleProbe::new(&map, Config::default().clip(Clip::global_norm(max_norm.into()))).unwrap();
        probe.step(&mut gradients).unwrap();
        let norm = arrived(&mut probe).outputs().total_norm;
        assert!((norm / f64::from(total) - 1.0).abs() < 1e-6, "{norm} {total}");
        let clipped = elements(&map, &names(), &gradients);
        if max_norm > total {
            assert_eq!(clipped, before);
        } else {
            assert!(total > 10.0 * max_norm);
            let pairs = || clipped.iter().flatten().zip(expected.iter().flatten());
            assert!(pairs().all(|(a, b)| (a - b).abs() <= 4.0 * f32::EPSILON * b.abs()));
            probe.measure(&gradients).unwrap();
            let norm = arrived(&mut probe).outputs().total_norm;
            assert!((norm - f64::from(max_norm)).abs() < 1e-5, "{norm}");
        }
    }
    let mut optimizer = AdamW::new(map.all_vars(), ParamsAdamW { lr: 1e-2, ..ParamsAdamW::default() }).unwrap();
    let mut probe = CandleProbe::new(&map, Config::default().clip(Clip::global_norm(1.0))).unwrap();
    let losses = (0..20).map(|_| {
        let loss = common::loss(&map);
        let mut gradients = loss.backward().unwrap();
        probe.step(&mut gradients).unwrap();
        optimizer.step(&gradients).unwrap();
        loss.to_scalar::<f32>().unwrap()
    });
    let losses: Vec<f32> = losses.collect();
    assert!(losses[19] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn nothing_is_copied() {
    let map = model(&Device::Cpu);
    let mut gradients = gradients(&map);
    let scale = variable(&map, "scale");
    let (before, values) = (address(&gradients, &scale), floats(gradients.get(&scale).unwrap()));
    let mut probe = CandleProbe::new(&map, Config::default().clip(Clip::global_norm(1e-3))).unwrap();
    probe.step(&mut gradients).unwrap();
    let coefficient = arrived(&mut probe).outputs().coefficient;
    assert!(coefficient < 0.1);
    let after = floats(gradients.get(&scale).unwrap());
    assert_eq!(after, values.iter().map(|x| x * coefficient).collect::<Vec<_>>());
    assert_eq!(address(&gradients, &scale), before);
}

/// Of variables `w` [3, 4], `v` [4, 3] and `b` [4]; f32.
fn small() -> (VarMap, [Var; 3]) {
    let map = VarMap::new();
    let variables = [("w", vec![3, 4]), ("v", vec![4, 3]), ("b", vec![4])].map(|(name, shape)| {
        let variable = Var::ones(shape, DType::F32, &Device::Cpu).unwrap();
        put(&map, name, variable.clone());
        variable
    });
    (map, variables)
}

#[test]
fn a_strided_gradient_is_read_in_its_own_order_and_comes_back_contiguous() {
    let (map, [w, v, b]) = small();
    let mut gradients = GradStore::default();
    let mut elements: Vec<f32> = (1..=12u8).map(f32::from).collect();
    elements[1] = f32::NAN; // Of [3, 4]; transposed, element [1, 0], the third.
    let held = Tensor::from_vec(elements, (3, 4), &Device::Cpu).unwrap();
    gradients.insert(&v, held.t().unwrap());
    gradients.insert(&w, counting(&w));
    // One element for all, and a part of something larger.
    let larger = Tensor::arange(0f32, 10.0, &Device::Cpu).unwrap();
    gradients.insert(&b, larger.narrow(0, 3, 4).unwrap());
    let config = Config::default().clip(Clip::global_norm(1.0)).non_finite(NonFinitePolicy::ZeroNonFinite);
    let mut probe = CandleProbe::new(&map, config).unwrap();
    probe.measure(&gradients).unwrap();
    assert!(!gradients.get(&v).unwrap().is_contiguous(), "measuring leaves it as it is");
    let first = arrived(&mut probe);
    let names: Vec<_> = first.tensors().map(|tensor| tensor.name).collect();
    assert_eq!(names, ["b", "v", "w"]);
    let records = first.records();
    assert_eq!(
        (records[0].max_abs(), records[1].first_nonfinite(), records[2].max_abs()),
        (Some(6.0), Some(3), Some(12.0))
    );
    probe.step(&mut gradients).unwrap();
    let second = arrived(&mut probe);
    assert_eq!(second.records(), records);
    let coefficient = second.outputs().coefficient;
    let clipped = gradients.get(&v).unwrap();
    assert!(clipped.is_contiguous() && clipped.dims() == [4, 3]);
    assert_eq!(
        floats(clipped),
        [1.0, 5.0, 9.0, 0.0, 6.0, 10.0, 3.0, 7.0, 11.0, 4.0, 8.0, 12.0].map(|x| x * coefficient)
    );
    assert!(floats(&held)[1].is_nan(), "what it was a view of stays");
    assert_eq!(floats(gradients.get(&b).unwrap()), [3.0, 4.0, 5.0, 6.0].map(|x| x * coefficient));
    let rest =
        [0.0, 1.0, 2.0, 3.0 * coefficient, 4.0 * coefficient, 5.0 * coefficient, 6.0 * coefficient, 7.0, 8.0, 9.0];
    assert_eq!(floats(&larger), rest, "a contiguous part is clipped where it is, and nothing around it");
}

#[test]
fn memory_that_two_gradients_or_a_weight_share_is_scaled_once() {
    let (map, [w, v, b]) = small();
    let mut gradients = GradStore::default();
    let shared = counting(&w);
    gradients.insert(&w, shared.clone());
    gradients.insert(&v, shared.reshape((4, 3)).unwrap());
    // The gradient of ‖b‖² / 2 is b itself.
    gradients.insert(&b, b.as_detached_tensor());
    let mut probe = CandleProbe::new(&map, Config::default().clip(Clip::global_norm(1.0))).unwrap();
    probe.step(&mut gradients).unwrap();
    let coefficient = arrived(&mut probe).outputs().coefficient;
    assert!(coefficient < 0.1);
    let expected: Vec<f32> = (1..=12u8).map(|x| f32::from(x) * coefficient).collect();
    for variable in [&w, &v] {
        assert_eq!(floats(gradients.get(variable).unwrap()), expected);
    }
    assert_eq!(floats(gradients.get(&b).unwrap()), [coefficient; 4]);
    assert_eq!(floats(&b), [1.0; 4], "the weight stays");
}

#[test]
fn half_precision_is_measured_and_clipped_as_it_is() {
    let half = Var::zeros(40, DType::F16, &Device::Cpu).unwrap();
    let brain = Var::zeros((3, 5), DType::BF16, &Device::Cpu).unwrap();
    let empty = Var::zeros((0, 5), DType::F32, &Device::Cpu).unwrap();
    let halves: Vec<f16> = (0..40u8).map(|i| f16::from_f32(f32::from(i) * 1500.0)).collect();
    let brains: Vec<bf16> = (0..15u8).map(|i| bf16::from_f32(f32::from(i) * 1e-30)).collect();
    let mut gradients = GradStore::default();
    gradients.insert(&half, Tensor::from_vec(halves.clone(), 40, &Device::Cpu).unwrap());
    gradients.insert(&brain, Tensor::from_vec(brains.clone(), (3, 5), &Device::Cpu).unwrap());
    gradients.insert(&empty, empty.zeros_like().unwrap());
    let config = Config::default().clip(Clip::global_norm(1.0));
    // Not in the order of the names, and one of them twice.
    let listed = [("half", &half), ("brain", &brain), ("empty", &empty), ("tied", &half)];
    let mut probe = CandleProbe::of_variables(listed.map(|(name, of)| (name, of.clone())), config.clone()).unwrap();
    probe.step(&mut gradients).unwrap();
    let measured = arrived(&mut probe);
    let planned = [("half", ProbeDType::F16, 40), ("brain", ProbeDType::BF16, 15), ("empty", ProbeDType::F32, 0)];
    let plan = Plan::new(planned).unwrap().with_shapes([vec![40], vec![3, 5], vec![0, 5]]).unwrap();
    let tensors = [HostTensor::F16(&halves), HostTensor::BF16(&brains), HostTensor::F32(&[])];
    let report = on_cpu(&plan, config, &tensors);
    assert_eq!(measured.plan(), &plan);
    assert_eq!(bytes(&measured), bytes(&report));
    let clipped = gradients.get(&half).unwrap();
    assert_eq!(clipped.dtype(), DType::F16);
    let last = floats(clipped)[39];
    assert!((last / (58500.0 * report.outputs().coefficient) - 1.0).abs() < 1e-3, "{last}");
}

#[test]
fn what_goes_beyond_a_step_is_that_of_the_probe_on_the_cpu() {
    let map = model(&Device::Cpu);
    let config = Config::default().tracking(GsnrConfig::default()).history(3).histogram().rules(Rules::default());
    let mut probe = CandleProbe::new(&map, config.clone()).unwrap().with_weights().unwrap();

    let of_gradients = |index: u8| {
        let gradients = (common::loss(&map) * f64::from(index)).unwrap().backward().unwrap();
        let data = elements(&map, &names(), &gradients);
        (gradients, data)
    };
    let steps: Vec<_> = (1..=3).map(of_gradients).collect();
    let plan = probe.plan().clone();
    let weights: Vec<Vec<f32>> = plan.tensors().iter().map(|tensor| floats(&variable(&map, &tensor.name))).collect();
    let order = backward_order(&plan);
    let mut other = Probe::new(Cpu, plan.clone(), config.backward_order(order)).unwrap();
    // In the plan's order, which has one tensor more than there are gradients.
    fn given<'a>(plan: &Plan, data: &'a [Vec<f32>]) -> Vec<&'a dyn gradprobe::Tensor> {
        let mut data = data.iter();
        let of = |tensor: &gradprobe::TensorSpec| match tensor.name.as_str() {
            "unused.weight" => &gradprobe::Absent as &dyn gradprobe::Tensor,
            _ => data.next().unwrap(),
        };
        plan.tensors().iter().map(of).collect()
    }
    let weights: Vec<&dyn gradprobe::Tensor> = weights.iter().map(|weight| weight as _).collect();
    for (gradients, data) in &steps {
        probe.measure(gradients).unwrap();
        let measured = probe.poll().unwrap().unwrap();
        other.measure_with_weights(&given(&plan, data), &weights).unwrap();
        let report = other.wait().unwrap();
        assert_eq!(bytes(&measured), bytes(&report));
        assert_eq!(measured.weights(), report.weights());
        assert_eq!(measured.health_words(), report.health_words());
        assert_eq!(measured.diagnosis().unwrap().findings(), report.diagnosis().unwrap().findings());
        assert_eq!(missing(&measured), ["unused.weight"]);
        assert_eq!(measured.to_string(), report.to_string());
        assert!(probe.poll().unwrap().is_none());
        assert_eq!(bytes(&probe.wait().unwrap()), bytes(&report));
    }
    let (gradients, data) = &steps[2];
    let gsnr = probe.probe().gsnr().unwrap().report().unwrap();
    assert_eq!(gsnr.to_string(), other.gsnr().unwrap().report().unwrap().to_string());
    assert_eq!(probe.probe().history().unwrap().report().unwrap().steps().len(), 3);
    let histogram = other.histogram().unwrap().measure(&given(&plan, data)).unwrap();
    let lent = probe.lend(gradients, |probe, tensors| probe.histogram()?.measure(tensors)).unwrap();
    assert_eq!(lent.histograms(), histogram.histograms());
}

#[test]
fn who_does_not_ask_gets_the_last_report() {
    let (map, [w, ..]) = small();
    let mut probe = CandleProbe::new(&map, Config::default()).unwrap();
    let mut gradients = GradStore::default();
    gradients.insert(&w, counting(&w));
    for _ in 0..6 {
        probe.measure(&gradients).unwrap();
    }
    let steps: Vec<u64> = std::iter::from_fn(|| probe.poll().unwrap()).map(|measured| measured.step()).collect();
    assert_eq!(steps, [6]);
}

/// Counts the bytes that each thread allocates.
struct Counted;

thread_local! {
    static ALLOCATED: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: the system's allocator, unchanged; the count is no memory of its own.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.with(|bytes| bytes.set(bytes.get() + layout.size() as u64));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static COUNTED: Counted = Counted;

/// Bytes that this thread has allocated so far.
fn allocated() -> u64 {
    ALLOCATED.with(Cell::get)
}

/// A gradient of an idle expert, say: nothing begins anew.
#[test]
fn a_gradient_that_comes_and_goes_changes_nothing_else() {
    let (map, [w, v, b]) = small();
    let clip = Clip::Percentile { percentile: 50.0, history: 8, max_norm: None };
    let config = Config::default().clip(clip).history(8).tracking(GsnrConfig::default());
    let mut probe = CandleProbe::new(&map, config.clone()).unwrap();
    let own = config.bytes(probe.plan()).unwrap();
    let addresses = probe.probe().addresses();
    let mut clipped = Vec::new();
    for step in 0..6 {
        let mut gradients = GradStore::default();
        for variable in [&w, &v, &b] {
            gradients.insert(variable, counting(variable));
        }
        if step % 2 == 1 {
            gradients.remove(&b).unwrap();
        }
        if step == 5 {
            gradients.insert(&w, (counting(&w) * 100.0).unwrap());
        }
        let before = allocated();
        probe.step(&mut gradients).unwrap();
        let bytes = allocated() - before;
        // The lists that a step makes; the threads are started in the first.
        assert!(step == 0 || bytes < own / 8, "step {step} allocates {bytes} bytes, the probe has {own}");
        let report = arrived(&mut probe);
        assert_eq!(report.step(), step + 1);
        assert_eq!(missing(&report), if step % 2 == 1 { &["b"][..] } else { &[] });
        clipped.push(report.outputs().coefficient < 1.0);
    }
    assert_eq!(probe.probe().addresses(), addresses, "it is the same memory");
    assert!(clipped[5], "the last norm is far above the median of those before");
    let history = probe.probe().history().unwrap().report().unwrap();
    assert_eq!(history.steps().len(), 6);
    let (of_b, of_v) = (history.tensor_norm(0), history.tensor_norm(1));
    assert_eq!((of_b.steps, of_v.steps), (3, 6));
    let gsnr = probe.probe().gsnr().unwrap().report().unwrap();
    assert_eq!(
        gsnr.tensors().map(|(name, record)| (name, record.steps)).collect::<Vec<_>>(),
        [("b", 3), ("v", 6), ("w", 6)]
    );
}

#[test]
fn a_nan_is_named_and_the_step_to_be_skipped() {
    let map = model(&Device::Cpu);
    let mut gradients = gradients(&map);
    let weight = variable(&map, "layers.7.weight");
    let mut elements = floats(gradients.get(&weight).unwrap());
    elements[30] = f32::NAN;
    gradients.insert(&weight, Tensor::from_vec(elements, (24, 24), &Device::Cpu).unwrap());
    let before = common::elements(&map, &["scale".to_owned()], &gradients);
    let config = Config::default().clip(Clip::global_norm(1.0)).rules(Rules::default());
    let mut probe = CandleProbe::new(&map, config).unwrap();
    probe.step(&mut gradients).unwrap();
    let measured = arrived(&mut probe);
    assert!(measured.skip());
    assert_eq!(
        common::elements(&map, &["scale".to_owned()], &gradients),
        before,
        "a step to be skipped is not clipped"
    );
    let diagnosis = measured.diagnosis().unwrap();
    assert_eq!(diagnosis.verdict(), Verdict::Critical);
    let nan = diagnosis.findings().iter().find(|finding| finding.kind == FindingKind::Nan).unwrap();
    assert_eq!(nan.tensor.as_deref(), Some("layers.7.weight"));
}

/// The loss scale is the trainer's, whatever the set of gradients; what is measured and left is unscaled.
#[test]
fn a_loss_scale_goes_on_with_another_set_of_gradients() {
    let map = model(&Device::Cpu);
    let plain = gradients(&map);
    let scaled = |scale: f32| {
        let mut scaled = gradients(&map);
        for name in names() {
            let variable = variable(&map, &name);
            let gradient = (plain.get(&variable).unwrap() * f64::from(scale)).unwrap();
            scaled.insert(&variable, gradient);
        }
        scaled
    };
    let rule = LossScale::dynamic().initial(4.0).growth_interval(1);
    let mut probe = CandleProbe::new(&map, Config::default().loss_scale(rule)).unwrap();
    let mut seen = Vec::new();
    for step in 0..5 {
        let scale = seen.last().map_or(4.0, |&(_, next)| next);
        let mut gradients = scaled(scale);
        if step == 2 {
            gradients.remove(&variable(&map, &names()[0]));
        }
        probe.step(&mut gradients).unwrap();
        let measured = arrived(&mut probe);
        let outputs = measured.outputs();
        seen.push((outputs.loss_scale, outputs.next_loss_scale));
        if step != 2 {
            assert_eq!(elements(&map, &names(), &gradients), elements(&map, &names(), &plain), "unscaled");
        }
        if step == 3 {
            probe.probe().set_loss_scale(2.0).unwrap();
            seen.push((0.0, 2.0));
        }
    }
    assert_eq!(seen, [(4.0, 8.0), (8.0, 16.0), (16.0, 32.0), (32.0, 64.0), (0.0, 2.0), (2.0, 4.0)]);
}
