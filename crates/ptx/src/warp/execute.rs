//! What an operation does to the registers of a warp's lanes and to memory.

use super::{LANES, Surroundings, Warp, blend};
use crate::{
    arithmetic::SHARED_WINDOW,
    fault::FaultKind,
    instruction::{Access, Kernel, Operation, Register, Shuffle, Space},
    line, shared,
};

impl Warp {
    /// Everything but what changes the way of the lanes.
    pub(super) fn execute(
        &mut self,
        operation: &Operation,
        lanes: u32,
        around: &mut Surroundings,
    ) -> Result<(), (Option<u32>, FaultKind)> {
        let kernel = around.kernel;
        match operation {
            Operation::Compute { function, to, from } => {
                let [a, b, c] = from.map(|register| register as usize);
                if lanes & !(self.defined[a] & self.defined[b] & self.defined[c]) != 0 {
                    for register in from {
                        self.read(*register, lanes, kernel)?;
                    }
                }
                function(&self.registers[a], &self.registers[b], &self.registers[c], &mut self.result);
                let (number, result) = (*to as usize, &mut self.result);
                let to = &mut self.registers[number];
                if lanes == u32::MAX {
                    std::mem::swap(to, result);
                } else {
                    blend(to, result, lanes);
                }
                self.defined[number] |= lanes;
            }
            Operation::Pack { to, from, bits } => {
                let mut result = [0; LANES as usize];
                let mut without_upper = 0;
                for (index, &register) in from.iter().enumerate() {
                    if index > 0 && index + 1 == from.len() {
                        without_upper = lanes & !self.defined[register as usize];
                    } else {
                        self.read(register, lanes, kernel)?;
                    }
                    let part = &self.registers[register as usize];
                    for (result, part) in result.iter_mut().zip(part.iter()) {
                        *result |= (part & (u64::MAX >> (64 - bits))) << (*bits * index as u32);
                    }
                }
                let to = *to as usize;
                self.write(to as Register, lanes, &result);
                self.defined[to] &= !without_upper;
                self.lower_defined[to] = if from.len() == 2 { without_upper } else { 0 };
            }
            Operation::Lower { to, from } => {
                if lanes & !self.lower_defined[*from as usize] != 0 {
                    self.read(*from, lanes & !self.lower_defined[*from as usize], kernel)?;
                }
                let lower = self.registers[*from as usize].map(|whole| whole & 0xffff_ffff);
                self.write(*to, lanes, &lower);
            }
            Operation::Unpack { to, from, bits } => {
                let whole = *self.read(*from, lanes, kernel)?;
                for (index, register) in to.iter().enumerate() {
                    let Some(register) = register else { continue };
                    let part = whole.map(|whole| whole >> (*bits * index as u32) & (u64::MAX >> (64 - bits)));
                    self.write(*register, lanes, &part);
                }
            }
            Operation::Load { access, coherent, to, used_bytes } => {
                self.load(*access, *coherent, to, *used_bytes, lanes, around)?
            }
            Operation::Store { access, from } => {
                let base = *self.read(access.base, lanes, kernel)?;
                for &register in from {
                    self.read(register, lanes, kernel)?;
                }
                for lane in each(lanes) {
                    let mut bytes = [0; 16];
                    for (index, &register) in from.iter().enumerate() {
                        let value = self.registers[register as usize][lane as usize].to_le_bytes();
                        let (start, width) = (index * access.width as usize, access.width as usize);
                        bytes[start..start + width].copy_from_slice(&value[..width]);
                    }
                    let bytes = &bytes[..(access.width * access.count) as usize];
                    let thread = (self.first_thread + lane) as u16;
                    let stored = match place(*access, base[lane as usize], thread, around) {
                        Target::Global(place) => around.global.store(place, bytes, around.clock),
                        Target::Shared(place) => around.shared.store(place, bytes),
                        Target::Parameters(address) => Err(FaultKind::NotWritable { address }),
                    };
                    stored.map_err(|kind| (Some(lane), kind))?;
                }
            }
            Operation::Atomic { access, change, order, to, by } => {
                let (base, by) = (*self.read(access.base, lanes, kernel)?, *self.read(*by, lanes, kernel)?);
                let mut old = [0; LANES as usize];
                // In which order the lanes of one instruction come is nobody's promise.
                let first = around.random.u32(..LANES);
                for lane in (0..LANES).map(|lane| (lane + first) % LANES).filter(|lane| lanes >> lane & 1 != 0) {
                    let thread = (self.first_thread + lane) as u16;
                    let at = lane as usize;
                    let changed = match place(*access, base[at], thread, around) {
                        Target::Global(place) => around.global.atomic(place, *change, by[at], *order, around.clock),
                        Target::Shared(place) => {
                            around.shared.atomic(place, |old| change.of(old, by[at], access.width))
                        }
                        Target::Parameters(address) => Err(FaultKind::NotWritable { address }),
                    };
                    old[at] = changed.map_err(|kind| (Some(lane), kind))?;
                }
                if let Some(to) = to {
                    self.write(*to, lanes, &old);
                }
            }
            Operation::Fence => {
                for lane in each(lanes) {
                    around.global.fence(around.block, (self.first_thread + lane) as u16, around.clock);
                }
            }
            Operation::Prefetch { access } => {
                let base = *self.read(access.base, lanes, kernel)?;
                for lane in each(lanes) {
                    let Target::Global(place) = place(*access, base[lane as usize], 0, around) else { continue };
                    around.global.check(place).map_err(|kind| (Some(lane), kind))?;
                }
            }
            Operation::BlockFence => {}
            Operation::Branch { .. }
            | Operation::Exit
            | Operation::Barrier
            | Operation::WarpBarrier { .. }
            | Operation::Shuffle { .. } => {
                unreachable!("changes the way of the lanes")
            }
        }
        Ok(())
    }

    fn load(
        &mut self,
        access: Access,
        coherent: bool,
        to: &[Register],
        used_bytes: u64,
        lanes: u32,
        around: &mut Surroundings,
    ) -> Result<(), (Option<u32>, FaultKind)> {
        let base = *self.read(access.base, lanes, around.kernel)?;
        let total = access.width * access.count;
        let mut results = [[0; LANES as usize]; 4];
        // By lane, bytes without a value, which the kernel may carry about but not use.
        let mut missing = [0; LANES as usize];
        for lane in each(lanes) {
            let mut bytes = [0; 16];
            let bytes = &mut bytes[..total as usize];
            let thread = (self.first_thread + lane) as u16;
            let loaded = match place(access, base[lane as usize], thread, around) {
                Target::Global(place) => around.global.load(place, used_bytes, coherent, around.clock, bytes),
                Target::Shared(place) => around.shared.load(place, used_bytes, bytes),
                Target::Parameters(address) => parameter(around.parameters, address, bytes).map(|()| 0),
            };
            let without_value = loaded.map_err(|kind| (Some(lane), kind))?;
            if without_value != 0 {
                missing[lane as usize] = without_value;
            }
            for (index, element) in bytes.chunks_exact(access.width as usize).enumerate() {
                let mut word = [0; 8];
                word[..element.len()].copy_from_slice(element);
                results[index][lane as usize] = u64::from_le_bytes(word);
            }
        }
        let element = u64::MAX >> (64 - access.width);
        for (index, &register) in to.iter().enumerate() {
            self.write(register, lanes, &results[index]);
            for lane in
                each(lanes).filter(|&lane| missing[lane as usize] >> (index as u64 * access.width) & element != 0)
            {
                self.defined[register as usize] &= !(1 << lane);
                self.lower_defined[register as usize] = 0;
            }
        }
        Ok(())
    }

    /// PTX ISA, "bar.warp.sync" and "shfl.sync". All lanes of `members` are here.
    pub(super) fn together(
        &mut self,
        operation: &Operation,
        lanes: u32,
        members: u32,
        kernel: &Kernel,
    ) -> Result<(), (Option<u32>, FaultKind)> {
        let (Operation::Shuffle { members: mask, .. } | Operation::WarpBarrier { members: mask }) = operation else {
            return Ok(());
        };
        let fault = |lane: u32, what: String| (Some(lane), FaultKind::Shuffle { what });
        if let Some(lane) = each(members & !lanes).next() {
            return Err(fault(lane, format!("the mask {members:#x} names lane {lane}, which does not come")));
        }
        let masks = self.read(*mask, lanes, kernel)?;
        if let Some(lane) = each(lanes).find(|&lane| masks[lane as usize] as u32 != members) {
            return Err(fault(
                lane,
                format!("lane {lane} gives the mask {:#x}, others {members:#x}", masks[lane as usize]),
            ));
        }
        if let Some(lane) = each(lanes & !members).next() {
            return Err(fault(lane, format!("lane {lane} is not in its mask {members:#x}")));
        }
        let Operation::Shuffle { mode, to, valid, value, by, clamp, .. } = operation else { return Ok(()) };
        let (values, by, clamp) =
            (self.read(*value, lanes, kernel)?, self.read(*by, lanes, kernel)?, self.read(*clamp, lanes, kernel)?);
        let (mut results, mut inside) = ([0; LANES as usize], [0; LANES as usize]);
        for lane in each(lanes) {
            let at = lane as usize;
            let (by, limit, segment) = (by[at] as u32 & 31, clamp[at] as u32 & 31, clamp[at] as u32 >> 8 & 31);
            let last = (lane & segment) | (limit & !segment);
            let first = lane & segment;
            let (source, is_inside) = match mode {
                Shuffle::Up => (lane.wrapping_sub(by), lane.cast_signed() - by.cast_signed() >= last.cast_signed()),
                Shuffle::Down => (lane + by, lane + by <= last),
                Shuffle::Butterfly => (lane ^ by, lane ^ by <= last),
                Shuffle::Index => (first | (by & !segment), first | (by & !segment) <= last),
            };
            let source = if is_inside { source } else { lane };
            if members >> source & 1 == 0 {
                return Err(fault(
                    lane,
                    format!("lane {lane} reads lane {source}, which is not in the mask {members:#x}"),
                ));
            }
            (results[at], inside[at]) = (values[source as usize], u64::from(is_inside));
        }
        let (to, valid) = (*to, *valid);
        self.write(to, lanes, &results);
        if let Some(valid) = valid {
            self.write(valid, lanes, &inside);
        }
        Ok(())
    }
}

/// The numbers of lanes.
fn each(mut lanes: u32) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let lane = (lanes != 0).then(|| lanes.trailing_zeros())?;
        lanes &= lanes - 1;
        Some(lane)
    })
}

enum Target {
    Global(line::Place),
    Shared(shared::Place),
    Parameters(u64),
}

/// What a lane accesses.
fn place(access: Access, base: u64, thread: u16, around: &Surroundings) -> Target {
    let address = base.wrapping_add_signed(access.offset);
    let bytes = access.width * access.count;
    let shared = |address| Target::Shared(shared::Place { address, bytes, thread, epoch: around.clock.epoch() });
    match access.space {
        Space::Parameters => Target::Parameters(address),
        // An address of 32 bits, and the sum with an offset one as well; a generic address is none.
        Space::Shared if base <= u64::from(u32::MAX) => shared(address & 0xffff_ffff),
        Space::Shared => shared(base),
        Space::Generic if address & SHARED_WINDOW != 0 && address < SHARED_WINDOW << 1 => {
            shared(address - SHARED_WINDOW)
        }
        Space::Global | Space::Generic => Target::Global(line::Place { address, bytes, block: around.block, thread }),
    }
}

fn parameter(parameters: &[u8], address: u64, to: &mut [u8]) -> Result<(), FaultKind> {
    let bytes = to.len() as u64;
    if !address.is_multiple_of(bytes) {
        return Err(FaultKind::Misaligned { address, bytes });
    }
    let found = usize::try_from(address).ok().and_then(|start| parameters.get(start..start.checked_add(to.len())?));
    to.copy_from_slice(found.ok_or(FaultKind::OutOfBounds { address, bytes })?);
    Ok(())
}
