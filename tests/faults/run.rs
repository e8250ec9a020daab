//! A script of calls, run as often as it makes calls of the driver, and for each kind of fault: what must hold of every run.

use crate::driver::{Driver, driver};
use gradprobe::{Error, cudarc::driver::sys::CUresult};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process::abort,
    sync::{
        Mutex, PoisonError,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It fails, and the next does not.
    Fails,
    /// It finds no memory, and the next does.
    OutOfMemory,
    /// It finds the context lost, as after an illegal address.
    Lost,
    /// It finds the driver at its end, as when a process exits.
    Ended,
    /// What it queues comes late, after what is queued later in other streams; an event that has come is not yet seen.
    Late,
    /// From here on there is no memory.
    NoMemory,
    /// NCCL is in progress.
    InProgress,
    /// A collective hangs.
    Hangs,
    /// A peer is gone.
    PeerLost,
    /// The ranks come with other counts.
    OtherCount,
}

impl Kind {
    pub const ALL: [Self; 10] = [
        Self::Fails,
        Self::OutOfMemory,
        Self::Lost,
        Self::Ended,
        Self::Late,
        Self::NoMemory,
        Self::InProgress,
        Self::Hangs,
        Self::PeerLost,
        Self::OtherCount,
    ];

    /// As the host driver has it.
    fn planned(self) -> (u32, CUresult) {
        match self {
            Self::Fails => (0, CUresult::CUDA_ERROR_UNKNOWN),
            Self::OutOfMemory => (0, CUresult::CUDA_ERROR_OUT_OF_MEMORY),
            Self::Lost => (1, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS),
            Self::Ended => (1, CUresult::CUDA_ERROR_DEINITIALIZED),
            Self::Late => (2, CUresult::CUDA_SUCCESS),
            Self::NoMemory => (3, CUresult::CUDA_SUCCESS),
            Self::InProgress => (4, CUresult::CUDA_SUCCESS),
            Self::Hangs => (5, CUresult::CUDA_SUCCESS),
            Self::PeerLost => (6, CUresult::CUDA_SUCCESS),
            Self::OtherCount => (7, CUresult::CUDA_SUCCESS),
        }
    }

    /// Whether the call of this name in this place can have it.
    fn befalls(self, call: &str, place: usize) -> bool {
        const QUEUEING: [&str; 9] = [
            "cuMemsetD8Async",
            "cuMemcpyHtoDAsync_v2",
            "cuMemcpyDtoHAsync_v2",
            "cuMemFreeAsync",
            "cuLaunchKernel",
            "cuEventRecord",
            "cuStreamWaitEvent",
            "cuEventQuery",
            "cuGraphLaunch",
        ];
        let is_short = std::env::var("GRADPROBE_SHORT").as_deref() == Ok("1");
        let is_collective = ["ncclAllReduce", "ncclAllGather"].contains(&call);
        match self {
            Self::Fails => true,
            // Where time is short, every second call loses the context; each fails.
            Self::Lost => !is_short || place.is_multiple_of(2),
            // As a lost context and an error, with another code: left out where time is short.
            Self::Ended => !is_short,
            Self::OutOfMemory => !call.starts_with("nccl") && (!is_short || call.contains("Alloc")),
            Self::Late => QUEUEING.contains(&call) || is_collective,
            Self::NoMemory => call.contains("Alloc") && !call.starts_with("nccl"),
            Self::InProgress => call.starts_with("nccl"),
            Self::Hangs | Self::PeerLost | Self::OtherCount => is_collective,
        }
    }

    /// Whether no call works any more.
    fn is_lost(self) -> bool {
        matches!(self, Self::Lost | Self::Ended)
    }

    /// Whether ranks wait in vain from here on.
    pub fn is_of_peers(self) -> bool {
        matches!(self, Self::Hangs | Self::PeerLost | Self::OtherCount)
    }
}

/// A run of a script.
pub struct Run {
    driver: &'static Driver,
    fault: Option<(usize, Kind)>,
    /// What each check gave in the run without a fault.
    expected: Vec<Vec<u8>>,
    found: Vec<Vec<u8>>,
    /// Each error, and what was called.
    errors: Vec<(&'static str, Error)>,
    complaints: Vec<String>,
}

impl Run {
    /// Whether the fault has come.
    fn has_failed(&self) -> bool {
        self.fault.is_some_and(|(call, _)| self.driver.count() > call)
    }

    /// A call of the library's, as a trainer makes it, who goes on after an error.
    pub fn call<T>(&mut self, what: &'static str, call: impl FnOnce() -> Result<T, Error>) -> Option<T> {
        let was_lost = self.has_failed() && self.kind().is_some_and(Kind::is_lost);
        self.driver.exempt(false);
        let result = call();
        self.driver.exempt(true);
        match result {
            Ok(_) if was_lost => {
                self.complaints.push(format!("{what} gave no error, though all is lost"));
                None
            }
            Ok(value) => Some(value),
            Err(error) => {
                self.errors.push((what, error));
                None
            }
        }
    }

    /// What is made by a call, which is made again when it fails.
    pub fn made<T>(&mut self, what: &'static str, mut make: impl FnMut() -> Result<T, Error>) -> Option<T> {
        let made = self.call(what, &mut make);
        if made.is_some() {
            return made;
        }
        self.driver.give_memory();
        self.call(what, make)
    }

    /// Drops what the library has made.
    pub fn end<T>(&mut self, made: T) {
        self.driver.exempt(false);
        drop(made);
        self.driver.exempt(true);
    }

    /// The right bits after all, or an error: what `ask` gives must be as in the run without a fault, the second time at the
    /// latest.
    pub fn check(&mut self, what: &'static str, mut ask: impl FnMut() -> Result<Vec<u8>, Error>) {
        self.driver.give_memory();
        let found = self.call(what, &mut ask).or_else(|| {
            self.driver.give_memory();
            self.call(what, ask)
        });
        let may_have_none = self.kind().is_some_and(|kind| kind.is_lost() || kind.is_of_peers());
        match found {
            Some(found) if self.expected_next().is_some_and(|expected| *expected != found) => {
                self.complain(&format!("{what} gave other bits"));
            }
            None if !may_have_none => self.complain(&format!("{what} gave nothing after the fault was over")),
            found => return self.found.push(found.unwrap_or_default()),
        }
        self.found.push(Vec::new());
    }

    /// As far as there are such reports, they are those without a fault.
    pub fn compare(&mut self, what: &'static str, reports: Vec<u8>) {
        if self.expected_next().is_some_and(|expected| !expected.starts_with(&reports)) {
            self.complain(&format!("{what} gave other bits"));
        }
        self.found.push(reports);
    }

    fn expected_next(&self) -> Option<&Vec<u8>> {
        self.expected.get(self.found.len())
    }

    pub fn kind(&self) -> Option<Kind> {
        self.fault.map(|(_, kind)| kind)
    }

    pub fn has_an_error(&self) -> bool {
        !self.errors.is_empty()
    }

    pub fn complain(&mut self, complaint: &str) {
        self.complaints.push(complaint.to_owned());
    }
}

/// What the trainer does itself: calls of this thread that are not counted, and fail only when the context is lost.
pub fn own<T>(act: impl FnOnce() -> T) -> T {
    let driver = driver().expect("it runs on it");
    driver.exempt(true);
    act()
}

/// The same, within a call of the library's.
pub fn aside<T>(act: impl FnOnce() -> T) -> T {
    let done = own(act);
    driver().expect("it runs on it").exempt(false);
    done
}

/// Ends the process if a run takes longer than any should.
struct Watchdog(#[expect(dead_code, reason = "its drop is what counts")] Sender<()>);

impl Watchdog {
    fn new(of: String) -> Self {
        let (alive, ended) = channel();
        thread::spawn(move || {
            if ended.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{of}: hangs");
                abort();
            }
        });
        Self(alive)
    }
}

/// Runs a script without a fault, and then with each fault of each of its calls.
pub fn fail_every_call(name: &str, script: impl Fn(&mut Run)) {
    static ALONE: Mutex<()> = Mutex::new(());
    let Some(driver) = driver() else { return };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let run = |fault: Option<(usize, Kind)>, expected: Vec<Vec<u8>>| {
        let of = fault.map_or(name.to_owned(), |(call, kind)| format!("{name}, call {call}, {kind:?}"));
        let _watchdog = Watchdog::new(of.clone());
        let (errors, complaints, found) = Default::default();
        let mut run = Run { driver, fault, expected, found, errors, complaints };
        driver.exempt(true);
        driver.begin(fault.map(|(call, kind)| (call, kind.planned())));
        let done = catch_unwind(AssertUnwindSafe(|| script(&mut run)));
        let calls = driver.end();
        if let Err(panic) = done {
            let call = fault.and_then(|(call, _)| calls.get(call)).map_or("", String::as_str);
            eprintln!("{of} ({call}): panics");
            resume_unwind(panic);
        }
        (run, calls)
    };
    let (without, calls) = run(None, Vec::new());
    assert!(without.errors.is_empty() && driver.left().is_empty(), "{name}: {:?}, {}", without.errors, driver.left());
    assert!(!without.found.is_empty(), "{name}: nothing is checked");
    let mut faults = 0;
    let mut wrong = Vec::new();
    for (index, call) in calls.iter().enumerate() {
        for kind in Kind::ALL.into_iter().filter(|kind| kind.befalls(call, index)) {
            let (with, seen) = run(Some((index, kind)), without.found.clone());
            let differs = seen.iter().zip(&calls).take(index + 1).position(|(seen, call)| seen != call);
            assert!(
                seen.len() > index && differs.is_none(),
                "{name}, {kind:?} of call {index}: calls differ, {:?} from {:?}",
                around(&seen, differs.unwrap_or(index)),
                around(&calls, differs.unwrap_or(index)),
            );
            faults += 1;
            // A communicator is aborted by a thread of its own.
            let since = Instant::now();
            while !driver.left().is_empty() && since.elapsed() < Duration::from_secs(10) {
                thread::sleep(Duration::from_millis(1));
            }
            let complaints = complaints(&with, kind, call, &driver.left());
            let errors =
                || with.errors.iter().map(|(what, error)| format!("\n        {what}: {error}")).collect::<String>();
            wrong.extend(complaints.iter().map(|it| format!("call {index}, {call}, {kind:?}: {it}{}", errors())));
        }
    }
    println!("{name}: {} calls, {faults} faults", calls.len());
    assert!(wrong.is_empty(), "{name}: {} complaints\n    {}", wrong.len(), wrong.join("\n    "));
}

/// Some calls before and after one.
fn around(calls: &[String], index: usize) -> &[String] {
    &calls[index.saturating_sub(12).min(calls.len())..(index + 6).min(calls.len())]
}

/// What is wrong with a run.
fn complaints(run: &Run, kind: Kind, call: &str, left: &str) -> Vec<String> {
    let mut complaints = run.complaints.clone();
    // What is left would be found again after each run that follows.
    assert!(left.is_empty(), "{kind:?} of {call}: {left} left; {:?}", run.errors);
    match kind {
        // The next call succeeds, so that there is one error, beside those of calls that need what the first should have done.
        // There is none where something was dropped, which has asked again.
        Kind::Fails | Kind::OutOfMemory => {
            if run.has_an_error() && !tells(&run.errors, call, kind) {
                complaints.push("no error tells of it".to_owned());
            }
            let follows = |error: &Error| matches!(error, Error::NotMeasured | Error::TooFewSteps { .. });
            if run.errors.iter().filter(|(_, error)| !follows(error)).count() > 1 {
                complaints.push("more errors than one".to_owned());
            }
        }
        Kind::Late | Kind::InProgress if run.has_an_error() => {
            complaints.push("an error, though nothing failed".to_owned())
        }
        Kind::NoMemory => {
            let other = run.errors.iter().any(|(_, error)| !matches!(error, Error::OutOfMemory { .. }));
            complaints.extend(other.then(|| "another error than that memory is out".to_owned()));
        }
        _ => {}
    }
    complaints
}

/// Whether an error says which call failed, and what with.
fn tells(errors: &[(&'static str, Error)], call: &str, kind: Kind) -> bool {
    // That of the mode of captures changes nothing, and a release is done whatever it returns.
    const HARMLESS: [&str; 6] = [
        "cuThreadExchangeStreamCaptureMode",
        "cuEventDestroy_v2",
        "cuModuleUnload",
        "cuMemFreeHost",
        "cuMemFreeAsync",
        "cuMemFree_v2",
    ];
    // cudarc makes these before others, and for slices beside them.
    const OF_CUDARC: [&str; 4] = ["cuCtxGetCurrent", "cuCtxSetCurrent", "cuEventRecord", "cuStreamWaitEvent"];
    let code = format!("{:?}", kind.planned().1);
    let name = call.trim_end_matches("_v2");
    HARMLESS.contains(&call)
        || errors.iter().any(|(_, error)| match error {
            Error::Driver { call: said, code: with, .. } => {
                *with == code && (*said == name || OF_CUDARC.contains(&call))
            }
            Error::OutOfMemory { .. } => kind == Kind::OutOfMemory,
            Error::KernelLoad(text) => call == "cuModuleLoadData" && text.contains(&code),
            Error::Communication { what } => call.starts_with("nccl") && what.contains("ncclSystemError"),
            _ => false,
        })
}
