//! The checkers and the harness of signal and noise, each given wrong numbers, as `checkers.rs` does with those of a step.

#![allow(clippy::cast_possible_truncation)] // f32 fields.

use crate::common::{
    Effort,
    cases::{Data, normal},
    check::flipped,
    gsnr::{self, BOUND, MEDIAN_BOUND},
    gsnr_cases,
    host::OnHost,
    oracle::Format,
};
use gradprobe::{
    Config, Cpu, DType, Error, HostTensor, Plan, Probe, Report,
    gsnr::{GsnrConfig, GsnrRecord, GsnrReport},
};

type Falsify = fn(&mut GsnrRecord);

/// Every way in which signal and noise of a tensor may be wrong, by the field to be named.
const FALSIFIED: &[(&str, Falsify)] = &[
    ("steps", |r| r.steps += 1),
    ("skipped", |r| r.skipped -= 1),
    ("defined", |r| r.defined += 1),
    ("defined", |r| (r.defined, r.constant) = (r.defined - 1, r.constant + 1)),
    ("defined", |r| (r.defined, r.constant) = (r.defined + 1, r.constant - 1)),
    ("constant", |r| r.constant = 0),
    ("below_one", |r| r.below_one += 1),
    ("below_one", |r| r.below_one -= 1),
    ("below_one", |r| r.below_one = r.defined + 1),
    ("mean", |r| r.sum_ratio *= 1.0 + 1.1 * BOUND),
    ("mean", |r| r.sum_ratio *= 1.0 - 1.1 * BOUND),
    ("mean", |r| r.sum_ratio = f64::NAN),
    ("mean", |r| r.sum_ratio *= 5.0 / 4.0),
    ("median", |r| r.median_or_nan *= 1.0 + 2.1 * MEDIAN_BOUND),
    ("median", |r| r.median_or_nan *= 1.0 - 2.1 * MEDIAN_BOUND),
    ("median", |r| r.median_or_nan = f64::NAN),
    ("sum_variance", |r| r.sum_variance *= 1.0 + 1.1 * BOUND),
    ("sum_variance", |r| r.sum_variance *= 1.0 - 1.1 * BOUND),
    ("sum_variance", |r| r.sum_variance *= 4.0 / 5.0),
    ("sum_variance", |r| r.sum_variance = 0.0),
    ("sum_squared_mean", |r| r.sum_squared_mean *= 1.0 + 1.1 * BOUND),
    ("sum_squared_mean", |r| r.sum_squared_mean = -r.sum_squared_mean),
    ("sum_squared_mean", |r| r.sum_squared_mean = f64::INFINITY),
    ("norm_mean", |r| r.norm_mean *= 1.0 + 3e-6),
    ("norm_cv", |r| r.norm_deviations *= 1.001),
    ("norm_cv", |r| r.norm_deviations = f64::NAN),
    ("norm_cv", |r| r.norm_mean = 0.0),
];

/// Six steps of 200 elements, of which every tenth is constant, and the second step is left out.
fn tracked_sample() -> (GsnrRecord, gsnr::Truth) {
    let step = |step: usize| {
        let value = |i: usize| match (step, i) {
            (1, 7) => f32::NAN,
            _ if i.is_multiple_of(10) => 0.3,
            _ => (0.5 + normal(900 + step as u64, i)) as f32,
        };
        Data::of_bits(DType::F32, (0..200).map(|i| value(i).to_bits()))
    };
    let steps: Vec<Data> = (0..6).map(step).collect();
    let plan = Plan::new([("w", DType::F32, 200)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new().tracking(GsnrConfig::new())).unwrap();
    for step in &steps {
        probe.measure_host(&[step.tensor()]).unwrap();
    }
    let record = *probe.gsnr_report().unwrap().tensors().next().unwrap().1;
    (record, gsnr::truth(&steps.iter().collect::<Vec<_>>(), 0))
}

#[test]
fn every_wrong_number_of_signal_and_noise_is_named() {
    let (record, truth) = tracked_sample();
    assert_eq!(gsnr::check("w", &record, &truth), [""; 0]);
    assert_eq!((truth.steps, truth.skipped, truth.defined, truth.near_one, truth.beyond), (5, 1, 180, 0, 0));
    for (turn, (field, falsify)) in FALSIFIED.iter().enumerate() {
        let mut seen = record;
        falsify(&mut seen);
        let complaints = gsnr::check("w", &seen, &truth);
        let named = complaints.iter().any(|c| c.starts_with("w: ") && c.contains(field));
        assert!(named, "falsification {turn} of {field}: {complaints:?}");
    }
    for (bit, seen) in flipped(record) {
        assert!(!gsnr::same_record("w", &seen, &record).is_empty(), "bit {bit}");
    }
}

/// By hand: means 2 and -1, variances 2 and 0.
#[test]
fn truths_of_signal_and_noise_are_the_definitions() {
    let data = |values: [f32; 2]| Data::of_bits(DType::F32, values.map(f32::to_bits).into_iter());
    let steps = [[1.0, -1.0], [f32::INFINITY, -1.0], [3.0, -1.0]].map(data);
    let truth = gsnr::truth(&steps.iter().collect::<Vec<_>>(), 0);
    assert_eq!((truth.steps, truth.skipped, truth.elements, truth.defined), (2, 1, 2, 1));
    assert_eq!((truth.mean, truth.median, truth.below_one), (Some(2.0), Some(2.0), 0));
    assert_eq!((truth.sum_variance, truth.sum_squared_mean), (2.0, 5.0));
    let (norms, cv) = ([2f64.sqrt(), 10f64.sqrt()], truth.norm_cv.unwrap());
    assert!((cv - (norms[1] - norms[0]) / (norms[1] + norms[0])).abs() < 1e-15, "{cv}");
    let third = gsnr::truth(&steps.iter().chain([&steps[0]]).collect::<Vec<_>>(), 2);
    assert_eq!((third.steps, third.skipped, third.defined, third.mean), (1, 0, 0, None), "the third starts a window");
}

#[test]
fn a_wrong_noise_scale_is_noticed() {
    let truth = tracked_sample().1;
    let scale = truth.sum_variance / (truth.sum_squared_mean - truth.sum_variance / 5.0);
    let complaints = |seen, truth: &gsnr::Truth| gsnr::check_noise_scale(seen, std::slice::from_ref(truth)).len();
    assert_eq!(
        [Some(scale), None, Some(scale * 1.01), Some(scale * 0.99)].map(|seen| complaints(seen, &truth)),
        [0, 1, 1, 1]
    );
    let noise = gsnr::Truth { sum_squared_mean: 0.1 * truth.sum_variance, ..truth };
    assert_eq!([None, Some(1.0)].map(|seen| complaints(seen, &noise)), [0, 1]);
}

/// A probe that tracks in some way wrongly.
struct Mistracking {
    inner: Probe,
    steps: usize,
    fault: TrackingFault,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum TrackingFault {
    None,
    /// Every fourth step is measured twice.
    Repeats,
    /// NaN is taken for 0.
    MergesNan,
    /// Nothing is tracked in windows.
    ForgetsTheWindow,
    /// All tensors are tracked.
    TracksAll,
    /// What is asked for is forgotten.
    ForgetsWhatIsRead,
    /// A reset is granted and nothing more.
    DoesNotReset,
}

impl Mistracking {
    fn new(plan: Plan, config: Config, fault: TrackingFault) -> Result<Self, Error> {
        let config = match (fault, &config.features.tracking) {
            (TrackingFault::ForgetsTheWindow | TrackingFault::TracksAll, Some(tracking)) => {
                tracking.bytes(&plan)?;
                config.tracking(GsnrConfig::new())
            }
            _ => config,
        };
        Ok(Self { inner: Probe::new(Cpu, plan, config)?, steps: 0, fault })
    }
}

impl OnHost for Mistracking {
    fn probe(&mut self) -> &mut Probe {
        &mut self.inner
    }

    fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        self.steps += 1;
        if self.fault == TrackingFault::Repeats && self.steps.is_multiple_of(4) {
            self.inner.measure_host(tensors)?;
        }
        if self.fault != TrackingFault::MergesNan {
            return self.inner.measure_host(tensors);
        }
        let zeroed = |tensor: &HostTensor<'_>| {
            let format = Format::of(tensor.dtype());
            let data = Data::from(*tensor);
            Data::of_bits(data.dtype(), data.bits().map(|bits| if format.value(bits).is_nan() { 0 } else { bits }))
        };
        let data: Vec<Data> = tensors.iter().map(zeroed).collect();
        self.inner.measure_host(&data.iter().map(Data::tensor).collect::<Vec<_>>())
    }

    fn gsnr_reset(&mut self) -> Result<(), Error> {
        if self.fault == TrackingFault::DoesNotReset {
            self.inner.gsnr_report().map(drop)
        } else {
            self.inner.gsnr_reset()
        }
    }

    fn gsnr_report(&mut self) -> Result<GsnrReport, Error> {
        let report = self.inner.gsnr_report();
        if self.fault == TrackingFault::ForgetsWhatIsRead && report.is_ok() {
            self.inner.gsnr_reset()?;
        }
        report
    }
}

#[test]
fn the_harness_complains_of_faulty_tracking() {
    let complaints = |fault, name: Option<&str>| {
        let mut make = |plan: Plan, config: Config| Mistracking::new(plan, config, fault);
        let Some(name) = name else { return gsnr::refuses_what_cannot_be_tracked(&mut make) };
        let case = gsnr_cases::cases().into_iter().find(|case| case.name == name).expect("a case of this name");
        gsnr::run_case(&case, &mut make, &Effort { large: false, offsets: 1 })
    };
    for (fault, name) in [
        (TrackingFault::Repeats, Some("8_steps")),
        (TrackingFault::MergesNan, Some("nan_in_middle_step_f16")),
        (TrackingFault::ForgetsTheWindow, Some("window_3_of_8_steps")),
        (TrackingFault::TracksAll, Some("selected_by_end")),
        (TrackingFault::ForgetsWhatIsRead, Some("3_steps")),
        (TrackingFault::DoesNotReset, None),
    ] {
        assert_eq!(complaints(TrackingFault::None, name), [""; 0]);
        assert!(!complaints(fault, name).is_empty(), "{fault:?}");
    }
}

#[test]
fn the_table_of_steps_is_what_it_says() {
    let cases = gsnr_cases::cases();
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), cases.len(), "two cases of one name");
    let elements = |case: &gsnr_cases::Case| case.plan().elements() * case.steps as u64;
    let small: u64 = cases.iter().filter(|case| !case.large).map(elements).sum();
    assert!(small < 12_000_000, "{small} elements would make the slow backends slower");
    for dtype in DType::ALL {
        assert!(cases.iter().any(|case| case.plan().tensors().iter().any(|t| t.dtype == dtype && t.len > 65_536)));
    }
}
