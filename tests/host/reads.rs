//! Reports on their way from a device that fails now and then: an error is said, and what has not arrived comes later.
#![allow(unsafe_code, reason = "a device that passes on to that of the CPU")]

use crate::on_cpu::{Altered, OnCpu};
use gradprobe::{
    Config, Cpu, DType, Error, Plan, Probe,
    device::{Buffer, Device, Read},
};
use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

/// How many of the next calls of each kind fail.
#[derive(Default)]
struct Failures {
    start: AtomicU32,
    is_complete: AtomicU32,
    wait: AtomicU32,
}

fn fails(left: &AtomicU32) -> Result<(), Error> {
    let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
    taken.map_or(Ok(()), |_| Err(failure()))
}

fn failure() -> Error {
    Error::Driver { call: "a read", doing: "testing".to_owned(), code: "injected".to_owned() }
}

struct Unreliable(Arc<Failures>);

struct UnreliableRead(Box<dyn Read>, Arc<Failures>);

impl Read for UnreliableRead {
    fn start(&mut self, from: &Buffer) -> Result<(), Error> {
        fails(&self.1.start)?;
        self.0.start(from)
    }
    fn is_complete(&self) -> Result<bool, Error> {
        fails(&self.1.is_complete)?;
        self.0.is_complete()
    }
    fn wait(&self) -> Result<&[u8], Error> {
        fails(&self.1.wait)?;
        self.0.wait()
    }
}

// SAFETY: the CPU's device, but for reads that refuse to begin or to end.
unsafe impl Altered for Unreliable {
    fn read(&self, bytes: usize) -> Result<Box<dyn Read>, Error> {
        Ok(Box::new(UnreliableRead(Cpu.read(bytes)?, Arc::clone(&self.0))))
    }
}

fn probe() -> (Probe, Arc<Failures>) {
    let failures = Arc::new(Failures::default());
    let plan = Plan::new([("w", DType::F32, 2)]).unwrap();
    (Probe::new(OnCpu(Unreliable(Arc::clone(&failures))), plan, Config::new()).unwrap(), failures)
}

/// More errors than there are reads: none of the reads is lost.
const ERRORS: u32 = 9;

#[test]
fn no_error_of_a_poll_loses_a_read() {
    let (mut probe, failures) = probe();
    for kind in [&failures.start, &failures.is_complete, &failures.wait] {
        for _ in 0..ERRORS {
            kind.store(1, Ordering::Relaxed);
            probe.measure(&[&[3.0f32, 4.0]]).unwrap();
            assert_eq!(probe.poll().map(drop), Err(failure()));
        }
        probe.measure(&[&[3.0f32, 4.0]]).unwrap();
        let mut last = None;
        while let Some(report) = probe.poll().unwrap() {
            last = Some(report.step());
        }
        assert_eq!(last, Some(probe.wait().unwrap().step()));
    }
}

#[test]
fn a_wait_that_fails_returns_and_the_next_one_has_the_report() {
    let (mut probe, failures) = probe();
    for kind in [&failures.start, &failures.wait] {
        probe.measure(&[&[3.0f32, 4.0]]).unwrap();
        kind.store(ERRORS, Ordering::Relaxed);
        for _ in 0..ERRORS {
            assert_eq!(probe.wait().map(drop), Err(failure()));
        }
        assert_eq!(probe.wait().unwrap().outputs().total_norm, 5.0);
    }
    assert_eq!(probe.wait().unwrap().step(), 2);
}
