//! Slices, views and bare addresses, and what is refused; where the results lie.

use super::{streams::Gate, *};

#[test]
fn slices_and_views_are_measured_and_clipped_wherever_they_begin() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let whole = Tensors::of(1);
    for [a, b, c] in [[0, 1, 3], [1, 0, 1], [3, 2, 0], [4, 8, 8]] {
        let lengths = [LENGTHS[0] - a, LENGTHS[1] - b, LENGTHS[2] - c];
        let plan = Plan::new(DType::ALL.into_iter().zip(lengths).map(|(dtype, len)| (dtype.name(), dtype, len as u64)));
        let plan = plan.unwrap();
        let mut cpu = Probe::new(Cpu, plan.clone(), clipping()).unwrap();
        let mut expected = whole.clone();
        let mut hosts = [
            HostTensorMut::F32(&mut expected.f32[a..]),
            HostTensorMut::F16(&mut expected.f16[b..]),
            HostTensorMut::BF16(&mut expected.bf16[c..]),
        ];
        let report = cpu.measure_host(&hosts.each_ref().map(HostTensorMut::as_ref)).unwrap();
        cpu.clip_host(&mut hosts).unwrap();

        let mut probe = Probe::new(Cuda::new(&stream).unwrap(), plan, clipping()).unwrap();
        let mut place = OnDevice::new(&stream, &whole);
        probe.measure(&[&place.f32.slice(a..), &place.f16.slice(b..), &place.bf16.slice_mut(c..)]).unwrap();
        assert_same_bits(&probe.wait().unwrap(), &report);
        let OnDevice { f32, f16, bf16, .. } = &mut place;
        probe.clip(&mut [&mut f32.slice_mut(a..), &mut f16.slice_mut(b..), &mut bf16.slice_mut(c..)]).unwrap();
        assert!(place.get() == expected, "clipped from {a}, {b} and {c} on, and nothing before");
    }
}

#[test]
fn what_cannot_be_right_is_an_error_that_names_the_tensor() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = probe(&stream, clipping());
    let mut place = OnDevice::new(&stream, &Tensors::of(1));
    let good = place.raw();

    let clip = probe.clip(&mut place.slices_mut());
    assert_eq!(clip, Err(Error::NotMeasured));
    let few = probe.measure(&place.slices()[..2]);
    assert_eq!(few, Err(Error::TensorCount { planned: 3, given: 2, first: Some("BF16".to_owned()) }));
    let mismatch = probe.measure(&[&place.f32, &place.f16.slice(1..), &place.bf16]);
    assert!(matches!(&mismatch, Err(Error::TensorMismatch { name, .. }) if name == "F16"), "{mismatch:?}");

    let mut measure = |index: usize, address: u64| {
        let mut tensors = good;
        // SAFETY: an address that is not good must be refused, and nothing launched.
        tensors[index] = unsafe { RawTensor::new(address, LENGTHS[index] as u64, DType::ALL[index]) };
        probe.measure(&refs(&tensors))
    };
    let name = |dtype: DType| dtype.name().to_owned();
    assert_eq!(measure(1, 0), Err(Error::NullPointer { name: name(DType::F16) }));
    for (index, dtype, address) in
        [(0, DType::F32, good[0].address() + 2), (1, DType::F16, good[1].address() + 1), (2, DType::BF16, 0xfff1)]
    {
        let expected = Error::MisalignedPointer { name: name(dtype), address, size: dtype.size() };
        assert_eq!(measure(index, address), Err(expected));
    }
    let address = u64::MAX - 3;
    let expected = Error::AddressOverflow { name: name(DType::F32), address, length: LENGTHS[0] as u64 };
    assert_eq!(measure(0, address), Err(expected));

    // To measure memory twice is fine; to scale it twice is not.
    let inside = good[0].address() + 4;
    assert_eq!(measure(1, inside), Ok(()));
    let mut tensors = good;
    // SAFETY: all of it is memory of this test.
    tensors[1] = unsafe { RawTensor::new(inside, LENGTHS[1] as u64, DType::F16) };
    let clip = clip_at(&mut probe, &tensors);
    assert_eq!(clip, Err(Error::Overlap { first: name(DType::F32), second: name(DType::F16) }));

    // None of this has counted as a step but the one measurement, and nothing was written.
    assert_eq!(probe.wait().unwrap().step(), 1);
    assert!(place.get() == Tensors::of(1));
}

#[track_caller]
fn assert_wrong_device(refused: Result<(), Error>, tensor: &str) {
    assert!(matches!(&refused, Err(Error::WrongDevice { name, .. }) if name == tensor), "{refused:?}");
}

/// cudarc holds them for one, and neither waits for what the other's streams do.
#[test]
fn tensors_of_the_same_context_made_apart_are_refused() {
    let Some(context) = device() else { return };
    let other = CudaContext::new(0).unwrap();
    assert!(*other == *context && !Arc::ptr_eq(&other, &context));
    let stream = context.new_stream().unwrap();
    let mut probe = probe(&stream, clipping());
    let mut place = OnDevice::new(&stream, &Tensors::of(1));
    let mut there = OnDevice::new(&other.new_stream().unwrap(), &Tensors::of(1));
    assert_wrong_device(probe.measure(&there.slices()), "F32");
    assert_wrong_device(probe.measure(&[&place.f32, &there.f16.slice(..), &place.bf16]), "F16");
    // SAFETY: there are no graphs.
    let bound = unsafe { probe.bind(&[&place.f32, &place.f16, &there.bf16.slice_mut(..)], &[]) };
    assert_wrong_device(bound, "BF16");
    probe.measure(&place.slices()).unwrap();
    assert_wrong_device(probe.clip(&mut there.slices_mut()), "F32");
    assert_wrong_device(probe.step(&mut [&mut place.f32, &mut place.f16, &mut there.bf16.slice_mut(..)]), "BF16");
    assert_eq!(probe.wait().unwrap().step(), 1, "nothing but the one measurement has run");
    assert!(place.get() == Tensors::of(1) && there.get() == Tensors::of(1));
    // On the CPU none is right.
    assert_wrong_device(cpu(clipping()).measure(&place.slices()), "F32");
    // Of one context, any stream's are.
    let beside = OnDevice::new(&context.new_stream().unwrap(), &Tensors::of(2));
    assert_eq!(probe.measure(&beside.slices()), Ok(()));
}

/// The driver copies from it when the stream comes to it, at which time it may hold something else.
#[test]
fn page_locked_memory_of_the_host_is_copied_before_a_call_returns() {
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut reference = Reference::new(clipping());
    let mut probe = probe(&stream, clipping());
    let tensors = Tensors::of(1);
    // The last of the tensors, after which nothing else waits.
    // SAFETY: written to before it is read.
    let mut locked = unsafe { context.alloc_pinned::<bf16>(LENGTHS[2]) }.unwrap();
    let elements = locked.as_mut_slice().unwrap();
    elements.copy_from_slice(&tensors.bf16);
    let gate = Gate::shut(&stream);
    let opened = gate.open_later();
    probe.measure(&[&tensors.f32, &tensors.f16, &&*elements]).unwrap();
    elements.fill(bf16::NAN);
    assert!(opened.join().unwrap(), "the gate was shut for too long");
    let (report, clipped) = reference.step(tensors.clone());
    assert_same_bits(&probe.wait().unwrap(), &report);

    // And what a clip has changed is there when it returns.
    elements.copy_from_slice(&tensors.bf16);
    let mut after = tensors.clone();
    probe.clip(&mut [&mut after.f32, &mut after.f16, &mut &mut *elements]).unwrap();
    after.bf16.copy_from_slice(elements);
    assert!(after == clipped);
}

#[test]
fn tensors_of_another_context_are_refused() {
    type Create = unsafe extern "C" fn(*mut CUcontext, c_uint, CUdevice) -> CUresult;
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = probe(&stream, clipping());
    let place = OnDevice::new(&stream, &Tensors::of(1));

    // SAFETY: the driver is there.
    let driver = unsafe { sys::culib() };
    // Looked up by its name: cudarc has the call in some versions of CUDA only.
    // SAFETY: the driver has had this function under this name since CUDA 3.2.
    let Ok(create) = (unsafe { driver.get::<Create>(b"cuCtxCreate_v2\0") }) else {
        return pointless("the driver makes no second context");
    };
    let mut handle = ptr::null_mut();
    // SAFETY: the device is alive.
    if unsafe { create(&raw mut handle, 0, context.cu_device()) }.result().is_err() {
        return pointless("the driver makes no second context");
    }
    // SAFETY: it was just made, for this device, and nothing else destroys it.
    let other = unsafe { CudaContext::from_raw_context(0, context.cu_device(), handle) }.unwrap();
    let there = OnDevice::new(&other.new_stream().unwrap(), &Tensors::of(1));
    let refused = probe.measure(&[&place.f32, &there.f16, &place.bf16]);
    assert_wrong_device(refused, "F16");
    // SAFETY: there are no graphs.
    let refused = unsafe { probe.bind(&[&there.f32, &place.f16, &place.bf16], &[]) };
    assert_wrong_device(refused, "F32");
    assert_eq!(probe.measure(&place.slices()), Ok(()));
}

#[test]
fn outputs_and_records_lie_on_the_device_where_they_are_said_to() {
    fn read<T: bytemuck::Pod>(address: u64, count: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); count];
        // SAFETY: the probe has that many values there, and the stream was waited for.
        unsafe { result::memcpy_dtoh_sync(bytemuck::cast_slice_mut::<T, u8>(&mut values), address) }.unwrap();
        values
    }
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = probe(&stream, clipping());
    for seed in 1..=2 {
        let mut tensors = Tensors::of(seed);
        if seed == 2 {
            tensors.f16[7] = f16::NEG_INFINITY;
        }
        let place = OnDevice::new(&stream, &tensors);
        probe.measure(&place.slices()).unwrap();
        let report = probe.wait().unwrap();
        stream.synchronize().unwrap();
        let outputs: Vec<StepOutputs> = read(probe.addresses().outputs, 1);
        let records: Vec<Record> = read(probe.addresses().records, 3);
        assert_eq!(bytemuck::bytes_of(&outputs[0]), bytemuck::bytes_of(report.outputs()));
        assert_eq!(bytemuck::cast_slice::<_, u8>(&records), bytemuck::cast_slice::<_, u8>(report.records()));
        assert_eq!((outputs[0].skip, outputs[0].step), (i32::from(seed == 2), seed));
    }
}
