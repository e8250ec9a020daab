//! The kernel that measures: its hot loops, and what an ordinary chunk costs beside them.

use crate::{
    listing::{Cost, Instruction, Listing, lies_in, loops_in},
    machines::{Code, all_of},
};
use gradprobe::{DType, device::Kernel};
use std::ops::Range;

/// Elements of a lane's group: what one turn of a hot loop reads.
const GROUP: usize = 64;
/// Elements of a chunk for each lane of a warp.
const CHUNK_PER_LANE: usize = 32_768 / 32;

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

/// Within what the memory allows, 15.5 instructions for an element of 16 bits on an H200 and twice that for f32, and within
/// what there are today and some more. All loads are of 16 bytes: the loops are found by that.
#[test]
fn hot_loops_stay_within_what_memory_allows() {
    for code in all_of(Kernel::Measure) {
        let measure = &code.listing;
        for (hot, limit) in hot_loops(measure).iter().zip(code.architecture.instructions) {
            let dtype = hot.dtype(measure);
            let executed = hot.executed(measure, |_| true) as f64 / GROUP as f64;
            let hidden = code.architecture.hidden_by(dtype.size());
            println!("{}, {dtype}: {executed:.2} instructions an element, {hidden:.1} hidden", code.architecture);
            assert!(
                executed <= limit.min(hidden),
                "{code}, {dtype}: {executed:.2}, of at most {limit}, {hidden:.1} hidden"
            );
            assert_eq!(hot.half.is_some(), dtype == DType::F32, "{code}, {dtype}: halves");
            assert_eq!(hot.executed(measure, Instruction::is_fp64), 0, "{code}, {dtype}: f64 in the hot loop");
        }
    }
}

/// A tensor that begins anywhere is read by aligned loads of 16 bytes all the same, one more a packet, out of which its elements
/// are cut: in a loop of its own, which also guards against a chunk's end.
#[test]
fn a_misaligned_tensor_takes_at_most_a_quarter_more_instructions() {
    for code in all_of(Kernel::Measure) {
        let measure = &code.listing;
        let of_elements = |load: &Instruction| load.is_load() && load.is("LDG.CONSTANT");
        let both_ways = |span: &Range<usize>| {
            let vectors = measure.count(span, |load| of_elements(load) && load.is_vector_load());
            let together = measure.count(span, |instruction| instruction.is("SHFL") || instruction.is("BAR"));
            vectors > 0 && measure.count(span, of_elements) > vectors && together == 0
        };
        let aligned = hot_loops(measure);
        // Small tensors are measured elsewhere, and have one group.
        let chunk = chunk_loop(code, &aligned);
        let loops = measure.outermost(|span| both_ways(span) && lies_in(span, &chunk));
        assert_eq!(loops.len(), DType::ALL.len(), "{code}: one loop for each dtype, {loops:?}");
        let mut shares = Vec::new();
        for span in &loops {
            // Where all of a group lies in the chunk no load is guarded. Some are of as little as is used of 16 bytes.
            let whole = |load: &Instruction| of_elements(load) && load.is_vector_load() && !load.is_guarded();
            let other = |load: &Instruction| of_elements(load) && load.is_guarded();
            let once = |span: &Range<usize>| {
                let executed = measure.once_round(span, whole, other);
                executed.unwrap_or_else(|| panic!("{code}: no way round {span:?} by whole packets"))
            };
            // A group of f32 is read in two halves.
            let halves: Vec<_> = loops_in(measure, span).into_iter().filter(both_ways).collect();
            assert!(halves.len() <= 1, "{code}: {halves:?}");
            let misaligned = once(span) + halves.iter().map(once).sum::<usize>();
            let widens = |code: &Instruction| code.is("HADD2.F32") || code.is("F2F.F32.F16");
            let dtype = match (halves.len(), measure.count(span, widens)) {
                (1, _) => DType::F32,
                (_, 0) => DType::BF16,
                _ => DType::F16,
            };
            let hot = aligned.iter().find(|hot| hot.dtype(measure) == dtype).expect("there is one for each dtype");
            let aligned = hot.executed(measure, |_| true);
            let share = aligned as f64 / misaligned as f64;
            println!(
                "{}, {dtype}: {aligned} instructions a group, {misaligned} misaligned: {share:.2}",
                code.architecture
            );
            assert!(share >= 0.8, "{code}, {dtype}: {aligned} instructions, and {misaligned} misaligned");
            shares.push(dtype);
        }
        shares.sort_unstable_by_key(|dtype| *dtype as u32);
        assert_eq!(shares, DType::ALL);
    }
}

/// Little's law: an H200 needs 48 KiB under way in each multiprocessor to keep its memory busy.
#[test]
fn enough_bytes_are_in_flight() {
    for code in all_of(Kernel::Measure) {
        for hot in &hot_loops(&code.listing) {
            // Before the first of its loads is used a lane has issued these, and then waits.
            let span = hot.half.as_ref().unwrap_or(&hot.span);
            let (loads, bytes) = (code.listing.loads_in_flight(span), code.bytes_in_flight(span));
            let dtype = hot.dtype(&code.listing);
            println!("{}, {dtype}: {loads} loads of 16 bytes in flight, {} KiB", code.architecture, bytes >> 10);
            assert_eq!(loads, 8, "{code}, {dtype}: loads before the first use");
            let wanted = code.architecture.bytes_in_flight;
            assert!(bytes >= wanted, "{code}, {dtype}: {loads} loads in flight are {bytes} bytes, of {wanted}");
        }
    }
}

/// The loop over chunks: the smallest that has all hot loops in it.
fn chunk_loop(code: &Code, hot_loops: &[HotLoop]) -> Range<usize> {
    let mut chunks = code.listing.loops();
    chunks.retain(|span| hot_loops.iter().all(|hot| lies_in(&hot.span, span)));
    chunks.into_iter().min_by_key(Range::len).unwrap_or_else(|| panic!("{code}: no loop over the chunks"))
}

/// What a chunk of ordinary numbers that completes nothing costs behind its hot loop. It passes the fewest barriers: each of
/// scanning for NaN, reading again and finishing a section, a tensor or the step has some of its own.
fn ordinary_chunk(code: &Code, hot: &HotLoop, chunk: &Range<usize>) -> Cost {
    let cost = code.listing.straight_path(hot.span.end, chunk.end - 1);
    let cost = cost.unwrap_or_else(|| panic!("{code}: a chunk does not end"));
    assert_eq!(cost.barriers, 1, "{code}: behind it a warp merges, and the others read on: {cost:?}");
    cost
}

/// Few GPUs have more than one f64 unit to 64 f32 ones; on those, f64 must not take longer than the memory.
#[test]
fn fp64_stays_below_a_sixteenth_of_an_instruction_an_element() {
    for code in all_of(Kernel::Measure) {
        let measure = &code.listing;
        let hot_loops = hot_loops(measure);
        let chunk = chunk_loop(code, &hot_loops);
        for hot in &hot_loops {
            // The most expensive path is that of thread 0, whose warp merges the block's sums. The other three warps go
            // around all of it, as the cheapest path shows. One instruction of that warp stands for what 32 lanes have
            // read of the chunk.
            let cost = ordinary_chunk(code, hot, &chunk);
            let share = cost.most_fp64 as f64 / CHUNK_PER_LANE as f64;
            let dtype = hot.dtype(measure);
            println!(
                "{}, {dtype}: {} f64 instructions a chunk, {share:.4} an element",
                code.architecture, cost.most_fp64
            );
            let (start, end) = (hot.span.end, chunk.end - 1);
            let mut loops = measure.loops();
            loops.retain(|span| {
                lies_in(span, &chunk) && span.start >= start && measure.count(span, Instruction::is_fp64) > 0
            });
            for span in loops {
                let ways = (measure.straight_path(start, span.start), measure.straight_path(span.end - 1, end));
                let (Some(to), Some(from)) = ways else { continue };
                let barriers = to.barriers + from.barriers;
                assert!(barriers > cost.barriers, "{code}: an ordinary chunk runs the loop {span:?}, with f64");
            }
            assert_eq!(cost.least_fp64, 0, "{code}: {cost:?}");
            assert!(cost.most_fp64 >= 36, "{code}: the merge alone has 36: {cost:?}");
            assert!(share <= 1.0 / 16.0, "{code}: {cost:?}");
        }
    }
}

/// A fence for the whole GPU waits until all its writes are seen, 0.3 µs of the 4 that a chunk of 16 bits takes. A block needs
/// one for the last chunk that it has of a section, by which those are counted, and a chunk in the midst of them none; to
/// acquire, which empties L1 as well, is for the block that completes a section.
#[test]
fn a_chunk_in_the_midst_of_a_run_has_no_fence() {
    for code in all_of(Kernel::Measure) {
        let hot_loops = hot_loops(&code.listing);
        let chunk = chunk_loop(code, &hot_loops);
        for hot in &hot_loops {
            let before = code.listing.straight_path(chunk.start, hot.span.start);
            let before = before.unwrap_or_else(|| panic!("{code}: no way from a chunk's start to {:?}", hot.span));
            let after = ordinary_chunk(code, hot, &chunk);
            let least = before.least_fences + after.least_fences;
            let most = before.most_fences + after.most_fences;
            let waits = before.most_error_barriers + after.most_error_barriers;
            let acquires = before.acquires + after.acquires;
            let dtype = hot.dtype(&code.listing);
            println!(
                "{}, {dtype}: {least} to {most} fences a chunk, {waits} ERRBAR, {acquires} CCTL.IVALL",
                code.architecture
            );
            assert_eq!(least, 0, "{code}, {dtype}: a chunk that others of the run follow waits for its writes");
            assert_eq!((most, waits), (1, 1), "{code}, {dtype}: the release that counts those of a section");
            assert_eq!(acquires, 0, "{code}, {dtype}: an ordinary chunk acquires");
        }
    }
}
