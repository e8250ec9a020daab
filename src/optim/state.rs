//! What an optimizer keeps from step to step, on the host: to be saved, and given back.

use super::{Optimizer, OptimizerMemory, OptimizerTensor};
use crate::{
    DType, Error,
    device::Buffer,
    probe::{Room, outside_capture, values},
};
use std::collections::BTreeMap;

/// The state of an optimizer. Restored, training goes on with the bits of a run that was not interrupted.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState {
    /// `adamw`, `sgd`, `sgd with momentum` or `lion`.
    pub optimizer: String,
    /// In the plan's order.
    pub tensors: Vec<TensorState>,
}

/// The state of one tensor. Where there is none of something, the list is empty.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorState {
    /// Its name in the plan.
    pub name: String,
    /// Updates so far.
    pub steps: u32,
    /// The first moment of each element.
    pub first: Vec<f32>,
    /// The second.
    pub second: Vec<f32>,
    /// The f32 masters of a weight of 16 bits.
    pub masters: Vec<f32>,
}

impl OptimizerMemory {
    /// Whether each element of a tensor has a first moment, a second, and a master.
    fn kept(&self, dtype: DType) -> [bool; 3] {
        let moments = self.optimizer.rule.moments();
        [moments > 0, moments > 1, dtype != DType::F32]
    }

    /// Where those are.
    fn buffers(&self) -> [&Buffer; 3] {
        [&self.first, &self.second, &self.masters]
    }
}

impl Room<'_, OptimizerMemory> {
    /// The state as it is after the last launch. Waits for it, and takes as much memory of the host for the copy.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn state(&mut self) -> Result<OptimizerState, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        let of_tensors: Vec<OptimizerTensor> = values(self.memory.tensors.wait(&*self.core.device)?);
        let memory = &*self.memory;
        let mut lists: [Vec<Vec<f32>>; 3] = Default::default();
        let places = of_tensors.iter().map(|of| [of.offset, of.offset, of.master_offset]).collect::<Vec<_>>();
        for (which, (buffer, list)) in memory.buffers().into_iter().zip(&mut lists).enumerate() {
            let mut read = self.core.device.read(buffer.bytes())?;
            read.start(buffer)?;
            let bytes = read.wait()?;
            for ((spec, place), &dtype) in self.core.plan.tensors().iter().zip(&places).zip(&memory.dtypes) {
                let of = |at: u64| usize::try_from(at * 4).unwrap_or(usize::MAX);
                let range = of(place[which])..of(place[which] + spec.len);
                list.push(if memory.kept(dtype)[which] { values(&bytes[range]) } else { Vec::new() });
            }
        }
        let [first, second, masters] = lists;
        let states = first.into_iter().zip(second).zip(masters).zip(&of_tensors).zip(self.core.plan.tensors());
        let tensors = states.map(|((((first, second), masters), of), spec)| {
            let (name, steps) = (spec.name.clone(), of.steps);
            TensorState { name, steps, first, second, masters }
        });
        Ok(OptimizerState { optimizer: memory.optimizer.rule.name().to_owned(), tensors: tensors.collect() })
    }

    /// Goes on from this state; the learning rate stays as it was set.
    ///
    /// # Errors
    /// [`Error::StateOfAnotherOptimizer`], which names what differs; [`Error::UploadInCapture`], or the device's. Nothing is
    /// changed but where the device fails.
    pub fn restore(&mut self, state: &OptimizerState) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        self.check(state)?;
        let memory = &*self.memory;
        for (which, buffer) in memory.buffers().into_iter().enumerate() {
            let mut all = vec![0f32; buffer.bytes() / 4];
            for (of, tensor) in memory.fresh.iter().zip(&state.tensors) {
                let elements = [&tensor.first, &tensor.second, &tensor.masters][which];
                let offset = [of.offset, of.offset, of.master_offset][which];
                let place = usize::try_from(offset).unwrap_or(usize::MAX);
                all.get_mut(place..).unwrap_or_default()[..elements.len()].copy_from_slice(elements);
            }
            self.core.device.upload(bytemuck::cast_slice(&all), buffer)?;
        }
        let betas = memory.optimizer.betas;
        let mut known = BTreeMap::new();
        let tensors = memory.fresh.iter().zip(&state.tensors).map(|(of, tensor)| {
            let after = *known.entry(tensor.steps).or_insert_with(|| of.after(tensor.steps, betas));
            OptimizerTensor { powers: after.powers, corrections: after.corrections, steps: after.steps, ..*of }
        });
        let tensors: Vec<OptimizerTensor> = tensors.collect();
        self.core.device.upload(bytemuck::cast_slice(&tensors), memory.tensors.buffer())
    }

    fn check(&self, state: &OptimizerState) -> Result<(), Error> {
        let differs = |what: String| Err(Error::StateOfAnotherOptimizer { what });
        let Optimizer { rule, .. } = *self.memory.optimizer;
        let (specs, name) = (self.core.plan.tensors(), rule.name());
        if state.optimizer != name {
            return differs(format!("it is of {}, and the probe's is {name}", state.optimizer));
        }
        if state.tensors.len() != specs.len() {
            return differs(format!("it has {} tensors, and the plan {}", state.tensors.len(), specs.len()));
        }
        for ((tensor, spec), &dtype) in state.tensors.iter().zip(specs).zip(&self.memory.dtypes) {
            if tensor.name != spec.name {
                return differs(format!("it has tensor {:?} where the plan has {:?}", tensor.name, spec.name));
            }
            let kept = self.memory.kept(dtype).map(|kept| if kept { spec.len } else { 0 });
            let given = [&tensor.first, &tensor.second, &tensor.masters].map(|list| list.len() as u64);
            if given != kept {
                let [a, b, c] = given;
                let [d, e, f] = kept;
                return differs(format!(
                    "tensor {:?} has {a} first moments, {b} second and {c} masters, where the plan has {d}, {e} and {f}",
                    tensor.name
                ));
            }
        }
        Ok(())
    }
}
