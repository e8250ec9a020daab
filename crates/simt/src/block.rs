//! Runs the threads of blocks as fibers, one at a time, in an order that is as bad as CUDA allows.
//!
//! A thread runs until it waits: at a barrier for its block, at a shuffle for its warp. Between two such points the
//! threads that can run do so in shuffled order, so that whatever one reads of another without a barrier is sometimes
//! there and sometimes not.

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack};
use std::{
    cell::{Cell, RefCell},
    ffi::{CStr, c_char},
};

const WARP: usize = 32;
/// Of each fiber. The kernels' frames are a few hundred bytes, some thousand under the sanitizers.
const STACK_BYTES: usize = 256 << 10;

/// In which order threads and blocks run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// By index.
    #[default]
    Forward,
    /// By index, from the last.
    Reverse,
    /// Shuffled anew at every step, from this seed.
    Shuffled(u64),
}

impl Schedule {
    /// For PTX, which runs in orders by a number: another for each.
    pub fn seed(self) -> u64 {
        match self {
            Self::Forward => 0,
            Self::Reverse => 1,
            Self::Shuffled(seed) => seed.wrapping_add(2),
        }
    }
}

/// A kernel compiled for the host.
#[derive(Clone, Copy, Debug)]
pub struct Entry(&'static Described);

/// `SimtKernel` of described.hpp.
#[derive(Debug)]
#[repr(C)]
struct Described {
    name: *const c_char,
    call: unsafe extern "C" fn(*const *const u8),
    parameter_count: u32,
    parameter_bytes: [u32; Entry::MAX_PARAMETERS],
}

// SAFETY: constants of C++.
unsafe impl Sync for Described {}

unsafe extern "C" {
    /// The kernel of this number, or null behind the last: those of the library and of simt.cpp.
    safe fn gradprobe_simt_kernel(index: u32) -> Option<&'static Described>;
    /// The same, of adamw.cpp.
    safe fn gradprobe_simt_user_kernel(index: u32) -> Option<&'static Described>;
    fn gradprobe_simt_enter(thread: u32, block: u32, grid: u32, shared: *mut u8, shared_bytes: u64);
    safe fn gradprobe_simt_shared_bytes() -> u64;
}

impl Entry {
    /// No kernel has more.
    pub const MAX_PARAMETERS: usize = 16;

    /// The kernel of this name.
    pub fn find(name: &str) -> Option<Self> {
        let own = (0..).map_while(|index| gradprobe_simt_kernel(index));
        let users = (0..).map_while(|index| gradprobe_simt_user_kernel(index));
        own.chain(users).map(Self).find(|kernel| kernel.name() == name)
    }

    /// The name of its entry point.
    pub fn name(self) -> &'static str {
        // SAFETY: a string literal.
        unsafe { CStr::from_ptr(self.0.name) }.to_str().expect("names are ASCII")
    }

    /// The size of each parameter.
    pub fn parameter_bytes(self) -> &'static [u32] {
        &self.0.parameter_bytes[..self.0.parameter_count as usize]
    }
}

/// Why a thread stopped.
#[derive(Clone, Copy)]
enum Event {
    Barrier { file: *const c_char, line: u32 },
    Shuffle { bits: u64, delta: u32, line: u32 },
    Fault { what: *const c_char },
}

/// Where a thread stands.
#[derive(Clone, Copy)]
enum State {
    /// Can run, and this is what the call it waits in returns.
    Ready(u64),
    Waits(Event),
    Done,
}

type Fiber = Coroutine<u64, Event, (), DefaultStack>;

thread_local! {
    /// The running thread of the running block.
    static THREAD: Cell<usize> = const { Cell::new(0) };
    /// By which each thread of the running block hands over.
    static YIELDERS: RefCell<Vec<*const Yielder<u64, Event>>> = const { RefCell::new(Vec::new()) };
    /// Stacks of finished fibers.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Hands over to the scheduler until it lets this thread go on.
fn suspend(event: Event) -> u64 {
    let yielder = YIELDERS.with_borrow(|yielders| yielders[THREAD.get()]);
    // SAFETY: the running fiber put it there when it began, and it lives as long as the fiber.
    unsafe { &*yielder }.suspend(event)
}

#[unsafe(no_mangle)]
extern "C" fn gradprobe_simt_barrier(file: *const c_char, line: u32) {
    suspend(Event::Barrier { file, line });
}

#[unsafe(no_mangle)]
extern "C" fn gradprobe_simt_shuffle_down(bits: u64, delta: u32, line: u32) -> u64 {
    suspend(Event::Shuffle { bits, delta, line })
}

#[unsafe(no_mangle)]
extern "C" fn gradprobe_simt_fault(what: *const c_char) {
    suspend(Event::Fault { what });
    unreachable!("a faulted thread is never resumed");
}

fn text(string: *const c_char) -> String {
    // SAFETY: simt.hpp passes string literals only.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned()
}

/// A permutation of 0..n by the schedule.
fn order(schedule: Schedule, random: &mut fastrand::Rng, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    match schedule {
        Schedule::Forward => {}
        Schedule::Reverse => order.reverse(),
        Schedule::Shuffled(_) => random.shuffle(&mut order),
    }
    order
}

/// Runs a kernel with `blocks` blocks of `threads` threads, and with the bytes of its parameters.
///
/// # Safety
/// The parameters must be what the kernel expects, with host addresses.
///
/// # Errors
/// When the parameters are not as many, or as large, as the kernel's; when threads wait for others that never come, or a
/// load is misaligned: what, and where.
pub unsafe fn launch(
    entry: Entry,
    blocks: u32,
    threads: u32,
    parameters: &[&[u8]],
    schedule: Schedule,
) -> Result<(), String> {
    let (name, sizes) = (entry.name(), entry.parameter_bytes());
    let given: Vec<usize> = parameters.iter().map(|parameter| parameter.len()).collect();
    if !given.iter().copied().eq(sizes.iter().map(|&size| size as usize)) {
        return Err(format!("{name} has parameters of {sizes:?} bytes, not {given:?}"));
    }
    let mut addresses = [std::ptr::null(); Entry::MAX_PARAMETERS];
    addresses.iter_mut().zip(parameters).for_each(|(address, parameter)| *address = parameter.as_ptr());
    // SAFETY: the caller vouches for the parameters, whose bytes stay until this returns.
    run(move || unsafe { (entry.0.call)(addresses.as_ptr()) }, (blocks, threads), schedule)
}

/// Runs what each thread of a launch does.
fn run(body: impl Fn() + Copy + 'static, (blocks, threads): (u32, u32), schedule: Schedule) -> Result<(), String> {
    let seed = if let Schedule::Shuffled(seed) = schedule { seed } else { 0 };
    let mut random = fastrand::Rng::with_seed(seed);
    let shared_bytes = gradprobe_simt_shared_bytes();
    let mut shared = vec![0u128; usize::try_from(shared_bytes).unwrap_or(usize::MAX).div_ceil(16)];
    for block in order(schedule, &mut random, blocks as usize) {
        // Garbage that is a NaN as a float of any size.
        shared.fill(u128::MAX);
        let block = u32::try_from(block).unwrap_or(u32::MAX);
        let enter = |thread: usize| {
            THREAD.set(thread);
            let thread = u32::try_from(thread).unwrap_or(u32::MAX);
            // SAFETY: `shared` outlives the block and has that many bytes.
            unsafe { gradprobe_simt_enter(thread, block, blocks, shared.as_mut_ptr().cast(), shared_bytes) };
        };
        run_block(body, threads as usize, schedule, &mut random, enter)
            .map_err(|fault| format!("block {block}: {fault}"))?;
    }
    Ok(())
}

fn run_block(
    body: impl Fn() + Copy + 'static,
    threads: usize,
    schedule: Schedule,
    random: &mut fastrand::Rng,
    mut enter: impl FnMut(usize),
) -> Result<(), String> {
    YIELDERS.with_borrow_mut(|yielders| yielders.resize(threads, std::ptr::null()));
    let mut fibers: Vec<Fiber> = (0..threads).map(|_| fiber(body)).collect::<Result<_, _>>()?;
    let mut states = vec![State::Ready(0); threads];
    let mut fault = None;
    while fault.is_none() {
        let mut progress = false;
        for thread in order(schedule, random, threads) {
            if let State::Ready(input) = states[thread] {
                progress = true;
                enter(thread);
                states[thread] = match fibers[thread].resume(input) {
                    CoroutineResult::Yield(event) => State::Waits(event),
                    CoroutineResult::Return(()) => State::Done,
                };
                if let State::Waits(Event::Fault { what }) = states[thread] {
                    fault = Some(format!("thread {thread}: {}", text(what)));
                }
            }
        }
        if states.iter().all(|state| matches!(state, State::Done)) {
            break;
        }
        states.chunks_exact_mut(WARP).for_each(release_shuffle);
        release_barrier(&mut states);
        if !progress && fault.is_none() {
            fault = Some(stuck(&states));
        }
    }
    for mut fiber in fibers {
        if !fiber.done() {
            // SAFETY: the frames are those of kernels, which own nothing that needs to be dropped.
            unsafe { fiber.force_reset() };
        }
        STACKS.with_borrow_mut(|stacks| stacks.push(fiber.into_stack()));
    }
    fault.map_or(Ok(()), Err)
}

fn fiber(body: impl Fn() + 'static) -> Result<Fiber, String> {
    let stack = match STACKS.with_borrow_mut(Vec::pop) {
        Some(stack) => stack,
        None => DefaultStack::new(STACK_BYTES).map_err(|error| format!("no stack for a fiber: {error}"))?,
    };
    Ok(Fiber::with_stack(stack, move |yielder, _| {
        YIELDERS.with_borrow_mut(|yielders| yielders[THREAD.get()] = std::ptr::from_ref(yielder));
        body();
    }))
}

/// Lets a warp go on when all its lanes are at one shuffle: lane l gets the bits of lane l + delta, or its own beyond. Of
/// the distance five bits count, as the PTX ISA has it under `shfl.sync`.
fn release_shuffle(warp: &mut [State]) {
    let mut values = [0u64; WARP];
    let mut place = None;
    for (value, state) in values.iter_mut().zip(warp.iter()) {
        let State::Waits(Event::Shuffle { bits, delta, line }) = *state else { return };
        if *place.get_or_insert((delta, line)) != (delta, line) {
            return;
        }
        *value = bits;
    }
    let delta = place.map_or(0, |(delta, _)| delta as usize % WARP);
    for (lane, state) in warp.iter_mut().enumerate() {
        *state = State::Ready(*values.get(lane + delta).unwrap_or(&values[lane]));
    }
}

/// Lets the block go on when all its threads are at one barrier.
fn release_barrier(states: &mut [State]) {
    let mut place = None;
    for state in states.iter() {
        let State::Waits(Event::Barrier { file, line }) = *state else { return };
        if *place.get_or_insert((file, line)) != (file, line) {
            return;
        }
    }
    states.fill(State::Ready(0));
}

/// What threads that wait for ever wait for: one line for each different place.
fn stuck(states: &[State]) -> String {
    let mut places: Vec<(String, usize)> = Vec::new();
    for state in states {
        let place = match *state {
            State::Ready(_) => "can run".to_owned(),
            State::Done => "have ended".to_owned(),
            State::Waits(Event::Barrier { file, line }) => format!("wait at the barrier in {}:{line}", text(file)),
            State::Waits(Event::Shuffle { line, .. }) => format!("wait at the shuffle in line {line}"),
            State::Waits(Event::Fault { what }) => text(what),
        };
        match places.iter_mut().find(|(known, _)| *known == place) {
            Some((_, count)) => *count += 1,
            None => places.push((place, 1)),
        }
    }
    let places: Vec<String> = places.into_iter().map(|(place, count)| format!("{count} threads {place}")).collect();
    format!("threads diverge: {}", places.join(", "))
}
