//! Calls that each are right, and make no sense together, are errors that say what to do.

use crate::common::clips::CLIPS;
use gradprobe::{
    Clip, Config, Cpu, DType, Error, NonFinitePolicy, Plan, Probe,
    clip::{AdaptiveClip, LossScale},
    optim::Sgd,
};
use gradprobe_simt::Simt;

const GRADIENT: [f32; 2] = [30.0, 40.0];

fn one(name: &str) -> Plan {
    Plan::new([(name, DType::F32, 2)]).unwrap()
}

fn probes(config: &Config) -> [Probe; 2] {
    [Probe::new(Cpu, one("w"), config.clone()).unwrap(), Probe::new(Simt::default(), one("w"), config.clone()).unwrap()]
}

/// All that clips or moves by what was decided, in place; gives how far the gradient was left, and the weight.
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
            assert_eq!(second(&mut probe, &mut gradient), Err(Error::AlreadyClipped), "{index}");
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

#[test]
fn every_kind_of_clip_is_applied_once_also_where_a_step_needs_none() {
    for clip in CLIPS {
        for non_finite in [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite] {
            let mut probe = Probe::new(Cpu, one("w"), Config::new().clip(clip).non_finite(non_finite)).unwrap();
            assert_eq!(probe.clip(&mut [&mut [0.1f32; 2]]), Err(Error::NotMeasured));
            for _ in 0..3 {
                probe.step(&mut [&mut [0.1f32; 2]]).unwrap();
                let launches = clip != Clip::None || non_finite == NonFinitePolicy::ZeroNonFinite;
                let expected = if launches { Err(Error::AlreadyClipped) } else { Ok(()) };
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
