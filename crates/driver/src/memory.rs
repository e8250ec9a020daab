//! Device memory and page-locked memory: both the host's, filled with garbage, fenced, and watched after it is freed.

use crate::{Outcome, context, die};
use cudarc::driver::sys::CUresult;
use std::{
    alloc::{Layout, alloc, dealloc},
    collections::{BTreeMap, VecDeque},
    slice,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

/// What the device has. Less than the test of 2^31 elements needs, which would take hours in emulation.
pub const DEVICE_BYTES: usize = 4 << 30;
/// The driver promises 256 for device memory.
const ALIGNMENT: usize = 256;
/// Bytes behind each allocation that nothing may write to.
const FENCE_BYTES: usize = 256;
/// Freed memory that is kept to see whether something still writes to it.
const GRAVE_BYTES: usize = 256 << 20;

/// Fresh memory is a NaN as a float of any size, freed memory another number than any test has, and neither is 0.
const FRESH: u8 = 0xff;
const FREED: u8 = 0xdd;
const FENCE: u8 = 0xfe;

/// Which memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory of the device.
    Device,
    /// Page-locked memory of the host.
    PageLocked,
}

struct Block {
    kind: Kind,
    bytes: usize,
    context: context::Id,
    /// No call may name it any more, though work that was queued before still may use it.
    given_up: bool,
}

struct Memory {
    /// By address.
    blocks: BTreeMap<u64, Block>,
    /// Sizes of freed blocks by address; the addresses, oldest first; and the sum of the sizes.
    graves: BTreeMap<u64, usize>,
    oldest: VecDeque<u64>,
    grave_bytes: usize,
}

static MEMORY: Mutex<Memory> =
    Mutex::new(Memory { blocks: BTreeMap::new(), graves: BTreeMap::new(), oldest: VecDeque::new(), grave_bytes: 0 });

fn memory() -> MutexGuard<'static, Memory> {
    MEMORY.lock().unwrap()
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + FENCE_BYTES, ALIGNMENT).unwrap()
}

/// Whether every byte is `value`.
fn all(address: u64, bytes: usize, value: u8) -> bool {
    // SAFETY: called with blocks and graves only, whose bytes were all written by `allocate`.
    unsafe { slice::from_raw_parts(address as *const u8, bytes) }.iter().all(|&byte| byte == value)
}

impl Memory {
    fn used(&self) -> usize {
        self.blocks.values().filter(|block| block.kind == Kind::Device).map(|block| block.bytes).sum()
    }

    /// The block that holds this range.
    fn find(&self, address: u64, bytes: usize) -> Option<&Block> {
        let (start, block) = self.blocks.range(..=address).next_back()?;
        (address + bytes as u64 <= start + block.bytes as u64).then_some(block)
    }
}

static POOLS: AtomicBool = AtomicBool::new(true);

/// Whether the device allocates in the order of streams.
pub fn has_pools() -> bool {
    POOLS.load(Ordering::SeqCst)
}

/// From here on contexts are those of a device that allocates in the order of streams, or of one that cannot.
#[unsafe(no_mangle)]
pub extern "C" fn gradprobe_host_driver_pools(has_pools: bool) {
    POOLS.store(has_pools, Ordering::SeqCst);
}

/// Bytes of the device that are not allocated.
pub fn free_bytes() -> usize {
    DEVICE_BYTES - memory().used()
}

/// How many allocations are left in these contexts.
pub fn count(within: impl Fn(context::Id) -> bool) -> usize {
    memory().blocks.values().filter(|block| within(block.context)).count()
}

/// All allocations of a context go, which is lost.
pub fn forget(context: context::Id) {
    let blocks: Vec<u64> = memory().blocks.iter().filter(|(_, b)| b.context == context).map(|(&at, _)| at).collect();
    blocks.into_iter().for_each(bury);
}

/// Memory in the current context.
pub fn allocate(kind: Kind, bytes: usize) -> Outcome<u64> {
    let context = context::current();
    let mut memory = memory();
    if bytes == 0 {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    if kind == Kind::Device && bytes > DEVICE_BYTES - memory.used() {
        return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    }
    // SAFETY: the size is not 0.
    let start = unsafe { alloc(layout(bytes)) };
    if start.is_null() {
        return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    }
    // SAFETY: so many bytes were just allocated.
    unsafe { start.write_bytes(FRESH, bytes) };
    // SAFETY: and these behind them.
    let fence = unsafe { start.add(bytes) };
    // SAFETY: as above.
    unsafe { fence.write_bytes(FENCE, FENCE_BYTES) };
    if kind == Kind::Device {
        gradprobe_ptx::memory::allocated(start as u64, bytes);
    }
    memory.blocks.insert(start as u64, Block { kind, bytes, context, given_up: false });
    Ok(start as u64)
}

/// From here on no call may name this memory; [`bury`] follows when all work queued before has run.
pub fn give_up(kind: Kind, address: u64) {
    match memory().blocks.get_mut(&address) {
        Some(block) if block.kind == kind && !block.given_up => block.given_up = true,
        _ => die(&format!("{address:#x} is freed but not the start of a live allocation")),
    }
}

/// Frees memory, and what was freed long ago for good.
pub fn bury(address: u64) {
    gradprobe_ptx::memory::freed(address);
    let mut memory = memory();
    let Some(Block { bytes, .. }) = memory.blocks.remove(&address) else { die("memory is freed twice") };
    if !all(address + bytes as u64, FENCE_BYTES, FENCE) {
        die(&format!("something wrote past the end of the {bytes} bytes at {address:#x}"));
    }
    // SAFETY: the block has so many bytes, and was in the table until now.
    unsafe { (address as *mut u8).write_bytes(FREED, bytes) };
    memory.graves.insert(address, bytes);
    memory.oldest.push_back(address);
    memory.grave_bytes += bytes;
    while memory.grave_bytes > GRAVE_BYTES {
        let Some(address) = memory.oldest.pop_front() else { break };
        let Some(bytes) = memory.graves.remove(&address) else { break };
        memory.grave_bytes -= bytes;
        if !all(address, bytes, FREED) {
            die(&format!("something wrote to the {bytes} bytes at {address:#x} after they were freed"));
        }
        // SAFETY: allocated with this layout, and forgotten with this.
        unsafe { dealloc(address as *mut u8, layout(bytes)) };
    }
}

/// For an argument of a call: ends the process unless all of it is live device memory of the current context.
pub fn demand(address: u64, bytes: usize) {
    let context = context::current();
    let is_live = |block: &Block| block.kind == Kind::Device && !block.given_up && block.context == context;
    if bytes > 0 && !memory().find(address, bytes).is_some_and(is_live) {
        die(&format!("the {bytes} bytes at {address:#x} are no live device memory of the current context"));
    }
}

/// For work that runs: ends the process unless all of it is device memory still.
pub fn demand_at_work(what: &str, address: u64, bytes: usize) {
    if bytes > 0 && memory().find(address, bytes).is_none_or(|block| block.kind != Kind::Device) {
        die(&format!("{what}, {bytes} bytes at {address:#x}, are no device memory when the work runs"));
    }
}

/// For work that runs: ends the process if this was freed since the call.
pub fn demand_not_freed(address: u64) {
    let memory = memory();
    let before = memory.graves.range(..=address).next_back();
    if before.is_some_and(|(start, &bytes)| address < start + bytes as u64) {
        die(&format!("a copy uses {address:#x}, which was freed before it ran"));
    }
}

/// Whether all of it is page-locked memory.
pub fn is_page_locked(address: u64, bytes: usize) -> bool {
    memory().find(address, bytes).is_some_and(|block| block.kind == Kind::PageLocked)
}
