//! What a trainer does on one GPU, feature by feature.

use crate::{
    every_call,
    run::{Run, aside, own},
};
use bytemuck::bytes_of;
use gradprobe::{
    Clip, Config, DType, Error, HostTensor, HostTensorMut, Plan, Probe, RawTensor, Report, Rules, StepOutputs, Tensor,
    TensorMut,
    clip::{AdaptiveClip, LossScale},
    cuda::{self, Cuda},
    cudarc::driver::{
        CudaContext, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError,
        sys::{CUgraphInstantiate_flags, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD},
    },
    gsnr::{AdamMoments, AdamStep, GsnrConfig},
    optim::AdamW,
    samples::SampleConfig,
};
use half::{bf16, f16};
use std::sync::Arc;

const LENGTHS: [usize; 3] = [300, 70, 65];

pub fn plan() -> Plan {
    Plan::new(DType::ALL.into_iter().zip(LENGTHS).map(|(dtype, length)| (dtype.name(), dtype, length as u64))).unwrap()
}

/// A tensor of each type, in the memory of a trainer.
pub struct Tensors {
    f32: CudaSlice<f32>,
    f16: CudaSlice<f16>,
    bf16: CudaSlice<bf16>,
}

impl Tensors {
    /// Others for each number.
    pub fn new(stream: &Arc<CudaStream>, number: usize) -> Result<Self, DriverError> {
        let value = |index: usize| ((index * 7 + number * 11) % 23) as f32 / 8.0 - 1.0;
        let values = |length: usize| (0..length).map(value);
        Ok(Self {
            f32: stream.clone_htod(&values(LENGTHS[0]).collect::<Vec<_>>())?,
            f16: stream.clone_htod(&values(LENGTHS[1]).map(f16::from_f32).collect::<Vec<_>>())?,
            bf16: stream.clone_htod(&values(LENGTHS[2]).map(bf16::from_f32).collect::<Vec<_>>())?,
        })
    }

    pub fn all(&self) -> [&dyn Tensor; 3] {
        [&self.f32, &self.f16, &self.bf16]
    }

    pub fn all_mut(&mut self) -> [&mut dyn TensorMut; 3] {
        [&mut self.f32, &mut self.f16, &mut self.bf16]
    }

    /// By their addresses, which is without cudarc's events.
    pub fn raw(&self, stream: &CudaStream) -> [RawTensor; 3] {
        let of = |address: u64, index: usize| {
            // SAFETY: a slice of that type and length, which outlives the probes that it is given to, in one stream.
            unsafe { RawTensor::new(address, LENGTHS[index] as u64, DType::ALL[index]) }
        };
        [
            of(self.f32.device_ptr(stream).0, 0),
            of(self.f16.device_ptr(stream).0, 1),
            of(self.bf16.device_ptr(stream).0, 2),
        ]
    }
}

pub fn refs(raw: &[RawTensor; 3]) -> [&dyn Tensor; 3] {
    raw.each_ref().map(|tensor| tensor as &dyn Tensor)
}

pub fn refs_mut(raw: &mut [RawTensor; 3]) -> [&mut dyn TensorMut; 3] {
    raw.each_mut().map(|tensor| tensor as &mut dyn TensorMut)
}

/// A trainer's stream, gradients of four steps, weights, and gradients of which the right bits are known.
pub struct Trainer {
    pub stream: Arc<CudaStream>,
    pub steps: [Tensors; 4],
    pub weights: Tensors,
    pub known: Tensors,
}

impl Trainer {
    pub fn new() -> Self {
        own(|| {
            let stream = cuda::stream(0).unwrap();
            let [a, b, c, d, weights, known] = [1, 2, 3, 4, 5, 6].map(|number| Tensors::new(&stream, number).unwrap());
            stream.synchronize().unwrap();
            Self { stream, steps: [a, b, c, d], weights, known }
        })
    }

    /// A probe whose making does not count: that of `all_that_is_declared` does.
    pub fn probe(&self, plan: Plan, config: Config) -> Result<Probe, Error> {
        own(|| Probe::new(Cuda::new(&self.stream)?, plan, config))
    }
}

/// What a report says that does not depend on earlier steps.
pub fn bits(report: &Report) -> Vec<u8> {
    let outputs = *report.outputs();
    let of_step = StepOutputs { step: 0, health: 0, ..outputs };
    let records = report.tensors().flat_map(|tensor| bytes_of(tensor.record).to_vec());
    bytes_of(&of_step).iter().copied().chain(records).collect()
}

/// The known gradients, measured.
pub fn known(probe: &mut Probe, trainer: &Trainer) -> Result<Vec<u8>, Error> {
    probe.measure(&trainer.known.all())?;
    Ok(bits(&probe.wait()?))
}

every_call! {
    /// A device and a probe with all its features are made, and dropped.
    all_that_is_declared = |run| {
        let trainer = Trainer::new();
        let plan = || plan().with_weights(DType::ALL);
        let config = Config::new()
            .clip(Clip::Quantile { quantile: 0.9 })
            .loss_scale(LossScale::dynamic())
            .rules(Rules::default())
            .history(3)
            .tracking(GsnrConfig::new())
            .moments()
            .histogram()
            .dot()
            .samples(SampleConfig::new(10, 2))
            .adaptive_clip(AdaptiveClip::new([100, 70, 65]))
            .optimizer(AdamW::new(1e-2))
            .micro_batches(2);
        let made = run.made("making a probe", || Probe::new(Cuda::new(&trainer.stream)?, plan()?, config.clone()));
        let Some(mut probe) = made else { return };
        run.check("measuring", || known(&mut probe, &trainer));
        run.end(probe);
    }

    /// The step of the documentation, with reports that are waited for and not.
    a_step = |run| {
        let mut trainer = Trainer::new();
        let config = Config::new().clip(Clip::global_norm(1.0)).history(3).rules(Rules::default());
        let mut probe = trainer.probe(plan(), config).unwrap();
        let [first, second, third, fourth] = &mut trainer.steps;
        run.call("measure", || probe.measure(&first.all()));
        run.call("clip", || probe.clip(&mut first.all_mut()));
        run.call("poll", || probe.poll());
        run.call("step", || probe.step(&mut second.all_mut()));
        run.call("poll", || probe.poll());
        run.call("step", || probe.step(&mut third.all_mut()));
        run.call("wait", || probe.wait());
        run.call("tag", || probe.history()?.tag(7));
        run.call("step", || probe.step(&mut fourth.all_mut()));
        run.call("history", || probe.history()?.report());
        let state = run.call("state", || probe.state());
        if let Some(state) = state {
            run.call("restore", || probe.restore(&state));
        }
        run.call("measure", || probe.measure(&trainer.known.all()));
        run.call("poll", || probe.poll());
        run.check("measuring again", || known(&mut probe, &trainer));
        run.end(probe);
    }

    /// Captured, and replayed on tensors that move.
    a_graph = |run| {
        let trainer = Trainer::new();
        let (raw, known_raw) = own(|| (trainer.steps.each_ref().map(|step| step.raw(&trainer.stream)), trainer.known.raw(&trainer.stream)));
        let config = Config::new().clip(Clip::global_norm(1.0)).tracking(GsnrConfig::new());
        let mut probe = trainer.probe(plan(), config).unwrap();
        let captured: Option<CudaGraph> = {
            // SAFETY: memory and probe live as long as the graph, and are used on this stream only.
            let bound = run.made("bind", || unsafe { probe.bind(&refs(&raw[0]), &[]) });
            if bound.is_some() && own(|| trainer.stream.begin_capture(THIS_THREAD)).is_ok() {
                let measured = run.made("measure", || probe.measure(&refs(&raw[0])));
                let clipped = run.made("clip", || probe.clip(&mut refs_mut(&mut { raw[0] })));
                let graph = own(|| trainer.stream.end_capture(CUgraphInstantiate_flags(0)));
                measured.and(clipped).and(graph.ok().flatten())
            } else {
                None
            }
        };
        if let Some(graph) = captured {
            for step in 0..3 {
                if step == 1 {
                    // SAFETY: as above.
                    run.call("bind", || unsafe { probe.bind(&refs(&raw[1]), &[]) });
                }
                let _ = own(|| graph.launch());
                run.call("poll", || probe.poll());
            }
            run.call("wait", || probe.wait());
            own(|| drop(graph));
        }
        run.check("measuring again", || {
            probe.measure(&refs(&known_raw))?;
            Ok(bits(&probe.wait()?))
        });
        run.end(probe);
    }

    /// Weights beside gradients, and each unit clipped on its own.
    with_weights = |run| {
        let mut trainer = Trainer::new();
        let plan = || plan().with_weights(DType::ALL);
        let units = || AdaptiveClip::new([100, 70, 65]);
        let config = Config::new().adaptive_clip(units());
        let mut probe = trainer.probe(plan().unwrap(), config).unwrap();
        let Trainer { steps, weights, known, stream } = &mut trainer;
        let _ = stream;
        for step in steps {
            run.call("measure", || probe.measure_with_weights(&step.all(), &weights.all()));
            run.call("clip", || probe.adaptive_clip()?.clip(&mut step.all_mut(), &weights.all()));
            run.call("report", || probe.adaptive_clip()?.report().map(drop));
        }
        run.check("measuring again", || {
            probe.measure_with_weights(&known.all(), &weights.all())?;
            Ok(bits(&probe.wait()?))
        });
        run.end(probe);
    }

    /// What is measured beside steps.
    beside_steps = |run| {
        let trainer = Trainer::new();
        let config = Config::new().histogram().dot().samples(SampleConfig::new(10, 2)).micro_batches(2);
        let mut probe = trainer.probe(plan(), config).unwrap();
        let tensors = trainer.steps[0].all();
        run.call("histogram", || probe.histogram()?.measure(&tensors).map(drop));
        run.call("dot", || probe.dot()?.measure(&tensors, &trainer.weights.all()).map(drop));
        for step in &trainer.steps[..2] {
            run.call("micro-batch", || probe.micro_batches()?.measure(&step.all()));
        }
        for step in &trainer.steps[2..] {
            run.call("step", || probe.measure(&step.all()));
            run.call("samples", || probe.samples()?.take(&step.all()));
        }
        run.call("micro-batches", || probe.micro_batches()?.report().map(drop));
        run.call("samples", || probe.samples()?.report().map(drop));
        run.check("histogram", || {
            let report = probe.histogram()?.measure(&trainer.known.all())?;
            Ok(bytemuck::cast_slice(report.histograms()).to_vec())
        });
        run.check("dot", || {
            let report = probe.dot()?.measure(&trainer.known.all(), &trainer.weights.all())?;
            Ok(bytemuck::cast_slice(report.records()).to_vec())
        });
        run.check("micro-batches", || {
            probe.measure(&trainer.known.all())?;
            for step in &trainer.steps[..2] {
                probe.micro_batches()?.measure(&step.all())?;
            }
            let report = probe.micro_batches()?.report()?;
            Ok([0, 1].map(|place| bytemuck::cast_slice::<_, u8>(report.records(place)).to_vec()).concat())
        });
        run.check("measuring again", || known(&mut probe, &trainer));
        run.end(probe);
    }

    /// Signal and noise of elements over steps.
    tracking = |run| {
        let trainer = Trainer::new();
        let config = Config::new().tracking(GsnrConfig::new().window(4));
        let mut probe = trainer.probe(plan(), config).unwrap();
        for step in &trainer.steps {
            run.call("measure", || probe.measure(&step.all()));
            run.call("launch", || probe.gsnr()?.launch());
        }
        run.call("report", || probe.gsnr()?.report().map(drop));
        run.check("tracking again", || {
            probe.gsnr()?.reset()?;
            for step in &trainer.steps[..2] {
                probe.measure(&step.all())?;
            }
            let report = probe.gsnr()?.report()?;
            Ok(report.tensors().flat_map(|(_, record)| bytes_of(record).to_vec()).collect())
        });
        run.end(probe);
    }

    /// The same of Adam's moments.
    moments = |run| {
        let trainer = Trainer::new();
        let mut probe = trainer.probe(plan(), Config::new().moments()).unwrap();
        let slices = own(|| LENGTHS.map(|length| trainer.stream.clone_htod(&vec![0.25f32; length])));
        let [Ok(first), Ok(second), Ok(third)] = &slices else { return };
        let moments = [first, second, third].map(|slice| AdamMoments { exp_avg: slice, exp_avg_sq: slice });
        let step = AdamStep { step: 10, beta1: 0.9, beta2: 0.999 };
        run.check("report", || {
            let report = probe.moments()?.report(&step, &moments)?;
            Ok(report.tensors().flat_map(|(_, record)| bytes_of(record).to_vec()).collect())
        });
        run.end(probe);
    }

    /// A loss scale that the device adapts, and a clip that remembers.
    loss_scale = |run| {
        let mut trainer = Trainer::new();
        let config = Config::new().clip(Clip::Quantile { quantile: 0.9 }).loss_scale(LossScale::dynamic().initial(8.0));
        let mut probe = trainer.probe(plan(), config).unwrap();
        let Trainer { steps, known, .. } = &mut trainer;
        let Some(mut fresh) = run.made("state", || probe.state()) else { return run.end(probe) };
        for (number, step) in steps.iter_mut().enumerate() {
            if number == 2 {
                run.call("set", || probe.set_loss_scale(4.0));
            }
            run.call("step", || probe.step(&mut step.all_mut()));
        }
        run.call("state", || probe.state());
        (fresh.measured, fresh.loss_scale) = (5, Some((2.0, 0)));
        run.check("going on from a state", || {
            probe.restore(&fresh)?;
            probe.measure(&known.all())?;
            Ok(bits(&probe.wait()?))
        });
        run.end(probe);
    }

    /// The step of an optimizer.
    an_optimizer = |run| {
        let mut trainer = Trainer::new();
        let config = Config::new().clip(Clip::global_norm(1.0)).optimizer(AdamW::new(1e-2));
        let mut probe = trainer.probe(plan(), config).unwrap();
        let fresh = run.made("state", || probe.optimizer()?.state());
        for step in &trainer.steps {
            run.call("update", || probe.update(&step.all(), &mut trainer.weights.all_mut()));
            run.call("rate", || probe.optimizer()?.set_learning_rate(5e-3));
        }
        run.call("wait", || probe.wait());
        run.check("updating again", || {
            let mut weights = aside(|| Tensors::new(&trainer.stream, 9)).map_err(|error| lost(&error))?;
            let mut optimizer = probe.optimizer()?;
            if let Some(fresh) = &fresh {
                optimizer.restore(fresh)?;
            }
            optimizer.set_learning_rate(1e-2)?;
            probe.update(&trainer.known.all(), &mut weights.all_mut())?;
            probe.wait()?;
            aside(|| trainer.stream.clone_dtoh(&weights.f32)).map(|values| bytemuck::cast_slice(&values).to_vec()).map_err(|error| lost(&error))
        });
        run.end(probe);
    }

    /// Tensors of the host's, copied there and back.
    of_the_host = |run| {
        let trainer = Trainer::new();
        let config = Config::new().clip(Clip::global_norm(1.0));
        let values = |number: usize| (0..200).map(|index| ((index * number) % 17) as f32 - 8.0).collect::<Vec<_>>();
        let one = || Plan::new([("w", DType::F32, 200)]);
        let mut probe = trainer.probe(one().unwrap(), config).unwrap();
        for step in 1..4 {
            let mut gradients = values(step);
            // Without a measurement there is nothing to clip by.
            if run.call("measure", || probe.measure(&[&HostTensor::F32(&gradients)])).is_some() {
                run.call("clip", || probe.clip(&mut [&mut HostTensorMut::F32(&mut gradients)]));
            }
        }
        run.check("clipping again", || {
            let mut gradients = values(7);
            probe.step(&mut [&mut HostTensorMut::F32(&mut gradients)])?;
            Ok(bytemuck::cast_slice(&gradients).to_vec())
        });
        run.end(probe);
    }

    /// On the default stream of a device that has no pools of memory.
    without_pools = |run| {
        let driver = crate::driver::driver().expect("it runs on it");
        driver.pools(false);
        let context = own(|| CudaContext::new(0).unwrap());
        driver.pools(true);
        let stream = context.default_stream();
        let (mut step, again) = own(|| (Tensors::new(&stream, 1).unwrap(), Tensors::new(&stream, 2).unwrap()));
        let made = run.made("making a probe", || Probe::new(aside(|| Cuda::new(&stream))?, plan(), Config::new().clip(Clip::global_norm(1.0))));
        let Some(mut probe) = made else { return };
        run.call("step", || probe.step(&mut step.all_mut()));
        run.check("measuring again", || {
            probe.measure(&again.all())?;
            Ok(bits(&probe.wait()?))
        });
        run.end(probe);
    }
}

/// An error of the trainer's own calls.
fn lost(error: &DriverError) -> Error {
    Error::Driver { call: "a call of the trainer's", doing: "training".to_owned(), code: format!("{:?}", error.0) }
}
