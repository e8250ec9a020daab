//! A line of global memory: who last accessed what of it, what blocks have stored and not published, and what it was before.

use crate::{
    fault::FaultKind,
    order::{Clock, Stamp},
};

pub const LINE: u64 = 128;
/// Bytes that share their stamps.
pub const GRANULE: u64 = 2;
pub const GRANULES: usize = (LINE / GRANULE) as usize;
/// Of a line, how many earlier contents a stale load can find.
pub const VERSIONS: usize = 8;

/// A line that something else than the read-only path has touched.
pub struct Line {
    /// The last plain store to each granule.
    pub stores: [Stamp; GRANULES],
    /// The last loads and the last atomic operations, by block.
    loads: Vec<Accesses>,
    atomics: Vec<Accesses>,
    /// Those that are atomic among the threads of their block only.
    block_atomics: Vec<Accesses>,
    /// By address in the line, when the last atomic operation was there.
    pub last_atomics: Vec<(u64, u64)>,
    /// What blocks have stored and not published.
    pub pending: Vec<Pending>,
    /// Earlier contents, the oldest first.
    pub versions: Vec<Version>,
}

pub struct Accesses {
    pub block: u32,
    pub stamps: [Stamp; GRANULES],
}

pub struct Pending {
    pub block: u32,
    pub bytes: [u8; LINE as usize],
    pub mask: u128,
    pub stamps: [Stamp; GRANULES],
}

/// What some bytes of a line were before they were published by a block.
pub struct Version {
    pub until: u64,
    pub block: u32,
    pub bytes: [u8; LINE as usize],
    pub mask: u128,
}

/// Of an access: where, and by whom.
#[derive(Clone, Copy)]
pub struct Place {
    pub address: u64,
    pub bytes: u64,
    pub block: u32,
    pub thread: u16,
}

impl Place {
    pub fn line(self) -> u64 {
        self.address & !(LINE - 1)
    }

    pub fn within_line(self) -> u64 {
        self.address % LINE
    }

    pub fn mask(self) -> u128 {
        (u128::MAX >> (LINE - self.bytes)) << self.within_line()
    }

    pub fn granules(self) -> std::ops::Range<usize> {
        (self.within_line() / GRANULE) as usize..(self.within_line() + self.bytes).div_ceil(GRANULE) as usize
    }

    pub fn granule_mask(self) -> u64 {
        let granules = self.granules();
        (u64::MAX >> (GRANULES - granules.len())) << granules.start
    }
}

impl Line {
    pub fn new() -> Self {
        Self {
            stores: [Stamp::default(); GRANULES],
            loads: Vec::new(),
            atomics: Vec::new(),
            block_atomics: Vec::new(),
            last_atomics: Vec::new(),
            pending: Vec::new(),
            versions: Vec::new(),
        }
    }

    pub fn is_written(&self, place: Place) -> bool {
        let any = |stamps: &[Stamp]| stamps[place.granules()].iter().any(|stamp| !stamp.is_none());
        any(&self.stores) || self.all_atomics().any(|accesses| any(&accesses.stamps))
    }

    /// That all these accesses happened before what the thread does now.
    fn demand(
        stamps: &[Stamp],
        place: Place,
        clock: &Clock,
        what: &'static str,
        now: &'static str,
    ) -> Result<(), FaultKind> {
        let mut last = Stamp::default();
        for granule in place.granules() {
            let stamp = stamps[granule];
            if stamp != last && !clock.knows(place.thread, stamp) {
                return Err(FaultKind::GlobalRace {
                    address: place.address,
                    now,
                    before: what,
                    block: stamp.block,
                    thread: stamp.thread,
                });
            }
            last = stamp;
        }
        Ok(())
    }

    fn all_atomics(&self) -> impl Iterator<Item = &Accesses> {
        self.atomics.iter().chain(&self.block_atomics)
    }

    /// That all atomic operations there happened before what the thread does now.
    fn demand_atomics(&self, place: Place, clock: &Clock, now: &'static str) -> Result<(), FaultKind> {
        let last = self.last_atomics.iter().find(|&&(address, _)| address == place.address);
        if last.is_some_and(|&(address, until)| clock.follows(place.thread, address, until)) {
            return Ok(());
        }
        self.all_atomics()
            .try_for_each(|atomics| Self::demand(&atomics.stamps, place, clock, "an atomic operation", now))
    }

    fn demand_loads(&self, place: Place, clock: &Clock, now: &'static str) -> Result<(), FaultKind> {
        self.loads.iter().try_for_each(|loads| Self::demand(&loads.stamps, place, clock, "a load", now))
    }

    pub fn check_load(&mut self, place: Place, clock: &Clock) -> Result<(), FaultKind> {
        Self::demand(&self.stores, place, clock, "a store", "a load")?;
        self.demand_atomics(place, clock, "a load")?;
        Self::note(&mut self.loads, place, clock);
        Ok(())
    }

    pub fn check_store(&self, place: Place, clock: &Clock) -> Result<(), FaultKind> {
        Self::demand(&self.stores, place, clock, "a store", "a store")?;
        self.demand_loads(place, clock, "a store")?;
        self.demand_atomics(place, clock, "a store")
    }

    pub fn check_atomic(&mut self, place: Place, of_block: bool, clock: &Clock) -> Result<(), FaultKind> {
        const NOW: &str = "an atomic operation";
        Self::demand(&self.stores, place, clock, "a store", NOW)?;
        self.demand_loads(place, clock, NOW)?;
        // One that is atomic within a block is none to others.
        let others = |accesses: &&Accesses| accesses.block != place.block;
        let apart = if of_block { &self.atomics[..] } else { &[] };
        for accesses in apart.iter().chain(&self.block_atomics).filter(others) {
            Self::demand(&accesses.stamps, place, clock, "an atomic operation of a narrower scope", NOW)?;
        }
        Self::note(if of_block { &mut self.block_atomics } else { &mut self.atomics }, place, clock);
        Ok(())
    }

    fn note(all: &mut Vec<Accesses>, place: Place, clock: &Clock) {
        let index = all.iter().position(|accesses| accesses.block == place.block).unwrap_or_else(|| {
            all.push(Accesses { block: place.block, stamps: [Stamp::default(); GRANULES] });
            all.len() - 1
        });
        let stamp = clock.stamp(place.thread);
        for known in &mut all[index].stamps[place.granules()] {
            *known = known.merged_with(stamp);
        }
    }

    /// Adds to what a block has pending; says whether there was nothing.
    pub fn add_pending(&mut self, place: Place, from: &[u8], stamp: Stamp) -> bool {
        let known = self.pending.iter().position(|pending| pending.block == place.block);
        let index = known.unwrap_or_else(|| {
            self.pending.push(Pending {
                block: place.block,
                bytes: [0; LINE as usize],
                mask: 0,
                stamps: [Stamp::default(); GRANULES],
            });
            self.pending.len() - 1
        });
        let pending = &mut self.pending[index];
        let at = place.within_line() as usize;
        pending.bytes[at..at + from.len()].copy_from_slice(from);
        pending.mask |= place.mask();
        pending.stamps[place.granules()].fill(stamp);
        known.is_none()
    }

    /// Lays over what was loaded what the own block has pending; says which bytes, from the lowest bit.
    pub fn read_pending(&self, place: Place, to: &mut [u8]) -> u64 {
        let Some(pending) = self.pending.iter().find(|pending| pending.block == place.block) else { return 0 };
        let mask = ((pending.mask & place.mask()) >> place.within_line()) as u64;
        for (index, byte) in to.iter_mut().enumerate() {
            if mask >> index & 1 != 0 {
                *byte = pending.bytes[place.within_line() as usize + index];
            }
        }
        mask
    }

    pub fn keep_version(&mut self, place: Place, now: u64, old: &[u8]) {
        let mut bytes = [0; LINE as usize];
        let at = place.within_line() as usize;
        bytes[at..at + old.len()].copy_from_slice(old);
        self.versions.push(Version { until: now, block: place.block, bytes, mask: place.mask() });
        if self.versions.len() > VERSIONS {
            self.versions.remove(0);
        }
    }

    /// Takes back what was published since some moment between `oldest` and now, but nothing of the own block.
    pub fn make_stale(&self, place: Place, oldest: u64, random: &mut fastrand::Rng, to: &mut [u8]) {
        for version in self.versions.iter().rev() {
            let is_own = version.block == place.block && version.mask & place.mask() != 0;
            if version.until <= oldest || is_own || random.bool() {
                return;
            }
            let mask = ((version.mask & place.mask()) >> place.within_line()) as u64;
            for (index, byte) in to.iter_mut().enumerate() {
                if mask >> index & 1 != 0 {
                    *byte = version.bytes[place.within_line() as usize + index];
                }
            }
        }
    }
}
