//! Tensors without a gradient in a step: what every device makes of them, against probes of the CPU that never heard of
//! those tensors, or are given zeros for them.

#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // Small numbers.

use super::{
    OFFSETS, Placed,
    check::{same_elements, same_outputs, same_record, same_step},
    data::{Data, Tensor as Recipe, normal},
    gsnr,
};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, NonFinitePolicy, Plan, Probe, Record, Report, StepOutputs, Tensor,
    TensorMut, clip::LossScale, gsnr::GsnrConfig,
};

/// Makes a probe for a plan under a config.
pub type Make<'a> = &'a mut dyn FnMut(Plan, Config) -> Probe;

/// Several chunks, one element, none; all dtypes.
const LENGTHS: [usize; 6] = [3, 2_100, 0, 300, 32_769, 1];
const COUNT: usize = LENGTHS.len();
/// The tensor that has no elements when it is there.
const EMPTY: usize = 2;

/// Runs all that is demanded of tensors that are absent, and gives back what is wrong:
///
/// * the record of an absent tensor is empty, and all else has the bits of a plan in which it has no elements: records,
///   scalars, what is clipped;
/// * records of the others have the bits of a plan without it, and where the absent tensors are the last of the plan so
///   have the scalars;
/// * nothing of its elements is written, though the step before had them;
/// * numbers of steps, history, tracking, loss scale and what clips learn go on;
/// * a step in which all tensors are absent is an error and changes nothing.
pub fn run_all(make: Make<'_>) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, config) in configs() {
        for absent in
            [&[0][..], &[1], &[3], &[4], &[5], &[EMPTY], &[0, 3], &[1, 4], &[4, 5], &[1, 2, 3, 4, 5], &[0, 1, 2, 3, 5]]
        {
            let found = compare_with_plans_without(make, &config, absent);
            complaints.extend(found.into_iter().map(|c| format!("{name}, {absent:?} absent: {c}")));
        }
        let found = compare_with_zeros(make, &config);
        complaints.extend(found.into_iter().map(|c| format!("{name}, come and go: {c}")));
    }
    complaints.extend(history_goes_on(make));
    for window in [0, 3] {
        let found = tracking_goes_on(make, window);
        complaints.extend(found.into_iter().map(|c| format!("tracked, window {window}: {c}")));
    }
    complaints.extend(averages_go_on(make));
    complaints.extend(all_absent_changes_nothing(make));
    complaints
}

/// Ways to clip, all of which do so with the steps of [`data`].
fn configs() -> Vec<(&'static str, Config)> {
    let config = |clip| Config::new().clip(clip);
    let max_norm = Some(0.2);
    vec![
        ("global norm", config(Clip::global_norm(0.2))),
        ("global norm, propagated", config(Clip::global_norm(0.2)).non_finite(NonFinitePolicy::Propagate)),
        ("no clip, zeroed", Config::new().non_finite(NonFinitePolicy::ZeroNonFinite)),
        ("value", config(Clip::Value { max_abs: 0.01 })),
        ("quantile", config(Clip::Quantile { quantile: 0.9 })),
        ("tensor norm", config(Clip::TensorNorm { max_norm: 0.05 })),
        ("percentile", config(Clip::Percentile { percentile: 30.0, history: 4, max_norm })),
        ("z-score", config(Clip::ZScore { smoothing: 0.9, threshold: 0.5, warmup: 2, max_norm: None })),
        ("averages", config(Clip::TensorEma { smoothing: 0.9, threshold: 1.05, warmup: 2, max_norm })),
        ("loss scale", config(Clip::global_norm(0.2)).loss_scale(LossScale::dynamic().initial(8.0).growth_interval(2))),
    ]
}

fn name(index: usize) -> String {
    format!("tensor {index}")
}

/// The plan of [`LENGTHS`] with other lengths.
fn plan_of(lengths: impl IntoIterator<Item = (usize, usize)>) -> Plan {
    let tensors = lengths.into_iter().map(|(t, len)| (name(t), DType::ALL[t % 3], len as u64));
    Plan::new(tensors).expect("a valid plan")
}

fn plan() -> Plan {
    plan_of(LENGTHS.into_iter().enumerate())
}

/// The gradients of a step, larger in some steps than in others.
fn data(step: usize) -> Vec<Data> {
    let scale = [1.0, 2.0, 0.5, 4.0][step % 4];
    let tensor = |(t, len): (usize, usize)| {
        let seed = 900 + (t + 10 * step) as u64;
        Recipe::of_values(DType::ALL[t % 3], len, move |i| scale * 2e-3 * (t + 1) as f64 * normal(seed, i)).data()
    };
    LENGTHS.into_iter().enumerate().map(tensor).collect()
}

/// A step's numbers and its tensors after the clip.
struct Step {
    report: Report,
    clipped: Vec<Placed>,
}

impl Step {
    fn records(&self) -> &[Record] {
        self.report.records()
    }
}

/// Measures and clips the tensors that are there, each where `places` says.
fn step(probe: &mut Probe, data: &[Data], is_there: impl Fn(usize) -> bool) -> Result<Step, Error> {
    let place = |(t, data)| Placed::new(data, (3 * t) % OFFSETS);
    let mut placed: Vec<Placed> = data.iter().enumerate().map(place).collect();
    let report = measure(probe, &placed, &is_there)?;
    clip(probe, &mut placed, &is_there)?;
    Ok(Step { report, clipped: placed })
}

fn measure(probe: &mut Probe, placed: &[Placed], is_there: impl Fn(usize) -> bool) -> Result<Report, Error> {
    let tensors: Vec<_> = placed.iter().enumerate().map(|(t, placed)| is_there(t).then(|| placed.tensor())).collect();
    // Both ways to say that there is none.
    let given = tensors.iter().enumerate().map(|(t, tensor)| match tensor {
        None if t % 2 == 0 => &Absent as &dyn Tensor,
        tensor => tensor,
    });
    probe.measure(&given.collect::<Vec<_>>())?;
    probe.wait()
}

fn clip(probe: &mut Probe, placed: &mut [Placed], is_there: impl Fn(usize) -> bool) -> Result<(), Error> {
    let tensors = placed.iter_mut().enumerate();
    let mut tensors: Vec<_> = tensors.map(|(t, placed)| is_there(t).then(|| placed.tensor_mut())).collect();
    let mut given: Vec<&mut dyn TensorMut> = tensors.iter_mut().map(|tensor| tensor as &mut dyn TensorMut).collect();
    probe.clip(&mut given)
}

fn on_cpu(plan: Plan, config: &Config) -> Probe {
    Probe::new(Cpu, plan, config.clone()).expect("a valid config")
}

/// Complaints about tensors that are not as expected after a clip.
fn same_tensors(seen: &[Placed], expected: &[&[u8]]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (t, (seen, expected)) in seen.iter().zip(expected).enumerate() {
        complaints.extend(same_elements(&name(t), DType::ALL[t % 3].size(), seen.bytes(), expected));
        if !seen.guards_are_intact() {
            complaints.push(format!("{}: bytes around the tensor were written", name(t)));
        }
    }
    complaints
}

/// Steps in which these tensors are absent, after one in which all are there and NaN, of which nothing may stay.
fn compare_with_plans_without(make: Make<'_>, config: &Config, absent: &[usize]) -> Vec<String> {
    let is_there = |t: usize| !absent.contains(&t);
    let there: Vec<usize> = (0..COUNT).filter(|&t| is_there(t)).collect();
    let names: Vec<String> = (0..COUNT).map(name).collect();
    let mut probe = make(plan(), config.clone());
    let mut hollow = on_cpu(plan_of((0..COUNT).map(|t| (t, if is_there(t) { LENGTHS[t] } else { 0 }))), config);
    let mut lesser = on_cpu(plan_of(there.iter().map(|&t| (t, LENGTHS[t]))), config);
    // The fold of the norms pairs neighbours: it is that of the lesser plan where only zeros were added at its end.
    let absent_are_last = (there.len()..COUNT).all(|t| !is_there(t));
    let mut complaints = Vec::new();
    let mut run = |number: usize| -> Result<(), Error> {
        let mut all = data(number);
        if number == 0 {
            all = all.iter().map(Data::all_nan).collect();
        }
        let seen = step(&mut probe, &all, |t| number == 0 || is_there(t))?;
        let without: Vec<Data> =
            all.iter().enumerate().map(|(t, data)| if is_there(t) { data.clone() } else { data_of_none(t) }).collect();
        let expected = step(&mut hollow, &without, |_| true)?;
        let fewer: Vec<Data> = there.iter().map(|&t| all[t].clone()).collect();
        let few = step(&mut lesser, &fewer, |_| true)?;
        if number == 0 {
            return Ok(());
        }
        let c = &mut complaints;
        c.extend(same_step(
            &names,
            (seen.records(), seen.report.outputs()),
            (expected.records(), expected.report.outputs()),
        ));
        let bytes = |t: usize| if is_there(t) { expected.clipped[t].bytes() } else { all[t].bytes() };
        c.extend(same_tensors(&seen.clipped, &(0..COUNT).map(bytes).collect::<Vec<_>>()));
        for (&t, record) in there.iter().zip(few.records()) {
            c.extend(same_record(&name(t), &seen.records()[t], record));
        }
        for &t in absent {
            c.extend(same_record(&name(t), &seen.records()[t], &Record::EMPTY));
        }
        let [norm, other] = [&seen, &few].map(|step| step.report.outputs().finite_total_norm);
        if (norm - other).abs() > 1e-14 * norm {
            c.push(format!("the norm is {norm:e}, without the tensors it is {other:e}"));
        }
        if absent_are_last {
            c.extend(same_outputs(seen.report.outputs(), few.report.outputs()));
        }
        let listed: Vec<&str> = seen.report.absent().collect();
        let expected: Vec<&String> = absent.iter().filter(|&&t| LENGTHS[t] > 0).map(|&t| &names[t]).collect();
        if listed != expected {
            c.push(format!("absent are {listed:?}, should be {expected:?}"));
        }
        Ok(())
    };
    let failed: Vec<String> = (0..4).filter_map(|number| run(number).err()).map(|error| error.to_string()).collect();
    complaints.extend(failed);
    complaints
}

/// No elements of a tensor's type.
fn data_of_none(t: usize) -> Data {
    Data::zeros(DType::ALL[t % 3], 0)
}

/// Which tensors are there in a step: each is absent for some steps, now and then with others, from the first step on or
/// not.
fn comes_and_goes(step: usize, t: usize) -> bool {
    match step % 7 {
        0 => t != 3,
        1 => t.is_multiple_of(2),
        2 => true,
        3 => t == 1,
        4 => t >= 3,
        5 => t != 0 && t != 4,
        _ => t == 5,
    }
}

/// Zeros add nothing to norms either: what is decided of a step, and learnt for the next, is what it would be with them.
/// Not where elements are counted.
fn compare_with_zeros(make: Make<'_>, config: &Config) -> Vec<String> {
    if matches!(config.clip, Clip::Quantile { .. }) {
        return Vec::new();
    }
    let (mut probe, mut zeros) = (make(plan(), config.clone()), on_cpu(plan(), config));
    let mut complaints = Vec::new();
    for number in 0..12 {
        let all = data(number);
        let is_there = |t: usize| comes_and_goes(number, t);
        let with_zeros: Vec<Data> = all
            .iter()
            .enumerate()
            .map(|(t, data)| if is_there(t) { data.clone() } else { Data::zeros(data.dtype(), data.len()) })
            .collect();
        let (seen, expected) = match (step(&mut probe, &all, is_there), step(&mut zeros, &with_zeros, |_| true)) {
            (Ok(seen), Ok(expected)) => (seen, expected),
            (seen, expected) => {
                let errors = [seen.err(), expected.err()];
                complaints.push(format!("step {number}: {errors:?}"));
                return complaints;
            }
        };
        let mut found = same_outputs(seen.report.outputs(), expected.report.outputs());
        if seen.report.step() != number as u64 + 1 {
            found.push(format!("the step is number {}", seen.report.step()));
        }
        let bytes = |t: usize| if is_there(t) { expected.clipped[t].bytes() } else { all[t].bytes() };
        found.extend(same_tensors(&seen.clipped, &(0..COUNT).map(bytes).collect::<Vec<_>>()));
        complaints.extend(found.into_iter().map(|c| format!("step {number}: {c}")));
    }
    complaints
}

fn history_goes_on(make: Make<'_>) -> Vec<String> {
    const KEPT: u32 = 5;
    let config = Config::new().clip(Clip::global_norm(0.2)).history(KEPT);
    let mut probe = make(plan(), config);
    let mut steps: Vec<(StepOutputs, Vec<Record>)> = Vec::new();
    let mut complaints = Vec::new();
    for number in 0..9 {
        match step(&mut probe, &data(number), |t| comes_and_goes(number, t)) {
            Ok(step) => steps.push((*step.report.outputs(), step.records().to_vec())),
            Err(error) => return vec![format!("history, step {number}: {error}")],
        }
        let report = match probe.history().and_then(|mut history| history.report()) {
            Ok(report) => report,
            Err(error) => return vec![format!("history after step {number}: {error}")],
        };
        let expected = &steps[steps.len().saturating_sub(KEPT as usize)..];
        let numbers: Vec<u64> = report.steps().map(|(step, _)| step.outputs.step).collect();
        if numbers != expected.iter().map(|(outputs, _)| outputs.step).collect::<Vec<_>>() {
            complaints.push(format!("history has the steps {numbers:?} after step {number}"));
        }
        let mut found = Vec::new();
        for ((line, tensors), (outputs, records)) in report.steps().zip(expected) {
            found.extend(same_outputs(&line.outputs, outputs));
            for (t, (tensor, record)) in tensors.iter().zip(records).enumerate() {
                let there = comes_and_goes(outputs.step as usize - 1, t) && LENGTHS[t] > 0;
                if tensor.has_elements() != there || tensor.finite_l2_norm != record.finite_l2_norm() {
                    found.push(format!("{} is {tensor:?}, should be there: {there}, {record:?}", name(t)));
                }
            }
        }
        for t in 0..COUNT {
            let norms: Vec<f64> = expected
                .iter()
                .filter(|(outputs, _)| comes_and_goes(outputs.step as usize - 1, t) && LENGTHS[t] > 0)
                .map(|(_, records)| records[t].finite_l2_norm())
                .collect();
            let (seen, mean) = (report.tensor_norm(t), norms.iter().sum::<f64>() / norms.len().max(1) as f64);
            if seen.steps != norms.len() || seen.mean != mean || report.persistence(t, |_| true) != norms.len() {
                found.push(format!("{} has {seen:?}, should have the norms {norms:?}", name(t)));
            }
        }
        complaints.extend(found.into_iter().map(|c| format!("history after step {number}: {c}")));
    }
    complaints
}

/// A step without a tensor is no step of it: it is tracked as if alone, over the steps that have it.
fn tracking_goes_on(make: Make<'_>, window: u32) -> Vec<String> {
    let tracking = match window {
        0 => GsnrConfig::new(),
        _ => GsnrConfig::new().window(window),
    };
    let config = Config::new().tracking(tracking);
    let mut probe = make(plan(), config.clone());
    let mut alone: Vec<Probe> =
        LENGTHS.into_iter().enumerate().map(|(t, len)| on_cpu(plan_of([(t, len)]), &config)).collect();
    let mut complaints = Vec::new();
    for number in 0..15 {
        let mut all = data(number);
        if number == 8 {
            // Skipped, which has to be told from absent.
            all[1] = all[1].all_nan();
        }
        if let Err(error) = step(&mut probe, &all, |t| comes_and_goes(number, t)) {
            return vec![format!("step {number}: {error}")];
        }
        // One that has no elements is never without them.
        for (t, probe) in alone.iter_mut().enumerate().filter(|(t, _)| *t == EMPTY || comes_and_goes(number, *t)) {
            step(probe, &all[t..=t], |_| true).expect("a good step");
        }
        let Ok(report) = probe.gsnr().and_then(|mut signal| signal.report()) else {
            if number > 1 {
                complaints.push(format!("there is no report after step {number}"));
            }
            continue;
        };
        for (t, (_, seen)) in report.tensors().enumerate() {
            let mut expected = alone[t].gsnr().expect("it is tracked");
            match expected.report() {
                Ok(expected) => {
                    let (_, expected) = expected.tensors().next().expect("one tensor");
                    let found = gsnr::same_record(&name(t), seen, expected);
                    complaints.extend(found.into_iter().map(|c| format!("step {number}: {c}")));
                }
                Err(Error::TooFewSteps { steps }) if seen.steps + seen.skipped == steps && seen.defined == 0 => {}
                Err(error) => complaints.push(format!("step {number}: {} has {seen:?}, alone {error}", name(t))),
            }
        }
    }
    complaints
}

/// Where tensors are clipped by averages of their own, each goes by its steps alone once all are warm.
fn averages_go_on(make: Make<'_>) -> Vec<String> {
    let clip = Clip::TensorEma { smoothing: 0.9, threshold: 1.05, warmup: 1, max_norm: None };
    let config = Config::new().clip(clip);
    let mut probe = make(plan(), config.clone());
    let mut alone: Vec<Probe> =
        LENGTHS.into_iter().enumerate().map(|(t, len)| on_cpu(plan_of([(t, len)]), &config)).collect();
    let (mut complaints, mut clipped) = (Vec::new(), 0);
    for number in 0..14 {
        let all = data(number);
        let is_there = |t: usize| number == 0 || comes_and_goes(number, t);
        let seen = match step(&mut probe, &all, is_there) {
            Ok(seen) => seen,
            Err(error) => return vec![format!("averages, step {number}: {error}")],
        };
        for (t, probe) in alone.iter_mut().enumerate() {
            let expected = match is_there(t) {
                true => step(probe, &all[t..=t], |_| true).expect("a good step").clipped.remove(0).bytes().to_vec(),
                false => all[t].bytes().to_vec(),
            };
            clipped += usize::from(is_there(t) && number > 0 && expected != all[t].bytes());
            let size = all[t].dtype().size();
            let found = same_elements(&name(t), size, seen.clipped[t].bytes(), &expected);
            complaints.extend(found.into_iter().map(|c| format!("averages, step {number}: {c}")));
        }
    }
    if clipped < 10 {
        complaints.push(format!("averages: only {clipped} tensors were clipped, which tests little"));
    }
    complaints
}

/// Not even the number of the step, and of what any feature keeps nothing.
fn all_absent_changes_nothing(make: Make<'_>) -> Vec<String> {
    let mut complaints = Vec::new();
    for (what, config) in configs() {
        let config = config.history(4).tracking(GsnrConfig::new()).rules(gradprobe::Rules::default());
        let (mut probe, mut expected) = (make(plan(), config.clone()), on_cpu(plan(), &config));
        let mut demand = |what_holds: &str, holds: bool| {
            if !holds {
                complaints.push(format!("{what}: not so: {what_holds}"));
            }
        };
        let refused = |probe: &mut Probe| {
            let mut placed: Vec<Placed> = data(50).iter().map(|data| Placed::new(data, 0)).collect();
            let empty_alone = |t: usize| t == EMPTY;
            let none = |_: usize| false;
            let mut tensors: Vec<&mut dyn TensorMut> = Vec::new();
            let mut absent = [Absent; COUNT];
            tensors.extend(absent.iter_mut().map(|absent| absent as &mut dyn TensorMut));
            [
                measure(probe, &placed, none).map(drop),
                measure(probe, &placed, empty_alone).map(drop),
                clip(probe, &mut placed, none),
                clip(probe, &mut placed, empty_alone),
                probe.step(&mut tensors),
            ]
            .iter()
            .all(|result| *result == Err(Error::AllAbsent))
        };
        demand("it is refused before the first step", refused(&mut probe));
        demand("then there is no report", probe.poll().is_ok_and(|report| report.is_none()));
        demand("then there is nothing to wait for", probe.wait().err() == Some(Error::NotMeasured));
        for number in 0..6 {
            let all = data(number);
            let is_there = |t: usize| comes_and_goes(number, t);
            let steps = (step(&mut probe, &all, is_there), step(&mut expected, &all, is_there));
            let (Ok(seen), Ok(expected_step)) = steps else {
                demand("a step with some tensors is none of this", false);
                break;
            };
            demand("it is refused", refused(&mut probe));
            let names: Vec<String> = (0..COUNT).map(name).collect();
            let same = same_step(
                &names,
                (seen.records(), seen.report.outputs()),
                (expected_step.records(), expected_step.report.outputs()),
            );
            demand(&format!("the step after is as without it: {same:?}"), same.is_empty());
            let words = seen.report.health_words() == expected_step.report.health_words();
            demand("the step after has the words that it has without it", words);
            let bytes: Vec<&[u8]> = expected_step.clipped.iter().map(Placed::bytes).collect();
            demand("the step after is clipped as without it", same_tensors(&seen.clipped, &bytes).is_empty());
            let again = probe.wait();
            let same = again.is_ok_and(|again| same_outputs(again.outputs(), seen.report.outputs()).is_empty());
            demand("the report of the last step stays", same);
            demand("nothing new is to be polled", probe.poll().is_ok_and(|report| report.is_none()));
            let history = |probe: &mut Probe| {
                let report = probe.history().and_then(|mut history| history.report()).expect("there is a history");
                report.steps().map(|(step, tensors)| (*step, tensors.to_vec())).collect::<Vec<_>>()
            };
            demand("history stays", history(&mut probe) == history(&mut expected));
            let tracked = |probe: &mut Probe| probe.gsnr().and_then(|mut signal| signal.report());
            let same = gsnr::same_report(&tracked(&mut probe), &tracked(&mut expected));
            demand(&format!("what is tracked stays: {same:?}"), same.is_empty());
        }
    }
    // Where nothing is planned to have elements, nothing is missing.
    let mut probe = make(plan_of([(0, 0), (1, 0)]), Config::new());
    let measured = probe.measure(&[&Absent, &None::<Vec<f32>>]).and_then(|()| probe.wait());
    if !measured.is_ok_and(|report| report.step() == 1 && report.absent().next().is_none()) {
        complaints.push("a plan without elements can be measured without tensors".to_owned());
    }
    complaints
}
