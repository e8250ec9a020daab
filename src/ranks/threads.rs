//! Ranks that are threads of one process.

use super::Transport;
use crate::Error;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The end of one rank among threads of a process: for training on several threads, and for tests of what else runs on
/// many machines.
#[derive(Debug)]
pub struct ThreadCommunicator {
    rank: u32,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What each rank has given to the gathering under way.
    given: Vec<Option<Vec<u8>>>,
    /// What the last gathering gave, and how many ranks have yet to take it.
    gathered: Arc<Result<Vec<u8>, Error>>,
    to_take: usize,
    /// A rank that is no more.
    gone: Option<u32>,
}

impl ThreadCommunicator {
    /// One for each of this many ranks, in their order.
    pub fn group(ranks: u32) -> Vec<Self> {
        let state = State {
            given: (0..ranks).map(|_| None).collect(),
            gathered: Arc::new(Ok(Vec::new())),
            to_take: 0,
            gone: None,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        (0..ranks).map(|rank| Self { rank, shared: Arc::clone(&shared) }).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // State is whole between any two statements that could panic.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> Result<MutexGuard<'a, State>, Error> {
        match state.gone {
            Some(rank) => Err(Error::Communication { what: format!("rank {rank} is gone") }),
            None => Ok(self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner)),
        }
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
        let mut state = self.state();
        while state.to_take > 0 {
            state = self.wait(state)?;
        }
        state.given[self.rank as usize] = Some(own.to_vec());
        if state.given.iter().all(Option::is_some) {
            let parts: Vec<Vec<u8>> = state.given.iter_mut().filter_map(Option::take).collect();
            let differs = (0u32..).zip(&parts).find(|(_, part)| part.len() != parts[0].len());
            let differs =
                differs.map(|(rank, part)| format!("rank {rank} gave {} bytes, rank 0 {}", part.len(), parts[0].len()));
            state.gathered = Arc::new(differs.map_or(Ok(parts.concat()), |what| Err(Error::Communication { what })));
            state.to_take = parts.len();
            self.shared.changed.notify_all();
        }
        while state.to_take == 0 {
            state = self.wait(state)?;
        }
        let gathered = Arc::clone(&state.gathered);
        state.to_take -= 1;
        if state.to_take == 0 {
            self.shared.changed.notify_all();
        }
        drop(state);
        Result::clone(&gathered)
    }
}

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        self.state().gone = Some(self.rank);
        self.shared.changed.notify_all();
    }
}
