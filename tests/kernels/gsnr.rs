//! Signal and noise across steps: the table of cases on the CPU and on the kernels on the host, known answers,
//! real gradients, and what must not change a bit.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // Small numbers.

use crate::common::{
    Effort,
    cases::Data,
    demand_none,
    gsnr::{self, BOUND, Errors, MEDIAN_BOUND, Truth},
    gsnr_cases::cases,
    host::{self, OnHost},
    oracle::Format,
    short,
};
use gradprobe::{
    Config, Cpu, DType, Error, Plan, Probe,
    gsnr::{GsnrConfig, GsnrRecord, GsnrReport},
};
use gradprobe_simt::{Schedule, Simt};
use rayon::prelude::*;

fn cpu(plan: Plan, config: Config) -> Result<Probe, Error> {
    Probe::new(Cpu, plan, config)
}

fn simt(device: Simt) -> impl FnMut(Plan, Config) -> Result<Probe, Error> {
    move |plan, config| Probe::new(device, plan, config)
}

#[test]
fn the_cpu_conforms() {
    gsnr::run_all(&mut cpu, &Effort::FULL);
}

#[test]
fn the_kernels_conform_and_equal_the_cpu() {
    let effort = if short() { Effort { large: false, offsets: 1 } } else { Effort::FULL };
    gsnr::run_all(&mut simt(Simt::default()), &effort);
}

/// What a missing barrier, a bin not emptied or a partial read too early would change.
#[test]
fn no_order_and_no_grid_changes_a_bit() {
    let devices = [
        (Schedule::Reverse, 1),
        (Schedule::Shuffled(1), 2),
        (Schedule::Shuffled(2), 7),
        (Schedule::Shuffled(3), 1000),
        (Schedule::Shuffled(4), 7),
    ];
    let small: Vec<_> = cases().into_iter().filter(|case| !case.large && case.steps < 33).collect();
    let run = |&(schedule, blocks): &(Schedule, u32)| {
        let mut make = simt(Simt { schedule, blocks, ..Simt::default() });
        let run = |case| gsnr::run_case(case, &mut make, &Effort { large: false, offsets: 1 });
        let found: Vec<_> = small.iter().flat_map(run).map(|c| format!("{schedule:?}, {blocks} blocks: {c}")).collect();
        found
    };
    demand_none(&devices.par_iter().flat_map(run).collect::<Vec<_>>());
}

/// The records of these steps of one tensor each, or of several.
fn track(probe: &mut Probe, steps: &[Vec<Data>]) -> GsnrReport {
    for tensors in steps {
        probe.measure_host(&tensors.iter().map(Data::tensor).collect::<Vec<_>>()).unwrap();
    }
    probe.gsnr_report().unwrap()
}

fn plan_of(tensors: &[Data]) -> Plan {
    host::plan_of(tensors.iter().enumerate().map(|(t, data)| (t.to_string(), data.tensor()))).unwrap()
}

/// With all tensors tracked.
fn tracking() -> Config {
    Config::new().tracking(GsnrConfig::new())
}

fn on_cpu(steps: &[Vec<Data>]) -> GsnrReport {
    track(&mut cpu(plan_of(&steps[0]), tracking()).unwrap(), steps)
}

fn records(report: &GsnrReport) -> Vec<GsnrRecord> {
    report.tensors().map(|(_, record)| *record).collect()
}

fn bytes(report: &GsnrReport) -> Vec<u8> {
    bytemuck::cast_slice(&records(report)).to_vec()
}

fn f32s(values: impl Iterator<Item = f32>) -> Data {
    Data::of_bits(DType::F32, values.map(f32::to_bits))
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for case in cases().iter().filter(|case| !case.large && case.name.starts_with("edges_of_chunks")) {
        let steps: Vec<_> = (0..case.steps).map(|step| case.data(step)).collect();
        let of_threads = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| bytes(&on_cpu(&steps)))
        };
        let expected = of_threads(1);
        assert!([2, 3, 7].into_iter().all(|threads| of_threads(threads) == expected), "{}", case.name);
    }
}

#[test]
fn widened_data_have_the_same_records() {
    for case in cases().iter().filter(|case| !case.large && case.steps < 33 && !case.names.is_empty()) {
        let narrow: Vec<_> = (0..case.steps).map(|step| case.data(step)).collect();
        let wide: Vec<Vec<Data>> = narrow.iter().map(|tensors| tensors.iter().map(Data::widened).collect()).collect();
        assert!(bytes(&on_cpu(&wide)) == bytes(&on_cpu(&narrow)), "{}", case.name);
    }
}

/// What is left out leaves nothing behind.
#[test]
fn a_nan_before_a_thousand_steps_changes_nothing_but_the_count() {
    let step = |step: usize| {
        let value = |i| 1e-3 * crate::common::data::normal(700 + ((step as u64) << 32), i) as f32;
        vec![f32s((0..150).map(value)), f32s((150..200).map(value))]
    };
    let steps: Vec<_> = (0..1000).map(step).collect();
    for window in [None, Some(300)] {
        let config = window.map_or(GsnrConfig::new(), |window| GsnrConfig::new().window(window));
        for (name, make) in [("cpu", &mut cpu as gsnr::Make<'_, Probe>), ("simt", &mut simt(Simt::default()))] {
            let mut probe = || make(plan_of(&steps[0]), Config::new().tracking(config.clone())).unwrap();
            let expected = records(&track(&mut probe(), &steps));
            let mut poisoned = vec![vec![steps[0][0].all_nan(), steps[500][1].clone()]];
            poisoned.extend_from_slice(&steps);
            // The second tensor has its 500th step twice, which must show.
            let seen = records(&track(&mut probe(), &poisoned));
            let skipped = if window.is_none() { 1 } else { 0 };
            let without = GsnrRecord { skipped: 0, ..seen[0] };
            assert_eq!(seen[0].skipped, skipped, "{name}, window {window:?}");
            demand_none(&gsnr::same_record(name, &without, &expected[0]));
            assert!(!gsnr::same_record(name, &seen[1], &expected[1]).is_empty(), "{name}");
        }
    }
}

/// Real gradients, and what float64 says of them (`tests/data/README.md`).
#[test]
fn eight_steps_of_a_transformer_are_as_float64_has_them() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let expected = expected["gpt-bf16-gsnr"].as_object().unwrap();
    let (mut probe, mut worst) = (None, 0.0f64);
    for step in 0..8 {
        let file = std::fs::read(folder.join(format!("gpt-bf16-step{step}.safetensors"))).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        let data = |name: &String| {
            let bits = file.tensor(name).unwrap().data().chunks(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])));
            Data::of_bits(DType::BF16, bits.collect::<Vec<_>>().into_iter())
        };
        let tensors: Vec<Data> = expected.keys().map(data).collect();
        let probe = probe.get_or_insert_with(|| {
            let named = expected.keys().map(String::as_str).zip(tensors.iter().map(Data::tensor));
            Probe::new(Cpu, host::plan_of(named).unwrap(), tracking()).unwrap()
        });
        probe.measure_host(&tensors.iter().map(Data::tensor).collect::<Vec<_>>()).unwrap();
    }
    let report = probe.unwrap().gsnr_report().unwrap();
    for (name, record) in report.tensors() {
        let number = |field: &str| expected[name][field].as_f64().unwrap_or(f64::NAN);
        let counts = [record.steps.into(), record.defined, record.constant];
        assert_eq!(counts.map(|n| n as f64), ["steps", "defined", "constant"].map(number), "{name}");
        for (field, seen, bound) in [
            ("mean", record.mean().unwrap(), BOUND),
            ("sum_variance", record.sum_variance, BOUND),
            ("sum_squared_mean", record.sum_squared_mean, BOUND),
            ("median", record.median().unwrap(), MEDIAN_BOUND),
            // A ratio within 1e-4 of 1 may fall on either side.
            ("fraction_below_one", record.fraction_below_one().unwrap(), 1e-12),
            ("norm_cv", record.norm_cv().unwrap(), 1e-5),
        ] {
            let error = (seen / number(field) - 1.0).abs();
            assert!(error <= bound, "{name}: {field} is {seen:e}, should be {:e}", number(field));
            worst = if bound == BOUND { worst.max(error) } else { worst };
        }
    }
    println!("worst error of the mean and the sums: {worst:.1e}");
    let sum = |field: &str| expected.values().map(|tensor| tensor[field].as_f64().unwrap()).sum::<f64>();
    let noise_scale = sum("sum_variance") / (sum("sum_squared_mean") - sum("sum_variance") / 8.0);
    assert!((report.noise_scale().unwrap() / noise_scale - 1.0).abs() < 1e-3, "{:?}", report.noise_scale());
}

/// [`Config::bytes`] is what is allocated: tests/host/declared.rs.
#[test]
fn what_tracking_takes_is_what_was_stated() {
    let lengths = [0, 1, 63, 64, 65, 100_000, 7];
    let plan = Plan::new(lengths.map(|len| (len.to_string(), DType::BF16, len))).unwrap();
    let of_probe = |config: Config| config.bytes(&plan).unwrap();
    for config in [GsnrConfig::new(), GsnrConfig::new().tensors(["6?"]), GsnrConfig::new().tensors(["0"]).window(9)] {
        // An empty state still has an address.
        let stated = config.bytes(&plan).unwrap().max(1);
        let seen = of_probe(Config::new().tracking(config.clone())) - of_probe(Config::new());
        assert!((stated..=stated + 2).contains(&seen), "{config:?}: {stated}, not {seen}");
    }
    let large = |len| GsnrConfig::new().bytes(&Plan::new([("w", DType::F32, len)]).unwrap()).unwrap();
    let elements = 1 << 31;
    assert!((8 * elements..8 * elements + 8 * elements / 1000).contains(&large(elements)), "8 bytes an element");
}

#[test]
fn tensors_too_large_to_track_are_refused_by_name() {
    let plan = Plan::new([("fits", DType::BF16, (1 << 32) - 1), ("large", DType::BF16, 1 << 32)]).unwrap();
    let refused = GsnrConfig::new().bytes(&plan);
    assert_eq!(refused, Err(Error::TooLargeToTrack { name: "large".into(), length: 1 << 32 }));
    assert!(GsnrConfig::new().tensors(["fits"]).bytes(&plan).is_ok(), "it need not be tracked");
}

/// 2^38 elements take 2 TiB to track.
#[test]
fn memory_that_is_not_there_is_an_error_that_says_how_much() {
    if std::fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "1") {
        return crate::require::pointless("this machine grants all memory that is asked for");
    }
    let tensors = (0..128).map(|t| (format!("large {t}"), DType::BF16, 1 << 31));
    let plan = Plan::new(tensors.chain([("small".to_owned(), DType::BF16, 3)])).unwrap();
    let bytes = tracking().bytes(&plan).unwrap();
    assert!((1 << 41..1 << 42).contains(&bytes), "{bytes}");
    // Of the whole probe, whatever it was that could not be had.
    assert_eq!(Probe::new(Cpu, plan.clone(), tracking()).err(), Some(Error::OutOfMemory { bytes }));
    let small = Config::new().tracking(GsnrConfig::new().tensors(["small"]));
    let mut probe = Probe::new(Cpu, plan, small).unwrap();
    assert_eq!(probe.gsnr_report().err(), Some(Error::TooFewSteps { steps: 0 }));
}

/// Normal numbers in pairs, by Box and Muller: unlike sums of uniforms, with the tails that variances of variances need.
fn gaussian(seed: u64, index: usize) -> f64 {
    let [u, v] = [0, 1].map(|k| crate::common::data::uniform(seed, 2 * (index / 2) + k));
    let (radius, angle) = ((-2.0 * (1.0 - u).ln()).sqrt(), std::f64::consts::TAU * v);
    radius * if index.is_multiple_of(2) { angle.cos() } else { angle.sin() }
}

/// Steps of `elements` gradients, each the mean over a batch of examples: a true gradient with alternating signs and
/// this squared norm, and noise of variance 1 an example.
fn batches(seed: u64, elements: usize, steps: usize, batch: usize, squared_norm: f64) -> Vec<Vec<Data>> {
    let truth = (squared_norm / elements as f64).sqrt();
    let step = |step: usize| {
        let value = |j: usize| {
            let example = |b: usize| gaussian(seed << 20 | (step * batch + b) as u64, j);
            let mean = (0..batch).map(example).sum::<f64>() / batch as f64;
            (1e-3 * (mean + if j.is_multiple_of(2) { truth } else { -truth })) as f32
        };
        vec![f32s((0..elements).map(value))]
    };
    (0..steps).into_par_iter().map(step).collect()
}

const RUNS: u64 = 60;
const ELEMENTS: usize = 4000;
const STEPS: usize = 12;

/// Deviations in units of the standard error, which must be what it says: no bias, and a spread of 1.
fn demand_standard(what: &str, scores: &[f64]) {
    let count = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / count;
    let spread = (scores.iter().map(|z| z * z).sum::<f64>() / count).sqrt();
    println!("{what}: {count} runs, mean {mean:.2} standard errors, spread {spread:.2}");
    assert!(mean.abs() < 3.5 / count.sqrt(), "{what}: biased by {mean} standard errors");
    assert!((0.7..1.3).contains(&spread), "{what}: spread {spread} standard errors");
}

/// With n elements whose noise is alike, k steps and the true noise scale N = n·σ²/|G|²: S = Σ var_j has the relative
/// variance 2/(n(k - 1)). |G|² as estimated has (4N/k + 2N²/(k(k - 1)))/n, of which the first is that of the means along
/// the gradient, 4|G|²σ²/k, and the rest that of the squares of their noise and of S/k. Since S is in both, their
/// covariance adds 4N/(nk(k - 1)) to the variance of the quotient.
#[test]
fn noise_scales_are_known_within_their_standard_error() {
    let (n, k, batch) = (ELEMENTS as f64, STEPS as f64, 2);
    for expected in [0.5, 8.0, 40.0] {
        let relative = (2.0 + 4.0 * expected + 2.0 * expected * expected / k) / ((k - 1.0) * n);
        let squared_norm = n / batch as f64 / expected;
        let score = |seed| {
            let scale = on_cpu(&batches(seed, ELEMENTS, STEPS, batch, squared_norm)).noise_scale().unwrap();
            // The inverse is what has a normal distribution, N being far from exact.
            (expected / scale - 1.0) / relative.sqrt()
        };
        demand_standard(&format!("noise scale {expected}"), &(0..RUNS).map(score).collect::<Vec<_>>());
    }
}

/// k·r_j has the noncentral F distribution; for ρ = 0, with n elements, the corrected mean has the standard error
/// √(2(k - 2)/((k - 5)n))/k.
#[test]
fn pure_noise_has_no_signal_once_corrected() {
    let (n, k) = (ELEMENTS as f64, STEPS as f64);
    let standard_error = (2.0 * (k - 2.0) / ((k - 5.0) * n)).sqrt() / k;
    let (mut scores, mut none) = (Vec::new(), 0);
    for seed in 0..RUNS {
        let report = on_cpu(&batches(100 + seed, ELEMENTS, STEPS, 1, 0.0));
        let record = records(&report)[0];
        scores.push(record.corrected_mean().unwrap() / standard_error);
        none += u64::from(report.noise_scale().is_none());
        assert_eq!(report.noise_scale().is_none(), record.squared_gradient().unwrap() <= 0.0);
        assert!((record.mean().unwrap() * k - 1.0).abs() > 0.1, "uncorrected it is no less than 1/k");
    }
    demand_standard("corrected mean of noise", &scores);
    assert!((RUNS / 4..=3 * RUNS / 4).contains(&none), "|G|² was below 0 in {none} of {RUNS} runs");

    // With a signal-to-noise ratio of 2, the corrected mean is 2.
    let record = records(&on_cpu(&batches(200, 40_000, STEPS, 1, 80_000.0)))[0];
    assert!((record.corrected_mean().unwrap() - 2.0).abs() < 0.03, "{:?}", record.corrected_mean());
}

#[test]
fn the_noise_scale_is_none_where_noise_hides_the_gradient() {
    let scale = |steps: &[&[f32]]| {
        let steps: Vec<_> = steps.iter().map(|values| vec![f32s(values.iter().copied())]).collect();
        on_cpu(&steps).noise_scale()
    };
    assert_eq!(scale(&[&[1.0, 2.0], &[-1.0, -2.0]]), None, "means of 0");
    assert_eq!(scale(&[&[0.0, 0.0], &[0.0, 0.0]]), None, "no gradient and no noise");
    assert_eq!(scale(&[&[3.0, -4.0], &[3.0, -4.0]]), Some(0.0), "no noise");
    // mean² = 4, var = 2: |G|² = 4 - 2/2.
    assert_eq!(scale(&[&[1.0], &[3.0]]), Some(2.0 / 3.0));
    // mean² = 1, var = 2: exactly 0, which is not above it.
    assert_eq!(scale(&[&[0.0], &[2.0]]), None);
    // A tensor without two steps adds nothing.
    let nan = || f32s([f32::NAN].into_iter());
    let step = |x: f32| vec![nan(), f32s([x].into_iter())];
    let report = on_cpu(&[step(1.0), step(3.0)]);
    assert_eq!((report.noise_scale(), records(&report)[0].squared_gradient()), (Some(2.0 / 3.0), None));
    assert_eq!(on_cpu(&[vec![nan()], vec![nan()]]).noise_scale(), None, "nothing but NaN");
    // Several tensors are one: 4 - 1 + 0 - 4.
    let step = |x: f32, y: f32| vec![f32s([x].into_iter()), f32s([y].into_iter())];
    assert_eq!(on_cpu(&[step(1.0, 2.0), step(3.0, -2.0)]).noise_scale(), None);
}

/// An element varies if any of its steps differs, however little and however late.
#[test]
fn a_thousand_equal_steps_are_constant_until_one_differs() {
    let value = |j: usize| [1.0 / 3.0, -255.9, 1e-3, 1e-12, 1e12][j % 5] * (1.0 + j as f32);
    let constant = f32s((0..100).map(value));
    let ulp = Data::of_bits(DType::F32, constant.bits().map(|bits| bits + 1));
    let mut probe = Probe::new(Cpu, plan_of(std::slice::from_ref(&constant)), tracking()).unwrap();
    for _ in 0..1000 {
        probe.measure_host(&[constant.tensor()]).unwrap();
    }
    let record = records(&probe.gsnr_report().unwrap())[0];
    assert_eq!((record.steps, record.constant, record.defined), (1000, 100, 0));
    let norm = constant.bits().map(|bits| Format::F32.value(bits).powi(2)).sum::<f64>();
    assert!((record.sum_squared_mean / norm - 1.0).abs() < 1e-12, "constants are their own means");
    probe.measure_host(&[ulp.tensor()]).unwrap();
    let record = records(&probe.gsnr_report().unwrap())[0];
    assert_eq!((record.steps, record.constant, record.defined), (1001, 0, 100));
}

/// The deviations are summed in f32, to which many steps add much the same: an addition errs by 2^-24 of the sum, all of
/// them by at most steps · 2^-25. That is the bound at 3300 steps, and random data stay far below it.
#[test]
fn three_thousand_steps_stay_within_the_bound() {
    const STEPS: usize = 3000;
    const TENSORS: usize = 100;
    let value = |step: usize, t: usize| {
        let size = 1.0 + t as f32 / TENSORS as f32;
        match t % 3 {
            0 if step.is_multiple_of(2) => -size,
            0 => size,
            1 => size * (step % 4) as f32,
            _ => (10.0 + gaussian(1000 + step as u64, t)) as f32,
        }
    };
    let steps: Vec<Vec<Data>> =
        (0..STEPS).map(|step| (0..TENSORS).map(|t| f32s([value(step, t)].into_iter())).collect()).collect();
    let mut worst = 0.0f64;
    for (t, record) in records(&on_cpu(&steps)).iter().enumerate() {
        let truth = gsnr::truth(&steps.iter().map(|tensors| &tensors[t]).collect::<Vec<_>>(), 0);
        demand_none(&gsnr::check(&format!("tensor {t}"), record, &truth));
        worst = worst.max(Errors::of(record, &truth).sum_variance);
    }
    println!("{STEPS} steps: worst error of a variance {worst:.1e}");
}

/// A search for the largest errors, printed with `--nocapture`: sizes from 1e-7 to 1e3, ratios of mean and standard
/// deviation up to 1000, up to 100 steps, few elements, so that errors do not average out.
#[test]
fn thousands_of_random_elements() {
    let names = ["mean", "median", "sum_variance", "sum_squared_mean", "norm_cv"];
    let errors = |seed: u64| {
        let random = |k: usize| crate::common::data::uniform(seed ^ 0x6e5e, k);
        let steps = 2 + (98.0 * random(0) * random(1)) as usize;
        let (dtype, elements) = (DType::ALL[seed as usize % 3], 1 + (30.0 * random(2)) as usize);
        let scale = 10f64.powf(-7.0 + 10.0 * random(3));
        let ratio = 10f64.powf(if dtype == DType::F32 { 3.0 } else { 1.0 } * (2.0 * random(4) - 1.0));
        let data: Vec<Data> = (0..steps)
            .map(|step| {
                let value = |j| scale * (ratio + gaussian(seed << 20 | step as u64, j));
                Data::of_bits(dtype, (0..elements).map(|j| crate::common::data::nearest(dtype, value(j))))
            })
            .collect();
        let truth: Truth = gsnr::truth(&data.iter().collect::<Vec<_>>(), 0);
        let record = records(&on_cpu(&data.into_iter().map(|data| vec![data]).collect::<Vec<_>>()))[0];
        let name = format!("seed {seed}: {elements} {dtype} at {scale:.1e}, {ratio:.1e}, {steps} steps");
        demand_none(&gsnr::check(&name, &record, &truth));
        let Errors { mean, median, sum_variance, sum_squared_mean, norm_cv } = Errors::of(&record, &truth);
        [mean, median, sum_variance, sum_squared_mean, norm_cv]
            .map(|error| (if error.is_nan() { 0.0 } else { error }, name.clone()))
    };
    let worse = |a: [(f64, String); 5], b: [(f64, String); 5]| {
        let mut pairs = a.into_iter().zip(b).map(|(a, b)| if a.0 >= b.0 { a } else { b });
        std::array::from_fn(|_| pairs.next().unwrap())
    };
    let worst = (0..3000).into_par_iter().map(errors).reduce(Default::default, worse);
    for (name, (error, at)) in names.iter().zip(worst) {
        println!("  {name:18} {error:9.2e}  {at}");
    }
}
