//! What a probe is declared with is all that it has: what was not declared is refused and changes nothing, what was is the
//! memory that was stated, and all of it works where there is nothing to measure. On the CPU and in the kernels on the
//! host.
#![allow(unsafe_code, reason = "implements a device, which addresses are trusted of")]

use crate::common::{clips::CLIPS, host::OnHost};
use crate::on_cpu::{Altered, OnCpu};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, Plan, Probe, Record, Rules, Tensor, TensorMut,
    clip::{AdaptiveClip, LossScale},
    device::{Buffer, Device, Read},
    gsnr::{AdamMoments, AdamStep, GsnrConfig},
    histogram::Histogram,
    history::{HistoryStep, HistoryTensor},
    optim::AdamW,
    ranks::{Along, Mesh, Ranks, ThreadCommunicator},
    samples::SampleConfig,
};
use gradprobe_simt::{Schedule, Simt};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// A step of [`plan`].
const FIRST: [f32; 6] = [1.0, -2.0, 3.0, 0.0, 0.5, 9.0];
const SECOND: [f32; 4] = [2.0, 4.0, -4.0, 0.25];

fn plan() -> Plan {
    Plan::new([("first", DType::F32, 6), ("second", DType::F32, 4)]).unwrap()
}

/// A probe on the CPU, and two on the kernels.
fn probes(plan: &Plan, config: &Config) -> [Probe; 3] {
    let shuffled = Simt { schedule: Schedule::Shuffled(3), blocks: 2, ..Simt::default() };
    [
        Probe::new(Cpu, plan.clone(), config.clone()).unwrap(),
        Probe::new(Simt::default(), plan.clone(), config.clone()).unwrap(),
        Probe::new(shuffled, plan.clone(), config.clone()).unwrap(),
    ]
}

/// Of a group of one, with so many tensors.
fn one_rank(tensors: usize) -> Ranks {
    let mesh = Mesh::new([("dp", 1)]).unwrap();
    let sharded = mesh.layout([("dp", Along::Sharded)]).unwrap();
    Ranks::new(ThreadCommunicator::group(1).remove(0), &mesh, vec![sharded; tensors])
}

type Declare = fn(Config, &[u64]) -> Config;

/// Each feature by its name, and how it is declared for a plan whose tensors have these lengths.
const FEATURES: [(&str, Declare); 12] = [
    ("loss scale", |config, _| config.loss_scale(LossScale::dynamic())),
    ("history", |config, _| config.history(5)),
    ("tracking", |config, _| config.tracking(GsnrConfig::new())),
    ("moments", |config, _| config.moments()),
    ("histogram", |config, _| config.histogram()),
    ("dot", |config, _| config.dot()),
    ("samples", |config, _| config.samples(SampleConfig::new(9, 4))),
    ("adaptive clip", |config, lengths| config.adaptive_clip(AdaptiveClip::new(lengths.iter().copied()))),
    ("optimizer", |config, _| config.optimizer(AdamW::new(1e-3))),
    ("micro-batches", |config, _| config.micro_batches(3)),
    ("ranks", |config, lengths| config.ranks(one_rank(lengths.len()).whole_tensors())),
    ("rules", |config, _| config.rules(Rules::default())),
];

/// All of them at once.
fn everything(lengths: &[u64], clip: Clip) -> Config {
    FEATURES.into_iter().fold(Config::new().clip(clip), |config, (_, declare)| declare(config, lengths))
}

/// Everything that a probe can be asked for, and the call that declares it.
fn requests(probe: &mut Probe) -> Vec<(&'static str, Result<(), Error>)> {
    let (first, second, unchanged) = (&FIRST, &SECOND, [FIRST[0]; 6]);
    let gradients: [&dyn Tensor; 2] = [first, second];
    let (mut to_clip, mut beside, mut moved, mut moved_too) = (unchanged, SECOND, unchanged, SECOND);
    let step = AdamStep { step: 5, beta1: 0.9, beta2: 0.99 };
    let moments = || gradients.map(|tensor| AdamMoments { exp_avg: tensor, exp_avg_sq: tensor });
    let results = vec![
        ("Config::loss_scale", probe.set_loss_scale(2.0)),
        ("Config::rules", probe.set_rules(Rules::default())),
        ("Config::history", probe.history().and_then(|mut history| history.tag(7))),
        ("Config::history", probe.history().and_then(|mut history| history.report().map(drop))),
        ("Config::tracking", probe.gsnr().and_then(|mut gsnr| gsnr.launch())),
        ("Config::tracking", probe.gsnr().and_then(|mut gsnr| gsnr.report().map(drop))),
        ("Config::tracking", probe.gsnr().and_then(|mut gsnr| gsnr.reset())),
        ("Config::moments", probe.moments().and_then(|mut room| room.report(&step, &moments()).map(drop))),
        ("Config::histogram", probe.histogram().and_then(|mut histogram| histogram.launch(&gradients))),
        ("Config::histogram", probe.histogram().and_then(|mut histogram| histogram.measure(&gradients).map(drop))),
        ("Config::dot", probe.dot().and_then(|mut dot| dot.launch(&gradients, &gradients))),
        ("Config::dot", probe.dot().and_then(|mut dot| dot.measure(&gradients, &gradients).map(drop))),
        ("Config::optimizer", probe.update(&gradients, &mut [&mut moved, &mut moved_too])),
        (
            "Config::optimizer",
            probe.optimizer().and_then(|mut room| room.step(&gradients, &mut [&mut moved, &mut moved_too])),
        ),
        ("Config::optimizer", probe.optimizer().and_then(|mut room| room.set_learning_rate(0.5))),
        ("Config::optimizer", probe.optimizer().and_then(|mut room| room.state().map(drop))),
        ("Config::samples", probe.samples().and_then(|mut samples| samples.take(&gradients))),
        ("Config::samples", probe.samples().and_then(|mut samples| samples.report().map(drop))),
        ("Config::micro_batches", probe.micro_batches().and_then(|mut room| room.measure(&gradients))),
        ("Config::micro_batches", probe.micro_batches().and_then(|mut room| room.report().map(drop))),
        (
            "Config::adaptive_clip",
            probe.adaptive_clip().and_then(|mut room| room.clip(&mut [&mut to_clip, &mut beside], &gradients)),
        ),
        ("Config::adaptive_clip", probe.adaptive_clip().and_then(|mut room| room.report().map(drop))),
        ("Config::ranks", probe.ranks().and_then(|mut ranks| ranks.differing_replicas().map(drop))),
        ("Plan::with_weights", probe.measure_with_weights(&gradients, &gradients)),
    ];
    if probe.adaptive_clip().is_err() {
        assert_eq!((to_clip, beside), (unchanged, SECOND), "what was refused changes no gradient");
    }
    results
}

/// What is known after a step, to the bit.
fn bits_of_a_step(probe: &mut Probe) -> Vec<u8> {
    let (mut first, mut second) = (FIRST, SECOND);
    probe.step(&mut [&mut first, &mut second]).unwrap();
    let report = probe.wait().unwrap();
    let changed = first.iter().chain(&second).flat_map(|x| x.to_bits().to_le_bytes());
    [bytemuck::bytes_of(report.outputs()), bytemuck::cast_slice(report.records())]
        .concat()
        .into_iter()
        .chain(changed)
        .collect()
}

#[test]
fn what_was_not_declared_is_refused_by_the_call_that_declares_it_and_changes_nothing() {
    let config = Config::new().clip(Clip::global_norm(1.0));
    for (mut probe, mut undisturbed) in probes(&plan(), &config).into_iter().zip(probes(&plan(), &config)) {
        // Before the first step, and after it.
        for step in 1..3 {
            let addresses = probe.addresses();
            for (declare, result) in requests(&mut probe) {
                assert_eq!(result, Err(Error::NotDeclared { declare }), "{}, before step {step}", probe.device());
            }
            assert_eq!(probe.addresses(), addresses);
            assert_eq!(probe.wait().map(|report| report.step()).ok(), (step > 1).then(|| step - 1));
            assert!(bits_of_a_step(&mut probe) == bits_of_a_step(&mut undisturbed), "step {step}");
        }
        let a = probe.addresses();
        assert_eq!([a.loss_scale, a.health_words], [None; 2]);
        assert!(a.outputs != 0 && a.records != 0 && a.coefficients != 0);
    }
    // A room that is there is no other room.
    for (name, declare) in FEATURES {
        let config = declare(Config::new(), &[3, 2]);
        for mut probe in probes(&plan(), &config) {
            bits_of_a_step(&mut probe);
            let refused: Vec<_> = requests(&mut probe)
                .into_iter()
                .filter(|(declare, result)| *result == Err(Error::NotDeclared { declare }))
                .map(|(declare, _)| declare)
                .collect();
            let declared = match name {
                "adaptive clip" | "micro-batches" | "loss scale" => name.replace([' ', '-'], "_"),
                _ => name.to_owned(),
            };
            let declared = format!("Config::{declared}");
            let others =
                requests(&mut probe).into_iter().map(|(declare, _)| declare).filter(|other| *other != declared);
            assert_eq!(refused, others.collect::<Vec<_>>(), "{name} on {}", probe.device());
        }
    }
}

/// The CPU, with a count of the bytes that it is asked for and of those that it has not got back; at some point it has no
/// more.
#[derive(Clone, Default)]
struct Counting {
    given: Arc<AtomicU64>,
    held: Arc<AtomicU64>,
    /// Calls for memory before one that fails.
    left: Option<Arc<AtomicU64>>,
}

impl Counting {
    fn failing_after(calls: u64) -> Self {
        Self { left: Some(Arc::new(AtomicU64::new(calls))), ..Self::default() }
    }

    fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }

    fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Memory for a buffer or a read, as far as there is any.
    fn hold(&self, bytes: usize) -> Result<Held, Error> {
        let bytes = bytes as u64;
        if self.left.as_ref().is_some_and(|left| left.fetch_sub(1, Ordering::Relaxed) == 0) {
            return Err(Error::OutOfMemory { bytes });
        }
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Ok(Held { bytes, of: Arc::clone(&self.held) })
    }
}

/// Bytes that are given back when it is dropped.
struct Held {
    bytes: u64,
    of: Arc<AtomicU64>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.of.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

struct HeldRead(Box<dyn Read>, #[expect(dead_code, reason = "its drop is what counts")] Held);

impl Read for HeldRead {
    fn start(&mut self, from: &Buffer) -> Result<(), Error> {
        self.0.start(from)
    }
    fn is_complete(&self) -> Result<bool, Error> {
        self.0.is_complete()
    }
    fn wait(&self) -> Result<&[u8], Error> {
        self.0.wait()
    }
}

// SAFETY: all that it does is done by one that keeps the promise.
unsafe impl Altered for Counting {
    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        let held = self.hold(bytes)?;
        self.given.fetch_add(bytes as u64, Ordering::Relaxed);
        let buffer = Cpu.allocate(bytes)?;
        let address = buffer.address();
        // SAFETY: the memory is there until its owner is dropped.
        Ok(unsafe { Buffer::new(address, bytes, (buffer, held)) })
    }
    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        let held = self.hold(bytes)?;
        Ok(Box::new(HeldRead(Cpu.read(bytes)?, held)))
    }
}

/// Lengths of a plan with tensors of no chunk, one and several.
const LENGTHS: [u64; 4] = [100_000, 0, 7, 32_768];

fn plan_of_lengths(lengths: &[u64]) -> Plan {
    Plan::new(lengths.iter().enumerate().map(|(t, &len)| (t.to_string(), DType::BF16, len))).unwrap()
}

#[test]
fn what_is_stated_is_what_is_allocated() {
    for lengths in [&[][..], &[0], &[1], &LENGTHS] {
        let plan = plan_of_lengths(lengths);
        let with_weights = plan.clone().with_weights(lengths.iter().map(|_| DType::F32)).unwrap();
        let alone = FEATURES.map(|(name, declare)| (name, declare(Config::new(), lengths)));
        let all = CLIPS.map(|clip| ("everything", everything(lengths, clip)));
        let clips = CLIPS.map(|clip| ("a clip", Config::new().clip(clip)));
        for (name, config) in alone.into_iter().chain(all).chain(clips) {
            for plan in [&plan, &with_weights] {
                let device = Counting::default();
                let mut probe = Probe::new(OnCpu(device.clone()), plan.clone(), config.clone()).unwrap();
                let made = device.given();
                // Ranks find out whether they mean the same before anything is made, in memory that is given back.
                let stated = config.bytes(plan).unwrap();
                let agreed = made - stated;
                let expected = if config.features.ranks.is_some() { 1..8192 } else { 0..1 };
                assert!(expected.contains(&agreed), "{name}: {stated} bytes stated, {made} allocated");
                // And that is all, whatever the probe is asked for.
                let elements: Vec<Vec<half::bf16>> =
                    lengths.iter().map(|&len| vec![half::bf16::ONE; usize::try_from(len).unwrap()]).collect();
                let tensors: Vec<&dyn Tensor> = elements.iter().map(|tensor| tensor as &dyn Tensor).collect();
                for _ in 0..2 {
                    probe.measure(&tensors).unwrap();
                    probe.poll().unwrap();
                    probe.histogram().and_then(|mut room| room.measure(&tensors)).ok();
                    probe.dot().and_then(|mut room| room.measure(&tensors, &tensors)).ok();
                    probe.micro_batches().and_then(|mut room| room.measure(&tensors)).ok();
                    probe.wait().unwrap();
                }
                assert_eq!(device.given(), made, "{name}");
                drop(probe);
                assert_eq!(device.held(), 0, "{name}");
            }
        }
    }
}

/// Whichever of its calls for memory fails, and whatever it was for.
#[test]
fn a_probe_without_its_memory_says_how_much_it_needs_and_holds_none() {
    let plan = plan_of_lengths(&LENGTHS).with_weights([DType::F32; LENGTHS.len()]).unwrap();
    let alone = FEATURES.map(|(name, declare)| (name, declare(Config::new(), &LENGTHS)));
    let all = CLIPS.map(|clip| ("everything", everything(&LENGTHS, clip)));
    for (name, config) in alone.into_iter().chain(all) {
        let bytes = config.bytes(&plan).unwrap();
        let mut calls = 0;
        loop {
            let device = Counting::failing_after(calls);
            let made = Probe::new(OnCpu(device.clone()), plan.clone(), config.clone()).map(drop);
            assert_eq!(device.held(), 0, "{name}: held after {calls} calls");
            match made {
                Err(error) => assert_eq!(error, Error::OutOfMemory { bytes }, "{name}: after {calls} calls"),
                Ok(()) => break,
            }
            calls += 1;
        }
        // Seven buffers of the step, the results of it, and the reads under way.
        assert!(calls >= if name == "everything" { 35 } else { 12 }, "{name}: {calls}");
    }
}

/// Ranks of which one has not enough memory, whichever of its allocations fails, have no probe, all of them; and hear which.
#[test]
fn ranks_have_their_probes_or_none_has() {
    let plan = plan_of_lengths(&LENGTHS);
    let mesh = Mesh::new([("dp", 3)]).unwrap();
    let (mut calls, mut failures) = (0, 0);
    loop {
        let made = std::thread::scope(|scope| {
            let rank = |(rank, end): (u32, ThreadCommunicator)| {
                let (plan, mesh) = (plan.clone(), &mesh);
                scope.spawn(move || {
                    let layout = mesh.layout([("dp", Along::Sharded)]).unwrap();
                    let ranks = Ranks::alike(end, mesh, layout).whole_tensors();
                    let config = Config::new().history(3).ranks(ranks);
                    let device = if rank == 1 { Counting::failing_after(calls) } else { Counting::default() };
                    let made = Probe::new(OnCpu(device.clone()), plan, config).map(drop);
                    (made, device.held())
                })
            };
            let threads: Vec<_> = (0..).zip(ThreadCommunicator::group(3)).map(rank).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(made.iter().all(|(_, held)| *held == 0), "after {calls} calls: {made:?}");
        if made.iter().all(|(made, _)| made.is_ok()) {
            break;
        }
        failures += 1;
        calls += 1;
        for (rank, (made, _)) in made.into_iter().enumerate() {
            match made.unwrap_err() {
                Error::OutOfMemory { .. } => assert_eq!(rank, 1),
                Error::RankDiffers { rank, what } => {
                    assert_eq!((rank, what.ends_with("of memory could not be allocated")), (1, true), "{what}");
                }
                // What it would have told the others by.
                Error::Communication { what } => assert_eq!(what, "rank 1 is gone"),
                other => panic!("{other}"),
            }
        }
    }
    assert!(failures > 25, "{failures}");
}

/// What cannot be is said in one way, by whoever is asked, before any memory is taken and any other rank is waited for.
#[test]
fn a_declaration_that_contradicts_itself_is_one_clear_error() {
    let value = Clip::Value { max_abs: -1.0 };
    let by_tensor = Clip::TensorNorm { max_norm: 0.5 };
    let cases = [
        (Config::new().backward_order(vec![1, 0]), "backward_order must be given beside `Config::rules`, not an order"),
        (
            Config::new().rules(Rules::default()).backward_order(vec![1, 1]),
            "backward_order must be every tensor's place in the plan, once, not 2 places",
        ),
        (Config::new().history(0), "history must be at least 1, not 0"),
        (Config::new().micro_batches(0), "micro_batches must be at least 1, not 0"),
        (Config::new().samples(SampleConfig::new(0, 4)), "elements must be from 1 to 65536, not 0"),
        (Config::new().samples(SampleConfig::new(4, 1)), "steps must be at least 2, not 1"),
        (Config::new().clip(value), "max_abs must be finite and above 0, not -1"),
        (
            Config::new().clip(by_tensor).ranks(one_rank(2)),
            "clip must be one that does not look at tensors that are parts here, or beside `Ranks::whole_tensors`, not \
             TensorNorm { max_norm: 0.5 }",
        ),
        (Config::new().ranks(one_rank(0)), "the plan has 2 tensors, 0 were given: the first that differs is \"first\""),
        (
            Config::new().adaptive_clip(AdaptiveClip::new([3])),
            "the plan has 2 tensors, 1 were given: the first that differs is \"second\"",
        ),
        (
            Config::new().adaptive_clip(AdaptiveClip::new([3, 3])),
            "tensor \"second\": 4 elements do not fall into units of 3",
        ),
        (Config::new().tracking(GsnrConfig::new().tensors(["third"])), "no tensor's name matches \"third\""),
    ];
    for (config, message) in cases {
        assert_eq!(config.bytes(&plan()).unwrap_err().to_string(), message);
        let refused = Probe::new(Simt::default(), plan(), config.clone()).map(drop);
        assert_eq!(refused.unwrap_err().to_string(), message);
        // With all that is declared besides, as far as it is no part of what is wrong.
        let device = Counting::default();
        let refused = Probe::new(OnCpu(device.clone()), plan(), config.clone().histogram().dot().moments()).map(drop);
        assert_eq!(refused.unwrap_err().to_string(), message);
        // What is told to other ranks goes through memory.
        let given = if config.features.ranks.is_some() { 1..1024 } else { 0..1 };
        assert!(given.contains(&device.given()) && device.held() == 0, "{message}");
        if config.features.ranks.is_none() {
            // Two others never come.
            let alone = ThreadCommunicator::group(3).swap_remove(1);
            let config = config.ranks(Ranks::data_parallel(alone));
            assert_eq!(Probe::new(Cpu, plan(), config).map(drop).unwrap_err().to_string(), message);
        }
    }
}

/// The sizes that [`Config`]'s methods name, and what a table has besides.
#[test]
fn features_take_what_is_documented() {
    let plan = plan_of_lengths(&LENGTHS);
    let bytes = |config: &Config, plan: &Plan| config.bytes(plan).unwrap();
    let (tensors, chunks) = (LENGTHS.len() as u64, 4 + 1 + 1);
    for (name, declare) in FEATURES {
        let config = declare(Config::new(), &LENGTHS);
        let expected = match name {
            // The state, in 32 bytes.
            "loss scale" => 32,
            // And the tag of the next.
            "history" => 5 * (112 + 24 * tensors) + 8,
            "tracking" => GsnrConfig::new().bytes(&plan).unwrap(),
            "moments" => tensors * ((16 << 10) + 120),
            "histogram" => tensors * (8 << 10),
            "dot" => 48 * chunks + 64 * tensors,
            // Values, numbers of steps, places.
            "samples" => 4 * 9 * 4 + 8 * 4 + 16 * 9,
            "adaptive clip" => 56 * tensors + 32,
            // Two moments and a master of whole packets; of each tensor what is kept, where the weight is and how far it moved; the
            // learning rate.
            "optimizer" => 12 * (100_000 + 8 + 32_768) + (64 + 16 + 80) * tensors + 4,
            "micro-batches" => size_of::<Record>() as u64 * 3 * tensors,
            // The sums, and what comes of their check; for each tensor those of all ranks, and where it is among theirs.
            "ranks" => 240 + 48 + (736 + 16) * tensors,
            // And the norm of the last step.
            "rules" => 2048 + 12 * tensors + 8,
            other => panic!("{other}"),
        };
        let seen = bytes(&config, &plan) - bytes(&Config::new(), &plan);
        assert_eq!(seen, expected, "{name}");
    }
    assert_eq!(Histogram::bytes(&plan), tensors * (8 << 10));
    assert_eq!((size_of::<HistoryStep>(), size_of::<HistoryTensor>()), (112, 24));
}

/// Steps of nothing.
const STEPS: u64 = 3;

/// Nothing at all to measure: every feature works, and says so.
#[test]
fn a_plan_without_elements_works_with_everything_declared() {
    for clip in CLIPS {
        for lengths in [&[][..], &[0, 0]] {
            let plan = plan_of_lengths(lengths);
            let plan = plan.with_weights(lengths.iter().map(|_| DType::F32)).unwrap();
            let config = everything(lengths, clip);
            for mut probe in probes(&plan, &config) {
                let device = probe.device();
                let what = format!("{clip:?}, {} tensors, {device}", lengths.len());
                for step in 1..=STEPS {
                    use_all(&mut probe, lengths.len(), step, &what);
                }
            }
        }
    }
}

/// Everything that a probe can be asked for, in a step of `count` tensors without elements.
fn use_all(probe: &mut Probe, count: usize, step: u64, what: &str) {
    let none: [half::bf16; 0] = [];
    let no_weight: [f32; 0] = [];
    let tensors: Vec<&dyn Tensor> = (0..count).map(|t| if t == 0 { &none as &dyn Tensor } else { &Absent }).collect();
    let weights: Vec<&dyn Tensor> = vec![&no_weight; count];
    let moments: Vec<AdamMoments> =
        weights.iter().map(|&weight| AdamMoments { exp_avg: weight, exp_avg_sq: weight }).collect();

    probe.history().unwrap().tag(step).unwrap();
    let mut room = probe.micro_batches().unwrap();
    room.measure(&tensors).unwrap();
    assert_eq!(room.report().unwrap().merged().len(), count, "{what}");
    probe.measure_with_weights(&tensors, &weights).unwrap();
    let report = probe.poll().unwrap().unwrap_or_else(|| panic!("{what}: no report"));
    let outputs = report.outputs();
    assert_eq!((outputs.step, outputs.total_norm, outputs.found_inf, outputs.skip), (step, 0.0, 0.0, 0), "{what}");
    assert_eq!((outputs.coefficient_f64, outputs.flags, outputs.health), (1.0, 0, 0), "{what}");
    assert_eq!((report.records().len(), report.weights().unwrap().len()), (count, count));
    assert_eq!((report.absent().count(), report.health_words().unwrap()), (0, &vec![0; count][..]));
    assert!(report.diagnosis().unwrap().findings().is_empty(), "{what}: {report}");

    let mut moved = vec![no_weight; count];
    let mut moved: Vec<&mut dyn TensorMut> = moved.iter_mut().map(|tensor| tensor as &mut dyn TensorMut).collect();
    let mut optimizer = probe.optimizer().unwrap();
    optimizer.step(&tensors, &mut moved).unwrap();
    assert_eq!(optimizer.state().unwrap().tensors.len(), count, "{what}");

    let mut lists = [none; 4];
    let mut changed: Vec<&mut dyn TensorMut> =
        lists.iter_mut().take(count).map(|tensor| tensor as &mut dyn TensorMut).collect();
    let by_unit = |probe: &mut Probe, changed: &mut [_]| probe.adaptive_clip().unwrap().clip(changed, &weights);
    // Each takes the loss scale from the gradients, of which these have none.
    let clips = match step % 2 {
        0 => [probe.clip(&mut changed), by_unit(probe, &mut changed)],
        _ => [by_unit(probe, &mut changed), probe.clip(&mut changed)],
    };
    assert_eq!(clips, [Ok(()), Ok(())], "{what}");
    let adaptive = probe.adaptive_clip().unwrap().report().unwrap();
    assert_eq!((adaptive.records().len(), adaptive.clipped_fraction()), (count, None), "{what}");
    let histogram = probe.histogram().unwrap().measure(&tensors).unwrap();
    assert_eq!((histogram.histograms().len(), histogram.total()), (count, Histogram::default()), "{what}");
    let dot = probe.dot().unwrap().measure(&tensors, &weights).unwrap();
    assert_eq!((dot.records().len(), dot.total().cosine()), (count, None), "{what}");
    probe.samples().unwrap().take(&tensors).unwrap();
    let samples = probe.sample_report().unwrap();
    assert_eq!((samples.places().len(), samples.mean_correlation()), (0, None), "{what}");
    // Of tensors without elements the steps are counted too.
    match (count, probe.gsnr_report()) {
        (0, Ok(report)) => assert_eq!(report.tensors().len(), 0, "{what}"),
        (_, Ok(report)) => assert!(step > 1 && report.tensors().all(|(_, record)| record.defined == 0), "{what}"),
        (_, Err(error)) => {
            assert_eq!((count > 0, error), (true, Error::TooFewSteps { steps: 1 }), "{what} in step {step}")
        }
    }
    let adam = AdamStep { step: 5, beta1: 0.9, beta2: 0.99 };
    assert_eq!(probe.moments().unwrap().report(&adam, &moments).unwrap().tensors().len(), 0, "{what}");
    let history = probe.history_report().unwrap();
    assert_eq!((history.steps().len() as u64, history.total_norm().mean), (step, 0.0), "{what}");
    assert!(history.steps().all(|(step, _)| step.tag == step.outputs.step), "{what}");
    if let Ok(mut ranks) = probe.ranks() {
        assert_eq!(ranks.differing_replicas(), Ok(vec![]), "{what}");
    }
    probe.set_loss_scale(8.0).unwrap();
    probe.set_rules(Rules::default()).unwrap();
    if step == STEPS {
        probe.step(&mut changed).unwrap();
        assert_eq!(probe.wait().unwrap().step(), STEPS + 1, "{what}");
    }
}
