//! An optimizer on a device: its state, its checks and its launch.

#[cfg(doc)]
use super::UpdateRecord;
use super::{Optimizer, OptimizerTensor, check_learning_rate};
use crate::{
    Config, DType, Error, Probe, Tensor, TensorMut,
    device::Buffer,
    features::{Feature, Saved},
    measure::narrow,
    probe::{Common, Core, Given, Mirrored, Other, Planned, ReadBack, Room, outside_capture, uploaded},
    spec::PACKET,
};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// The arguments of [`Kernel::Optimizer`](crate::device::Kernel::Optimizer).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct OptimizerArguments {
    pub common: Common,
    /// As in [`ClipArguments`](crate::clip::ClipArguments), and the next.
    pub clip_state: u64,
    pub coefficients: u64,
    /// Table of the weights: [`Other`].
    pub weights: u64,
    /// The state of each tensor: [`OptimizerTensor`].
    pub states: u64,
    /// The learning rate, an f32.
    pub learning_rate: u64,
    /// f32 moments of all elements.
    pub first: u64,
    pub second: u64,
    /// f32 masters of the elements of 16 bits.
    pub masters: u64,
    /// One [`UpdateRecord`] a tensor: a result.
    pub updates: u64,
    pub betas: [f64; 2],
    /// The factors of the old average and of the gradient, for both moments.
    pub shares: [[f32; 2]; 2],
    pub epsilon: f32,
    /// [`Rule`](super::Rule).
    pub rule: u32,
}
// The other side is in kernels/optimizer.cu.
const _: () = assert!(size_of::<OptimizerArguments>() == 184);

/// An optimizer's state on a device: [`Config::optimizer`], [`Probe::optimizer`].
pub struct OptimizerMemory {
    pub(super) optimizer: Arc<Optimizer>,
    /// Types of the weights.
    pub(super) dtypes: Vec<DType>,
    /// States before the first step.
    pub(super) fresh: Vec<OptimizerTensor>,
    pub(super) tensors: ReadBack,
    pub(super) first: Buffer,
    pub(super) second: Buffer,
    pub(super) masters: Buffer,
    weights: Mirrored<Other>,
    learning_rate: Buffer,
    set: f64,
    updates: u64,
}

impl Feature<Optimizer> for OptimizerMemory {
    fn new(core: &mut Core, optimizer: Optimizer) -> Result<Self, Error> {
        let (plan, device) = (&core.plan, &*core.device);
        let dtypes = plan.updated();
        let (mut elements, mut with_masters) = (0, 0);
        let mut fresh = Vec::with_capacity(dtypes.len());
        for ((spec, dtype), of) in plan.tensors().iter().zip(&dtypes).zip(optimizer.of_tensors(plan)?) {
            let (learning_rate_factor, weight_decay) = of;
            let zeroed = OptimizerTensor::zeroed();
            let start = OptimizerTensor { offset: elements, master_offset: with_masters, ..zeroed };
            fresh.push(OptimizerTensor { learning_rate_factor, weight_decay, ..start }.after(0, optimizer.betas));
            // Whole packets: code that reads and writes 16 bytes at a time needs no end.
            let padded = spec.len.next_multiple_of(PACKET as u64);
            elements += padded;
            with_masters += if *dtype == DType::F32 { 0 } else { padded };
        }
        let zeros = |wanted: bool, elements: u64| {
            let elements = if wanted { elements } else { 0 };
            let bytes = usize::try_from(elements * 4).map_err(|_| Error::OutOfMemory { bytes: u64::MAX })?;
            let buffer = device.allocate(bytes.max(4))?;
            device.clear(&buffer).map(|()| buffer)
        };
        let moments = optimizer.rule.moments();
        Ok(Self {
            tensors: ReadBack::holding(device, bytemuck::cast_slice(&fresh))?,
            first: zeros(moments > 0, elements)?,
            second: zeros(moments > 1, elements)?,
            masters: zeros(true, with_masters)?,
            weights: Mirrored::new(device, dtypes.len())?,
            learning_rate: uploaded(device, bytemuck::bytes_of(&narrow(optimizer.learning_rate)))?,
            set: optimizer.learning_rate,
            updates: core.updates,
            fresh,
            dtypes,
            optimizer: Arc::new(optimizer),
        })
    }
}

impl OptimizerMemory {
    /// The declared optimizer.
    pub(crate) fn declared(&self) -> Arc<Optimizer> {
        Arc::clone(&self.optimizer)
    }

    /// Brings the table of the weights up to date before an update by these gradients, whose own table is up to date.
    fn prepare(&mut self, core: &mut Core, gradients: &Given<'_>, weights: &Given<'_>) -> Result<(), Error> {
        let names = core.plan.tensors().iter().map(|spec| &spec.name);
        let mut pairs = names.zip(gradients.tensors.iter().zip(&weights.tensors));
        if let Some((name, _)) = pairs.find(|(_, (gradient, weight))| gradient.len > 0 && weight.len == 0) {
            return Err(Error::WithoutWeight { name: name.clone() });
        }
        let table = weights.tensors.iter().map(|w| Other { address: w.address, dtype: w.dtype.code(), reserved: 0 });
        if self.weights.set(&*core.device, table)? || !core.apart {
            core.check_update(gradients, weights)?;
        }
        Ok(())
    }

    fn launch(&self, core: &Core) -> Result<(), Error> {
        let Optimizer { rule, betas, epsilon, .. } = *self.optimizer;
        core.launch_chunks(&OptimizerArguments {
            common: core.step.common,
            clip_state: core.step.clip_state,
            coefficients: core.step.coefficients,
            weights: self.weights.address(),
            states: self.tensors.address(),
            learning_rate: self.learning_rate.address(),
            first: self.first.address(),
            second: self.second.address(),
            masters: self.masters.address(),
            updates: self.updates,
            betas,
            shares: self.optimizer.shares(),
            epsilon: narrow(epsilon),
            rule: rule as u32,
        })
    }
}

impl Config {
    /// Declares an optimizer: [`AdamW`](super::AdamW), [`Sgd`](super::Sgd) or [`Lion`](super::Lion). Its weights have
    /// the types of [`Plan::with_weights`](crate::Plan::with_weights), or those of the gradients. Takes 4 bytes an
    /// element for each moment, 4 for each weight of 16 bits, and 160 bytes a tensor.
    #[must_use]
    pub fn optimizer(mut self, optimizer: impl Into<Optimizer>) -> Self {
        self.features.optimizer = Some(optimizer.into());
        self
    }
}

impl Probe {
    /// Measures these gradients, which stay as they are, and moves the weights by them: two launches, without waiting.
    /// The clip is that of the measurement. Tensors absent from the first list keep weights and moments. A step to skip
    /// changes nothing, and does not count.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::optimizer`], [`Error::WithoutWeight`], [`Error::Overlap`], and those of
    /// [`measure`](Self::measure) for either list. Nothing is launched then.
    pub fn update(&mut self, gradients: &[&dyn Tensor], weights: &mut [&mut dyn TensorMut]) -> Result<(), Error> {
        self.rooms.optimizer.as_ref().ok_or(NOT_DECLARED)?;
        let place = self.core.device.place();
        let gradients = self.core.read(&place, gradients, Planned::Gradients)?;
        let weights = self.core.write(&place, weights, Planned::Updated)?;
        self.core.place(&gradients, None)?;
        let memory = self.rooms.optimizer.as_mut().ok_or(NOT_DECLARED)?;
        memory.prepare(&mut self.core, &gradients, &weights)?;
        self.launch_step(false)?;
        let memory = self.rooms.optimizer.as_ref().ok_or(NOT_DECLARED)?;
        memory.launch(&self.core)?;
        weights.finish()?;
        gradients.finish()
    }

    /// Gives the optimizer: learning rate, state, and updates by a measurement that was launched before.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::optimizer`].
    pub fn optimizer(&mut self) -> Result<Room<'_, OptimizerMemory>, Error> {
        Room::new(&mut self.core, &mut self.rooms.optimizer, OptimizerMemory::DECLARE)
    }
}

const NOT_DECLARED: Error = Error::NotDeclared { declare: OptimizerMemory::DECLARE };

impl Room<'_, OptimizerMemory> {
    /// Moves these weights by these gradients, those of the last measurement: one launch, without waiting. Other calls
    /// may come in between: [`Probe::measure_with_weights`], or a clip by quantile of your own. A report that was read
    /// before has no updates yet, and is not diagnosed again.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], [`Error::AlreadyClipped`] after a clip, since this applies the clip itself, and those of
    /// [`Probe::update`].
    pub fn step(&mut self, gradients: &[&dyn Tensor], weights: &mut [&mut dyn TensorMut]) -> Result<(), Error> {
        let Self { core, memory } = self;
        let place = core.device.place();
        let gradients = core.read(&place, gradients, Planned::Gradients)?;
        let weights = core.write(&place, weights, Planned::Updated)?;
        core.check_unclipped(&gradients)?;
        core.place(&gradients, None)?;
        memory.prepare(core, &gradients, &weights)?;
        memory.launch(core)?;
        weights.finish()?;
        gradients.finish()
    }

    /// The learning rate as it was declared or last set.
    pub fn learning_rate(&self) -> f64 {
        self.memory.set
    }

    /// Sets the learning rate from the next update on: one upload of 4 bytes. In a graph, a kernel of your own writes
    /// it to [`learning_rate_address`](Self::learning_rate_address).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless it is finite and not negative, [`Error::UploadInCapture`], or the device's.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<(), Error> {
        check_learning_rate(learning_rate)?;
        outside_capture(&*self.core.device, Error::UploadInCapture)?;
        self.core.device.upload(bytemuck::bytes_of(&narrow(learning_rate)), &self.memory.learning_rate)?;
        self.memory.set = learning_rate;
        Ok(())
    }

    /// The device address of the learning rate, an f32.
    pub fn learning_rate_address(&self) -> u64 {
        self.memory.learning_rate.address()
    }

    /// The device address of one [`UpdateRecord`] a tensor, of the last update.
    pub fn address(&self) -> u64 {
        self.memory.updates
    }
}
