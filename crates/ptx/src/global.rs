//! Global memory as unkind as the ISA allows, and checked.
//!
//! What a block stores is its own until it is published: by a release at the scope of the device, as far as
//! the releasing thread is behind it in program order or by a barrier, at the end of the block, or at some random moment. A
//! load may find any value its line had since its thread last acquired, but for what its own block wrote. Cache operators
//! change nothing. Atomic operations act on what is published, at once.
//!
//! Beside the bytes, each line of 128 keeps who last accessed every two of them, for races, and whether they were read
//! through the read-only path, which nothing in the launch may write.

use crate::{
    fault::FaultKind,
    instruction::{Change, Order},
    line::{GRANULE, GRANULES, LINE, Line, Place, VERSIONS, Version},
    memory::{self, Region},
    order::{Clock, Knowledge, Stamp},
};
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

const PAGE: u64 = 4096;

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
