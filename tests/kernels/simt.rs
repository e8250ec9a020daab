//! The kernels on the host: the same bits as the CPU over the table of cases, in whatever order threads and
//! blocks run and on however many blocks; and the errors of the probe that drives them here and on CUDA.
#![allow(unsafe_code, reason = "gives the probe bare addresses, good and bad")]

use crate::common::{
    Effort,
    cases::{self, Data},
    demand_none,
    host::OnHost,
    run_all, run_case, short,
};
use gradprobe::{Clip, Config, Cpu, DType, Error, HostTensor, Plan, Probe, RawTensor};
use gradprobe_simt::{
    Schedule, Simt,
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
        let mut make =
            |plan, config| -> Probe { Probe::new(Simt { schedule, blocks, ..Simt::default() }, plan, config).unwrap() };
        // Lists of thousands of tiny tensors give a block little to order and take most of the time.
        for case in cases::cases().iter().filter(|case| !case.large && case.tensors.len() <= 1000) {
            let found = run_case(case, &mut make, &Effort { large: false, offsets: 1 });
            complaints.extend(found.into_iter().map(|c| format!("{}: {schedule:?}, {blocks} blocks: {c}", case.name)));
        }
    }
    demand_none(&complaints);
}

/// Three sections of chunks that merge in pairs: as many as 1, 3 and 7 blocks have, in runs that end within them, with a
/// number of its own in each chunk.
#[test]
fn sections_merge_in_the_order_of_the_cpu() {
    const CHUNK: usize = 32 << 10;
    const LENGTH: usize = (2 * 1024 + 300) * CHUNK - 5;
    let mut map = memmap2::MmapOptions::new().len(2 * LENGTH).no_reserve_swap().map_anon().unwrap();
    let elements: &mut [u16] = bytemuck::cast_slice_mut(&mut map);
    for chunk in elements.chunks_mut(CHUNK).zip(1u16..) {
        let (chunk, number) = chunk;
        chunk[usize::from(number) % chunk.len()] = half::bf16::from_f32(f32::from(number) * 1e-3).to_bits();
    }
    let tensor = HostTensor::BF16(bytemuck::cast_slice(elements));
    let plan = Plan::new([("sections", DType::BF16, LENGTH as u64)]).unwrap();
    let expected = Probe::new(Cpu, plan.clone(), Config::default()).unwrap().measure_host(&[tensor]).unwrap();
    for blocks in if short() { &[7][..] } else { &[1, 3, 7] } {
        let device = Simt { blocks: *blocks, ..Simt::default() };
        let report = Probe::new(device, plan.clone(), Config::default()).unwrap().measure_host(&[tensor]).unwrap();
        assert_eq!(bytemuck::bytes_of(&report.records()[0]), bytemuck::bytes_of(&expected.records()[0]), "{blocks}");
    }
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
    let expected = Probe::new(Cpu, plan.clone(), Config::default()).unwrap().measure_host(&[tensor]).unwrap();
    let report = Probe::new(Simt::default(), plan, Config::default()).unwrap().measure_host(&[tensor]).unwrap();
    let record = report.records()[0];
    assert_eq!(bytemuck::bytes_of(&record), bytemuck::bytes_of(&expected.records()[0]));
    assert_eq!((record.count, record.nan_count, record.zero_count), (LENGTH as u64, 1, LENGTH as u64 - 5));
    assert_eq!(record.first_nonfinite(), Some((1 << 31) + 7));
    assert!((record.finite_l2_norm() - 30f64.sqrt()).abs() < 1e-6);
    assert_eq!(record.max_abs(), Some(4.0));
}

/// All of these elements.
///
/// # Safety
/// Its use ends before `data` is dropped or changed, and changes nothing.
unsafe fn raw(data: &Data) -> RawTensor {
    let tensor = data.tensor();
    // SAFETY: the elements are there until then.
    unsafe { RawTensor::new(tensor.as_bytes().as_ptr() as u64, tensor.len() as u64, tensor.dtype()) }
}

#[test]
fn bad_addresses_are_errors_that_name_the_tensor() {
    let data = Data::of_bits(DType::F32, [1.0f32; 64].map(f32::to_bits).into_iter());
    let address = data.tensor().as_bytes().as_ptr() as u64;
    let plan = Plan::new([("first", DType::F32, 32), ("second", DType::F32, 32)]).unwrap();
    let mut probe = Probe::new(Simt::default(), plan, Config::default().clip(Clip::global_norm(1.0))).unwrap();
    // SAFETY: addresses in `data` have 32 elements of it behind them that are only read, and others are refused.
    let at = |address: u64| unsafe { RawTensor::new(address, 32, DType::F32) };
    let name = || "second".to_owned();
    for (second, expected) in [
        (0, Error::NullPointer { name: name() }),
        (address + 2, Error::MisalignedPointer { name: name(), address: address + 2, size: 4 }),
        (u64::MAX - 63, Error::AddressOverflow { name: name(), address: u64::MAX - 63, length: 32 }),
    ] {
        assert_eq!(probe.measure(&[&at(address), &at(second)]), Err(expected));
    }
    // The two halves of `data`, then elements that overlap: reading may.
    for second in [128, 64] {
        probe.measure(&[&at(address), &at(address + second)]).unwrap();
    }
    let refused = probe.clip(&mut [&mut at(address), &mut at(address + 64)]);
    assert_eq!(refused, Err(Error::Overlap { first: "first".into(), second: name() }));
    assert_eq!(data.bits().filter(|&bits| bits != 1.0f32.to_bits()).count(), 0);
}

#[test]
fn polling_gives_each_step_once_and_waiting_the_last() {
    let data = Data::of_bits(DType::F32, [3.0f32, 4.0].map(f32::to_bits).into_iter());
    // SAFETY: `data` outlives it, and is only read.
    let tensor = unsafe { raw(&data) };
    let plan = Plan::new([("pair", DType::F32, 2)]).unwrap();
    let mut probe = Probe::new(Simt::default(), plan, Config::default()).unwrap();
    assert!(probe.poll().unwrap().is_none());
    assert_eq!(probe.wait().unwrap_err(), Error::NotMeasured);
    for step in 1..=6 {
        probe.measure(&[&tensor]).unwrap();
        let report = probe.poll().unwrap().expect("the emulation is done at once");
        assert_eq!((report.step(), report.outputs().total_norm), (step, 5.0));
        assert!(probe.poll().unwrap().is_none(), "a step is reported once");
    }
    for _ in 0..10 {
        probe.measure(&[&tensor]).unwrap();
    }
    assert_eq!(probe.wait().unwrap().step(), 16);
    assert_eq!(probe.wait().unwrap().step(), 16, "waiting again gives the last step again");
}
