//! The kernels beside `measure` that go through all elements: by whole vectors, with enough of them in flight, and with no
//! more instructions than the memory leaves time for.

use crate::{
    listing::{Instruction, loops_in},
    machines::{Code, all_of},
};
use gradprobe::{DType, device::Kernel};
use std::ops::Range;

/// Asserts that a loop has as much in flight as the memory wants.
fn assert_in_flight(code: &Code, span: &Range<usize>) {
    let (bytes, wanted) = (code.bytes_in_flight(span), code.architecture.bytes_in_flight);
    assert!(bytes >= wanted, "{code}, {span:?}: {bytes} bytes in flight, of {wanted}");
}

/// Per 16 bytes read and 16 written an H200 issues 250 instructions in the time its memory takes.
#[test]
fn clip_keeps_the_memory_busy_both_ways() {
    for code in all_of(Kernel::Clip) {
        let clip = &code.listing;
        let loads = |span: &Range<usize>| clip.count(span, Instruction::is_vector_load);
        let mut loops = clip.loops();
        loops.retain(|span| loads(span) > 1 && !loops_in(clip, span).iter().any(|inner| loads(inner) > 0));
        let wanted = 2 * DType::ALL.len();
        assert_eq!(loops.len(), wanted, "{code}: for each dtype one that scales and one that zeroes: {loops:?}");
        for span in loops {
            let stores = clip.count(&span, |instruction| instruction.is("STG.128"));
            assert_eq!(stores, loads(&span), "{code}, {span:?}");
            let executed = span.len() / stores;
            println!(
                "{}: {} KiB in flight, {executed} instructions for 16 bytes, {:.0} hidden",
                code.architecture,
                code.bytes_in_flight(&span) >> 10,
                code.architecture.hidden_by(32)
            );
            assert!(executed <= code.architecture.clip, "{code}, {span:?}: {executed} instructions for 16 bytes");
            assert_in_flight(code, &span);
        }
    }
}

/// An H200 issues 140 instructions in the time its memory moves the 18 bytes of a 16-bit element: 2 of the gradient, and 4
/// each of mean and deviations, read and written; at 16.5 bytes a cycle, and 4 instructions of 32 lanes. Of f32, 155.
#[test]
fn update_keeps_the_memory_busy_by_whole_vectors() {
    const PACKET: usize = 8;
    for code in all_of(Kernel::Update) {
        let update = &code.listing;
        let reads_and_writes = |span: &Range<usize>| {
            update.count(span, Instruction::is_vector_load) > 0 && update.count(span, |code| code.is("STG.128")) > 0
        };
        let mut loops = update.loops();
        loops.retain(|span| reads_and_writes(span) && !loops_in(update, span).iter().any(&reads_and_writes));
        let by_vectors = |span: &&Range<usize>| {
            update.count(span, Instruction::is_load) == update.count(span, Instruction::is_vector_load)
        };
        let mut loads_of_gradients = Vec::new();
        for span in loops.iter().filter(by_vectors) {
            let loads = update.count(span, Instruction::is_vector_load);
            let stores = update.count(span, |code| code.is("STG"));
            assert_eq!((stores, update.count(span, |code| code.is("STG.128"))), (4, 4), "{code}, {span:?}");
            assert_eq!(update.count(span, Instruction::is_fp64), 0, "{code}, {span:?}");
            loads_of_gradients.push(loads - 4);
            let in_flight = update.loads_in_flight(span);
            let executed = span.len() as f64 / PACKET as f64;
            println!(
                "{}: {} + 4 loads, {in_flight} in flight are {} KiB, {executed:.2} instructions an element",
                code.architecture,
                loads - 4,
                code.bytes_in_flight(span) >> 10
            );
            assert_eq!(in_flight, loads, "{code}, {span:?}: all loads of a packet are issued before one is used");
            assert!(executed <= 20.0, "{code}, {span:?}: {executed:.2} instructions an element");
            assert_in_flight(code, span);
        }
        loads_of_gradients.sort_unstable();
        assert_eq!(loads_of_gradients, [1, 1, 2], "{code}: f16 and bf16 by one load, f32 by two");
    }
}

/// The loops of a kernel that read 16 bytes at a time and in no other way. Those that guard against a tensor's end read
/// single elements as well.
fn loops_by_vectors(code: &Code) -> Vec<Range<usize>> {
    let reads_elements = |load: &Instruction| load.is_vector_load() && load.is("LDG.CONSTANT");
    code.listing.outermost(|span| {
        let vectors = code.listing.count(span, reads_elements);
        vectors > 0 && code.listing.count(span, Instruction::is_load) == vectors
    })
}

/// An H200 issues 15 instructions in the time its memory delivers a 16-bit element. One of them adds to a counter, and
/// none branches: zeros and NaN take the same way.
#[test]
fn histogram_counts_each_element_by_one_atomic_without_a_branch() {
    for code in all_of(Kernel::Histogram) {
        let histogram = &code.listing;
        let loops = loops_by_vectors(code);
        assert_eq!(loops.len(), DType::ALL.len(), "{code}: {loops:?}");
        for span in loops {
            let elements = histogram.count(&span, |code| code.is("ATOMS"));
            let executed = span.len() as f64 / elements as f64;
            println!(
                "{}: {elements} elements a turn, {executed:.2} instructions each, {} KiB in flight",
                code.architecture,
                code.bytes_in_flight(&span) >> 10
            );
            assert!(executed <= code.architecture.histogram, "{code}, {span:?}: {executed:.2} instructions an element");
            assert_in_flight(code, &span);
            // Not the one by which lanes of a warp that have lost each other meet.
            let branches = histogram.count(&span, |code| code.is("BRA") && !code.is("BRA.DIV") && !code.is("BRA.CONV"));
            assert!(branches <= code.architecture.histogram_branches, "{code}, {span:?}: {branches} branches");
            let counts =
                |instruction: &Instruction| instruction.is(code.architecture.count) && instruction.has_no_result();
            assert_eq!(histogram.count(&span, counts), elements, "{code}, {span:?}: a lane waits for no result");
            assert_eq!(histogram.count(&span, Instruction::is_fp64), 0, "{code}, {span:?}");
        }
    }
}

/// What compares replicas does nothing but multiply, add and shift integers, in less time than the memory takes.
#[test]
fn fingerprints_keep_the_memory_busy() {
    for code in all_of(Kernel::Fingerprint) {
        let loops = loops_by_vectors(code);
        // The two types of 16 bits are the same words.
        assert!((2..=DType::ALL.len()).contains(&loops.len()), "{code}: {loops:?}");
        for span in loops {
            let bytes = 16 * code.listing.count(&span, Instruction::is_vector_load);
            let (executed, hidden) = (span.len() as f64, code.architecture.hidden_by(bytes));
            println!("{code}: {executed} instructions for {bytes} bytes, {hidden:.0} hidden");
            assert!(executed <= hidden, "{code}, {span:?}: {executed} instructions for {bytes} bytes");
            assert_in_flight(code, &span);
            assert_eq!(code.listing.count(&span, Instruction::is_fp64), 0, "{code}, {span:?}");
        }
    }
}

/// Two elements of 16 bits take the time of 31 instructions, and of 16 on the f64 units of an H200, which are half as
/// many as those for f32.
#[test]
fn dot_multiplies_every_pair_of_types_by_whole_vectors() {
    for code in all_of(Kernel::Dot) {
        let dot = &code.listing;
        let loops = loops_by_vectors(code);
        assert_eq!(loops.len(), DType::ALL.len().pow(2), "{code}: {loops:?}");
        for span in loops {
            let pairs = dot.count(&span, |code| code.is("DFMA")) / 3;
            let executed = span.len() as f64 / pairs as f64;
            let fp64 = dot.count(&span, Instruction::is_fp64) as f64 / pairs as f64;
            println!(
                "{}: {pairs} pairs a turn, {executed:.2} instructions each, {fp64} of f64, {} KiB in flight",
                code.architecture,
                code.bytes_in_flight(&span) >> 10
            );
            let limit = code.architecture.hidden_by(4).min(code.architecture.dot);
            assert!(executed <= limit && fp64 <= 5.0, "{code}, {span:?}: {executed:.2} instructions, {fp64} of f64");
            assert_in_flight(code, &span);
        }
    }
}

/// All that is kept of weights is read and written by whole vectors, three rules of three types of weights; the types of
/// gradients are told apart within. Even if those of all three were executed, the instructions take less time than the memory of
/// an RTX 4090, an H100 and an H200; of a B200, whose memory is twice as fast, those that are executed.
#[test]
fn optimizers_move_whole_vectors() {
    for code in all_of(Kernel::Optimizer) {
        let optimizer = &code.listing;
        let moves = |span: &Range<usize>| {
            let vectors = optimizer.count(span, Instruction::is_vector_load);
            optimizer.count(span, Instruction::is_vector_store) >= 2
                && optimizer.count(span, Instruction::is_load) == vectors
        };
        let mut loops = optimizer.loops();
        loops.retain(|span| moves(span) && !loops_in(optimizer, span).iter().any(moves));
        assert_eq!(loops.len(), 3 * DType::ALL.len(), "{code}: none, one or two moments of three types of weights");
        for span in loops {
            let count = |kind: fn(&Instruction) -> bool| optimizer.count(&span, kind);
            let (loads, stores) = (count(Instruction::is_vector_load), count(Instruction::is_vector_store));
            let bytes = 16 * (stores + optimizer.loads_in_flight(&span));
            let in_flight = code.bytes_in_flight(&span);
            println!(
                "{}: {loads} loads and {stores} stores, {} instructions for {bytes} bytes, {} KiB in flight",
                code.architecture,
                span.len(),
                in_flight >> 10
            );
            let is_bound = [89, 90].contains(&code.architecture.number);
            assert!(!is_bound || span.len() as f64 <= code.architecture.hidden_by(bytes), "{code}, {span:?}");
            assert_in_flight(code, &span);
        }
    }
}

/// What gradient and weight of an element take together: an H200 issues 31 instructions in the time of two elements of 16
/// bits, 46 with a weight of f32. A unit of less than 4096 elements of 16 bits has fewer loads under way.
#[test]
fn adaptive_reads_by_whole_vectors() {
    for code in all_of(Kernel::Adaptive) {
        let adaptive = &code.listing;
        let adds_up = |span: &Range<usize>| {
            let vectors = adaptive.count(span, Instruction::is_vector_load);
            let squares = adaptive.count(span, |code| code.is("DFMA"));
            vectors > 0 && squares > 0 && adaptive.count(span, Instruction::is_load) == vectors
        };
        let mut loops = adaptive.loops();
        loops.retain(|span| adds_up(span) && !loops_in(adaptive, span).iter().any(adds_up));
        let wanted = 2 * DType::ALL.len();
        assert_eq!(loops.len(), wanted, "{code}: for each dtype one of gradients and one of weights");
        for span in loops {
            let elements = adaptive.count(&span, |code| code.is("DFMA"));
            let loads = adaptive.count(&span, Instruction::is_vector_load);
            let executed = span.len() as f64 / elements as f64;
            println!(
                "{}: {elements} elements and {loads} loads a turn, {executed:.2} instructions each, {} KiB in flight",
                code.architecture,
                code.bytes_in_flight(&span) >> 10
            );
            let limit = code.architecture.hidden_by(2).min(15.0);
            assert!(executed <= limit, "{code}, {span:?}: {executed:.2} instructions an element");
            assert_in_flight(code, &span);
        }
    }
}

/// Every sum is one instruction of f64 an element, and nothing else is: these may take half as long again as the memory has for
/// its 8 bytes. Of all instructions, an H200's memory hides 62, and a B200's 37: the ceiling is today's.
#[test]
fn ratios_keep_up_with_the_memory_where_f64_is_rare() {
    const BYTES: usize = 8;
    const SUMS: usize = 3;
    for code in all_of(Kernel::Gsnr).chain(all_of(Kernel::Adam)) {
        let (listing, architecture) = (&code.listing, code.architecture);
        let counts = |span: &Range<usize>| listing.count(span, |code| code.is(architecture.count));
        let mut loops = listing.loops();
        loops.retain(|span| counts(span) > 0 && !loops_in(listing, span).iter().any(|inner| counts(inner) > 0));
        let [span] = &loops[..] else { panic!("{code}: the loop over elements is one of {loops:?}") };
        let elements = counts(span);
        let (executed, fp64) = (span.len() / elements, listing.count(span, Instruction::is_fp64) / elements);
        let memory = BYTES as f64 / architecture.bytes_a_cycle;
        let busy = fp64 as f64 / architecture.fp64 as f64 / memory;
        println!("{code}: {executed} instructions an element, {fp64} of f64, these {busy:.2} of the memory's time");
        assert_eq!(listing.count(span, Instruction::is_load), 2 * elements, "{code}, {span:?}");
        assert_eq!(fp64, SUMS, "{code}, {span:?}");
        assert!(busy <= 1.5, "{code}: f64 takes {busy:.2} of the memory's time");
        assert!(executed <= 85, "{code}: {executed} instructions an element");
    }
}
