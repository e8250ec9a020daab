//! How well the rules fit real trainings: 26 small ones whose health is known, made by `crates/candle/examples/zoo`. Each run is a
//! file of weights and of the gradients of six steps; `cases.json` says what is right of it.
//!
//! What the presets score is a table of the documentation of `health`, which this test compares: `UPDATE_SNAPSHOTS=1` writes it.

use gradprobe::{
    Config, Cpu, Finding, HostTensor, Plan, Probe, Tensor, Verdict,
    device::Device,
    gsnr::GsnrConfig,
    health::{Health, Preset, Rules, backward_order},
};
use gradprobe_simt::Simt;
use half::f16;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

const STEPS: usize = 6;
/// The lines of the documentation around the table.
const BEGIN: &str = "<!-- table of tests/zoo: begin -->\n";
const END: &str = "<!-- table of tests/zoo: end -->\n";

#[derive(Deserialize)]
struct Cases {
    cases: BTreeMap<String, Case>,
}

/// What is known of a run.
#[derive(Deserialize)]
struct Case {
    architecture: String,
    label: String,
    /// Those that are right.
    verdicts: Vec<String>,
    /// Kinds of finding of which any is right.
    kinds: Vec<String>,
    /// Where the fault is.
    tensors: Option<Vec<String>>,
    /// The step in which it begins, from 0.
    step: Option<u64>,
    learning_rate: f64,
}

impl Case {
    fn is_healthy(&self) -> bool {
        self.label == "healthy"
    }
}

/// A run: its plan, and by tensor of it the weights and the gradients of each step.
struct Run {
    plan: Plan,
    weights: Vec<Elements>,
    steps: Vec<Vec<Elements>>,
}

enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Elements {
    fn view(&self) -> HostTensor<'_> {
        match self {
            Self::F32(elements) => HostTensor::F32(elements),
            Self::F16(elements) => HostTensor::F16(elements),
        }
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/zoo")
}

fn cases() -> BTreeMap<String, Case> {
    let text = fs::read_to_string(folder().join("cases.json")).unwrap();
    serde_json::from_str::<Cases>(&text).unwrap().cases
}

impl Run {
    fn read(name: &str) -> Self {
        let bytes = fs::read(folder().join(name).with_extension("safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut names: Vec<&str> = file.names().into_iter().filter_map(|name| name.strip_prefix("params/")).collect();
        names.sort_unstable();
        let read = |name: String| {
            let tensor = file.tensor(&name).unwrap();
            match tensor.dtype() {
                Dtype::F32 => {
                    Elements::F32(tensor.data().chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect())
                }
                Dtype::F16 => {
                    Elements::F16(tensor.data().chunks(2).map(|x| f16::from_le_bytes(x.try_into().unwrap())).collect())
                }
                other => panic!("{name}: {other:?}"),
            }
        };
        let of = |prefix: &str| names.iter().map(|name| read(format!("{prefix}/{name}"))).collect::<Vec<_>>();
        let steps: Vec<Vec<Elements>> = (0..STEPS).map(|step| of(&step.to_string())).collect();
        let views: Vec<HostTensor> = steps[0].iter().map(Elements::view).collect();
        let plan = Plan::of(names.iter().zip(&views).map(|(name, view)| (*name, view as &dyn Tensor))).unwrap();
        let shape =
            |name: &&str| file.tensor(&format!("params/{name}")).unwrap().shape().iter().map(|&n| n as u64).collect();
        let plan = plan.with_shapes(names.iter().map(shape).collect::<Vec<Vec<u64>>>()).unwrap();
        let weights = of("params");
        let dtypes = weights.iter().map(|weight| weight.view().shape().unwrap().0);
        Self { plan: plan.with_weights(dtypes.collect::<Vec<_>>()).unwrap(), weights, steps }
    }

    /// Measures the steps and hands each report over.
    fn measure(
        &self,
        device: impl Device + 'static,
        config: Config,
        mut each: impl FnMut(&gradprobe::Report),
    ) -> Probe {
        let mut probe = Probe::new(device, self.plan.clone(), config).unwrap();
        for step in &self.steps {
            let views: Vec<HostTensor> = step.iter().chain(&self.weights).map(Elements::view).collect();
            let views: Vec<&dyn Tensor> = views.iter().map(|view| view as _).collect();
            let (gradients, weights) = views.split_at(step.len());
            probe.measure_with_weights(gradients, weights).unwrap();
            each(&probe.wait().unwrap());
        }
        probe
    }

    /// What is found in all steps, what goes on told once.
    fn findings(&self, rules: Rules) -> Vec<Finding> {
        let mut health = Health::new(&self.plan, rules).unwrap().backward_order(backward_order(&self.plan)).unwrap();
        let mut findings: Vec<Finding> = Vec::new();
        let mut probe = self.measure(Cpu, Config::new().tracking(GsnrConfig::new()), |report| {
            for finding in health.diagnose(report).unwrap().findings() {
                if !findings.iter().any(|earlier| finding.is_of_same_cause(earlier)) {
                    findings.push(finding.clone());
                }
            }
        });
        findings.extend(health.diagnose_gsnr(&probe.gsnr().unwrap().report().unwrap()).unwrap());
        findings
    }
}

/// How often something was right, of how many.
#[derive(Clone, Copy, Default)]
struct Share(u32, u32);

impl Share {
    fn add(&mut self, is_right: bool) {
        self.0 += u32::from(is_right);
        self.1 += 1;
    }

    fn of(self) -> f64 {
        f64::from(self.0) / f64::from(self.1)
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.1 == 0 { f.write_str("–") } else { write!(f, "{} of {}", self.0, self.1) }
    }
}

/// What a preset makes of some runs.
#[derive(Clone, Copy, Default)]
struct Score {
    critical: Share,
    warned: Share,
    found: Share,
    /// By a severity and kind that no healthy run of the architecture gets.
    apart: Share,
    /// The tensor named first is one of the fault's.
    placed: Share,
    /// Told to begin where it does, or a step later.
    dated: Share,
}

fn verdict_of(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.severity).max().unwrap_or_default()
}

/// The scores of all runs by label, and how many findings there were in each step with one.
fn score(preset: Preset) -> (BTreeMap<String, Score>, Vec<usize>) {
    let mut scores: BTreeMap<String, Score> = BTreeMap::new();
    let mut of_steps = Vec::new();
    let cases = cases();
    let findings: Vec<Vec<Finding>> = cases
        .iter()
        .map(|(name, case)| {
            let rules = Rules::preset(preset);
            // The others are scored without it, as one who does not give it sees them.
            let rules = if preset == Preset::LrScaled { rules.learning_rate(case.learning_rate) } else { rules };
            Run::read(name).findings(rules)
        })
        .collect();
    let mut usual: BTreeMap<&str, BTreeSet<_>> = BTreeMap::new();
    for (case, findings) in cases.values().zip(&findings).filter(|(case, _)| case.is_healthy()) {
        let kinds = findings.iter().map(|finding| (finding.severity, finding.kind));
        usual.entry(&case.architecture).or_default().extend(kinds);
    }
    for (case, findings) in cases.values().zip(&findings) {
        let score = scores.entry(case.label.clone()).or_default();
        let verdict = verdict_of(findings);
        if case.is_healthy() {
            score.critical.add(verdict == Verdict::Critical);
            score.warned.add(verdict == Verdict::Warning && !case.verdicts.iter().any(|right| right == "warning"));
            continue;
        }
        let mut steps: BTreeMap<u64, usize> = BTreeMap::new();
        findings.iter().for_each(|finding| *steps.entry(finding.since).or_default() += 1);
        of_steps.extend(steps.into_values());
        let right: Vec<&Finding> =
            findings.iter().filter(|finding| case.kinds.iter().any(|kind| kind == finding.kind.name())).collect();
        let is_found = case.verdicts.iter().any(|right| right == verdict.name()) && !right.is_empty();
        score.found.add(is_found);
        let usual = usual.get(case.architecture.as_str());
        let is_unusual =
            |finding: &&Finding| usual.is_none_or(|usual| !usual.contains(&(finding.severity, finding.kind)));
        score.apart.add(is_found && right.iter().any(is_unusual));
        if let Some(tensors) = &case.tensors {
            let first = right.iter().find_map(|finding| finding.tensor.as_ref());
            score.placed.add(is_found && first.is_some_and(|first| tensors.contains(first)));
        }
        if let Some(step) = case.step {
            let first = right.iter().map(|finding| finding.since - 1).min();
            score.dated.add(is_found && first.is_some_and(|first| (step..=step + 1).contains(&first)));
        }
    }
    (scores, of_steps)
}

fn total(scores: &BTreeMap<String, Score>) -> Score {
    let add = |a: Share, b: Share| Share(a.0 + b.0, a.1 + b.1);
    scores.values().fold(Score::default(), |sum, score| Score {
        critical: add(sum.critical, score.critical),
        warned: add(sum.warned, score.warned),
        found: add(sum.found, score.found),
        apart: add(sum.apart, score.apart),
        placed: add(sum.placed, score.placed),
        dated: add(sum.dated, score.dated),
    })
}

fn table() -> String {
    let mut table = String::new();
    writeln!(table, "| preset | healthy called critical | healthy warned | faults found | by what no healthy run is told | first tensor right | step right |").unwrap();
    writeln!(table, "|---|---|---|---|---|---|---|").unwrap();
    for preset in Preset::ALL {
        let Score { critical, warned, found, apart, placed, dated } = total(&score(preset).0);
        writeln!(table, "| `{}` | {critical} | {warned} | {found} | {apart} | {placed} | {dated} |", preset.name())
            .unwrap();
    }
    writeln!(table, "\n| fault, by `default` | found | first tensor right | step right |\n|---|---|---|---|").unwrap();
    for (label, Score { found, placed, dated, .. }) in score(Preset::Default).0 {
        if label != "healthy" {
            writeln!(table, "| {label} | {found} | {placed} | {dated} |").unwrap();
        }
    }
    table
}

#[test]
fn the_default_fits_the_zoo() {
    let (scores, mut of_steps) = score(Preset::Default);
    let score = total(&scores);
    assert_eq!(score.critical.0, 0, "healthy runs are called critical");
    assert!(score.warned.of() <= 0.05, "{} healthy runs are warned", score.warned);
    assert!(score.found.of() >= 0.95, "{} faults are found", score.found);
    assert!(score.apart.of() >= 0.9, "{} by what no healthy run is told", score.apart);
    assert!(score.placed.of() >= 0.85, "{} have the right tensor first", score.placed);
    assert!(score.dated.of() >= 0.9, "{} have the right step", score.dated);
    of_steps.sort_unstable();
    assert!(of_steps[of_steps.len() / 2] <= 2, "{of_steps:?} findings in steps with one");
}

#[test]
fn the_documentation_has_the_scores() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/health.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (written, after) = rest.split_once(END).unwrap();
    let table = table();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(path, format!("{before}{BEGIN}\n{table}\n{END}{after}")).unwrap();
    } else {
        assert_eq!(written.trim(), table.trim(), "UPDATE_SNAPSHOTS=1 writes it");
    }
}

/// The verdict on the device is the host's, as far as a device can know.
#[test]
fn the_words_of_the_kernels_are_those_of_the_host() {
    for name in cases().into_keys() {
        let run = Run::read(&name);
        let mut health = Health::new(&run.plan, Rules::default()).unwrap();
        run.measure(Simt::default(), Config::new().rules(Rules::default()), |report| {
            let diagnosis = health.diagnose(report).unwrap();
            assert_eq!(report.outputs().health, diagnosis.step_word(), "{name}");
            assert_eq!(report.health_words().unwrap(), diagnosis.tensor_words(), "{name}");
            assert_eq!(report.diagnosis().unwrap().findings(), diagnosis.findings(), "{name}");
        });
    }
}
