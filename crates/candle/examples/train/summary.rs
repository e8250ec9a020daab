//! What is said at the end: the verdict over all steps, the worst of them in full, what is in the folder, and the cost.

use crate::options::Choice;
use gradprobe::{FindingKind, Verdict, health::Diagnosis, write::Finished};
use gradprobe_candle::WatchedStep;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    path::Path,
    time::Duration,
};

/// Times of all steps together.
pub struct Costs {
    pub steps: Duration,
    /// Of gradprobe in them, its optimizer included.
    pub gradprobe: Duration,
    /// Of candle's optimizer, in them or beside them.
    pub candle: Duration,
    pub optimizer: Choice,
}

/// Adds up what the reports said.
#[derive(Default)]
pub struct Summary {
    steps: u64,
    unhealthy: u64,
    skipped: u64,
    clipped: u64,
    /// Steps with findings of each kind.
    found: BTreeMap<FindingKind, u64>,
    /// The first of the worst.
    worst: Option<Diagnosis>,
}

impl Summary {
    pub fn add(&mut self, seen: &WatchedStep, diagnosis: &Diagnosis) {
        let verdict = diagnosis.verdict();
        self.steps += 1;
        self.unhealthy += u64::from(verdict != Verdict::Healthy);
        self.skipped += u64::from(seen.skip());
        self.clipped += u64::from(seen.coefficient() != 1.0);
        for kind in diagnosis.findings().iter().map(|finding| finding.kind).collect::<BTreeSet<_>>() {
            *self.found.entry(kind).or_default() += 1;
        }
        if verdict > self.verdict() {
            self.worst = Some(diagnosis.clone());
        }
    }

    fn verdict(&self) -> Verdict {
        self.worst.as_ref().map_or(Verdict::Healthy, Diagnosis::verdict)
    }

    /// All of it as text. `losses` are the means at both ends of the run.
    pub fn text(&self, losses: (f32, f32), costs: &Costs, finished: &Finished, folder: &Path) -> String {
        let mut text = String::new();
        if let Some(worst) = &self.worst {
            let _ = write!(text, "\n{worst}");
        }
        let steps = f64::from(u32::try_from(self.steps.max(1)).unwrap_or(u32::MAX));
        let each = |time: Duration| 1e3 * time.as_secs_f64() / steps;
        let Self { steps, unhealthy, skipped, clipped, .. } = self;
        let found: Vec<String> = self.found.iter().map(|(kind, steps)| format!("{kind} in {steps}")).collect();
        let found = if found.is_empty() { String::new() } else { format!(" ({})", found.join(", ")) };
        let _ = writeln!(text, "\nverdict: {}; {unhealthy} of {steps} steps unhealthy{found}", self.verdict());
        let _ = writeln!(
            text,
            "loss: {:.4} at first, {:.4} at last; {clipped} steps clipped, {skipped} skipped",
            losses.0, losses.1
        );
        let share = |more: f64| 100.0 * more / costs.steps.as_secs_f64();
        let [step, gradprobe, candle] = [costs.steps, costs.gradprobe, costs.candle].map(each);
        let _ = write!(text, "step: {step:.2} ms, of which gradprobe {gradprobe:.2} ms");
        let more = costs.gradprobe.as_secs_f64();
        let _ = match costs.optimizer {
            Choice::Gradprobe => writeln!(text, ", AdamW among it"),
            Choice::Candle => writeln!(text, ": overhead {:.2} %; candle's AdamW {candle:.2} ms", share(more)),
            Choice::Both => {
                let more = share(more - costs.candle.as_secs_f64());
                writeln!(text, ", AdamW among it; candle's AdamW and nothing else {candle:.2} ms: overhead {more:.2} %")
            }
        };
        let _ = writeln!(text, "written to {}: {}", folder.display(), files(folder));
        if finished.dropped > 0 {
            let _ = writeln!(text, "{} steps were dropped: the disk is too slow", finished.dropped);
        }
        text
    }
}

/// The names of what was written.
fn files(folder: &Path) -> String {
    let pictures =
        fs::read_dir(folder.join("pictures")).into_iter().flatten().filter_map(|file| Some(file.ok()?.file_name()));
    let mut pictures: Vec<String> = pictures.map(|name| name.to_string_lossy().into_owned()).collect();
    pictures.sort();
    format!("report.html, steps.jsonl, tensorboard, pictures ({})", pictures.join(", "))
}
