//! The kernels on the host: the same bits as the CPU backend over the table of cases, in whatever order threads and
//! blocks run and on however many blocks; and the errors of the probe that drives them here and on CUDA.
#![allow(unsafe_code, reason = "gives the probe bare addresses, good and bad")]

mod common;

use common::{
    Effort,
    cases::{self, Data},
    demand_none, run_all, run_case, short,
};
use gradprobe::{Backend, Config, Probe, DType, Error, HostTensor, Plan, launch::RawTensor};
use gradprobe_simt::{
    Schedule, Simt, Probe,
    ptx::{Statistics, total},
};

#[test]
fn kernels_conform_and_equal_the_cpu() {
    let effort = match (short(), gradprobe_simt::ptx_of_environment()) {
        (false, None) => Effort { large: true, offsets: 4 },
        // An interpreter takes three minutes for each misalignment of all.
        (false, Some(_)) => Effort { large: true, offsets: 2 },
        (true, None) => Effort { large: false, offsets: 2 },
        (true, Some(_)) => Effort { large: false, offsets: 1 },
    };
    run_all(&mut |plan, config| Probe::new(Simt::default(), plan, config).unwrap(), &effort);
    let Statistics { launches, seeds, lane_instructions, .. } = total();
    if launches > 0 {
        println!(
            "table on PTX: {launches} launches, {seeds} seeds, {} million lane-instructions",
            lane_instructions / 1_000_000
        );
    }
}

/// What a missing barrier, a float atomic or a partial read too early would change.
#[test]
fn no_order_and_no_grid_changes_a_bit() {
    let schedules = [Schedule::Reverse].into_iter().chain((0..8).map(Schedule::Shuffled));
    let mut complaints = Vec::new();
    let count = if short() { 1 } else { 9 };
    for (schedule, blocks) in schedules.zip([1, 2, 3, 64, 5, 1000, 7, 4, 13]).take(count) {
        let mut make = |plan, config| -> Probe {
            Probe::new(Simt { schedule, blocks, ..Simt::default() }, plan, config).unwrap()
        };
        // Lists of thousands of tiny tensors give a block little to order and take most of the time.
        for case in cases::cases().iter().filter(|case| !case.large && case.tensors.len() <= 1000) {
            let found = run_case(case, &mut make, &Effort { large: false, offsets: 1 });
            complaints.extend(found.into_iter().map(|c| format!("{}: {schedule:?}, {blocks} blocks: {c}", case.name)));
        }
    }
    demand_none(&complaints);
}

/// 2^32 + 1 elements in a mapping of zero pages, of which a few hold numbers: an offset cut to 32 bits would find them
/// elsewhere, or not at all.
#[test]
fn offsets_beyond_32_bits_are_right() {
    const LENGTH: usize = (1 << 32) + 1;
    let mut map = memmap2::MmapOptions::new().len(2 * LENGTH).no_reserve_swap().map_anon().unwrap();
    let elements: &mut [u16] = bytemuck::cast_slice_mut(&mut map);
    for (index, value) in [(0, 1.0f32), (1 << 31, 2.0), ((1 << 32) - 1, 3.0), (1 << 32, 4.0)] {
        elements[index] = half::bf16::from_f32(value).to_bits();
    }
    elements[(1 << 31) + 7] = half::bf16::NAN.to_bits();
    let tensor = HostTensor::BF16(bytemuck::cast_slice(elements));
    let plan = Plan::new([("huge", DType::BF16, LENGTH as u64)]).unwrap();
    let expected = Probe::new(Cpu, plan.clone(), Config::default()).unwrap().measure(&[tensor]).unwrap();
    let report = Probe::new(Simt::default(), plan, Config::default()).unwrap().measure_host(&[tensor]).unwrap();
    let record = report.records()[0];
    assert_eq!(bytemuck::bytes_of(&record), bytemuck::bytes_of(&expected.records()[0]));
    assert_eq!((record.count, record.nan_count, record.zero_count), (LENGTH as u64, 1, LENGTH as u64 - 5));
    assert_eq!(record.first_nonfinite(), Some((1 << 31) + 7));
    assert!((record.finite_l2_norm() - 30f64.sqrt()).abs() < 1e-6);
    assert_eq!(record.max_abs(), Some(4.0));
}

fn raw(data: &Data) -> RawTensor {
    let tensor = data.tensor();
    RawTensor { address: tensor.as_bytes().as_ptr() as u64, len: tensor.len() as u64, dtype: tensor.dtype() }
}

#[test]
fn bad_addresses_are_errors_that_name_the_tensor() {
    let data = Data::of_bits(DType::F32, [1.0f32; 64].map(f32::to_bits).into_iter());
    let good = raw(&data);
    let plan = Plan::new([("first", DType::F32, 32), ("second", DType::F32, 32)]).unwrap();
    let mut probe = Probe::new(Simt::default(), plan, Config::default().clip(Clip::global_norm(1.0))).unwrap();
    let at = |offset: u64| RawTensor { address: good.address + offset, len: 32, ..good };
    let name = || "second".to_owned();
    for (second, expected) in [
        (RawTensor { address: 0, ..at(0) }, Error::NullPointer { name: name() }),
        (at(2), Error::MisalignedPointer { name: name(), address: good.address + 2, size: 4 }),
        (
            RawTensor { address: u64::MAX - 63, ..at(0) },
            Error::AddressOverflow { name: name(), address: u64::MAX - 63, length: 32 },
        ),
    ] {
        // SAFETY: the second address is refused, so nothing is read.
        let refused = unsafe { probe.inner().measure_raw(&[at(0), second]) };
        assert_eq!(refused, Err(expected));
    }
    let _lent = gradprobe_simt::lend(&[raw(&data)], false);
    // The two halves of `data`, then elements that overlap: reading may.
    for second in [at(128), at(64)] {
        // SAFETY: 32 elements of `data` each.
        unsafe { probe.inner().measure_raw(&[at(0), second]) }.unwrap();
    }
    // SAFETY: refused before anything is written.
    let refused = unsafe { probe.inner().clip_raw(&[at(0), at(64)]) };
    assert_eq!(refused, Err(Error::Overlap { first: "first".into(), second: name() }));
    assert_eq!(data.bits().filter(|&bits| bits != 1.0f32.to_bits()).count(), 0);
}

#[test]
fn polling_gives_each_step_once_and_waiting_the_last() {
    let data = Data::of_bits(DType::F32, [3.0f32, 4.0].map(f32::to_bits).into_iter());
    let plan = Plan::new([("pair", DType::F32, 2)]).unwrap();
    let mut probe = Probe::new(Simt::default(), plan, Config::default()).unwrap();
    let probe = probe.inner();
    let _lent = gradprobe_simt::lend(&[raw(&data)], false);
    assert!(probe.poll().unwrap().is_none());
    assert_eq!(probe.wait().unwrap_err(), Error::NotMeasured);
    for step in 1..=6 {
        // SAFETY: `data` lives, and the launch has run on return.
        unsafe { probe.measure_raw(&[raw(&data)]) }.unwrap();
        let report = probe.poll().unwrap().expect("the emulation is done at once");
        assert_eq!((report.step(), report.outputs().total_norm), (step, 5.0));
        assert!(probe.poll().unwrap().is_none(), "a step is reported once");
    }
    for _ in 0..10 {
        // SAFETY: as above.
        unsafe { probe.measure_raw(&[raw(&data)]) }.unwrap();
    }
    assert_eq!(probe.wait().unwrap().step(), 16);
    assert_eq!(probe.wait().unwrap().step(), 16, "waiting again gives the last step again");
}
