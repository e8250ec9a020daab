//! The adapter on candle's CUDA device: the bits of the CPU, where the gradients are. Skipped where there is no GPU, or
//! where it was built without the feature `cuda`.

#[cfg(feature = "cuda")]
mod common;
#[path = "../../../tests/require/mod.rs"]
mod require;

#[cfg(not(feature = "cuda"))]
#[test]
fn on_a_gpu() {
    require::pointless("the feature `cuda` is off");
}

#[cfg(feature = "cuda")]
mod on_a_gpu {
    use super::{common, require};
    use candle_core::{DType, Device, Storage, Tensor, Var, backprop::GradStore};
    use candle_nn::{Optimizer, SGD, VarMap};
    use common::{bytes, counting, elements, floats, gradients, missing, model, names, put, variable};
    use gradprobe::cuda;
    use gradprobe_candle::{CandleProbe, Clip, Config, Error, GsnrConfig, Rules};

    /// The first GPU with a stream of its own, if there is one. candle panics where there is no driver.
    fn device() -> Option<Device> {
        match cuda::stream(0) {
            Ok(_) => Some(Device::new_cuda_with_stream(0).unwrap()),
            Err(error @ (gradprobe::Error::DriverNotFound { .. } | gradprobe::Error::DeviceNotFound { .. })) => {
                require::skipped(require::GPU, &error.to_string());
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Where in the device's memory a gradient of f32 is.
    fn address(gradients: &GradStore, variable: &Var) -> u64 {
        use candle_core::cuda_backend::cudarc::driver::DevicePtr;
        let (storage, _) = gradients.get(variable).unwrap().storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { panic!("not on the GPU") };
        let slice = storage.as_cuda_slice::<f32>().unwrap();
        slice.device_ptr(&storage.device.cuda_stream()).0
    }

    /// The model on the CPU, its variables on the GPU under the same names, and gradients there of those here.
    fn moved(device: &Device) -> (VarMap, VarMap, impl Fn(&GradStore) -> GradStore) {
        let (near, far) = (model(&Device::Cpu), VarMap::new());
        let all: Vec<(String, Var)> = near.data().lock().unwrap().clone().into_iter().collect();
        for (name, variable) in &all {
            put(&far, name, Var::from_tensor(&variable.to_device(device).unwrap()).unwrap());
        }
        let (device, of) = (device.clone(), far.clone());
        let moving = move |gradients: &GradStore| {
            let mut moved = GradStore::default();
            for (name, here) in &all {
                if let Some(gradient) = gradients.get(here) {
                    moved.insert(&variable(&of, name), gradient.to_device(&device).unwrap());
                }
            }
            moved
        };
        (near, far, moving)
    }

    #[test]
    fn the_report_and_the_clip_have_the_bits_of_the_cpu() {
        let Some(device) = device() else { return };
        let (near, map, moving) = moved(&device);
        let config = Config::default().clip(Clip::global_norm(0.5));
        let config = config.tracking(GsnrConfig::default()).rules(Rules::default());
        let mut probes =
            [&map, &near].map(|map| CandleProbe::new(map, config.clone()).unwrap().with_weights().unwrap());
        let [probe, other] = &mut probes;
        let scale = variable(&map, "scale");
        for step in 1..=3 {
            let mut expected = (common::loss(&near) * f64::from(step)).unwrap().backward().unwrap();
            let mut gradients = moving(&expected);
            let before = address(&gradients, &scale);
            probe.step(&mut gradients).unwrap();
            assert_eq!(address(&gradients, &scale), before, "nothing is copied");
            let measured = probe.wait().unwrap();
            other.step(&mut expected).unwrap();
            let at_home = other.wait().unwrap();
            assert_eq!(bytes(&measured), bytes(&at_home));
            assert_eq!(measured.weights(), at_home.weights());
            assert_eq!(measured.to_string(), at_home.to_string());
            assert_eq!(missing(&measured), ["unused.weight"]);
            assert!(probe.poll().unwrap().is_none() && measured.outputs().coefficient < 1.0);
            assert_eq!(elements(&map, &names(), &gradients), elements(&near, &names(), &expected));
        }
        let gsnr = |probe: &mut CandleProbe| probe.probe().gsnr().unwrap().report().unwrap().to_string();
        assert_eq!(gsnr(probe), gsnr(other));
        assert_eq!((probe.probe().device(), other.probe().device()), ("cuda", "cpu"));
    }

    #[test]
    fn reports_come_by_polling_and_go_on_when_what_is_missing_changes() {
        let Some(device) = device() else { return };
        let (near, map, moving) = moved(&device);
        let mut probe = CandleProbe::new(&map, Config::default().histogram()).unwrap();
        let addresses = probe.probe().addresses();
        let mut gradients = moving(&gradients(&near));
        let mut steps = Vec::new();
        for step in 0..3 {
            if step == 2 {
                gradients.remove(&variable(&map, "scale")).unwrap();
            }
            probe.measure(&gradients).unwrap();
            // Waits, so that the report is there.
            probe.lend(&gradients, |probe, tensors| probe.histogram()?.measure(tensors)).unwrap();
            device.synchronize().unwrap();
            while let Some(measured) = probe.poll().unwrap() {
                steps.push((missing(&measured).len(), measured.step()));
            }
        }
        // The copy that the last call began may still be on its way.
        let last = probe.wait().unwrap();
        let last = (missing(&last).len(), last.step());
        if steps.last() != Some(&last) {
            steps.push(last);
        }
        assert_eq!(steps, [(1, 1), (1, 2), (2, 3)]);
        assert_eq!(probe.probe().addresses(), addresses, "it is the same memory");
    }

    /// Of two variables and a gradient of a third kind of memory each: that of another gradient, and that of its variable.
    #[test]
    fn shared_memory_is_scaled_once() {
        let Some(device) = device() else { return };
        let ones = |length: usize| Tensor::ones(length, DType::F32, &Device::Cpu).unwrap().to_device(&device).unwrap();
        let [w, v, b] = [12, 12, 4].map(|length| Var::from_tensor(&ones(length)).unwrap());
        let listed = [("w", w.clone()), ("v", v.clone()), ("b", b.clone())];
        let mut probe = CandleProbe::of_variables(listed, Config::default().clip(Clip::global_norm(1.0))).unwrap();
        let mut gradients = GradStore::default();
        let shared = counting(&w);
        gradients.insert(&w, shared.clone());
        gradients.insert(&v, shared);
        gradients.insert(&b, b.as_detached_tensor());
        probe.step(&mut gradients).unwrap();
        let coefficient = probe.wait().unwrap().outputs().coefficient;
        let expected: Vec<f32> = (1..=12u8).map(|x| f32::from(x) * coefficient).collect();
        assert_eq!(floats(gradients.get(&w).unwrap()), expected);
        assert_eq!(floats(gradients.get(&v).unwrap()), expected);
        assert_eq!((floats(gradients.get(&b).unwrap()), floats(&b)), (vec![coefficient; 4], vec![1.0; 4]));
    }

    /// Needs candle's kernels and the default stream, which the driver in `crates/driver` has not.
    #[test]
    fn with_kernels_a_strided_gradient_is_clipped_and_a_step_can_follow() {
        if device().is_none() {
            return;
        }
        let device = Device::new_cuda(0).unwrap();
        let map = model(&device);
        let mut probe = CandleProbe::new(&map, Config::default().clip(Clip::global_norm(1.0))).unwrap();
        let mut gradients = gradients(&map);
        let weight = variable(&map, "layers.0.weight");
        let transposed = gradients.get(&weight).unwrap().t().unwrap();
        let before = floats(&transposed.contiguous().unwrap());
        gradients.insert(&weight, transposed);
        probe.step(&mut gradients).unwrap();
        let coefficient = probe.wait().unwrap().outputs().coefficient;
        assert!(coefficient < 1.0);
        let expected: Vec<f32> = before.iter().map(|x| x * coefficient).collect();
        assert_eq!(floats(gradients.get(&weight).unwrap()), expected);
        let mut optimizer = SGD::new(map.all_vars(), 1e-3).unwrap();
        let scale = floats(&variable(&map, "scale"));
        optimizer.step(&gradients).unwrap();
        assert_ne!(floats(&variable(&map, "scale")), scale);
    }

    #[test]
    fn a_gradient_or_a_variable_on_another_device_is_refused() {
        let Some(device) = device() else { return };
        let far = Var::ones(3, DType::F32, &Device::Cpu).unwrap();
        let near = Var::from_tensor(&far.to_device(&device).unwrap()).unwrap();
        let both = [("near", near.clone()), ("far", far)];
        let refused = CandleProbe::of_variables(both, Config::default()).unwrap_err();
        assert!(matches!(&refused, Error::Device { name, .. } if name == "far"), "{refused}");
        let mut probe = CandleProbe::of_variables([("near", near.clone())], Config::default()).unwrap();
        let mut gradients = GradStore::default();
        gradients.insert(&near, Tensor::ones(3, DType::F32, &Device::Cpu).unwrap());
        let refused = probe.step(&mut gradients).unwrap_err();
        assert!(refused.to_string().ends_with("is [3] f32 on cuda:0, its gradient [3] f32 on cpu"), "{refused}");
    }
}
