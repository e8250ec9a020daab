//! Any calls of a probe, in any order. Beside it goes another, which hears of nothing that was an error to the first: both know
//! the same at the end, so that an error has changed nothing.

use crate::{
    Many, Number, Rare,
    config::{AnyConfig, AnyPlan, AnyRules, DTYPES},
    for_any,
};
use arbitrary::Arbitrary;
use gradprobe::{
    Cpu, DType, Error, Probe, ProbeState, RawTensor, Tensor, TensorMut,
    gsnr::{AdamMoments, AdamStep},
    optim::OptimizerState,
};

/// A list of tensors as a call is given it: the plan's, but for this.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct AnyList {
    absent: u8,
    wrong: Rare<(u8, Wrong)>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Wrong {
    /// One tensor less.
    Missing,
    /// The same again.
    OneMore,
    Type(u8),
    Shorter,
    Null,
    Misaligned,
    /// Past the end of the address space.
    Beyond,
    /// The memory of another tensor, where that is as large.
    Alias(u8),
}

#[derive(Arbitrary, Clone, Debug)]
pub enum Call {
    Measure(AnyList),
    MeasureWithWeights(AnyList, AnyList),
    Clip(AnyList),
    Step(AnyList),
    Update(AnyList, AnyList),
    Poll,
    Wait,
    OptimizerStep(AnyList, AnyList),
    LearningRate(Number),
    AdaptiveClip(AnyList, AnyList),
    AdaptiveReport,
    Histogram(AnyList),
    Dot(AnyList, AnyList),
    Moments {
        list: AnyList,
        step: u8,
        beta1: Number,
        beta2: Number,
    },
    Samples(AnyList),
    SampleReport,
    Tag(u64),
    History,
    Gsnr,
    GsnrReset,
    MicroBatch(AnyList),
    MicroBatchReport,
    LossScale(Number),
    Rules(Box<AnyRules>),
    Restore {
        change: u8,
        word: u64,
    },
    RestoreOptimizer {
        change: u8,
        steps: u32,
        value: f32,
    },
    /// Of the next gradients.
    Fill {
        tensor: u8,
        bits: u32,
        stride: u8,
    },
}

/// What tensors lie in, aligned for all types.
#[derive(Clone, PartialEq)]
pub struct Memory {
    gradients: Vec<Vec<u32>>,
    weights: Vec<Vec<u32>>,
}

impl Memory {
    pub fn new(plan: &AnyPlan) -> Self {
        let words = |seed: u32| {
            // Of f32 0.01 to 0.04; of two f16 or bf16 much the same.
            let word = move |place: u32| 0x3c24_3c24 + (place.wrapping_mul(2_654_435_761) ^ seed) % 0x80_0000;
            plan.tensors().iter().map(move |tensor| (0..tensor.len() as u32 + 1).map(word).collect()).collect()
        };
        Self { gradients: words(1), weights: words(2) }
    }
}

/// The tensors of a list, of these types, in this memory.
fn tensors(memory: &mut [Vec<u32>], dtypes: &[DType], plan: &AnyPlan, list: AnyList) -> Vec<Option<RawTensor>> {
    let lengths: Vec<u64> = plan.tensors().iter().map(|tensor| tensor.len() as u64).collect();
    let places: Vec<u64> = memory.iter_mut().map(|words| words.as_mut_ptr() as u64).collect();
    let raw = |address: u64, len: u64, dtype: DType| {
        // SAFETY: so many elements are in the memory, which is used by nothing else until the call returns; or the address is
        // one that is refused.
        Some(unsafe { RawTensor::new(address, len, dtype) })
    };
    let mut all: Vec<Option<RawTensor>> =
        (0..lengths.len()).map(|place| raw(places[place], lengths[place], dtypes[place])).collect();
    if let Some((place, wrong)) = list.wrong.0.filter(|_| !all.is_empty()) {
        let place = place as usize % all.len();
        let (address, len, dtype) = (places[place], lengths[place], dtypes[place]);
        let is_there = len > 0;
        match wrong {
            Wrong::Missing => drop(all.pop()),
            Wrong::OneMore => all.push(all[0]),
            Wrong::Type(other) => all[place] = raw(address, len, DTYPES[other as usize % 3]),
            Wrong::Shorter => all[place] = raw(address, len.saturating_sub(1), dtype),
            Wrong::Null if is_there => all[place] = raw(0, len, dtype),
            Wrong::Misaligned if is_there => all[place] = raw(address + 1, len, dtype),
            Wrong::Beyond if is_there => {
                all[place] = raw(u64::MAX - 1 - 3 * u64::from(dtype == DType::F32) + 1, len, dtype)
            }
            Wrong::Alias(other) if lengths[other as usize % lengths.len()] >= len => {
                all[place] = raw(places[other as usize % places.len()], len, dtype);
            }
            _ => {}
        }
    }
    for (place, tensor) in all.iter_mut().enumerate() {
        // Most are there.
        if list.absent > 127 && list.absent >> place & 1 == 1 {
            *tensor = None;
        }
    }
    all
}

fn read(tensors: &[Option<RawTensor>]) -> Vec<&dyn Tensor> {
    tensors.iter().map(|tensor| tensor as &dyn Tensor).collect()
}

fn write(tensors: &mut [Option<RawTensor>]) -> Vec<&mut dyn TensorMut> {
    tensors.iter_mut().map(|tensor| tensor as &mut dyn TensorMut).collect()
}

/// Makes a call, and gives what it says.
pub fn call(probe: &mut Probe, plan: &AnyPlan, memory: &mut Memory, call: &Call) -> Result<String, Error> {
    let Memory { gradients: of_gradients, weights: of_weights } = memory;
    let dtypes: Vec<DType> = plan.tensors().iter().map(|tensor| tensor.dtype()).collect();
    let weight_dtypes = probe.plan().weights().map_or_else(|| dtypes.clone(), <[_]>::to_vec);
    let mut gradients = |list| tensors(of_gradients, &dtypes, plan, list);
    let mut weights = |list| tensors(of_weights, &weight_dtypes, plan, list);
    let said = |said: &dyn std::fmt::Debug| Ok(format!("{said:?}"));
    match *call {
        Call::Measure(list) => probe.measure(&read(&gradients(list)))?,
        Call::MeasureWithWeights(list, of_weights) => {
            probe.measure_with_weights(&read(&gradients(list)), &read(&weights(of_weights)))?;
        }
        Call::Clip(list) => probe.clip(&mut write(&mut gradients(list)))?,
        Call::Step(list) => probe.step(&mut write(&mut gradients(list)))?,
        Call::Update(list, moved) => probe.update(&read(&gradients(list)), &mut write(&mut weights(moved)))?,
        Call::Poll => {
            let report = probe.poll()?;
            return said(&report.map(|report| (report.to_string(), report)));
        }
        Call::Wait => {
            let report = probe.wait()?;
            return said(&(report.to_string(), &report));
        }
        Call::OptimizerStep(list, moved) => {
            probe.optimizer()?.step(&read(&gradients(list)), &mut write(&mut weights(moved)))?;
        }
        Call::LearningRate(rate) => probe.optimizer()?.set_learning_rate(rate.or(0.1))?,
        Call::AdaptiveClip(list, by) => {
            probe.adaptive_clip()?.clip(&mut write(&mut gradients(list)), &read(&weights(by)))?;
        }
        Call::AdaptiveReport => {
            let report = probe.adaptive_clip()?.report()?;
            return said(&(report.to_string(), report));
        }
        Call::Histogram(list) => {
            let report = probe.histogram()?.measure(&read(&gradients(list)))?;
            return said(&(report.to_string(), report));
        }
        Call::Dot(list, other) => {
            let report = probe.dot()?.measure(&read(&gradients(list)), &read(&weights(other)))?;
            return said(&(report.to_string(), report));
        }
        Call::Moments { list, step, beta1, beta2 } => {
            let types = vec![DType::F32; plan.tensors().len()];
            let first = tensors(of_gradients, &types, plan, list);
            let second = tensors(of_weights, &types, plan, AnyList { wrong: Rare(None), ..list });
            let both = first.iter().zip(&second);
            let moments: Vec<_> = both.map(|(exp_avg, exp_avg_sq)| AdamMoments { exp_avg, exp_avg_sq }).collect();
            let step = AdamStep { step: step.into(), beta1: beta1.or(0.9), beta2: beta2.or(0.99) };
            let report = probe.moments()?.report(&step, &moments)?;
            return said(&(report.to_string(), report));
        }
        Call::Samples(list) => probe.samples()?.take(&read(&gradients(list)))?,
        Call::SampleReport => {
            let report = probe.samples()?.report()?;
            return said(&(report.mean_correlation(), report));
        }
        Call::Tag(tag) => probe.history()?.tag(tag)?,
        Call::History => {
            let report = probe.history()?.report()?;
            return said(&(report.total_norm(), report));
        }
        Call::Gsnr => {
            let report = probe.gsnr()?.report()?;
            return said(&(report.to_string(), report));
        }
        Call::GsnrReset => probe.gsnr()?.reset()?,
        Call::MicroBatch(list) => probe.micro_batches()?.measure(&read(&gradients(list)))?,
        Call::MicroBatchReport => {
            let report = probe.micro_batches()?.report()?;
            return said(&(report.to_string(), report.merged()));
        }
        Call::LossScale(scale) => probe.set_loss_scale(scale.or(4.0) as f32)?,
        Call::Rules(ref rules) => probe.set_rules(rules.rules())?,
        Call::Restore { change, word } => {
            let state = changed(probe.state()?, change, word);
            probe.restore(&state)?;
            return said(&probe.state()?);
        }
        Call::RestoreOptimizer { change, steps, value } => {
            let mut room = probe.optimizer()?;
            let state = changed_optimizer(room.state()?, change, steps, value);
            room.restore(&state)?;
            return said(&room.state()?);
        }
        Call::Fill { tensor, bits, stride } => {
            let count = of_gradients.len();
            if count > 0 {
                let words = &mut of_gradients[tensor as usize % count];
                words.iter_mut().step_by(1 + stride as usize).for_each(|word| *word = bits);
            }
        }
    }
    Ok(String::new())
}

/// A state with one of its numbers another.
fn changed(mut state: ProbeState, change: u8, word: u64) -> ProbeState {
    match change % 6 {
        0 => {}
        1 => state.measured = word,
        2 => state.loss_scale = Some((f32::from_bits(word as u32), (word >> 32) as u32)),
        3 => state.clip.push(word),
        4 if word.is_multiple_of(2) => state = state.common(),
        _ => {
            let count = state.clip.len();
            state.clip[(change / 6) as usize % count] = word;
        }
    }
    state
}

fn changed_optimizer(mut state: OptimizerState, change: u8, steps: u32, value: f32) -> OptimizerState {
    match change % 6 {
        0 => {}
        1 => drop(state.tensors.pop()),
        2 => state.optimizer.push('s'),
        3 => state.tensors.iter_mut().for_each(|tensor| tensor.first.push(value)),
        4 => state.tensors.iter_mut().for_each(|tensor| tensor.steps = steps),
        _ => state.tensors.iter_mut().for_each(|tensor| {
            [&mut tensor.first, &mut tensor.second, &mut tensor.masters].into_iter().for_each(|list| list.fill(value));
        }),
    }
    state
}

#[derive(Arbitrary, Debug)]
pub struct Session {
    pub plan: AnyPlan,
    pub config: AnyConfig,
    pub calls: Many<Call, 24>,
}

/// Makes the calls.
pub fn run(Session { plan: any_plan, config: any_config, calls }: Session) {
    let Ok(plan) = any_plan.plan() else { return };
    let config = any_config.config(&any_plan);
    let bytes = config.bytes(&plan);
    let mut probe = match Probe::new(Cpu, plan.clone(), config.clone()) {
        Ok(probe) => probe,
        Err(error) => return assert_eq!(bytes, Err(error), "what cannot be made is refused before"),
    };
    assert!(bytes.is_ok(), "what can be made is not refused before: {bytes:?}");
    let mut beside = Probe::new(Cpu, plan, config).unwrap();
    let mut memory = Memory::new(&any_plan);
    let mut memory_beside = memory.clone();
    let none_wrong = AnyList { absent: 0, wrong: Rare(None) };
    let known = [Call::Step(none_wrong), Call::Wait, Call::History, Call::Gsnr, Call::SampleReport];
    for next in calls.0.iter().chain(&known) {
        let before = memory.clone();
        match call(&mut probe, &any_plan, &mut memory, next) {
            Ok(said) => {
                let expected = call(&mut beside, &any_plan, &mut memory_beside, next);
                assert_eq!(Ok(said), expected, "{next:?}");
                assert!(memory == memory_beside, "{next:?} changes the same");
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert!(memory == before, "{next:?} is an error, and changes nothing: {error}");
                if let Call::Restore { .. } = next {
                    // What it was made of was read, and is not to be read again by a poll.
                    let _ = beside.state();
                }
            }
        }
    }
}

#[test]
fn any_calls_are_done_or_refused() {
    for_any!(Session, run);
}
