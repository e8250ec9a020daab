//! A run as [`Watch`] sees it: on the trainer's own step numbers, told once, written with and without details.
#![allow(unsafe_code, reason = "a device that passes on to that of the CPU")]

use crate::on_cpu::{Altered, OnCpu};
use gradprobe::{
    Absent, Clip, Config, Cpu, DType, Error, Plan, Probe, Tensor, Verdict, Watch, WatchedStep,
    device::{Buffer, Device, Read},
    gsnr::GsnrConfig,
    health::{Cadence, Rules},
    optim::Sgd,
    samples::SampleConfig,
    write::{Entry, JsonLines, Sink, json_line},
};
use serde_json::Value;
use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
};
use tempfile::TempDir;

const ELEMENTS: usize = 256;

fn plan() -> Plan {
    Plan::new([("0.weight", DType::F32, ELEMENTS as u64), ("1.weight", DType::F32, ELEMENTS as u64)]).unwrap()
}

fn watch(config: Config) -> Watch {
    let mut watch = Watch::new(Probe::new(Cpu, plan(), config).unwrap());
    watch.quiet();
    watch
}

/// Gradients of a step, which differ from step to step.
fn gradients(step: u64) -> [Vec<f32>; 2] {
    let mut random = fastrand::Rng::with_seed(step);
    [(); 2].map(|()| (0..ELEMENTS).map(|_| random.f32() - 0.4).collect())
}

fn take(watch: &mut Watch, step: u64, change: impl FnOnce(&mut [Vec<f32>; 2])) -> WatchedStep {
    let mut gradients = gradients(step);
    change(&mut gradients);
    let [first, second] = &mut gradients;
    watch.step(step, &mut [first, second], [("loss", 1.0 / (1.0 + step as f64)), ("lr", 1e-3)]).unwrap().unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Gives the steps that it is told of, and whether they have details.
struct Listener(mpsc::Sender<(u64, bool)>);

impl Sink for Listener {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        self.0.send((entry.step(), entry.has_details())).map_err(|error| Error::Drawing { reason: error.to_string() })
    }
}

#[test]
fn all_that_has_a_step_number_has_the_trainers() {
    let samples = SampleConfig::new(4, 8);
    let mut watch = watch(Config::full().history(4).samples(samples).clip(Clip::global_norm(1.0)));
    let steps = [0, 1, 2, 10, 20, 30, 31, 1000];
    for step in steps {
        let seen = take(&mut watch, step, |gradients| {
            if step == 30 {
                gradients[1][7] = f32::NAN;
            }
        });
        assert_eq!((seen.step(), seen.report().diagnosis().unwrap().step()), (step, step));
        assert_eq!(seen.report().outputs().step, step);
        let gradients = gradients(step);
        let tensors: [&dyn Tensor; 2] = [&gradients[0], &gradients[1]];
        watch.probe().samples().unwrap().take(&tensors).unwrap();
    }
    let probe = watch.probe();
    let history = probe.history().unwrap().report().unwrap();
    assert_eq!(history.steps().map(|(step, _)| step.outputs.step).collect::<Vec<_>>(), steps[4..]);
    let samples = probe.samples().unwrap().report().unwrap();
    let finite: Vec<u64> = steps.into_iter().filter(|&step| step != 30).collect();
    assert_eq!(samples.steps().map(|(step, _)| step).collect::<Vec<_>>(), finite);
    let report = probe.wait().unwrap();
    let frontier = report.diagnosis().unwrap().frontier().unwrap().clone();
    assert_eq!((frontier.step, frontier.tensor.as_str(), frontier.element), (30, "1.weight", 7));
    assert_eq!(probe.state().unwrap().measured, 8);
}

#[test]
fn a_step_that_moves_the_weights_has_the_update_of_its_number() {
    let mut watch = watch(Config::full().optimizer(Sgd::new(0.5)));
    let mut weights = [vec![1f32; ELEMENTS], vec![2f32; ELEMENTS]];
    for step in [7, 9] {
        let ([first, second], [w0, w1]) = (gradients(step), &mut weights);
        let seen = watch.update(step, &[&first, &second], &mut [w0, w1], [("lr", 0.5)]).unwrap().unwrap();
        assert!(seen.report().tensors().all(|tensor| tensor.update.is_some_and(|update| update.step == step)));
    }
}

#[test]
fn lines_have_the_trainers_numbers_and_details_now_and_then() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("runs/1");
    let mut watch = watch(Config::full());
    watch.write_to(&run).unwrap();
    for step in 1..=40 {
        take(&mut watch, step, |gradients| {
            if step == 33 {
                gradients[0][3] = f32::INFINITY;
            }
        });
    }
    let mut odd = gradients(41);
    let [first, second] = &mut odd;
    watch.step(41, &mut [first, second], [("loss", f64::NAN), ("accuracy", f64::NEG_INFINITY)]).unwrap();
    let finished = watch.finish().unwrap();
    assert_eq!((finished.written, finished.lost, finished.dropped), (41, 0, 0));

    let lines = lines(&run.join("steps.jsonl"));
    assert!(lines.iter().zip(1..).all(|(line, step)| line["step"] == step));
    assert!(lines[..40].iter().zip(1..).all(|(line, step)| line["scalars"]["loss"] == 1.0 / f64::from(1 + step)));
    let with = |key: &str| -> Vec<usize> { (0..41).filter(|&index| !lines[index][key].is_null()).collect() };
    assert_eq!(with("tensors"), [9, 19, 29, 32, 39], "every 10th, and where a finding begins");
    assert_eq!((with("gsnr"), with("histogram")), (vec![9, 19, 29, 39], vec![9, 19, 29, 39]));
    assert_eq!((&lines[40]["scalars"]["loss"], &lines[40]["scalars"]["accuracy"]), (&"nan".into(), &"-inf".into()));
    // The gradients of the step itself, before the clip.
    let bins = lines[39]["histogram"][1]["bins"].as_array().unwrap();
    let largest = lines[39]["tensors"][1]["max_abs"].as_f64().unwrap();
    let highest = bins.last().unwrap()[0].as_f64().unwrap();
    assert!(highest <= largest && largest < highest * 1.2);
}

#[test]
fn what_goes_on_is_told_once_and_so_is_its_end() {
    let mut watch = watch(Config::new().rules(Rules::default()));
    let mut told = Vec::new();
    for step in 1..=60 {
        let is_bad = (20..=45).contains(&step) && step % 4 != 3;
        let seen = take(&mut watch, step, |gradients| {
            if is_bad {
                gradients[1][9] = f32::NAN;
            }
        });
        assert_eq!(seen.skip(), is_bad);
        assert_eq!(seen.entry().verdict(), Some(if is_bad { Verdict::Critical } else { Verdict::Healthy }));
        told.extend(seen.changed().map(|words| (step, words.to_owned())));
    }
    let [(20, began), (56, over)] = &told[..] else { panic!("{told:?}") };
    assert!(began.contains("began at step 20 in 1.weight, element 9 (nan)"), "{began}");
    assert_eq!(over, "step 56: healthy again\n");
}

#[test]
fn more_of_a_fault_is_told_as_well() {
    let mut watch = watch(Config::new().rules(Rules::default()));
    let told: Vec<u64> = (1..=30)
        .filter(|&step| {
            let spoil = |gradients: &mut [Vec<f32>; 2]| {
                if step >= 5 {
                    gradients[1][0] = f32::NAN;
                }
                if step >= 9 {
                    gradients[0][0] = f32::NAN;
                }
            };
            take(&mut watch, step, spoil).changed().is_some()
        })
        .collect();
    assert_eq!(told, [5, 9]);
}

#[test]
fn details_are_of_the_steps_that_are_asked_for() {
    let (sender, receiver) = mpsc::channel();
    let mut watch = watch(Config::new().histogram().tracking(GsnrConfig::new()));
    watch.sink(Listener(sender));
    assert!(watch.details(Cadence::every(3).unwrap().tensors(["0.*"])).is_err());
    watch.details(Cadence::every(3).unwrap()).unwrap();
    // A report that nobody needs to wait for comes with its step; a tensor may be absent, and the first step too early for a variance.
    for step in 3..=12 {
        let mut first = gradients(step)[0].clone();
        let seen = watch.step(step, &mut [&mut first, &mut Absent], []).unwrap().unwrap();
        assert_eq!(seen.entry().histogram().is_some(), step % 3 == 0);
        assert_eq!(seen.entry().gsnr().is_some(), step % 3 == 0 && step > 3);
    }
    watch.finish().unwrap();
    let details: Vec<u64> = receiver.iter().filter(|(_, details)| *details).map(|(step, _)| step).collect();
    assert_eq!(details, [3, 6, 9, 12]);
}

#[test]
fn the_diagnosis_goes_by_the_learning_rate_of_the_step() {
    let mut watch = watch(Config::new().rules(Rules::default()));
    let mut rate_after = |step: u64, scalars: [(&str, f64); 1]| {
        let mut gradients = gradients(step);
        let [first, second] = &mut gradients;
        watch.step(step, &mut [first, second], scalars).unwrap();
        watch.probe().health().unwrap().rules().clone()
    };
    let at = |rate: f64| Rules::default().learning_rate(rate);
    assert_eq!(rate_after(1, [("lr", 0.0)]), Rules::default(), "the first step of a warm-up");
    assert_eq!(rate_after(2, [("lr", 1e-3)]), at(1e-3));
    assert_eq!(rate_after(3, [("lr", 1.5e-3)]), at(1e-3), "near enough");
    assert_eq!(rate_after(4, [("learning_rate", 3e-3)]), at(3e-3));
    assert_eq!(rate_after(5, [("loss", 3.0)]), at(3e-3));
    assert_eq!(rate_after(6, [("lr", f64::NAN)]), at(3e-3));
}

#[test]
fn mistakes_are_told_at_once() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("steps.jsonl");
    let step = |watch: &mut Watch, step: u64, scalars: &[(&str, f64)]| {
        let [mut first, mut second] = gradients(step);
        let taken = watch.step(step, &mut [&mut first, &mut second], scalars.iter().copied());
        taken.map(drop).map_err(|error| error.to_string())
    };
    {
        let mut watch = watch(Config::new());
        watch.write_to(folder.path()).unwrap();
        step(&mut watch, 5, &[]).unwrap();
        assert_eq!(
            step(&mut watch, 5, &[]).unwrap_err(),
            "step must be after the last one, and at most 2^62, not 5 after 5"
        );
        assert!(step(&mut watch, u64::MAX, &[]).unwrap_err().contains("at most 2^62"));
        for odd in [&[("", 1.0)][..], &[("loss", 1.0), ("loss", 2.0)], &[("total_norm", 1.0)], &[("step", 1.0)]] {
            let refused = step(&mut watch, 6, odd).unwrap_err();
            assert!(refused.starts_with("scalars must be names that are not empty"), "{refused}");
        }
        step(&mut watch, 6, &[]).unwrap();
        watch.finish().unwrap();
    }
    assert_eq!(lines(&path).len(), 2);
    let mut again = watch(Config::new());
    again.write_to(folder.path()).unwrap();
    let refused = step(&mut again, 6, &[]).unwrap_err();
    assert!(refused.contains("step 6 is not after step 6, the last one there"), "{refused}");
    assert!(refused.starts_with(path.to_str().unwrap()));
    step(&mut again, 7, &[]).unwrap();
    again.finish().unwrap();
    assert_eq!(lines(&path).len(), 3);

    let mut elsewhere = watch(Config::new());
    let file = folder.path().join("file");
    fs::write(&file, "something").unwrap();
    assert!(matches!(elsewhere.write_to(&file), Err(Error::Unwritable { .. })));
    assert!(JsonLines::open(&file).is_err());
}

/// A sink that fails does not hold up training; the end says so.
#[test]
fn a_step_that_is_lost_is_told_in_the_end() {
    let (sender, receiver) = mpsc::channel();
    drop(receiver);
    let mut watch = watch(Config::new());
    watch.sink(Listener(sender));
    take(&mut watch, 1, |_| {});
    take(&mut watch, 2, |_| {});
    assert!(matches!(watch.finish(), Err(Error::EntryLost { step: 1, .. })));
    take(&mut watch, 3, |_| {});
}

/// The lines and the checkpoint of a run that is interrupted, and one that goes on, are those of a run that is not.
#[test]
fn a_resumed_run_is_the_one_that_was_not_interrupted() {
    let folder = TempDir::new().unwrap();
    let clip = Clip::Percentile { percentile: 50.0, history: 16, max_norm: None };
    let make = |run: &str| {
        let mut watch = watch(Config::full().history(8).clip(clip));
        watch.write_to(folder.path().join(run)).unwrap();
        watch
    };
    let spoil = |step: u64| {
        move |gradients: &mut [Vec<f32>; 2]| {
            if (20..24).contains(&step) || step == 33 {
                gradients[1][5] = f32::NAN;
            }
        }
    };
    let run = |watch: &mut Watch, steps: std::ops::RangeInclusive<u64>| -> Vec<String> {
        let seen = steps.map(|step| take(watch, 3 * step, spoil(step)));
        seen.map(|seen| format!("{seen} {} {:?}", seen.report(), seen.changed())).collect()
    };
    let mut whole = make("whole");
    let all = run(&mut whole, 1..=40);
    whole.finish().unwrap();
    let checkpoint = folder.path().join("checkpoint");
    let mut first = make("parts");
    let before = run(&mut first, 1..=22);
    first.save(&checkpoint).unwrap();
    // What comes after the checkpoint is lost with the process, but not of the files.
    run(&mut first, 23..=26);
    first.finish().unwrap();
    drop(first);
    let mut second = make("parts");
    assert_eq!(second.restore(&checkpoint).unwrap(), 66);
    let after = run(&mut second, 23..=40);
    assert!(second.restore(&checkpoint).unwrap_err().to_string().contains("before the first step"));
    assert_eq!(second.wait().unwrap().unwrap().step(), 120);
    second.finish().unwrap();
    assert!(before.iter().chain(&after).eq(&all));
    let read = |run: &str| fs::read_to_string(folder.path().join(run).join("steps.jsonl")).unwrap();
    assert_eq!(read("parts"), read("whole"));
    let states = [&mut whole, &mut second].map(|watch| {
        watch.save(&checkpoint).unwrap();
        fs::read(&checkpoint).unwrap()
    });
    assert!(states[0] == states[1]);
}

#[test]
fn a_checkpoint_that_does_not_fit_changes_nothing() {
    let folder = TempDir::new().unwrap();
    let checkpoint = folder.path().join("checkpoint");
    let mut saved = watch(Config::full());
    take(&mut saved, 1, |_| {});
    assert!(saved.probe().health().unwrap().rules() != &Rules::default(), "by the rate");
    saved.save(&checkpoint).unwrap();
    let refused = |config: Config, path: &Path| {
        let mut watch = watch(config);
        let known = |watch: &mut Watch| {
            let rules = watch.probe().health().map(|health| health.rules().clone()).ok();
            (watch.probe().state().unwrap(), rules)
        };
        let before = known(&mut watch);
        let error = watch.restore(path).unwrap_err().to_string();
        assert!(known(&mut watch) == before, "{error}");
        error
    };
    assert!(refused(Config::full().history(3), &checkpoint).contains("`Config::history` is declared here"));
    assert!(refused(Config::new(), &checkpoint).contains("is not declared here"));
    let damaged = folder.path().join("damaged");
    let bytes = fs::read(&checkpoint).unwrap();
    fs::write(&damaged, &bytes[..bytes.len() - 1]).unwrap();
    assert!(refused(Config::full(), &damaged).contains("no state of a watched run"));
    fs::write(&damaged, [&[7], &bytes[1..]].concat()).unwrap();
    assert!(refused(Config::full(), &damaged).contains("it has version 7"));
    assert!(refused(Config::full(), &folder.path().join("nowhere")).contains("nowhere"));
    // Of another model.
    let plan = Plan::new([("other", DType::F32, 3)]).unwrap();
    let mut other = Watch::new(Probe::new(Cpu, plan, Config::full()).unwrap());
    let error = other.restore(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("\"0.weight\"") && error.contains("\"other\""), "{error}");
}

/// Copies that arrive late, as on a GPU: how many were begun and have arrived, and how often one was waited for that had not.
#[derive(Default)]
struct Copies {
    begun: AtomicU64,
    arrived: AtomicU64,
    waited: AtomicU64,
}

impl Copies {
    /// All but the last `late` have arrived.
    fn arrive(&self, late: u64) {
        let begun = self.begun.load(Ordering::Relaxed);
        self.arrived.fetch_max(begun.saturating_sub(late), Ordering::Relaxed);
    }
}

struct Late(Arc<Copies>);

struct LateRead {
    read: Box<dyn Read>,
    copies: Arc<Copies>,
    number: u64,
}

impl LateRead {
    fn has_arrived(&self) -> bool {
        self.number <= self.copies.arrived.load(Ordering::Relaxed)
    }
}

impl Read for LateRead {
    fn start(&mut self, from: &Buffer) -> Result<(), Error> {
        self.number = 1 + self.copies.begun.fetch_add(1, Ordering::Relaxed);
        self.read.start(from)
    }
    fn is_complete(&self) -> Result<bool, Error> {
        Ok(self.has_arrived())
    }
    fn wait(&self) -> Result<&[u8], Error> {
        self.copies.waited.fetch_add(u64::from(!self.has_arrived()), Ordering::Relaxed);
        self.read.wait()
    }
}

// SAFETY: the CPU's device, but for reads that take their time.
unsafe impl Altered for Late {
    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        Ok(Box::new(LateRead { read: Cpu.read(bytes)?, copies: Arc::clone(&self.0), number: 0 }))
    }
}

/// Gives the lines of what it is told.
struct Lines(mpsc::Sender<String>);

impl Sink for Lines {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        self.0.send(json_line(entry)).map_err(|error| Error::Drawing { reason: error.to_string() })
    }
}

/// The lines of a run whose copies come so many late, or never before its end, and how many of its steps are left out.
fn lines_of(config: Config, late: Option<u64>) -> (Vec<String>, u64) {
    let (sender, receiver) = mpsc::channel();
    let copies = Arc::new(Copies::default());
    let mut watch = Watch::new(Probe::new(OnCpu(Late(Arc::clone(&copies))), plan(), config).unwrap());
    watch.quiet();
    watch.sink(Lines(sender));
    watch.details(Cadence::every(5).unwrap()).unwrap();
    let mut told = String::new();
    for index in 0..60u64 {
        // Numbers that jump, a rate that rises now and then, and a step that is not finite.
        let step = index + 10 * (index / 7) + index.saturating_sub(40);
        let rate = 1e-3 * 2.5f64.powi(i32::try_from(index / 9).unwrap());
        let [mut first, mut second] = gradients(step);
        if index == 30 {
            second[3] = f32::NAN;
        }
        // A spike in the last step of a rate: the next rate is no reason to forget the norms before it.
        if index == 53 {
            first.iter_mut().chain(&mut second).for_each(|x| *x *= 1e3);
        }
        let seen = watch.step(step, &mut [&mut first, &mut second], [("lr", rate)]).unwrap();
        told.extend(seen.iter().filter_map(|seen| seen.changed().map(str::to_owned)));
        late.iter().for_each(|&late| copies.arrive(late));
    }
    assert_eq!(copies.waited.load(Ordering::Relaxed), 0, "a step never waits");
    let finished = watch.finish().unwrap();
    let lines: Vec<String> = receiver.iter().collect();
    assert_eq!((finished.written, finished.lost), (lines.len() as u64, 0));
    if late.is_some() {
        assert_eq!(told.matches("nan").count() > 0, lines.iter().any(|line| line.contains("\"kind\":\"nan\"")));
    }
    (lines, finished.dropped)
}

#[test]
fn reports_that_come_late_say_the_same() {
    for config in [Config::full(), Config::full().history(3).clip(Clip::auto_clip())] {
        let (at_once, dropped) = lines_of(config.clone(), Some(0));
        assert_eq!((at_once.len(), dropped), (60, 0));
        for late in [1, 2, 3] {
            let (lines, dropped) = lines_of(config.clone(), Some(late));
            assert_eq!(dropped, 0);
            for (line, expected) in lines.iter().zip(&at_once) {
                assert_eq!(line, expected, "{late} late");
            }
            assert_eq!(lines.len(), 60);
        }
    }
}

/// A host that is far ahead of its device: steps are left out and counted, and the others have their own numbers.
#[test]
fn steps_whose_reports_do_not_come_are_counted() {
    let (at_once, _) = lines_of(Config::new(), Some(0));
    let (lines, dropped) = lines_of(Config::new(), None);
    assert_eq!(lines.len() as u64 + dropped, 60);
    assert!(dropped >= 50 && lines.iter().all(|line| at_once.contains(line)), "{dropped}");
    assert_eq!((lines.first(), lines.last()), (at_once.first(), at_once.last()));
}
