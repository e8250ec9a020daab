//! Micro-batches measured beside the steps of an accumulation: the records that each has alone, merged exactly, and steps
//! that do not know of them; on the CPU and in the kernels on the host.
#![allow(unsafe_code, reason = "gives the probe bare addresses")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

mod common;

use common::{
    cases::{Data, Tensor, normal},
    check::{self, Seen},
    demand_none, oracle,
};
use gradprobe::{
    Backend, Clip, Config, Probe, DType, Error, HostTensor, LossScale, MicroBatchReport, Plan, Record, Report,
    launch::RawTensor,
};
use gradprobe_simt::{Schedule, Simt, Probe};

const MICRO_BATCHES: u32 = 4;

/// The gradients of a micro-batch, one in a while with a NaN.
fn gradients(step: u64, micro_batch: u64) -> Vec<Data> {
    let key = 10 * (10 * step + micro_batch);
    let a = Tensor::of_values(DType::F32, 40_000, move |i| (1.0 + step as f64) * 0.01 * normal(key, i));
    let b = Tensor::of_values(DType::BF16, 77, move |i| normal(key + 1, i));
    let b = if step == 1 && micro_batch == 2 { b.with(13, 0x7fc0).with(20, 0x7f80) } else { b };
    vec![a.data(), b.data(), Tensor::empty(DType::F16).data()]
}

fn tensors(data: &[Data]) -> Vec<HostTensor<'_>> {
    data.iter().map(Data::tensor).collect()
}

fn plan() -> Plan {
    plan_of(["a", "b", "none"].into_iter().zip(tensors(&gradients(0, 0)))).unwrap()
}

/// A probe that measures micro-batches.
trait Accumulates: Backend {
    fn enable(&mut self, count: u32) -> Result<(), Error>;
    fn micro_batch(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error>;
    fn report(&mut self) -> Result<MicroBatchReport, Error>;
}

impl Accumulates for Probe {
    fn enable(&mut self, count: u32) -> Result<(), Error> {
        self.enable_micro_batches(count)
    }
    fn micro_batch(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error> {
        self.measure_micro_batch(tensors)
    }
    fn report(&mut self) -> Result<MicroBatchReport, Error> {
        self.micro_batches()
    }
}

impl Accumulates for Probe {
    fn enable(&mut self, count: u32) -> Result<(), Error> {
        self.inner().enable_micro_batches(count)
    }
    fn micro_batch(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error> {
        let raw = |tensor: &HostTensor<'_>| RawTensor {
            address: tensor.as_bytes().as_ptr() as u64,
            len: tensor.len() as u64,
            dtype: tensor.dtype(),
        };
        let raw: Vec<RawTensor> = tensors.iter().map(raw).collect();
        let _lent = gradprobe_simt::lend(&raw, false);
        // SAFETY: slices that live through the launch, which has run on return.
        unsafe { self.inner().measure_micro_batch_raw(&raw) }
    }
    fn report(&mut self) -> Result<MicroBatchReport, Error> {
        self.inner().micro_batches()
    }
}

fn probes(config: Config) -> [Box<dyn Accumulates>; 3] {
    let simt =
        |schedule| Probe::new(Simt { schedule, blocks: 3, ..Simt::default() }, plan(), config).unwrap();
    [Probe::new(Cpu, plan(), config).unwrap(), simt(Schedule::Forward), simt(Schedule::Shuffled(4))]
}

fn bytes_of(report: &Report) -> Vec<u8> {
    [bytemuck::bytes_of(report.outputs()), bytemuck::cast_slice(report.records())].concat()
}

#[test]
fn micro_batches_have_their_own_records_and_disturb_no_step() {
    let clip = Clip::ZScore { smoothing: 0.9, threshold: 0.5, warmup: 2 };
    for config in [
        Config::default().clip(Clip::global_norm(0.5)).clip(clip),
        Config::default().clip(Clip::global_norm(0.5)).loss_scale(LossScale::dynamic().initial(8.0).growth_interval(1)),
    ] {
        for mut probe in probes(config) {
            // Nothing of a step is another for the micro-batches before it.
            let mut undisturbed = Probe::new(Cpu, plan(), config).unwrap();
            probe.enable(MICRO_BATCHES).unwrap();
            for step in 0..4u64 {
                let scale = undisturbed.loss_scale().unwrap_or(1.0);
                // Not every accumulation is as long.
                let count = [4, 4, 1, 3][step as usize];
                for micro_batch in 0..count {
                    probe.micro_batch(&tensors(&gradients(step, micro_batch))).unwrap();
                    assert_eq!(probe.report().unwrap().len(), 1 + micro_batch as usize);
                }
                let sum = gradients(step, 9);
                let (seen, expected) =
                    (probe.measure_host(&tensors(&sum)).unwrap(), undisturbed.measure(&tensors(&sum)).unwrap());
                assert!(bytes_of(&seen) == bytes_of(&expected), "step {step}");

                let report = probe.report().unwrap();
                assert_eq!(report.len(), count as usize);
                let mut complaints = Vec::new();
                let mut merged = [Record::EMPTY; 3];
                for micro_batch in 0..count {
                    let mut alone = Config::default();
                    alone.loss_scale = config.loss_scale.map(|_| LossScale::fixed(scale));
                    let data = gradients(step, micro_batch);
                    let alone = Probe::new(Cpu, plan(), alone).unwrap().measure(&tensors(&data)).unwrap();
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
                    let mut truth_config = config;
                    truth_config.loss_scale = config.loss_scale.map(|_| LossScale::fixed(scale));
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
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    for mut probe in probes(Config::default()) {
        let data = gradients(0, 0);
        let not_enabled = Error::NotEnabled { what: "micro_batches" };
        assert_eq!(probe.micro_batch(&tensors(&data)).unwrap_err(), not_enabled);
        assert_eq!(probe.report().unwrap_err(), not_enabled);
        assert_eq!(probe.enable(0).unwrap_err().to_string(), "micro_batches must be at least 1, not 0");
        probe.enable(2).unwrap();
        assert_eq!(probe.report().unwrap_err(), Error::NotMeasured);
        assert!(matches!(probe.micro_batch(&tensors(&data)[..2]), Err(Error::TensorCount { .. })));
        assert_eq!(probe.report().unwrap_err(), Error::NotMeasured, "what was refused takes no place");
        probe.micro_batch(&tensors(&data)).unwrap();
        probe.micro_batch(&tensors(&data)).unwrap();
        let full = probe.micro_batch(&tensors(&data)).unwrap_err();
        assert_eq!(full.to_string(), "there is room for 2 micro-batches, and no step was measured after the last");
        assert_eq!(probe.report().unwrap().len(), 2);
        // A step makes room, and leaves the last ones to be read until the next come.
        probe.measure_host(&tensors(&data)).unwrap();
        assert_eq!(probe.report().unwrap().len(), 2);
        probe.micro_batch(&tensors(&data)).unwrap();
        assert_eq!(probe.report().unwrap().len(), 1);
    }
}
