//! Global memory as unkind as the ISA allows, and checked.
//!
//! What a block stores lies in pages of its own until it is published: by a release at the scope of the device, as far as
//! the releasing thread is behind it in program order or by a barrier, at the end of the block, or at some random moment. A
//! load may find any value its line had since its thread last acquired, but for what its own block wrote. Cache operators
//! change nothing. Atomic operations act on what is published, at once.
//!
//! Beside the bytes, each line of 128 keeps who last accessed every two of them, for races, and whether they were read
//! through the read-only path, which nothing in the launch may write.

use crate::{
    fault::FaultKind,
    instruction::{Change, Order},
    memory::{self, Region},
    order::{Clock, Knowledge, Stamp},
};
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

const LINE: u64 = 128;
/// Bytes that share their stamps.
const GRANULE: u64 = 2;
const GRANULES: usize = (LINE / GRANULE) as usize;
const PAGE: u64 = 4096;
/// Of a line, how many earlier contents a stale load can find.
const VERSIONS: usize = 8;

/// By address, which needs no protection against an adversary.
#[derive(Default)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are addresses");
    }
    fn write_u64(&mut self, address: u64) {
        self.0 = (address ^ address >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type ByAddress<T> = HashMap<u64, T, BuildHasherDefault<AddressHasher>>;

/// The lines of a page.
type Page = Box<[Slot; (PAGE / LINE) as usize]>;

#[derive(Default)]
struct Slot {
    /// Granules read through the read-only path.
    read_only: u64,
    line: Option<Box<Line>>,
}

/// A line that something else than the read-only path has touched.
struct Line {
    /// The last plain store to each granule.
    stores: [Stamp; GRANULES],
    /// The last loads and the last atomic operations, by block.
    loads: Vec<Accesses>,
    atomics: Vec<Accesses>,
    /// Those that are atomic among the threads of their block only.
    block_atomics: Vec<Accesses>,
    /// By address in the line, when the last atomic operation was there.
    last_atomics: Vec<(u64, u64)>,
    /// What blocks have stored and not published.
    pending: Vec<Pending>,
    /// Earlier contents, the oldest first.
    versions: Vec<Version>,
}

struct Accesses {
    block: u32,
    stamps: [Stamp; GRANULES],
}

struct Pending {
    block: u32,
    bytes: [u8; LINE as usize],
    mask: u128,
    stamps: [Stamp; GRANULES],
}

/// What some bytes of a line were before they were published by a block.
struct Version {
    until: u64,
    block: u32,
    bytes: [u8; LINE as usize],
    mask: u128,
}

/// The global memory of one launch.
pub(crate) struct Global {
    regions: Vec<Region>,
    last_region: usize,
    pages: ByAddress<usize>,
    page_store: Vec<Page>,
    last_page: (u64, usize),
    /// Grows with all that is published.
    now: u64,
    /// By address, what atomic operations there have released.
    released: ByAddress<Knowledge>,
    /// What words were before the first releasing operation on them, and its block.
    counters: ByAddress<(u64, u64)>,
    /// By block, the lines with something pending.
    pending: Vec<(u32, Vec<u64>)>,
    random: fastrand::Rng,
    checks_races: bool,
    is_adversarial: bool,
}

/// Of an access: where, and by whom.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub address: u64,
    pub bytes: u64,
    pub block: u32,
    pub thread: u16,
}

impl Place {
    fn line(self) -> u64 {
        self.address & !(LINE - 1)
    }

    fn within_line(self) -> u64 {
        self.address % LINE
    }

    fn mask(self) -> u128 {
        (u128::MAX >> (LINE - self.bytes)) << self.within_line()
    }

    fn granules(self) -> std::ops::Range<usize> {
        (self.within_line() / GRANULE) as usize..(self.within_line() + self.bytes).div_ceil(GRANULE) as usize
    }

    fn granule_mask(self) -> u64 {
        let granules = self.granules();
        (u64::MAX >> (GRANULES - granules.len())) << granules.start
    }
}

/// Published bytes, of which [`Global::region`] has said that they are there.
fn read(address: u64, to: &mut [u8]) {
    // SAFETY: a region stands for memory whose owner lets kernels use it while they run.
    unsafe { std::ptr::copy_nonoverlapping(address as *const u8, to.as_mut_ptr(), to.len()) };
}

/// Publishes bytes at such an address.
fn write(address: u64, from: &[u8]) {
    // SAFETY: as in `read`.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), address as *mut u8, from.len()) };
}

/// A word of up to eight bytes.
fn read_word(address: u64, bytes: u64) -> u64 {
    let mut word = [0; 8];
    read(address, &mut word[..bytes as usize]);
    u64::from_le_bytes(word)
}

impl Global {
    pub fn new(seed: u64, checks_races: bool, is_adversarial: bool) -> Self {
        Self {
            regions: memory::usable(),
            last_region: 0,
            pages: ByAddress::default(),
            page_store: Vec::new(),
            last_page: (1, 0),
            now: 0,
            released: ByAddress::default(),
            counters: ByAddress::default(),
            pending: Vec::new(),
            random: fastrand::Rng::with_seed(seed),
            checks_races,
            is_adversarial,
        }
    }

    /// The number of the region that has all these bytes.
    fn region(&mut self, place: Place) -> Result<usize, FaultKind> {
        if !place.address.is_multiple_of(place.bytes) {
            return Err(FaultKind::Misaligned { address: place.address, bytes: place.bytes });
        }
        let Some(end) = place.address.checked_add(place.bytes) else {
            return Err(FaultKind::OutOfBounds { address: place.address, bytes: place.bytes });
        };
        let holds = |region: &Region| region.start <= place.address && end <= region.end;
        if !self.regions.get(self.last_region).is_some_and(holds) {
            let next = self.regions.partition_point(|region| region.start <= place.address);
            let found = next.checked_sub(1).filter(|&index| holds(&self.regions[index]));
            self.last_region = found.ok_or(FaultKind::OutOfBounds { address: place.address, bytes: place.bytes })?;
        }
        Ok(self.last_region)
    }

    fn slot(&mut self, address: u64) -> &mut Slot {
        let page = address & !(PAGE - 1);
        if self.last_page.0 != page {
            let store = &mut self.page_store;
            let index = *self.pages.entry(page).or_insert_with(|| {
                store.push(Box::new(std::array::from_fn(|_| Slot::default())));
                store.len() - 1
            });
            self.last_page = (page, index);
        }
        &mut self.page_store[self.last_page.1][(address % PAGE / LINE) as usize]
    }

    fn line(&mut self, address: u64) -> (&mut u64, &mut Line) {
        let slot = self.slot(address);
        (&mut slot.read_only, slot.line.get_or_insert_with(|| Box::new(Line::new())))
    }

    /// Whether something can be reached at all; for prefetches.
    pub fn check(&mut self, place: Place) -> Result<(), FaultKind> {
        self.region(place).map(drop)
    }

    /// Loads bytes, of which those in `used` (from the lowest bit) must have values; says which others have none.
    pub fn load(
        &mut self,
        place: Place,
        used: u64,
        coherent: bool,
        clock: &Clock,
        to: &mut [u8],
    ) -> Result<u64, FaultKind> {
        let region = self.region(place)?;
        if !coherent {
            let slot = self.slot(place.address);
            slot.read_only |= place.granule_mask();
            if let Some(line) = &slot.line
                && line.is_written(place)
            {
                return Err(FaultKind::ReadOnlyWritten { address: place.address });
            }
        } else {
            let checks = self.checks_races;
            let (_, line) = self.line(place.address);
            if checks {
                line.check_load(place, clock)?;
            }
        }
        let region = &self.regions[region];
        read(place.address, to);
        let mut missing = u64::MAX >> (64 - place.bytes);
        let slot = &self.page_store[self.last_page.1][(place.address % PAGE / LINE) as usize];
        if let Some(line) = &slot.line {
            if self.is_adversarial {
                let oldest = clock.acquired_at(place.thread);
                line.make_stale(place, oldest, &mut self.random, to);
            }
            missing &= !line.read_pending(place, to);
        }
        missing = region.without_value(place.address, missing);
        if missing & used != 0 {
            return Err(FaultKind::Uninitialised { address: place.address, bytes: place.bytes });
        }
        Ok(missing)
    }

    /// Stores bytes.
    pub fn store(&mut self, place: Place, from: &[u8], clock: &Clock) -> Result<(), FaultKind> {
        let region = self.region(place)?;
        self.writable(region, place)?;
        let checks = self.checks_races;
        let buffers = self.is_adversarial && self.random.u8(..) >= 32;
        let (_, line) = self.line(place.address);
        let stamp = clock.stamp(place.thread);
        if checks {
            line.check_store(place, clock)?;
        }
        line.stores[place.granules()].fill(stamp);
        let is_new = line.add_pending(place, from, stamp);
        if is_new {
            match self.pending.iter_mut().find(|(block, _)| *block == place.block) {
                Some((_, lines)) => lines.push(place.line()),
                None => self.pending.push((place.block, vec![place.line()])),
            }
        }
        if !buffers {
            self.publish_line(place.line(), place.block, &|_| true);
        }
        Ok(())
    }

    fn writable(&mut self, region: usize, place: Place) -> Result<(), FaultKind> {
        if !self.regions[region].writable {
            return Err(FaultKind::NotWritable { address: place.address });
        }
        if self.slot(place.address).read_only & place.granule_mask() != 0 {
            return Err(FaultKind::ReadOnlyWritten { address: place.address });
        }
        Ok(())
    }

    /// An atomic operation; gives back what was there.
    pub fn atomic(
        &mut self,
        place: Place,
        change: Change,
        by: u64,
        order: Order,
        clock: &mut Clock,
    ) -> Result<u64, FaultKind> {
        let region = self.region(place)?;
        self.writable(region, place)?;
        if self.checks_races {
            let (_, line) = self.line(place.address);
            line.check_atomic(place, order.of_block, clock)?;
        }
        if order.release {
            self.publish(place.block, place.thread, clock);
        }
        self.publish_line(place.line(), place.block, &|_| true);
        let region = self.regions[region].clone();
        if region.without_value(place.address, u64::MAX >> (64 - place.bytes)) != 0 {
            return Err(FaultKind::Uninitialised { address: place.address, bytes: place.bytes });
        }
        self.now += 1;
        let now = self.now;
        let old = read_word(place.address, place.bytes);
        let new = change.of(old, by, place.bytes).to_le_bytes();
        let length = place.bytes as usize;
        let (_, line) = self.line(place.address);
        line.keep_version(place, now, &old.to_le_bytes()[..length]);
        write(place.address, &new[..length]);
        if order.of_block {
            return Ok(old);
        }
        line.last_atomics.retain(|&(address, _)| address != place.address);
        line.last_atomics.push((place.address, now));
        if let Some(released) = self.released.get(&place.address) {
            clock.observe(place.thread, released, order.acquire, now);
        }
        if let Some(known) = clock.release(place.thread, order.release) {
            self.released.entry(place.address).or_default().join(&known);
        }
        // Where nothing is released nobody waits for others, and there are as many addresses as a histogram has bins.
        if self.released.contains_key(&place.address) {
            clock.follow(place.thread, place.address, now);
        }
        if order.release {
            self.counters.entry(place.address).or_insert((old, place.bytes));
        }
        Ok(old)
    }

    /// A fence at the scope of the device.
    pub fn fence(&mut self, block: u32, thread: u16, clock: &mut Clock) {
        self.publish(block, thread, clock);
        self.now += 1;
        clock.fence(thread, self.now);
    }

    /// Publishes what a release of this thread orders.
    fn publish(&mut self, block: u32, thread: u16, clock: &Clock) {
        let epoch = clock.epoch();
        self.publish_lines(block, &|stamp| stamp.is_released_by(thread, epoch));
    }

    /// Publishes all that a block has stored, at its end.
    pub fn publish_all(&mut self, block: u32) {
        self.publish_lines(block, &|_| true);
        self.pending.retain(|(other, _)| *other != block);
    }

    fn publish_lines(&mut self, block: u32, is_due: &dyn Fn(Stamp) -> bool) {
        let Some(index) = self.pending.iter().position(|(other, _)| *other == block) else { return };
        let mut lines = std::mem::take(&mut self.pending[index].1);
        lines.retain(|&line| self.publish_line(line, block, is_due));
        self.pending[index].1 = lines;
    }

    /// Publishes what is due of what a block has stored to a line; says whether something is left.
    fn publish_line(&mut self, address: u64, block: u32, is_due: &dyn Fn(Stamp) -> bool) -> bool {
        self.now += 1;
        let now = self.now;
        let (_, line) = self.line(address);
        let Some(index) = line.pending.iter().position(|pending| pending.block == block) else { return false };
        let pending = &mut line.pending[index];
        let mut due = 0u128;
        for granule in 0..GRANULES {
            let mask = 3u128 << (granule as u64 * GRANULE);
            if pending.mask & mask != 0 && is_due(pending.stamps[granule]) {
                due |= mask & pending.mask;
            }
        }
        let (bytes, left) = (pending.bytes, pending.mask & !due);
        pending.mask = left;
        let mut old = [0; LINE as usize];
        if left == 0 {
            // Its place in the list of lines goes when that is next looked through.
            line.pending.swap_remove(index);
        }
        let mut at = 0;
        while due >> at != 0 {
            at += (due >> at).trailing_zeros();
            let length = (!(due >> at)).trailing_zeros().min(LINE as u32 - at);
            let place = Place { address: address + u64::from(at), bytes: 1, block, thread: 0 };
            let region = self.region(place).map(|region| self.regions[region].clone());
            let Ok(region) = region else { unreachable!("it was stored to") };
            let span = at as usize..(at + length) as usize;
            read(place.address, &mut old[span.clone()]);
            write(place.address, &bytes[span]);
            region.initialise(place.address, u64::from(length));
            at += length;
            if at >= LINE as u32 {
                break;
            }
        }
        if due != 0 {
            let (_, line) = self.line(address);
            line.versions.push(Version { until: now, block, bytes: old, mask: due });
            if line.versions.len() > VERSIONS {
                line.versions.remove(0);
            }
        }
        left != 0
    }

    /// A counter that is not what it was before the launch.
    pub fn changed_counter(&self) -> Option<FaultKind> {
        let mut changed: Vec<FaultKind> = self
            .counters
            .iter()
            .filter_map(|(&address, &(before, bytes))| {
                let after = read_word(address, bytes);
                (after != before).then_some(FaultKind::Counter { address, before, after })
            })
            .collect();
        changed.sort_by_key(|kind| if let FaultKind::Counter { address, .. } = kind { *address } else { 0 });
        changed.into_iter().next()
    }
}

impl Line {
    fn new() -> Self {
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

    fn is_written(&self, place: Place) -> bool {
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

    fn check_load(&mut self, place: Place, clock: &Clock) -> Result<(), FaultKind> {
        Self::demand(&self.stores, place, clock, "a store", "a load")?;
        self.demand_atomics(place, clock, "a load")?;
        Self::note(&mut self.loads, place, clock);
        Ok(())
    }

    fn check_store(&self, place: Place, clock: &Clock) -> Result<(), FaultKind> {
        Self::demand(&self.stores, place, clock, "a store", "a store")?;
        self.demand_loads(place, clock, "a store")?;
        self.demand_atomics(place, clock, "a store")
    }

    fn check_atomic(&mut self, place: Place, of_block: bool, clock: &Clock) -> Result<(), FaultKind> {
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
    fn add_pending(&mut self, place: Place, from: &[u8], stamp: Stamp) -> bool {
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
    fn read_pending(&self, place: Place, to: &mut [u8]) -> u64 {
        let Some(pending) = self.pending.iter().find(|pending| pending.block == place.block) else { return 0 };
        let mask = ((pending.mask & place.mask()) >> place.within_line()) as u64;
        for (index, byte) in to.iter_mut().enumerate() {
            if mask >> index & 1 != 0 {
                *byte = pending.bytes[place.within_line() as usize + index];
            }
        }
        mask
    }

    fn keep_version(&mut self, place: Place, now: u64, old: &[u8]) {
        let mut bytes = [0; LINE as usize];
        let at = place.within_line() as usize;
        bytes[at..at + old.len()].copy_from_slice(old);
        self.versions.push(Version { until: now, block: place.block, bytes, mask: place.mask() });
        if self.versions.len() > VERSIONS {
            self.versions.remove(0);
        }
    }

    /// Takes back what was published since some moment between `oldest` and now, but nothing of the own block.
    fn make_stale(&self, place: Place, oldest: u64, random: &mut fastrand::Rng, to: &mut [u8]) {
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

impl Change {
    /// What an atomic operation on so many bytes leaves.
    pub fn of(self, old: u64, by: u64, bytes: u64) -> u64 {
        let unused = 64 - 8 * bytes as u32;
        let by = by << unused >> unused;
        let signed = |value: u64| (value << unused).cast_signed() >> unused;
        let new = match self {
            Self::Add => old.wrapping_add(by),
            Self::MinUnsigned => old.min(by),
            Self::MaxUnsigned => old.max(by),
            Self::MinSigned => signed(old).min(signed(by)).cast_unsigned(),
            Self::MaxSigned => signed(old).max(signed(by)).cast_unsigned(),
            Self::And => old & by,
            Self::Or => old | by,
            Self::Xor => old ^ by,
            Self::Exchange => by,
        };
        new << unused >> unused
    }
}
