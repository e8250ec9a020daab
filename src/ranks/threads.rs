//! Ranks that are threads of one process.

use super::{DEADLINE, LONGEST_WAIT, Transport};
use crate::Error;
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Connects ranks that are threads of one process: for training on several threads, and for tests of code that else
/// runs on many machines.
#[derive(Debug)]
pub struct ThreadCommunicator {
    rank: u32,
    deadline: Duration,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The bytes of each rank in the gathering under way.
    given: Vec<Option<Vec<u8>>>,
    /// The result of the last gathering, and the number of ranks that have yet to take it.
    gathered: Arc<[u8]>,
    to_take: usize,
    /// The reason for which every further call fails.
    over: Option<String>,
}

impl ThreadCommunicator {
    /// Makes one for each of this many ranks, in their order.
    pub fn group(ranks: u32) -> Vec<Self> {
        let state =
            State { given: (0..ranks).map(|_| None).collect(), gathered: Arc::default(), to_take: 0, over: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        (0..ranks).map(|rank| Self { rank, deadline: DEADLINE, shared: Arc::clone(&shared) }).collect()
    }

    /// Sets the longest wait for other ranks, in place of ten minutes. After that every call fails, on all ranks.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline.min(LONGEST_WAIT);
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // State is whole between any two statements that could panic.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all calls, those of other ranks too.
    fn end(&self, mut state: MutexGuard<'_, State>, why: String) -> Error {
        let what = state.over.get_or_insert(why).clone();
        self.shared.changed.notify_all();
        Error::Communication { what }
    }

    /// Waits for a change, until then.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, until: Instant) -> Result<MutexGuard<'a, State>, Error> {
        if let Some(what) = state.over.clone() {
            return Err(Error::Communication { what });
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // It is not known which ranks have yet to take the last result.
            let missing = state.given.iter().position(Option::is_none).filter(|_| state.to_take == 0);
            let missing = missing.map_or("some rank".to_owned(), |rank| format!("rank {rank}"));
            let why = format!("{missing} has not come within {:?}", self.deadline);
            return Err(self.end(state, why));
        }
        Ok(self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Transport for ThreadCommunicator {
    fn rank(&self) -> u32 {
        self.rank
    }

    #[expect(clippy::cast_possible_truncation, reason = "made from a u32")]
    fn ranks(&self) -> u32 {
        self.state().given.len() as u32
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>, Error> {
        let until = Instant::now() + self.deadline;
        let mut state = self.state();
        if let Some(what) = state.over.clone() {
            return Err(Error::Communication { what });
        }
        while state.to_take > 0 {
            state = self.wait(state, until)?;
        }
        state.given[self.rank as usize] = Some(own.to_vec());
        if state.given.iter().all(Option::is_some) {
            let parts: Vec<Vec<u8>> = state.given.iter_mut().filter_map(Option::take).collect();
            if let Some(what) = super::odd_length(parts.iter().map(Vec::len)) {
                return Err(self.end(state, what));
            }
            state.gathered = parts.concat().into();
            state.to_take = parts.len();
            self.shared.changed.notify_all();
        }
        while state.to_take == 0 {
            state = self.wait(state, until)?;
        }
        let gathered = Arc::clone(&state.gathered);
        state.to_take -= 1;
        if state.to_take == 0 {
            self.shared.changed.notify_all();
        }
        drop(state);
        Ok(gathered.to_vec())
    }

    fn abort(&self) {
        self.end(self.state(), format!("rank {} has aborted", self.rank));
    }
}

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        self.end(self.state(), format!("rank {} is gone", self.rank));
    }
}
