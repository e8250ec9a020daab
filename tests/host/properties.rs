//! Laws that hold for any gradients: what must not change a number, what must change it exactly, and how records
//! merge. proptest looks for the counterexample, and for the smallest one.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // Small numbers.

use crate::common::cases::{CHUNK, Data, cauchy, hash, lognormal, nearest, normal, random_bits, random_finite_bits};
use crate::common::check::{self, SUM_BOUND};
use crate::common::demand_none;
use crate::common::host::OnHost;
use crate::common::oracle::{self, Format, power_of_two};
use gradprobe::{Clip, Config, Cpu, DType, NonFinitePolicy, Plan, Probe, Record, StepOutputs};
use proptest::collection::vec;
use proptest::prelude::*;
use std::ops::Range;

fn probe_of(tensors: &[Data], config: Config) -> Probe {
    let plan = Plan::new(tensors.iter().enumerate().map(|(t, d)| (t.to_string(), d.dtype(), d.len() as u64)));
    Probe::new(Cpu, plan.unwrap(), config).unwrap()
}

fn measure_list(tensors: &[Data], config: Config) -> (Vec<Record>, StepOutputs) {
    let hosts: Vec<_> = tensors.iter().map(Data::tensor).collect();
    let report = probe_of(tensors, config).measure_host(&hosts).unwrap();
    (report.records().to_vec(), *report.outputs())
}

fn measure(data: &Data) -> Record {
    measure_list(std::slice::from_ref(data), Config::default()).0[0]
}

/// Two tensors, one behind the other.
fn concat(a: &Data, b: &Data) -> Data {
    Data::of_bits(a.dtype(), a.bits().chain(b.bits()))
}

fn dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::ALL.to_vec())
}

/// Up to a few hundred elements of any bits: short enough to shrink to the elements that matter.
fn any_bits() -> impl Strategy<Value = Data> {
    let mask = |dtype| Format::of(dtype).sign() | (Format::of(dtype).sign() - 1);
    (dtype(), vec(any::<u32>(), 0..300))
        .prop_map(move |(dtype, bits)| Data::of_bits(dtype, bits.into_iter().map(|b| b & mask(dtype))))
}

/// Tensors of `lengths` from a seed, of any dtype.
fn seeded(lengths: Range<usize>) -> impl Strategy<Value = Data> {
    dtype().prop_flat_map(move |dtype| seeded_of(dtype, lengths.clone()))
}

/// Of several spreads and means, with and without non-finite elements.
fn seeded_of(dtype: DType, lengths: Range<usize>) -> impl Strategy<Value = Data> {
    (any::<u64>(), lengths, 0..7usize, -30..30i32).prop_map(move |(seed, len, family, exponent)| {
        let scale = power_of_two(if dtype == DType::F16 { exponent / 4 } else { exponent });
        let of_value = |value: f64| nearest(dtype, scale * value);
        let bits = |i: usize| match family {
            0 => of_value(normal(seed, i)),
            1 => of_value(lognormal(seed, i, 5.0)),
            2 => of_value(cauchy(seed, i)),
            3 => of_value(1.0 + 1e-3 * normal(seed, i)),
            4 => of_value(if hash(seed, i).is_multiple_of(50) { 1.0 } else { 0.0 }),
            5 => random_finite_bits(dtype, seed, i),
            _ => random_bits(dtype, seed, i),
        };
        Data::of_bits(dtype, (0..len).map(bits))
    })
}

fn tensor() -> impl Strategy<Value = Data> {
    prop_oneof![3 => any_bits(), 1 => seeded(0..CHUNK + 5000)]
}

/// Everything but the moments, which are exact however elements are grouped.
fn exact_part(record: &Record) -> Record {
    Record { mean_or_zero: 0.0, sum_squared_deviations: 0.0, sum_abs: 0.0, ..*record }
}

fn complaints_of(name: &str, record: &Record, data: &Data) -> Vec<String> {
    let truth = oracle::truth(data.dtype(), Config::default().dead_threshold, data.bits());
    let mut complaints = check::check_tensor(name, &check::Seen::of(record), &truth);
    complaints.extend(check::check_fields(name, record, &truth));
    complaints
}

proptest! {
    #[test]
    fn any_list_is_within_the_bounds(
        list in vec(any_bits(), 0..5),
        threshold in prop_oneof![Just(0.0f32), Just(1e-10), any::<f32>().prop_map(f32::abs)],
        max_norm in prop_oneof![Just(None), (-300..300i32).prop_map(|e| Some(power_of_two(e)))],
    ) {
        prop_assume!(threshold.is_finite());
        let config = Config::default().dead_threshold(threshold);
        let config = config.clip(max_norm.map_or(Clip::None, Clip::global_norm));
        let (records, outputs) = measure_list(&list, config.clone());
        let truths: Vec<_> = list.iter().map(|d| oracle::truth(d.dtype(), threshold, d.bits())).collect();
        let names: Vec<String> = (0..list.len()).map(|t| t.to_string()).collect();
        demand_none(&check::check_step(&names, &records, &outputs, 1, &truths, &config));
    }

    #[test]
    fn a_long_tensor_is_within_the_bounds(data in seeded(0..3 * CHUNK)) {
        demand_none(&complaints_of("tensor", &measure(&data), &data));
    }

    #[test]
    fn appended_zeros_count_and_leave_the_norm(data in tensor(), zeros in 0..CHUNK + 100) {
        let longer = measure(&concat(&data, &Data::zeros(data.dtype(), zeros)));
        let (shorter, zeros) = (measure(&data), zeros as u64);
        prop_assert_eq!(longer.count, shorter.count + zeros);
        prop_assert_eq!(longer.zero_count, shorter.zero_count + zeros);
        prop_assert_eq!(longer.dead_count, shorter.dead_count + zeros);
        prop_assert_eq!((longer.nan_count, longer.inf_count), (shorter.nan_count, shorter.inf_count));
        prop_assert_eq!(longer.first_nonfinite(), shorter.first_nonfinite());
        prop_assert_eq!(longer.max_abs_or_zero, shorter.max_abs_or_zero);
        prop_assert_eq!(longer.min_nonzero_abs(), shorter.min_nonzero_abs());
        let truth = oracle::truth(data.dtype(), 0.0, data.bits()).finite_l2_norm;
        for norm in [longer.finite_l2_norm(), shorter.finite_l2_norm()] {
            prop_assert!((norm - truth).abs() <= SUM_BOUND * truth, "{norm:e} for {truth:e}");
        }
    }

    /// Elements between 2^-10 and 2^11, times a power of two: every operation scales with them, so the very bits do,
    /// whichever window of magnitudes the chunk falls into. (The powers stay clear of the edges of the windows, where
    /// chunks of one tensor may be treated differently, and of squares that f32 holds as subnormals.)
    #[test]
    fn powers_of_two_scale_every_moment_exactly(
        seed in any::<u64>(),
        len in 0..2 * CHUNK,
        centre in 0..3u8,
        exponent in prop_oneof![-100..=-70, -20..=20, 70..=100i32],
    ) {
        let value = |i: usize| {
            let size = power_of_two((hash(seed, i) % 20) as i32 - 10) * (1.0 + (hash(!seed, i) >> 41) as f64 * power_of_two(-23));
            // Centred, all positive, or all near one number.
            match centre {
                0 if hash(seed, i) >> 63 == 0 => -size,
                0 | 1 => size,
                _ => 100.0 + size,
            }
        };
        let scaled = |factor: f64| {
            let bits = |i| Format::F32.encode(f64::from(value(i) as f32) * factor);
            Data::of_bits(DType::F32, (0..len).map(bits))
        };
        let factor = power_of_two(exponent);
        let (one, other) = (measure(&scaled(1.0)), measure(&scaled(factor)));
        prop_assert_eq!(other.finite_l2_norm().to_bits(), (one.finite_l2_norm() * factor).to_bits());
        prop_assert_eq!(other.mean_or_zero.to_bits(), (one.mean_or_zero * factor).to_bits());
        prop_assert_eq!(other.sum_abs.to_bits(), (one.sum_abs * factor).to_bits());
        let squared = one.sum_squared_deviations * factor * factor;
        prop_assert_eq!(other.sum_squared_deviations.to_bits(), squared.to_bits());
    }

    #[test]
    fn signs_change_nothing_but_the_mean(data in tensor()) {
        let sign = Format::of(data.dtype()).sign();
        let negated = measure(&Data::of_bits(data.dtype(), data.bits().map(|bits| bits ^ sign)));
        let record = measure(&data);
        prop_assert_eq!(negated.mean_or_zero, -record.mean_or_zero);
        let same = Record { mean_or_zero: record.mean_or_zero, ..negated };
        demand_none(&check::same_record("negated", &same, &record));
        prop_assert_eq!(negated.finite_l2_norm().to_bits(), record.finite_l2_norm().to_bits());
    }

    #[test]
    fn widening_changes_no_bit(data in tensor()) {
        demand_none(&check::same_record("widened", &measure(&data.widened()), &measure(&data)));
    }

    /// Split anywhere, the merged halves are within the bounds of the whole, and all that is counted is exact.
    #[test]
    fn merged_parts_are_the_whole(data in tensor(), split in 0.0..=1.0f64) {
        let at = (split * data.len() as f64) as usize;
        let part = |range: Range<usize>| {
            Data::of_bits(data.dtype(), data.bits().skip(range.start).take(range.len()))
        };
        let merged = measure(&part(0..at)).merge(&measure(&part(at..data.len())));
        let whole = measure(&data);
        demand_none(&check::same_record("exact part", &exact_part(&merged), &exact_part(&whole)));
        demand_none(&complaints_of("merged", &merged, &data));
    }

    #[test]
    fn the_empty_record_is_the_identity(data in tensor()) {
        let record = measure(&data);
        demand_none(&check::same_record("merged with nothing", &record.merge(&Record::EMPTY), &record));
        demand_none(&check::same_record("merged onto nothing", &Record::EMPTY.merge(&record), &record));
        let empty = measure(&Data::zeros(data.dtype(), 0));
        demand_none(&check::same_record("of nothing", &empty, &Record::EMPTY));
    }

    #[test]
    fn merge_is_associative_up_to_f64(a in tensor(), b in tensor(), c in tensor()) {
        let [a, b, c] = [a, b, c].map(|data| measure(&data));
        let (left, right) = (a.merge(&b).merge(&c), a.merge(&b.merge(&c)));
        demand_none(&check::same_record("exact part", &exact_part(&left), &exact_part(&right)));
        let near = |x: f64, y: f64, unit: f64| (x - y).abs() <= 1e-12 * unit;
        prop_assert!(near(left.sum_abs, right.sum_abs, left.sum_abs));
        let unit = left.mean_abs().unwrap_or(0.0);
        prop_assert!(near(left.mean_or_zero, right.mean_or_zero, unit), "{left:?} {right:?}");
        let (x, y) = (left.sum_squared_deviations, right.sum_squared_deviations);
        prop_assert!(near(x, y, left.finite_sum_squares()), "{left:?} {right:?}");
        prop_assert!(near(left.finite_l2_norm(), right.finite_l2_norm(), left.finite_l2_norm()));
    }

    #[test]
    fn the_order_of_tensors_is_their_order_in_the_report(list in vec(any_bits(), 0..12), seed in any::<u64>()) {
        let mut order: Vec<usize> = (0..list.len()).collect();
        order.sort_by_key(|&t| hash(seed, t));
        let permuted: Vec<Data> = order.iter().map(|&t| list[t].clone()).collect();
        let ((records, outputs), (shuffled, other)) =
            (measure_list(&list, Config::default()), measure_list(&permuted, Config::default()));
        for (record, &t) in shuffled.iter().zip(&order) {
            demand_none(&check::same_record("elsewhere in the list", record, &records[t]));
        }
        prop_assert_eq!((outputs.nan_count, outputs.inf_count), (other.nan_count, other.inf_count));
        let (norm, other) = (outputs.finite_total_norm, other.finite_total_norm);
        prop_assert!((norm - other).abs() <= 1e-14 * norm, "{norm:e} {other:e}");
    }

    #[test]
    fn norms_and_means_lie_where_they_must(data in tensor()) {
        let record = measure(&data);
        let m = record.finite_count() as f64;
        let Some(max) = record.max_abs().map(f64::from) else {
            prop_assert_eq!(record.finite_l2_norm(), 0.0);
            return Ok(());
        };
        let at_most = |x: f64, y: f64| x <= y * (1.0 + 2.0 * SUM_BOUND);
        let (norm, mean, mean_abs) = (record.finite_l2_norm(), record.mean().unwrap(), record.mean_abs().unwrap());
        prop_assert!(at_most(max, norm) && at_most(norm, m.sqrt() * max), "{max:e} {norm:e} {m}");
        prop_assert!(at_most(mean.abs(), mean_abs) && at_most(mean_abs, max) && at_most(mean_abs, record.rms().unwrap()));
        let variance = record.variance().unwrap();
        prop_assert!(variance >= 0.0 && variance <= (norm * norm / m) * (1.0 + 4.0 * SUM_BOUND));
        prop_assert!(record.min_nonzero_abs().is_none_or(|min| min > 0.0 && f64::from(min) <= max));
        prop_assert!(record.dead_count >= record.zero_count);
    }

    /// What is clipped has the norm it was clipped to, but for the rounding of its elements, and nothing grew.
    #[test]
    fn the_clipped_norm_is_max_norm(list in vec(seeded(1..3000), 1..5), share in 1e-3..2.0f64) {
        let (_, before) = measure_list(&list, Config::default());
        let max_norm = share * before.finite_total_norm;
        prop_assume!(max_norm > 0.0);
        let mut clipped = list.clone();
        let config = Config::default().clip(Clip::global_norm(max_norm)).non_finite(NonFinitePolicy::ZeroNonFinite);
        let mut probe = probe_of(&list, config);
        let report = probe.measure_host(&list.iter().map(Data::tensor).collect::<Vec<_>>()).unwrap();
        probe.clip_host(&mut clipped.iter_mut().map(Data::tensor_mut).collect::<Vec<_>>()).unwrap();
        let (_, after) = measure_list(&clipped, Config::default());

        let coefficient = report.outputs().coefficient;
        prop_assert!((0.0..=1.0).contains(&coefficient));
        let expected = before.finite_total_norm * f64::from(coefficient);
        prop_assert!(expected <= max_norm * (1.0 + 1e-6), "{expected:e} {max_norm:e}");
        // Half a unit in the last place of each dtype, relative for normal numbers and absolute for subnormal ones.
        let rounding = list.iter().map(|data| match data.dtype() {
            DType::F32 => (power_of_two(-24), power_of_two(-149)),
            DType::F16 => (power_of_two(-11), power_of_two(-24)),
            DType::BF16 => (power_of_two(-8), power_of_two(-133)),
        });
        let relative = rounding.clone().map(|r| r.0).fold(0.0, f64::max) + 3.0 * SUM_BOUND;
        let elements: usize = list.iter().map(Data::len).sum();
        let absolute = rounding.map(|r| r.1).fold(0.0, f64::max) * (elements as f64).sqrt();
        let gap = (after.finite_total_norm - expected).abs();
        prop_assert!(gap <= relative * expected + absolute, "{:e} {expected:e}", after.finite_total_norm);
        for (old, new) in list.iter().zip(&clipped) {
            let format = Format::of(old.dtype());
            prop_assert!(new.bits().all(|bits| format.value(bits).is_finite()));
            let grew = old.bits().zip(new.bits()).any(|(old, new)| format.value(new).abs() > format.value(old).abs());
            prop_assert!(!grew);
            if coefficient == 1.0 && before.found_inf == 0.0 {
                prop_assert_eq!(old.bytes(), new.bytes());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// At the edge of a chunk the halves merge to the very bits of the whole: so does the tree of two chunks, and of
    /// four in the middle.
    #[test]
    fn merged_chunks_are_the_whole_to_the_bit(
        (first, second) in (dtype(), 1..3usize).prop_flat_map(|(dtype, half)| {
            let chunks = half * CHUNK;
            // The second half may end within its last chunk.
            (seeded_of(dtype, chunks..chunks + 1), seeded_of(dtype, chunks - CHUNK + 1..chunks + 1))
        }),
    ) {
        let merged = measure(&first).merge(&measure(&second));
        demand_none(&check::same_record("merged", &merged, &measure(&concat(&first, &second))));
    }
}
