//! The shape of the reduction: every constant that decides which bits come out. `kernels/spec.cuh` holds the same
//! numbers for the kernels, and a test compares the two.
//!
//! ```text
//! tensor   runs of CHUNK elements, by index; nothing depends on the grid, the device or a pointer's alignment
//! chunk    GROUPS rows of LANES × GROUP elements
//! row      LANES / WARP warps, each TILE = WARP × GROUP contiguous elements
//! tile     PACKETS runs of WARP packets; lane l of a warp has packet l of each run
//! packet   PACKET contiguous elements (16 bytes of a 16-bit type), one slot each
//! group    the PACKETS × PACKET elements of a lane in a row
//! ```
//!
//! Element `i` of a chunk therefore belongs to row `i / 8192`, warp `i / 2048 % 4`, packet `i / 256 % 8`, lane
//! `i / 8 % 32` and slot `i % 8`. The map is the same for the three dtypes, so bf16 data widened to f32 gives the
//! same bits.
//!
//! # The sums of a chunk
//!
//! Σx, Σ|x| and Σx² run in f32 within a lane, always in pairs: packets (0,1), (2,3), … then pairs of pairs, then the
//! eight slots, then the four groups. No element goes through more than 8 additions (9 roundings with its square), so
//! with u = 2^-24 a chunk's sum is off by at most 8u·Σ|x|, its Σ|x| by 8u and its Σx² by 9u relative: 4.8e-7 of
//! mean_abs, 4.8e-7 and, for the norm, 2.7e-7, for any data. Lanes and everything above them add in f64.
//!
//! The squared deviations are Σx² − (Σx)²/n when |mean| ≤ std/4, which keeps their error below 14u. Otherwise the chunk
//! is read again (from a near cache) around its own mean, rounded to f32, which costs 11u and leaves no term that grows
//! with mean/std; its mean is then that shift plus the mean of the deviations. Chunks merge by Chan's formula in f64; an
//! error of a chunk's mean enters the variance between chunks times the distance of the two means, and with it the
//! worst case of the whole variance is 16.8u = 1.0e-6 in either case.
//!
//! Read again, too, is a chunk that holds a NaN or Inf, which are left out, and one whose magnitudes are so large or so
//! small that f32 squares would overflow or vanish, which is scaled by a power of two. Gradients are centred, finite and
//! of ordinary size, so a second read is rare; data made to provoke it costs at most three reads more.

/// Contiguous elements a lane reads at once.
pub const PACKET: usize = 8;
/// Packets of a group.
pub const PACKETS: usize = 8;
/// Elements a lane sums before it merges with its other groups.
pub const GROUP: usize = PACKET * PACKETS;
/// Lanes of a warp. Miri takes a second for 2048 elements: it has smaller warps, and so other bits.
pub const WARP: usize = if cfg!(miri) { 2 } else { 32 };
/// Lanes that share a chunk: the threads of a block, but for those of [`STEP_THREADS`].
pub const LANES: usize = 4 * WARP;
/// Groups of one lane in a chunk.
pub const GROUPS: usize = 4;
/// Elements of a warp's share of a row.
pub const TILE: usize = WARP * GROUP;
/// Elements of a row: one group of every lane.
pub const ROW: usize = LANES * GROUP;
/// Elements of a chunk. 32 Ki keep 25 M parameters at three waves of two blocks on 132 multiprocessors where 64 Ki
/// would leave the second wave half empty.
pub const CHUNK: usize = GROUPS * ROW;
/// Chunks whose records merge before those of a whole tensor. One block merges a tensor's last records while nothing
/// else runs, and a lane's run of merges is a chain of memory and division latencies, about 1500 cycles each: without
/// spans that is 64 links for 1 GiB of f32, which takes 250 µs to read, with them one.
pub const SPAN: usize = LANES;
/// Threads of a block that measures, or finishes a step: two to a lane.
pub const STEP_THREADS: usize = 2 * LANES;

/// A chunk is read again around its mean when n·mean² is more than this share of its squared deviations.
pub const CENTRED_SHARE: f64 = 1.0 / 16.0;

/// A chunk whose largest magnitude is above 2^50 is scaled by 2^-80 before its f32 sums: the sum of a chunk's
/// squares is then below 2^(2·51 + 15) and cannot overflow.
pub const LARGE: f32 = f32::from_bits((127 + 50) << 23);
/// See [`LARGE`].
pub const LARGE_SCALE: f32 = f32::from_bits((127 - 80) << 23);
/// A chunk whose largest magnitude is below 2^-48 is scaled by 2^98: squares of deviations as small as one unit in
/// the last place of that magnitude would otherwise fall below f32's subnormals.
pub const SMALL: f32 = f32::from_bits((127 - 48) << 23);
/// See [`SMALL`].
pub const SMALL_SCALE: f32 = f32::from_bits((127 + 98) << 23);

/// The power of two by which a chunk with this largest finite magnitude is multiplied before its f32 sums. Elements
/// that the downward scale rounds to nothing are 2^119 times smaller than the largest and cannot be seen in any sum.
pub fn scale_of(max_abs: f32) -> f32 {
    if max_abs > LARGE {
        LARGE_SCALE
    } else if max_abs < SMALL && max_abs > 0.0 {
        SMALL_SCALE
    } else {
        1.0
    }
}

/// Folds `length` items in the order that kernels and CPU share: up to [`LANES`] runs of equal length, each left to
/// right, then neighbouring runs in pairs, pairs of pairs, and so on. `None` when there are no items.
pub fn fold<T>(length: usize, item: impl Fn(usize) -> T, merge: impl Fn(&T, &T) -> T) -> Option<T> {
    let run = length.div_ceil(LANES).max(1);
    let of_run = |r: usize| (r * run..length.min((r + 1) * run)).map(&item).reduce(|a, b| merge(&a, &b));
    let mut runs = Vec::with_capacity(length.div_ceil(run));
    runs.extend((0..length.div_ceil(run)).filter_map(of_run));
    let mut stride = 1;
    while stride < runs.len() {
        for left in (0..runs.len() - stride).step_by(2 * stride) {
            runs[left] = merge(&runs[left], &runs[left + stride]);
        }
        stride *= 2;
    }
    runs.into_iter().next()
}

/// [`fold`] of a number a lane, without a list: five lists a chunk took a tenth of AdamW's time.
#[inline(always)]
pub fn fold_lanes(mut lanes: [f64; LANES]) -> f64 {
    const { assert!(LANES.is_power_of_two()) };
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for pair in 0..width {
            lanes[pair] = lanes[2 * pair] + lanes[2 * pair + 1];
        }
    }
    lanes[0]
}

/// [`fold`] of a tensor's chunks: each span of [`SPAN`] items first, then the spans.
pub fn fold_spans<T: Copy>(length: usize, item: impl Fn(usize) -> T, merge: impl Fn(&T, &T) -> T) -> Option<T> {
    let spans: Vec<T> = (0..length)
        .step_by(SPAN)
        .filter_map(|first| fold(SPAN.min(length - first), |i| item(first + i), &merge))
        .collect();
    fold(spans.len(), |span| spans[span], merge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_the_same_constants() {
        let header = include_str!("../kernels/spec.cuh");
        let constant = |name: &str| -> String {
            let start = header.find(&format!(" {name} = ")).unwrap_or_else(|| panic!("{name} is not in spec.cuh"));
            let value = &header[start + name.len() + 4..];
            value[..value.find(';').unwrap()].to_owned()
        };
        for (name, value) in [
            ("PACKET", PACKET),
            ("PACKETS", PACKETS),
            ("WARP", WARP),
            ("LANES", LANES),
            ("GROUPS", GROUPS),
            ("SPAN", SPAN),
        ] {
            assert_eq!(constant(name), value.to_string(), "{name}");
        }
        assert_eq!((constant("STEP_THREADS").as_str(), STEP_THREADS), ("2 * LANES", 2 * LANES));
        for (name, value) in
            [("LARGE", LARGE), ("LARGE_SCALE", LARGE_SCALE), ("SMALL", SMALL), ("SMALL_SCALE", SMALL_SCALE)]
        {
            assert_eq!(constant(name), format!("{:#010x}u", value.to_bits()), "{name}");
        }
    }

    #[test]
    fn fold_keeps_order_and_pairs_neighbours() {
        let join = |a: &String, b: &String| format!("({a}{b})");
        assert_eq!(fold(0, |i| i.to_string(), join), None);
        assert_eq!(fold(1, |i| i.to_string(), join).unwrap(), "0");
        assert_eq!(fold(5, |i| i.to_string(), join).unwrap(), "(((01)(23))4)");
        let long = fold(3 * LANES, |i| i.to_string(), join).unwrap();
        assert!(long.trim_start_matches('(').starts_with("01)2)((34)5))"), "runs of three: {long}");
    }

    #[test]
    fn lanes_are_added_as_they_are_folded() {
        let lanes: [f64; LANES] = std::array::from_fn(|lane| 1.0 / (1.0 + lane as f64));
        let folded = fold(LANES, |lane| lanes[lane], |a, b| a + b).unwrap();
        assert_eq!(fold_lanes(lanes).to_bits(), folded.to_bits());
        assert_ne!(lanes.iter().sum::<f64>().to_bits(), folded.to_bits(), "the order matters");
    }

    #[test]
    fn spans_are_folded_before_the_whole() {
        for length in [0, 1, 2, 77, SPAN, SPAN + 1, 5 * SPAN - 3, SPAN * LANES + 1] {
            // Joins neighbours only, and says how many items it holds.
            let join = |&(first, end): &(usize, usize), &(next, last): &(usize, usize)| {
                assert_eq!(end, next);
                assert!(first % SPAN == 0 || last <= first.next_multiple_of(SPAN), "{first}..{last} crosses a span");
                (first, last)
            };
            let whole = fold_spans(length, |i| (i, i + 1), join);
            assert_eq!(whole, (length > 0).then_some((0, length)));
        }
    }

    #[test]
    fn scale_keeps_every_magnitude_in_the_safe_window() {
        for bits in (1..0x7f80_0000u32).step_by(997) {
            let x = f32::from_bits(bits);
            let scaled = x * scale_of(x);
            assert!((SMALL * 0.125..=LARGE).contains(&scaled), "{x:e} becomes {scaled:e}");
        }
    }
}
