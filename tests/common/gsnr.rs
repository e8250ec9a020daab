//! Signal and noise across steps: what every device's tests of it share. An oracle in f64 from the steps' elements, a
//! checker with the contract's bounds, and the harness that runs the table of `gsnr_cases.rs` against a [`Probe`] on
//! any device.
//!
//! The oracle takes each element's differences from its first value, which f64 holds to 2^-53, and goes through them
//! twice; so an element that never changes has a variance of exactly 0, and one that changes by a single unit in the
//! last place has its variance to 1e-8.
//!
//! # What f32 cannot hold
//!
//! The state is a mean and a sum of squared deviations in f32. Where that is not enough for 1e-4 the checker says so:
//!
//! * An element is *faint* when its squared deviations add up to less than 2^-126, the smallest normal f32: differences
//!   below 1e-19. They lose bits, and below 2e-23 they vanish: such an element may count as constant.
//! * An element is *coarse* when its |mean| is more than [`COARSE`] times its standard deviation: the mean's own rounding
//!   is then seen in the deviations. It still counts as varying, however little it varies.
//! * A mean that cancels to less than 2^-22 of the elements is lost in the rounding of what cancelled: squared means, and
//!   the ratios made of them, are within 1e-4 or [`CANCELLED`] of the largest square, whichever is more.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // Small numbers.

use super::{
    Effort, OFFSETS, Placed,
    cases::Data,
    check::{Complaints, error, same_bytes},
    gsnr_cases::{Case, cases},
    host::OnHost,
    oracle::{Format, power_of_two},
};
use gradprobe::{
    Config, Cpu, DType, Error, HostTensor, Plan, Probe,
    gsnr::{AdamStep, GsnrConfig, GsnrRecord, GsnrReport},
};
use half::bf16;
use rayon::prelude::*;

/// Relative error of `mean`, `sum_variance` and `sum_squared_mean`.
pub const BOUND: f64 = 1e-4;
/// Relative error of `median`.
pub const MEDIAN_BOUND: f64 = 0.032;
/// Error of `norm_cv`, in units of 1 + `norm_cv`: that of the norms, twice.
pub const CV_BOUND: f64 = 1e-6;
/// See the module.
pub const COARSE: f64 = 2000.0;
/// See the module: an error of 2^-22 in the mean is at most 1e-4 of its square, or (2^-22)²/5e-5.
pub const CANCELLED: f64 = 1.2e-9;
/// A step with a larger magnitude in a tensor is not merged.
const LARGEST_MERGED: f64 = (1u64 << 50) as f64;

/// What one tensor's record should say.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    pub steps: u32,
    pub skipped: u32,
    pub elements: u64,
    /// Elements whose variance is not 0.
    pub defined: u64,
    /// Of these, those that may count as constant.
    pub faint: u64,
    /// Of these, those whose ratio f32 cannot tell: faint and coarse ones.
    pub beyond: u64,
    pub below_one: u64,
    /// Elements whose ratio is within the bound of 1, or beyond f32.
    pub near_one: u64,
    pub mean: Option<f64>,
    pub median: Option<f64>,
    pub sum_variance: f64,
    pub sum_squared_mean: f64,
    pub norm_mean: f64,
    pub norm_cv: Option<f64>,
    /// What may be missed beside the relative bound: of the mean ratio, of the median, and of the two sums.
    pub ratio_slack: f64,
    pub median_slack: f64,
    pub variance_slack: f64,
    pub square_slack: f64,
}

/// The truth of a tensor after these steps, oldest first, under a window (0: none).
pub fn truth(steps: &[&Data], window: usize) -> Truth {
    let values: Vec<Vec<f64>> = steps
        .par_iter()
        .map(|data| {
            let format = Format::of(data.dtype());
            data.bits().map(|bits| format.value(bits)).collect()
        })
        .collect();
    let (mut merged, mut skipped) = (Vec::new(), 0);
    for step in &values {
        if !step.iter().all(|x| x.abs() <= LARGEST_MERGED) {
            skipped += 1;
            continue;
        }
        if window > 0 && merged.len() == window {
            merged.clear();
            skipped = 0;
        }
        merged.push(step);
    }
    let (k, elements) = (merged.len() as f64, steps.first().map_or(0, |step| step.len()));
    let mut truth = Truth { steps: merged.len() as u32, skipped, ..Truth::default() };
    let norms: Vec<f64> = merged.iter().map(|step| step.iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
    if !norms.is_empty() {
        truth.norm_mean = norms.iter().sum::<f64>() / k;
        let variance = norms.iter().map(|norm| (norm - truth.norm_mean).powi(2)).sum::<f64>() / k;
        truth.norm_cv = (truth.norm_mean > 0.0).then(|| variance.sqrt() / truth.norm_mean);
    }
    if merged.len() < 2 {
        return truth;
    }
    truth.elements = elements as u64;
    let mut ratios = Vec::with_capacity(elements);
    for j in 0..elements {
        let first = merged[0][j];
        let middle = merged.iter().map(|step| step[j] - first).sum::<f64>() / k;
        let deviations: f64 = merged.iter().map(|step| (step[j] - first - middle).powi(2)).sum();
        let largest = merged.iter().fold(0.0, |largest, step| step[j].abs().max(largest));
        let (mean, variance) = (first + middle, deviations / (k - 1.0));
        // And the rounding of a mean that f32 holds as a subnormal.
        let slack = CANCELLED * largest * largest + k * power_of_two(-149) * largest;
        truth.sum_variance += variance;
        truth.sum_squared_mean += mean * mean;
        truth.square_slack += slack;
        if variance == 0.0 {
            continue;
        }
        let ratio = mean * mean / variance;
        ratios.push(ratio);
        truth.below_one += u64::from(ratio < 1.0);
        let faint = deviations < power_of_two(-126);
        let coarse = ratio > COARSE * COARSE;
        truth.faint += u64::from(faint);
        truth.beyond += u64::from(faint || coarse);
        truth.near_one += u64::from(faint || (ratio - 1.0).abs() <= BOUND + slack / variance);
        truth.variance_slack += if coarse { variance } else { 0.0 } + if faint { power_of_two(-149) } else { 0.0 };
        truth.ratio_slack += slack / variance;
        truth.median_slack = truth.median_slack.max(slack / variance);
    }
    truth.defined = ratios.len() as u64;
    if !ratios.is_empty() {
        let count = ratios.len();
        truth.mean = Some(ratios.iter().sum::<f64>() / count as f64);
        truth.ratio_slack /= count as f64;
        ratios.sort_by(f64::total_cmp);
        truth.median = Some((ratios[(count - 1) / 2] + ratios[count / 2]) / 2.0);
    }
    truth
}

/// The errors of one record, in the units of the bounds above; NaN where there is nothing to compare.
#[derive(Clone, Copy, Debug)]
pub struct Errors {
    pub mean: f64,
    pub median: f64,
    pub sum_variance: f64,
    pub sum_squared_mean: f64,
    pub norm_cv: f64,
}

impl Errors {
    /// What is beyond the slack.
    pub fn of(seen: &GsnrRecord, truth: &Truth) -> Self {
        let beyond_slack = |seen: f64, truth: f64, slack: f64| {
            let gap = (seen - truth).abs();
            error(if gap <= slack { truth } else { truth + (gap - slack).copysign(seen - truth) }, truth, truth)
        };
        let both = |seen: Option<f64>, truth: Option<f64>, slack: f64| match (seen, truth) {
            (Some(seen), Some(truth)) => beyond_slack(seen, truth, slack),
            _ => f64::NAN,
        };
        let ratios = truth.beyond == 0;
        Self {
            mean: if ratios { both(seen.mean(), truth.mean, truth.ratio_slack) } else { f64::NAN },
            median: if ratios { both(seen.median(), truth.median, truth.median_slack) } else { f64::NAN },
            sum_variance: beyond_slack(seen.sum_variance, truth.sum_variance, truth.variance_slack),
            sum_squared_mean: beyond_slack(seen.sum_squared_mean, truth.sum_squared_mean, truth.square_slack),
            norm_cv: match (seen.norm_cv(), truth.norm_cv) {
                (Some(seen), Some(truth)) => error(seen, truth, 1.0 + truth),
                _ => f64::NAN,
            },
        }
    }
}

/// One tensor's record against the truth.
pub fn check(name: &str, seen: &GsnrRecord, truth: &Truth) -> Vec<String> {
    let mut complaints = Complaints::new(name);
    let c = &mut complaints;
    c.equal("steps", seen.steps, truth.steps);
    c.equal("skipped", seen.skipped, truth.skipped);
    c.equal("defined and constant", seen.defined + seen.constant, truth.elements);
    if !(truth.defined - truth.faint..=truth.defined).contains(&seen.defined) {
        c.add(&format!("defined is {}, should be {} less at most {}", seen.defined, truth.defined, truth.faint));
    }
    if seen.below_one.abs_diff(truth.below_one) > truth.near_one || seen.below_one > seen.defined {
        c.add(&format!("below_one is {}, should be {} ± {}", seen.below_one, truth.below_one, truth.near_one));
    }
    let errors = Errors::of(seen, truth);
    c.bounded("mean", errors.mean, BOUND, seen.mean(), truth.mean);
    c.bounded("median", errors.median, MEDIAN_BOUND, seen.median(), truth.median);
    c.bounded("sum_variance", errors.sum_variance, BOUND, seen.sum_variance, truth.sum_variance);
    c.bounded("sum_squared_mean", errors.sum_squared_mean, BOUND, seen.sum_squared_mean, truth.sum_squared_mean);
    c.bounded("norm_mean", error(seen.norm_mean, truth.norm_mean, truth.norm_mean), CV_BOUND, seen.norm_mean, truth);
    c.bounded("norm_cv", errors.norm_cv, CV_BOUND, seen.norm_cv(), truth.norm_cv);
    c.equal("whether there is a norm_cv", seen.norm_cv().is_some(), truth.norm_cv.is_some());

    // What is derived, and what there is of it.
    let defined = seen.defined > 0;
    let (mean, k) = (seen.mean().unwrap_or(0.0), f64::from(truth.steps));
    let fraction = seen.below_one as f64 / seen.defined as f64;
    let squared = seen.sum_squared_mean - seen.sum_variance / k;
    for (field, found, expected) in [
        ("mean", seen.mean(), defined.then(|| seen.sum_ratio / seen.defined as f64)),
        ("median", seen.median(), defined.then_some(seen.median_or_nan)),
        ("fraction_below_one", seen.fraction_below_one(), defined.then_some(fraction)),
        (
            "corrected_mean",
            seen.corrected_mean(),
            (defined && truth.steps > 3).then(|| mean * (k - 3.0) / (k - 1.0) - 1.0 / k),
        ),
        ("squared_gradient", seen.squared_gradient(), (truth.steps >= 2).then_some(squared)),
    ] {
        c.equal(field, found, expected);
    }
    if defined == seen.median_or_nan.is_nan() {
        c.add(&format!("median_or_nan is {} for {} elements", seen.median_or_nan, seen.defined));
    }
    complaints.list
}

/// A whole report against the truths of the tracked tensors, in their order. It is an error as long as none of them has
/// seen two steps in its window; where there are none, it is empty.
pub fn check_report(seen: &Result<GsnrReport, Error>, names: &[&str], truths: &[Truth]) -> Vec<String> {
    let steps = truths.iter().map(|truth| truth.steps + truth.skipped).max().unwrap_or(0);
    let seen = match seen {
        Ok(seen) if steps >= 2 || truths.is_empty() => seen,
        Err(Error::TooFewSteps { steps: seen }) if steps < 2 && *seen == steps => return Vec::new(),
        _ => return vec![format!("gsnr gives {seen:?} after {steps} steps")],
    };
    let listed: Vec<&str> = seen.tensors().map(|(name, _)| name).collect();
    let mut complaints = Vec::new();
    if listed != names {
        complaints.push(format!("tracked are {listed:?}, should be {names:?}"));
    }
    for ((name, record), truth) in seen.tensors().zip(truths) {
        complaints.extend(check(name, record, truth));
    }
    complaints.extend(check_noise_scale(seen.noise_scale(), truths));
    complaints
}

/// The noise scale against the truths: where |G|² is not clear of 0, either answer will do.
pub fn check_noise_scale(seen: Option<f64>, truths: &[Truth]) -> Vec<String> {
    let mut complaints = Complaints::new("report");
    let (mut gradient, mut noise, mut gap, mut noise_gap) = (0.0, 0.0, 0.0, 0.0);
    for truth in truths.iter().filter(|truth| truth.steps >= 2) {
        let k = f64::from(truth.steps);
        let missed = BOUND * truth.sum_variance + truth.variance_slack;
        gradient += truth.sum_squared_mean - truth.sum_variance / k;
        noise += truth.sum_variance;
        gap += BOUND * truth.sum_squared_mean + truth.square_slack + missed / k;
        noise_gap += missed;
    }
    match seen {
        None if gradient > gap => complaints.add(&format!("noise_scale is None, |G|² is {gradient:e} ± {gap:e}")),
        Some(seen) if gradient < -gap => {
            complaints.add(&format!("noise_scale is {seen:e}, |G|² is {gradient:e} ± {gap:e}"));
        }
        Some(seen) if gradient > gap => {
            let (lowest, highest) = ((noise - noise_gap) / (gradient + gap), (noise + noise_gap) / (gradient - gap));
            if !(lowest..=highest).contains(&seen) {
                complaints.add(&format!("noise_scale is {seen:e}, should be {:e}", noise / gradient));
            }
        }
        _ => {}
    }
    complaints.list
}

/// Two reports byte by byte, or two errors.
pub fn same_report(seen: &Result<GsnrReport, Error>, expected: &Result<GsnrReport, Error>) -> Vec<String> {
    let (seen, expected) = match (seen, expected) {
        (Ok(seen), Ok(expected)) => (seen, expected),
        (Err(seen), Err(expected)) if seen == expected => return Vec::new(),
        _ => return vec![format!("gsnr gives {seen:?}, should give {expected:?}")],
    };
    let mut complaints = Vec::new();
    if !seen.tensors().map(|(name, _)| name).eq(expected.tensors().map(|(name, _)| name)) {
        complaints.push("other tensors are tracked".to_owned());
    }
    for ((name, seen), (_, expected)) in seen.tensors().zip(expected.tensors()) {
        complaints.extend(same_record(name, seen, expected));
    }
    complaints
}

/// Two records byte by byte.
pub fn same_record(name: &str, seen: &GsnrRecord, expected: &GsnrRecord) -> Vec<String> {
    let mut complaints = Complaints::new(name);
    let c = &mut complaints;
    c.equal("steps", seen.steps, expected.steps);
    c.equal("skipped", seen.skipped, expected.skipped);
    c.equal("defined", seen.defined, expected.defined);
    c.equal("constant", seen.constant, expected.constant);
    c.equal("below_one", seen.below_one, expected.below_one);
    c.same_f64("sum_ratio", seen.sum_ratio, expected.sum_ratio);
    c.same_f64("sum_variance", seen.sum_variance, expected.sum_variance);
    c.same_f64("sum_squared_mean", seen.sum_squared_mean, expected.sum_squared_mean);
    c.same_f64("median_or_nan", seen.median_or_nan, expected.median_or_nan);
    c.same_f64("norm_mean", seen.norm_mean, expected.norm_mean);
    c.same_f64("norm_deviations", seen.norm_deviations, expected.norm_deviations);
    same_bytes(c, seen, expected);
    complaints.list
}

/// Makes a probe for a plan, or says why it cannot be.
pub type Make<'a, P> = &'a mut dyn FnMut(Plan, Config) -> Result<P, Error>;

/// Runs the whole table on a device and panics with what is wrong, case by case. What is demanded:
///
/// * conformance: after every step, or after the last of many, the report is within the bounds of the truth;
/// * bits: it equals that of [`Cpu`] byte for byte, asked once or twice, with the elements where they are aligned
///   and with each tensor at another misalignment every step;
/// * nothing around a tensor is written;
/// * refusal: what cannot be tracked, and what is asked for too early, is an error and changes nothing.
pub fn run_all<P: OnHost>(make: Make<'_, P>, effort: &Effort) {
    let mut complaints = refuses_what_cannot_be_tracked(make);
    for case in cases().iter().filter(|case| effort.large || !case.large) {
        complaints.extend(run_case(case, make, effort).into_iter().map(|c| format!("{}: {c}", case.name)));
    }
    super::demand_none(&complaints);
}

/// [`run_all`] for one case; gives back what is wrong.
pub fn run_case<P: OnHost>(case: &Case, make: Make<'_, P>, effort: &Effort) -> Vec<String> {
    let data: Vec<Vec<Data>> = (0..case.steps).into_par_iter().map(|step| case.data(step)).collect();
    let placings = if case.large { 1 } else { effort.offsets.min(2) };
    let mut complaints = Vec::new();
    for placing in 0..placings {
        let found = match make(case.plan(), Config::new().tracking(case.config())) {
            Ok(mut probe) => run_steps(case, &data, placing, &mut probe),
            Err(error) => vec![format!("the probe cannot be made: {error}")],
        };
        complaints.extend(found.into_iter().map(|c| format!("{}: {c}", ["aligned", "misaligned"][placing])));
    }
    complaints
}

fn run_steps(case: &Case, data: &[Vec<Data>], placing: usize, probe: &mut impl OnHost) -> Vec<String> {
    let config = Config::new().tracking(case.config());
    let mut reference = Probe::new(Cpu, case.plan(), config).expect("a case can be tracked");
    let tracked = case.tracked();
    let names: Vec<&str> = tracked.iter().map(|&t| case.names[t].as_str()).collect();
    let mut complaints = Vec::new();
    for (step, tensors) in data.iter().enumerate() {
        let place = |(t, data)| Placed::new(data, placing * (1 + t + 3 * step) % OFFSETS);
        let placed: Vec<Placed> = tensors.iter().enumerate().map(place).collect();
        reference.measure_host(&tensors.iter().map(Data::tensor).collect::<Vec<_>>()).expect("the reference measures");
        if let Err(error) = probe.measure_host(&placed.iter().map(Placed::tensor).collect::<Vec<_>>()) {
            complaints.push(format!("step {step}: {error}"));
            return complaints;
        }
        if !placed.iter().all(Placed::guards_are_intact) {
            complaints.push(format!("step {step}: bytes around a tensor were written"));
        }
        if case.steps > Case::FEW_STEPS && step + 1 < case.steps {
            continue;
        }
        let (seen, expected) = (probe.gsnr_report(), reference.gsnr_report());
        let mut found = same_report(&seen, &expected);
        found.extend(same_report(&probe.gsnr_report(), &seen).into_iter().map(|c| format!("asked again, {c}")));
        if placing == 0 {
            let steps = |t: usize| data[..=step].iter().map(|tensors| &tensors[t]).collect::<Vec<_>>();
            let truths: Vec<Truth> = tracked.par_iter().map(|&t| truth(&steps(t), case.window)).collect();
            found.extend(check_report(&seen, &names, &truths));
        }
        complaints.extend(found.into_iter().map(|c| format!("after {} steps, {c}", step + 1)));
    }
    complaints
}

/// The errors every device owes to a caller who tracks or asks for what cannot be, and that they change nothing.
pub fn refuses_what_cannot_be_tracked<P: OnHost>(make: Make<'_, P>) -> Vec<String> {
    let plan = || Plan::new([("a.weight", DType::F32, 3), ("a.bias", DType::BF16, 2)]).expect("a valid plan");
    let mut complaints = Vec::new();
    let mut demand = |what: &str, holds: bool| {
        if !holds {
            complaints.push(format!("not so: {what}"));
        }
    };
    let biases = [bf16::ONE, bf16::NEG_ONE];
    let step = |probe: &mut P, turn: f32| {
        let weights = [turn, 1.0, 0.5 * turn * turn];
        probe.measure_host(&[HostTensor::F32(&weights), HostTensor::BF16(&biases)]).expect("a good step");
    };
    let few = |result: Result<GsnrReport, Error>, steps: u32| result.err() == Some(Error::TooFewSteps { steps });
    let tracking = Error::NotDeclared { declare: "Config::tracking" };

    for (config, what) in [
        (GsnrConfig::new().window(0), "window 0"),
        (GsnrConfig::new().window(1), "window 1"),
        (GsnrConfig::new().tensors(["a.*", "b.*"]), "a pattern that matches nothing"),
        (GsnrConfig::new().tensors([""]), "an empty pattern"),
    ] {
        let refused = make(plan(), Config::new().tracking(config.clone())).err();
        let right = match what {
            "window 0" | "window 1" => matches!(refused, Some(Error::InvalidConfig { option: "window", .. })),
            "an empty pattern" => refused == Some(Error::NoSuchTensor { pattern: String::new() }),
            _ => refused == Some(Error::NoSuchTensor { pattern: "b.*".to_owned() }),
        };
        demand(&format!("{what} is refused"), right && config.bytes(&plan()).err() == refused);
        let stated = Config::new().tracking(config).bytes(&plan()).err();
        demand(&format!("{what} is refused by those who ask for its bytes"), stated == refused);
    }
    for (config, what) in [(Config::new(), "nothing"), (Config::new().moments(), "only moments")] {
        let mut probe = make(plan(), config).expect("a valid config");
        step(&mut probe, 1.0);
        step(&mut probe, 2.0);
        let declared = |known: Result<(), Error>| known == Err(tracking.clone());
        demand(&format!("{what} declared, nothing is known"), declared(probe.gsnr_report().map(drop)));
        demand(
            &format!("{what} declared, nothing is launched"),
            declared(probe.probe().gsnr().and_then(|mut s| s.launch())),
        );
        demand(&format!("{what} declared, nothing is reset"), declared(probe.gsnr_reset()));
    }

    let mut windowed = make(plan(), Config::new().tracking(GsnrConfig::new().window(2))).expect("a plain window");
    demand("no steps are too few for a window", few(windowed.gsnr_report(), 0));
    let mut probe = make(plan(), Config::new().tracking(GsnrConfig::new())).expect("a valid config");
    demand("no steps are too few", few(probe.gsnr_report(), 0));
    step(&mut probe, 1.0);
    demand("one step is too few", few(probe.gsnr_report(), 1));
    step(&mut probe, 2.0);
    let two = probe.gsnr_report();
    demand("two steps are enough", two.is_ok());

    let (weights, longer) = ([0.0f32; 3], [0.0f32; 4]);
    for tensors in [
        &[HostTensor::F32(&weights)][..],
        &[HostTensor::F32(&longer), HostTensor::BF16(&biases)],
        &[HostTensor::BF16(&biases), HostTensor::F32(&weights)],
    ] {
        demand("a step that is not the plan's is refused", probe.measure_host(tensors).is_err());
        demand("a refused step changes nothing", same_report(&probe.gsnr_report(), &two).is_empty());
    }
    let moments = probe
        .probe()
        .moments()
        .and_then(|mut moments| moments.report(&AdamStep { step: 2, beta1: 0.9, beta2: 0.999 }, &[]).map(drop));
    demand("moments are not declared", moments == Err(Error::NotDeclared { declare: "Config::moments" }));
    demand("what is not declared changes nothing", same_report(&probe.gsnr_report(), &two).is_empty());
    step(&mut probe, 5.0);
    demand("a third step is another result", !same_report(&probe.gsnr_report(), &two).is_empty());

    demand("a reset is granted", probe.gsnr_reset() == Ok(()));
    demand("a reset forgets", few(probe.gsnr_report(), 0));
    step(&mut probe, 1.0);
    step(&mut probe, 2.0);
    demand("after a reset all is as at first", same_report(&probe.gsnr_report(), &two).is_empty());

    let one = Config::new().tracking(GsnrConfig::new().tensors(["*.bias"]));
    let mut probe = make(plan(), one).expect("one tensor can be tracked");
    demand("of one tensor too, no steps are too few", few(probe.gsnr_report(), 0));
    step(&mut probe, 1.0);
    step(&mut probe, 2.0);
    let bias = probe.gsnr_report().is_ok_and(|report| {
        let names: Vec<&str> = report.tensors().map(|(name, _)| name).collect();
        names == ["a.bias"] && report.tensors().all(|(_, record)| record.steps == 2 && record.constant == 2)
    });
    demand("the other is not in the report", bias);
    complaints
}
