//! Signal and noise from Adam's moments: the CPU against two oracles in f64, known answers, the kernels on the
//! host bit for bit in every schedule, and what is refused.
#![allow(unsafe_code, reason = "gives the probe bare addresses, good and bad")]
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // Small numbers.

use crate::common::{host::OnHost, normal::Normal};
use gradprobe::{
    Absent, Config, Cpu, DType, Error, HostTensor, Plan, Probe, RawTensor, Tensor,
    gsnr::{AdamMoments, AdamStep, GsnrConfig, GsnrRecord, GsnrReport},
};
use gradprobe_simt::{Schedule, Simt};

/// Moments as an optimizer keeps them, in f32, and the same in f64.
#[derive(Clone)]
struct Optimizer {
    beta1: f64,
    beta2: f64,
    step: u32,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    exact: Vec<[f64; 2]>,
}

impl Optimizer {
    fn new(beta1: f64, beta2: f64, elements: usize) -> Self {
        let zeros = vec![0.0; elements];
        Self { beta1, beta2, step: 0, exp_avg: zeros.clone(), exp_avg_sq: zeros, exact: vec![[0.0; 2]; elements] }
    }

    /// As torch does: `exp_avg.lerp_(grad, 1 - beta1)`, `exp_avg_sq.mul_(beta2).addcmul_(grad, grad, 1 - beta2)`.
    fn update(&mut self, gradient: impl Fn(usize) -> f32) {
        let (share1, beta2, share2) = ((1.0 - self.beta1) as f32, self.beta2 as f32, (1.0 - self.beta2) as f32);
        self.step += 1;
        for (j, exact) in self.exact.iter_mut().enumerate() {
            let g = gradient(j);
            self.exp_avg[j] += share1 * (g - self.exp_avg[j]);
            self.exp_avg_sq[j] = self.exp_avg_sq[j] * beta2 + share2 * g * g;
            let g = f64::from(g);
            exact[0] = self.beta1 * exact[0] + (1.0 - self.beta1) * g;
            exact[1] = self.beta2 * exact[1] + (1.0 - self.beta2) * g * g;
        }
    }

    fn at(&self) -> AdamStep {
        AdamStep { step: self.step, beta1: self.beta1, beta2: self.beta2 }
    }

    fn moments(&self) -> AdamMoments<'_> {
        AdamMoments { exp_avg: &self.exp_avg, exp_avg_sq: &self.exp_avg_sq }
    }

    fn record(&self) -> GsnrRecord {
        let plan = Plan::new([("weight", DType::BF16, self.exp_avg.len() as u64)]).unwrap();
        records(&of_moments(&mut on_cpu(plan), &self.at(), &[self.moments()]).unwrap())[0].1
    }

    /// What the record of these moments should say, from the weights that the steps have in them.
    fn truth(&self, moments: impl Iterator<Item = [f64; 2]>) -> Truth {
        let weights = |beta: f64| -> Vec<f64> { (0..self.step as i32).map(|age| beta.powi(age)).collect() };
        let sum = |weights: &[f64]| weights.iter().sum::<f64>();
        let of_mean = weights(self.beta1);
        let (total, total_of_squares) = (sum(&of_mean), sum(&weights(self.beta2)));
        let share = of_mean.iter().map(|w| (w / total).powi(2)).sum::<f64>();
        let mut truth = Truth { share, ..Truth::default() };
        for [m, v] in moments {
            let mean = m / (1.0 - self.beta1) / total;
            let square = v / (1.0 - self.beta2) / total_of_squares;
            let variance = (square - mean * mean) / (1.0 - share);
            truth.sum_variance += variance;
            truth.sum_squared_mean += mean * mean;
            if variance > 0.0 {
                let ratio = (mean * mean - share * variance) / variance;
                truth.ratios.push(ratio);
            } else {
                truth.constant += 1;
            }
        }
        truth.ratios.sort_by(f64::total_cmp);
        truth
    }

    fn truth_of_f32(&self) -> Truth {
        let pairs = self.exp_avg.iter().zip(&self.exp_avg_sq);
        self.truth(pairs.map(|(&m, &v)| [f64::from(m), f64::from(v)]))
    }
}

#[derive(Default)]
struct Truth {
    share: f64,
    constant: u64,
    sum_variance: f64,
    sum_squared_mean: f64,
    /// Sorted.
    ratios: Vec<f64>,
}

impl Truth {
    fn median(&self) -> f64 {
        let n = self.ratios.len();
        (self.ratios[(n - 1) / 2] + self.ratios[n / 2]) / 2.0
    }

    fn mean(&self) -> f64 {
        self.ratios.iter().sum::<f64>() / self.ratios.len() as f64
    }

    fn below_one(&self) -> u64 {
        self.ratios.iter().filter(|&&r| r < 1.0).count() as u64
    }
}

/// No moments.
const NONE: AdamMoments<'static> = AdamMoments { exp_avg: &Absent, exp_avg_sq: &Absent };

fn on_cpu(plan: Plan) -> Probe {
    Probe::new(Cpu, plan, Config::new().moments()).unwrap()
}

fn of_moments(probe: &mut Probe, step: &AdamStep, moments: &[AdamMoments<'_>]) -> Result<GsnrReport, Error> {
    probe.moments()?.report(step, moments)
}

fn records(report: &GsnrReport) -> Vec<(String, GsnrRecord)> {
    report.tensors().map(|(name, record)| (name.to_owned(), *record)).collect()
}

#[track_caller]
fn near(what: &str, seen: f64, expected: f64, relative: f64) {
    let error = (seen - expected).abs();
    assert!(error <= relative * expected.abs(), "{what}: {seen:e} should be {expected:e}, relative error {relative:e}");
}

/// Elements of a chunk and some more, whose true ratios are 0 to 3.
const LENGTH: usize = 33_001;

/// The gradients of a step, whose noise has a standard deviation of 1.
fn gradients(seed: u64, step: u32) -> Vec<f32> {
    let mut normal = Normal::new(seed << 32 | u64::from(step));
    (0..LENGTH).map(|j| (f64::from(j as u32 % 7) / 4.0 + normal.next()) as f32).collect()
}

#[test]
fn the_cpu_conforms_at_every_scale() {
    for last in [2, 10, 1000] {
        let scales = [1e-7f32, 1e-5, 1e-3, 1.0, 1e3];
        let mut optimizers = scales.map(|_| Optimizer::new(0.9, 0.999, LENGTH));
        for step in 0..last {
            let gradients = gradients(1, step);
            for (optimizer, scale) in optimizers.iter_mut().zip(scales) {
                optimizer.update(|j| gradients[j] * scale);
            }
        }
        for (optimizer, scale) in optimizers.iter().zip(scales) {
            let (seen, what) = (optimizer.record(), |of: &str| format!("{of} at scale {scale:e} after {last} steps"));
            assert_eq!((seen.steps, seen.skipped, seen.nonfinite), (last, 0, 0));
            // Of the very moments: all but exact, up to elements whose ratio is 1 or variance 0 to the last bits of f64.
            let truth = optimizer.truth_of_f32();
            near(&what("effective steps"), seen.effective_steps, 1.0 / truth.share, 1e-12);
            near(&what("ratio shift"), seen.ratio_shift, truth.share, 1e-12);
            assert_eq!(
                (seen.defined, seen.constant),
                (truth.ratios.len() as u64, truth.constant),
                "{}",
                what("defined")
            );
            assert!(seen.below_one.abs_diff(truth.below_one()) <= 1, "{}", what("below one"));
            near(&what("sum of variances"), seen.sum_variance, truth.sum_variance, 1e-9);
            near(&what("sum of squared means"), seen.sum_squared_mean, truth.sum_squared_mean, 1e-12);
            // In f64 too, the least v̂ − m̂² of all keep few digits.
            near(&what("mean"), seen.mean().unwrap(), truth.mean(), 1e-6);
            assert_eq!(seen.corrected_mean(), seen.mean());
            assert_eq!(seen.fraction_below_one(), Some(seen.below_one as f64 / seen.defined as f64));
            let median = seen.median().unwrap();
            let bound = 0.032 * (truth.median() + truth.share);
            assert!((median - truth.median()).abs() <= bound, "{}: {median} for {}", what("median"), truth.median());
            // Of the moments that f64 would have had: what the optimizer's f32 costs.
            let exact = optimizer.truth(optimizer.exact.iter().copied());
            near(&what("f64's sum of variances"), seen.sum_variance, exact.sum_variance, 1e-4);
            near(&what("f64's sum of squared means"), seen.sum_squared_mean, exact.sum_squared_mean, 1e-4);
            near(&what("f64's share below one"), seen.below_one as f64, exact.below_one() as f64, 1e-3);
            assert!((median - exact.median()).abs() <= bound + 1e-4, "{}", what("f64's median"));
        }
    }
}

/// Mean and standard error of some numbers.
fn mean_of(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// The records of 64 tensors of 500 elements whose true ratio is `ratio`.
fn known(beta1: f64, steps: u32, ratio: f64) -> Vec<GsnrRecord> {
    const TENSORS: usize = 64;
    const ELEMENTS: usize = 500;
    let signal = ratio.sqrt();
    let mut normal = Normal::new(7);
    let mut optimizer = Optimizer::new(beta1, 0.999, TENSORS * ELEMENTS);
    for _ in 0..steps {
        let gradients: Vec<f32> = (0..TENSORS * ELEMENTS).map(|_| (signal + normal.next()) as f32).collect();
        optimizer.update(|j| gradients[j]);
    }
    let plan = Plan::new((0..TENSORS).map(|t| (t.to_string(), DType::F32, ELEMENTS as u64))).unwrap();
    let parts: Vec<_> = optimizer.exp_avg.chunks(ELEMENTS).zip(optimizer.exp_avg_sq.chunks(ELEMENTS)).collect();
    let moments: Vec<AdamMoments<'_>> =
        parts.iter().map(|(exp_avg, exp_avg_sq)| AdamMoments { exp_avg, exp_avg_sq }).collect();
    let report = of_moments(&mut on_cpu(plan), &optimizer.at(), &moments).unwrap();
    records(&report).into_iter().map(|(_, record)| record).collect()
}

#[test]
fn known_signal_and_noise_are_found() {
    for (beta1, steps, ratio) in [
        (0.9, 2000, 0.0),
        (0.9, 2000, 0.5),
        (0.9, 2000, 3.0),
        (0.9, 10, 0.5),
        (0.9, 2, 0.5),
        (0.99, 2000, 0.0),
        (0.99, 2000, 0.5),
        (0.99, 2000, 3.0),
    ] {
        let records = known(beta1, steps, ratio);
        let share = 1.0 / records[0].effective_steps;
        let gradient: Vec<f64> = records.iter().map(|r| r.squared_gradient().unwrap() / 500.0).collect();
        let noise: Vec<f64> = records.iter().map(|r| r.sum_variance / 500.0).collect();
        let ratios: Vec<f64> = records.iter().map(|r| r.mean().unwrap()).collect();
        for (what, values, expected) in [("signal²", &gradient, ratio), ("noise²", &noise, 1.0)] {
            let (seen, error) = mean_of(values);
            println!("β1 {beta1}, {steps} steps, ratio {ratio}: {what} {seen:.5} ± {error:.5}");
            assert!((seen - expected).abs() <= 3.0 * error, "{what}: {seen} ± {error} should be {expected}");
        }
        let (seen, error) = mean_of(&ratios);
        // What `AdamStep` documents of the mean: where m̂ remembers little, a few elements outweigh all.
        let bias = (1.0 + ratio) * (4.0 * ratio * share + 2.0 * share * share);
        println!("    mean of the ratios {seen:.5} ± {error:.5}, expected {:.5}", ratio + bias);
        if ratio == 0.0 || beta1 == 0.99 {
            assert!((seen - ratio - bias).abs() <= 3.0 * error + 0.1 * bias, "{seen} ± {error} for {ratio} + {bias}");
        }
        let (seen, _) = mean_of(&records.iter().map(|r| r.median().unwrap()).collect::<Vec<_>>());
        let expected = ratio - share * (1.0 + ratio);
        if ratio > 0.0 && 4.0 * ratio * share < 0.15 {
            assert!((seen - expected).abs() <= 0.06 * ratio, "median {seen} for {expected}");
        }
    }
}

#[test]
fn what_is_no_number_and_what_does_not_vary_is_counted_and_left_out() {
    let mut optimizer = Optimizer::new(0.9, 0.999, LENGTH);
    for step in 0..5 {
        let gradients = gradients(2, step);
        // A third never has a gradient.
        optimizer.update(|j| if j % 3 == 0 { 0.0 } else { gradients[j] });
    }
    let chosen = |keep: fn(usize) -> bool| {
        let mut part = Optimizer { exp_avg: Vec::new(), exp_avg_sq: Vec::new(), ..optimizer.clone() };
        for j in (0..LENGTH).filter(|&j| keep(j)) {
            part.exp_avg.push(optimizer.exp_avg[j]);
            part.exp_avg_sq.push(optimizer.exp_avg_sq[j]);
        }
        part
    };
    let truth = optimizer.truth_of_f32();
    let seen = optimizer.record();
    assert_eq!((seen.defined, seen.constant), (truth.ratios.len() as u64, truth.constant));
    assert!(seen.constant >= LENGTH as u64 / 3);

    let mut broken = optimizer.clone();
    for (j, (m, v)) in
        [(0, (f32::NAN, 1.0)), (1, (1.0, f32::NAN)), (2, (f32::INFINITY, 1.0)), (3, (0.0, f32::INFINITY))]
    {
        (broken.exp_avg[j], broken.exp_avg_sq[j]) = (m, v);
    }
    (broken.exp_avg[4], broken.exp_avg_sq[4]) = (f32::NEG_INFINITY, f32::INFINITY);
    let (seen, whole) = (broken.record(), chosen(|j| j > 4).record());
    assert_eq!((seen.nonfinite, seen.defined, seen.constant), (5, whole.defined, whole.constant));
    near("sum of variances", seen.sum_variance, whole.sum_variance, 1e-12);
    near("mean", seen.mean().unwrap(), whole.mean().unwrap(), 1e-12);
    let plan = Plan::new([("weight", DType::F32, LENGTH as u64)]).unwrap();
    let report = of_moments(&mut on_cpu(plan), &broken.at(), &[broken.moments()]).unwrap();
    let table = report.to_string();
    assert!(table.contains("\nweight: 5 elements left out, whose moments are NaN or infinite\n"), "{table}");
    let scale = whole.sum_variance / whole.squared_gradient().unwrap();
    near("noise scale", report.noise_scale().unwrap(), scale, 1e-12);

    let nothing = chosen(|j| j % 3 == 0).record();
    assert_eq!((nothing.defined, nothing.sum_variance, nothing.median(), nothing.mean()), (0, 0.0, None, None));
    // With variances that chance made negative in the sum: gradients that end in a jump.
    let mut jump = Optimizer::new(0.5, 0.999, 10);
    for step in 0..100 {
        jump.update(|_| if step == 99 { 1.0 } else { 1e-3 });
    }
    let seen = jump.record();
    assert_eq!((seen.defined, seen.constant), (0, 10));
    near("sum of variances", seen.sum_variance, jump.truth_of_f32().sum_variance, 1e-12);
    assert!(seen.sum_variance < 0.0);
}

/// Tensors that begin where no 16 bytes do, one without moments, one without elements, more than a span of chunks.
fn tensors() -> Vec<Optimizer> {
    let mut tensors = Vec::new();
    for (index, elements) in [1usize, 0, 127, 32_768, 32_769, 300_001, 130 * 32_768 + 5].into_iter().enumerate() {
        let mut optimizer = Optimizer::new(0.9, 0.99, elements);
        for step in 0..3 {
            let gradients = gradients(index as u64, step);
            optimizer.update(|j| gradients[(j * 31 + j / LENGTH) % LENGTH]);
        }
        if elements > 100 {
            optimizer.exp_avg[100] = f32::NAN;
            optimizer.exp_avg_sq[101] = f32::INFINITY;
        }
        tensors.push(optimizer);
    }
    tensors
}

fn plan_of(tensors: &[Optimizer]) -> Plan {
    let named = tensors.iter().enumerate();
    Plan::new(named.map(|(t, of)| (t.to_string(), DType::BF16, of.exp_avg.len() as u64))).unwrap()
}

fn bytes(report: &GsnrReport) -> Vec<(String, Vec<u8>)> {
    records(report).iter().map(|(name, record)| (name.clone(), bytemuck::bytes_of(record).to_vec())).collect()
}

#[test]
fn the_kernels_have_the_bits_of_the_cpu_in_every_order_and_on_every_grid() {
    let tensors = tensors();
    let step = tensors[0].at();
    let mut cpu = on_cpu(plan_of(&tensors));
    // All, and without the moments of some.
    for left_out in [0..0, 0..1, 3..6] {
        let given = |t: usize| !left_out.contains(&t);
        let moments = |(t, of)| if given(t) { Optimizer::moments(of) } else { NONE };
        let moments: Vec<AdamMoments<'_>> = tensors.iter().enumerate().map(moments).collect();
        let expected = of_moments(&mut cpu, &step, &moments).unwrap();
        let names: Vec<&str> = expected.tensors().map(|(name, _)| name).collect();
        let with_moments: Vec<String> = (0..7).filter(|&t| given(t) && t != 1).map(|t| t.to_string()).collect();
        assert_eq!(names, with_moments);
        for (schedule, blocks) in [
            (Schedule::Forward, 0),
            (Schedule::Reverse, 1),
            (Schedule::Shuffled(1), 3),
            (Schedule::Shuffled(2), 1000),
            (Schedule::Shuffled(3), 64),
        ] {
            let device = Simt { schedule, blocks, ..Simt::default() };
            let mut probe = Probe::new(device, plan_of(&tensors), Config::new().moments()).unwrap();
            // Twice: the bins must be empty again.
            for _ in 0..2 {
                let seen = of_moments(&mut probe, &step, &moments).unwrap();
                assert!(bytes(&seen) == bytes(&expected), "{schedule:?}, {blocks} blocks:\n{seen}\nnot\n{expected}");
            }
        }
    }
}

#[test]
fn moments_at_any_element_have_the_same_bits() {
    let optimizer = &tensors()[4];
    let expected = optimizer.record();
    let plan = || plan_of(std::slice::from_ref(optimizer));
    for [a, b] in [[0, 1], [1, 2], [3, 0]] {
        let shifted = |moment: &[f32], by: usize| [vec![f32::NAN; by], moment.to_vec(), vec![f32::NAN; 4]].concat();
        let (m, v) = (shifted(&optimizer.exp_avg, a), shifted(&optimizer.exp_avg_sq, b));
        let (m, v) = (&m[a..a + optimizer.exp_avg.len()], &v[b..b + optimizer.exp_avg.len()]);
        for mut probe in [on_cpu(plan()), Probe::new(Simt::default(), plan(), Config::new().moments()).unwrap()] {
            let moments = AdamMoments { exp_avg: &m, exp_avg_sq: &v };
            let seen = of_moments(&mut probe, &optimizer.at(), &[moments]).unwrap();
            assert_eq!(bytemuck::bytes_of(&records(&seen)[0].1), bytemuck::bytes_of(&expected), "{}", probe.device());
        }
    }
}

/// Every bad step and list of moments of two tensors of 32 elements, with what is to be said of it.
#[test]
fn what_cannot_be_right_is_an_error_and_changes_nothing() {
    let mut optimizer = Optimizer::new(0.9, 0.999, 32);
    (0..3).for_each(|step| optimizer.update(|j| gradients(3, step)[j]));
    let plan = || Plan::new([("first", DType::F32, 32), ("second", DType::F16, 32)]).unwrap();
    let expected = bytes(&of_moments(&mut on_cpu(plan()), &optimizer.at(), &[optimizer.moments(); 2]).unwrap());
    // What is tracked beside must stay as it is.
    let config = Config::new().moments().tracking(GsnrConfig::new());
    let mut cpu = Probe::new(Cpu, plan(), config.clone()).unwrap();
    let mut simt = Probe::new(Simt::default(), plan(), config).unwrap();
    let tracked = refuses(&mut cpu, &optimizer, &expected);
    assert!(refuses(&mut simt, &optimizer, &expected) == tracked);

    let large = || Plan::new([("large", DType::F32, 1 << 32)]).unwrap();
    for mut probe in [on_cpu(large()), Probe::new(Simt::default(), large(), Config::new().moments()).unwrap()] {
        // SAFETY: refused before anything is read.
        let moment = unsafe { RawTensor::new(optimizer.exp_avg.as_ptr() as u64, 1 << 32, DType::F32) };
        let refused = of_moments(&mut probe, &optimizer.at(), &[AdamMoments { exp_avg: &moment, exp_avg_sq: &moment }]);
        assert_eq!(refused.unwrap_err(), Error::TooLargeToTrack { name: "large".to_owned(), length: 1 << 32 });
    }
    let mut without = Probe::new(Cpu, plan(), Config::new().tracking(GsnrConfig::new())).unwrap();
    let refused = of_moments(&mut without, &optimizer.at(), &[optimizer.moments(); 2]);
    assert_eq!(refused.unwrap_err(), Error::NotDeclared { declare: "Config::moments" });
}

/// The test above for a probe, which tracks and whose record of the good moments is to be `expected`. Gives what it tracked.
fn refuses(probe: &mut Probe, optimizer: &Optimizer, expected: &[(String, Vec<u8>)]) -> Vec<(String, Vec<u8>)> {
    let (good, moments) = (optimizer.at(), optimizer.moments());
    let halves = [half::f16::ONE; 32];
    for step in 0..2 {
        let gradients = gradients(4, step);
        probe.measure_host(&[HostTensor::F32(&gradients[..32]), HostTensor::F16(&halves)]).unwrap();
    }
    let tracked = bytes(&probe.gsnr_report().unwrap());

    let step = |step, beta1, beta2| AdamStep { step, beta1, beta2 };
    let option = |option, expected, value: &str| Error::InvalidConfig { option, expected, value: value.to_owned() };
    let (above, from) = ("above 0 and below 1", "at least 0 and below 1");
    let inf = f64::INFINITY;
    for (bad, error) in [
        (step(0, 0.9, 0.999), Error::TooFewSteps { steps: 0 }),
        (step(1, 0.9, 0.999), Error::TooFewSteps { steps: 1 }),
        (step(9, 0.0, 0.999), option("beta1", above, "0")),
        (step(9, 1.0, 0.999), option("beta1", above, "1")),
        (step(9, -0.1, 0.999), option("beta1", above, "-0.1")),
        (step(9, f64::NAN, 0.999), option("beta1", above, "NaN")),
        (step(9, 0.9, 1.0), option("beta2", from, "1")),
        (step(9, 0.9, -0.1), option("beta2", from, "-0.1")),
        (step(9, 0.9, inf), option("beta2", from, "inf")),
        (step(9, 0.9, f64::NAN), option("beta2", from, "NaN")),
    ] {
        assert_eq!(of_moments(probe, &bad, &[moments; 2]).unwrap_err(), error, "{bad:?}");
    }
    assert!(of_moments(probe, &step(2, 0.9, 0.0), &[moments; 2]).is_ok(), "squares without a memory are allowed");

    let name = || "second".to_owned();
    let mismatch = |given: &str| Error::TensorMismatch {
        name: name(),
        planned: "32 elements, moments of F32".to_owned(),
        given: given.to_owned(),
    };
    let mut refuse = |exp_avg: &dyn Tensor, exp_avg_sq: &dyn Tensor, error: Error| {
        let seen = of_moments(probe, &good, &[moments, AdamMoments { exp_avg, exp_avg_sq }]);
        assert_eq!(seen.unwrap_err(), error);
    };
    for (m, v) in [(31, 31), (32, 0), (0, 32), (32, 31), (1, 32)] {
        let error = mismatch(&format!("exp_avg with {m} of F32 and exp_avg_sq with {v} of F32"));
        refuse(&&optimizer.exp_avg[..m], &&optimizer.exp_avg_sq[..v], error);
    }
    refuse(&optimizer.exp_avg, &Absent, mismatch("exp_avg with 32 of F32 and exp_avg_sq with 0 of F32"));
    refuse(&optimizer.exp_avg, &halves, mismatch("exp_avg with 32 of F32 and exp_avg_sq with 32 of F16"));
    refuse(&halves, &halves, mismatch("exp_avg with 32 of F16 and exp_avg_sq with 32 of F16"));
    // SAFETY: refused before anything is read.
    let raw = |address: u64| unsafe { RawTensor::new(address, 32, DType::F32) };
    let [m, v] = [&optimizer.exp_avg, &optimizer.exp_avg_sq].map(|moment| moment.as_ptr() as u64);
    let end = u64::MAX - 63;
    for ([m, v], error) in [
        ([0, v], Error::NullPointer { name: name() }),
        ([m, 0], Error::NullPointer { name: name() }),
        ([m + 2, v], Error::MisalignedPointer { name: name(), address: m + 2, size: 4 }),
        ([m, v + 1], Error::MisalignedPointer { name: name(), address: v + 1, size: 4 }),
        ([m, end], Error::AddressOverflow { name: name(), address: end, length: 32 }),
    ] {
        refuse(&raw(m), &raw(v), error);
    }
    for few in [&[][..], &[moments], &[moments; 3]] {
        let first = ["first", "second"].get(few.len()).map(|&name| name.to_owned());
        let count = Error::TensorCount { planned: 2, given: few.len(), first };
        assert_eq!(of_moments(probe, &good, few).unwrap_err(), count);
    }

    let exact = AdamMoments { exp_avg: &raw(m), exp_avg_sq: &raw(v) };
    for good_moments in [exact, moments] {
        assert!(bytes(&of_moments(probe, &good, &[good_moments; 2]).unwrap()) == expected);
    }
    assert!(bytes(&probe.gsnr_report().unwrap()) == tracked);
    tracked
}

#[test]
fn no_moments_at_all_give_a_report_without_records() {
    let plan = || Plan::new([("weight", DType::F32, 32)]).unwrap();
    let step = AdamStep { step: 2, beta1: 0.9, beta2: 0.999 };
    let (empty, no_tensors) = (Vec::<f32>::new(), Plan::new::<&str>([]).unwrap());
    for device in [0, 1] {
        let make = |plan: Plan| match device {
            0 => on_cpu(plan),
            _ => Probe::new(Simt::default(), plan, Config::new().moments()).unwrap(),
        };
        let mut probe = make(plan());
        for none in [NONE, AdamMoments { exp_avg: &empty, exp_avg_sq: &empty }] {
            let early = of_moments(&mut probe, &AdamStep { step: 1, ..step }, &[none]);
            assert_eq!(early.unwrap_err(), Error::TooFewSteps { steps: 1 });
            let report = of_moments(&mut probe, &step, &[none]).unwrap();
            assert_eq!((report.tensors().len(), report.noise_scale()), (0, None));
        }
        assert_eq!(of_moments(&mut make(no_tensors.clone()), &step, &[]).unwrap().tensors().len(), 0);
    }
}
