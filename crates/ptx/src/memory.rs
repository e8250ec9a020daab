//! Which memory of the process a device may use: its allocations, whose bytes are undefined until something is written
//! there, and memory lent to the launches of a thread. Addresses are those of the process.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    marker::PhantomData,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// A run of bytes a kernel may read.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub start: u64,
    pub end: u64,
    pub writable: bool,
    /// A bit for each byte that has a value; `None` where all have.
    pub initialised: Option<Arc<[AtomicU64]>>,
}

static ALLOCATIONS: Mutex<BTreeMap<u64, Region>> = Mutex::new(BTreeMap::new());

thread_local! {
    static LENT: RefCell<Vec<(u64, Region)>> = const { RefCell::new(Vec::new()) };
}

fn allocations() -> MutexGuard<'static, BTreeMap<u64, Region>> {
    ALLOCATIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on kernels may use these bytes, whose content is undefined.
pub fn allocated(address: u64, bytes: usize) {
    let words = bytes.div_ceil(64);
    let initialised = Some((0..words).map(|_| AtomicU64::new(0)).collect());
    let region = Region { start: address, end: address + bytes as u64, writable: true, initialised };
    allocations().insert(address, region);
}

/// The allocation at this address is gone.
pub fn freed(address: u64) {
    allocations().remove(&address);
}

/// Something other than a kernel has given these bytes values.
pub fn written(address: u64, bytes: usize) {
    let allocations = allocations();
    let Some((_, region)) = allocations.range(..=address).next_back() else { return };
    region.initialise(address, bytes as u64);
}

/// Lets the kernels that this thread launches use other memory, until this is dropped.
#[derive(Debug)]
#[must_use = "the memory is lent until this is dropped"]
pub struct Lent {
    number: u64,
    /// What is lent is lent by this thread.
    _thread: PhantomData<*const ()>,
}

/// Lends memory: address, bytes, and whether kernels may write there. All of it has values. Where pieces overlap they are one
/// piece, writable if one of them is.
pub fn lend(memory: impl IntoIterator<Item = (u64, u64, bool)>) -> Lent {
    let regions = memory.into_iter().map(|(address, bytes, writable)| Region {
        start: address,
        end: address.saturating_add(bytes),
        writable,
        initialised: None,
    });
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let regions = regions.filter(|region| region.start < region.end).map(|region| (number, region));
    LENT.with_borrow_mut(|lent| lent.extend(regions));
    Lent { number, _thread: PhantomData }
}

impl Drop for Lent {
    fn drop(&mut self) {
        LENT.with_borrow_mut(|lent| lent.retain(|&(number, _)| number != self.number));
    }
}

/// All that a launch of this thread may use, by address; where lent pieces overlap they are one.
pub(crate) fn usable() -> Vec<Region> {
    let mut lent: Vec<Region> = LENT.with_borrow(|lent| lent.iter().map(|(_, region)| region.clone()).collect());
    lent.sort_by_key(|region| region.start);
    let mut all: Vec<Region> = Vec::new();
    for region in lent {
        match all.last_mut() {
            Some(last) if region.start < last.end => {
                last.end = last.end.max(region.end);
                last.writable |= region.writable;
            }
            _ => all.push(region),
        }
    }
    let inside = |all: &[Region], start: u64| all.iter().any(|lent| lent.start <= start && start < lent.end);
    let owned: Vec<Region> = allocations().values().filter(|owned| !inside(&all, owned.start)).cloned().collect();
    all.retain(|lent| !inside(&owned, lent.start));
    all.extend(owned);
    all.sort_by_key(|region| region.start);
    all
}

impl Region {
    /// Which of these bytes, given by the lowest bits of `wanted`, have no value.
    pub fn without_value(&self, address: u64, wanted: u64) -> u64 {
        let Some(bits) = &self.initialised else { return 0 };
        let at = address - self.start;
        let (word, shift) = ((at / 64) as usize, at % 64);
        let low = bits[word].load(Ordering::Relaxed) >> shift;
        let next =
            bits.get(word + 1).filter(|_| shift > 0).map_or(0, |next| next.load(Ordering::Relaxed) << (64 - shift));
        wanted & !(low | next)
    }

    /// Notes that these bytes have values from now on.
    pub fn initialise(&self, address: u64, bytes: u64) {
        let Some(bits) = &self.initialised else { return };
        let first = address - self.start;
        let end = (first + bytes).min(self.end - self.start);
        let mut at = first;
        while at < end {
            let (word, shift) = ((at / 64) as usize, at % 64);
            let count = (64 - shift).min(end - at);
            bits[word].fetch_or((u64::MAX >> (64 - count)) << shift, Ordering::Relaxed);
            at += count;
        }
    }
}
