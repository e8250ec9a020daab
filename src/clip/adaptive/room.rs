//! The adaptive clip on a device: its tables, the launch, and the read-out.

use super::{AdaptiveClip, AdaptiveClipReport, AdaptiveRecord, Units};
use crate::{
    Error, Probe, Tensor, TensorMut,
    device::{Buffer, Kernel},
    probe::{Arguments, Core, Mirrored, Planned, ReadBack, Room, uploaded, values},
};
use bytemuck::{Pod, Zeroable};

/// The rule (`kernels/arguments.cuh`).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Rule {
    pub clipping: f64,
    pub epsilon: f64,
    pub unit_count: u64,
    /// Of the [`TensorUnits`].
    pub units: u64,
}

/// The units of one tensor, and where its weights are. Behind the last stands one more, with the number of all units.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct TensorUnits {
    pub address: u64,
    pub length: u64,
    pub first: u64,
    pub dtype: u32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<Rule>() == 32 && size_of::<TensorUnits>() == 32);

/// Room for adaptive clips: [`Config::adaptive_clip`](crate::Config::adaptive_clip), [`Probe::adaptive_clip`].
pub struct AdaptiveUnits {
    units: Units,
    _rule: Buffer,
    table: Mirrored<TensorUnits>,
    records: ReadBack,
}

impl AdaptiveUnits {
    pub(crate) fn new(core: &mut Core, clip: &AdaptiveClip) -> Result<Self, Error> {
        let units = clip.of(&core.plan)?;
        let device = &*core.device;
        let table = Mirrored::new(device, units.lengths.len() + 1)?;
        let Units { clipping, epsilon, .. } = units;
        let rule = Rule { clipping, epsilon, unit_count: units.counts.iter().sum(), units: table.address() };
        let rule = uploaded(device, bytemuck::bytes_of(&rule))?;
        let records = ReadBack::zeroed(device, units.lengths.len() * size_of::<AdaptiveRecord>())?;
        core.arguments = Arguments { adaptive: rule.address(), adaptive_records: records.address(), ..core.arguments };
        Ok(Self { units, _rule: rule, table, records })
    }
}

impl Probe {
    /// Clips of each unit of a tensor by the norm of its weights.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::adaptive_clip`](crate::Config::adaptive_clip).
    pub fn adaptive_clip(&mut self) -> Result<Room<'_, AdaptiveUnits>, Error> {
        Room::new(&mut self.core, &mut self.adaptive_clip, "Config::adaptive_clip")
    }
}

impl Room<'_, AdaptiveUnits> {
    /// Launches the adaptive clip of these tensors by the weights whose gradients they are, both in the plan's order, in
    /// place; the weights may be of any dtypes. Leaves what the last measurement said to skip. Does not wait. One upload
    /// of 32 bytes a tensor when weights have moved since the last call, beside that of the gradients.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], [`Error::Overlap`], and those of [`Probe::measure`] for either list.
    pub fn clip(&mut self, tensors: &mut [&mut dyn TensorMut], weights: &[&dyn Tensor]) -> Result<(), Error> {
        let Self { core, memory } = self;
        let place = core.device.place();
        let (tensors, weights) = (core.write(&place, tensors)?, core.read(&place, weights, Planned::Lengths)?);
        core.place_to_change(&tensors)?;
        core.check_apart(&tensors, &weights)?;
        let mut first = 0;
        let mut table = Vec::with_capacity(weights.tensors.len() + 1);
        let units = memory.units.lengths.iter().zip(&memory.units.counts);
        for (weight, (&length, &count)) in weights.tensors.iter().zip(units) {
            let (address, dtype) = (weight.address, weight.dtype.code());
            table.push(TensorUnits { address, length, first, dtype, reserved: 0 });
            first += count;
        }
        table.push(TensorUnits { first, ..TensorUnits::zeroed() });
        memory.table.set(&*core.device, table.into_iter())?;
        core.device.clear(memory.records.buffer())?;
        let pieces = u32::try_from(first).unwrap_or(u32::MAX);
        core.launch(Kernel::Adaptive, pieces, &core.arguments)?;
        weights.finish()?;
        tensors.finish()
    }

    /// What the last adaptive clip did. Waits for it.
    ///
    /// # Errors
    /// [`Error::NotMeasured`] when there was none, [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self) -> Result<AdaptiveClipReport, Error> {
        if self.memory.table.current().is_empty() {
            return Err(Error::NotMeasured);
        }
        let records = values(self.memory.records.wait(&*self.core.device)?);
        Ok(AdaptiveClipReport::new(self.core.plan.clone(), &self.memory.units, records))
    }
}
