//! What simt.hpp says of each CUDA intrinsic is what PTX does: `intrinsics.cu` is compiled by the C++ compiler and by nvcc,
//! run on the same inputs, and every word it writes is compared. Wrong definitions are found by the same comparison.
#![allow(unsafe_code, reason = "loads what the C++ compiler made, and launches kernels with addresses")]

#[path = "../../../tests/require/mod.rs"]
mod require;
mod wrong;

use fastrand::Rng;
use gradprobe_simt::{
    Entry, Schedule, launch,
    ptx::{Module, Options, memory::lend},
};
use libloading::Library;
use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Instant,
};
use wrong::{WRONG, Wrong};

const THREADS: u32 = 128;
/// Words of a row of inputs: `IN` of intrinsics.cu.
const IN: usize = 4;
/// The emulation's header, which the wrong definitions change.
const HEADER: &str = include_str!("../simt.hpp");
const KERNELS: &str = include_str!("intrinsics.cu");

/// When a result of the emulation is the same as that of PTX. Where both are NaN, its bits are open, and no kernel may
/// depend on them. PTX ISA, "Floating-Point Instructions": "Single-precision instructions return an unspecified NaN", and
/// "Half Precision Floating-Point Instructions": "Half-precision instructions return an unspecified NaN". Payloads of
/// "double-precision instructions" are "supported", but not of which operand, nor those of an invalid operation.
#[derive(Clone, Copy)]
enum Kind {
    Bits,
    F16,
    F32,
    F64,
}
use Kind::{Bits, F16, F32, F64};

impl Kind {
    fn same(self, a: u64, b: u64) -> bool {
        let (magnitude, infinity) = match self {
            Bits => return a == b,
            F16 => (0x7fff, 0x7c00),
            F32 => (0x7fff_ffff, 0x7f80_0000),
            F64 => (0x7fff_ffff_ffff_ffff, 0x7ff0_0000_0000_0000),
        };
        a == b || a & magnitude > infinity && b & magnitude > infinity
    }
}

/// A kernel of intrinsics.cu, what it writes to each column, and its rows of inputs.
struct Group {
    kernel: &'static str,
    columns: &'static [(&'static str, Kind)],
    rows: fn(&mut Rng) -> Vec<[u64; IN]>,
}

const GROUPS: [Group; 10] = [
    Group {
        kernel: "integers",
        columns: &[
            ("permute_bytes", Bits),
            ("permute_bytes", Bits),
            ("permute_bytes", Bits),
            ("permute_bytes", Bits),
            ("permute_bytes", Bits),
            ("permute_bytes", Bits),
            ("permute_bytes", Bits),
            ("permute_bytes", Bits),
            ("__dp4a", Bits),
            ("__viaddmin_u32", Bits),
            ("shift_right_wide", Bits),
            ("shift_right_wide", Bits),
            ("__clzll", Bits),
        ],
        rows: |random| mixed(random, &INTEGERS, |random| [0; IN].map(|_| u64::from(random.u32(..)))),
    },
    Group {
        kernel: "pairs",
        columns: &[("__vmaxu2", Bits), ("__viaddmin_u16x2", Bits)],
        rows: |random| mixed(random, &INTEGERS, |random| [0; IN].map(|_| u64::from(random.u32(..)))),
    },
    Group {
        kernel: "halves",
        columns: &[("half_to_float", F32), ("float_to_half", F16), ("float_to_half", F16), ("float_to_half", F16)],
        rows: halves,
    },
    Group {
        kernel: "casts",
        columns: &[
            ("float_to_bits", Bits),
            ("double_to_bits", Bits),
            ("bits_to_float", Bits),
            ("bits_to_double", Bits),
        ],
        rows: |random| {
            let mut rows = mixed(random, &FLOATS, |random| [0; IN].map(|_| u64::from(random.u32(..))));
            let doubles = mixed(random, &DOUBLES, |random| [0; IN].map(|_| random.u64(..)));
            rows.iter_mut().zip(doubles).for_each(|(row, doubles)| row[1] = doubles[0]);
            rows
        },
    },
    Group {
        kernel: "memory",
        columns: &[
            ("load_words4", Bits),
            ("load_words4", Bits),
            ("load_words4", Bits),
            ("load_words4", Bits),
            ("load_words4_to_change", Bits),
            ("load_words4_to_change", Bits),
            ("load_words4_to_change", Bits),
            ("load_words4_to_change", Bits),
            ("load_fresh", Bits),
            ("load_fresh", Bits),
            ("load_fresh", Bits),
            ("load_element", Bits),
            ("load_element", Bits),
            ("load_element", Bits),
            ("store_words4", Bits),
            ("store_words4", Bits),
            ("load_words4_if", Bits),
            ("load_words4_if", Bits),
            ("load_words4_if", Bits),
            ("load_words4_if", Bits),
            ("load_words4_if", Bits),
            ("load_words4_if", Bits),
            ("load_words4_if", Bits),
            ("load_words4_if", Bits),
        ],
        rows: |random| (0..1024).map(|_| [0; IN].map(|_| random.u64(..))).collect(),
    },
    Group {
        kernel: "atomics",
        columns: &[
            ("atomicAdd", Bits),
            ("atomicAdd", Bits),
            ("atomicAdd", Bits),
            ("atomicAdd", Bits),
            ("atomicMax", Bits),
            ("atomicMax", Bits),
            ("atomicMax", Bits),
            ("atomicMax", Bits),
            ("atomicMin", Bits),
            ("atomicMin", Bits),
            ("atomicOr", Bits),
            ("atomicOr", Bits),
            ("count_released", Bits),
            ("count_released", Bits),
            ("count_released", Bits),
        ],
        rows: |random| {
            let mut rows = mixed(random, &INTEGERS, |random| [0; IN].map(|_| random.u64(..)));
            // The edges of 32 bits are those of 64 in the upper half.
            rows.iter_mut().step_by(2).for_each(|row| *row = row.map(|word| word.rotate_left(32)));
            rows
        },
    },
    Group {
        kernel: "floats",
        columns: &[
            ("fabsf", F32),
            ("fmaf", F32),
            ("+ of float", F32),
            ("- of float", F32),
            ("* of float", F32),
            ("/ of float", F32),
            ("negation of float", F32),
            ("comparison of float", Bits),
            ("float to double", F64),
        ],
        rows: |random| {
            let mut rows = mixed(random, &FLOATS, |random| [0; IN].map(|_| u64::from(random.u32(..))));
            // What nearly cancels: c is -(a·b), rounded, so that fma gives the rounding alone; and b is nearly -a.
            rows.extend((0..4096).map(|_| {
                let a = f32::from_bits(random.u32(..));
                let b = f32::from_bits(a.to_bits() ^ 0x8000_0000 ^ random.u32(..16));
                let scaled = f32::from_bits(0x3f80_0000 + random.u32(..0x0080_0000));
                let [x, y] = if random.bool() { [a, b] } else { [a, scaled] };
                [x, y, -(x * y), 0.0].map(|value: f32| u64::from(value.to_bits()))
            }));
            rows
        },
    },
    Group {
        kernel: "doubles",
        columns: &[
            ("sqrt", F64),
            ("ceil", F64),
            ("fma", F64),
            ("+ of double", F64),
            ("- of double", F64),
            ("* of double", F64),
            ("/ of double", F64),
            ("negation of double", F64),
            ("comparison of double", Bits),
            ("double to float", F32),
        ],
        rows: |random| {
            let mut rows = mixed(random, &DOUBLES, |random| [0; IN].map(|_| random.u64(..)));
            rows.extend((0..4096).map(|_| {
                // Of a magnitude at which floats are rounded and fractions are not whole.
                let a = f64::from(f32::from_bits(random.u32(..) & 0xbfff_ffff | 0x3000_0000)) + random.f64();
                let b =
                    if random.bool() { -f64::from_bits(a.to_bits() ^ random.u64(..16)) } else { 1.0 + random.f64() };
                [a, b, -(a * b), 0.0].map(f64::to_bits)
            }));
            rows
        },
    },
    Group {
        kernel: "conversions",
        columns: &[
            ("u64 to double", Bits),
            ("u32 to double", Bits),
            ("u32 to float", Bits),
            ("double to u64", Bits),
            ("double to u32", Bits),
        ],
        rows: conversions,
    },
    Group {
        kernel: "threads",
        columns: &[
            ("BARRIER", Bits),
            ("atomicMax", Bits),
            ("atomicAdd", Bits),
            ("SHUFFLE_DOWN", Bits),
            ("SHUFFLE_DOWN", Bits),
            ("SHUFFLE_DOWN", Bits),
            ("SHUFFLE_DOWN", Bits),
            ("threadIdx", Bits),
            ("blockIdx", Bits),
            ("gridDim", Bits),
        ],
        // A block for each distance from 0 to 39.
        rows: |random| (0..40 * THREADS).map(|_| [0; IN].map(|_| random.u64(..))).collect(),
    },
];

const INTEGERS: [u64; 18] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0x8000_8000,
    0x7fff_7fff,
    0x8080_8080,
    0x7f7f_7f7f,
    0xfffe_0001,
    0x0102_0304,
    0xffff_ffff,
];

/// Zeros, subnormals, ones and what is next to them, the largest, infinities, and NaNs quiet, signalling, and signed.
const FLOATS: [u64; 20] = [
    0,
    0x8000_0000,
    1,
    0x007f_ffff,
    0x807f_fffe,
    0x0080_0000,
    0x3f80_0000,
    0x3f80_0001,
    0xbf7f_ffff,
    0x3eaa_aaab,
    0x4b80_0001,
    0xcb00_0000,
    0x7f7f_ffff,
    0xff7f_fffe,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7f80_0001,
    0xffd5_5555,
    0x1f80_0000,
];

const DOUBLES: [u64; 20] = [
    0,
    0x8000_0000_0000_0000,
    1,
    0x000f_ffff_ffff_ffff,
    0x800f_ffff_ffff_fffe,
    0x0010_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0x3ff0_0000_0000_0001,
    0xbfef_ffff_ffff_ffff,
    0x3fd5_5555_5555_5555,
    // Half way between two floats, and at either side of it; what rounds to the largest float, and to Inf.
    0x3ff0_0000_1000_0000,
    0xbff0_0000_3000_0000,
    0x36a0_0000_0000_0000,
    0x47ef_ffff_efff_ffff,
    0x47ef_ffff_f000_0000,
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff0_0000_0000_0001,
];

/// Every three of the edges, and 4096 rows at random, of which the half has an edge somewhere.
fn mixed(random: &mut Rng, edges: &[u64], row: fn(&mut Rng) -> [u64; IN]) -> Vec<[u64; IN]> {
    let mut rows = Vec::new();
    for &a in edges {
        for &b in edges {
            rows.extend(edges.iter().map(|&c| [a, b, c, a]));
        }
    }
    rows.extend((0..4096).map(|number| {
        let mut row = row(random);
        if number % 2 == 0 {
            row[random.usize(..IN)] = edges[random.usize(..edges.len())];
        }
        row
    }));
    rows
}

/// All f16 patterns; of each the float half way to the next larger magnitude, one of its two neighbours, and any float.
fn halves(random: &mut Rng) -> Vec<[u64; IN]> {
    // Beyond the largest f16 as if it had another binade: half way there begins what rounds to Inf.
    let value = |magnitude: u16| {
        let (exponent, fraction) = (i32::from(magnitude >> 10), f32::from(magnitude & 0x3ff));
        if exponent == 0 { fraction * (-24f32).exp2() } else { (1024.0 + fraction) * ((exponent - 25) as f32).exp2() }
    };
    let row = |pattern: u16| {
        let magnitude = pattern & 0x7fff;
        // Exact: f32 has thirteen more bits.
        let tie = f32::midpoint(value(magnitude), value(magnitude + 1)).to_bits() | u32::from(pattern & 0x8000) << 16;
        let beside = if random.bool() { tie + 1 } else { tie - 1 };
        [u64::from(pattern), u64::from(tie), u64::from(beside), u64::from(random.u32(..))]
    };
    let mut rows: Vec<[u64; IN]> = (0..=u16::MAX).map(row).collect();
    rows.extend(FLOATS.map(|float| [0x7e01, float, float, float]));
    rows
}

/// Integers around the widths of fractions, and doubles that have a value as u64, and as u32: of others C++ says nothing.
fn conversions(random: &mut Rng) -> Vec<[u64; IN]> {
    let doubles = |limit: f64| [0.0, -0.0, -0.75, 0.5, 1.0f64.next_down(), 1.5, limit.next_down(), limit / 2.0];
    let wide = doubles(18_446_744_073_709_551_616.0);
    let narrow = doubles(4_294_967_296.0);
    (0..8192)
        .map(|number: usize| {
            // Few bits in half of the rows, and a fraction behind the integer in all that have room for it.
            let word = random.u64(..) >> random.u32(..64);
            let sparse = (1u64 << random.u32(..64)).wrapping_add(1 << random.u32(..64)).wrapping_sub(random.u64(..2));
            let integer = if number.is_multiple_of(2) { word } else { sparse };
            let (at, fraction) = (number % 8, random.f64());
            let wide = if number < 8 { wide[at] } else { (integer >> 1) as f64 + fraction };
            let narrow = if number < 8 { narrow[at] } else { (integer >> 32) as f64 + fraction / 2.0 };
            [integer, wide.to_bits(), narrow.to_bits(), 0]
        })
        .collect()
}

/// A group's inputs, in memory whose alignment loads of 16 bytes ask for.
struct Inputs {
    words: Vec<u128>,
    rows: usize,
}

impl Inputs {
    fn new(group: &Group) -> Self {
        let mut random = Rng::with_seed(2024);
        let mut rows = (group.rows)(&mut random);
        // Whole blocks: no thread looks where its row ends.
        let first = rows[0];
        rows.resize(rows.len().next_multiple_of(THREADS as usize), first);
        let mut words = vec![0u128; rows.len() * IN / 2];
        bytemuck::cast_slice_mut(&mut words).copy_from_slice(rows.as_flattened());
        Self { words, rows: rows.len() }
    }

    fn blocks(&self) -> u32 {
        u32::try_from(self.rows).expect("some thousand rows") / THREADS
    }

    fn row(&self, row: usize) -> &[u64] {
        &bytemuck::cast_slice(&self.words)[row * IN..][..IN]
    }

    /// What a kernel writes that is called with the addresses of its inputs and outputs.
    fn run(&self, group: &Group, launch: impl FnOnce(u64, u64)) -> Vec<u64> {
        let count = self.rows * group.columns.len();
        let mut to = vec![u128::MAX; count.div_ceil(2)];
        launch(self.words.as_ptr() as u64, to.as_mut_ptr() as u64);
        bytemuck::cast_slice(&to)[..count].to_vec()
    }
}

/// What all groups write.
type Outputs = Vec<Vec<u64>>;

/// A file beside this one.
fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

fn must_succeed(command: &mut Command) {
    // Under the sanitizers, whose libraries compilers must not get.
    let output = command.env_remove("LD_PRELOAD").output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// As nvcc compiles it, with the options of build.rs.
fn by_ptx(nvcc: &require::Nvcc, architecture: &str, inputs: &[Inputs]) -> Outputs {
    let module = Module::parse(&nvcc.ptx(&beside("intrinsics.cu"), architecture)).unwrap();
    let run = |(group, inputs): (&Group, &Inputs)| {
        inputs.run(group, |from, to| {
            let (read, written) = (inputs.rows * IN * 8, inputs.rows * group.columns.len() * 8);
            let _lent = lend([(from, read as u64, false), (to, written as u64, true)]);
            let kernel = module.kernel(group.kernel).unwrap();
            let parameters = [&from.to_le_bytes()[..], &to.to_le_bytes()[..]];
            // SAFETY: the memory that is lent is the rows of inputs and outputs, which live until the launch has run.
            unsafe { kernel.launch(inputs.blocks(), THREADS, &parameters, Options::default()) }
                .unwrap_or_else(|fault| panic!("{architecture}, {}: {fault}", group.kernel));
        })
    };
    GROUPS.iter().zip(inputs).map(run).collect()
}

/// As the C++ compiler compiles it with this header, with the options of the emulation's build.rs.
fn by_emulation(header: &str, optimisation: &str, folder: &Path, inputs: &[Inputs]) -> Outputs {
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("simt.hpp"), header).unwrap();
    let file = folder.join("intrinsics.so");
    let mut command = Command::new(env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    command.args(["-shared", "-fPIC", "-std=c++17", optimisation, "-ffp-contract=off", "-fno-fast-math"]);
    command.arg("-Wno-unknown-pragmas").arg("-I").arg(folder);
    must_succeed(command.arg("-o").arg(&file).arg(beside("intrinsics.cpp")));
    // SAFETY: has nothing that runs when it is loaded.
    let library = unsafe { Library::new(&file) }.unwrap();
    let address = |name: &str| {
        // SAFETY: the address alone is used.
        let symbol = unsafe { library.get::<unsafe extern "C" fn()>(name) };
        *symbol.unwrap() as *const () as u64
    };
    let loaded = Entry::find("gradprobe_simt_loaded").unwrap();
    let run = |(group, inputs): (&Group, &Inputs)| {
        inputs.run(group, |from, to| {
            let words = [address("run"), address(group.kernel), from, to].map(u64::to_ne_bytes);
            let parameters = words.each_ref().map(<[u8; 8]>::as_slice);
            // SAFETY: functions of the types that adamw.cpp gives them, and memory for as many rows as there are threads.
            unsafe { launch(loaded, inputs.blocks(), THREADS, &parameters, Schedule::Forward) }
                .unwrap_or_else(|fault| panic!("{}: {fault}", group.kernel));
        })
    };
    GROUPS.iter().zip(inputs).map(run).collect()
}

/// Where emulation and PTX differ: for each column the function it is of, and the first such row.
fn differences(inputs: &[Inputs], emulation: &Outputs, ptx: &Outputs) -> Vec<(&'static str, String)> {
    let mut differences = Vec::new();
    for (number, group) in GROUPS.iter().enumerate() {
        let width = group.columns.len();
        for (column, &(function, kind)) in group.columns.iter().enumerate() {
            let mut results = (0..inputs[number].rows).map(|row| {
                let at = row * width + column;
                (row, emulation[number][at], ptx[number][at])
            });
            if let Some((row, emulated, expected)) = results.find(|&(_, a, b)| !kind.same(a, b)) {
                let inputs = inputs[number].row(row);
                let what = format!(
                    "{function} (column {column} of {}) of {inputs:#x?}: {emulated:#x}, by PTX {expected:#x}",
                    group.kernel
                );
                differences.push((function, what));
            }
        }
    }
    differences
}

#[test]
fn the_emulation_defines_intrinsics_as_ptx_does() {
    if env::var("GRADPROBE_SANITIZE").is_ok_and(|value| value == "1") {
        return require::pointless("what it loads is not instrumented");
    }
    let Some(nvcc) = require::nvcc() else { return };
    let start = Instant::now();
    let folder = tempfile::tempdir().unwrap();
    let inputs: Vec<Inputs> = GROUPS.iter().map(Inputs::new).collect();
    let (turing, hopper) = thread::scope(|scope| {
        let hopper = scope.spawn(|| by_ptx(&nvcc, "compute_90", &inputs));
        (by_ptx(&nvcc, "compute_75", &inputs), hopper.join().unwrap())
    });
    let emulation = by_emulation(HEADER, "-O2", &folder.path().join("right"), &inputs);
    for (architecture, ptx) in [("compute_75", &turing), ("compute_90", &hopper)] {
        let found: Vec<String> = differences(&inputs, &emulation, ptx).into_iter().map(|(_, what)| what).collect();
        assert!(found.is_empty(), "{architecture}: {}", found.join("\n"));
    }

    let find = |number: usize, &(function, what, find, replace): &Wrong| {
        assert_eq!(HEADER.matches(find).count(), 1, "{function} that {what}: `{find}`");
        let folder = folder.path().join(number.to_string());
        let emulation = by_emulation(&HEADER.replace(find, replace), "-O1", &folder, &inputs);
        let found = differences(&inputs, &emulation, &turing);
        assert!(found.iter().any(|&(name, _)| name == function), "{function} that {what} is not found: {found:?}");
    };
    thread::scope(|scope| {
        for half in 0..2 {
            let find = &find;
            scope.spawn(move || {
                WRONG.iter().enumerate().skip(half).step_by(2).for_each(|(number, wrong)| find(number, wrong));
            });
        }
    });

    let functions: BTreeSet<&str> = GROUPS.iter().flat_map(|group| group.columns).map(|&(name, _)| name).collect();
    let (intrinsics, operations): (Vec<&str>, Vec<&str>) =
        functions.into_iter().partition(|name| defined().contains(name));
    let rows: usize = inputs.iter().map(|inputs| inputs.rows).sum();
    let results: usize = emulation.iter().map(Vec::len).sum();
    println!(
        "intrinsics: {} of simt.hpp and {} operations of C++, {rows} rows of inputs, {results} results equal to PTX of \
         compute_75 and of compute_90; {} wrong definitions, all found; {:.1} s",
        intrinsics.len(),
        operations.len(),
        WRONG.len(),
        start.elapsed().as_secs_f64()
    );
}

/// The names of what simt.hpp defines.
fn defined() -> Vec<&'static str> {
    HEADER
        .lines()
        .filter(|line| ["inline ", "template ", "#define "].iter().any(|start| line.starts_with(start)))
        .filter_map(|line| line.split_once('('))
        .map(|(before, _)| before.trim_end().rsplit([' ', '*']).next().unwrap())
        .collect()
}

/// Whoever adds to simt.hpp adds to the comparison: each definition's name stands in intrinsics.cu, or here with the reason
/// why not.
#[test]
fn all_that_the_emulation_defines_is_compared() {
    let elsewhere = [
        "simt_shared",       // SHARED
        "simt_shuffle_down", // SHUFFLE_DOWN
    ];
    let mut names = defined();
    assert!(["permute_bytes", "atomicOr", "SHARED", "blockIdx"].iter().all(|name| names.contains(name)), "{names:?}");
    names.retain(|name| {
        !elsewhere.contains(name) && !["(", "<", "."].iter().any(|end| KERNELS.contains(&format!("{name}{end}")))
    });
    assert!(names.is_empty(), "not in intrinsics.cu: {names:?}");
}
