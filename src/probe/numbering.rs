//! The trainer's step numbers. A device counts measurements, from 1; a trainer may begin anywhere and leave steps out.

use super::state::LAST;
use crate::Error;
use std::collections::VecDeque;

/// Measurements with a step that is not one more than the last, and that step; the oldest first.
pub(super) type Jumps = Vec<(u64, u64)>;

/// Knows the step of each measurement.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbering {
    /// Measurements launched so far, as far as the host knows. It does not see replayed graphs.
    measured: u64,
    /// [`Jumps`].
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

    /// Counts another launched measurement.
    pub fn launched(&mut self) {
        self.measured += 1;
    }

    /// Takes note of a measurement that was read.
    pub fn seen(&mut self, measurement: u64) {
        self.measured = self.measured.max(measurement);
    }

    /// Sets the step of the next measurement. The numbers of those before `oldest` are no longer needed.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] when the step is not above the last.
    pub fn set_next(&mut self, step: u64, oldest: u64) -> Result<(), Error> {
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
        while self.jumps.get(1).is_some_and(|&(first, _)| first <= oldest) {
            self.jumps.pop_front();
        }
        Ok(())
    }

    /// Measurements so far.
    pub fn measured(&self) -> u64 {
        self.measured
    }

    /// The jumps, for [`restored`](Self::restored).
    pub fn jumps(&self) -> Jumps {
        self.jumps.iter().copied().collect()
    }

    /// Makes the numbering that goes on after so many measurements. `None` for numbers that do not rise or are too
    /// large.
    pub fn restored(measured: u64, jumps: &[(u64, u64)]) -> Option<Self> {
        let rises = |pair: &[(u64, u64)]| {
            let (first, then) = (pair[0], pair[1]);
            then.0 > first.0 && then.1 > first.1 && then.1 - first.1 >= then.0 - first.0
        };
        // One jump may be to a step that has not been measured.
        let fits = |&(measurement, step): &(u64, u64)| measurement <= measured + 1 && step <= LAST;
        let restored = Self { measured, jumps: jumps.iter().copied().collect() };
        (measured <= LAST && jumps.iter().all(fits) && jumps.windows(2).all(rises)).then_some(restored)
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
            numbering.set_next(step, 0).unwrap();
            numbering.launched();
            steps.push(step);
        }
        assert!(steps.iter().zip(1..).all(|(&step, measurement)| numbering.of(measurement) == step));
        assert!(numbering.set_next(1000, 0).is_err());
        assert_eq!(numbering.of(10), 1001, "and goes on by one");
        // A step that failed before its launch may get another number.
        numbering.set_next(2000, 0).unwrap();
        numbering.set_next(1001, 0).unwrap();
        assert_eq!(numbering.of(10), 1001);
    }

    #[test]
    fn no_more_is_kept_than_is_asked_for() {
        let mut numbering = Numbering::default();
        for step in 1..=1000 {
            numbering.set_next(10 * step, step.saturating_sub(4)).unwrap();
            numbering.launched();
        }
        assert!(numbering.jumps.len() <= 6, "{}", numbering.jumps.len());
        assert!((996..=1000).all(|measurement| numbering.of(measurement) == 10 * measurement));
        let restored = Numbering::restored(1000, &numbering.jumps()).unwrap();
        assert_eq!((restored.of(1000), restored.of(1001)), (10_000, 10_001));
        let odd: [&[(u64, u64)]; 5] =
            [&[(3, 5), (2, 7)], &[(3, 5), (4, 5)], &[(3, 5), (6, 7)], &[(9, 10)], &[(2, u64::MAX)]];
        assert!(odd.iter().all(|jumps| Numbering::restored(7, jumps).is_none()));
    }
}
