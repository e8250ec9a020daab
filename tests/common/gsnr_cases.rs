//! The one table of cases of signal and noise across steps, which every device runs: what the gradients of a few steps
//! may look like at their worst.

#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // Small by design.

use super::{
    cases::CHUNK,
    data::{Data, Tensor, hash, lognormal, normal, random_finite_bits},
    oracle::{Format, power_of_two},
};
use gradprobe::{DType, Plan, gsnr::GsnrConfig};
use std::sync::Arc;

/// The tensors of a step, by its number.
type Steps = Arc<dyn Fn(usize) -> Vec<Tensor> + Send + Sync>;

/// Some steps of a list of tensors, tracked in some way.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub names: Vec<String>,
    pub steps: usize,
    /// 0: none.
    pub window: usize,
    /// Patterns, and the names that they select; all where there is none.
    pub selected: Option<(Vec<&'static str>, Vec<&'static str>)>,
    /// Whether a slow device may leave it out.
    pub large: bool,
    tensors: Steps,
}

impl Case {
    /// With so many steps the records are looked at after each.
    pub const FEW_STEPS: usize = 12;

    fn new(
        name: impl Into<String>,
        steps: usize,
        tensors: impl Fn(usize) -> Vec<Tensor> + Send + Sync + 'static,
    ) -> Self {
        let names = (0..tensors(0).len()).map(|t| format!("tensor {t}")).collect();
        Self { name: name.into(), names, steps, window: 0, selected: None, large: false, tensors: Arc::new(tensors) }
    }

    fn window(self, window: usize) -> Self {
        Self { window, ..self }
    }

    pub fn config(&self) -> GsnrConfig {
        let config = match &self.selected {
            Some((patterns, _)) => GsnrConfig::new().tensors(patterns.iter().copied()),
            None => GsnrConfig::new(),
        };
        if self.window > 0 { config.window(self.window as u32) } else { config }
    }

    /// The places of the tracked tensors.
    pub fn tracked(&self) -> Vec<usize> {
        let is_tracked = |name: &str| self.selected.as_ref().is_none_or(|(_, names)| names.contains(&name));
        (0..self.names.len()).filter(|&t| is_tracked(&self.names[t])).collect()
    }

    pub fn data(&self, step: usize) -> Vec<Data> {
        (self.tensors)(step).iter().map(Tensor::data).collect()
    }

    pub fn plan(&self) -> Plan {
        let tensors = (self.tensors)(0);
        Plan::new(self.names.iter().zip(tensors).map(|(name, t)| (name.as_str(), t.dtype, t.len as u64))).unwrap()
    }
}

/// Gradients of a tensor in a step: every element with a size and a signal of its own, both spread over octaves.
fn gradient(dtype: DType, len: usize, seed: u64, step: usize, scale: f64) -> Tensor {
    Tensor::of_values(dtype, len, move |i| {
        let (size, signal) = (lognormal(seed, i, 1.0), lognormal(seed + 1, i, 2.0));
        scale * size * (signal + normal(seed + 2 + ((step as u64) << 32), i))
    })
}

fn lower(dtype: DType) -> String {
    dtype.name().to_lowercase()
}

/// The whole table.
pub fn cases() -> Vec<Case> {
    let families = [scales, sizes, many_steps, still, signals, faint, left_out, windows, selections, lists, large];
    families.into_iter().flat_map(|family| family()).collect()
}

const SCALES: [f64; 4] = [1e-7, 1e-3, 1.0, 1e3];
const LENGTHS: [usize; 6] = [0, 1, 7, 8, 9, 2047];

fn scales() -> Vec<Case> {
    let mut cases = Vec::new();
    for (turn, dtype) in DType::ALL.into_iter().enumerate() {
        for (s, scale) in SCALES.into_iter().enumerate() {
            let steps = [2, 3, 8, 5][(turn + s) % 4];
            cases.push(Case::new(format!("scale_{scale:e}_{}", lower(dtype)), steps, move |step| {
                LENGTHS.iter().map(|&len| gradient(dtype, len, 500 + len as u64, step, scale)).collect()
            }));
        }
    }
    cases
}

fn sizes() -> Vec<Case> {
    let sizes = [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 4099];
    let case = |(turn, dtype)| {
        Case::new(format!("edges_of_chunks_{}", lower(dtype)), [3, 2, 4][turn], move |step| {
            sizes.iter().map(|&len| gradient(dtype, len, 520 + len as u64, step, 1e-3)).collect()
        })
    };
    DType::ALL.into_iter().enumerate().map(case).collect()
}

fn many_steps() -> Vec<Case> {
    let case = |steps| {
        Case::new(format!("{steps}_steps"), steps, |step| {
            DType::ALL.map(|dtype| gradient(dtype, 1501, 540, step, 1e-2)).into()
        })
    };
    [2, 3, 8, 33, 100].map(case).into()
}

/// Elements that do not change, change once, or change in their sign alone.
fn still() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in DType::ALL {
        // Every other element is one of these in all steps.
        let values = [1.0 / 3.0, -0.1, 255.9, 1e-3, 0.0, 60_000.0, 1e-7, -7.0];
        cases.push(Case::new(format!("constants_among_others_{}", lower(dtype)), 33, move |step| {
            let mixed = Tensor::of_values(dtype, 4099, move |i| {
                if i % 2 == 0 { values[i / 2 % 8] } else { normal(550 + ((step as u64) << 32), i) }
            });
            vec![mixed, Tensor::of_values(dtype, 100, move |i| values[i % 8])]
        }));
        let sign = Format::of(dtype).sign();
        cases.push(Case::new(format!("zeros_of_both_signs_{}", lower(dtype)), 5, move |step| {
            let alternating = Tensor::of_bits(dtype, 77, move |i| if (i + step) % 2 == 0 { 0 } else { sign });
            vec![Tensor::of_bits(dtype, 2049, |_| 0), Tensor::of_bits(dtype, 9, move |_| sign), alternating]
        }));
        // The means of an even number of steps are 0.
        cases.push(Case::new(format!("alternating_{}", lower(dtype)), 8, move |step| {
            let turn = if step % 2 == 0 { 1.0 } else { -1.0 };
            [1e-3, 0.3, 7.0].map(|value| Tensor::of_values(dtype, 1000, move |i| turn * value * (1 + i) as f64)).into()
        }));
        // One step differs: the first, the last, one in the middle.
        cases.push(Case::new(format!("one_step_differs_{}", lower(dtype)), 9, move |step| {
            let other = [0, 4, 8].map(move |at| if step == at { -3.0 } else { 0.7 });
            other.map(|value| Tensor::of_values(dtype, 300, move |i| value * (1 + i % 5) as f64)).into()
        }));
        // By one unit in the last place, up or down, once or every other step: as little as an element can vary.
        cases.push(Case::new(format!("one_ulp_{}", lower(dtype)), 6, move |step| {
            let one = Format::of(dtype).encode(1.0);
            let once = Tensor::of_bits(dtype, 500, move |i| one + i as u32 % 64 + u32::from(step == i % 6));
            let turns = Tensor::of_bits(dtype, 500, move |i| one + i as u32 % 64 + (step % 2) as u32);
            vec![once, turns]
        }));
    }
    cases
}

/// Elements far from zero beside their noise.
fn signals() -> Vec<Case> {
    let strong = |(name, ratio, steps)| {
        Case::new(format!("mean_over_std_{name}_f32"), steps, move |step| {
            let of_scale = |scale: f64| {
                Tensor::of_values(DType::F32, 1777, move |i| {
                    scale * (1.0 + 1e-3 * (i % 100) as f64) * (ratio + normal(560 + ((step as u64) << 32), i))
                })
            };
            SCALES.map(of_scale).into()
        })
    };
    let mut cases: Vec<Case> = [("100", 100.0, 8), ("1000", 1000.0, 8), ("100_long", 100.0, 100)].map(strong).into();
    // Ratios around 1, of which a few fall on either side by a hair.
    cases.push(Case::new("ratios_near_one", 4, |step| {
        let near = |dtype| {
            Tensor::of_values(dtype, 4000, move |i| 1e-2 * (1.0 + 0.6 * normal(570 + ((step as u64) << 32), i)))
        };
        DType::ALL.map(near).into()
    }));
    cases
}

/// Magnitudes at which f32 squares leave the normal range, and at which nothing overflows.
fn faint() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in DType::ALL {
        let format = Format::of(dtype);
        let hidden = u64::from(format.infinity() & !(format.infinity() << 1));
        cases.push(Case::new(format!("subnormals_{}", lower(dtype)), 4, move |step| {
            let seed = 580 + ((step as u64) << 32);
            vec![Tensor::of_bits(dtype, 2100, move |i| {
                (hash(seed, i) % hidden) as u32 | if hash(!seed, i) & 1 == 0 { 0 } else { format.sign() }
            })]
        }));
    }
    for dtype in [DType::F32, DType::BF16] {
        for exponent in [-130, -75, -62, -55, 40, 45] {
            cases.push(Case::new(format!("around_2_to_{exponent}_{}", lower(dtype)), 5, move |step| {
                vec![gradient(dtype, 1000, 590, step, power_of_two(exponent))]
            }));
        }
        // Every magnitude that is merged, in turn.
        cases.push(Case::new(format!("all_magnitudes_{}", lower(dtype)), 5, move |step| {
            let largest = Format::of(dtype).encode(power_of_two(50)) + 1;
            let (seed, sign) = (595 + ((step as u64) << 32), Format::of(dtype).sign());
            vec![Tensor::of_bits(dtype, 3000, move |i| {
                let bits = random_finite_bits(dtype, seed, i);
                ((bits & (sign - 1)) % largest) | (bits & sign)
            })]
        }));
    }
    cases
}

/// Steps with what is not merged, in one tensor of three.
fn left_out() -> Vec<Case> {
    let mut cases = Vec::new();
    let bad = |dtype: DType| {
        let format = Format::of(dtype);
        let (infinity, limit) = (format.infinity(), format.encode(power_of_two(50)));
        let mut kinds = vec![
            ("nan", format.nan()),
            ("signalling_nan", infinity | 1),
            ("inf", infinity),
            ("minus_inf", infinity | format.sign()),
        ];
        if dtype != DType::F16 {
            kinds.extend([("limit", limit), ("above_limit", limit + 1), ("huge", (infinity - 1) | format.sign())]);
        }
        kinds
    };
    for (turn, dtype) in DType::ALL.into_iter().enumerate() {
        for (kind, (name, bits)) in bad(dtype).into_iter().enumerate() {
            let len = [2047, CHUNK + 9][usize::from(kind == 0)];
            let at = [0, len - 1, len / 2][(turn + kind) % 3];
            for (place, steps) in
                [("first", vec![0]), ("middle", vec![2]), ("last", vec![4]), ("every", vec![0, 1, 2, 3, 4])]
            {
                cases.push(Case::new(format!("{name}_in_{place}_step_{}", lower(dtype)), 5, move |step| {
                    let clean = |dtype, seed| gradient(dtype, 100, seed, step, 1e-3);
                    let tensor = gradient(dtype, len, 600, step, 1e-3);
                    let tensor = if steps.contains(&step) { tensor.with(at, bits) } else { tensor };
                    vec![clean(DType::F32, 603), tensor, clean(DType::BF16, 606)]
                }));
            }
        }
    }
    // Each tensor has steps of its own left out, so that all counts of steps differ.
    cases.push(Case::new("each_tensor_skips_others", 12, |step| {
        let tensor = |t: usize| {
            let tensor = gradient(DType::ALL[t % 3], 200 + t, 610 + t as u64, step, 1e-2);
            let bits = Format::of(tensor.dtype).nan();
            if step % (t + 2) == 0 { tensor.with(t, bits) } else { tensor }
        };
        (0..10).map(tensor).collect()
    }));
    cases
}

fn windows() -> Vec<Case> {
    let plain = |step| DType::ALL.map(|dtype| gradient(dtype, 3001, 620, step, 1e-3)).into();
    let mut cases = Vec::new();
    for (window, steps) in [(2, 7), (3, 8), (5, 5), (12, 7), (9, 100)] {
        cases.push(Case::new(format!("window_{window}_of_{steps}_steps"), steps, plain).window(window));
    }
    // A window counts merged steps: one with a NaN neither fills it nor ends it.
    for bad in 0..5 {
        let tensors = move |step: usize| {
            let mut tensors: Vec<Tensor> = plain(step);
            if step == bad {
                tensors[1] = tensors[1].clone().with(2900, Format::F16.nan());
            }
            tensors
        };
        cases.push(Case::new(format!("window_3_and_nan_in_step_{bad}"), 9, tensors).window(3));
    }
    cases
}

fn selections() -> Vec<Case> {
    const NAMES: [&str; 6] = ["embed.weight", "h.0.weight", "h.0.bias", "h.1.weight", "h.1.bias", "h.10.bias"];
    let select = |name: &str, patterns: &[&'static str], names: &[&'static str]| {
        let tensors = |step| {
            (0..6).map(|t| gradient(DType::ALL[t % 3], [70_000, 0, 300, 32_769, 1, 2049][t], 630, step, 1e-3)).collect()
        };
        let case = Case::new(format!("selected_{name}"), 3, tensors);
        let selected = Some((patterns.to_vec(), names.to_vec()));
        Case { names: NAMES.map(str::to_owned).into(), selected, ..case }
    };
    vec![
        select("all", &["*"], &NAMES),
        select("by_name", &["h.1.bias"], &["h.1.bias"]),
        select("by_end", &["*.weight"], &["embed.weight", "h.0.weight", "h.1.weight"]),
        select("by_one_character", &["h.?.bias"], &["h.0.bias", "h.1.bias"]),
        select("twice", &["h.0.*", "*.bias"], &["h.0.weight", "h.0.bias", "h.1.bias", "h.10.bias"]),
        select("empty_tensor", &["h.0.weight"], &["h.0.weight"]),
        select("last", &["h.10*"], &["h.10.bias"]),
        Case {
            window: 2,
            ..select("with_a_window", &["embed*", "h.1*"], &["embed.weight", "h.1.weight", "h.1.bias", "h.10.bias"])
        },
    ]
}

fn lists() -> Vec<Case> {
    let mixed = |lengths: &'static [usize]| {
        move |step| {
            let tensor = |(t, &len): (usize, &usize)| gradient(DType::ALL[t % 3], len, 640 + t as u64, step, 1e-3);
            lengths.iter().enumerate().map(tensor).collect()
        }
    };
    vec![
        Case::new("no_tensors", 3, |_| Vec::new()),
        Case::new("only_empty_tensors", 3, mixed(&[0, 0, 0, 0])),
        Case::new("empty_tensors_everywhere", 3, mixed(&[0, 5000, 0, 0, 33, 1, 0, 40_000, 64, 0, 65, 0])),
        Case::new("301_tensors", 3, |step| {
            let tensor =
                |t: usize| gradient(DType::ALL[t % 3], hash(650, t) as usize % 300, 650 + t as u64, step, 1e-3);
            (0..301).map(tensor).collect()
        }),
    ]
}

/// More chunks than a block has threads, in a tensor between others.
fn large() -> Vec<Case> {
    let tensors = |step| [300, 128 * CHUNK + 1, 40_000].map(|len| gradient(DType::BF16, len, 660, step, 1e-3)).into();
    vec![Case { large: true, ..Case::new("129_chunks", 2, tensors) }]
}
