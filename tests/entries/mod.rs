//! Entries for the tests of what writes them: steps of a probe on a few tensors with awkward names and values.

#![allow(dead_code)] // Each test file is a crate of its own and uses a part of this.

#[path = "../common/host.rs"]
pub mod host;

use gradprobe::{
    Clip, Config, Cpu, DType, Finding, FindingKind, HostTensor, Plan, Probe, Verdict, gsnr::GsnrConfig, write::Entry,
};
use host::OnHost;
use std::ops::RangeInclusive;

/// Names that break a format which does not escape them.
pub const NAMES: [&str; 6] =
    ["blocks.0.attn/weight", "a \"quoted\", name", "two\nlines\r\nand\\n", "größe–∇∥{x=\"1\"}", "<b>&amp;</b>", ""];

/// What the tensors hold in a step: ordinary numbers, zeros, the ends of f32's range, NaN and Inf from step 4 on, only
/// NaN, nothing.
pub fn tensors(step: u64) -> Vec<Vec<f32>> {
    let small = f32::from(u16::try_from(step).unwrap()) * 1e-3;
    let bad = if step >= 4 { [f32::NAN, f32::NEG_INFINITY] } else { [0.25, -0.5] };
    vec![
        vec![small, -2.0 * small, 0.1 + small, 1.0 / 3.0],
        vec![0.0, -0.0, 0.0],
        vec![f32::MAX, -f32::from_bits(1), 1.0, f32::MIN_POSITIVE],
        vec![1.0, bad[0], 1e-12, bad[1]],
        vec![f32::NAN, f32::NAN],
        vec![],
    ]
}

/// Something wrong with a tensor, or with all of them.
pub fn finding(step: u64, tensor: Option<&str>, severity: Verdict, value: f64) -> Finding {
    Finding {
        severity,
        kind: FindingKind::Exploding,
        step,
        since: step,
        tensor: tensor.map(str::to_owned),
        others: Vec::new(),
        value,
        threshold: 1e4,
        rule: "norm-above",
        message: format!("norm {value} is above 10000, \"far\" above"),
        advice: &["lower the learning rate", "clip, harder"],
    }
}

/// The entries of steps 1 to `steps`, with a diagnosis, histograms, weights' norms and, from the second on, signal and
/// noise.
pub fn entries(steps: u64) -> Vec<Entry> {
    let lengths: Vec<u64> = tensors(1).iter().map(|tensor| tensor.len() as u64).collect();
    let plan = Plan::new(NAMES.into_iter().zip(lengths).map(|(name, length)| (name, DType::F32, length))).unwrap();
    let config = Config::new().clip(Clip::global_norm(1.0)).histogram().tracking(GsnrConfig::new());
    let mut probe = Probe::new(Cpu, plan, config).unwrap();
    (1..=steps)
        .map(|step| {
            let tensors = tensors(step);
            let tensors: Vec<HostTensor> = tensors.iter().map(|tensor| HostTensor::F32(tensor)).collect();
            let report =
                probe.measure_host(&tensors).unwrap().with_param_norms(&[1.0, 0.0, 2.5, 3.0, 4.0, 5.0]).unwrap();
            let findings = [
                finding(step, Some(NAMES[2]), Verdict::Critical, f64::INFINITY),
                finding(step, Some(NAMES[1]), Verdict::Warning, f64::NAN),
                finding(step, None, Verdict::Warning, 1e5),
            ];
            let (good, bad, worst) = (Verdict::Healthy, Verdict::Warning, Verdict::Critical);
            let verdicts = [good, bad, worst, if step < 4 { good } else { worst }, worst, good];
            let entry = Entry::new(report).with_findings(worst, verdicts, findings).unwrap();
            let entry = entry.with_histogram(probe.histogram_host(&tensors).unwrap()).unwrap();
            if step < 2 { entry } else { entry.with_gsnr(probe.gsnr_report().unwrap()).unwrap() }
        })
        .collect()
}

/// `layers` layers of one tensor each, which shrink with depth, over so many steps. In those of `bad` three tensors are.
pub fn deep(layers: usize, steps: u64, bad: RangeInclusive<u64>, name: impl Fn(usize) -> String) -> Vec<Entry> {
    let plan = Plan::new((0..layers).map(|layer| (name(layer), DType::F32, 64))).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new().histogram().tracking(GsnrConfig::new())).unwrap();
    (1..=steps)
        .map(|step| {
            let wave = |layer: usize, i: usize| (i as f32 * 0.7 + step as f32 * 1.3 + layer as f32).sin();
            let size =
                |layer: usize| (-6.0 * layer as f32 / layers as f32).exp() * (2.0 * step as f32 / steps as f32).exp();
            let mut tensors: Vec<Vec<f32>> = (0..layers)
                .map(|layer| (0..64).map(|i| size(layer) * (0.3 + wave(layer, i) + wave(i, layer))).collect())
                .collect();
            let mut verdicts = vec![Verdict::Healthy; layers];
            if bad.contains(&step) {
                tensors[layers - 1].fill(f32::NAN);
                tensors[layers - 2].fill(0.0);
                tensors[1][5] = f32::INFINITY;
                (verdicts[layers - 1], verdicts[layers - 2]) = (Verdict::Critical, Verdict::Warning);
                verdicts[1] = Verdict::Critical;
            }
            let views: Vec<HostTensor> = tensors.iter().map(|tensor| HostTensor::F32(tensor)).collect();
            let report = probe.measure_host(&views).unwrap();
            let verdict = verdicts.iter().copied().max().unwrap_or_default();
            let entry = Entry::new(report).with_findings(verdict, verdicts, []).unwrap();
            let entry = entry.with_histogram(probe.histogram_host(&views).unwrap()).unwrap();
            if step < 2 { entry } else { entry.with_gsnr(probe.gsnr_report().unwrap()).unwrap() }
        })
        .collect()
}
