//! What the compiler made of the kernels: the machine code for Hopper out of the embedded binary, held against what the
//! design counts on. A GPU is not needed; nvcc at build time and `cuobjdump` are.
#![cfg(feature = "cuda")]

#[path = "sass/listing.rs"]
mod listing;
mod require;

use gradprobe::{DType, cuda::FATBIN, launch::Kernel};
use listing::{Cost, Instruction, Listing, lies_in};
use require::skipped;
use std::{env, ops::Range, path::PathBuf, process::Command};

/// Elements of a lane's group: what one turn of a hot loop reads.
const GROUP: usize = 64;
/// Elements of a chunk for each lane of a warp.
const CHUNK_PER_LANE: usize = 32_768 / 32;
/// Threads of a block.
const THREADS: usize = 128;
/// What build.rs makes machine code for.
const ARCHITECTURES: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];

/// `cuobjdump`'s output on the embedded binary; `None` where there is no binary or no `cuobjdump`.
fn cuobjdump(options: &[&str]) -> Option<String> {
    if FATBIN.is_empty() {
        skipped(require::NVCC, "the build found no nvcc: no binary is embedded");
        return None;
    }
    let Some(tool) = find_cuobjdump() else {
        skipped(require::NVCC, "there is no cuobjdump in GRADPROBE_CUOBJDUMP, CUDA_HOME/bin or PATH");
        return None;
    };
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("gradprobe.fatbin");
    std::fs::write(&binary, FATBIN).unwrap();
    let output = Command::new(&tool).args(options).arg(&binary).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {options:?}: {complaint}", tool.display());
    Some(String::from_utf8(output.stdout).unwrap())
}

fn find_cuobjdump() -> Option<PathBuf> {
    if let Some(tool) = env::var_os("GRADPROBE_CUOBJDUMP") {
        return Some(tool.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = home.into_iter().chain(env::split_paths(&path));
    folders.find_map(|folder| Some(folder.join("cuobjdump")).filter(|tool| tool.is_file()))
}

/// The code of every kernel for one architecture, out of the output on all of them.
fn section(architecture: u32, output: &str) -> &str {
    let heading = format!("code for sm_{architecture}\n");
    let start = output.find(&heading).unwrap_or_else(|| panic!("no code for sm_{architecture}"));
    let rest = &output[start + heading.len()..];
    &rest[..rest.find("code for sm_").unwrap_or(rest.len())]
}

/// The kernels for Hopper, in the order of [`Kernel::ALL`].
fn hopper() -> Option<[Listing; Kernel::ALL.len()]> {
    let output = cuobjdump(&["-sass", "-arch", "sm_90"])?;
    let listings = Kernel::ALL.map(|kernel| Listing::of(kernel.entry(), &output));
    for listing in &listings {
        assert!(listing.instructions().len() > 100, "{} instructions found", listing.instructions().len());
    }
    Some(listings)
}

/// One of them.
fn hopper_code(kernel: Kernel) -> Option<Listing> {
    let place = Kernel::ALL.iter().position(|&other| other == kernel)?;
    hopper()?.into_iter().nth(place)
}

/// The loop that reads whole tiles of one dtype, one group of a lane in a turn.
struct HotLoop {
    span: Range<usize>,
    /// The part that runs twice in a turn, once for each half of the group: f32 has no registers for both at once.
    half: Option<Range<usize>>,
}

impl HotLoop {
    /// The outermost loops that read by 16 bytes, through the read-only path, and in no other way. Those that guard
    /// against a tensor's end have loads of single elements as well, and those that merge records read fresh words.
    fn all(code: &Listing) -> Vec<Self> {
        let reads_elements = |load: &Instruction| load.is_vector_load() && load.is("LDG.CONSTANT");
        let reads_vectors = |span: &Range<usize>| {
            let vectors = code.count(span, reads_elements);
            vectors > 0 && code.count(span, Instruction::is_load) == vectors
        };
        let hot = code.outermost(reads_vectors).into_iter().map(|span| {
            let mut halves = loops_in(code, &span);
            halves.retain(reads_vectors);
            assert!(halves.len() <= 1, "{halves:?} in {span:?}");
            Self { span, half: halves.pop() }
        });
        hot.collect()
    }

    /// Instructions of some kind that a turn executes, all branches taken.
    fn executed(&self, code: &Listing, kind: impl Fn(&Instruction) -> bool + Copy) -> usize {
        code.count(&self.span, kind) + self.half.as_ref().map_or(0, |half| code.count(half, kind))
    }

    /// By the bytes of a group, and by the conversion that only f16 needs.
    fn dtype(&self, code: &Listing) -> DType {
        let widens_f16 = |instruction: &Instruction| instruction.is("HADD2.F32") || instruction.is("F2F.F32.F16");
        let loads = self.executed(code, Instruction::is_vector_load);
        match (loads * 16 / GROUP, self.executed(code, widens_f16)) {
            (4, 0) => DType::F32,
            (2, 0) => DType::BF16,
            (2, GROUP) => DType::F16,
            (_, conversions) => panic!("{loads} loads of 16 bytes and {conversions} conversions for {GROUP} elements"),
        }
    }
}

/// The hot loop of each dtype, in the order of [`DType::ALL`].
fn hot_loops(code: &Listing) -> [HotLoop; 3] {
    let mut loops = HotLoop::all(code);
    loops.sort_by_key(|hot| hot.dtype(code) as u32);
    let dtypes: Vec<DType> = loops.iter().map(|hot| hot.dtype(code)).collect();
    assert_eq!(dtypes, DType::ALL, "one hot loop for each dtype");
    loops.try_into().unwrap_or_else(|_| unreachable!("three were just counted"))
}

/// An H200 issues about 15 instructions in the time its memory delivers a 16-bit element, and 30 for f32.
#[test]
fn hot_loops_stay_within_what_memory_allows() {
    let Some(measure) = hopper_code(Kernel::Measure) else { return };
    for (hot, limit) in hot_loops(&measure).iter().zip([22.0, 12.0, 12.0]) {
        let dtype = hot.dtype(&measure);
        let executed = hot.executed(&measure, |_| true) as f64 / GROUP as f64;
        println!("{dtype}: {executed:.2} instructions an element");
        assert!(executed <= limit, "{dtype}: {executed:.2} instructions an element, at most {limit} are hidden");
        assert_eq!(hot.half.is_some(), dtype == DType::F32, "{dtype}: halves");
        assert_eq!(hot.executed(&measure, Instruction::is_fp64), 0, "{dtype}: f64 in the hot loop");
    }
}

/// Each sum of four signed bytes counts signs: of a permutation that spreads the top bit of a byte over all of it. nvcc's
/// `__byte_perm` cannot make one: it clears those bits of the selector, and every zero and dead count of 16 bits was wrong.
#[test]
fn bytes_that_are_summed_are_spread_signs() {
    let Some(output) = cuobjdump(&["-sass"]) else { return };
    for architecture in ARCHITECTURES {
        let code = section(architecture, &output);
        let mut sums = 0;
        for kernel in Kernel::ALL {
            let listing = Listing::of(kernel.entry(), code);
            let all = 0..listing.instructions().len();
            let of_bytes = listing.count(&all, |instruction| instruction.is("IDP.4A"));
            let spread =
                listing.count(&all, |instruction| instruction.byte_selector().is_some_and(|s| s & 0x8888 == 0x8888));
            assert_eq!(of_bytes, spread, "sm_{architecture}, {}: sums of bytes and spread signs", kernel.entry());
            sums += of_bytes;
        }
        println!("sm_{architecture}: {sums} sums of spread signs");
        assert!(sums >= 64, "sm_{architecture}: {sums} sums; the two 16-bit types have 32 a group in measure alone");
    }
}

/// Little's law: an H200 needs 48 KiB under way in each multiprocessor to keep its memory busy.
#[test]
fn enough_bytes_are_in_flight() {
    let Some(measure) = hopper_code(Kernel::Measure) else { return };
    let blocks = resident_blocks("gradprobe_measure");
    for hot in hot_loops(&measure) {
        // Before the first of its loads is used a lane has issued these, and then waits.
        let loads = measure.loads_in_flight(hot.half.as_ref().unwrap_or(&hot.span));
        let bytes = blocks * THREADS * loads * 16;
        let dtype = hot.dtype(&measure);
        println!("{dtype}: {loads} loads of 16 bytes in flight, in {blocks} blocks {} KiB", bytes >> 10);
        assert!(bytes >= 48 << 10, "{dtype}: {blocks} blocks with {loads} loads in flight are {bytes} bytes");
    }
}

/// A block that merges a chunk reads nothing; the next chunk's first row is then on its way to L2.
#[test]
fn the_next_chunk_is_fetched_while_one_is_merged() {
    let Some(measure) = hopper_code(Kernel::Measure) else { return };
    let all = measure.instructions().iter().enumerate();
    let fetches: Vec<usize> = all.filter(|(_, code)| code.is("CCTL.PF2")).map(|(index, _)| index).collect();
    assert!(!fetches.is_empty());
    for hot in hot_loops(&measure) {
        // Behind the barrier after which the first warp alone merges.
        let barriers =
            fetches.iter().map(|&fetch| measure.straight_path(hot.span.end, fetch).map(|cost| cost.barriers));
        assert!(barriers.clone().all(|count| count == Some(1)), "{:?}", barriers.collect::<Vec<_>>());
    }
}

/// Few GPUs have more than one f64 unit to 64 f32 ones; on those, f64 must not take longer than the memory.
#[test]
fn fp64_stays_below_a_sixteenth_of_an_instruction_an_element() {
    let Some(measure) = hopper_code(Kernel::Measure) else { return };
    let hot_loops = hot_loops(&measure);
    let chunks = measure.loops().into_iter().filter(|span| hot_loops.iter().all(|hot| lies_in(&hot.span, span)));
    let chunk = chunks.min_by_key(Range::len).expect("the hot loops lie in a loop over the chunks");
    for hot in hot_loops {
        // A chunk of ordinary numbers that is not the last of its span passes the fewest barriers: each of scanning for
        // NaN, reading again and finishing a span, a tensor or the step has some of its own. The most expensive of these
        // paths is that of thread 0, whose warp merges the block's sums. The other three warps go around all of it, as
        // the cheapest path shows. One instruction of that warp stands for what 32 lanes have read of the chunk.
        let (start, end) = (hot.span.end, chunk.end - 1);
        let cost = measure.straight_path(start, end).expect("a chunk ends");
        let share = cost.most_fp64 as f64 / CHUNK_PER_LANE as f64;
        println!("{}: {} f64 instructions a chunk, {share:.4} an element", hot.dtype(&measure), cost.most_fp64);
        let mut loops = measure.loops();
        loops.retain(|span| {
            lies_in(span, &chunk) && span.start >= start && measure.count(span, Instruction::is_fp64) > 0
        });
        for span in loops {
            let ways = (measure.straight_path(start, span.start), measure.straight_path(span.end - 1, end));
            let (Some(to), Some(from)) = ways else { continue };
            assert!(to.barriers + from.barriers > cost.barriers, "an ordinary chunk runs the loop {span:?}, with f64");
        }
        assert!(cost.barriers >= 3, "the lanes, the decision and the last block's counter: {cost:?}");
        assert_eq!(cost.least_fp64, 0, "{cost:?}");
        assert!(cost.most_fp64 >= 36, "the merge alone has 36: {cost:?}");
        assert!(share <= 1.0 / 16.0, "{cost:?}");
    }
}

#[test]
fn nothing_goes_to_local_memory() {
    let Some(kernels) = hopper() else { return };
    for kernel in kernels {
        let local = |instruction: &Instruction| instruction.is("LDL") || instruction.is("STL");
        assert_eq!(kernel.count(&(0..kernel.instructions().len()), local), 0);
    }
    let usages = resource_usage();
    let mut found: Vec<_> = usages.iter().map(|(architecture, kernel, _)| (*architecture, kernel.as_str())).collect();
    found.sort_unstable();
    let mut expected =
        ARCHITECTURES.map(|architecture| Kernel::ALL.map(|kernel| (architecture, kernel.entry()))).concat();
    expected.sort_unstable();
    assert_eq!(found, expected, "every kernel for each architecture");
    let mut entries = Kernel::ALL.map(Kernel::entry);
    entries.sort_unstable();
    let all = ARCHITECTURES.map(|architecture| entries.map(|entry| (architecture, entry)));
    assert_eq!(found, all.concat(), "every kernel for each architecture");
    for (architecture, kernel, usage) in usages {
        assert_eq!((usage.stack, usage.local), (0, 0), "sm_{architecture}: stack and local bytes of {kernel}");
    }
}

/// Per 16 bytes read and 16 written an H200 issues 250 instructions in the time its memory takes.
#[test]
fn clip_keeps_the_memory_busy_both_ways() {
    let Some(clip) = hopper_code(Kernel::Clip) else { return };
    let blocks = resident_blocks("gradprobe_clip");
    let loads = |span: &Range<usize>| clip.count(span, Instruction::is_vector_load);
    let mut loops = clip.loops();
    loops.retain(|span| loads(span) > 1 && !loops_in(&clip, span).iter().any(|inner| loads(inner) > 0));
    assert_eq!(loops.len(), 2 * DType::ALL.len(), "for each dtype one that scales and one that zeroes: {loops:?}");
    for span in loops {
        let stores = clip.count(&span, |instruction| instruction.is("STG.128"));
        assert_eq!(stores, loads(&span), "{span:?}");
        let bytes = blocks * THREADS * clip.loads_in_flight(&span) * 16;
        let executed = span.len() / stores;
        println!("{} KiB in flight in {blocks} blocks, {executed} instructions for 16 bytes", bytes >> 10);
        assert!(bytes >= 48 << 10 && executed <= 200, "{span:?}");
    }
}

/// An H200 issues 140 instructions in the time its memory moves the 18 bytes of a 16-bit element: 2 of the gradient, and 4
/// each of mean and deviations, read and written; at 16.5 bytes a cycle, and 4 instructions of 32 lanes. Of f32, 155.
#[test]
fn update_keeps_the_memory_busy_by_whole_vectors() {
    const PACKET: usize = 8;
    let Some(update) = hopper_code(Kernel::Update) else { return };
    let blocks = resident_blocks("gradprobe_update");
    let reads_and_writes = |span: &Range<usize>| {
        update.count(span, Instruction::is_vector_load) > 0 && update.count(span, |code| code.is("STG.128")) > 0
    };
    let mut loops = update.loops();
    loops.retain(|span| reads_and_writes(span) && !loops_in(&update, span).iter().any(&reads_and_writes));
    assert_eq!(loops.len(), 2 * DType::ALL.len(), "for each dtype one of whole packets and one of single elements");
    // Single elements are those of gradients; the state goes by 16 bytes everywhere.
    for span in &loops {
        let stores = update.count(span, |code| code.is("STG"));
        assert_eq!((stores, update.count(span, |code| code.is("STG.128"))), (4, 4), "{span:?}");
    }
    let by_vectors = |span: &&Range<usize>| {
        update.count(span, Instruction::is_load) == update.count(span, Instruction::is_vector_load)
    };
    let mut loads_of_gradients = Vec::new();
    for span in loops.iter().filter(by_vectors) {
        let loads = update.count(span, Instruction::is_vector_load);
        assert_eq!(update.count(span, Instruction::is_fp64), 0, "{span:?}");
        loads_of_gradients.push(loads - 4);
        let in_flight = update.loads_in_flight(span);
        let bytes = blocks * THREADS * in_flight * 16;
        let executed = span.len() as f64 / PACKET as f64;
        println!(
            "{} + 4 loads, {in_flight} in flight in {blocks} blocks are {} KiB, {executed:.2} instructions an element",
            loads - 4,
            bytes >> 10
        );
        assert_eq!(in_flight, loads, "all loads of a packet are issued before one is used: {span:?}");
        assert!(bytes >= 48 << 10 && executed <= 20.0, "{span:?}");
    }
    loads_of_gradients.sort_unstable();
    assert_eq!(loads_of_gradients, [1, 1, 2], "f16 and bf16 by one load, f32 by two");
}

/// The loops of a kernel that read 16 bytes at a time and in no other way, each with the KiB that a multiprocessor has
/// in flight in it. Those that guard against a tensor's end read single elements as well.
fn loops_by_vectors(kernel: Kernel, code: &Listing) -> Vec<(Range<usize>, usize)> {
    let reads_elements = |load: &Instruction| load.is_vector_load() && load.is("LDG.CONSTANT");
    let loops = code.outermost(|span| {
        let vectors = code.count(span, reads_elements);
        vectors > 0 && code.count(span, Instruction::is_load) == vectors
    });
    let blocks = resident_blocks(kernel.entry());
    loops.into_iter().map(|span| (span.clone(), (blocks * THREADS * code.loads_in_flight(&span) * 16) >> 10)).collect()
}

/// An H200 issues 15 instructions in the time its memory delivers a 16-bit element. One of them adds to a counter, and
/// none branches: zeros and NaN take the same way.
#[test]
fn histogram_counts_each_element_by_one_atomic_without_a_branch() {
    let Some(histogram) = hopper_code(Kernel::Histogram) else { return };
    let loops = loops_by_vectors(Kernel::Histogram, &histogram);
    assert_eq!(loops.len(), DType::ALL.len(), "{loops:?}");
    for (span, in_flight) in loops {
        let elements = histogram.count(&span, |code| code.is("ATOMS"));
        let executed = span.len() as f64 / elements as f64;
        println!("{elements} elements a turn, {executed:.2} instructions each, {in_flight} KiB in flight");
        assert!(executed <= 15.0 && in_flight >= 48, "{span:?}");
        // Back to the start, and out of the loop at either end of its condition.
        assert!(histogram.count(&span, |code| code.is("BRA")) <= 2, "{span:?}");
        assert_eq!(histogram.count(&span, |code| code.is("ATOMS.POPC.INC")), elements, "a lane waits for no result");
        assert_eq!(histogram.count(&span, Instruction::is_fp64), 0, "{span:?}");
    }
}

/// Two elements of 16 bits take the time of 31 instructions, and of 16 on the f64 units of an H200, which are half as
/// many as those for f32.
#[test]
fn dot_multiplies_every_pair_of_types_by_whole_vectors() {
    let Some(dot) = hopper_code(Kernel::Dot) else { return };
    let loops = loops_by_vectors(Kernel::Dot, &dot);
    assert_eq!(loops.len(), DType::ALL.len().pow(2), "{loops:?}");
    for (span, in_flight) in loops {
        let pairs = dot.count(&span, |code| code.is("DFMA")) / 3;
        let executed = span.len() as f64 / pairs as f64;
        let fp64 = dot.count(&span, Instruction::is_fp64) as f64 / pairs as f64;
        println!("{pairs} pairs a turn, {executed:.2} instructions each, {fp64} of f64, {in_flight} KiB in flight");
        assert!(executed <= 20.0 && fp64 <= 5.0 && in_flight >= 48, "{span:?}");
    }
}

/// What gradient and weight of an element take together: an H200 issues 31 instructions in the time of two elements of 16
/// bits, 46 with a weight of f32. A unit of less than 4096 elements of 16 bits has fewer loads under way.
#[test]
fn adaptive_reads_by_whole_vectors() {
    let Some(adaptive) = hopper_code(Kernel::Adaptive) else { return };
    let blocks = resident_blocks("gradprobe_adaptive");
    let adds_up = |span: &Range<usize>| {
        let vectors = adaptive.count(span, Instruction::is_vector_load);
        let squares = adaptive.count(span, |code| code.is("DFMA"));
        vectors > 0 && squares > 0 && adaptive.count(span, Instruction::is_load) == vectors
    };
    let mut loops = adaptive.loops();
    loops.retain(|span| adds_up(span) && !loops_in(&adaptive, span).iter().any(adds_up));
    assert_eq!(loops.len(), 2 * DType::ALL.len(), "for each dtype one of gradients and one of weights");
    for span in loops {
        let elements = adaptive.count(&span, |code| code.is("DFMA"));
        let loads = adaptive.count(&span, Instruction::is_vector_load);
        let in_flight = (blocks * THREADS * adaptive.loads_in_flight(&span) * 16) >> 10;
        let executed = span.len() as f64 / elements as f64;
        println!(
            "{elements} elements and {loads} loads a turn, {executed:.2} instructions each, {in_flight} KiB in flight"
        );
        assert!(executed <= 15.0 && in_flight >= 48, "{span:?}");
    }
}

/// The loops within another.
fn loops_in(code: &Listing, span: &Range<usize>) -> Vec<Range<usize>> {
    code.loops().into_iter().filter(|inner| lies_in(inner, span)).collect()
}

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    registers: usize,
    stack: usize,
    shared: usize,
    local: usize,
}

/// Blocks of a kernel that fit on a multiprocessor of Hopper: 65536 registers, dealt out by 8 to a thread; 228 KiB of
/// shared memory, of which a block takes 1 KiB for itself; 2048 threads.
fn resident_blocks(kernel: &str) -> usize {
    let usages = resource_usage();
    let hopper = |(architecture, name, _): &&_| (*architecture, name) == (90, &kernel.to_owned());
    let (_, _, usage) = usages.iter().find(hopper).expect("the kernel has a resource usage");
    let by_registers = 65_536 / (usage.registers.next_multiple_of(8) * THREADS);
    by_registers.min((228 << 10) / (usage.shared + (1 << 10))).min(2048 / THREADS)
}

/// Of every kernel for every architecture, where [`hopper`] gives their code.
fn resource_usage() -> Vec<(u32, String, Usage)> {
    parse_usage(&cuobjdump(&["-res-usage"]).expect("it listed the code"))
}

fn parse_usage(output: &str) -> Vec<(u32, String, Usage)> {
    let (mut architecture, mut kernel, mut usages) = (0, "", Vec::new());
    for line in output.lines().map(str::trim) {
        if let Some(number) = line.strip_prefix("arch = sm_") {
            architecture = number.parse().unwrap();
        } else if let Some(name) = line.strip_prefix("Function ") {
            kernel = name.trim_end_matches(':');
        } else if line.starts_with("REG:") {
            let field = |name: &str| {
                let (_, value) =
                    line.split_whitespace().filter_map(|word| word.split_once(':')).find(|w| w.0 == name)?;
                value.parse().ok()
            };
            let field = |name: &str| field(name).unwrap_or_else(|| panic!("no {name} in {line:?}"));
            let usage = Usage {
                registers: field("REG"),
                stack: field("STACK"),
                shared: field("SHARED"),
                local: field("LOCAL"),
            };
            usages.push((architecture, kernel.to_owned(), usage));
        }
    }
    usages
}

/// Two small kernels as `cuobjdump` prints them, with every form the tests above look for.
const SAMPLE: &str = "\
\tcode for sm_90
\t\tFunction : other
        /*0000*/                   STL [R1], R2 ;                        /* 0x0000000000017387 */
                                                                         /* 0x000fe20000100800 */
        /*0010*/                   EXIT ;                                /* 0x000000000000794d */
\t\tFunction : sample
\t.headerflags\t@\"EF_CUDA_SM90\"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000ff00000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR8][R2.64+0x200] ;
        /*0030*/                   LDG.E.U16 R20, desc[UR4][R2.64+0x400] ;
        /*0040*/                   FADD R16, |R7|, -R16.reuse ;
        /*0050*/                   LDG.E.128.CONSTANT R12, desc[UR8][R2.64+0x400] ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/              @!P1 BRA P2, 0x10 ;
        /*0080*/                   F2F.F64.F32 R4, R8 ;
        /*0090*/               @P0 DADD R4, R4, R6 ;
        /*00a0*/               @P0 BRA 0xd0 ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/                   DMUL R4, R4, R6 ;
        /*00d0*/                   BRA.DIV UR5, 0x110 ;
        /*00e0*/                   MUFU.RCP64H R5, R5 ;
        /*00f0*/               @P3 BRA 0x0 ;
        /*0100*/                   EXIT ;
        /*0110*/                   DADD R4, R4, R6 ;
        /*0120*/                   BRA 0xe0 ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   NOP;
        /*0150*/                   PRMT R6, R4, 0xfdb9, R5 ;
        /*0160*/                   PRMT R6, R4, R7, R5 ;
";

#[test]
fn listings_are_read() {
    let code = Listing::of("sample", SAMPLE);
    let addresses: Vec<u64> = code.instructions().iter().map(|instruction| instruction.address).collect();
    assert_eq!(addresses, (0..=0x16).map(|index| index * 0x10).collect::<Vec<_>>());
    assert_eq!(code.instructions()[1].opcode, "LDG.E.128.CONSTANT");
    assert_eq!(Listing::of("other", SAMPLE).instructions().len(), 2, "a kernel ends where the next begins");
    assert_eq!(Listing::of("none", SAMPLE).instructions().len(), 0);

    let all = 0..addresses.len();
    assert_eq!(code.count(&all, Instruction::is_load), 4);
    assert_eq!(code.count(&all, Instruction::is_vector_load), 3);
    assert_eq!(code.count(&all, Instruction::is_fp64), 5, "F2F.F64, DADD, DMUL, MUFU.RCP64H, DADD");
    assert_eq!(code.count(&all, |instruction| instruction.is("LD")), 0, "LDG is no LD");
    let selectors: Vec<u32> = code.instructions().iter().filter_map(|code| code.byte_selector()).collect();
    assert_eq!(selectors, [0xfdb9], "one is a register");
}

#[test]
fn loops_are_those_that_a_branch_back_closes() {
    let code = Listing::of("sample", SAMPLE);
    // Of the two that start at 0x10, the longer; a branch to itself, which only pads, is none.
    assert_eq!(code.loops(), [0x1..0x8, 0x0..0x10, 0xe..0x13]);
    assert_eq!(code.outermost(|_| true), [0x0..0x10, 0xe..0x13]);
    assert_eq!(code.outermost(|span| span.len() < 0x10), [0x1..0x8, 0xe..0x13]);
    assert!(lies_in(&(1..8), &(0..16)) && !lies_in(&(0..16), &(0..16)) && !lies_in(&(14..19), &(0..16)));
    // The third load comes after the use of what the first has brought.
    assert_eq!(code.loads_in_flight(&(0x1..0x8)), 2);
    assert_eq!(code.loads_in_flight(&(0x5..0x8)), 1);
}

#[test]
fn straight_paths_pass_the_fewest_barriers() {
    let code = Listing::of("sample", SAMPLE);
    // Around the barrier and DMUL, and not into what lies behind BRA.DIV.
    let around = Cost { barriers: 0, least_fp64: 2, most_fp64: 3 };
    assert_eq!(code.straight_path(0x8, 0xf), Some(around));
    assert_eq!(code.straight_path(0xb, 0xd), Some(Cost { barriers: 1, least_fp64: 1, most_fp64: 1 }));
    assert_eq!(code.straight_path(0xf, 0x12), None, "EXIT");
}

#[test]
fn resource_usage_is_read() {
    let output = "
Fatbin ptx code:
================
arch = sm_75
code version = [9,0]

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0
 Function gradprobe_measure:
  REG:126 STACK:8 SHARED:14952 LOCAL:16 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
";
    let usage = Usage { registers: 126, stack: 8, shared: 14_952, local: 16 };
    assert_eq!(parse_usage(output), [(90, "gradprobe_measure".to_owned(), usage)]);
}
