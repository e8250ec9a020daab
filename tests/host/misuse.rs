//! Calls that each are right, and make no sense together, are errors that say what to do.

use crate::common::{clips::CLIPS, host::refs};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, HostTensor, NonFinitePolicy, Plan, Probe, Report, Tensor,
    clip::{AdaptiveClip, LossScale},
    health::Groups,
    histogram::{Histogram, HistogramReport},
    optim::Sgd,
    ranks::{Along, Mesh, Ranks, ThreadCommunicator},
    write::Entry,
};
use gradprobe_simt::Simt;
use half::{bf16, f16};
use std::thread;

const GRADIENT: [f32; 2] = [30.0, 40.0];

fn one(name: &str) -> Plan {
    Plan::new([(name, DType::F32, 2)]).unwrap()
}

fn probes(config: &Config) -> [Probe; 2] {
    [Probe::new(Cpu, one("w"), config.clone()).unwrap(), Probe::new(Simt::default(), one("w"), config.clone()).unwrap()]
}

fn already_clipped() -> Error {
    Error::AlreadyClipped { name: "w".to_owned() }
}

/// A call that measures, or applies what was decided.
type Apply = fn(&mut Probe, &mut [f32; 2]) -> Result<(), Error>;

fn clip(probe: &mut Probe, gradient: &mut [f32; 2]) -> Result<(), Error> {
    probe.clip(&mut [gradient])
}

fn step(probe: &mut Probe, gradient: &mut [f32; 2]) -> Result<(), Error> {
    probe.step(&mut [gradient])
}

fn adaptive(probe: &mut Probe, gradient: &mut [f32; 2]) -> Result<(), Error> {
    probe.adaptive_clip()?.clip(&mut [gradient], &[&[1e6f32; 2]])
}

fn optimize(probe: &mut Probe, gradient: &mut [f32; 2]) -> Result<(), Error> {
    let before = *gradient;
    let mut weight = [0.0f32; 2];
    probe.optimizer()?.step(&[&before], &mut [&mut weight])?;
    assert!(weight[0] < 0.0, "the weight has moved: {weight:?}");
    Ok(())
}

fn update(probe: &mut Probe, gradient: &mut [f32; 2]) -> Result<(), Error> {
    let before = *gradient;
    probe.update(&[&before], &mut [&mut [0.0f32; 2]])
}

#[test]
fn what_one_measurement_decided_is_applied_once() {
    let global =
        Config::new().clip(Clip::global_norm(5.0)).optimizer(Sgd::new(1.0)).adaptive_clip(AdaptiveClip::new([2]));
    let scaled = global.clone().clip(Clip::None).loss_scale(LossScale::fixed(10.0));
    // After the first call the second is one too many.
    let refused: [(&Config, Apply, Apply); 9] = [
        (&global, clip, clip),
        (&global, step, clip),
        (&global, clip, optimize),
        (&global, step, optimize),
        (&scaled, clip, clip),
        (&scaled, clip, optimize),
        (&scaled, adaptive, clip),
        (&scaled, clip, adaptive),
        (&scaled, adaptive, optimize),
    ];
    for (index, (config, first, second)) in refused.into_iter().enumerate() {
        for mut probe in probes(config) {
            let mut gradient = GRADIENT;
            probe.measure(&[&gradient]).unwrap();
            first(&mut probe, &mut gradient).unwrap();
            let clipped = gradient;
            assert!(clipped[0] < 4.0, "{index}: {clipped:?}");
            assert_eq!(second(&mut probe, &mut gradient), Err(already_clipped()), "{index}");
            assert_eq!(gradient, clipped, "{index}: what is refused changes nothing");
            // Any measurement begins anew.
            let again: [Apply; 3] = [
                |probe, gradient| probe.measure(&[gradient]),
                |probe, gradient| probe.step(&mut [&mut gradient.clone()]).and(probe.measure(&[gradient])),
                update,
            ];
            for measure in again {
                measure(&mut probe, &mut gradient).unwrap();
                assert_eq!(second(&mut probe, &mut gradient), Ok(()), "{index}");
            }
        }
    }
}

#[test]
fn what_applies_nothing_or_something_else_may_follow() {
    let base = || Config::new().optimizer(Sgd::new(1.0)).adaptive_clip(AdaptiveClip::new([2]));
    let global = base().clip(Clip::global_norm(5.0));
    let allowed: [(Config, &[Apply]); 4] = [
        // Without anything to do, a clip launches nothing.
        (base(), &[clip, clip, step, clip, optimize, optimize]),
        // An optimizer leaves the gradients as they are.
        (global.clone(), &[optimize, optimize, clip]),
        (global.clone(), &[update, optimize, clip]),
        // Units have a limit of their own.
        (global, &[adaptive, adaptive, clip, adaptive]),
    ];
    for (index, (config, calls)) in allowed.into_iter().enumerate() {
        for mut probe in probes(&config) {
            let mut gradient = GRADIENT;
            probe.measure(&[&gradient]).unwrap();
            for (place, call) in calls.iter().enumerate() {
                assert_eq!(call(&mut probe, &mut gradient), Ok(()), "{index}, call {place}");
            }
        }
    }
}

/// Each tensor is clipped once; in how many calls is the caller's choice.
#[test]
fn a_step_may_be_clipped_in_parts() {
    let plan = Plan::new([("a", DType::F32, 2), ("b", DType::F32, 2)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::global_norm(1.0))).unwrap();
    let (mut a, mut b) = (GRADIENT, GRADIENT);
    probe.measure(&[&a, &b]).unwrap();
    probe.clip(&mut [&mut a, &mut Absent]).unwrap();
    probe.clip(&mut [&mut Absent, &mut b]).unwrap();
    assert!(a == b && a[0] < 1.0);
    assert_eq!(probe.clip(&mut [&mut Absent, &mut b]), Err(Error::AlreadyClipped { name: "b".to_owned() }));
    probe.measure(&[&a, &b]).unwrap();
    assert_eq!(probe.clip(&mut [&mut a, &mut b]), Ok(()));
}

#[test]
fn every_kind_of_clip_is_applied_once_also_where_a_step_needs_none() {
    for clip in CLIPS {
        for non_finite in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
            let mut probe = Probe::new(Cpu, one("w"), Config::new().clip(clip).non_finite(non_finite)).unwrap();
            assert_eq!(probe.clip(&mut [&mut [0.1f32; 2]]), Err(Error::NotMeasured));
            for _ in 0..3 {
                probe.step(&mut [&mut [0.1f32; 2]]).unwrap();
                let launches = clip != Clip::None || non_finite == NonFinitePolicy::ZeroNonFinite;
                let expected = if launches { Err(already_clipped()) } else { Ok(()) };
                assert_eq!(probe.clip(&mut [&mut [0.1f32; 2]]), expected, "{clip:?}, {non_finite:?}");
            }
            // What is refused for another reason leaves the measurement to be clipped by.
            probe.measure(&[&[0.1f32; 2]]).unwrap();
            assert!(matches!(probe.clip(&mut [&mut [0.1f32; 3]]), Err(Error::TensorMismatch { .. })));
            assert!(probe.measure(&[&[0.1f32; 3]]).is_err());
            assert_eq!(probe.clip(&mut [&mut [0.1f32; 2]]), Ok(()));
        }
    }
}

/// The first tensor at which a histogram is not of a report's gradients, and how.
fn refused(report: &Report, histogram: HistogramReport) -> Option<(String, String)> {
    match Entry::new(report.clone()).with_histogram(histogram) {
        Ok(entry) => {
            assert!(entry.histogram().is_some());
            None
        }
        Err(Error::HistogramOfOtherGradients { name, what }) => Some((name, what)),
        Err(other) => panic!("{other}"),
    }
}

fn histogram(probe: &mut Probe, tensors: &[&dyn Tensor]) -> HistogramReport {
    probe.histogram().unwrap().measure(tensors).unwrap()
}

#[test]
fn a_histogram_of_clipped_gradients_is_none_of_the_report() {
    let plan = Plan::new([("small", DType::F32, 2), ("w", DType::F32, 4)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new().clip(Clip::Value { max_abs: 0.6 }).histogram()).unwrap();
    let (mut small, mut gradient) = ([0.1f32, 0.2], [60.8f32, 0.3, 0.0, -0.01]);
    probe.measure(&[&small, &gradient]).unwrap();
    let report = probe.wait().unwrap();
    let before = histogram(&mut probe, &[&small, &gradient]);
    assert_eq!(refused(&report, before), None);
    probe.clip(&mut [&mut small, &mut gradient]).unwrap();
    let after = histogram(&mut probe, &[&small, &gradient]);
    let error = Entry::new(report).with_histogram(after).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the histogram is of other gradients than the report, most likely measured after the clip: measure it before; tensor \
         \"w\": largest magnitude from 5.000e-1 to 6.250e-1 in the histogram, 6.080e1 in the report"
    );
}

/// Every kind of clip, and what each does to NaN, under a loss scale or none, on the CPU and in the kernels.
#[test]
fn a_histogram_is_of_the_report_before_every_clip_and_not_after() {
    const SCALE: f32 = 1000.0;
    for clip in CLIPS {
        for non_finite in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
            for scale in [None, Some(LossScale::dynamic().initial(SCALE).growth_interval(1))] {
                let config = Config::new().clip(clip).non_finite(non_finite).histogram();
                let config = scale.into_iter().fold(config, Config::loss_scale);
                for mut probe in probes(&config) {
                    for (step, gradient) in
                        [[1.0f32, 0.5], [1.0, 0.5], [300.0, -0.2], [f32::NAN, 90.0]].iter().enumerate()
                    {
                        // The report knows of which scale it is, though the next step's is another.
                        let scale = probe.state().unwrap().loss_scale.map_or(1.0, |(scale, _)| scale);
                        let mut gradient = gradient.map(|x| x * scale);
                        let before = histogram(&mut probe, &[&gradient]);
                        probe.measure(&[&gradient]).unwrap();
                        let report = probe.wait().unwrap();
                        let what = format!("{clip:?}, {non_finite:?}, scale {scale}, step {step}");
                        assert_eq!(refused(&report, before), None, "{what}");
                        let unclipped = gradient;
                        probe.clip(&mut [&mut gradient]).unwrap();
                        let after = histogram(&mut probe, &[&gradient]);
                        let bins =
                            |x: [f32; 2]| x.map(|x| if x.is_finite() { Some(Histogram::bin_of(x)) } else { None });
                        let is_seen = bins(gradient) != bins(unclipped);
                        assert_eq!(refused(&report, after).is_some(), is_seen, "{what}: {unclipped:?}, {gradient:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_ends_of_every_bin_are_in_it_at_every_loss_scale() {
    for scale in [1.0, 3.7, 65536.0, 1e-3, f32::MAX, f32::MIN_POSITIVE] {
        let config = Config::new().histogram().loss_scale(LossScale::fixed(scale));
        let mut probe = Probe::new(Cpu, one("w"), config).unwrap();
        for bin in 0..Histogram::BINS {
            let gradient = [Histogram::lowest_of(bin), -Histogram::highest_of(bin)];
            probe.measure(&[&gradient]).unwrap();
            let (report, own) = (probe.wait().unwrap(), histogram(&mut probe, &[&gradient]));
            assert_eq!(refused(&report, own), None, "bin {bin}, scale {scale}");
        }
    }
}

#[test]
fn counts_and_extremes_of_any_tensor_tell_other_gradients() {
    let plan = || Plan::new([("a", DType::F16, 3), ("b", DType::BF16, 2), ("none", DType::F32, 0)]).unwrap();
    let (a, b) = ([2.0f32, 0.5, 0.0].map(f16::from_f32), [bf16::INFINITY, bf16::NAN]);
    let mut probe = Probe::new(Cpu, plan(), Config::new().histogram()).unwrap();
    let none: [f32; 0] = [];
    let wide = |x: [f32; 3]| x.map(f16::from_f32);
    let same = [bf16::NAN, bf16::NEG_INFINITY];
    type Case<'a> = ([&'a dyn Tensor; 3], Option<(&'a str, &'a str)>);
    let cases: [Case; 8] = [
        ([&a, &b, &none], None),
        ([&a, &same, &none], None),
        ([&Absent, &b, &none], Some(("a", "0 elements in the histogram, 3 in the report"))),
        ([&wide([2.0, 0.5, 0.5]), &b, &none], Some(("a", "0 zeros in the histogram, 1 in the report"))),
        ([&wide([2.0, 0.6, 0.0]), &b, &none], None),
        ([&wide([2.0, 0.7, 0.0]), &b, &none], Some(("a", "smallest magnitude from 6.250e-1"))),
        ([&wide([1.9, 0.5, 0.0]), &b, &none], Some(("a", "largest magnitude from 1.750e0"))),
        ([&a, &[bf16::INFINITY; 2], &none], Some(("b", "0 NaN in the histogram, 1 in the report"))),
    ];
    probe.measure(&[&a, &b, &none]).unwrap();
    let report = probe.wait().unwrap();
    for (index, (tensors, expected)) in cases.into_iter().enumerate() {
        let seen = refused(&report, histogram(&mut probe, &tensors));
        match (&seen, expected) {
            (None, None) => {}
            (Some((name, what)), Some((of, start))) => {
                assert!(name == of && what.starts_with(start), "{index}: {seen:?}")
            }
            _ => panic!("{index}: {seen:?}, not {expected:?}"),
        }
    }
    // Absent in both.
    probe.measure(&[&Absent, &b, &none]).unwrap();
    let (report, own) = (probe.wait().unwrap(), histogram(&mut probe, &[&Absent, &b, &none]));
    assert_eq!(refused(&report, own), None);
}

/// Parts beside parts, and whole tensors beside whole ones.
#[test]
fn on_ranks_both_are_of_parts_or_of_whole_tensors() {
    for is_whole in [false, true] {
        let ranks = |communicator: ThreadCommunicator| {
            let mesh = Mesh::new([("tp", 2)]).unwrap();
            let layouts = [mesh.layout([("tp", Along::Sharded)]).unwrap(), mesh.layout([]).unwrap()];
            let ranks = Ranks::new(communicator, &mesh, layouts);
            if is_whole { ranks.whole_tensors() } else { ranks }
        };
        let run = |rank: usize, communicator: ThreadCommunicator| {
            let plan = Plan::new([("cut", DType::F32, 2), ("replica", DType::F32, 1)]).unwrap();
            let mut probe = Probe::new(Cpu, plan, Config::new().histogram().ranks(ranks(communicator))).unwrap();
            let cut = [[1.0f32, 2.0], [3.0, 100.0]][rank];
            let tensors = [HostTensor::F32(&cut), HostTensor::F32(&[5.0])];
            probe.measure(&refs(&tensors)).unwrap();
            let (report, own) = (probe.wait().unwrap(), histogram(&mut probe, &refs(&tensors)));
            let whole = probe.ranks().unwrap().histograms(&own).unwrap();
            let [fits, not] = if is_whole { [whole, own] } else { [own, whole] };
            assert_eq!(refused(&report, fits), None);
            let (name, what) = refused(&report, not).unwrap();
            assert!(name == "cut" && what.contains("elements in the histogram"), "{name}: {what}");
        };
        thread::scope(|scope| {
            let run = &run;
            for (rank, communicator) in ThreadCommunicator::group(2).into_iter().enumerate() {
                scope.spawn(move || run(rank, communicator));
            }
        });
    }
}

#[test]
fn plans_that_differ_are_told_by_the_first_tensor_and_how() {
    let (a, b, c) = (("a", DType::F32, 2), ("b", DType::F16, 3), ("c", DType::F32, 1));
    let plan = |tensors: &[_]| Plan::new(tensors.iter().copied()).unwrap();
    let groups = Groups::by_layer(&plan(&[a, b]));
    let norms = |plan: Plan| {
        let first = vec![1.0f32; usize::try_from(plan.tensors()[0].len).unwrap()];
        let given: Vec<&dyn Tensor> =
            (0..plan.tensors().len()).map(|t| if t == 0 { &first as _ } else { &Absent as _ }).collect();
        let mut probe = Probe::new(Cpu, plan, Config::new()).unwrap();
        probe.measure(&given).unwrap();
        groups.norms(&probe.wait().unwrap()).map(drop)
    };
    let with_weights = plan(&[a, b]).with_weights([DType::BF16, DType::F16]).unwrap();
    for (other, name, expected) in [
        (plan(&[("a", DType::F32, 3), b]), "a", "it has 3 F32 elements there, 2 F32 elements here"),
        (plan(&[a, ("b", DType::BF16, 3)]), "b", "it has 3 BF16 elements there, 3 F16 elements here"),
        (plan(&[a, c]), "b", "it has \"c\" in its place"),
        (plan(&[a]), "b", "it does not have that tensor"),
        (plan(&[a, b, c]), "c", "only it has that tensor"),
        (with_weights, "a", "it has 2 F32 elements, BF16 weights there, 2 F32 elements here"),
    ] {
        let expected = Error::ReportOfAnotherPlan { name: name.to_owned(), what: expected.to_owned() };
        assert_eq!(norms(other), Err(expected));
    }
    assert_eq!(norms(plan(&[a, b])), Ok(()));
}
