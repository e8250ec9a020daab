//! A run that is interrupted, and goes on from a probe's state: as one that was not, to the last bit; or it is refused.

#![allow(clippy::cast_possible_truncation)] // Small numbers.

use super::common::{clips::CLIPS, data::normal};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, NonFinitePolicy, Plan, Probe, ProbeState, Rules, Tensor, TensorMut,
    clip::LossScale,
    gsnr::GsnrConfig,
    health::{Health, Preset},
    optim::{AdamW, Lion, Optimizer, Sgd},
    samples::SampleConfig,
};
use half::{bf16, f16};
use std::fs;

const LENGTHS: [usize; 5] = [2_100, 70, 300, 6, 0];
const NAMES: [&str; 5] = ["h.0.weight", "h.0.bias", "h.1.weight", "h.1.bias", "none"];
const STEPS: u64 = 18;

fn plan() -> Plan {
    let dtypes = [DType::F32, DType::F32, DType::BF16, DType::F16, DType::F32];
    let tensors = NAMES.into_iter().zip(dtypes).zip(LENGTHS).map(|((name, dtype), len)| (name, dtype, len as u64));
    let weights = [DType::F32, DType::F32, DType::BF16, DType::F16, DType::F32];
    let shapes = [vec![70, 30], vec![70], vec![6, 50], vec![6], vec![0]];
    Plan::new(tensors).unwrap().with_weights(weights).unwrap().with_shapes(shapes).unwrap()
}

/// The gradients of a step, or with step 0 the weights before the first.
struct Elements {
    of_f32: [Vec<f32>; 2],
    of_bf16: Vec<bf16>,
    of_f16: Vec<f16>,
}

impl Elements {
    /// Among the steps are such as a diagnosis and a clip remember: NaN, a spike, a weight without a gradient from the sixth on.
    fn of(step: u64) -> Self {
        let values = |tensor: usize| {
            let size = if step == 13 { 50.0 } else { 0.1 };
            let value = move |i: usize| size * normal(step, 10_000 * tensor + i) as f32;
            (0..LENGTHS[tensor]).map(value)
        };
        let mut of_f32 = [0, 1].map(|tensor| values(tensor).collect::<Vec<_>>());
        if [4, 11].contains(&step) {
            of_f32[0][1234] = f32::NAN;
        }
        let is_silent = step >= 6;
        let of_bf16 = values(2).map(|value| if is_silent { bf16::ZERO } else { bf16::from_f32(value) });
        Self { of_f32, of_bf16: of_bf16.collect(), of_f16: values(3).map(f16::from_f32).collect() }
    }

    fn tensors_mut(&mut self) -> [&mut dyn TensorMut; 4] {
        let [first, second] = &mut self.of_f32;
        [first, second, &mut self.of_bf16, &mut self.of_f16]
    }

    fn tensors(&self) -> [&dyn Tensor; 4] {
        [&self.of_f32[0], &self.of_f32[1], &self.of_bf16, &self.of_f16]
    }
}

/// Of every clip, each with others of the rest.
fn configs() -> Vec<Config> {
    let optimizers: [fn() -> Optimizer; 4] = [
        || AdamW::new(1e-3).into(),
        || Lion::new(1e-3).into(),
        || Sgd::new(0.1).into(),
        || Sgd::new(0.1).nesterov(0.9).into(),
    ];
    let of = |(place, clip): (usize, Clip)| {
        let rules = if place % 2 == 0 { Rules::default() } else { Rules::preset(Preset::Transformer) };
        let tracking = if place % 3 == 0 { GsnrConfig::new() } else { GsnrConfig::new().tensors(["h.*"]).window(4) };
        let config =
            Config::new().clip(clip).history(5).tracking(tracking).samples(SampleConfig::new(9, 4)).rules(rules);
        let config = if place % 4 == 3 { config.non_finite(NonFinitePolicy::ZeroNonFinite) } else { config };
        let config = if place % 2 == 0 {
            config.loss_scale(LossScale::dynamic().initial(4.0).growth_interval(3))
        } else {
            config
        };
        if place == 5 { config } else { config.optimizer(optimizers[place % 4]()) }
    };
    let all = CLIPS.into_iter().enumerate().map(of);
    // What is declared of nothing has a state as well.
    all.chain([Config::new()]).collect()
}

/// All that is known after a step, in words of which none is rounded.
fn step(probe: &mut Probe, number: u64, weights: &mut Elements) -> String {
    let mut gradients = Elements::of(number);
    let none: Vec<f32> = Vec::new();
    let mut none_moved: Vec<f32> = Vec::new();
    {
        let [a, b, c, d] = gradients.tensors();
        let mut read = [a, b, c, d, &none as &dyn Tensor];
        if [3, 8, 9].contains(&number) {
            read[number as usize % 3] = &Absent;
        }
        let has_optimizer = probe.optimizer().is_ok();
        if number.is_multiple_of(2) || !has_optimizer {
            let [a, b, c, d] = weights.tensors();
            probe.measure_with_weights(&read, &[a, b, c, d, &none]).unwrap();
        }
        let [a, b, c, d] = weights.tensors_mut();
        let mut moved = [a, b, c, d, &mut none_moved as &mut dyn TensorMut];
        match (has_optimizer, number % 2) {
            (true, 0) => probe.optimizer().unwrap().step(&read, &mut moved).unwrap(),
            (true, _) => probe.update(&read, &mut moved).unwrap(),
            (false, _) => {}
        }
        if probe.samples().is_ok() {
            probe.samples().unwrap().take(&read).unwrap();
            probe.history().unwrap().tag(1000 + number).unwrap();
        }
    }
    let [a, b, c, d] = gradients.tensors_mut();
    probe.clip(&mut [a, b, c, d, &mut Vec::<f32>::new()]).unwrap();
    let report = probe.wait().unwrap();
    let words = |bytes: &[u8]| format!("{bytes:x?}");
    let mut said = vec![
        words(bytemuck::bytes_of(report.outputs())),
        words(bytemuck::cast_slice(report.records())),
        format!("{:?} {:?}", report.updates(), report.diagnosis()),
        report.diagnosis().map(|diagnosis| diagnosis.to_string()).unwrap_or_default(),
        format!("{:?}", [&gradients, weights].map(|all| (all.of_f32.clone(), all.of_bf16.clone(), all.of_f16.clone()))),
    ];
    if probe.history().is_ok() {
        let gsnr = probe.gsnr().unwrap().report();
        let found = gsnr.as_ref().ok().map(|gsnr| probe.health().unwrap().diagnose_gsnr(gsnr));
        said.push(format!("{gsnr:?} {found:?}"));
        said.push(format!("{:?}", probe.history().unwrap().report().unwrap()));
        said.push(format!("{:?}", probe.samples().unwrap().report().unwrap()));
    }
    said.join("\n")
}

fn probe(config: &Config) -> Probe {
    Probe::new(Cpu, plan(), config.clone()).unwrap()
}

/// After so many steps.
fn probe_after(config: &Config, steps: u64) -> (Probe, Elements) {
    let (mut probe, mut weights) = (probe(config), Elements::of(0));
    (1..=steps).for_each(|number| drop(step(&mut probe, number, &mut weights)));
    (probe, weights)
}

fn bytes_of(state: &ProbeState) -> Vec<u8> {
    postcard::to_stdvec(state).unwrap()
}

#[test]
fn a_run_that_goes_on_has_the_bits_of_one_that_was_not_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let mut findings = String::new();
    for (place, config) in configs().iter().enumerate() {
        let (mut whole, mut weights) = (probe(config), Elements::of(0));
        let expected: Vec<String> = (1..=STEPS).map(|number| step(&mut whole, number, &mut weights)).collect();
        findings.extend(expected.iter().map(String::as_str));
        let expected_state = bytes_of(&whole.state().unwrap());
        for interrupted in [0, 1, 3, 4, 7, 9, 13] {
            let path = folder.path().join("state");
            let (mut first, mut weights) = probe_after(config, interrupted);
            first.state().unwrap().save(&path).unwrap();
            drop(first);
            let mut second = probe(config);
            second.restore(&ProbeState::load(&path).unwrap()).unwrap();
            assert_eq!(bytes_of(&second.state().unwrap()), fs::read(&path).unwrap(), "{place}, {interrupted}");
            for number in interrupted + 1..=STEPS {
                let said = step(&mut second, number, &mut weights);
                assert!(
                    said == expected[number as usize - 1],
                    "{place}: step {number} after {interrupted}\n{}",
                    first_difference(&said, &expected[number as usize - 1])
                );
            }
            assert!(bytes_of(&second.state().unwrap()) == expected_state, "{place}, {interrupted}");
        }
    }
    // Of what is remembered, all that the steps are there for was seen.
    for seen in ["no gradient for", ", since step", "began at step 4", "deviations above it", "TooFewSteps"] {
        assert!(findings.contains(seen), "{seen}");
    }
}

/// The lines that differ first.
fn first_difference(seen: &str, expected: &str) -> String {
    let differ = seen.lines().zip(expected.lines()).find(|(seen, expected)| seen != expected);
    format!("{:.3000}\n{:.3000}", differ.map_or("", |lines| lines.0), differ.map_or("", |lines| lines.1))
}

/// Formats that name fields, and know no NaN, have them all the same.
#[test]
fn a_state_survives_json_and_takes_the_bytes_of_its_elements() {
    for config in configs() {
        let (mut probe, _) = probe_after(&config, 5);
        let state = probe.state().unwrap();
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<ProbeState>(&json).unwrap(), state);
        let kept = probe.optimizer().map_or(0, |mut room| {
            let lists =
                room.state().unwrap().tensors.into_iter().map(|tensor| [tensor.first, tensor.second, tensor.masters]);
            4 * lists.flatten().map(|list| list.len()).sum::<usize>()
        });
        let tracked = probe.gsnr().map_or(0, |_| 8 * LENGTHS.iter().sum::<usize>());
        // The rings and the memory of the clip and of the diagnosis besides.
        let rest = bytes_of(&state).len() - kept - tracked;
        assert!(rest < 16_384, "{rest} bytes beside {kept} and {tracked}");
    }
}

/// Each names what differs, and changes nothing.
#[test]
fn a_state_of_another_probe_is_refused_by_what_differs() {
    let all = || {
        let config = Config::new().clip(Clip::Percentile { percentile: 50.0, history: 3, max_norm: None });
        let config =
            config.history(5).tracking(GsnrConfig::new()).samples(SampleConfig::new(9, 4)).rules(Rules::default());
        config.optimizer(AdamW::new(1e-3))
    };
    let of = |plan: Plan, config: Config| Probe::new(Cpu, plan, config).unwrap();
    let (mut saved, _) = probe_after(&all(), 3);
    let state = saved.state().unwrap();
    let none = |change: fn(&mut Config)| {
        let mut config = all();
        change(&mut config);
        of(plan(), config)
    };
    let renamed = |place: usize, name: &'static str, dtype: DType, len: u64| {
        let specs = plan().tensors().to_vec();
        let of_place = |(index, spec): (usize, gradprobe::TensorSpec)| {
            if index == place { (name.to_owned(), dtype, len) } else { (spec.name, spec.dtype, spec.len) }
        };
        Plan::new(specs.into_iter().enumerate().map(of_place)).unwrap()
    };
    let shorter =
        Plan::new(plan().tensors()[..4].iter().map(|spec| (spec.name.clone(), spec.dtype, spec.len))).unwrap();
    let other_weights = plan().with_weights([DType::BF16; 5]).unwrap();
    let cases: Vec<(Probe, &str)> = vec![
        (
            of(renamed(1, "x", DType::F32, 70), all()),
            r#"tensor 1 of its plan is "h.0.bias" of 70 F32 elements, and here "x" of 70"#,
        ),
        (
            of(renamed(2, NAMES[2], DType::F16, 300), all()),
            r#"is "h.1.weight" of 300 BF16 elements, and here "h.1.weight" of 300 F16"#,
        ),
        (
            of(renamed(0, NAMES[0], DType::F32, 9), all()),
            r#"tensor 0 of its plan is "h.0.weight" of 2100 F32 elements"#,
        ),
        (of(shorter, all()), r#"tensor 4 of its plan is "none" of 0 F32 elements, and here none"#),
        (of(other_weights, all()), r#"tensor "h.0.weight" has 2100 first moments, 2100 second and 0 masters"#),
        (
            none(|config| config.features.rules = None),
            "`Config::rules` is not declared here, and was where it was saved",
        ),
        (none(|config| config.features.history = None), "`Config::history` is not declared here"),
        (none(|config| config.features.tracking = None), "`Config::tracking` is not declared here"),
        (none(|config| config.features.samples = None), "`Config::samples` is not declared here"),
        (none(|config| config.features.optimizer = None), "`Config::optimizer` is not declared here"),
        (of(plan(), all().loss_scale(LossScale::dynamic())), "`Config::loss_scale` is declared here, and was not"),
        (of(plan(), all().history(6)), "its history is of 5 steps, and the probe's of 6"),
        (of(plan(), all().tracking(GsnrConfig::new().window(4))), "over a window of 0 steps, and here of 4"),
        (
            of(plan(), all().tracking(GsnrConfig::new().tensors(["h.*"]))),
            r#"tensor "none" was tracked, and is not here"#,
        ),
        (of(plan(), all().samples(SampleConfig::new(9, 5))), "it has 36 samples of 4 steps, and the probe 45 of 5"),
        (of(plan(), all().samples(SampleConfig::new(8, 4))), "it has 36 samples of 4 steps, and the probe 32 of 4"),
        (of(plan(), all().optimizer(Lion::new(1e-3))), "its optimizer is adamw, and the probe's lion"),
        (of(plan(), all().clip(Clip::global_norm(1.0))), "its clip has 10 words that GlobalNorm"),
    ];
    for (mut other, expected) in cases {
        let before = bytes_of(&other.state().unwrap());
        let refused = other.restore(&state);
        assert!(matches!(refused, Err(Error::StateOfAnotherProbe { .. })), "{refused:?}: {expected}");
        let said = refused.unwrap_err().to_string();
        assert!(said.contains(expected), "{said}\n{expected}");
        assert!(bytes_of(&other.state().unwrap()) == before, "{expected}");
    }
}

/// What ranks have in common goes to any plan, and leaves the rest as it is.
#[test]
fn a_common_state_goes_to_other_tensors() {
    let config = || {
        let clip = Clip::ZScore { smoothing: 0.9, threshold: 2.0, warmup: 2, max_norm: None };
        Config::new().clip(clip).loss_scale(LossScale::dynamic()).history(2)
    };
    let mut saved = Probe::new(Cpu, Plan::new([("w", DType::F32, 2)]).unwrap(), config()).unwrap();
    saved.measure(&[&[1.0f32, 2.0]]).unwrap();
    let state = saved.state().unwrap();
    let mut other = Probe::new(Cpu, Plan::new([("w", DType::F32, 1)]).unwrap(), config()).unwrap();
    other.measure(&[&[1.0f32]]).unwrap();
    assert!(other.restore(&state).is_err());
    other.restore(&state.common()).unwrap();
    assert_eq!(other.state().unwrap().common(), state.common());
    assert_eq!(other.history().unwrap().report().unwrap().steps().len(), 1);
    let bytes = bytes_of(&state.common());
    assert_eq!(postcard::from_bytes::<ProbeState>(&bytes).unwrap(), state.common());
}

/// A file that is none, of another version, cut off anywhere or too long.
#[test]
fn what_is_no_state_is_not_loaded() {
    let (mut probe, _) = probe_after(&configs()[7], 3);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let missing = ProbeState::load(&path).unwrap_err();
    assert!(matches!(&missing, Error::Unreadable { path: of, .. } if *of == path), "{missing:?}");
    let unwritten = probe.state().unwrap().save(folder.path()).unwrap_err();
    assert!(matches!(unwritten, Error::Unwritable { .. }), "{unwritten:?}");
    probe.state().unwrap().save(&path).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let whole = fs::read(&path).unwrap();
    let said = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        ProbeState::load(&path).unwrap_err().to_string()
    };
    for length in (0..whole.len()).filter(|length| *length < 400 || length % 61 == 0 || length + 20 > whole.len()) {
        assert!(said(&whole[..length]).contains("no state of a probe"), "{length}");
    }
    assert!(said(&[&whole[..], b"more"].concat()).ends_with("no state of a probe: 4 bytes are left behind one"));
    let other = [&[2], &whole[1..]].concat();
    assert!(said(&other).ends_with("it has version 2, and this reads 1"), "{}", said(&other));
    let json = serde_json::to_string(&probe.state().unwrap()).unwrap().replacen(r#""version":1"#, r#""version":2"#, 1);
    let refused = serde_json::from_str::<ProbeState>(&json).unwrap_err().to_string();
    assert!(refused.contains("it has version 2, and this reads 1"), "{refused}");
}

/// A diagnosis of a probe's is the one that [`Health`] makes of its reports.
#[test]
fn a_diagnosis_after_a_state_is_that_of_all_reports() {
    let config = Config::new().rules(Rules::default());
    let mut health = Health::new(&plan(), Rules::default()).unwrap();
    let mut weights = Elements::of(0);
    let mut probe = probe(&config);
    for number in 1..=STEPS {
        let state = probe.state().unwrap();
        probe = Probe::new(Cpu, plan(), config.clone()).unwrap();
        probe.restore(&state).unwrap();
        step_alone(&mut probe, number, &mut weights);
        let report = probe.wait().unwrap();
        let expected = health.diagnose(&report).unwrap();
        assert_eq!(report.diagnosis().unwrap().to_string(), expected.to_string(), "{number}");
    }
}

fn step_alone(probe: &mut Probe, number: u64, weights: &mut Elements) {
    let gradients = Elements::of(number);
    let none: Vec<f32> = Vec::new();
    let ([a, b, c, d], [e, f, g, h]) = (gradients.tensors(), weights.tensors());
    probe.measure_with_weights(&[a, b, c, d, &none], &[e, f, g, h, &none]).unwrap();
}
