//! The harness is given faulty backends, and must complain of each: an element read twice, a write outside a tensor, a wrong
//! refusal. And the table of cases is what it says.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // Small counts.

use crate::common::cases::{Case, Data, cases};
use crate::common::host::OnHost;
use crate::common::oracle::{self, Format, Truth};
use crate::common::{Effort, Prepared, run_case};
use gradprobe::{Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, Probe, Report};

/// A probe with a fault: what it measures is falsified before, what it clips after.
struct Faulty {
    probe: Probe,
    /// Changes what is read; is told the step and whether the first tensor lies at a multiple of 16 bytes.
    read: fn(&mut Vec<Data>, u64, bool),
    /// Changes what was written; is given what was there before.
    write: fn(&mut [HostTensorMut<'_>], &[Data]),
    step: u64,
}

impl OnHost for Faulty {
    fn probe(&mut self) -> &mut Probe {
        &mut self.probe
    }

    fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        let mut data: Vec<Data> = tensors.iter().map(|&t| Data::from(t)).collect();
        let aligned = tensors.first().is_none_or(|t| (t.as_bytes().as_ptr() as usize).is_multiple_of(16));
        self.step += 1;
        (self.read)(&mut data, self.step, aligned);
        self.probe.measure_host(&data.iter().map(Data::tensor).collect::<Vec<_>>())
    }

    fn clip_host(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
        let before: Vec<Data> = tensors.iter().map(|t| Data::from(t.as_ref())).collect();
        self.probe.clip_host(tensors)?;
        (self.write)(tensors, &before);
        Ok(())
    }
}

/// What the harness says of a faulty backend.
fn complaints_of(
    case: &Case,
    read: fn(&mut Vec<Data>, u64, bool),
    write: fn(&mut [HostTensorMut<'_>], &[Data]),
) -> Vec<String> {
    let mut make = |plan, config| Faulty { probe: Probe::new(Cpu, plan, config).unwrap(), read, write, step: 0 };
    run_case(case, &mut make, &Effort { large: false, offsets: 3 })
}

fn case(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).unwrap_or_else(|| panic!("{name} is not in the table"))
}

const READS_RIGHT: fn(&mut Vec<Data>, u64, bool) = |_, _, _| ();
const WRITES_RIGHT: fn(&mut [HostTensorMut<'_>], &[Data]) = |_, _| ();

/// Replaces the bits of the element at `index` of f32 data.
fn set(data: &mut Data, index: usize, bits: u32) {
    if let Data::F32(elements) = data {
        elements[index] = f32::from_bits(bits);
    }
}

#[test]
fn the_harness_complains_of_faulty_reads() {
    let exact = case("exact_sums_f32");
    let sizes = case("every_size_f32");
    assert_eq!(complaints_of(&exact, READS_RIGHT, WRITES_RIGHT), [""; 0]);
    assert_eq!(complaints_of(&sizes, READS_RIGHT, WRITES_RIGHT), [""; 0]);
    type Read = fn(&mut Vec<Data>, u64, bool);
    let faults: [(&str, &Case, Read); 6] = [
        ("an element read twice in the place of its neighbour", &exact, |data, _, _| {
            let Data::F32(elements) = &mut data[0] else { return };
            elements[17] = elements[16];
        }),
        ("the last element left out", &exact, |data, _, _| set(&mut data[4], 65_520, 0)),
        ("two tensors swapped in content", &case("dead_threshold_1"), |data, _, _| {
            let [Data::F32(one), Data::F32(two)] = &mut data[..2] else { return };
            one.swap_with_slice(two);
        }),
        ("another order of additions where the tensor is misaligned", &sizes, |data, _, aligned| {
            if !aligned {
                data.iter_mut().for_each(|d| {
                    if let Data::F32(e) = d {
                        e.reverse()
                    }
                });
            }
        }),
        ("something left behind by the step before", &exact, |data, step, _| {
            if step > 2 {
                set(&mut data[2], 5, f32::NAN.to_bits());
            }
        }),
        ("one unit in the last place", &sizes, |data, _, _| {
            let Data::F32(elements) = &mut data[1] else { return };
            elements[0] = elements[0].next_up();
        }),
    ];
    for (what, case, read) in faults {
        let complaints = complaints_of(case, read, WRITES_RIGHT);
        assert!(complaints.iter().any(|c| c.contains("tensor ")), "{what}: {complaints:?}");
    }
}

#[test]
fn the_harness_complains_of_faulty_clips() {
    let sizes = case("every_size_f32");
    let skipped = case("policy_skip_nan_and_inf_clip");
    let unclipped = case("max_norm_equals_f32");
    type Write = fn(&mut [HostTensorMut<'_>], &[Data]);
    let faults: [(&str, &Case, Write); 5] = [
        ("the last element left as it was", &sizes, |tensors, before| {
            let (Some(HostTensorMut::F32(e)), Some(Data::F32(was))) = (tensors.last_mut(), before.last()) else {
                return;
            };
            e[was.len() - 1] = was[was.len() - 1];
        }),
        ("one unit in the last place", &sizes, |tensors, _| {
            let HostTensorMut::F32(elements) = &mut tensors[9] else { return };
            elements[3] = elements[3].next_down();
        }),
        ("a clip in spite of the skip", &skipped, |tensors, _| {
            let HostTensorMut::F32(elements) = &mut tensors[0] else { return };
            elements.iter_mut().for_each(|x| *x *= 0.5);
        }),
        ("a NaN made quiet in spite of the skip", &skipped, |tensors, _| {
            let HostTensorMut::F32(elements) = &mut tensors[0] else { return };
            elements.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = f32::NAN);
        }),
        ("a zero that loses its sign", &unclipped, |tensors, _| {
            let HostTensorMut::F32(elements) = &mut tensors[0] else { return };
            elements[7] = -0.0;
        }),
    ];
    for (what, case, write) in faults {
        assert_eq!(complaints_of(case, READS_RIGHT, WRITES_RIGHT), [""; 0]);
        let complaints = complaints_of(case, READS_RIGHT, write);
        assert!(complaints.iter().any(|c| c.contains("after clip")), "{what}: {complaints:?}");
    }
}

/// A backend that refuses what it should not, and one that takes what it should refuse.
#[test]
fn the_harness_complains_of_wrong_refusals() {
    struct Careless(Probe);
    impl OnHost for Careless {
        fn probe(&mut self) -> &mut Probe {
            &mut self.0
        }
        fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
            // Takes the step for done before looking at what it was given.
            let report = self.0.measure_host(tensors);
            if report.is_err() {
                let planned = self.0.plan().clone();
                let zeros: Vec<Data> = planned.tensors().iter().map(|t| Data::zeros(t.dtype, t.len as usize)).collect();
                self.0.measure_host(&zeros.iter().map(Data::tensor).collect::<Vec<_>>())?;
            }
            report
        }
        fn clip_host(&mut self, _: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
            Ok(())
        }
    }
    let mut careless = |plan, config| Careless(Probe::new(Cpu, plan, config).unwrap());
    let complaints = crate::common::refuses_what_was_not_planned(&mut careless);
    for what in ["before any measurement", "not counted as a step", "clip of another length", "clip of too few"] {
        assert!(complaints.iter().any(|c| c.contains(what)), "{what}: {complaints:?}");
    }
    let mut honest = |plan, config| Probe::new(Cpu, plan, config).unwrap();
    assert_eq!(crate::common::refuses_what_was_not_planned(&mut honest), [""; 0]);
}

#[test]
#[should_panic(expected = "1 complaints:\n  w: wrong")]
fn complaints_are_a_panic() {
    crate::common::demand_none(&["w: wrong".to_owned()]);
}

fn max_norm_of(config: &Config) -> f64 {
    let Clip::GlobalNorm { max_norm } = config.clip else { panic!("{:?} has no norm", config.clip) };
    max_norm
}

/// The edges really are what their names say, so that the table cannot lose its point unnoticed.
#[test]
fn the_table_is_what_it_says() {
    let cases = cases();
    let mut names: Vec<&str> = cases.iter().map(|c| c.name.as_str()).collect();
    names.sort_unstable();
    let of_names = names.len();
    names.dedup();
    assert_eq!(names.len(), of_names, "two cases of one name");
    let total: usize = cases.iter().map(Case::elements).sum();
    let large: usize = cases.iter().filter(|c| c.large).map(Case::elements).sum();
    assert!(total < 41_000_000 && total - large < 25_000_000, "{total} elements, {large} of them in large cases");

    let of = |name: &str| Prepared::new(&case(name));
    for dtype in DType::ALL {
        let edges = crate::common::cases::edge_values(dtype);
        let format = Format::of(dtype);
        for bits in [0, format.sign(), 1, format.infinity() - 1, format.infinity(), format.nan(), format.infinity() | 1]
        {
            assert!(edges.contains(&bits), "{dtype} {bits:#x}");
        }
        let subnormal = of(&format!("subnormals_count_in_full_{}", dtype.name().to_lowercase()));
        assert!(subnormal.truths[0].max_abs.unwrap() < f32::MIN_POSITIVE || dtype == DType::F16);
        assert!(subnormal.truths[0].finite_l2_norm > 0.0);
    }
    for (name, least) in [("1e3", 900.0), ("1e5", 9e4), ("1e7", 1e6)] {
        let far = of(&format!("mean_over_std_{name}_is_not_cancelled_helion_3268"));
        let ratio = |t: &Truth| t.mean.unwrap().abs() / t.variance.unwrap().sqrt();
        // At 3e38 a spread of a third would pass the largest number; there the ratio may be anything.
        assert!(far.truths[..4].iter().all(|t| ratio(t) > least), "{name}");
    }
    let ulp = of("one_ulp_among_ones");
    assert!(ulp.truths.iter().all(|t| t.mean.unwrap() / t.variance.unwrap().sqrt() > 2e7));
    let exact = of("max_norm_equals_f32");
    assert_eq!(oracle::finite_total_norm(&exact.truths), 5.0);
    let list = of("list_of_1000");
    assert!(list.truths.iter().filter(|t| t.count == 0).count() > 100);
    for name in ["clip_by_half_f32", "clip_by_half_f16", "clip_by_half_bf16"] {
        let truths = of(name).truths;
        let coefficient = 512.0 / (oracle::finite_total_norm(&truths) + 1e-6);
        assert_eq!(coefficient as f32, 0.5, "{name}");
    }
    for name in ["clip_over_the_whole_range_f32", "clip_over_the_whole_range_f16", "clip_over_the_whole_range_bf16"] {
        let case = case(name);
        let coefficient = max_norm_of(&case.config) / oracle::finite_total_norm(&Prepared::new(&case).truths);
        assert!(coefficient > 1e-3 && coefficient < 1.0, "{name}: {coefficient}");
    }
}
