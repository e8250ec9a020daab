//! What every device's tests share: one table of cases, one exact oracle, one set of checkers, and the harness here
//! that runs the three against a [`Probe`] on any device.
//!
//! A device's test file is a call of [`run_all`] with a closure that makes its probe.

#![allow(dead_code)] // Each test file is a crate of its own and uses a part of this.

pub mod absent;
pub mod cases;
pub mod check;
pub mod clips;
pub mod data;
pub mod gsnr;
pub mod gsnr_cases;
pub mod host;
pub mod normal;
pub mod oracle;

use cases::{Case, Data};
use gradprobe::{Clip, Config, Cpu, DType, Error, HostTensor, HostTensorMut, Plan, Probe, Report, StepOutputs};
use half::{bf16, f16};
use host::{OnHost, plan_of};
use oracle::Truth;
use rayon::prelude::*;

/// Whether to do less, for sanitizers and tools that make everything many times slower.
pub fn short() -> bool {
    std::env::var("GRADPROBE_SHORT").as_deref() == Ok("1")
}

/// How much of the table a device can afford.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Whether to run the cases marked `large`.
    pub large: bool,
    /// At how many of the 16 misalignments every other case is measured; large ones are at 2 of these at most.
    pub offsets: usize,
}

impl Effort {
    /// Everything.
    pub const FULL: Effort = Effort { large: true, offsets: 16 };

    /// At how many misalignments a case is measured.
    fn offsets_of(&self, case: &Case) -> usize {
        if case.large { self.offsets.min(2) } else { self.offsets }
    }
}

/// Runs the whole table of cases on a device and panics with what is wrong, case by case.
///
/// `make` is called once a case, and gives a probe for this plan under this config. What is demanded of the probe:
///
/// * conformance: its report is within the contract's bounds of the exact statistics, and what follows from the norm
///   (coefficient, flags) is exact;
/// * bits: report and clipped tensors equal those of [`Cpu`] byte for byte, at every misalignment, and again
///   after a step of nothing but NaN, so that nothing of an earlier step stays behind;
/// * clip: each element has the bits the oracle says, nothing around a tensor is written, and with a coefficient of 1
///   nothing at all;
/// * refusal: tensors that are not those of the plan, and a clip before a measurement, are errors.
///
/// Tensors lie at `16 · a + offset · size` bytes with guard bytes on both sides; a device to which they are copied
/// should keep the address modulo 16, or the misalignments test nothing.
pub fn run_all<P: OnHost>(make: &mut dyn FnMut(Plan, Config) -> P, effort: &Effort) {
    let mut complaints = refuses_what_was_not_planned(make);
    let (mut count, mut elements) = (0, 0);
    for case in cases::cases().iter().filter(|case| effort.large || !case.large) {
        complaints.extend(run_case(case, make, effort).into_iter().map(|c| format!("{}: {c}", case.name)));
        count += 1;
        elements += case.elements() * effort.offsets_of(case);
    }
    println!("table: {count} cases, {elements} elements");
    demand_none(&complaints);
}

/// Panics with the first of the complaints, unless there are none.
pub fn demand_none(complaints: &[String]) {
    const SHOWN: usize = 30;
    let shown = complaints.iter().take(SHOWN).map(|c| format!("\n  {c}")).collect::<String>();
    assert!(complaints.is_empty(), "{} complaints:{shown}", complaints.len());
}

/// [`run_all`] for one case; gives back what is wrong.
pub fn run_case<P: OnHost>(case: &Case, make: &mut dyn FnMut(Plan, Config) -> P, effort: &Effort) -> Vec<String> {
    let prepared = Prepared::new(case);
    let reference = Reference::new(&prepared, &case.config);
    let mut probe = make(prepared.plan(), case.config.clone());
    let offsets = effort.offsets_of(case);
    let mut complaints = Vec::new();
    let mut step = 0;
    for offset in 0..offsets {
        step += 1;
        match run_step(&mut probe, &prepared, &reference, offset, step) {
            Ok((report, found)) => {
                complaints.extend(found.into_iter().map(|c| format!("at offset {offset}, {c}")));
                if offset == 0 {
                    complaints.extend(conformance(case, &prepared, &reference, &report, step));
                }
            }
            Err(error) => {
                complaints.push(format!("at offset {offset}, {error}"));
                return complaints;
            }
        }
        if offset == 0 && !case.large {
            step += 1;
            let poison: Vec<Data> = prepared.data.iter().map(Data::all_nan).collect();
            let poison: Vec<HostTensor<'_>> = poison.iter().map(Data::tensor).collect();
            if let Err(error) = probe.measure_host(&poison) {
                complaints.push(format!("measuring nothing but NaN: {error}"));
            }
        }
    }
    complaints
}

/// Measures and clips the tensors of a case, each at another misalignment, and compares all bytes with the reference.
fn run_step(
    probe: &mut impl OnHost,
    prepared: &Prepared,
    reference: &Reference,
    offset: usize,
    step: u64,
) -> Result<(Report, Vec<String>), Error> {
    let Prepared { names, data, .. } = prepared;
    let place = |(t, data): (usize, &Data)| Placed::new(data, (offset + t) % OFFSETS);
    let mut placed: Vec<Placed> = data.iter().enumerate().map(place).collect();
    let compare = |placed: &[Placed], expected: &[Data], after: &str| {
        let mut complaints = Vec::new();
        for ((name, placed), expected) in names.iter().zip(placed).zip(expected) {
            let size = expected.dtype().size();
            complaints.extend(check::same_elements(name, size, placed.bytes(), expected.bytes()));
            if !placed.guards_are_intact() {
                complaints.push(format!("{name}: bytes around the tensor were written"));
            }
        }
        complaints.into_iter().map(|c| format!("after {after}, {c}")).collect::<Vec<_>>()
    };

    let report = probe.measure_host(&placed.iter().map(Placed::tensor).collect::<Vec<_>>())?;
    let outputs = StepOutputs { step, ..*reference.report.outputs() };
    let expected = (reference.report.records(), &outputs);
    let mut complaints = check::same_step(names, (report.records(), report.outputs()), expected);
    complaints.extend(compare(&placed, data, "measure"));

    probe.clip_host(&mut placed.iter_mut().map(Placed::tensor_mut).collect::<Vec<_>>())?;
    complaints.extend(compare(&placed, &reference.clipped, "clip"));
    Ok((report, complaints))
}

/// A report against the exact statistics, and the clipped tensors, which were compared with the reference, against
/// the oracle's.
fn conformance(case: &Case, prepared: &Prepared, reference: &Reference, report: &Report, step: u64) -> Vec<String> {
    let Prepared { names, data, truths } = prepared;
    let mut complaints = check::check_step(names, report.records(), report.outputs(), step, truths, &case.config);
    let listed = report.tensors().map(|t| (t.name, t.dtype));
    if !listed.eq(names.iter().map(String::as_str).zip(data.iter().map(Data::dtype))) {
        complaints.push("the report does not list the tensors of the plan".to_owned());
    }
    let exact = clip_by_oracle(data, report.outputs());
    for ((name, clipped), exact) in names.iter().zip(&reference.clipped).zip(&exact) {
        complaints.extend(check::same_elements(name, exact.dtype().size(), clipped.bytes(), exact.bytes()));
    }
    complaints
}

/// What [`Cpu`] makes of a case.
struct Reference {
    report: Report,
    clipped: Vec<Data>,
}

impl Reference {
    fn new(prepared: &Prepared, config: &Config) -> Self {
        let mut probe = Probe::new(Cpu, prepared.plan(), config.clone()).expect("a case has a valid config");
        let tensors: Vec<HostTensor<'_>> = prepared.data.iter().map(Data::tensor).collect();
        let report = probe.measure_host(&tensors).expect("the reference measures");
        let mut clipped = prepared.data.clone();
        let mut tensors: Vec<HostTensorMut<'_>> = clipped.iter_mut().map(Data::tensor_mut).collect();
        probe.clip_host(&mut tensors).expect("the reference clips");
        Self { report, clipped }
    }
}

/// A case with its data made and its truth worked out.
pub struct Prepared {
    pub names: Vec<String>,
    pub data: Vec<Data>,
    pub truths: Vec<Truth>,
}

impl Prepared {
    pub fn new(case: &Case) -> Self {
        let (data, truths) = case
            .tensors
            .par_iter()
            .map(|tensor| {
                let data = tensor.data();
                let truth = oracle::truth_under(&case.config, data.dtype(), data.bits());
                (data, truth)
            })
            .unzip();
        Self { names: (0..case.tensors.len()).map(|index| format!("tensor {index}")).collect(), data, truths }
    }

    /// The plan of these tensors under their names.
    pub fn plan(&self) -> Plan {
        let tensors = self.names.iter().map(String::as_str).zip(self.data.iter().map(Data::tensor));
        plan_of(tensors).expect("a case is a valid plan")
    }
}

/// What the clip should leave, by the decision in `outputs`.
pub fn clip_by_oracle(data: &[Data], outputs: &StepOutputs) -> Vec<Data> {
    let zero_nonfinite = outputs.action & StepOutputs::ACTION_ZERO_NONFINITE != 0;
    let clip = |data: &Data| match outputs.action {
        0 => data.clone(),
        _ => Data::of_bits(
            data.dtype(),
            data.bits().map(|bits| oracle::clip(data.dtype(), bits, outputs.coefficient, zero_nonfinite)),
        ),
    };
    data.par_iter().map(clip).collect()
}

/// The tensors of a list.
pub fn tensors(data: &[Data]) -> Vec<HostTensor<'_>> {
    data.iter().map(Data::tensor).collect()
}

/// Copies of a list's tensors, each `shift` elements further from a multiple of 16 bytes than the one before.
pub fn placed(data: &[Data], offset: usize, shift: usize) -> Vec<Placed> {
    data.iter().enumerate().map(|(t, data)| Placed::new(data, (offset + shift * t) % OFFSETS)).collect()
}

/// Offsets, in elements, at which a tensor is placed.
pub const OFFSETS: usize = 16;

/// A copy of a tensor at a chosen distance from a multiple of 16 bytes, with guard bytes before and behind.
pub struct Placed {
    words: Vec<u128>,
    dtype: DType,
    start: usize,
    end: usize,
}

impl Placed {
    const GUARD_BYTES: usize = 64;
    /// A NaN in every dtype, so that a read beyond the tensor shows.
    const GUARD: u8 = 0xff;

    /// `data` at `offset` elements from a multiple of 16 bytes.
    pub fn new(data: &Data, offset: usize) -> Self {
        let start = Self::GUARD_BYTES + offset * data.dtype().size();
        let end = start + data.bytes().len();
        let words = vec![u128::MAX; (end + Self::GUARD_BYTES).div_ceil(size_of::<u128>())];
        let mut placed = Self { words, dtype: data.dtype(), start, end };
        bytemuck::cast_slice_mut::<u128, u8>(&mut placed.words)[start..end].copy_from_slice(data.bytes());
        placed
    }

    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[self.start..self.end]
    }

    pub fn tensor(&self) -> HostTensor<'_> {
        let bytes = self.bytes();
        match self.dtype {
            DType::F32 => HostTensor::F32(bytemuck::cast_slice(bytes)),
            DType::F16 => HostTensor::F16(bytemuck::cast_slice(bytes)),
            DType::BF16 => HostTensor::BF16(bytemuck::cast_slice(bytes)),
        }
    }

    pub fn tensor_mut(&mut self) -> HostTensorMut<'_> {
        let bytes = &mut bytemuck::cast_slice_mut::<u128, u8>(&mut self.words)[self.start..self.end];
        match self.dtype {
            DType::F32 => HostTensorMut::F32(bytemuck::cast_slice_mut(bytes)),
            DType::F16 => HostTensorMut::F16(bytemuck::cast_slice_mut(bytes)),
            DType::BF16 => HostTensorMut::BF16(bytemuck::cast_slice_mut(bytes)),
        }
    }

    /// All the bytes, guards included.
    pub fn surroundings(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words)
    }

    pub fn guards_are_intact(&self) -> bool {
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        bytes[..self.start].iter().chain(&bytes[self.end..]).all(|&byte| byte == Self::GUARD)
    }
}

/// The errors every device owes to a caller who gives it something else than was planned.
pub fn refuses_what_was_not_planned<P: OnHost>(make: &mut dyn FnMut(Plan, Config) -> P) -> Vec<String> {
    let plan = Plan::new([("a", DType::F32, 3), ("b", DType::BF16, 2)]).expect("a valid plan");
    let mut probe = make(plan, Config::default().clip(Clip::global_norm(1.0)));
    let (mut three, mut four) = ([1.0f32; 3], [1.0f32; 4]);
    let (mut two, mut two_f16) = ([bf16::ONE; 2], [f16::ONE; 2]);
    let mut complaints = Vec::new();
    let mut demand = |what: &str, holds: bool| {
        if !holds {
            complaints.push(format!("not so: {what}"));
        }
    };

    let early = probe.clip_host(&mut [HostTensorMut::F32(&mut three), HostTensorMut::BF16(&mut two)]);
    demand("a clip before any measurement is refused", early == Err(Error::NotMeasured));
    let good = [HostTensor::F32(&three), HostTensor::BF16(&two)];
    for (what, tensors, first) in [
        ("a missing tensor is refused", &good[..1], Some("b")),
        ("a missing tensor before others is refused", &good[1..], Some("a")),
        ("a tensor too many is refused", &[good[0], good[1], good[1]][..], None),
        ("a tensor too many before others is refused", &[good[0], good[0], good[1]][..], Some("b")),
        ("an empty list is refused", &[], Some("a")),
    ] {
        let result = probe.measure_host(tensors).map(drop);
        let first = first.map(str::to_owned);
        demand(what, result == Err(Error::TensorCount { planned: 2, given: tensors.len(), first }));
    }
    for (what, name, tensors) in [
        ("another length is refused", "a", [HostTensor::F32(&four), good[1]]),
        ("another dtype of the same size is refused", "b", [good[0], HostTensor::F16(&two_f16)]),
        ("another order is refused", "a", [good[1], good[0]]),
    ] {
        let result = probe.measure_host(&tensors).map(drop);
        demand(what, matches!(result, Err(Error::TensorMismatch { name: at, .. }) if at == name));
    }
    demand("what was refused is not counted as a step", probe.measure_host(&good).is_ok_and(|r| r.step() == 1));
    let clip = probe.clip_host(&mut [HostTensorMut::F32(&mut four), HostTensorMut::BF16(&mut two)]);
    demand("a clip of another length is refused", matches!(clip, Err(Error::TensorMismatch { .. })));
    let clip = probe.clip_host(&mut [HostTensorMut::F32(&mut three), HostTensorMut::F16(&mut two_f16)]);
    demand("a clip of another dtype is refused", matches!(clip, Err(Error::TensorMismatch { .. })));
    let clip = probe.clip_host(&mut [HostTensorMut::F32(&mut three)]);
    demand("a clip of too few is refused", matches!(clip, Err(Error::TensorCount { .. })));
    let untouched = three == [1.0; 3] && four == [1.0; 4] && two == [bf16::ONE; 2] && two_f16 == [f16::ONE; 2];
    demand("a refused clip writes nothing", untouched);
    complaints
}
