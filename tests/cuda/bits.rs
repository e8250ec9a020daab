//! Every number and every clipped element, bit for bit, over the table of cases and at lengths beyond 32 bits.

use super::*;

/// A probe on a stream of its own.
fn new_probe(plan: Plan, config: Config) -> Result<Probe, Error> {
    Probe::new(Cuda::new(&cuda::stream(0)?)?, plan, config)
}

#[test]
fn every_case_has_the_bits_of_the_cpu() {
    // Kept, so that the device's primary context is not made anew for every case.
    let Some(_context) = device() else { return };
    let effort = if short() { Effort { large: false, offsets: 2 } } else { Effort::FULL };
    run_all(&mut |plan, config| new_probe(plan, config).unwrap(), &effort);
}

#[test]
fn every_case_of_signal_and_noise_has_the_bits_of_the_cpu() {
    let Some(_context) = device() else { return };
    let effort = if short() { Effort { large: false, offsets: 1 } } else { Effort::FULL };
    gsnr::run_all(&mut new_probe, &effort);
}

/// Blocks finish in another order every time; what they write for each other must be there all the same.
#[test]
fn repeated_steps_have_the_same_bits() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let lengths: Vec<usize> = (0..100).map(|tensor| 32_768 * (tensor % 7) + 1000 * tensor + 1).collect();
    let plan = Plan::new(lengths.iter().enumerate().map(|(t, &len)| (t.to_string(), DType::F32, len as u64))).unwrap();
    let elements: Vec<f32> = (0..1_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 - 8e6).collect();
    let tensors: Vec<_> = lengths.iter().map(|&len| stream.clone_htod(&elements[..len]).unwrap()).collect();
    let tensors: Vec<&dyn Tensor> = tensors.iter().map(|slice| slice as &dyn Tensor).collect();

    let mut cpu = Probe::new(Cpu, plan.clone(), clipping()).unwrap();
    let hosts: Vec<_> = lengths.iter().map(|&len| HostTensor::F32(&elements[..len])).collect();
    let expected = cpu.measure_host(&hosts).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), plan, clipping()).unwrap();
    for step in 1..=if short() { 5 } else { 1000 } {
        probe.measure(&tensors).unwrap();
        let report = probe.wait().unwrap();
        assert_eq!(report.step(), step);
        let same = bytemuck::cast_slice::<_, u8>(report.records()) == bytemuck::cast_slice::<_, u8>(expected.records());
        let (seen, expected) = (report.outputs().total_norm, expected.outputs().total_norm);
        assert!(same && seen.to_bits() == expected.to_bits(), "step {step}: {seen:e}, should be {expected:e}");
    }
}

#[test]
fn a_tensor_of_more_than_two_to_the_31_elements() {
    const LENGTH: usize = (1 << 31) + 5;
    let Some(context) = device() else { return };
    if short() {
        return pointless("GRADPROBE_SHORT is 1");
    }
    if context.mem_get_info().unwrap().0 < 3 * LENGTH {
        return pointless("the device has less than 6.5 GB to spare");
    }
    let stream = context.new_stream().unwrap();
    let plan = Plan::new([("huge", DType::BF16, LENGTH as u64)]).unwrap();
    let config = Config::default().clip(Clip::global_norm(1000.0));
    let mut cpu = Probe::new(Cpu, plan.clone(), config.clone()).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), plan, config).unwrap();

    // Halves, and a 3 at the end. Σx² = 2^29 + 1 + 9.
    let mut host = vec![bf16::from_f32(0.5); LENGTH];
    host[LENGTH - 1] = bf16::from_f32(3.0);
    let mut huge = stream.clone_htod(&host).unwrap();
    probe.measure(&[&huge]).unwrap();
    let report = probe.wait().unwrap();
    let record = report.records()[0];
    assert_eq!((record.count, record.zero_count, record.first_nonfinite()), (LENGTH as u64, 0, None));
    assert_eq!((record.max_abs(), record.min_nonzero_abs()), (Some(3.0), Some(0.5)));
    let norm = (f64::from(1 << 29) + 10.0).sqrt();
    assert!((record.finite_l2_norm() / norm - 1.0).abs() < 5e-7, "{:e}, should be {norm:e}", record.finite_l2_norm());
    assert_same_bits(&report, &cpu.measure_host(&[HostTensor::BF16(&host)]).unwrap());

    probe.clip(&mut [&mut huge]).unwrap();
    cpu.clip_host(&mut [HostTensorMut::BF16(&mut host)]).unwrap();
    assert!(stream.clone_dtoh(&huge).unwrap() == host, "the clip");

    host[LENGTH - 1] = bf16::NAN;
    stream.memcpy_htod(&host[LENGTH - 1..], &mut huge.slice_mut(LENGTH - 1..)).unwrap();
    probe.measure(&[&huge]).unwrap();
    let report = probe.wait().unwrap();
    assert_eq!(report.records()[0].first_nonfinite(), Some(LENGTH as u64 - 1));
    assert_same_bits(&report, &cpu.measure_host(&[HostTensor::BF16(&host)]).unwrap());
}
