//! The state of an optimizer on the host, to be saved and restored.

use super::{OptimizerMemory, OptimizerTensor};
use crate::{
    DType, Error, TensorSpec,
    device::Buffer,
    features::Saved,
    probe::{Core, Room, differs, outside_capture, parts, set_parts, values},
};
use std::collections::BTreeMap;

/// Holds the state of an optimizer. After a restore, training goes on with the bits of a run that was not interrupted.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct OptimizerState {
    /// `adamw`, `sgd`, `sgd with momentum` or `lion`.
    pub optimizer: String,
    /// The tensors, in the plan's order.
    pub tensors: Vec<TensorState>,
}

/// The state of one tensor. A list is empty where the optimizer keeps no such state.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TensorState {
    /// Its name in the plan.
    pub name: String,
    /// Updates so far.
    pub steps: u32,
    /// The first moment of each element.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    pub first: Vec<f32>,
    /// The second moment of each element.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    pub second: Vec<f32>,
    /// The f32 masters of a weight of 16 bits.
    #[cfg_attr(feature = "serde", serde(with = "crate::probe::bytes"))]
    pub masters: Vec<f32>,
}

impl OptimizerMemory {
    /// Whether each element of a tensor has a first moment, a second, and a master.
    fn kept(&self, dtype: DType) -> [bool; 3] {
        let moments = self.optimizer.rule.moments();
        [moments > 0, moments > 1, dtype != DType::F32]
    }

    /// The buffers of these.
    fn buffers(&self) -> [&Buffer; 3] {
        [&self.first, &self.second, &self.masters]
    }
}

impl Saved for OptimizerMemory {
    const DECLARE: &'static str = "Config::optimizer";
    type State = OptimizerState;

    fn state(&mut self, core: &Core) -> Result<OptimizerState, Error> {
        let device = &*core.device;
        let of_tensors: Vec<OptimizerTensor> = values(self.tensors.wait(device)?);
        let lists = |which: usize| {
            let place = |((of, spec), &dtype): ((&OptimizerTensor, &TensorSpec), &DType)| {
                let len = if self.kept(dtype)[which] { spec.len } else { 0 };
                ([of.offset, of.offset, of.master_offset][which], len)
            };
            let places = of_tensors.iter().zip(core.plan.tensors()).zip(&self.dtypes).map(place);
            Ok(parts(device, self.buffers()[which], places)?.into_iter())
        };
        let lists = lists(0)?.zip(lists(1)?).zip(lists(2)?);
        let tensors =
            lists.zip(&of_tensors).zip(core.plan.tensors()).map(|((((first, second), masters), of), spec)| {
                let (name, steps) = (spec.name.clone(), of.steps);
                TensorState { name, steps, first, second, masters }
            });
        Ok(OptimizerState { optimizer: self.optimizer.rule.name().to_owned(), tensors: tensors.collect() })
    }

    fn check(&self, core: &Core, state: &OptimizerState) -> Result<(), Error> {
        let (specs, name) = (core.plan.tensors(), self.optimizer.rule.name());
        if state.optimizer != name {
            return differs(format!("its optimizer is {}, and the probe's {name}", state.optimizer));
        }
        if state.tensors.len() != specs.len() {
            let (there, here) = (state.tensors.len(), specs.len());
            return differs(format!("its optimizer has {there} tensors, and the plan {here}"));
        }
        for ((tensor, spec), &dtype) in state.tensors.iter().zip(specs).zip(&self.dtypes) {
            if tensor.name != spec.name {
                return differs(format!("it has tensor {:?} where the plan has {:?}", tensor.name, spec.name));
            }
            let kept = self.kept(dtype).map(|kept| if kept { spec.len } else { 0 });
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

    fn restore(&mut self, core: &Core, state: &OptimizerState) -> Result<(), Error> {
        for (which, buffer) in self.buffers().into_iter().enumerate() {
            let parts = self.fresh.iter().zip(&state.tensors).map(|(of, tensor)| {
                let place = [of.offset, of.offset, of.master_offset][which];
                (place, [&tensor.first[..], &tensor.second, &tensor.masters][which])
            });
            set_parts(&*core.device, buffer, parts)?;
        }
        let betas = self.optimizer.betas;
        let mut known = BTreeMap::new();
        let tensors = self.fresh.iter().zip(&state.tensors).map(|(of, tensor)| {
            let after = *known.entry(tensor.steps).or_insert_with(|| of.after(tensor.steps, betas));
            OptimizerTensor { powers: after.powers, corrections: after.corrections, steps: after.steps, ..*of }
        });
        let tensors: Vec<OptimizerTensor> = tensors.collect();
        core.device.upload(bytemuck::cast_slice(&tensors), self.tensors.buffer())
    }
}

impl Room<'_, OptimizerMemory> {
    /// Gives the state after the last launch. Waits for it, and takes as much memory of the host for the copy.
    /// [`Probe::state`](crate::Probe::state) includes it.
    ///
    /// # Errors
    /// [`Error::WaitInCapture`], or the device's.
    pub fn state(&mut self) -> Result<OptimizerState, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        self.memory.state(self.core)
    }

    /// Goes on from this state; the learning rate stays as it was set.
    ///
    /// # Errors
    /// [`Error::StateOfAnotherProbe`], which names the difference; [`Error::UploadInCapture`], or the device's. Nothing
    /// is changed unless the device fails.
    pub fn restore(&mut self, state: &OptimizerState) -> Result<(), Error> {
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        self.memory.check(self.core, state)?;
        self.memory.restore(self.core, state)
    }
}
