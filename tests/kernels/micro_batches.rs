//! Micro-batches measured beside the steps of an accumulation: the records that each has alone, merged exactly, and steps
//! that do not know of them; on the CPU and in the kernels on the host.
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

use crate::common::{
    cases::{Data, Tensor, normal},
    check::{self, Seen},
    demand_none,
    host::{OnHost, plan_of, refs},
    oracle, tensors,
};
use gradprobe::{Absent, Clip, Config, Cpu, DType, Error, Plan, Probe, Record, Report, clip::LossScale};
use gradprobe_simt::{Schedule, Simt};

const MICRO_BATCHES: u32 = 4;

/// The gradients of a micro-batch, one in a while with a NaN.
fn gradients(step: u64, micro_batch: u64) -> Vec<Data> {
    let key = 10 * (10 * step + micro_batch);
    let a = Tensor::of_values(DType::F32, 40_000, move |i| (1.0 + step as f64) * 0.01 * normal(key, i));
    let b = Tensor::of_values(DType::BF16, 77, move |i| normal(key + 1, i));
    let b = if step == 1 && micro_batch == 2 { b.with(13, 0x7fc0).with(20, 0x7f80) } else { b };
    vec![a.data(), b.data(), Tensor::empty(DType::F16).data()]
}

fn plan() -> Plan {
    plan_of(["a", "b", "none"].into_iter().zip(tensors(&gradients(0, 0)))).unwrap()
}

/// Measures the next micro-batch.
fn micro_batch(probe: &mut Probe, data: &[Data]) -> Result<(), Error> {
    probe.micro_batches()?.measure(&refs(&tensors(data)))
}

fn probes(config: &Config) -> [Probe; 3] {
    let simt = |schedule| Probe::new(Simt { schedule, blocks: 3, ..Simt::default() }, plan(), config.clone()).unwrap();
    [Probe::new(Cpu, plan(), config.clone()).unwrap(), simt(Schedule::Forward), simt(Schedule::Shuffled(4))]
}

fn bytes_of(report: &Report) -> Vec<u8> {
    [bytemuck::bytes_of(report.outputs()), bytemuck::cast_slice(report.records())].concat()
}

#[test]
fn micro_batches_have_their_own_records_and_disturb_no_step() {
    let clip = Clip::ZScore { smoothing: 0.9, threshold: 0.5, warmup: 2, max_norm: Some(0.5) };
    for config in [
        Config::default().clip(clip),
        Config::default().clip(Clip::global_norm(0.5)).loss_scale(LossScale::dynamic().initial(8.0).growth_interval(1)),
    ] {
        for mut probe in probes(&config.clone().micro_batches(MICRO_BATCHES)) {
            // Nothing of a step is another for the micro-batches before it.
            let mut undisturbed = Probe::new(Cpu, plan(), config.clone()).unwrap();
            let mut scale = config.features.loss_scale.map_or(1.0, |loss_scale| loss_scale.initial);
            for step in 0..4u64 {
                // Not every accumulation is as long.
                let count = [4, 4, 1, 3][step as usize];
                for micro_batch in 0..count {
                    let mut room = probe.micro_batches().unwrap();
                    room.measure(&refs(&tensors(&gradients(step, micro_batch)))).unwrap();
                    assert_eq!(room.report().unwrap().len(), 1 + micro_batch as usize);
                }
                let sum = gradients(step, 9);
                let (seen, expected) =
                    (probe.measure_host(&tensors(&sum)).unwrap(), undisturbed.measure_host(&tensors(&sum)).unwrap());
                assert!(bytes_of(&seen) == bytes_of(&expected), "step {step}");

                let report = probe.micro_batches().unwrap().report().unwrap();
                assert_eq!(report.len(), count as usize);
                let mut complaints = Vec::new();
                let mut merged = [Record::EMPTY; 3];
                for micro_batch in 0..count {
                    let mut alone = Config::default();
                    alone.features.loss_scale = config.features.loss_scale.map(|_| LossScale::fixed(scale));
                    let data = gradients(step, micro_batch);
                    let alone = Probe::new(Cpu, plan(), alone).unwrap().measure_host(&tensors(&data)).unwrap();
                    let seen = report.records(micro_batch as usize);
                    for ((name, record), expected) in ["a", "b", "none"].iter().zip(seen).zip(alone.records()) {
                        complaints.extend(check::same_record(name, record, expected));
                    }
                    merged = [0, 1, 2].map(|t: usize| merged[t].merge(&alone.records()[t]));
                }
                assert!(report.merged() == merged, "step {step}");
                // Against the exact statistics of all of them, one after the other.
                for (t, merged) in merged.iter().enumerate() {
                    let parts: Vec<Data> = (0..count).map(|m| gradients(step, m).swap_remove(t)).collect();
                    let mut truth_config = config.clone();
                    truth_config.features.loss_scale = config.features.loss_scale.map(|_| LossScale::fixed(scale));
                    let bits = parts.iter().flat_map(|part| part.bits().collect::<Vec<_>>());
                    let truth = oracle::truth_under(&truth_config, parts[0].dtype(), bits);
                    complaints.extend(check::check_tensor("merged", &Seen::of(merged), &truth));
                }
                demand_none(&complaints);
                let bad = (step == 1).then_some((2, 13));
                assert_eq!([0, 1, 2].map(|t| report.first_nonfinite(t)), [None, bad, None]);
                let text = report.to_string();
                assert_eq!(text.contains("b at element 13"), step == 1, "{text}");
                assert_eq!(text.lines().count(), 1 + count as usize);
                scale = if config.features.loss_scale.is_some() { expected.outputs().next_loss_scale } else { 1.0 };
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let data = gradients(0, 0);
    for mut probe in probes(&Config::new()) {
        let undeclared = Err(Error::NotDeclared { declare: "Config::micro_batches" });
        assert_eq!(micro_batch(&mut probe, &data), undeclared);
        assert_eq!(probe.micro_batches().map(drop), undeclared);
    }
    for refused in [
        Probe::new(Cpu, plan(), Config::new().micro_batches(0)).map(drop),
        Probe::new(Simt::default(), plan(), Config::new().micro_batches(0)).map(drop),
        Config::new().micro_batches(0).bytes(&plan()).map(drop),
    ] {
        assert_eq!(refused.unwrap_err().to_string(), "micro_batches must be at least 1, not 0");
    }
    for mut probe in probes(&Config::new().micro_batches(2)) {
        let report = |probe: &mut Probe| probe.micro_batches().unwrap().report();
        assert_eq!(report(&mut probe).unwrap_err(), Error::NotMeasured);
        assert!(matches!(micro_batch(&mut probe, &data[..2]), Err(Error::TensorCount { .. })));
        assert_eq!(report(&mut probe).unwrap_err(), Error::NotMeasured, "what was refused takes no place");
        micro_batch(&mut probe, &data).unwrap();
        micro_batch(&mut probe, &data).unwrap();
        let full = micro_batch(&mut probe, &data).unwrap_err();
        assert_eq!(full.to_string(), "there is room for 2 micro-batches, and no step was measured after the last");
        assert_eq!(report(&mut probe).unwrap().len(), 2);
        // A step makes room, and leaves the last ones to be read until the next come.
        probe.measure_host(&tensors(&data)).unwrap();
        assert_eq!(report(&mut probe).unwrap().len(), 2);
        micro_batch(&mut probe, &data).unwrap();
        assert_eq!(report(&mut probe).unwrap().len(), 1);
    }
}

#[test]
fn a_tensor_that_is_absent_has_an_empty_record_in_its_micro_batch() {
    for mut probe in probes(&Config::new().micro_batches(MICRO_BATCHES)) {
        // In this accumulation nothing is absent: no record of it stays.
        (0..4).for_each(|number| micro_batch(&mut probe, &gradients(1, number)).unwrap());
        probe.measure_host(&tensors(&gradients(1, 9))).unwrap();

        let of_first = gradients(2, 0);
        let [a, b, none] = &tensors(&of_first)[..] else { panic!("three") };
        let mut room = probe.micro_batches().unwrap();
        room.measure(&[a, b, none]).unwrap();
        room.measure(&[a, &Absent, none]).unwrap();
        room.measure(&[&Absent, b, &Absent]).unwrap();
        assert_eq!(room.measure(&[&Absent, &Absent, none]), Err(Error::AllAbsent));
        let report = room.report().unwrap();
        assert_eq!(report.len(), 3, "what was refused takes no place");
        let [of_a, of_b, of_none] = *report.records(0) else { panic!("{report}") };
        assert_eq!((of_a.count, of_b.count, of_none), (40_000, 77, Record::EMPTY));
        assert!(report.records(1) == [of_a, Record::EMPTY, Record::EMPTY]);
        assert!(report.records(2) == [Record::EMPTY, of_b, Record::EMPTY]);
        assert!(report.merged() == [of_a.merge(&of_a), of_b.merge(&of_b), Record::EMPTY]);
        // And the step knows nothing of that.
        let seen = probe.measure_host(&[*a, *b, *none]).unwrap();
        assert!(seen.records() == [of_a, of_b, Record::EMPTY]);
    }
}
