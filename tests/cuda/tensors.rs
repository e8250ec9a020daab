//! Slices, views and bare addresses, and what is refused; where the results lie.

use super::*;

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
        let report = cpu.measure(&hosts.each_ref().map(HostTensorMut::as_ref)).unwrap();
        cpu.clip(&mut hosts).unwrap();

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
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
    let mut place = OnDevice::new(&stream, &Tensors::of(1));
    let good = place.raw();

    let clip = probe.clip(&mut [&mut place.f32, &mut place.f16, &mut place.bf16]);
    assert_eq!(clip, Err(Error::NotMeasured));
    let few = probe.measure(&place.slices()[..2]);
    assert_eq!(few, Err(Error::TensorCount { planned: 3, given: 2 }));
    let mismatch = probe.measure(&[&place.f32, &place.f16.slice(1..), &place.bf16]);
    assert!(matches!(&mismatch, Err(Error::TensorMismatch { name, .. }) if name == "F16"), "{mismatch:?}");

    let mut measure = |index: usize, address: u64| {
        let mut tensors = good;
        tensors[index].address = address;
        // SAFETY: an address that is not good must be refused, and nothing launched.
        unsafe { probe.raw().measure_raw(&tensors) }
    };
    let name = |dtype: DType| dtype.name().to_owned();
    assert_eq!(measure(1, 0), Err(Error::NullPointer { name: name(DType::F16) }));
    for (index, dtype, address) in
        [(0, DType::F32, good[0].address + 2), (1, DType::F16, good[1].address + 1), (2, DType::BF16, 0xfff1)]
    {
        let expected = Error::MisalignedPointer { name: name(dtype), address, size: dtype.size() };
        assert_eq!(measure(index, address), Err(expected));
    }
    let address = u64::MAX - 3;
    let expected = Error::AddressOverflow { name: name(DType::F32), address, length: good[0].len };
    assert_eq!(measure(0, address), Err(expected));

    // To measure memory twice is fine; to scale it twice is not.
    let inside = good[0].address + 4;
    assert_eq!(measure(1, inside), Ok(()));
    let mut tensors = good;
    tensors[1].address = inside;
    // SAFETY: all of it is memory of this test.
    let clip = unsafe { probe.raw().clip_raw(&tensors) };
    assert_eq!(clip, Err(Error::Overlap { first: name(DType::F32), second: name(DType::F16) }));

    // None of this has counted as a step but the one measurement, and nothing was written.
    assert_eq!(probe.wait().unwrap().step(), 1);
    assert!(place.get() == Tensors::of(1));
}

#[test]
fn tensors_of_another_context_are_refused() {
    type Create = unsafe extern "C" fn(*mut CUcontext, c_uint, CUdevice) -> CUresult;
    let Some(context) = device() else { return };
    let stream = context.new_stream().unwrap();
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
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
    assert_eq!(refused, Err(Error::WrongContext { name: "F16".to_owned() }));
    let refused = probe.bind(&[&there.f32, &place.f16, &place.bf16]);
    assert_eq!(refused, Err(Error::WrongContext { name: "F32".to_owned() }));
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
    let mut probe = Probe::new(Cuda::new(&stream).unwrap(), Tensors::plan(), clipping()).unwrap();
    for seed in 1..=2 {
        let mut tensors = Tensors::of(seed);
        if seed == 2 {
            tensors.f16[7] = f16::NEG_INFINITY;
        }
        let place = OnDevice::new(&stream, &tensors);
        probe.measure(&place.slices()).unwrap();
        let report = probe.wait().unwrap();
        stream.synchronize().unwrap();
        let outputs: Vec<StepOutputs> = read(probe.raw().outputs_address(), 1);
        let records: Vec<Record> = read(probe.raw().records_address(), 3);
        assert_eq!(bytemuck::bytes_of(&outputs[0]), bytemuck::bytes_of(report.outputs()));
        assert_eq!(bytemuck::cast_slice::<_, u8>(&records), bytemuck::cast_slice::<_, u8>(report.records()));
        assert_eq!((outputs[0].skip, outputs[0].step), (i32::from(seed == 2), seed));
    }
}
