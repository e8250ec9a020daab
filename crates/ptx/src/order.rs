//! What happened before what, among the threads of a launch: barriers order the threads of a block; between blocks nothing
//! does but an atomic operation that releases and one that reads it and acquires (PTX ISA, "Memory Consistency
//! Model": release and acquire patterns, base causality order).
//!
//! Time in a block is its epoch, the number of barriers it has passed, and in a thread the number of its releases in that
//! epoch. A block knows of another up to an epoch, and of single threads of it up to one of their releases.

use std::{collections::HashMap, rc::Rc};

/// The thread of an access that several threads made.
pub const SEVERAL: u16 = u16::MAX;

/// Who accessed something, and when. The default is nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    pub block: u32,
    pub thread: u16,
    /// Epoch, and below it the releases of the thread; 0 is never.
    time: u64,
}

const RELEASE_BITS: u32 = 32;

impl Stamp {
    pub fn is_none(self) -> bool {
        self.time == 0
    }

    fn epoch(self) -> u32 {
        (self.time >> RELEASE_BITS) as u32
    }

    /// Whether a release by this thread of the same block in this epoch, made now, orders it.
    pub fn is_released_by(self, thread: u16, epoch: u32) -> bool {
        self.thread == thread || self.epoch() < epoch
    }

    /// One stamp for this and a later access of the same block. Of several threads in one epoch it no longer says which.
    pub fn merged_with(self, later: Self) -> Self {
        if self.epoch() == later.epoch() && self.thread != later.thread {
            Self { thread: SEVERAL, ..later }
        } else {
            later
        }
    }
}

/// What a thread can rely on having happened.
#[derive(Clone, Debug, Default)]
pub struct Knowledge {
    /// By block: all its epochs before this one.
    epochs: HashMap<u32, u32>,
    /// By block and thread: up to this time.
    threads: HashMap<(u32, u16), u64>,
    /// By address: all atomic operations there until this moment of the launch.
    atomics: HashMap<u64, u64>,
}

impl Knowledge {
    pub fn join(&mut self, other: &Self) {
        for (&block, &epoch) in &other.epochs {
            let known = self.epochs.entry(block).or_default();
            *known = (*known).max(epoch);
        }
        for (&thread, &time) in &other.threads {
            let known = self.threads.entry(thread).or_default();
            *known = (*known).max(time);
        }
        for (&address, &now) in &other.atomics {
            let known = self.atomics.entry(address).or_default();
            *known = (*known).max(now);
        }
    }

    fn is_empty(&self) -> bool {
        self.epochs.is_empty() && self.threads.is_empty() && self.atomics.is_empty()
    }

    fn covers(&self, stamp: Stamp) -> bool {
        self.epochs.get(&stamp.block).is_some_and(|&epoch| epoch > stamp.epoch())
            || self.threads.get(&(stamp.block, stamp.thread)).is_some_and(|&time| time >= stamp.time)
    }
}

/// The clock of one block.
#[derive(Debug)]
pub struct Clock {
    block: u32,
    epoch: u32,
    /// What all its threads know since the last barrier.
    base: Rc<Knowledge>,
    /// When a load of any thread could last have been stale.
    acquired_at: u64,
    /// What single threads did since then, few as they are.
    threads: Vec<ThreadClock>,
}

#[derive(Debug, Default)]
struct ThreadClock {
    thread: u16,
    releases: u64,
    /// Known beyond the block's base.
    acquired: Knowledge,
    /// Released by what the thread has read, for a fence to acquire.
    observed: Knowledge,
    /// Known at its last fence, for an atomic operation to release.
    fenced: Option<Knowledge>,
    acquired_at: u64,
}

impl Clock {
    pub fn new(block: u32) -> Self {
        Self { block, epoch: 1, base: Rc::default(), acquired_at: 0, threads: Vec::new() }
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    fn of(&self, thread: u16) -> Option<&ThreadClock> {
        self.threads.iter().find(|clock| clock.thread == thread)
    }

    fn of_mut(&mut self, thread: u16) -> &mut ThreadClock {
        let index = self.threads.iter().position(|clock| clock.thread == thread).unwrap_or_else(|| {
            self.threads.push(ThreadClock { thread, ..ThreadClock::default() });
            self.threads.len() - 1
        });
        &mut self.threads[index]
    }

    /// An access by this thread now.
    pub fn stamp(&self, thread: u16) -> Stamp {
        let releases = self.of(thread).map_or(0, |clock| clock.releases);
        Stamp { block: self.block, thread, time: u64::from(self.epoch) << RELEASE_BITS | releases }
    }

    /// Whether an access happened before whatever this thread does now.
    pub fn knows(&self, thread: u16, stamp: Stamp) -> bool {
        if stamp.is_none() {
            return true;
        }
        if stamp.block == self.block && (stamp.thread == thread || stamp.epoch() < self.epoch) {
            return true;
        }
        self.base.covers(stamp) || self.of(thread).is_some_and(|clock| clock.acquired.covers(stamp))
    }

    /// This thread's atomic operation comes after all that were made there until now: what it does at that address later does
    /// so as well ("observation", then program order of one location).
    pub fn follow(&mut self, thread: u16, address: u64, now: u64) {
        self.of_mut(thread).acquired.atomics.insert(address, now);
    }

    /// Whether all atomic operations at an address until this moment happened before what this thread does now.
    pub fn follows(&self, thread: u16, address: u64, until: u64) -> bool {
        let known = |knowledge: &Knowledge| knowledge.atomics.get(&address).is_some_and(|&now| now >= until);
        known(&self.base) || self.of(thread).is_some_and(|clock| known(&clock.acquired))
    }

    /// When this thread's loads could last have been stale.
    pub fn acquired_at(&self, thread: u16) -> u64 {
        self.of(thread).map_or(0, |clock| clock.acquired_at).max(self.acquired_at)
    }

    /// All that this thread knows, with what it did itself and what its block did before the last barrier.
    fn all_known(&self, thread: u16) -> Knowledge {
        let mut all = (*self.base).clone();
        let mut time = u64::from(self.epoch) << RELEASE_BITS;
        if let Some(clock) = self.of(thread) {
            all.join(&clock.acquired);
            time |= clock.releases;
        }
        all.epochs.insert(self.block, self.epoch);
        all.threads.insert((self.block, thread), time);
        all
    }

    /// What an atomic operation of this thread tells: all that it knows if it releases, else what it knew at its last fence.
    pub fn release(&mut self, thread: u16, by_itself: bool) -> Option<Knowledge> {
        if !by_itself {
            return self.of(thread).and_then(|clock| clock.fenced.clone());
        }
        let all = self.all_known(thread);
        self.next_release(thread);
        Some(all)
    }

    fn next_release(&mut self, thread: u16) {
        self.of_mut(thread).releases += 1;
    }

    /// This thread has read what another released, and acquires it now, or at its next fence.
    pub fn observe(&mut self, thread: u16, released: &Knowledge, acquires: bool, now: u64) {
        let clock = self.of_mut(thread);
        if acquires {
            clock.acquired.join(released);
            clock.acquired_at = now;
        } else {
            clock.observed.join(released);
        }
    }

    /// A fence at the scope of the device.
    pub fn fence(&mut self, thread: u16, now: u64) {
        let clock = self.of_mut(thread);
        let observed = std::mem::take(&mut clock.observed);
        clock.acquired.join(&observed);
        clock.acquired_at = now;
        let all = self.all_known(thread);
        self.of_mut(thread).fenced = Some(all);
        self.next_release(thread);
    }

    /// All threads of the block have come to a barrier.
    pub fn barrier(&mut self) {
        self.epoch += 1;
        for clock in &mut self.threads {
            if !clock.acquired.is_empty() {
                Rc::make_mut(&mut self.base).join(&std::mem::take(&mut clock.acquired));
            }
            self.acquired_at = self.acquired_at.max(clock.acquired_at);
            clock.releases = 0;
        }
        self.threads.retain(|clock| clock.fenced.is_some() || !clock.observed.is_empty());
    }
}
