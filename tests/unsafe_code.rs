//! The unsafe code of the CPU: memory that kernels find by addresses. A few elements of everything, for Miri, which looks at
//! each access: `.ci/run` has it do so. As an ordinary test it compares with what a fresh probe says.
#![allow(unsafe_code, reason = "names memory by its address")]

#[path = "common/clips.rs"]
mod clips;

use clips::CLIPS;
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, HostTensor, Plan, Probe, RawTensor, Report, Rules, Tensor, TensorMut,
    clip::{AdaptiveClip, LossScale},
    device::Device,
    gsnr::{AdamMoments, AdamStep, GsnrConfig},
    optim::{AdamW, Lion, Optimizer, Sgd},
    ranks::{Along, Mesh, Ranks, ReplicaCheck, ThreadCommunicator, Transport},
    samples::SampleConfig,
};
use half::{bf16, f16};
use std::thread;

/// A tile and more, a packet and one, four packets, one, none. Under Miri tiles are smaller.
const LENGTHS: [usize; 5] = [if cfg!(miri) { 131 } else { 2051 }, 9, 32, 1, 0];
const DTYPES: [DType; 5] = [DType::F16, DType::F32, DType::BF16, DType::F32, DType::F16];
const WEIGHTS: [DType; 5] = [DType::BF16, DType::F32, DType::BF16, DType::F16, DType::F32];

/// Elements on the host, at an odd place of their memory.
#[derive(Clone, Debug, PartialEq)]
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Elements {
    fn of(dtype: DType, len: usize, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut values = (0..=len).map(|_| random.f32() - 0.5);
        match dtype {
            DType::F32 => Self::F32(values.collect()),
            DType::F16 => Self::F16(values.by_ref().map(f16::from_f32).collect()),
            DType::BF16 => Self::BF16(values.by_ref().map(bf16::from_f32).collect()),
        }
    }

    fn tensor(&self) -> HostTensor<'_> {
        match self {
            Self::F32(all) => HostTensor::F32(&all[1..]),
            Self::F16(all) => HostTensor::F16(&all[1..]),
            Self::BF16(all) => HostTensor::BF16(&all[1..]),
        }
    }

    fn tensor_mut(&mut self) -> gradprobe::HostTensorMut<'_> {
        match self {
            Self::F32(all) => (&mut all[1..]).into(),
            Self::F16(all) => (&mut all[1..]).into(),
            Self::BF16(all) => (&mut all[1..]).into(),
        }
    }
}

/// Tensors of these types.
fn lists(dtypes: [DType; 5], seed: u64) -> Vec<Elements> {
    let of = |(index, (len, dtype)): (u64, (usize, DType))| Elements::of(dtype, len, seed + index);
    (0..).zip(LENGTHS.into_iter().zip(dtypes)).map(of).collect()
}

fn plan() -> Plan {
    let names = ["a.weight", "a.bias", "b.weight", "b.bias", "none"];
    let tensors = names.into_iter().zip(DTYPES).zip(LENGTHS).map(|((name, dtype), len)| (name, dtype, len as u64));
    Plan::new(tensors).unwrap().with_weights(WEIGHTS).unwrap()
}

/// All that a probe can be declared with.
fn everything(clip: Clip, optimizer: impl Into<Optimizer>) -> Config {
    Config::new()
        .clip(clip)
        .loss_scale(LossScale::dynamic().initial(4.0))
        .history(2)
        .tracking(GsnrConfig::new().tensors(["a.*"]))
        .moments()
        .histogram()
        .dot()
        .samples(SampleConfig::new(7, 2))
        .adaptive_clip(AdaptiveClip::new([1, 3, 8, 0, 5]))
        .optimizer(optimizer)
        .micro_batches(2)
        .rules(Rules::default())
}

fn bits(report: &Report) -> Vec<u8> {
    [bytemuck::bytes_of(report.outputs()), bytemuck::cast_slice(report.records())].concat()
}

/// Uses all of them in a step, in which the second tensor may be absent; gives what is known after it.
fn use_all(probe: &mut Probe, seed: u64, is_absent: bool) -> (Vec<u8>, Vec<Elements>) {
    let (mut gradients, mut weights) = (lists(DTYPES, seed), lists(WEIGHTS, seed + 100));
    let moments = lists([DType::F32; 5], seed + 200);
    {
        let read: Vec<HostTensor> = gradients.iter().map(Elements::tensor).collect();
        let mut read: Vec<&dyn Tensor> = read.iter().map(|tensor| tensor as _).collect();
        if is_absent {
            read[1] = &Absent;
        }
        let of_weights: Vec<HostTensor> = weights.iter().map(Elements::tensor).collect();
        let of_weights: Vec<&dyn Tensor> = of_weights.iter().map(|tensor| tensor as _).collect();

        probe.history().unwrap().tag(seed).unwrap();
        probe.micro_batches().unwrap().measure(&read).unwrap();
        probe.measure_with_weights(&read, &of_weights).unwrap();
        probe.samples().unwrap().take(&read).unwrap();
        assert!(probe.poll().unwrap().is_some());
        assert_eq!(probe.histogram().unwrap().measure(&read).unwrap().histograms().len(), 5);
        assert_eq!(probe.dot().unwrap().measure(&read, &of_weights).unwrap().records().len(), 5);
        let moments: Vec<HostTensor> = moments.iter().map(Elements::tensor).collect();
        let of = |moment| AdamMoments { exp_avg: moment, exp_avg_sq: moment };
        let mut moments: Vec<AdamMoments> = moments.iter().map(|moment| of(moment as &dyn Tensor)).collect();
        moments[2..4].fill(of(&Absent));
        let step = AdamStep { step: 5, beta1: 0.9, beta2: 0.99 };
        assert_eq!(probe.moments().unwrap().report(&step, &moments).unwrap().tensors().len(), 2);
    }
    {
        let read: Vec<HostTensor> = gradients.iter().map(Elements::tensor).collect();
        let read: Vec<&dyn Tensor> = read.iter().map(|tensor| tensor as _).collect();
        let mut moved: Vec<_> = weights.iter_mut().map(Elements::tensor_mut).collect();
        let mut moved: Vec<&mut dyn TensorMut> = moved.iter_mut().map(|tensor| tensor as _).collect();
        probe.update(&read, &mut moved).unwrap();
        probe.optimizer().unwrap().step(&read, &mut moved).unwrap();
    }
    {
        let mut changed: Vec<_> = gradients.iter_mut().map(Elements::tensor_mut).collect();
        let mut changed: Vec<&mut dyn TensorMut> = changed.iter_mut().map(|tensor| tensor as _).collect();
        let of_weights: Vec<HostTensor> = weights.iter().map(Elements::tensor).collect();
        let of_weights: Vec<&dyn Tensor> = of_weights.iter().map(|tensor| tensor as _).collect();
        probe.adaptive_clip().unwrap().clip(&mut changed, &of_weights).unwrap();
        probe.step(&mut changed).unwrap();
    }
    let report = probe.wait().unwrap();
    assert!(report.diagnosis().is_some());
    assert_eq!(probe.adaptive_clip().unwrap().report().unwrap().records().len(), 5);
    assert_eq!(probe.micro_batches().unwrap().report().unwrap().records(0).len(), 5);
    assert_eq!(probe.gsnr().unwrap().report().unwrap().tensors().len(), 2);
    assert!(probe.history().unwrap().report().unwrap().steps().len() == 2);
    assert!(probe.samples().unwrap().report().unwrap().steps().len() <= 2);
    gradients.append(&mut weights);
    (bits(&report), gradients)
}

#[test]
fn everything_goes_on_from_what_was_saved() {
    let optimizers: [fn() -> Optimizer; 4] = [
        || AdamW::new(1e-3).into(),
        || Sgd::new(0.1).into(),
        || Sgd::new(0.1).nesterov(0.9).into(),
        || Lion::new(1e-3).into(),
    ];
    // Under Miri, which takes a minute for each, the last, which keeps something.
    let clips = CLIPS.into_iter().rev().take(if cfg!(miri) { 1 } else { CLIPS.len() });
    for (clip, optimizer) in clips.zip(optimizers.into_iter().cycle()) {
        let config = everything(clip, optimizer());
        let mut probe = Probe::new(Cpu, plan(), config.clone()).unwrap();
        use_all(&mut probe, 1, true);
        let state = probe.state().unwrap();
        let mut again = Probe::new(Cpu, plan(), config).unwrap();
        again.restore(&state).unwrap();
        let seen = use_all(&mut again, 2, false);
        // Miri, to which a step is a minute, need not see another.
        if cfg!(miri) {
            continue;
        }
        assert_eq!(seen, use_all(&mut probe, 2, false), "{clip:?}");
    }
}

#[test]
fn a_tensor_of_two_chunks() {
    let count = if cfg!(miri) { 2051 } else { 32_771 };
    let plan = Plan::new([("w", DType::BF16, count as u64)]).unwrap();
    let config = Config::new().clip(Clip::Value { max_abs: 0.5 }).optimizer(Sgd::new(1.0)).histogram();
    let mut probe = Probe::new(Cpu, plan, config).unwrap();
    let (mut gradient, mut weight) = (vec![bf16::ONE; count], vec![bf16::ONE; count]);
    probe.update(&[&gradient], &mut [&mut weight]).unwrap();
    probe.clip(&mut [&mut gradient]).unwrap();
    assert!(gradient.iter().chain(&weight).all(|x| x.to_f32() == 0.5));
    assert_eq!(probe.wait().unwrap().outputs().total_norm, (count as f64).sqrt());
    assert_eq!(probe.histogram().unwrap().measure(&[&gradient]).unwrap().total().count(), count as u64);
}

#[test]
fn polls_and_waits_by_turns() {
    let mut probe = Probe::new(Cpu, Plan::new([("w", DType::F32, 2)]).unwrap(), Config::new()).unwrap();
    assert_eq!(probe.wait().map(drop), Err(Error::NotMeasured));
    for step in 1..=9 {
        probe.measure(&[&[3.0f32, 4.0]]).unwrap();
        if step % 3 == 0 {
            assert_eq!(probe.wait().unwrap().step(), step);
        } else if step % 3 == 1 {
            assert_eq!(probe.poll().unwrap().unwrap().step(), step);
        }
    }
    assert_eq!(probe.wait().unwrap().outputs().total_norm, 5.0);
}

/// The norm that a rank of two has, of steps in which it uses all that ranks exchange.
fn norm_of_rank(end: ThreadCommunicator) -> f64 {
    let mesh = Mesh::new([("dp", 2)]).unwrap();
    let layouts = [mesh.layout([("dp", Along::Sharded)]).unwrap(), mesh.layout([]).unwrap()];
    let own = if end.rank() == 0 { 0.0 } else { 4.0 };
    let ranks = Ranks::new(end, &mesh, layouts).replica_check(ReplicaCheck::Strict).whole_tensors();
    let plan = Plan::new([("shard", DType::F32, 2), ("replica", DType::BF16, 9)]).unwrap();
    let config = Config::new().clip(Clip::Quantile { quantile: 0.5 }).ranks(ranks);
    let mut probe = Probe::new(Cpu, plan, config).unwrap();
    let (shard, replica) = ([3.0f32, own], [bf16::ONE; 9]);
    for _ in 0..2 {
        probe.step(&mut [&mut shard.clone(), &mut replica.clone()]).unwrap();
    }
    let norm = probe.wait().unwrap().outputs().total_norm;
    let mut ranks = probe.ranks().unwrap();
    assert_eq!((ranks.model().unwrap().len(), ranks.differing_replicas()), (2, Ok(vec![])));
    norm
}

#[test]
fn two_ranks_are_threads() {
    thread::scope(|scope| {
        let ends = ThreadCommunicator::group(2).into_iter();
        let ranks: Vec<_> = ends.map(|end| scope.spawn(move || norm_of_rank(end))).collect();
        let norms: Vec<f64> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        assert_eq!(norms, [43f64.sqrt(); 2]);
    });
}

#[test]
fn tensors_by_their_addresses_are_those_by_reference() {
    let plan = Plan::new([("first", DType::F16, 3), ("second", DType::F32, 2), ("none", DType::BF16, 0)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::global_norm(1.0))).unwrap();
    let elements = || ([f16::ONE; 5], [2.0f32; 4]);
    let ((mut first, mut second), (mut raw_first, mut raw_second)) = (elements(), elements());
    let none = [bf16::ONE; 0];
    probe.step(&mut [&mut &mut first[1..4], &mut &mut second[..2], &mut none.clone()]).unwrap();
    let expected = bits(&probe.wait().unwrap());

    let at = |address: u64, len, dtype| {
        // SAFETY: where there are elements, they are those of the arrays above, which nothing else uses meanwhile.
        unsafe { RawTensor::new(address, len, dtype) }
    };
    let (start, other) = (raw_first[1..4].as_mut_ptr() as u64, raw_second[..2].as_mut_ptr() as u64);
    let (mut a, mut b, mut c) = (at(start, 3, DType::F16), at(other, 2, DType::F32), at(7, 0, DType::BF16));
    probe.step(&mut [&mut a, &mut b, &mut c]).unwrap();
    let mut seen = probe.wait().unwrap();
    assert_eq!(seen.step(), 2);
    let refused = [
        (at(other + 2, 2, DType::F32), "MisalignedPointer"),
        (at(0, 2, DType::F32), "NullPointer"),
        (at(u64::MAX - 3, 2, DType::F32), "AddressOverflow"),
    ];
    for (mut odd, expected) in refused {
        let error = probe.step(&mut [&mut a, &mut odd, &mut c]).unwrap_err();
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
    }
    let (mut twice, mut again) = (at(other, 3, DType::F16), at(other, 2, DType::F32));
    let overlapping = probe.step(&mut [&mut twice, &mut again, &mut c]);
    assert!(matches!(overlapping, Err(Error::Overlap { .. })), "{overlapping:?}");
    assert_eq!((raw_first, raw_second), (first, second));
    // Read only, it may be the same memory.
    let (one, two) = (&raw_second[..2], [f16::ZERO; 3]);
    probe.measure(&[&two, &one, &Absent]).unwrap();
    seen = probe.wait().unwrap();
    assert_eq!(seen.step(), 3);
    assert_eq!(expected.len(), bits(&seen).len());
}

#[test]
fn the_device_stays_within_its_buffers() {
    for bytes in [0, 1, 255, 256, 1000] {
        let buffer = Cpu.allocate(bytes).unwrap();
        assert_eq!((buffer.bytes(), buffer.address() % 256), (bytes, 0));
        Cpu.clear(&buffer).unwrap();
        Cpu.upload(&[7; 1200], &buffer).unwrap();
        for wanted in [0, bytes, 2 * bytes] {
            let mut read = Cpu.read(wanted).unwrap();
            read.start(&buffer).unwrap();
            let expected: Vec<u8> = (0..wanted).map(|place| if place < bytes { 7 } else { 0 }).collect();
            assert_eq!((read.is_complete(), read.wait()), (Ok(true), Ok(&expected[..])));
        }
    }
    assert!(matches!(Cpu.allocate(usize::MAX), Err(Error::OutOfMemory { .. })));
    assert!(matches!(Cpu.read(usize::MAX), Err(Error::OutOfMemory { .. })));
}
