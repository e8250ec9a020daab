//! The noise scale from the norms of running sums: the estimate against least squares with the whole covariance, known
//! answers, what is left out, and what is refused.
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // Small numbers.

use crate::common::{host::OnHost, normal::Normal};
use gradprobe::{
    Config, Cpu, DType, Error, HostTensor, Plan, Probe, Report,
    gsnr::{AccumulationNoise, Estimate, NoiseEstimate, NoiseScale},
};

/// Reports on tensors that tests say of which norm they are.
struct Norms {
    plan: Plan,
    probe: Probe,
}

impl Norms {
    fn new(tensors: usize) -> Self {
        let plan = Plan::new((0..tensors).map(|t| (t.to_string(), DType::F32, 1))).unwrap();
        Self { probe: Probe::new(Cpu, plan.clone(), Config::default()).unwrap(), plan }
    }

    /// On tensors of one element each.
    fn report(&mut self, elements: &[f32]) -> Report {
        self.probe.measure_host(&elements.chunks(1).map(HostTensor::F32).collect::<Vec<_>>()).unwrap()
    }
}

/// Minimises (y − X θ)ᵀ V⁻¹ (y − X θ) for E ‖S_k‖² = k² θ_0 + k θ_1 and V_jk = min(j, k)², by elimination.
fn least_squares(observed: &[(u32, f64)]) -> [f64; 2] {
    let n = observed.len();
    let mut rows: Vec<Vec<f64>> = observed
        .iter()
        .map(|&(k, y)| {
            let covariances = observed.iter().map(|&(j, _)| f64::from(j.min(k)).powi(2));
            covariances.chain([f64::from(k).powi(2), f64::from(k), y]).collect()
        })
        .collect();
    for i in 0..n {
        let pivot = rows[i].clone();
        for (other, row) in rows.iter_mut().enumerate() {
            let factor = if other == i { 1.0 - 1.0 / pivot[i] } else { row[i] / pivot[i] };
            row.iter_mut().zip(&pivot).for_each(|(x, p)| *x -= factor * p);
        }
    }
    // Now rows hold V⁻¹ [X y].
    let dot = |power: i32, column: usize| -> f64 {
        observed.iter().zip(&rows).map(|(&(k, _), row)| f64::from(k).powi(power) * row[n + column]).sum()
    };
    let (a, b, d) = (dot(2, 0), dot(2, 1), dot(1, 1));
    let (p, q) = (dot(2, 2), dot(1, 2));
    [(p * d - q * b) / (a * d - b * b), (a * q - b * p) / (a * d - b * b)]
}

fn value(estimate: Option<Estimate>) -> f64 {
    estimate.unwrap().value
}

fn near(seen: f64, expected: f64, relative: f64) -> bool {
    (seen - expected).abs() <= relative * expected.abs()
}

#[test]
fn an_accumulation_is_fitted_by_least_squares_under_the_whole_covariance() {
    let sums = [3.0f32, 5.5, 4.0, 9.0, 12.0, 11.0, 17.5, 16.0];
    for seen in [vec![1, 2], vec![1, 2, 3, 4, 5, 6, 7, 8], vec![1, 8], vec![2, 3, 7], vec![5, 6], vec![1, 4, 5, 8]] {
        let mut norms = Norms::new(1);
        let mut noise = AccumulationNoise::new(norms.plan.clone(), 8).unwrap();
        for &k in &seen {
            noise.add(k, &norms.report(&[sums[k as usize - 1]])).unwrap();
        }
        if seen.last() != Some(&8) {
            assert_eq!(noise.total().accumulations, 0, "the next has not begun");
            noise.add(1, &norms.report(&[1.0])).unwrap();
        }
        let observed: Vec<(u32, f64)> = seen.iter().map(|&k| (k, f64::from(sums[k as usize - 1]).powi(2))).collect();
        let expected = least_squares(&observed);
        for estimate in [noise.total(), noise.tensors().next().unwrap().1] {
            let fitted = [value(estimate.squared_gradient), value(estimate.sum_variance)];
            assert!((0..2).all(|i| near(fitted[i], expected[i], 1e-9)), "{seen:?}: {fitted:?}, not {expected:?}");
            assert_eq!((estimate.accumulations, estimate.noise_scale), (1, NoiseScale::TooFewAccumulations));
        }
    }
    // Two points, as the papers have it.
    let [signal, noise] = least_squares(&[(1, 7.0), (2, 20.0)]);
    assert!(near(signal, (20.0 - 2.0 * 7.0) / 2.0, 1e-12) && near(noise, (4.0 * 7.0 - 20.0) / 2.0, 1e-12));
}

/// A trainer's micro-batches: gradients of some tensors with a mean and a standard deviation for each element.
struct Trainer {
    plan: Plan,
    probe: Probe,
    normal: Normal,
    tensors: Vec<(usize, f64, f64)>,
}

impl Trainer {
    /// Tensors by elements, mean and standard deviation.
    fn new(seed: u64, tensors: &[(usize, f64, f64)]) -> Self {
        let named = tensors.iter().enumerate();
        let plan = Plan::new(named.map(|(t, of)| (t.to_string(), DType::F32, of.0 as u64))).unwrap();
        let probe = Probe::new(Cpu, plan.clone(), Config::default()).unwrap();
        Self { plan, probe, normal: Normal::new(seed), tensors: tensors.to_vec() }
    }

    /// An accumulation, each gradient multiplied by `scale` before it is added, of which all `estimates` are told.
    /// `change` is shown the sums before they are measured.
    fn accumulate(
        &mut self,
        estimates: &mut [&mut AccumulationNoise],
        micro_batches: u32,
        scale: f32,
        mut change: impl FnMut(u32, &mut [Vec<f32>]),
    ) {
        let mut sums: Vec<Vec<f32>> = self.tensors.iter().map(|of| vec![0.0; of.0]).collect();
        for k in 1..=micro_batches {
            for (sum, &(_, mean, std)) in sums.iter_mut().zip(&self.tensors) {
                sum.iter_mut().for_each(|x| *x += scale * (mean + std * self.normal.next()) as f32);
            }
            change(k, &mut sums);
            let tensors: Vec<HostTensor<'_>> = sums.iter().map(|sum| HostTensor::F32(sum)).collect();
            let report = self.probe.measure_host(&tensors).unwrap();
            estimates.iter_mut().for_each(|noise| noise.add(k, &report).unwrap());
        }
    }

    fn noise(&self, micro_batches: u32) -> AccumulationNoise {
        AccumulationNoise::new(self.plan.clone(), micro_batches).unwrap()
    }
}

#[track_caller]
fn within(what: &str, estimate: Option<Estimate>, expected: f64) {
    let Estimate { value, standard_error: Some(error) } = estimate.unwrap() else { panic!("{what}: no error") };
    println!("{what}: {value:.4} ± {error:.4}, truth {expected}");
    assert!((value - expected).abs() <= 3.0 * error, "{what}: {value} ± {error} should be {expected}");
}

fn scale(estimate: &NoiseEstimate) -> Option<Estimate> {
    match estimate.noise_scale {
        NoiseScale::Significant(scale) => Some(scale),
        _ => None,
    }
}

/// |G|² and tr Σ of 1 and 50, 0.5 and 1, 3 and 0.01: in total 4.5 and 51.01.
#[test]
fn known_noise_scales_are_found_within_their_errors() {
    let per_element = |elements: usize, squared: f64, trace: f64| {
        let n = elements as f64;
        (elements, (squared / n).sqrt(), (trace / n).sqrt())
    };
    let known = [(1.0, 50.0), (0.5, 1.0), (3.0, 0.01)];
    let tensors: Vec<_> = known.iter().zip([64, 10, 30]).map(|(&(g, s), n)| per_element(n, g, s)).collect();
    for (micro_batches, accumulations) in [(2, 6000), (8, 2000), (32, 500)] {
        let mut trainer = Trainer::new(5, &tensors);
        let (mut noise, mut recent) =
            (trainer.noise(micro_batches), trainer.noise(micro_batches).decay(0.995).unwrap());
        for _ in 0..accumulations {
            trainer.accumulate(&mut [&mut noise, &mut recent], micro_batches, 1.0, |_, _| ());
        }
        for noise in [&noise, &recent] {
            println!("{noise}");
            for ((_, estimate), &(squared, trace)) in
                noise.tensors().zip(&known).chain([(("total", noise.total()), &(4.5, 51.01))])
            {
                let what = |of: &str| format!("{micro_batches} micro-batches, {of}");
                within(&what("|G|²"), estimate.squared_gradient, squared);
                within(&what("tr Σ"), estimate.sum_variance, trace);
                if squared < 1.0 || trace < 50.0 || estimate.noise_scale != NoiseScale::NotSignificant {
                    within(&what("noise scale"), scale(&estimate), trace / squared);
                }
            }
        }
        let error = scale(&noise.total()).unwrap().standard_error.unwrap();
        assert!(error < 0.05 * 51.01 / 4.5, "{error}");
    }
}

#[test]
fn errors_are_those_that_repetition_shows() {
    let (mut beyond, mut significant) = ([0; 3], 0);
    for seed in 0..300 {
        let mut trainer = Trainer::new(seed, &[(20, 0.2, 1.0)]);
        let mut noise = trainer.noise(4);
        for _ in 0..50 {
            trainer.accumulate(&mut [&mut noise], 4, 1.0, |_, _| ());
        }
        let total = noise.total();
        let mut count = |i: usize, estimate: Option<Estimate>, truth: f64| {
            let Estimate { value, standard_error } = estimate.unwrap();
            beyond[i] += u32::from((value - truth).abs() > 2.01 * standard_error.unwrap());
        };
        count(0, total.squared_gradient, 0.8);
        count(1, total.sum_variance, 20.0);
        if let Some(scale) = scale(&total) {
            significant += 1;
            count(2, Some(scale), 25.0);
        }
    }
    // 5 % of 300 are 15 ± 4; the ratio is less normal.
    println!("{beyond:?} of 300 are off by more than twice their error; {significant} are significant");
    assert!(beyond[..2].iter().all(|n| (4..=27).contains(n)) && beyond[2] <= 36 && significant > 150, "{beyond:?}");
}

#[test]
fn pure_noise_is_not_significant() {
    let tensors = vec![(40, 0.0, 1.0); 400];
    for accumulations in [3, 200] {
        let mut trainer = Trainer::new(3, &tensors);
        let mut noise = trainer.noise(8);
        for seen in 0..accumulations {
            let estimates: Vec<NoiseEstimate> = noise.tensors().map(|(_, of)| of).chain([noise.total()]).collect();
            let too_few = estimates.iter().all(|of| of.noise_scale == NoiseScale::TooFewAccumulations);
            assert_eq!(too_few, seen < 3, "after {seen}");
            trainer.accumulate(&mut [&mut noise], 8, 1.0, |_, _| ());
        }
        let total = noise.total();
        assert_eq!((total.noise_scale, total.noise_scale.value()), (NoiseScale::NotSignificant, None));
        within("|G|²", total.squared_gradient, 0.0);
        // 2.5 % of 400 are 10 ± 3.
        let significant = noise.tensors().filter(|(_, of)| of.noise_scale != NoiseScale::NotSignificant).count();
        println!("{significant} of 400 after {accumulations}");
        assert!(significant <= 20, "{significant} of 400 after {accumulations}:\n{noise}");
        let below = noise.tensors().filter(|(_, of)| value(of.squared_gradient) < 0.0).count();
        assert!(below > 100, "not clamped: {below} of 400 are below 0");
        assert!(noise.to_string().contains("not significant"), "{noise}");
    }
}

#[test]
fn gradients_without_noise_have_a_noise_scale_of_zero() {
    let mut trainer = Trainer::new(1, &[(16, 0.25, 0.0)]);
    let mut noise = trainer.noise(4);
    (0..5).for_each(|_| trainer.accumulate(&mut [&mut noise], 4, 1.0, |_, _| ()));
    let total = noise.total();
    assert!(near(value(total.squared_gradient), 1.0, 1e-12));
    assert!(value(total.sum_variance).abs() < 1e-12 && total.noise_scale.value().unwrap().abs() < 1e-12, "{total:?}");
}

#[test]
fn a_loss_divided_by_the_micro_batches_has_the_same_noise_scale() {
    let estimates = [1.0f32, 0.25, 1e-6].map(|scale| {
        let mut trainer = Trainer::new(11, &[(64, 0.5, 1.0)]);
        let mut noise = trainer.noise(4);
        (0..100).for_each(|_| trainer.accumulate(&mut [&mut noise], 4, scale, |_, _| ()));
        noise.total()
    });
    let [whole, quarter, small] = estimates;
    for (scaled, by) in [(quarter, 0.25f64), (small, 1e-6)] {
        assert!(near(scaled.noise_scale.value().unwrap(), whole.noise_scale.value().unwrap(), 1e-4));
        assert!(near(value(scaled.squared_gradient), value(whole.squared_gradient) * by * by, 1e-4));
        assert!(near(value(scaled.sum_variance), value(whole.sum_variance) * by * by, 1e-4));
    }
}

/// The estimates but for what was left out.
fn without_counts(estimate: NoiseEstimate) -> NoiseEstimate {
    NoiseEstimate { incomplete: 0, skipped: 0, ..estimate }
}

#[test]
fn what_is_not_finite_is_left_out_and_counted() {
    let tensors = [(16, 0.5, 1.0), (4, 0.5, 1.0)];
    let mut trainer = Trainer::new(2, &tensors);
    let (mut noise, mut clean) = (trainer.noise(4), trainer.noise(4));
    // Two accumulations of a thousand break the second tensor, in their first and in their third micro-batch.
    for accumulation in 0..1000 {
        let (before, mut whole) = (trainer.normal.clone(), Vec::new());
        trainer.accumulate(&mut [&mut noise], 4, 1.0, |k, sums| {
            if accumulation == 5 && k == 1 {
                sums[1][2] = f32::NAN;
            }
            if accumulation == 7 && k == 3 {
                sums[1][0] = f32::INFINITY;
            }
        });
        // What the other estimates see is whole, but they are shown only what was finite.
        trainer.normal = before;
        let mut spare = trainer.noise(4);
        trainer.accumulate(&mut [&mut spare], 4, 1.0, |_, sums| whole.push(sums.to_vec()));
        let shown = match accumulation {
            5 => 0,
            7 => 2,
            _ => 4,
        };
        for (k, sums) in (1..).zip(&whole[..shown]) {
            let tensors: Vec<HostTensor<'_>> = sums.iter().map(|sum| HostTensor::F32(sum)).collect();
            clean.add(k, &trainer.probe.measure_host(&tensors).unwrap()).unwrap();
        }
    }
    let [(_, first), (_, second)] = noise.tensors().collect::<Vec<_>>()[..] else { panic!("two tensors") };
    assert_eq!((first.accumulations, first.incomplete, first.skipped), (1000, 0, 0));
    let expected = clean.tensors().nth(1).unwrap().1;
    for (seen, expected) in [(second, expected), (noise.total(), clean.total())] {
        assert_eq!((seen.accumulations, seen.incomplete, seen.skipped), (999, 1, 6));
        assert_eq!(without_counts(seen), without_counts(expected), "as if it had not been");
    }
}

#[test]
fn weights_fall_by_the_decay() {
    let mut norms = Norms::new(1);
    let mut noise = AccumulationNoise::new(norms.plan.clone(), 2).unwrap().decay(0.5).unwrap();
    let mut known: Vec<[f64; 2]> = Vec::new();
    for (first, second) in [(2.0f32, 5.0f32), (3.0, 5.5), (2.5, 5.25), (3.5, 6.0), (2.0, 4.0)] {
        noise.add(1, &norms.report(&[first])).unwrap();
        noise.add(2, &norms.report(&[second])).unwrap();
        known.push(least_squares(&[(1, f64::from(first).powi(2)), (2, f64::from(second).powi(2))]));
        let weights: Vec<f64> = (0..known.len() as i32).rev().map(|age| 0.5f64.powi(age)).collect();
        let total: f64 = weights.iter().sum();
        let squares: f64 = weights.iter().map(|p| (p / total).powi(2)).sum();
        let mean = |i: usize| known.iter().zip(&weights).map(|(x, p)| x[i] * p / total).sum::<f64>();
        let seen = noise.total();
        for (i, estimate) in [seen.squared_gradient, seen.sum_variance].into_iter().enumerate() {
            let estimate = estimate.unwrap();
            assert!(near(estimate.value, mean(i), 1e-12), "{known:?}");
            let spread = known.iter().zip(&weights).map(|(x, p)| (p / total * (x[i] - mean(i))).powi(2)).sum::<f64>();
            let error = (spread / (1.0 - squares)).sqrt();
            assert_eq!(estimate.standard_error.is_some(), known.len() >= 3);
            assert!(estimate.standard_error.is_none_or(|seen| near(seen, error, 1e-9)));
        }
        if known.len() >= 3 {
            // Of a ratio R of means: that of the mean of noise - R · signal, over the signal.
            let ratio = mean(1) / mean(0);
            let residual = |x: &[f64; 2]| x[1] - ratio * x[0];
            let spread = known.iter().zip(&weights).map(|(x, p)| (p / total * residual(x)).powi(2)).sum::<f64>();
            let error = (spread / (1.0 - squares)).sqrt() / mean(0);
            let seen = scale(&seen).expect("significant");
            assert!(near(seen.value, ratio, 1e-12) && near(seen.standard_error.unwrap(), error, 1e-9), "{seen:?}");
        }
    }
}

#[test]
fn what_cannot_be_right_is_an_error_and_changes_nothing() {
    let mut norms = Norms::new(2);
    for micro_batches in [0, 1] {
        let value = micro_batches.to_string();
        let error = Error::InvalidConfig { option: "micro_batches", expected: "at least 2", value };
        assert_eq!(AccumulationNoise::new(norms.plan.clone(), micro_batches).unwrap_err(), error);
    }
    let new = || AccumulationNoise::new(Norms::new(2).plan, 4).unwrap();
    for (decay, value) in [(0.0, "0"), (1.0, "1"), (-0.5, "-0.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        let error = Error::InvalidConfig { option: "decay", expected: "above 0 and below 1", value: value.to_owned() };
        assert_eq!(new().decay(decay).unwrap_err(), error);
    }

    let mut noise = new();
    let refuse = |noise: &mut AccumulationNoise, k: u32, report: &Report, error: Error| {
        let before = format!("{noise:?}");
        assert_eq!(noise.add(k, report).unwrap_err(), error);
        assert_eq!(format!("{noise:?}"), before, "{error}");
    };
    let order = |given, step, last, last_step| Error::MicroBatchOrder { given, step, last, last_step, of: 4 };
    let other = Norms::new(3).report(&[1.0, 2.0, 3.0]);
    let of_other = || Error::ReportOfAnotherPlan { name: "2".to_owned(), what: "only it has that tensor".to_owned() };
    refuse(&mut noise, 1, &other, of_other());
    let reports: Vec<Report> = (0..6).map(|i| norms.report(&[i as f32, 1.0])).collect();
    refuse(&mut noise, 0, &reports[0], order(0, 1, 0, 0));
    refuse(&mut noise, 5, &reports[0], order(5, 1, 0, 0));
    noise.add(1, &reports[0]).unwrap();
    refuse(&mut noise, 1, &reports[0], order(1, 1, 1, 1));
    refuse(&mut noise, 2, &reports[0], order(2, 1, 1, 1));
    noise.add(3, &reports[2]).unwrap();
    refuse(&mut noise, 2, &reports[3], order(2, 4, 3, 3));
    refuse(&mut noise, 3, &reports[3], order(3, 4, 3, 3));
    refuse(&mut noise, 4, &reports[1], order(4, 2, 3, 3));
    refuse(&mut noise, 4, &other, of_other());
    // The next accumulation completes this one, of three micro-batches that were seen.
    noise.add(1, &reports[3]).unwrap();
    assert_eq!((noise.total().accumulations, noise.total().incomplete), (1, 0));
    noise.add(4, &reports[4]).unwrap();
    assert_eq!(noise.total().accumulations, 2);
    refuse(&mut noise, 1, &reports[4], order(1, 5, 0, 5));
    assert_eq!(
        order(2, 4, 3, 3).to_string(),
        "micro-batch 2 (measurement 4) cannot follow micro-batch 3 (measurement 3) of 4"
    );
}
