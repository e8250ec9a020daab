//! The architectures that build.rs makes machine code for: what a multiprocessor has, what its memory asks of a kernel,
//! and what the compiler makes of ours today where that differs.

use crate::{
    dump::{self, Usage, parse_usage, section},
    listing::Listing,
};
use gradprobe::device::Kernel;
use std::{fmt, ops::Range, sync::OnceLock};

const KIB: usize = 1 << 10;

/// An architecture. What a multiprocessor has is from the table of compute capabilities in NVIDIA's CUDA C++ Programming
/// Guide; all have 65536 registers, dealt out by 8 to a thread, and issue 4 instructions of 32 lanes a cycle.
pub struct Architecture {
    pub number: u32,
    /// Threads, and blocks, that a multiprocessor holds.
    threads: usize,
    blocks: usize,
    /// Bytes of shared memory of a multiprocessor.
    shared: usize,
    /// Those that a block takes for the driver beside what `cuobjdump` says. From sm_90 on that is said with the rest.
    reserved: usize,
    /// Bytes that a multiprocessor's memory delivers in a cycle: of a card with much of it, its bandwidth by its
    /// multiprocessors and its clock.
    pub bytes_a_cycle: f64,
    /// Bytes that a multiprocessor must have under way, by Little's law, to keep that memory busy.
    pub bytes_in_flight: usize,
    /// Lanes whose f64 instructions a multiprocessor does in a cycle.
    pub fp64: usize,
    /// Instructions an element in the hot loops of measure, for each dtype: at most these.
    pub instructions: [f64; 3],
    /// Instructions in the loops of clip for 16 bytes read and written, of histogram for an element, and of dot for a pair, at
    /// most.
    pub clip: usize,
    pub histogram: f64,
    pub dot: f64,
    /// Branches in the loop of the histogram: back to its start, and out of it.
    pub histogram_branches: usize,
    /// How the histogram adds to shared memory.
    pub count: &'static str,
}

/// What all have in common, or most: the fields below say where an architecture differs.
const COMMON: Architecture = Architecture {
    number: 0,
    threads: 2048,
    blocks: 32,
    shared: 0,
    reserved: KIB,
    bytes_a_cycle: 0.0,
    bytes_in_flight: 0,
    fp64: 2,
    instructions: [0.0; 3],
    clip: 150,
    histogram: 15.0,
    dot: 20.0,
    histogram_branches: 2,
    count: "ATOMS.POPC.INC",
};

/// Of all seven. The bytes in flight are those of CUB's `arch_to_min_bytes_in_flight`, for the card it names there.
pub static ARCHITECTURES: [Architecture; 7] = [
    // Before sm_90 there is no instruction for the least of two sums, two halves at once.
    Architecture {
        number: 75,
        threads: 1024,
        blocks: 16,
        shared: 64 * KIB,
        reserved: 0,
        bytes_a_cycle: 5.9,        // RTX 2080 Ti: 616 GB/s, 68 at 1.545 GHz
        bytes_in_flight: 12 * KIB, // a V100's, whose multiprocessor gets twice as much
        instructions: [14.5, 14.0, 14.0],
        count: "ATOMS.ADD",
        histogram_branches: 3, // it leaves the loop in two places
        ..COMMON
    },
    Architecture {
        number: 80,
        shared: 164 * KIB,
        bytes_a_cycle: 13.4, // A100: 2039 GB/s, 108 at 1.41 GHz
        bytes_in_flight: 16 * KIB,
        fp64: 32,
        instructions: [14.5, 14.0, 14.0],
        ..COMMON
    },
    Architecture {
        number: 86,
        threads: 1536,
        blocks: 16,
        shared: 100 * KIB,
        bytes_a_cycle: 6.7,        // RTX 3090: 936 GB/s, 82 at 1.695 GHz
        bytes_in_flight: 16 * KIB, // an A100's, whose multiprocessor gets twice as much
        instructions: [14.5, 14.0, 14.0],
        ..COMMON
    },
    Architecture {
        number: 89,
        threads: 1536,
        blocks: 24,
        shared: 100 * KIB,
        bytes_a_cycle: 3.1,        // RTX 4090: 1008 GB/s, 128 at 2.52 GHz
        bytes_in_flight: 16 * KIB, // an A100's, whose multiprocessor gets four times as much
        instructions: [14.5, 14.0, 14.0],
        ..COMMON
    },
    Architecture {
        number: 90,
        shared: 228 * KIB,
        reserved: 0,
        bytes_a_cycle: 16.5, // H200: 132 at 1.98 GHz, and 4.3 TB/s that were measured (kernels/TUNING.md)
        bytes_in_flight: 48 * KIB,
        fp64: 64,
        instructions: [22.0, 12.0, 12.0],
        ..COMMON
    },
    // A B200 wants 64 KiB in flight, which measure has, and dot has 48: today's, and a floor. Its memory hides 149 instructions for 16 bytes both ways and 9.3 an element of 16 bits: the clip of f16 has 164, and the
    // histogram 13. These too are today's, and ceilings.
    Architecture {
        number: 100,
        shared: 228 * KIB,
        reserved: 0,
        bytes_a_cycle: 27.5, // B200: 8 TB/s, 148 at 1.965 GHz
        bytes_in_flight: 48 * KIB,
        fp64: 64,
        instructions: [16.5, 9.0, 9.0],
        ..COMMON
    },
    Architecture {
        number: 120,
        threads: 1536,
        blocks: 24,
        shared: 100 * KIB,
        reserved: 0,
        bytes_a_cycle: 4.4,        // RTX 5090: 1792 GB/s, 170 at 2.41 GHz
        bytes_in_flight: 16 * KIB, // an A100's: 1792 GB/s for a whole microsecond are 10 KiB a multiprocessor
        instructions: [18.0, 10.0, 10.0],
        dot: 32.0, // today's: of the 480 instructions for 16 pairs 298 are NOP, which the compiler puts between those of f64
        ..COMMON
    },
];

impl Architecture {
    /// Instructions that are issued, lane by lane, while the memory delivers or takes so many bytes.
    pub fn hidden_by(&self, bytes: usize) -> f64 {
        4.0 * 32.0 / self.bytes_a_cycle * bytes as f64
    }

    /// Blocks with this usage that fit on a multiprocessor.
    pub fn resident_blocks(&self, usage: Usage, threads: usize) -> usize {
        let by_registers = 65_536 / (usage.registers.next_multiple_of(8) * threads);
        let by_shared = self.shared.checked_div(usage.shared + self.reserved).unwrap_or(self.blocks);
        by_registers.min(by_shared).min(self.threads / threads).min(self.blocks)
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}", self.number)
    }
}

/// A kernel for one architecture.
pub struct Code {
    pub architecture: &'static Architecture,
    pub kernel: Kernel,
    pub listing: Listing,
    pub usage: Usage,
}

impl Code {
    /// Bytes that a multiprocessor has under way while the lanes of all its blocks wait for a span's first loads.
    pub fn bytes_in_flight(&self, span: &Range<usize>) -> usize {
        let threads = self.kernel.threads() as usize;
        self.architecture.resident_blocks(self.usage, threads) * threads * self.listing.loads_in_flight(span) * 16
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.architecture, self.kernel.entry())
    }
}

/// Every kernel for every architecture, in the order of [`ARCHITECTURES`] and [`Kernel::ALL`]; `None` where there is nothing
/// to list.
pub fn everything() -> Option<&'static [Code]> {
    static CACHE: OnceLock<Vec<Code>> = OnceLock::new();
    let (sass, usage) = (dump::sass()?, dump::usage()?);
    let all = CACHE.get_or_init(|| {
        let usages = parse_usage(usage);
        let code = |architecture: &'static Architecture, kernel: Kernel| {
            let listing = Listing::of(kernel.entry(), section(architecture.number, sass));
            let found = listing.instructions().len();
            assert!(found > 100, "{architecture}, {}: {found} instructions", kernel.entry());
            let of_this = |(number, name, _): &&(u32, String, Usage)| {
                (*number, name.as_str()) == (architecture.number, kernel.entry())
            };
            let usage = usages.iter().find(of_this).expect("the kernel has a resource usage").2;
            Code { architecture, kernel, listing, usage }
        };
        ARCHITECTURES
            .iter()
            .flat_map(|architecture| Kernel::ALL.iter().map(|&kernel| code(architecture, kernel)))
            .collect()
    });
    Some(all)
}

/// One kernel for every architecture; none where there is nothing to list.
pub fn all_of(kernel: Kernel) -> impl Iterator<Item = &'static Code> {
    everything().unwrap_or_default().iter().filter(move |code| code.kernel == kernel)
}
