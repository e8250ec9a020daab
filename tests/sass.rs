//! What the compiler made of the kernels: the machine code for seven architectures out of the embedded binary, held
//! against what the design counts on. A GPU is not needed; nvcc at build time and `cuobjdump` are.
#![cfg(feature = "cuda")]

#[path = "sass/dump.rs"]
mod dump;
#[path = "sass/listing.rs"]
mod listing;
#[path = "sass/machines.rs"]
mod machines;
#[path = "sass/measure.rs"]
mod measure;
#[path = "sass/readers.rs"]
mod readers;
mod require;
#[path = "sass/streams.rs"]
mod streams;

use gradprobe::device::Kernel;
use listing::Instruction;
use machines::{ARCHITECTURES, everything};

/// Each sum of four signed bytes counts signs: of a permutation that spreads the top bit of a byte over all of it. nvcc's
/// `__byte_perm` cannot make one: it clears those bits of the selector, and every zero and dead count of 16 bits was wrong.
#[test]
fn bytes_that_are_summed_are_spread_signs() {
    let Some(all) = everything() else { return };
    for architecture in &ARCHITECTURES {
        let mut sums = 0;
        for code in all.iter().filter(|code| code.architecture.number == architecture.number) {
            let whole = 0..code.listing.instructions().len();
            let of_bytes = code.listing.count(&whole, |instruction| instruction.is("IDP.4A"));
            let spreads = |instruction: &Instruction| instruction.byte_selector().is_some_and(|s| s & 0x8888 == 0x8888);
            let spread = code.listing.count(&whole, spreads);
            assert_eq!(of_bytes, spread, "{code}: sums of bytes and spread signs");
            sums += of_bytes;
        }
        println!("{architecture}: {sums} sums of spread signs");
        assert!(sums >= 64, "{architecture}: {sums} sums; the two 16-bit types have 32 a group in measure alone");
    }
}

#[test]
fn nothing_goes_to_local_memory() {
    let (Some(all), Some(usage)) = (everything(), dump::usage()) else { return };
    for code in all {
        let local = |instruction: &Instruction| instruction.is("LDL") || instruction.is("STL");
        let found = code.listing.count(&(0..code.listing.instructions().len()), local);
        assert_eq!(found, 0, "{code}: loads and stores of local memory");
    }
    let usages = dump::parse_usage(usage);
    let mut found: Vec<_> = usages.iter().map(|(architecture, kernel, _)| (*architecture, kernel.as_str())).collect();
    found.sort_unstable();
    let mut expected: Vec<_> = all.iter().map(|code| (code.architecture.number, code.kernel.entry())).collect();
    expected.sort_unstable();
    assert_eq!(found, expected, "every kernel for each architecture, and no other");
    for (architecture, kernel, usage) in usages {
        assert_eq!((usage.stack, usage.local), (0, 0), "sm_{architecture}: stack and local bytes of {kernel}");
    }
}

/// A division by what only the launch knows is some 20 instructions of 32 bits, and of 64 some 70 in a function; lanes that
/// fold would wait for it at each step, and have none. Outside those steps there is one for a block's run, and the rests by
/// lengths of rings: at most these, and not all have to stay.
#[test]
fn folds_do_not_divide() {
    const OUTSIDE: &[(Kernel, usize)] = &[
        (Kernel::Measure, 4),
        (Kernel::Clip, 1),
        (Kernel::Histogram, 1),
        (Kernel::Sample, 1),
        (Kernel::Merge, 3),
        (Kernel::Fingerprint, 1),
    ];
    let Some(all) = everything() else { return };
    for code in all {
        let steps = code.listing.loops_by_barriers();
        let inside = steps.iter().map(|span| code.listing.divisions(span)).sum::<usize>();
        let outside = code.listing.divisions(&(0..code.listing.instructions().len())) - inside;
        println!("{code}: {inside} divisions in {} loops of folds, {outside} outside", steps.len());
        assert_eq!(inside, 0, "{code}: divisions in the steps of folds");
        let most = OUTSIDE.iter().find(|(kernel, _)| *kernel == code.kernel).map_or(0, |&(_, most)| most);
        assert!(outside <= most, "{code}: {outside} divisions outside of folds, of at most {most}");
    }
}
