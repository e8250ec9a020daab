//! The one table of cases that every device runs: what a gradient may look like at its worst, at every size where the
//! reduction changes its path, in every dtype. Cases that others got wrong in public are named after the report;
//! tests/PEERS.md has all such reports.
//!
//! The table stays below 41 million elements, so that the slowest device, the
//! emulation of the kernels, runs it in seconds; the cases marked `large` hold nearly half of them.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // Small by design.

use super::oracle::{Format, power_of_two};
use gradprobe::{Clip, Config, DType, NonFinitePolicy, clip::LossScale};

pub use super::data::*;

/// A list of tensors under a config.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub config: Config,
    pub tensors: Vec<Tensor>,
    /// Whether a slow device may leave it out.
    pub large: bool,
}

/// The chunk of the reduction, and its row and tile: where a tensor's path changes (`src/spec.rs`). Were these to
/// change, the cases at their edges would lose their point and no more.
pub const CHUNK: usize = 32_768;
const ROW: usize = 8_192;
const TILE: usize = 2_048;

/// Lengths at and beside every edge of the reduction, and two primes.
pub const SIZES: [usize; 39] = [
    0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097,
    8191, 8192, 8193, 32_767, 32_768, 32_769, 65_521, 65_535, 65_536, 65_537, 98_303, 98_304, 98_305, 99_991,
];

impl Case {
    fn new(name: impl Into<String>, config: Config, tensors: Vec<Tensor>) -> Self {
        Self { name: name.into(), config, tensors, large: false }
    }

    fn large(self) -> Self {
        Self { large: true, ..self }
    }

    pub fn elements(&self) -> usize {
        self.tensors.iter().map(|t| t.len).sum()
    }
}

fn lower(dtype: DType) -> String {
    dtype.name().to_lowercase()
}

/// Values at which something changes, as bits: zeros, the ends of subnormals and normals, neighbours of 1, where f32
/// squares vanish or overflow, the edges of the windows of magnitude in which a chunk is scaled, the default dead
/// threshold, and everything that is not finite.
pub fn edge_values(dtype: DType) -> Vec<u32> {
    let format = Format::of(dtype);
    let (infinity, sign) = (format.infinity(), format.sign());
    let hidden = infinity & !(infinity << 1);
    let near = |value: f64| nearest(dtype, value);
    let mut values = vec![0, sign, 1, sign | 1, hidden - 1, hidden, infinity - 1, sign | (infinity - 1)];
    for exponent in [0, -75, -74, 63, 64, -48, 50, -13, 12] {
        let middle = near(power_of_two(exponent));
        values.extend([middle.saturating_sub(1), middle, middle + 1]);
    }
    values.extend([sign | near(1.0), near(1.844_674_3e19), near(1e20), sign | near(1e-20), near(1e-30), near(255.9)]);
    values.extend([near(1e-10), near(1e-10).saturating_sub(1), near(1.0 / 3.0)]);
    values.extend([
        infinity,
        sign | infinity,
        format.nan(),
        infinity | 1,
        sign | infinity | 1,
        infinity | (hidden - 2),
    ]);
    values.extend([sign | format.nan(), sign | (sign - 1)]);
    let mut distinct = Vec::new();
    for value in values {
        if !distinct.contains(&value) {
            distinct.push(value);
        }
    }
    distinct
}

/// The whole table.
pub fn cases() -> Vec<Case> {
    let families = [
        sizes,
        edges,
        constants,
        shifted,
        spreads,
        outliers,
        blocks,
        non_finite,
        dead,
        lists,
        clips,
        loss_scales,
        public_failures,
        large,
    ];
    families.into_iter().flat_map(|family| family()).collect()
}

fn plain() -> Config {
    Config::default()
}

/// One of the three policies with a clip, in turn.
fn policy(turn: usize) -> Config {
    let policies = [NonFinitePolicy::Skip, NonFinitePolicy::Propagate, NonFinitePolicy::ZeroNonFinite];
    plain().clip(Clip::global_norm(0.37)).non_finite(policies[turn % 3])
}

fn sizes() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in DType::ALL {
        let gradient =
            |(t, &len): (usize, &usize)| Tensor::of_values(dtype, len, move |i| 1e-3 * normal(100 + t as u64, i));
        let tensors = SIZES.iter().enumerate().map(gradient).collect();
        cases.push(Case::new(format!("every_size_{}", lower(dtype)), plain().clip(Clip::global_norm(0.1)), tensors));
    }
    for (turn, &len) in SIZES.iter().enumerate() {
        let dtype = DType::ALL[turn % 3];
        let tensor = Tensor::of_bits(dtype, len, move |i| random_bits(dtype, 200 + turn as u64, i));
        cases.push(Case::new(format!("alone_{len}"), policy(turn), vec![tensor]));
    }
    // Every element another integer, and every order of additions exact: an element read twice or not at all shows
    // in the mean. (Constant data, which TransformerEngine's norm tests use, would hide it.)
    for (dtype, values) in [(DType::F32, 2039), (DType::F16, 61), (DType::BF16, 31)] {
        let tensors = [33, 2049, CHUNK, CHUNK + 1, 65_521]
            .map(|len| Tensor::of_values(dtype, len, move |i| ((i * 7919) % values) as f64 - (values / 2) as f64));
        cases.push(Case::new(
            format!("exact_sums_{}", lower(dtype)),
            plain().clip(Clip::global_norm(1e9)),
            tensors.into(),
        ));
    }
    cases
}

fn edges() -> Vec<Case> {
    let mut cases = Vec::new();
    for (turn, dtype) in DType::ALL.into_iter().enumerate() {
        let format = Format::of(dtype);
        let edges = edge_values(dtype);
        let pairs = || edges.iter().flat_map(|&first| edges.iter().map(move |&rest| (first, rest)));
        let two = pairs().map(|(a, b)| Tensor::of_bits(dtype, 2, move |i| [a, b][i])).collect();
        cases.push(Case::new(format!("edge_pairs_{}", lower(dtype)), policy(turn), two));
        // As LAPACK tests its norm: one value, then a random share of the other.
        let mixed = pairs().enumerate().map(|(t, (first, rest))| {
            let (seed, value) = (300 + t as u64, format.value(rest));
            Tensor::of_bits(dtype, 75, move |i| match i {
                0 => first,
                _ if value.is_finite() => format.encode(value * (2.0 * uniform(seed, i) - 1.0)),
                _ => rest,
            })
        });
        cases.push(Case::new(format!("edge_mixtures_{}", lower(dtype)), policy(turn + 1), mixed.collect()));
        let runs = edges.iter().map(|&v| Tensor::of_bits(dtype, 2 * TILE + 5, move |_| v)).collect();
        cases.push(Case::new(format!("edge_runs_{}", lower(dtype)), policy(turn + 2), runs));
        // All of them at once, each many times, so that a chunk spans the whole range of magnitudes.
        let list = edges.clone();
        let all = Tensor::of_bits(dtype, CHUNK + 77, move |i| list[hash(17, i) as usize % list.len()]);
        let list: Vec<u32> = edges.iter().copied().filter(|&v| format.value(v).is_finite()).collect();
        let finite = Tensor::of_bits(dtype, CHUNK + 77, move |i| list[hash(18, i) as usize % list.len()]);
        cases.push(Case::new(format!("edges_together_{}", lower(dtype)), policy(turn), vec![all, finite]));
    }
    cases
}

fn constants() -> Vec<Case> {
    const VALUES: [f64; 11] = [1.0, -0.1, 1.0 / 3.0, 255.9, 1e-3, 3e38, -1e20, 1e-20, 1e-42, 4.0, 60_000.0];
    let mut cases = Vec::new();
    for dtype in DType::ALL {
        let tensors = VALUES.into_iter().flat_map(|value| {
            [1, 3, 7, 100, 257, 2049, 4099, 8191, CHUNK + 3].map(|len| Tensor::of_values(dtype, len, move |_| value))
        });
        cases.push(Case::new(
            format!("constants_{}", lower(dtype)),
            plain().clip(Clip::global_norm(1.0)),
            tensors.collect(),
        ));
        // As the optimizer signSGD leaves them, and exactly cancelling.
        let signs = [1e-3, 3e-39, 1.7e38, 0.3].map(|value| {
            Tensor::of_values(dtype, CHUNK + 4099, move |i| if hash(5, i) & 1 == 0 { value } else { -value })
        });
        cases.push(Case::new(
            format!("sign_only_{}", lower(dtype)),
            plain().clip(Clip::global_norm(1.0)),
            signs.into(),
        ));
        let alternating = [1e-3, 3e-39, 3.3e38, 7.0]
            .map(|value| Tensor::of_values(dtype, 2 * ROW + 6, move |i| if i & 1 == 0 { value } else { -value }));
        cases.push(Case::new(
            format!("alternating_{}", lower(dtype)),
            plain().clip(Clip::global_norm(1.0)),
            alternating.into(),
        ));
        let zeros = [0, Format::of(dtype).sign()].map(|bits| Tensor::of_bits(dtype, CHUNK + 1, move |_| bits));
        let sparse =
            Tensor::of_values(dtype, CHUNK + 99, |i| if hash(6, i).is_multiple_of(100) { normal(7, i) } else { -0.0 });
        let zeros = zeros.into_iter().chain([sparse]).collect();
        cases.push(Case::new(format!("zeros_{}", lower(dtype)), plain().clip(Clip::global_norm(1.0)), zeros));
    }
    cases
}

/// Means that are large beside the spread: what ruins E[x²] − E[x]² (helion #3268, tt-metal #41838).
fn shifted() -> Vec<Case> {
    let mut cases = Vec::new();
    for (ratio, name) in [(0.25, "quarter"), (1.0, "1"), (1e3, "1e3"), (1e5, "1e5"), (1e7, "1e7")] {
        let centre = |mean: f64, len| Tensor::of_values(DType::F32, len, move |i| mean * (1.0 + normal(21, i) / ratio));
        let tensors = [1.0, -1e-3, 1e-30, -1e25, 3e38].map(|mean| centre(mean, CHUNK + 4001)).into();
        cases.push(Case::new(format!("mean_over_std_{name}_is_not_cancelled_helion_3268"), plain(), tensors));
    }
    for (dtype, ratio) in [(DType::F16, 300.0), (DType::BF16, 30.0)] {
        let tensors = [1.0, -1e-2, 1000.0]
            .map(|mean| Tensor::of_values(dtype, CHUNK + 4001, move |i| mean * (1.0 + normal(22, i) / ratio)));
        cases.push(Case::new(format!("mean_far_from_zero_{}", lower(dtype)), plain(), tensors.into()));
    }
    // One neighbour of 1 among ones: mean/std is the root of the length times 2^23 or more.
    let neighbour = [(0, 9), (8191, 8192), (CHUNK, CHUNK + 1), (40_000, 2 * CHUNK)]
        .map(|(at, len)| Tensor::of_values(DType::F32, len, |_| 1.0).with(at, 1.0f32.to_bits() + 1));
    cases.push(Case::new("one_ulp_among_ones", plain(), neighbour.into()));
    // Chunks with means of their own: steps, a ramp, and two halves on either side of zero.
    let step = Tensor::of_values(DType::F32, 4 * CHUNK, |i| (i / CHUNK) as f64 + 1e-3 * normal(23, i));
    let ramp = Tensor::of_values(DType::F32, 2 * CHUNK + 11, |i| 1e-6 * i as f64);
    let halves = Tensor::of_values(DType::F32, 2 * CHUNK, |i| if i < CHUNK { 0.57 } else { -0.57 } + normal(24, i));
    let bf16 = Tensor::of_values(DType::BF16, 3 * CHUNK, |i| [5.0, -5.0, 0.1][i / CHUNK] + normal(25, i));
    cases.push(Case::new(
        "chunks_with_means_of_their_own",
        plain().clip(Clip::global_norm(3.0)),
        vec![step, ramp, halves, bf16],
    ));
    cases
}

fn spreads() -> Vec<Case> {
    let mut cases = Vec::new();
    for (turn, dtype) in DType::ALL.into_iter().enumerate() {
        let len = 70_001;
        let tensors = vec![
            Tensor::of_values(dtype, len, |i| 1e-3 * normal(31, i)),
            Tensor::of_values(dtype, len, |i| 1e-4 * lognormal(32, i, 3.0)),
            Tensor::of_values(dtype, len, |i| 1e-4 * lognormal(33, i, 20.0)),
            Tensor::of_values(dtype, len, |i| 1e-5 * cauchy(34, i)),
            Tensor::of_values(dtype, len, |i| (1e-3 * normal(35, i)).max(0.0)),
            Tensor::of_bits(dtype, len, move |i| random_finite_bits(dtype, 36, i)),
        ];
        cases.push(Case::new(format!("spreads_{}", lower(dtype)), policy(turn), tensors));
        let random = (0..3).map(|t| Tensor::of_bits(dtype, 33_333, move |i| random_bits(dtype, 37 + t, i))).collect();
        cases.push(Case::new(format!("random_bits_{}", lower(dtype)), policy(turn + 1), random));
        // Only subnormals, then around the smallest normal.
        let format = Format::of(dtype);
        let hidden = format.infinity() & !(format.infinity() << 1);
        let signed = move |bits: u64, i| bits as u32 | if hash(41, i) & 1 == 0 { 0 } else { format.sign() };
        let tensors = vec![
            Tensor::of_bits(dtype, CHUNK + 5, move |i| signed(hash(40, i) % u64::from(hidden), i)),
            Tensor::of_bits(dtype, CHUNK + 5, move |i| signed(hash(40, i) % u64::from(3 * hidden), i)),
            Tensor::of_bits(dtype, 5000, move |i| signed(hash(40, i) % 3, i)),
        ];
        cases.push(Case::new(format!("subnormals_count_in_full_{}", lower(dtype)), policy(turn + 2), tensors));
    }
    // Each chunk in another window of magnitudes, so that each has another scale.
    let magnitudes = [1e-40, 1.0, 1e38, 1e-15, 1e15, 3e-15, 4e-15, 1.1e15, 1.2e15];
    for (t, dtype) in [DType::F32, DType::BF16].into_iter().enumerate() {
        let tensor = Tensor::of_values(dtype, magnitudes.len() * CHUNK, move |i| {
            magnitudes[i / CHUNK] * (1.0 + normal(44 + t as u64, i))
        });
        cases.push(Case::new(
            format!("chunks_of_all_scales_{}", lower(dtype)),
            plain().clip(Clip::global_norm(1e30)),
            vec![tensor],
        ));
    }
    cases
}

/// One huge element among small ones, at the ends and at the edges of tiles, rows and chunks.
fn outliers() -> Vec<Case> {
    const PAIRS: [(f64, f64); 4] = [(1e-3, 1e3), (1e-3, 3e38), (1e-30, 1e15), (1e-40, -1e-3)];
    let len = CHUNK + TILE + 3;
    let places = [0, 7, 8, 255, 256, TILE - 1, TILE, ROW - 1, ROW, CHUNK - 1, CHUNK, len - 1];
    let mut cases = Vec::new();
    for (turn, dtype) in DType::ALL.into_iter().enumerate() {
        let tensors = places.into_iter().enumerate().map(|(t, at)| {
            let (small, huge) = PAIRS[t % PAIRS.len()];
            Tensor::of_values(dtype, len, move |i| if i == at { huge } else { small * normal(51 + t as u64, i) })
        });
        cases.push(Case::new(format!("one_huge_{}", lower(dtype)), policy(turn), tensors.collect()));
    }
    cases
}

/// A constant, then zeros: block by block as groups, rows and chunks end.
fn blocks() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in DType::ALL {
        for (value, name) in [(1.0, "1"), (3e38, "3e38"), (1e-40, "1e-40")] {
            let tensors = [1, 8, 256, TILE, ROW, CHUNK - 1]
                .map(|block| Tensor::of_values(dtype, CHUNK + 9, move |i| if i < block { value } else { 0.0 }));
            let name = format!("block_of_{name}_then_zeros_{}", lower(dtype));
            cases.push(Case::new(name, plain().clip(Clip::global_norm(2.5)), tensors.into()));
        }
    }
    cases
}

fn non_finite() -> Vec<Case> {
    let len = CHUNK + TILE + 1;
    let places = [0, 1, 7, 8, 255, 256, TILE - 1, TILE, ROW, CHUNK - 1, CHUNK, len - 1];
    let mut cases = Vec::new();
    for (turn, dtype) in DType::ALL.into_iter().enumerate() {
        let format = Format::of(dtype);
        let (infinity, sign, nan) = (format.infinity(), format.sign(), format.nan());
        let kinds = [
            ("nan", nan),
            ("negative_nan", sign | nan),
            ("signalling_nan", infinity | 1),
            ("nan_of_ones", sign | (sign - 1)),
            ("plus_inf", infinity),
            ("minus_inf", sign | infinity),
        ];
        for (kind, (name, bits)) in kinds.into_iter().enumerate() {
            // Every other place, and the others in the next kind.
            let tensors =
                places.into_iter().skip(kind % 2).step_by(2).enumerate().map(|(t, at)| {
                    Tensor::of_values(dtype, len, move |i| 0.01 * normal(61 + t as u64, i)).with(at, bits)
                });
            cases.push(Case::new(format!("{name}_at_{}", lower(dtype)), policy(turn + kind), tensors.collect()));
        }
        let only = |len, list: &'static [u32]| {
            Tensor::of_bits(dtype, len, move |i| {
                [nan, infinity, sign | infinity, infinity | 1][list[i % list.len()] as usize]
            })
        };
        let nothing_finite = vec![
            only(1, &[0]),
            only(1, &[1]),
            only(1, &[2]),
            only(CHUNK + 3, &[0]),
            only(CHUNK + 3, &[1]),
            only(9, &[2]),
            only(TILE + 1, &[0, 1, 2, 3]),
        ];
        for turn in 0..3 {
            let name = format!("nothing_finite_{}_policy_{turn}", lower(dtype));
            cases.push(Case::new(name, policy(turn), nothing_finite.clone()));
        }
        // A finite element here and there: its mean, variance and extremes are those of few.
        let one_finite = only(CHUNK + 3, &[0]).with(CHUNK, format.encode(0.5));
        let some_finite = Tensor::of_bits(dtype, CHUNK + 3, move |i| {
            if hash(70, i).is_multiple_of(999) { format.encode(3.0 + normal(71, i)) } else { [nan, infinity][i % 2] }
        });
        let half_finite = Tensor::of_bits(dtype, CHUNK + 3, move |i| {
            if hash(72, i) & 1 == 0 { format.encode(1e-30 * normal(73, i)) } else { sign | infinity }
        });
        // The clean tensors beside them must keep their numbers and be clipped, or not, with them.
        let clean = Tensor::of_values(dtype, 1001, |i| normal(74, i));
        let tensors = vec![clean.clone(), one_finite, some_finite, half_finite, clean];
        for turn in 0..3 {
            cases.push(Case::new(format!("few_finite_{}_policy_{turn}", lower(dtype)), policy(turn), tensors.clone()));
        }
    }
    cases
}

fn dead() -> Vec<Case> {
    let mut cases = Vec::new();
    let thresholds = [
        ("0", 0.0),
        ("smallest_subnormal", f32::from_bits(1)),
        ("subnormal", 1e-39),
        ("1e-10", 1e-10),
        ("below_f16_subnormals", 2e-8),
        ("f16_subnormal", 1e-6),
        ("between_f16", 1.000_05),
        ("1", 1.0),
        ("above_f16", 65_505.0),
        ("largest", f32::MAX),
    ];
    for (turn, (name, threshold)) in thresholds.into_iter().enumerate() {
        let mut tensors = Vec::new();
        for dtype in DType::ALL {
            let format = Format::of(dtype);
            tensors.push(Tensor::of_bits(dtype, 4111, move |i| random_bits(dtype, 80, i)));
            // Within a few patterns of the threshold, on both sides, and zeros.
            let near = nearest(dtype, threshold.into());
            tensors.push(Tensor::of_bits(dtype, 4111, move |i| {
                let bits = (near + (hash(81, i) % 7) as u32).saturating_sub(3).min(format.infinity() - 1);
                bits | if hash(82, i) & 1 == 0 { 0 } else { format.sign() }
            }));
            tensors.push(Tensor::of_bits(dtype, CHUNK + 1, move |i| if i % 3 == 0 { near } else { 0 }));
        }
        cases.push(Case::new(format!("dead_threshold_{name}"), policy(turn).dead_threshold(threshold), tensors));
    }
    cases
}

/// Tensors of random lengths, a share of them empty, of mixed dtypes.
fn mixture(seed: u64, count: usize, longest: usize) -> Vec<Tensor> {
    let tensor = |t: usize| {
        let dtype = DType::ALL[hash(seed, t) as usize % 3];
        let len = if hash(seed + 1, t).is_multiple_of(5) { 0 } else { hash(seed + 2, t) as usize % (longest + 1) };
        let scale = lognormal(seed + 3, t, 4.0);
        Tensor::of_values(dtype, len, move |i| scale * normal(seed + 4 + t as u64, i))
    };
    (0..count).map(tensor).collect()
}

fn lists() -> Vec<Case> {
    let clip = || plain().clip(Clip::global_norm(1.0));
    let mut cases = vec![
        Case::new("an_empty_list_is_a_step_pytorch_162911", clip(), Vec::new()),
        Case::new("an_empty_list_without_a_clip", plain(), Vec::new()),
    ];
    for dtype in DType::ALL {
        cases.push(Case::new(format!("one_empty_tensor_{}", lower(dtype)), clip(), vec![Tensor::empty(dtype)]));
    }
    cases.push(Case::new("nothing_but_empty_tensors_pytorch_173238", clip(), mixture(90, 321, 0)));
    for (count, longest) in [(2, 5000), (110, 3000), (111, 700), (320, 300), (321, 2000), (1000, 700)] {
        cases.push(Case::new(format!("list_of_{count}"), clip(), mixture(91, count, longest)));
    }
    // Little data, but 20,000 blocks: as slow as the largest in the emulation of the kernels.
    let singles = (0..20_000).map(|t| Tensor::of_values(DType::ALL[t % 3], 1, move |_| normal(95, t))).collect();
    cases.push(Case::new("20_000_tensors_of_one_element", clip(), singles).large());
    // Empties first, in the middle, last: the others keep their numbers.
    let full = [0, 4, 2, 3, 1, 5]
        .map(|t: u64| Tensor::of_values(DType::ALL[t as usize % 3], 2000, move |i| normal(96 + t, i)));
    for (name, at) in
        [("first", vec![0, 0, 0]), ("middle", vec![3, 3]), ("last", vec![6]), ("everywhere", vec![0, 2, 4, 6, 8, 10])]
    {
        let mut tensors: Vec<Tensor> = full.to_vec();
        for (turn, at) in at.into_iter().enumerate() {
            tensors.insert(at, Tensor::empty(DType::ALL[turn % 3]));
        }
        cases.push(Case::new(format!("empty_tensors_{name}_do_not_shift_pytorch_140066"), clip(), tensors));
    }
    // The dtypes in every order (Megatron-LM #7338).
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let tensors = order.map(|d: u8| {
            let dtype = DType::ALL[usize::from(d)];
            Tensor::of_values(dtype, 9000 + usize::from(d), move |i| 1e-2 * normal(99 + u64::from(d), i))
        });
        let names = order.map(|d| lower(DType::ALL[usize::from(d)])).join("_");
        cases.push(Case::new(format!("dtypes_in_order_{names}"), clip(), tensors.into()));
    }
    // Lengths 1 to 17 one after the other, as the parts of one flat buffer would be.
    let short = DType::ALL
        .into_iter()
        .flat_map(|dtype| (1..=17).map(move |len| Tensor::of_values(dtype, len, move |i| normal(98 + len as u64, i))));
    cases.push(Case::new("lengths_1_to_17", clip(), short.collect()));
    cases
}

/// Scales as trainers have them, at the ends of what f32 holds, and ones whose quotients are rounded.
fn loss_scales() -> Vec<Case> {
    let scales = [1.0, 65536.0, 1024.0, 3.0, 1e-3, 0.1, 1e30, f32::MAX, f32::MIN_POSITIVE, f32::from_bits(1)];
    let mut cases = Vec::new();
    for (turn, scale) in scales.into_iter().enumerate() {
        for dtype in DType::ALL {
            let config = policy(turn).loss_scale(LossScale::fixed(scale));
            // Gradients, of which some die with the unscaling, more than a chunk of them in each dtype once; and all edges.
            let len = if turn % 3 == 0 && turn / 3 == dtype as usize { CHUNK + 77 } else { 300 };
            let gradient = Tensor::of_values(dtype, len, move |i| {
                1e-3 * f64::from(scale.min(65536.0)) * normal(700 + turn as u64, i)
            });
            let edges = edge_values(dtype);
            let finite: Vec<u32> = edges.iter().copied().filter(|&b| Format::of(dtype).value(b).is_finite()).collect();
            let of_bits = |bits: Vec<u32>| Tensor::of_bits(dtype, bits.len(), move |i| bits[i]);
            let name = |what: &str| format!("loss_scale_{scale:e}_{}_{what}", lower(dtype));
            cases.push(Case::new(
                name("edges"),
                config.clone(),
                vec![of_bits(edges), Tensor::empty(dtype), gradient.clone()],
            ));
            cases.push(Case::new(name("finite"), config, vec![gradient, of_bits(finite)]));
        }
    }
    // A threshold between two numbers of a type once it is scaled, and on one.
    for (threshold, scale) in
        [(1e-10, 3.0), (6e-8, 1.0), (1.0, 0.1), (0.5, 2.0), (1e-10, 65536.0), (0.0, 7.0), (3e38, 4.0)]
    {
        for dtype in DType::ALL {
            let config = plain().dead_threshold(threshold).loss_scale(LossScale::fixed(scale));
            let near = nearest(dtype, f64::from(threshold) * f64::from(scale));
            let infinity = Format::of(dtype).infinity();
            let tensor = Tensor::of_bits(dtype, 9, move |i| (near + i as u32).saturating_sub(4).min(infinity - 1));
            let name = format!("dead_below_{threshold:e}_times_{scale}_{}", lower(dtype));
            cases.push(Case::new(name, config, vec![tensor]));
        }
    }
    cases
}

fn clips() -> Vec<Case> {
    let mut cases = Vec::new();
    // A norm of exactly 5 in every dtype: 3 and 4 among zeros.
    let five = |dtype| {
        Tensor::of_values(dtype, 4097, |i| match i {
            5 => 3.0,
            4096 => -4.0,
            _ => 0.0,
        })
    };
    for dtype in DType::ALL {
        for (name, max_norm) in [
            ("equals", 5.0),
            ("is_one_step_above", 5.0f64.next_up()),
            ("equals_with_the_epsilon", 5.000_001),
            ("rounds_to_one", 5.000_001 * (1.0 - 1e-9)),
            ("is_just_below", 4.9999),
            ("is_far_below", 1e-3),
            ("is_tiny", 1e-44),
            ("is_smallest", 5e-324),
            ("is_far_above", 1e9),
            ("is_largest", f64::MAX),
        ] {
            let name = format!("max_norm_{name}_{}", lower(dtype));
            cases.push(Case::new(
                name,
                plain().clip(Clip::global_norm(max_norm)),
                vec![five(dtype), Tensor::empty(dtype)],
            ));
        }
    }
    // A norm of 2^10 and max_norm 2^9 halve everything: the product of an odd subnormal or of an odd last place falls
    // between two numbers, and so does that of every edge value that is small enough not to change the norm.
    for dtype in DType::ALL {
        let format = Format::of(dtype);
        let small: Vec<u32> = edge_values(dtype).into_iter().filter(|&v| format.value(v).abs() < 1e-3).collect();
        let edges = Tensor::of_bits(dtype, small.len(), move |i| small[i]);
        let odd = Tensor::of_bits(dtype, 4096, move |i| (i as u32) | if i % 3 == 0 { format.sign() } else { 0 })
            .with(0, format.encode(1024.0));
        let config = plain().clip(Clip::global_norm(512.0));
        // In f16 the first 4096 patterns reach 2^-12 or so; their squares are 2^-35 of that of 2^10.
        cases.push(Case::new(format!("clip_by_half_{}", lower(dtype)), config, vec![edges, odd]));
    }
    // By a coefficient that is not a power of two, over the whole range of the dtype.
    for (dtype, max_norm) in [(DType::F32, 1e38), (DType::F16, 5e4), (DType::BF16, 1e38)] {
        let format = Format::of(dtype);
        let finite: Vec<u32> = edge_values(dtype).into_iter().filter(|&v| format.value(v).is_finite()).collect();
        let edges = Tensor::of_bits(dtype, finite.len(), move |i| finite[i]);
        let random = Tensor::of_bits(dtype, 20_011, move |i| random_finite_bits(dtype, 110, i) & !(1 << 14));
        cases.push(Case::new(
            format!("clip_over_the_whole_range_{}", lower(dtype)),
            plain().clip(Clip::global_norm(max_norm)),
            vec![edges, random],
        ));
    }
    // Each policy with and without a clip, on clean data, with a NaN, with an Inf, with both.
    let policies = [
        ("skip", NonFinitePolicy::Skip),
        ("propagate", NonFinitePolicy::Propagate),
        ("zero", NonFinitePolicy::ZeroNonFinite),
    ];
    for (policy_name, policy) in policies {
        for (data_name, bad) in
            [("clean", [false; 2]), ("nan", [true, false]), ("inf", [false, true]), ("nan_and_inf", [true, true])]
        {
            for (clip_name, max_norm) in [("no_clip", None), ("clip", Some(0.5)), ("loose_clip", Some(1e6))] {
                let mut tensors: Vec<Tensor> = DType::ALL
                    .into_iter()
                    .map(|dtype| Tensor::of_values(dtype, 3001, |i| if i % 9 == 0 { -0.0 } else { normal(111, i) }))
                    .collect();
                if bad[0] {
                    tensors[1] = tensors[1].clone().with(2999, Format::F16.infinity() | 3);
                    tensors[0] = tensors[0].clone().with(17, 0xffa0_0001);
                }
                if bad[1] {
                    tensors[2] = tensors[2].clone().with(0, Format::BF16.infinity());
                    tensors[0] = tensors[0].clone().with(3000, Format::F32.infinity() | Format::F32.sign());
                }
                let config =
                    max_norm.map_or(plain(), |max_norm| plain().clip(Clip::global_norm(max_norm))).non_finite(policy);
                cases.push(Case::new(format!("policy_{policy_name}_{data_name}_{clip_name}"), config, tensors));
            }
        }
    }
    cases
}

fn public_failures() -> Vec<Case> {
    let constant = |dtype, len, value: f64| Tensor::of_values(dtype, len, move |_| value);
    let all = |value: f64, len| DType::ALL.map(|dtype| constant(dtype, len, value)).into();
    vec![
        Case::new(
            "norm_1e20_is_finite_pytorch_46849",
            plain().clip(Clip::global_norm(1.0)),
            vec![constant(DType::F32, 1000, 1e20)],
        ),
        Case::new(
            "norm_within_range_is_not_inf_pytorch_193006",
            plain().clip(Clip::global_norm(1.0)),
            vec![constant(DType::F32, 1, 3.4e38), constant(DType::BF16, 1, -3.3e38)],
        ),
        Case::new("norm_beyond_f32_is_still_a_number", plain().clip(Clip::global_norm(1.0)), all(3.4e38, 5000)),
        Case::new(
            "norm_1e-30_does_not_vanish",
            plain().clip(Clip::global_norm(1e-31)),
            vec![constant(DType::F32, 1000, 1e-30)],
        ),
        Case::new(
            "f16_clip_of_300_is_not_zero_burn_5699",
            plain().clip(Clip::global_norm(1.0)),
            vec![constant(DType::F16, 1, 300.0)],
        ),
        Case::new(
            "f16_norm_beyond_f16_fairscale_263",
            plain().clip(Clip::global_norm(1.0)),
            vec![constant(DType::F16, 40_000, 6e4)],
        ),
        Case::new(
            "std_is_finite_pytorch_180156",
            plain(),
            vec![Tensor::of_values(DType::F32, 10_000, |i| if i & 1 == 0 { 1e20 } else { -1e20 })],
        ),
        Case::new(
            "bf16_total_is_not_rounded_to_bf16_torchtitan_4135",
            plain().clip(Clip::global_norm(1.0)),
            (0..16).map(|t| Tensor::of_values(DType::BF16, 5000, move |i| 2e-3 * normal(120 + t, i))).collect(),
        ),
        Case::new(
            "bf16_squares_beyond_f32_surogate",
            plain().clip(Clip::global_norm(1.0)),
            vec![constant(DType::BF16, 100_003, 1e18), constant(DType::BF16, 100_003, 1.0)],
        ),
        Case::new(
            "minus_inf_is_inf_and_not_nan_openblas_2998",
            plain().clip(Clip::global_norm(1.0)).non_finite(NonFinitePolicy::Propagate),
            vec![constant(DType::F32, 100, 1.0).with(41, Format::F32.infinity() | Format::F32.sign())],
        ),
        Case::new(
            "largest_of_negative_numbers_is_not_1_torchrec_3199",
            plain(),
            DType::ALL.map(|dtype| Tensor::of_values(dtype, 4000, |i| -1.0 - uniform(121, i))).into(),
        ),
        Case::new(
            "one_nan_does_not_kill_the_weights_habitat_lab_2229",
            plain().clip(Clip::global_norm(1.0)),
            vec![constant(DType::F32, 4000, 0.5).with(3999, Format::F32.nan()), constant(DType::F32, 4000, 0.25)],
        ),
    ]
}

/// Many chunks a tensor: beyond 128 of them each lane of the final fold takes a run of more than one.
fn large() -> Vec<Case> {
    let gradient = |dtype, len, seed| Tensor::of_values(dtype, len, move |i| 1e-3 * normal(seed, i) + 1e-5);
    let long = |dtype| {
        Tensor::of_bits(dtype, 1_000_003, move |i| random_finite_bits(dtype, 130, i))
            .with(999_999, Format::of(dtype).nan())
    };
    let mut biases: Vec<Tensor> = (0..1000).map(|t| gradient(DType::F32, 256, 140 + t)).collect();
    biases.insert(500, gradient(DType::BF16, 1_500_000, 139));
    vec![
        Case::new("a_million_random_bits", policy(0), DType::ALL.map(long).into()).large(),
        Case::new(
            "129_chunks_f32",
            plain().clip(Clip::global_norm(1.0)),
            vec![gradient(DType::F32, 128 * CHUNK + 1, 131)],
        )
        .large(),
        Case::new(
            "257_chunks_f16",
            plain().clip(Clip::global_norm(1.0)),
            vec![gradient(DType::F16, 256 * CHUNK + 1, 133)],
        )
        .large(),
        Case::new("one_large_and_1000_biases", plain().clip(Clip::global_norm(1.0)), biases).large(),
    ]
}

/// A second list for a case: other dtypes in turn; random patterns, of which some are not finite, or gradients.
pub fn others(case: &Case) -> Vec<Data> {
    let other = |(t, tensor): (usize, &Data)| {
        let (dtype, seed) = (DType::ALL[t % 3], 500 + t as u64);
        match t / 3 % 3 {
            0 => Tensor::of_values(dtype, tensor.len(), move |i| 1e-3 * normal(seed, i)).data(),
            1 => Tensor::of_bits(dtype, tensor.len(), move |i| random_bits(dtype, seed, i)).data(),
            _ => Tensor::of_bits(dtype, tensor.len(), move |i| random_finite_bits(dtype, seed, i)).data(),
        }
    };
    let data: Vec<Data> = case.tensors.iter().map(Tensor::data).collect();
    data.iter().enumerate().map(other).collect()
}
