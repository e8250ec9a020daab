//! Weights measured beside their gradients: each list has the bits it has alone, on the CPU and in the kernels on the
//! host, whatever the other holds.

use crate::common::{
    Placed, Prepared,
    cases::{Data, cases, others},
    demand_none,
    host::{OnHost, plan_of},
    placed, short, tensors,
};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, Plan, Probe, Record, Report, StepOutputs,
    Tensor,
};
use gradprobe_simt::{Schedule, Simt};
use half::bf16;

/// Both lists measured in one step, placed at misalignments of their own.
fn together(probe: &mut Probe, gradients: &[Data], weights: &[Data], offset: usize) -> Report {
    let (a, b) = (placed(gradients, offset, 1), placed(weights, offset, offset));
    let (a, b): (Vec<_>, Vec<_>) = (a.iter().map(Placed::tensor).collect(), b.iter().map(Placed::tensor).collect());
    probe.measure_host_with_weights(&a, &b).unwrap()
}

fn same_bits(a: &[Record], b: &[Record]) -> bool {
    bytemuck::cast_slice::<_, u8>(a) == bytemuck::cast_slice::<_, u8>(b)
}

#[test]
fn each_list_has_the_bits_it_has_alone() {
    let mut complaints = Vec::new();
    for case in cases().iter().filter(|case| !case.large).step_by(if short() { 4 } else { 1 }) {
        let prepared = Prepared::new(case);
        let weights = others(case);
        let plan = || prepared.plan().with_weights(weights.iter().map(Data::dtype)).unwrap();
        let alone = |data: &[Data], config: Config| {
            let plan = plan_of(prepared.names.iter().cloned().zip(tensors(data))).unwrap();
            Probe::new(Cpu, plan, config).unwrap().measure_host(&tensors(data)).unwrap()
        };
        // Weights are scaled by nothing.
        let mut of_weights = case.config.clone();
        of_weights.features.loss_scale = None;
        let (of_gradients, of_weights) = (alone(&prepared.data, case.config.clone()), alone(&weights, of_weights));
        let shuffled = Simt { schedule: Schedule::Shuffled(3), blocks: 3, ..Simt::default() };
        let probes: [Probe; 2] = [
            Probe::new(Cpu, plan(), case.config.clone()).unwrap(),
            Probe::new(shuffled, plan(), case.config.clone()).unwrap(),
        ];
        for mut probe in probes {
            let place = format!("{} on {}", case.name, probe.device());
            let mut complain = |what: &str| complaints.push(format!("{place}: {what}"));
            let seen = together(&mut probe, &prepared.data, &weights, 3);
            if !same_bits(seen.records(), of_gradients.records()) {
                complain("the gradients' records");
            }
            if !seen.weights().is_some_and(|seen| same_bits(seen, of_weights.records())) {
                complain("the weights' records");
            }
            let expected = StepOutputs { weights: 1, ..*of_gradients.outputs() };
            if bytemuck::bytes_of(seen.outputs()) != bytemuck::bytes_of(&expected) {
                complain("the outputs");
            }
            // A step without them, between two with.
            let without = probe.measure_host(&tensors(&prepared.data)).unwrap();
            if without.weights().is_some() || !same_bits(without.records(), of_gradients.records()) {
                complain("a step without weights");
            }
            let again = together(&mut probe, &prepared.data, &weights, 0);
            if !again.weights().is_some_and(|seen| same_bits(seen, of_weights.records())) {
                complain("a second step with weights");
            }
        }
    }
    demand_none(&complaints);
}

#[test]
fn known_answers() {
    let (gradient, weight) = ([0.3f32, -0.4], [bf16::from_f32(3.0), bf16::from_f32(-4.0)]);
    let plan = Plan::new([("w", DType::F32, 2), ("zero", DType::F32, 2), ("none", DType::F16, 0)]).unwrap();
    let plan = plan.with_weights([DType::BF16, DType::F32, DType::F16]).unwrap();
    assert_eq!(plan.weights(), Some(&[DType::BF16, DType::F32, DType::F16][..]));
    let gradients = [HostTensor::F32(&gradient), HostTensor::F32(&gradient), HostTensor::F16(&[])];
    let zeros = [0.0f32; 2];
    let weights = [HostTensor::BF16(&weight), HostTensor::F32(&zeros), HostTensor::F16(&[])];
    let mut probe = Probe::new(Cpu, plan, Config::default().clip(Clip::global_norm(0.1))).unwrap();
    let report = probe.measure_host_with_weights(&gradients, &weights).unwrap();
    let norms: Vec<_> = report.tensors().map(|tensor| tensor.param_norm).collect();
    assert_eq!(norms, [Some(5.0), Some(0.0), Some(0.0)]);
    let ratios: Vec<_> = report.tensors().map(|tensor| tensor.ratio()).collect();
    assert!((ratios[0].unwrap() - 0.1).abs() < 1e-8 && ratios[1..] == [None, None], "{ratios:?}");
    assert_eq!(report.tensors().next().unwrap().weight.unwrap().max_abs(), Some(4.0));
    let text = report.to_string();
    assert!(text.contains("param norm") && text.contains("1.000e-1"), "{text}");
    // Norms known from elsewhere win, and a step without weights knows none.
    let given = report.with_param_norms(&[10.0, 1.0, 1.0]).unwrap();
    assert_eq!(given.tensors().next().unwrap().param_norm, Some(10.0));
    assert_eq!(probe.measure_host(&gradients).unwrap().tensors().next().unwrap().param_norm, None);
}

#[test]
fn weights_that_are_not_finite_change_nothing_but_their_records() {
    let plan = || Plan::new([("w", DType::F32, 3)]).unwrap().with_weights([DType::F32]).unwrap();
    let config = Config::default().clip(Clip::global_norm(1.0));
    let probes: [Probe; 2] = [
        Probe::new(Cpu, plan(), config.clone()).unwrap(),
        Probe::new(Simt::default(), plan(), config.clone()).unwrap(),
    ];
    for mut probe in probes {
        let (mut gradient, weight) = ([3.0f32, 0.0, 4.0], [f32::NAN, f32::INFINITY, 1.0]);
        let lists = ([HostTensor::F32(&gradient)], [HostTensor::F32(&weight)]);
        let report = probe.measure_host_with_weights(&lists.0, &lists.1).unwrap();
        let outputs = report.outputs();
        assert!((outputs.total_norm - 5.0).abs() < 1e-6, "{outputs:?}");
        assert_eq!((outputs.found_inf, outputs.skip, outputs.weights), (0.0, 0, 1));
        let record = report.weights().unwrap()[0];
        assert_eq!((record.nan_count, record.inf_count, record.first_nonfinite()), (1, 1, Some(0)));
        assert!(report.tensors().next().unwrap().ratio().unwrap().is_nan());
        probe.clip_host(&mut [HostTensorMut::F32(&mut gradient)]).unwrap();
        assert!((gradient[2] - 0.8).abs() < 1e-6, "{gradient:?}");
    }
}

#[test]
fn what_was_not_planned_is_refused() {
    let tensors = [("a", DType::F32, 2), ("b", DType::BF16, 2)];
    let plan = || Plan::new(tensors).unwrap();
    assert_eq!(
        plan().with_weights([DType::F32]),
        Err(Error::TensorCount { planned: 2, given: 1, first: Some("b".to_owned()) })
    );
    let (wide, narrow, long) = ([1.0f32; 2], [bf16::ONE; 2], [1.0f32; 3]);
    let gradients = [HostTensor::F32(&wide), HostTensor::BF16(&narrow)];
    let master = [HostTensor::F32(&wide), HostTensor::F32(&wide)];
    let config = Config::default();
    let probes: [Probe; 2] = [
        Probe::new(Cpu, plan(), config.clone()).unwrap(),
        Probe::new(Simt::default(), plan(), config.clone()).unwrap(),
    ];
    for mut probe in probes {
        assert_eq!(
            probe.measure_host_with_weights(&gradients, &master).map(drop),
            Err(Error::NotDeclared { declare: "Plan::with_weights" })
        );
    }
    let plan = || plan().with_weights([DType::F32; 2]).unwrap();
    let probes: [Probe; 2] = [
        Probe::new(Cpu, plan(), config.clone()).unwrap(),
        Probe::new(Simt::default(), plan(), config.clone()).unwrap(),
    ];
    for mut probe in probes {
        let count = probe.measure_host_with_weights(&gradients, &master[..1]).map(drop);
        assert_eq!(count, Err(Error::TensorCount { planned: 2, given: 1, first: Some("b".to_owned()) }));
        for second in [HostTensor::BF16(&narrow), HostTensor::F32(&long)] {
            let refused = probe.measure_host_with_weights(&gradients, &[master[0], second]).map(drop);
            assert!(matches!(&refused, Err(Error::TensorMismatch { name, .. }) if name == "b"), "{refused:?}");
        }
        assert_eq!(probe.measure_host_with_weights(&gradients, &master).unwrap().step(), 1);
    }
}

/// A weight that is not given in a step, and a gradient that is not.
#[test]
fn what_is_absent_has_an_empty_record_beside_the_other_list() {
    let plan =
        || Plan::new([("a", DType::F32, 2), ("b", DType::F32, 2)]).unwrap().with_weights([DType::F32; 2]).unwrap();
    let config = Config::new().clip(Clip::global_norm(1.0));
    for mut probe in
        [Probe::new(Cpu, plan(), config.clone()).unwrap(), Probe::new(Simt::default(), plan(), config).unwrap()]
    {
        let (x, y) = ([3.0f32, 4.0], [30.0f32, 40.0]);
        let (gradients, weights): ([&dyn Tensor; 2], [&dyn Tensor; 2]) = ([&x, &Absent], [&Absent, &y]);
        probe.measure_with_weights(&gradients, &weights).unwrap();
        let report = probe.wait().unwrap();
        let of: Vec<_> = report.tensors().map(|t| (t.is_absent(), t.record.count, t.weight.unwrap().count)).collect();
        assert_eq!(of, [(false, 2, 0), (true, 0, 2)]);
        assert!((report.outputs().total_norm - 5.0).abs() < 1e-6);
        assert_eq!(report.weights().unwrap()[1].finite_l2_norm(), 50.0);
    }
}
