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
    use common::{counting, elements, floats, gradients, model, names, tensors, variable};
    use gradprobe::{CpuProbe, CudaProbe, DType as ProbeDType, Plan};
    use gradprobe_candle::{CandleProbe, Config, Error, GsnrConfig, Rules, Underlying};

    /// The first GPU, if there is one. candle panics where there is no driver.
    fn device() -> Option<Device> {
        match CudaProbe::on_device(0, Plan::new::<&str>([]).unwrap(), Config::default()) {
            Ok(_) => Some(Device::new_cuda(0).unwrap()),
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

    #[test]
    fn the_report_and_the_clip_have_the_bits_of_the_cpu() {
        let Some(device) = device() else { return };
        let map = model(&device);
        let mut probe = CandleProbe::new(&map, Config::default().max_norm(0.5)).unwrap().with_weights().unwrap();
        probe.track(&GsnrConfig::default()).unwrap();
        probe.diagnose_by(Rules::default()).unwrap();
        let weights: Vec<Vec<f32>> = names().iter().map(|name| floats(&variable(&map, name))).collect();
        let planned = || names().into_iter().zip(&weights).map(|(name, of)| (name, ProbeDType::F32, of.len() as u64));
        let plan = Plan::new(planned()).unwrap().with_weights(weights.iter().map(|_| ProbeDType::F32)).unwrap();
        let mut other = CpuProbe::new(plan, Config::default().max_norm(0.5)).unwrap();
        other.track(&GsnrConfig::default()).unwrap();
        let scale = variable(&map, "scale");
        for step in 1..=3 {
            let mut gradients = (common::loss(&map) * f64::from(step)).unwrap().backward().unwrap();
            let data = elements(&map, &names(), &gradients);
            let before = address(&gradients, &scale);
            probe.measure_and_clip(&mut gradients).unwrap();
            assert_eq!(address(&gradients, &scale), before, "nothing is copied");
            let measured = probe.wait().unwrap().unwrap();
            let report = other.measure_with_weights(&tensors(&data), &tensors(&weights)).unwrap();
            assert_eq!(measured.report.records(), report.records());
            assert_eq!(measured.report.weights(), report.weights());
            assert_eq!(measured.report.outputs().total_norm, report.outputs().total_norm);
            assert_eq!(measured.missing, ["unused.weight"]);
            assert!(measured.diagnosis.is_some() && probe.wait().unwrap().is_none());
            let coefficient = report.outputs().coefficient;
            assert!(coefficient < 1.0);
            let clipped: Vec<Vec<f32>> = data.iter().map(|of| of.iter().map(|x| x * coefficient).collect()).collect();
            assert_eq!(elements(&map, &names(), &gradients), clipped);
        }
        assert_eq!(probe.gsnr().unwrap().to_string(), other.gsnr().unwrap().to_string());
        assert!(matches!(probe.underlying(), Underlying::Cuda(_)));
    }

    #[test]
    fn reports_come_by_polling() {
        let Some(device) = device() else { return };
        let map = model(&device);
        let mut probe = CandleProbe::new(&map, Config::default()).unwrap();
        probe.enable_histogram().unwrap();
        let gradients = gradients(&map);
        let mut steps = Vec::new();
        for _ in 0..3 {
            probe.measure(&gradients).unwrap();
            // Waits, so that the report is there.
            probe.histogram(&gradients).unwrap();
            device.synchronize().unwrap();
            while let Some(measured) = probe.poll().unwrap() {
                steps.push(measured.report.step());
            }
        }
        if let Some(measured) = probe.wait().unwrap() {
            steps.push(measured.report.step());
        }
        assert_eq!(steps, [1, 2, 3]);
    }

    #[test]
    fn shared_and_strided_memory_is_scaled_once() {
        let Some(device) = device() else { return };
        let [w, v, b] = [vec![3, 4], vec![4, 3], vec![4]].map(|shape| Var::ones(shape, DType::F32, &device).unwrap());
        let listed = [("w", w.clone()), ("v", v.clone()), ("b", b.clone())];
        let mut probe = CandleProbe::of_variables(listed, Config::default().max_norm(1.0)).unwrap();
        let mut gradients = GradStore::default();
        let shared = counting(&w);
        gradients.insert(&w, shared.clone());
        gradients.insert(&v, shared.t().unwrap());
        gradients.insert(&b, b.as_detached_tensor());
        probe.measure_and_clip(&mut gradients).unwrap();
        let coefficient = probe.wait().unwrap().unwrap().report.outputs().coefficient;
        let expected: Vec<f32> = (1..=12u8).map(|x| f32::from(x) * coefficient).collect();
        assert_eq!(floats(gradients.get(&w).unwrap()), expected);
        assert_eq!(floats(&gradients.get(&v).unwrap().t().unwrap().contiguous().unwrap()), expected);
        assert_eq!((floats(gradients.get(&b).unwrap()), floats(&b)), (vec![coefficient; 4], vec![1.0; 4]));
    }

    #[test]
    fn a_gradient_or_a_variable_on_another_device_is_refused() {
        let Some(device) = device() else { return };
        let [near, far] = [&device, &Device::Cpu].map(|device| Var::ones(3, DType::F32, device).unwrap());
        let both = [("near", near.clone()), ("far", far)];
        let refused = CandleProbe::of_variables(both, Config::default()).unwrap_err();
        assert!(matches!(&refused, Error::Device { name, .. } if name == "far"), "{refused}");
        let mut probe = CandleProbe::of_variables([("near", near.clone())], Config::default()).unwrap();
        let mut gradients = GradStore::default();
        gradients.insert(&near, Tensor::ones(3, DType::F32, &Device::Cpu).unwrap());
        let refused = probe.measure_and_clip(&mut gradients).unwrap_err();
        assert!(refused.to_string().ends_with("is [3] f32 on cuda:0, its gradient [3] f32 on cpu"), "{refused}");
    }
}
