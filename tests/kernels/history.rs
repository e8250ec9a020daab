//! The history of a probe's last steps, on the CPU and on the kernels, and the statistics over it.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

use crate::common::{cases::normal, host::OnHost};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, HostTensor, NonFinitePolicy, Plan, Probe, Rules, StepOutputs, Tensor,
    clip::LossScale,
    gsnr::GsnrConfig,
    history::{HistoryReport, HistoryStep, HistoryTensor},
};
use gradprobe_simt::{Schedule, Simt};

const LENGTHS: [usize; 3] = [33_000, 5, 0];

fn plan() -> Plan {
    Plan::new(LENGTHS.into_iter().enumerate().map(|(t, len)| (t.to_string(), DType::F32, len as u64))).unwrap()
}

/// The tensors of a step of some size; every sixth is not finite, and tensor 1 is 0 from step 8 on.
fn step(number: u64) -> Vec<Vec<f32>> {
    let size = 1e-3 * (0.3 * normal(1, number as usize)).exp();
    let value = |t: usize, i: usize| if t == 1 && number >= 8 { 0.0 } else { size * normal(10 * number + t as u64, i) };
    let mut tensors: Vec<Vec<f32>> =
        LENGTHS.into_iter().enumerate().map(|(t, len)| (0..len).map(|i| value(t, i) as f32).collect()).collect();
    if number.is_multiple_of(6) {
        tensors[number as usize / 6 % 2][3] = if number.is_multiple_of(12) { f32::NAN } else { f32::INFINITY };
    }
    tensors
}

fn measure(probe: &mut Probe, number: u64) {
    let tensors = step(number);
    let tensors: Vec<HostTensor> = tensors.iter().map(|tensor| HostTensor::F32(tensor)).collect();
    probe.measure_host(&tensors).unwrap();
}

/// The history after `steps` steps, tagged with 100 + their number.
fn history(probe: &mut Probe, steps: u64) -> HistoryReport {
    for number in 1..=steps {
        probe.history().unwrap().tag(100 + number).unwrap();
        measure(probe, number);
    }
    probe.history_report().unwrap()
}

fn bytes(report: &HistoryReport) -> Vec<u8> {
    let one = |(step, tensors): (&HistoryStep, &[HistoryTensor])| {
        [bytemuck::bytes_of(step), bytemuck::cast_slice(tensors)].concat()
    };
    report.steps().flat_map(one).collect()
}

#[test]
fn the_last_steps_are_kept_in_order_with_their_tags() {
    let config = Config::default().clip(Clip::global_norm(0.1)).history(5);
    for steps in [0, 1, 4, 5, 6, 13] {
        let mut probe = Probe::new(Cpu, plan(), config.clone()).unwrap();
        let report = history(&mut probe, steps);
        let kept: Vec<u64> = report.steps().map(|(step, _)| step.outputs.step).collect();
        assert_eq!(kept, (steps.saturating_sub(5) + 1..=steps).collect::<Vec<_>>());
        for (kept, tensors) in report.steps() {
            let mut fresh = Probe::new(Cpu, plan(), config.clone()).unwrap();
            let data = step(kept.outputs.step);
            let views: Vec<HostTensor> = data.iter().map(|tensor| HostTensor::F32(tensor)).collect();
            let expected = fresh.measure_host(&views).unwrap();
            let outputs = StepOutputs { step: kept.outputs.step, ..*expected.outputs() };
            assert_eq!(bytemuck::bytes_of(&kept.outputs), bytemuck::bytes_of(&outputs));
            assert_eq!(kept.tag, 100 + kept.outputs.step);
            for (tensor, record) in tensors.iter().zip(expected.records()) {
                assert_eq!(tensor.finite_l2_norm, record.finite_l2_norm());
                assert_eq!(tensor.max_abs, record.max_abs().unwrap_or(0.0));
                let share = |fraction: Option<f64>| fraction.unwrap_or(0.0) as f32;
                assert_eq!(tensor.zero_fraction, share(record.zero_fraction()));
                assert_eq!(tensor.dead_fraction, share(record.dead_fraction()));
                let flags = (tensor.flags & StepOutputs::FLAG_NAN != 0, tensor.flags & StepOutputs::FLAG_INF != 0);
                assert_eq!(flags, (record.nan_count > 0, record.inf_count > 0));
            }
        }
    }
}

#[test]
fn the_kernels_keep_the_same_bytes() {
    let config = Config::default().clip(Clip::Percentile { percentile: 50.0, history: 4, max_norm: None }).history(5);
    for steps in [0, 3, 5, 17] {
        let expected = bytes(&history(&mut Probe::new(Cpu, plan(), config.clone()).unwrap(), steps));
        for schedule in [Schedule::Forward, Schedule::Reverse, Schedule::Shuffled(3)] {
            let mut probe =
                Probe::new(Simt { schedule, blocks: 2, ..Simt::default() }, plan(), config.clone()).unwrap();
            assert!(bytes(&history(&mut probe, steps)) == expected, "{schedule:?} after {steps}");
        }
    }
}

#[test]
fn statistics_leave_out_what_is_not_finite() {
    let mut probe = Probe::new(Cpu, plan(), Config::default().clip(Clip::global_norm(0.2)).history(5)).unwrap();
    let report = history(&mut probe, 13);
    // Of steps 9 to 13 the twelfth is not finite.
    let norm = |number: u64, t: usize| step(number)[t].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let totals: Vec<f64> = [9, 10, 11, 13].map(|number| norm(number, 0).hypot(norm(number, 1))).to_vec();
    let seen = report.total_norm();
    let near = |a: f64, b: f64| (a - b).abs() <= 2e-6 * b.abs();
    let mean = totals.iter().sum::<f64>() / 4.0;
    let std = (totals.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 4.0).sqrt();
    assert_eq!(seen.steps, 4);
    assert!(near(seen.mean, mean) && near(seen.cv.unwrap(), std / mean), "{seen:?}");
    assert!(near(seen.change.unwrap(), totals[3] / totals[2]), "{seen:?}");
    let logs: Vec<f64> = totals[..3].iter().map(|x| x.ln()).collect();
    let log_mean = logs.iter().sum::<f64>() / 3.0;
    let log_std = (logs.iter().map(|x| (x - log_mean).powi(2)).sum::<f64>() / 3.0).sqrt();
    assert!((seen.log_z.unwrap() - (totals[3].ln() - log_mean) / log_std).abs() < 1e-3, "{seen:?}");

    let tensor = report.tensor_norm(1);
    assert_eq!((tensor.steps, tensor.mean, tensor.cv, tensor.change, tensor.log_z), (4, 0.0, None, None, None));
    assert_eq!(report.persistence(1, |tensor| tensor.finite_l2_norm == 0.0), 4);
    assert_eq!(report.persistence(0, |tensor| tensor.finite_l2_norm == 0.0), 0);
    let clipped: Vec<bool> = totals.iter().map(|&norm| norm > 0.2).collect();
    let share = clipped.iter().filter(|&&clipped| clipped).count() as f64 / 4.0;
    assert_eq!(report.clipped_fraction(), Some(share));
    let product: f64 = totals.iter().map(|norm| (0.2 / norm).min(1.0)).product();
    assert!(near(report.mean_coefficient().unwrap(), product.powf(0.25)));
}

/// One bad step and a thousand good ones: the window is what it would have been.
#[test]
fn a_step_that_is_not_finite_leaves_no_statistic_behind() {
    let run = |with: bool| {
        let config = Config::new().non_finite(NonFinitePolicy::Propagate).history(1001);
        let mut probe = Probe::new(Cpu, plan(), config).unwrap();
        if with {
            measure(&mut probe, 12);
        }
        (0..1000).for_each(|number| measure(&mut probe, 6 * (number % 50) + 1));
        let report = probe.history_report().unwrap();
        assert_eq!(report.steps().len(), 1000 + usize::from(with));
        (report.total_norm(), report.tensor_norm(0), report.clipped_fraction(), report.mean_coefficient())
    };
    assert_eq!(run(true), run(false));
}

/// What is not there in a step is no zero in any statistic.
#[test]
fn a_tensor_that_is_absent_is_left_out_of_its_statistics() {
    let plan = || Plan::new([("a", DType::F32, 2), ("b", DType::F32, 2)]).unwrap();
    let config = Config::new().history(8);
    let mut probes =
        [Probe::new(Cpu, plan(), config.clone()).unwrap(), Probe::new(Simt::default(), plan(), config).unwrap()];
    let reports = probes.each_mut().map(|probe| {
        for number in 1..=6u8 {
            let (x, y) = ([f32::from(number), 0.0], [3.0f32, 4.0]);
            let b: &dyn Tensor = if number % 2 == 0 { &Absent } else { &y };
            probe.measure(&[&x, b]).unwrap();
        }
        probe.history_report().unwrap()
    });
    assert_eq!(bytes(&reports[0]), bytes(&reports[1]));
    let there: Vec<bool> = reports[0].steps().map(|(_, tensors)| tensors[1].has_elements()).collect();
    assert_eq!(there, [true, false, true, false, true, false]);
    let (a, b) = (reports[0].tensor_norm(0), reports[0].tensor_norm(1));
    assert_eq!((a.steps, a.mean, b.steps, b.mean, b.cv), (6, 3.5, 3, 5.0, Some(0.0)));
    assert_eq!(reports[0].persistence(1, |tensor| tensor.finite_l2_norm == 5.0), 3);
}

#[test]
fn what_is_not_kept_is_an_error() {
    let not_declared = || Error::NotDeclared { declare: "Config::history" };
    for mut probe in
        [Probe::new(Cpu, plan(), Config::new()).unwrap(), Probe::new(Simt::default(), plan(), Config::new()).unwrap()]
    {
        assert_eq!(probe.history_report().unwrap_err(), not_declared());
        assert_eq!(probe.history().and_then(|mut history| history.tag(1)), Err(not_declared()));
    }
    let refused = Probe::new(Cpu, plan(), Config::new().history(0)).map(drop);
    assert!(matches!(refused, Err(Error::InvalidConfig { option: "history", .. })), "{refused:?}");
}

/// A state is of no device: a run goes on on the kernels from what the CPU has saved, and the other way round.
#[test]
fn a_run_goes_on_on_another_device() {
    let clip = Clip::Percentile { percentile: 50.0, history: 3, max_norm: None };
    let tracking = GsnrConfig::new().tensors(["0", "1"]).window(5);
    let config = Config::new().clip(clip).loss_scale(LossScale::dynamic()).history(4).tracking(tracking);
    let config = || config.clone().rules(Rules::default());
    let make = |on_kernels: bool| match on_kernels {
        true => Probe::new(Simt::default(), plan(), config()).unwrap(),
        false => Probe::new(Cpu, plan(), config()).unwrap(),
    };
    for on_kernels in [false, true] {
        let (mut first, mut second) = (make(on_kernels), make(!on_kernels));
        (1..=7).for_each(|number| measure(&mut first, number));
        second.restore(&first.state().unwrap()).unwrap();
        for number in 8..=13 {
            let [expected, seen] = [&mut first, &mut second].map(|probe| {
                measure(probe, number);
                let report = probe.wait().unwrap();
                let (gsnr, history) = (probe.gsnr().unwrap().report(), probe.history().unwrap().report().unwrap());
                format!("{:?} {:?} {gsnr:?} {history:?}", report.outputs(), report.diagnosis())
            });
            assert!(seen == expected, "step {number}");
        }
        assert_eq!(second.state().unwrap(), first.state().unwrap());
    }
}
