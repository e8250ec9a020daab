//! Histograms: counts against a count of one element at a time over the table of cases, on the CPU and in the kernels on
//! the host, and what they answer against exact quantiles and real conversions.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Of numbers whose size is known.

use crate::common::{
    OFFSETS, Placed, Prepared,
    cases::{CHUNK, Case, Data, cases, hash, lognormal, normal},
    demand_none,
    host::OnHost,
    oracle::{Format as Ieee, power_of_two},
    short,
};
use gradprobe::{
    Absent, Config, Cpu, DType, Error, HostTensor, Plan, Probe,
    histogram::{Bounds, Format, Histogram, HistogramReport},
};
use gradprobe_simt::{Schedule, Simt};
use half::{bf16, f16};
use rayon::prelude::*;

/// One element at a time, from what its value is in f64.
fn count(data: &Data) -> Histogram {
    let mut histogram = Histogram::default();
    let format = Ieee::of(data.dtype());
    for bits in data.bits() {
        let x = format.value(bits).abs();
        if x.is_nan() {
            histogram.nan_count += 1;
        } else if x.is_infinite() {
            histogram.inf_count += 1;
        } else if x == 0.0 {
            histogram.zero_count += 1;
        } else if x < power_of_two(-126) {
            histogram.bins[(x / power_of_two(-128)) as usize] += 1;
        } else {
            let (exponent, quarter) = ((x.to_bits() >> 52) as usize + 127 - 1023, (x.to_bits() >> 50) as usize & 3);
            histogram.bins[4 * exponent + quarter] += 1;
        }
    }
    histogram
}

fn compare(names: &[String], report: &HistogramReport, expected: &[Histogram]) -> Vec<String> {
    let mut complaints = Vec::new();
    for ((name, seen), expected) in names.iter().zip(report.histograms()).zip(expected) {
        if seen != expected {
            complaints.push(format!("{name}: {seen:?}, should be {expected:?}"));
        }
    }
    let total = expected.iter().fold(Histogram::default(), |sum, histogram| sum.merge(histogram));
    if report.total() != total {
        complaints.push("the total".to_owned());
    }
    complaints
}

/// The histograms of a case, its tensors placed at these and the following misalignments.
fn run(probe: &mut Probe, case: &Case, prepared: &Prepared, expected: &[Histogram], offset: usize) -> Vec<String> {
    let place = |(t, data): (usize, &Data)| Placed::new(data, (offset + t) % OFFSETS);
    let placed: Vec<Placed> = prepared.data.iter().enumerate().map(place).collect();
    let report = probe.histogram_host(&placed.iter().map(Placed::tensor).collect::<Vec<_>>()).unwrap();
    let complaints = compare(&prepared.names, &report, expected);
    complaints.into_iter().map(|c| format!("{}, {} at offset {offset}: {c}", case.name, probe.device())).collect()
}

fn expected_of(prepared: &Prepared) -> Vec<Histogram> {
    prepared.data.par_iter().map(count).collect()
}

/// 8 KiB a tensor: without the list of 20,000.
fn table() -> Vec<Case> {
    cases().into_iter().filter(|case| case.tensors.len() <= 2000).collect()
}

#[test]
fn every_case_is_counted_exactly() {
    let mut complaints = Vec::new();
    for case in table() {
        let prepared = Prepared::new(&case);
        let expected = expected_of(&prepared);
        let config = case.config.clone().histogram();
        let mut cpu = Probe::new(Cpu, prepared.plan(), config.clone()).unwrap();
        let mut simt = Probe::new(Simt::default(), prepared.plan(), config).unwrap();
        let offsets: &[usize] = if short() { &[1] } else { &[0, 1, 5] };
        for &offset in offsets {
            complaints.extend(run(&mut cpu, &case, &prepared, &expected, offset));
            complaints.extend(run(&mut simt, &case, &prepared, &expected, offset));
        }
    }
    demand_none(&complaints);
}

#[test]
fn no_order_and_no_grid_changes_a_count() {
    let schedules = [Schedule::Reverse].into_iter().chain((0..6).map(Schedule::Shuffled));
    let mut complaints = Vec::new();
    for (schedule, blocks) in schedules.zip([1, 2, 3, 64, 5, 1000, 7]) {
        for case in table().iter().filter(|case| !case.large && case.tensors.len() <= 400) {
            let prepared = Prepared::new(case);
            let config = case.config.clone().histogram();
            let mut simt = Probe::new(Simt { schedule, blocks, ..Simt::default() }, prepared.plan(), config).unwrap();
            let found = run(&mut simt, case, &prepared, &expected_of(&prepared), 3);
            complaints.extend(found.into_iter().map(|c| format!("{schedule:?}, {blocks} blocks: {c}")));
        }
    }
    demand_none(&complaints);
}

/// More than 2^32 zeros counted by one block, whose counters have 32 bits.
#[test]
fn more_elements_than_32_bits_count() {
    const LENGTH: usize = (1 << 32) + 9;
    let mut map = memmap2::MmapOptions::new().len(2 * LENGTH).no_reserve_swap().map_anon().unwrap();
    let elements: &mut [u16] = bytemuck::cast_slice_mut(&mut map);
    for (index, value) in [(0, 1.0f32), (1 << 31, 2.0), ((1 << 32) - 1, 3.0), (1 << 32, 4.0)] {
        elements[index] = bf16::from_f32(value).to_bits();
    }
    let tensor = HostTensor::BF16(bytemuck::cast_slice(elements));
    let plan = Plan::new([("huge", DType::BF16, LENGTH as u64)]).unwrap();
    let mut expected = Histogram { zero_count: LENGTH as u64 - 4, ..Histogram::default() };
    for x in [1.0, 2.0, 3.0, 4.0] {
        expected.bins[Histogram::bin_of(x)] += 1;
    }
    let mut cpu = Probe::new(Cpu, plan.clone(), Config::new().histogram()).unwrap();
    assert_eq!(cpu.histogram_host(&[tensor]).unwrap().histograms(), [expected]);
    let mut simt = Probe::new(Simt { blocks: 1, ..Simt::default() }, plan, Config::new().histogram()).unwrap();
    assert_eq!(simt.histogram_host(&[tensor]).unwrap().histograms(), [expected]);
}

fn histogram_of(elements: &[f32]) -> Histogram {
    let plan = Plan::new([("a", DType::F32, elements.len() as u64)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new().histogram()).unwrap();
    probe.histogram_host(&[HostTensor::F32(elements)]).unwrap().histograms()[0]
}

/// Gradients of several spreads, with zeros, subnormals, and what is not finite.
fn samples() -> Vec<Vec<f32>> {
    let spoiled = |mut elements: Vec<f32>| {
        elements.extend([f32::NAN, f32::INFINITY, 0.0, -0.0, f32::NEG_INFINITY]);
        elements
    };
    vec![
        vec![0.75],
        (0..999).map(|i| 1e-3 * normal(1, i) as f32).collect(),
        spoiled((0..CHUNK + 5).map(|i| lognormal(2, i, 6.0) as f32).collect()),
        spoiled((0..5000).map(|i| lognormal(3, i, 30.0) as f32).collect()),
        spoiled((0..3000).map(|i| f32::from_bits((hash(4, i) % 0x0200_0000) as u32)).collect()),
        (0..4000).map(|i| if hash(5, i).is_multiple_of(10) { normal(6, i) as f32 } else { 0.0 }).collect(),
        // Powers of two and their quarters, where formats have their limits.
        (-600..600).map(|i| (1.0 + (i & 3) as f32 / 4.0) * 2f32.powi(i >> 3)).collect(),
    ]
}

fn holds(bounds: Bounds, x: f64) -> bool {
    bounds.low <= x && x <= bounds.high
}

#[test]
fn quantiles_are_within_their_bin() {
    for elements in samples() {
        let histogram = histogram_of(&elements);
        let mut sorted: Vec<f32> = elements.iter().map(|x| x.abs()).filter(|x| x.is_finite()).collect();
        sorted.sort_unstable_by(f32::total_cmp);
        for step in 0..=1000 {
            let q = f64::from(step) / 1000.0;
            let rank = ((q * sorted.len() as f64).ceil() as usize).max(1);
            let (exact, bounds) = (f64::from(sorted[rank - 1]), histogram.quantile(q).unwrap());
            assert!(holds(bounds, exact), "{q}: {exact:e} is not in {bounds:?}");
            let wide =
                if bounds.low >= power_of_two(-126) { 1.25 * bounds.low } else { bounds.low + power_of_two(-128) };
            assert!(bounds.high <= wide, "{bounds:?}");
        }
        let nonzero = sorted.iter().copied().filter(|&x| x > 0.0).map(f64::from);
        let (least, most) = (nonzero.clone().next().unwrap(), nonzero.clone().next_back().unwrap());
        let range = histogram.range().unwrap();
        assert!(range.low <= least && most <= range.high);
        assert_eq!((Histogram::bin_of(range.low as f32), Histogram::bin_of(range.high as f32)), {
            (Histogram::bin_of(least as f32), Histogram::bin_of(most as f32))
        });
        assert!(holds(histogram.octaves().unwrap(), (most / least).log2()));
    }
    let one = histogram_of(&[1.0, 2.0, -3.0]);
    for q in [-0.1, 1.1, f64::NAN] {
        assert_eq!(one.quantile(q), None);
    }
    let nothing = histogram_of(&[f32::NAN, f32::INFINITY]);
    assert_eq!((nothing.quantile(0.5), nothing.range(), nothing.octaves()), (None, None, None));
    assert_eq!(histogram_of(&[0.0, 0.0, 1.0]).quantile(0.5), Some(Bounds { low: 0.0, high: 0.0 }));
}

#[test]
fn the_dead_share_is_exact_at_edges_and_bracketed_elsewhere() {
    for elements in samples() {
        let histogram = histogram_of(&elements);
        let thresholds = elements.iter().copied().step_by(97).chain([0.0, -1.0, 1e-10, f32::INFINITY, f32::MAX]);
        let edges = (0..Histogram::BINS).step_by(7).map(Histogram::lowest_of);
        for (threshold, edge) in thresholds.map(|t| (t, false)).chain(edges.map(|t| (t, true))) {
            let below = elements.iter().filter(|x| x.is_finite() && x.abs() < threshold).count();
            let (exact, bounds) = (below as f64 / elements.len() as f64, histogram.fraction_below(threshold));
            let Some(bounds) = bounds else {
                assert!(threshold.is_nan());
                continue;
            };
            assert!(holds(bounds, exact), "{threshold:e}: {exact} is not in {bounds:?}");
            if edge || !threshold.is_finite() {
                assert_eq!((bounds.low, bounds.high), (exact, exact), "{threshold:e}");
            } else {
                let bin = histogram.bins[Histogram::bin_of(threshold)] as f64 / elements.len() as f64;
                assert!(bounds.high - bounds.low <= bin + 1e-15, "{threshold:e}");
            }
        }
    }
    assert_eq!(Histogram::default().fraction_below(1.0), None);
}

/// What a cast leaves of a positive number.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Becomes {
    Zero,
    Subnormal,
    Normal,
    Beyond,
}

/// An 8-bit format by the limits that the OCP 8-bit Floating Point Specification (revision 1.0) lists: the smallest
/// subnormal, the smallest normal and the largest number; to nearest, ties to even, beyond the largest NaN or Inf.
fn cast_fp8(x: f64, [subnormal, normal, largest]: [f64; 3]) -> Becomes {
    // Numbers of the binade are multiples of its unit, which in the lowest is the smallest subnormal.
    let binade = if x < normal { normal } else { power_of_two(((x.to_bits() >> 52) as i32) - 1023) };
    let unit = subnormal * (binade / normal);
    let rounded = (x / unit).round_ties_even() * unit;
    match rounded {
        0.0 => Becomes::Zero,
        r if r < normal => Becomes::Subnormal,
        r if r <= largest => Becomes::Normal,
        _ => Becomes::Beyond,
    }
}

fn cast(format: Format, x: f64) -> Becomes {
    let class = |zero: bool, normal: bool, finite: bool| match (zero, normal, finite) {
        (true, ..) => Becomes::Zero,
        (_, _, false) => Becomes::Beyond,
        (_, true, _) => Becomes::Normal,
        _ => Becomes::Subnormal,
    };
    match format {
        Format::F16 => {
            let y = f16::from_f64(x);
            class(y == f16::ZERO, y.is_normal(), y.is_finite())
        }
        Format::BF16 => {
            let y = bf16::from_f64(x);
            class(y == bf16::ZERO, y.is_normal(), y.is_finite())
        }
        Format::E4M3 => cast_fp8(x, [power_of_two(-9), power_of_two(-6), 448.0]),
        Format::E5M2 => cast_fp8(x, [power_of_two(-16), power_of_two(-14), 57_344.0]),
    }
}

#[test]
fn shares_of_formats_are_those_of_real_casts() {
    let mut bracketed = 0;
    for elements in samples() {
        let histogram = histogram_of(&elements);
        let nonzero: Vec<f64> =
            elements.iter().filter(|x| x.is_finite() && **x != 0.0).map(|&x| f64::from(x.abs())).collect();
        // No share is off by more than one bin: two where the subnormal share ends in two.
        let fullest = *histogram.bins.iter().max().unwrap() as f64 / nonzero.len() as f64;
        for format in Format::ALL {
            for k in (-160..160).step_by(3) {
                let casts: Vec<Becomes> = nonzero.iter().map(|x| cast(format, x * power_of_two(k))).collect();
                let shares = histogram.shares(format, k).unwrap();
                for (what, bounds, bins) in [
                    (Becomes::Zero, shares.underflow, 1.0),
                    (Becomes::Subnormal, shares.subnormal, 2.0),
                    (Becomes::Beyond, shares.overflow, 1.0),
                ] {
                    let exact = casts.iter().filter(|&&becomes| becomes == what).count() as f64 / nonzero.len() as f64;
                    assert!(holds(bounds, exact), "{format} at 2^{k}, {what:?}: {exact} is not in {bounds:?}");
                    assert!(
                        bounds.high - bounds.low <= bins * fullest + 1e-12,
                        "{format} at 2^{k}, {what:?}: {bounds:?}"
                    );
                    bracketed += usize::from(bounds.high > bounds.low);
                }
            }
        }
    }
    assert!(bracketed > 100, "the bounds differ where they must: {bracketed}");
    assert_eq!(histogram_of(&[0.0, f32::NAN]).shares(Format::F16, 0), None);
}

/// Numbers that lie on the limits, beside them, and alone in their bins, where the bounds meet.
#[test]
fn ties_go_to_even() {
    let shares = |x: f64, format| {
        let histogram = histogram_of(&[x as f32]);
        assert_eq!(f64::from(x as f32), x);
        let shares = histogram.shares(format, 0).unwrap();
        [shares.underflow, shares.subnormal, shares.overflow]
    };
    let (none, all, either) =
        (Bounds { low: 0.0, high: 0.0 }, Bounds { low: 1.0, high: 1.0 }, Bounds { low: 0.0, high: 1.0 });
    for (format, half_subnormal, normal, largest) in [
        (Format::F16, power_of_two(-25), power_of_two(-14), 65_504.0),
        (Format::BF16, power_of_two(-134), power_of_two(-126), f64::from(bf16::MAX.to_f32())),
        (Format::E4M3, power_of_two(-10), power_of_two(-6), 448.0),
        (Format::E5M2, power_of_two(-17), power_of_two(-14), 57_344.0),
    ] {
        // Exactly half the smallest subnormal becomes 0, and shares its bin with numbers that do not.
        assert_eq!(cast(format, half_subnormal), Becomes::Zero);
        assert_eq!(shares(half_subnormal, format)[0], either, "{format}");
        // That of bf16 is far below the first edge between bins of f32's subnormals.
        let beside = if format == Format::BF16 { [either; 2] } else { [all, none] };
        assert_eq!(shares(half_subnormal * (1.0 - power_of_two(-8)), format)[0], beside[0], "{format}");
        assert_eq!(shares(half_subnormal * 1.25, format)[0], beside[1], "{format}");
        assert_eq!(shares(normal, format), [none, none, none], "{format}");
        assert_eq!(shares(normal * 0.5, format), [none, all, none], "{format}");
        assert_eq!(shares(largest, format)[2], either, "{format}");
        assert_eq!(shares(largest / 2.0, format), [none, none, none], "{format}");
    }
    // E5M2 has two bits of fraction: numbers become normal at an edge.
    assert_eq!(shares(1.75 * power_of_two(-15), Format::E5M2), [none, none, none]);
    assert_eq!(shares(512.0, Format::E4M3), [none, none, all]);
    assert_eq!(shares(65_536.0, Format::F16), [none, none, all]);
}

#[test]
fn the_loss_scale_is_the_largest_that_leaves_the_margin() {
    // 1 shares its bin with numbers up to 1.25, which 2^15 still takes to 40960 in f16 and E5M2.
    for (format, k) in [(Format::F16, 13), (Format::E5M2, 13), (Format::E4M3, 6), (Format::BF16, 125)] {
        assert_eq!(histogram_of(&[0.0, -1.0, 1e-6, f32::INFINITY]).loss_scale(format), Some(k), "{format}");
        assert_eq!(histogram_of(&[1.0]).loss_scale_with_margin(format, 0), Some(k + 2), "{format}");
    }
    // 1.75 to 2 is where an f16 may be beyond 65504: one less.
    assert_eq!(histogram_of(&[1.75]).loss_scale(Format::F16), Some(12));
    assert_eq!(histogram_of(&[1.74]).loss_scale(Format::F16), Some(13));
    assert_eq!(histogram_of(&[1e-7]).loss_scale(Format::F16), Some(13 + 24));
    assert_eq!(histogram_of(&[f32::from_bits(1)]).loss_scale(Format::F16), Some(15 - 2 + 128));
    for elements in samples() {
        let histogram = histogram_of(&elements);
        for format in Format::ALL {
            let k = histogram.loss_scale(format).unwrap() + Histogram::MARGIN as i32;
            let overflow = |k| histogram.shares(format, k).unwrap().overflow;
            assert_eq!(overflow(k).high, 0.0, "{format} at 2^{k}");
            assert!(overflow(k + 1).high > 0.0, "{format} at 2^{}", k + 1);
        }
    }
    for nothing in [&[][..], &[0.0, -0.0], &[f32::NAN, f32::INFINITY]] {
        assert_eq!(histogram_of(nothing).loss_scale(Format::F16), None);
    }
}

/// A probe on the CPU, and one on the kernels.
fn probes(plan: &Plan, config: &Config) -> [Probe; 2] {
    let on_cpu = Probe::new(Cpu, plan.clone(), config.clone()).unwrap();
    [on_cpu, Probe::new(Simt::default(), plan.clone(), config.clone()).unwrap()]
}

#[test]
fn what_cannot_be_right_is_an_error() {
    let plan = || Plan::new([("a", DType::F32, 3), ("b", DType::BF16, 2)]).unwrap();
    let (three, two) = ([1.0f32; 3], [bf16::ONE; 2]);
    let good = [HostTensor::F32(&three), HostTensor::BF16(&two)];
    for mut probe in probes(&plan(), &Config::new()) {
        let undeclared = probe.histogram_host(&good).map(drop);
        assert_eq!(undeclared, Err(Error::NotDeclared { declare: "Config::histogram" }));
    }
    for mut probe in probes(&plan(), &Config::new().histogram()) {
        let few = probe.histogram_host(&good[..1]).map(drop);
        assert_eq!(few, Err(Error::TensorCount { planned: 2, given: 1, first: Some("b".to_owned()) }));
        let other = probe.histogram_host(&[good[0], HostTensor::BF16(&two[1..])]).map(drop);
        assert!(matches!(other, Err(Error::TensorMismatch { name, .. }) if name == "b"));
        let report = probe.histogram_host(&good).unwrap();
        assert_eq!((report.total().count(), report.tensors().len()), (5, 2));
        // No step: a clip still knows of no measurement, and the first measurement is the first.
        assert_eq!(
            probe.clip_host(&mut []),
            Err(Error::TensorCount { planned: 2, given: 0, first: Some("a".to_owned()) })
        );
        assert_eq!(probe.measure_host(&good).unwrap().step(), 1);
        // Asking again changes nothing.
        assert_eq!(probe.histogram_host(&good).unwrap().histograms(), report.histograms());
    }
    assert_eq!(Histogram::bytes(&plan()), 2 * 8192);
    let bytes = |config: Config| config.bytes(&plan()).unwrap();
    assert_eq!(bytes(Config::new().histogram()) - bytes(Config::new()), 2 * 8192);
}

#[test]
fn a_tensor_that_is_absent_counts_as_nothing() {
    let (a, b) = ([1.0f32, f32::NAN, 0.0], [bf16::ONE; 2]);
    let plan = Plan::new([("a", DType::F32, 3), ("b", DType::BF16, 2)]).unwrap();
    for mut probe in probes(&plan, &Config::new().histogram()) {
        let mut histogram = probe.histogram().unwrap();
        let both = histogram.measure(&[&a, &b]).unwrap();
        let [of_a, of_b] = *both.histograms() else { panic!("{both}") };
        for (report, expected) in [
            (histogram.measure(&[&a, &Absent]), [of_a, Histogram::default()]),
            (histogram.measure(&[&None::<[f32; 3]>, &Some(b)]), [Histogram::default(), of_b]),
            (histogram.measure(&[&a, &b]), [of_a, of_b]),
        ] {
            let report = report.unwrap();
            assert_eq!(report.histograms(), expected);
            assert_eq!(report.total(), expected[0].merge(&expected[1]));
        }
        assert_eq!(histogram.measure(&[&Absent, &Absent]).map(drop), Err(Error::AllAbsent));
        let refused = histogram.measure(&[&Absent, &b[..1].to_vec()]).map(drop);
        assert!(matches!(refused, Err(Error::TensorMismatch { name, .. }) if name == "b"));
    }
}

#[test]
fn reports_list_every_tensor_and_the_total() {
    let (ones, nothing) = ([1.0f32, 0.0, f32::NAN], [bf16::ZERO; 0]);
    let plan = Plan::new([("weight", DType::F32, 3), ("none", DType::BF16, 0)]).unwrap();
    let mut probe = Probe::new(Cpu, plan, Config::new().histogram()).unwrap();
    let text = probe.histogram_host(&[HostTensor::F32(&ones), HostTensor::BF16(&nothing)]).unwrap().to_string();
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert_eq!(lines[1][..5], ["weight", "3", "0.000e0", "1.250e0", "0.3"], "{text}");
    assert_eq!(lines[1][5..], ["0.00", "%", "2^13", "0.00", "%", "2^125", "0.00", "%", "2^6", "0.00", "%", "2^13"]);
    assert_eq!(lines[2], ["none", "0", "–", "–", "–", "–", "–", "–", "–", "–", "–", "–", "–"], "{text}");
    assert_eq!(lines[3][..3], ["all", "tensors", "3"], "{text}");
}
