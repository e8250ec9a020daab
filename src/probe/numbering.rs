//! The trainer's numbers of the steps. A device counts measurements, from 1; a trainer may begin anywhere and leave steps out.

use super::state::LAST;
use crate::Error;
use std::collections::VecDeque;

/// Which step each measurement is of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbering {
    /// Measurements launched so far, as far as the host knows: graphs are replayed without it.
    measured: u64,
    /// Measurements whose steps are not one more than that of the measurement before, the oldest first.
    jumps: VecDeque<(u64, u64)>,
}

impl Numbering {
    /// The step of a measurement.
    pub fn of(&self, measurement: u64) -> u64 {
        let after = self.jumps.partition_point(|&(first, _)| first <= measurement);
        match after.checked_sub(1).map(|index| self.jumps[index]) {
            Some((first, step)) => step + (measurement - first),
            None => measurement,
        }
    }

    /// Another measurement was launched.
    pub fn launched(&mut self) {
        self.measured += 1;
    }

    /// A measurement has been seen.
    pub fn seen(&mut self, measurement: u64) {
        self.measured = self.measured.max(measurement);
    }

    /// The next measurement is of this step. Of earlier ones, so many are still asked for.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] when the step is not after the last.
    pub fn set_next(&mut self, step: u64, kept: u64) -> Result<(), Error> {
        let last = self.of(self.measured);
        if step > LAST || self.measured > 0 && step <= last {
            let value = if step > LAST { step.to_string() } else { format!("{step} after {last}") };
            return Err(Error::InvalidConfig {
                option: "step",
                expected: "after the last one, and at most 2^62",
                value,
            });
        }
        let next = self.measured + 1;
        if self.jumps.back().is_some_and(|&(first, _)| first == next) {
            self.jumps.pop_back();
        }
        if self.of(next) != step {
            self.jumps.push_back((next, step));
        }
        let oldest = next.saturating_sub(kept);
        while self.jumps.get(1).is_some_and(|&(first, _)| first <= oldest) {
            self.jumps.pop_front();
        }
        Ok(())
    }

    /// Goes on after this measurement, which was of that step.
    pub fn restore(&mut self, measurement: u64, step: u64) {
        self.measured = measurement;
        self.jumps = VecDeque::from([(measurement, step)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_have_the_numbers_of_their_steps() {
        let mut numbering = Numbering::default();
        let mut steps = Vec::new();
        for step in [0, 1, 2, 10, 20, 30, 31, 32, 1000] {
            numbering.set_next(step, 100).unwrap();
            numbering.launched();
            steps.push(step);
        }
        assert!(steps.iter().zip(1..).all(|(&step, measurement)| numbering.of(measurement) == step));
        assert!(numbering.set_next(1000, 100).is_err());
        assert_eq!(numbering.of(10), 1001, "and goes on by one");
        // A step that failed before it was launched may be another one.
        numbering.set_next(2000, 100).unwrap();
        numbering.set_next(1001, 100).unwrap();
        assert_eq!(numbering.of(10), 1001);
    }

    #[test]
    fn no_more_is_kept_than_is_asked_for() {
        let mut numbering = Numbering::default();
        for step in 1..=1000 {
            numbering.set_next(10 * step, 4).unwrap();
            numbering.launched();
        }
        assert!(numbering.jumps.len() <= 6, "{}", numbering.jumps.len());
        assert!((996..=1000).all(|measurement| numbering.of(measurement) == 10 * measurement));
        numbering.restore(7, 70);
        assert_eq!((numbering.of(7), numbering.of(8)), (70, 71));
    }
}
