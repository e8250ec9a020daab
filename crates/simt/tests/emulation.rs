//! The emulation finds what it is there to find: each wrong kernel of `simt.cpp` is caught, and the right one is not.
#![allow(unsafe_code, reason = "launches kernels with addresses")]

use gradprobe_simt::{Entry, Schedule, launch};

/// Of a block.
const THREADS: u32 = 128;

/// Runs a kernel whose one output is a word for each thread, or for each block.
fn run(kernel: &str, blocks: u32, schedule: Schedule) -> Result<Vec<u32>, String> {
    // Aligned to 16 bytes, and with room beyond what a misaligned load touches.
    let mut words = vec![0u128; THREADS as usize];
    let address = (words.as_mut_ptr() as u64).to_ne_bytes();
    let entry = Entry::find(&format!("gradprobe_simt_{kernel}")).unwrap();
    // SAFETY: the kernels of simt.cpp use up to THREADS words there.
    unsafe { launch(entry, blocks, THREADS, &[&address], schedule) }?;
    Ok(bytemuck::cast_slice(&words)[..THREADS as usize].to_vec())
}

fn schedules() -> impl Iterator<Item = Schedule> {
    [Schedule::Forward, Schedule::Reverse].into_iter().chain((0..8).map(Schedule::Shuffled))
}

fn neighbours() -> Vec<u32> {
    (1..=THREADS).map(|neighbour| neighbour % THREADS).collect()
}

#[test]
fn a_barrier_orders_shared_memory_in_every_schedule() {
    for schedule in schedules() {
        assert_eq!(run("with_barrier", 1, schedule).unwrap(), neighbours(), "{schedule:?}");
    }
}

#[test]
fn a_missing_barrier_shows_in_every_schedule() {
    for schedule in schedules() {
        assert_ne!(run("missing_barrier", 1, schedule).unwrap(), neighbours(), "{schedule:?}");
    }
}

#[test]
fn threads_that_diverge_are_named() {
    for schedule in schedules() {
        let fault = run("divergent_barrier", 1, schedule).unwrap_err();
        assert!(fault.contains("100 threads wait at the barrier in simt.cpp:"), "{fault}");
        assert!(fault.contains("28 threads have ended"), "{fault}");
        let fault = run("two_barriers", 1, schedule).unwrap_err();
        assert_eq!(fault.matches("64 threads wait at the barrier").count(), 2, "{fault}");
        let fault = run("divergent_shuffle", 1, schedule).unwrap_err();
        assert!(fault.contains("64 threads wait at the shuffle"), "{fault}");
    }
}

#[test]
fn a_misaligned_load_is_a_fault() {
    let fault = run("misaligned", 1, Schedule::Forward).unwrap_err();
    assert!(fault.contains("misaligned load of 16 bytes"), "{fault}");
}

#[test]
fn shared_memory_is_garbage_at_the_start_of_each_block() {
    let words = run("unset_shared", 3, Schedule::Forward).unwrap();
    assert_eq!(words[..3], [u32::MAX; 3]);
}

#[test]
fn a_fault_leaves_the_emulation_usable() {
    run("divergent_barrier", 1, Schedule::Shuffled(1)).unwrap_err();
    assert_eq!(run("with_barrier", 1, Schedule::Forward).unwrap(), neighbours());
}

#[test]
fn a_user_s_kernel_is_found_by_its_name_and_wants_all_its_parameters() {
    assert!(Entry::find("no_such_kernel").is_none());
    let kernel = Entry::find("count_step").unwrap();
    // Three addresses and two numbers.
    assert_eq!((kernel.name(), kernel.parameter_bytes()), ("count_step", &[8, 8, 8, 4, 4][..]));
    // SAFETY: it does not run.
    let error = unsafe { launch(kernel, 1, THREADS, &[&[0; 8], &[0; 8]], Schedule::Forward) }.unwrap_err();
    assert_eq!(error, "count_step has parameters of [8, 8, 8, 4, 4] bytes, not [8, 8]");
}
