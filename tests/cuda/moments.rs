//! Signal and noise from Adam's moments.

use super::*;

/// Of one tensor, as Adam might have them, after enough steps that nothing is 0.
fn moments(seed: u64, len: usize) -> [Vec<f32>; 2] {
    let gradients = Tensors::of(seed).f32;
    let mean: Vec<f32> = gradients.iter().cycle().take(len).map(|g| 0.3 * g).collect();
    let square = gradients.iter().rev().cycle().zip(&mean).map(|(g, m)| m * m + 0.1 * g * g).collect();
    [mean, square]
}

fn records(report: &GsnrReport) -> Vec<(&str, &[u8])> {
    report.tensors().map(|(name, record)| (name, bytemuck::bytes_of(record))).collect()
}

#[test]
fn signal_and_noise_from_the_moments_of_adam_have_the_bits_of_the_cpu() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let (mut cpu, mut probe) = (cpu(clipping().moments()), probe(&stream, clipping().moments()));
    let step = AdamStep { step: 10, beta1: 0.9, beta2: 0.999 };
    // Twice, with others each time: nothing is left of the first. The second tensor has none.
    for seed in 1..3 {
        // One more than the tensor has, so that a view can begin at the second.
        let [first, third] = [0, 2].map(|t: usize| moments(seed, LENGTHS[t] + 1));
        let place = |moment: &Vec<f32>| stream.clone_htod(moment).unwrap();
        let on_device = [first.each_ref().map(place), third.each_ref().map(place)];
        let none = on_device[0][0].slice(..0);
        let views = [
            [on_device[0][0].slice(..LENGTHS[0]), on_device[0][1].slice(1..)],
            [on_device[1][0].slice(1..), on_device[1][1].slice(..LENGTHS[2])],
        ];
        let of = |t: usize| AdamMoments { exp_avg: &views[t][0], exp_avg_sq: &views[t][1] };
        let without: AdamMoments = match seed {
            1 => AdamMoments { exp_avg: &none, exp_avg_sq: &none },
            _ => AdamMoments { exp_avg: &Absent, exp_avg_sq: &Absent },
        };
        let seen = probe.moments().unwrap().report(&step, &[of(0), without, of(1)]).unwrap();
        let expected = [
            AdamMoments { exp_avg: &&first[0][..LENGTHS[0]], exp_avg_sq: &&first[1][1..] },
            AdamMoments { exp_avg: &Absent, exp_avg_sq: &Absent },
            AdamMoments { exp_avg: &&third[0][1..], exp_avg_sq: &&third[1][..LENGTHS[2]] },
        ];
        let expected = cpu.moments().unwrap().report(&step, &expected).unwrap();
        assert!(records(&seen) == records(&expected), "the GPU's\n{seen}\nshould be the CPU's\n{expected}");
        assert_eq!(records(&seen).len(), 2);
    }
}

#[test]
fn moments_that_cannot_be_right_are_refused() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let plan = || Plan::new([("first", DType::BF16, 32), ("second", DType::F32, 32)]).unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), plan(), Config::default().moments()).unwrap();
    let mut room = probe.moments().unwrap();
    let step = AdamStep { step: 10, beta1: 0.9, beta2: 0.999 };
    let host = moments(1, 32);
    let [m, v] = host.each_ref().map(|moment| stream.clone_htod(moment).unwrap());
    let halves = stream.clone_htod(&vec![f16::ONE; 32]).unwrap();
    let good = AdamMoments { exp_avg: &m, exp_avg_sq: &v };
    let short = m.slice(..31);
    for (second, given) in [
        (AdamMoments { exp_avg: &halves, ..good }, "exp_avg with 32 of F16 and exp_avg_sq with 32 of F32"),
        (AdamMoments { exp_avg_sq: &halves, ..good }, "exp_avg with 32 of F32 and exp_avg_sq with 32 of F16"),
        (AdamMoments { exp_avg_sq: &short, ..good }, "exp_avg with 32 of F32 and exp_avg_sq with 31 of F32"),
    ] {
        let planned = "32 elements, moments of F32".to_owned();
        let error = Error::TensorMismatch { name: "second".to_owned(), planned, given: given.to_owned() };
        assert_eq!(room.report(&step, &[good, second]).unwrap_err(), error);
    }
    for (count, first) in [(1, Some("second".to_owned())), (3, None)] {
        let error = Error::TensorCount { planned: 2, given: count, first };
        assert_eq!(room.report(&step, &vec![good; count]).unwrap_err(), error);
    }
    let early = AdamStep { step: 1, ..step };
    assert_eq!(room.report(&early, &[good; 2]).unwrap_err(), Error::TooFewSteps { steps: 1 });
    let [m_raw, v_raw] = [raw(&stream, &m), raw(&stream, &v)];
    let at_bare = AdamMoments { exp_avg: &m_raw, exp_avg_sq: &v_raw };
    // SAFETY: refused before anything is read.
    let odd = unsafe { RawTensor::new(v_raw.address() + 2, 32, DType::F32) };
    let refused = room.report(&step, &[at_bare, AdamMoments { exp_avg_sq: &odd, ..at_bare }]);
    let error = Error::MisalignedPointer { name: "second".to_owned(), address: odd.address(), size: 4 };
    assert_eq!(refused.unwrap_err(), error);
    // SAFETY: as above.
    let nowhere = unsafe { RawTensor::new(0, 32, DType::F32) };
    let refused = room.report(&step, &[at_bare, AdamMoments { exp_avg: &nowhere, ..at_bare }]);
    assert_eq!(refused.unwrap_err(), Error::NullPointer { name: "second".to_owned() });
    stream.begin_capture(THIS_THREAD).unwrap();
    let captured = room.report(&step, &[at_bare; 2]);
    stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
    assert_eq!(captured.unwrap_err(), Error::WaitInCapture);

    let expected = AdamMoments { exp_avg: &host[0], exp_avg_sq: &host[1] };
    let mut cpu = Probe::new(Cpu, plan(), Config::default().moments()).unwrap();
    let expected = cpu.moments().unwrap().report(&step, &[expected; 2]).unwrap();
    assert!(records(&room.report(&step, &[good; 2]).unwrap()) == records(&expected));
}
