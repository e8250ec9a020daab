//! The memory that the threads of a block share: what has a value, and who accessed each byte since the last barrier.

use crate::fault::FaultKind;

/// In a mark: the threads are more than one.
const SEVERAL: u32 = crate::order::SEVERAL as u32;
/// After so many barriers the epochs of marks begin again.
const EPOCHS: u32 = 0xffff;

/// The memory of one block.
#[derive(Default)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    has_value: Vec<bool>,
    /// The last of each kind on a byte, as [`Place::mark`] makes them.
    stores: Vec<u32>,
    loads: Vec<u32>,
    atomics: Vec<u32>,
    checks_races: bool,
}

/// An access by one thread.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub address: u64,
    pub bytes: u64,
    pub thread: u16,
    pub epoch: u32,
}

impl Place {
    fn mark(self) -> u32 {
        // 0 is never.
        (self.epoch % EPOCHS + 1) << 16 | u32::from(self.thread)
    }
}

impl Shared {
    /// For a block that begins: nothing has a value.
    pub fn reset(&mut self, bytes: u64, checks_races: bool) {
        let bytes = bytes as usize;
        // Bits that are a NaN as a float of any size.
        self.bytes.clear();
        self.bytes.resize(bytes, 0xff);
        self.has_value.clear();
        self.has_value.resize(bytes, false);
        for marks in [&mut self.stores, &mut self.loads, &mut self.atomics] {
            marks.clear();
            marks.resize(bytes, 0);
        }
        self.checks_races = checks_races;
    }

    /// The block has come to a barrier, and an epoch begins.
    pub fn begin(&mut self, epoch: u32) {
        if epoch.is_multiple_of(EPOCHS) {
            for marks in [&mut self.stores, &mut self.loads, &mut self.atomics] {
                marks.fill(0);
            }
        }
    }

    fn span(&self, place: Place) -> Result<std::ops::Range<usize>, FaultKind> {
        let Place { address, bytes, .. } = place;
        if !address.is_multiple_of(bytes) {
            return Err(FaultKind::Misaligned { address, bytes });
        }
        match address.checked_add(bytes) {
            Some(end) if end <= self.bytes.len() as u64 => Ok(address as usize..end as usize),
            _ => Err(FaultKind::OutOfBounds { address, bytes }),
        }
    }

    /// That no other thread has done this to these bytes since the last barrier.
    fn demand(marks: &[u32], place: Place, before: &'static str, now: &'static str) -> Result<(), FaultKind> {
        let own = place.mark();
        match marks.iter().find(|&&mark| mark >> 16 == own >> 16 && mark != own) {
            Some(mark) => {
                Err(FaultKind::SharedRace { address: place.address, now, before, thread: (mark & SEVERAL) as u16 })
            }
            None => Ok(()),
        }
    }

    fn note(marks: &mut [u32], place: Place) {
        let own = place.mark();
        for mark in marks {
            *mark = if *mark >> 16 == own >> 16 && *mark != own { *mark | SEVERAL } else { own };
        }
    }

    /// Loads bytes, of which those in `used` (from the lowest bit) must have values; says which others have none.
    pub fn load(&mut self, place: Place, used: u64, to: &mut [u8]) -> Result<u64, FaultKind> {
        let span = self.span(place)?;
        if self.checks_races {
            Self::demand(&self.stores[span.clone()], place, "a store", "a load")?;
            Self::demand(&self.atomics[span.clone()], place, "an atomic operation", "a load")?;
            Self::note(&mut self.loads[span.clone()], place);
        }
        let has_value = self.has_value[span.clone()].iter().enumerate();
        let missing = has_value.fold(0, |missing, (index, &has)| missing | u64::from(!has) << index);
        if missing & used != 0 {
            return Err(FaultKind::Uninitialised { address: place.address, bytes: place.bytes });
        }
        to.copy_from_slice(&self.bytes[span]);
        Ok(missing)
    }

    pub fn store(&mut self, place: Place, from: &[u8]) -> Result<(), FaultKind> {
        let span = self.span(place)?;
        if self.checks_races {
            Self::demand(&self.stores[span.clone()], place, "a store", "a store")?;
            Self::demand(&self.loads[span.clone()], place, "a load", "a store")?;
            Self::demand(&self.atomics[span.clone()], place, "an atomic operation", "a store")?;
            Self::note(&mut self.stores[span.clone()], place);
        }
        self.has_value[span.clone()].fill(true);
        self.bytes[span].copy_from_slice(from);
        Ok(())
    }

    /// An atomic operation on up to eight bytes; gives back what was there.
    pub fn atomic(&mut self, place: Place, change: impl Fn(u64) -> u64) -> Result<u64, FaultKind> {
        let span = self.span(place)?;
        if self.checks_races {
            Self::demand(&self.stores[span.clone()], place, "a store", "an atomic operation")?;
            Self::demand(&self.loads[span.clone()], place, "a load", "an atomic operation")?;
            Self::note(&mut self.atomics[span.clone()], place);
        }
        if self.has_value[span.clone()].contains(&false) {
            return Err(FaultKind::Uninitialised { address: place.address, bytes: place.bytes });
        }
        let bytes = &mut self.bytes[span];
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let old = u64::from_le_bytes(word);
        bytes.copy_from_slice(&change(old).to_le_bytes()[..bytes.len()]);
        Ok(old)
    }
}
