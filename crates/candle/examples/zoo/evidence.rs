//! Whether a run is what it is called, by held-out losses alone.

use crate::{
    Result,
    architecture::Architecture,
    cases::Case,
    training::{self, History, Window},
};
use std::collections::BTreeMap;

/// The seed of all runs, and that of the other training each architecture is compared with.
const SEEDS: [u64; 2] = [1, 2];
/// Steps whose losses make that at the end, so that a single step does not decide.
const END: usize = 10;
/// What a healthy training must at least have lost of its loss.
const LEARNED: f32 = 0.1;
/// By how much of the gain a healthy training may end above that with another seed.
const SCATTER: f32 = 0.15;
/// By how much of the gain a faulty training must end above the healthy ones.
const HARM: f32 = 0.1;

/// How a run went, in words, and whether that is what it is called.
pub struct Evidence {
    pub text: String,
    pub accepted: bool,
}

/// The healthy trainings of each architecture, with both seeds.
pub struct Twins {
    /// First steps of the healthy windows.
    starts: BTreeMap<Architecture, Vec<usize>>,
    trained: BTreeMap<Architecture, [History; 2]>,
}

impl Twins {
    pub fn new(cases: &[Case]) -> Self {
        let mut starts: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for case in cases.iter().filter(|case| case.fault.is_none()) {
            starts.entry(case.architecture).or_default().push(case.first_step);
        }
        Self { starts, trained: BTreeMap::new() }
    }

    /// Trains the run and its twins, and gives its window.
    pub fn examine(&mut self, case: &Case) -> Result<(Evidence, Window)> {
        let architecture = case.architecture;
        if !self.trained.contains_key(&architecture) {
            let starts = self.starts.get(&architecture).map_or(&[][..], |starts| starts);
            let [first, second] = SEEDS.map(|seed| training::train(architecture, seed, None, starts));
            self.trained.insert(architecture, [first?, second?]);
        }
        let [twin, other] = &self.trained[&architecture];
        let Some(fault) = case.fault else {
            let window = twin.windows.get(&case.first_step).cloned().ok_or("a window lies beyond the training")?;
            return Ok((of_healthy(twin, other), window));
        };
        let mut faulty = training::train(architecture, SEEDS[0], Some((fault, case.moment())), &[case.first_step])?;
        let window = faulty.windows.remove(&case.first_step).ok_or("a window lies beyond the training")?;
        Ok((of_faulty(&faulty, twin, other, case), window))
    }
}

/// The loss at first and at last.
fn ends(history: &History) -> (f32, f32) {
    let losses = &history.losses;
    let last = &losses[losses.len().saturating_sub(END)..];
    (losses[0], last.iter().sum::<f32>() / last.len() as f32)
}

fn is_healthy(twin: &History, other: &History) -> bool {
    let ((first, last), (_, last_of_other)) = (ends(twin), ends(other));
    last <= (1.0 - LEARNED) * first && last - last_of_other <= SCATTER * (first - last)
}

fn of_healthy(twin: &History, other: &History) -> Evidence {
    let [first, last, other_first, other_last] = {
        let ((first, last), (other_first, other_last)) = (ends(twin), ends(other));
        [first, last, other_first, other_last].map(number)
    };
    let steps = twin.losses.len() - 1;
    let text = format!("loss {first} to {last} in {steps} steps; another seed {other_first} to {other_last}");
    Evidence { text, accepted: is_healthy(twin, other) }
}

fn of_faulty(faulty: &History, twin: &History, other: &History, case: &Case) -> Evidence {
    let ((first, last), (twin_first, twin_last), (_, other_last)) = (ends(faulty), ends(twin), ends(other));
    let gain = twin_first - twin_last;
    let harmed =
        |loss: f32, healthy: [f32; 2]| loss.is_nan() || healthy.iter().all(|healthy| loss - healthy >= HARM * gain);
    let at_the_end = harmed(last, [twin_last, other_last]);
    let mut right_after = false;
    let mut words = String::new();
    if case.moment() > case.first_step {
        let [loss, twin, other] = [faulty, twin, other].map(|history| history.losses[case.moment() + 1]);
        right_after = harmed(loss, [twin, other]);
        words = format!("; right after the fault {} against {} and {}", number(loss), number(twin), number(other));
    }
    let when = match (right_after, at_the_end) {
        (true, true) => "harmed right after the fault and at the end",
        (true, false) => "harmed right after the fault",
        (false, true) => "harmed at the end",
        (false, false) => "not harmed",
    };
    let steps = faulty.losses.len() - 1;
    let [first, last, twin_first, twin_last, other_last] = [first, last, twin_first, twin_last, other_last].map(number);
    let text = format!(
        "loss {first} to {last} in {steps} steps; its healthy twin {twin_first} to {twin_last}, another seed to \
         {other_last}{words}; {when}"
    );
    Evidence { text, accepted: is_healthy(twin, other) && (right_after || at_the_end) }
}

/// Few digits, of however large a loss.
fn number(loss: f32) -> String {
    if loss.abs() < 1e4 { format!("{loss:.4}") } else { format!("{loss:.3e}") }
}
