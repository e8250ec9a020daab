//! The adaptive clip on a device: its tables, the launch, and the read-out.

use super::{AdaptiveClip, AdaptiveClipReport, AdaptiveRecord, Units};
use crate::{
    Config, Error, NonFinitePolicy, Probe, Tensor, TensorMut,
    features::Feature,
    probe::{Common, Core, Mirrored, Planned, ReadBack, Room, values, weight_of},
    spec::CHUNK,
};
use bytemuck::{Pod, Zeroable};

/// The arguments of [`Kernel::Adaptive`](crate::device::Kernel::Adaptive).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct AdaptiveArguments {
    pub common: Common,
    pub clipping: f64,
    pub epsilon: f64,
    pub unit_count: u64,
    /// Table of [`TensorUnits`].
    pub units: u64,
    /// One [`AdaptiveRecord`] a tensor: a result.
    pub adaptive_records: u64,
    /// [`Config::non_finite`].
    pub policy: u32,
    reserved: u32,
}

/// The units of one tensor, and the address of its weights. Behind the last stands one more, with the number of all
/// units.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct TensorUnits {
    pub address: u64,
    /// Elements of a unit; the last may have less where there is no limit.
    pub length: u64,
    pub first: u64,
    pub dtype: u32,
    /// 0 for units that are only divided by the loss scale, and zeroed where not finite under `ZeroNonFinite`.
    pub limited: u32,
}
// The other side is in kernels/adaptive.cu.
const _: () = assert!(size_of::<AdaptiveArguments>() == 120 && size_of::<TensorUnits>() == 32);

/// Room for adaptive clips: [`Config::adaptive_clip`], [`Probe::adaptive_clip`].
pub struct AdaptiveUnits {
    units: Units,
    table: Mirrored<TensorUnits>,
    records: ReadBack,
}

impl Feature<AdaptiveClip> for AdaptiveUnits {
    fn new(core: &mut Core, clip: AdaptiveClip) -> Result<Self, Error> {
        let units = clip.of(&core.plan)?;
        let device = &*core.device;
        let table = Mirrored::new(device, units.lengths.len() + 1)?;
        let records = ReadBack::zeroed(device, units.lengths.len() * size_of::<AdaptiveRecord>())?;
        Ok(Self { units, table, records })
    }
}

impl Config {
    /// Declares clips of each unit of a tensor by the norm of its weights: 56 bytes a tensor.
    #[must_use]
    pub fn adaptive_clip(mut self, clip: AdaptiveClip) -> Self {
        self.features.adaptive_clip = Some(clip);
        self
    }
}

impl Probe {
    /// Gives the adaptive clip, of each unit of a tensor by the norm of its weights.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::adaptive_clip`].
    pub fn adaptive_clip(&mut self) -> Result<Room<'_, AdaptiveUnits>, Error> {
        Room::new(&mut self.core, &mut self.rooms.adaptive_clip, "Config::adaptive_clip")
    }
}

impl Room<'_, AdaptiveUnits> {
    /// The device address of one [`AdaptiveRecord`] a tensor.
    pub fn address(&self) -> u64 {
        self.memory.records.address()
    }

    /// Launches the adaptive clip of these gradients by their weights, both in the plan's order, in place. The weights
    /// may be of any dtypes. Takes the loss scale from the gradients, if there is one, as [`Probe::clip`] and an
    /// optimizer do: it then replaces those. Leaves a step that the last measurement said to skip. Does not wait.
    /// Uploads 32 bytes a tensor when weights have moved since the last call, beside the upload of the gradients'
    /// addresses.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], [`Error::AlreadyClipped`] where there is a loss scale, [`Error::Overlap`], and those of
    /// [`Probe::measure`] for either list.
    pub fn clip(&mut self, tensors: &mut [&mut dyn TensorMut], weights: &[&dyn Tensor]) -> Result<(), Error> {
        let Self { core, memory } = self;
        let place = core.device.place();
        let (tensors, weights) =
            (core.write(&place, tensors, Planned::Gradients)?, core.read(&place, weights, Planned::Lengths)?);
        let unscales = core.config.features.loss_scale.is_some();
        if unscales {
            core.check_unclipped(&tensors)?;
        }
        core.place_to_change(&tensors)?;
        core.check_apart(&tensors, &weights, |gradient, weight| (gradient.to_owned(), weight_of(weight)))?;
        let mut first = 0;
        let mut table = Vec::with_capacity(weights.tensors.len() + 1);
        let zeroes = core.config.non_finite == NonFinitePolicy::ZeroNonFinite;
        let changes_all = zeroes || unscales;
        let units = memory.units.lengths.iter().zip(&memory.units.counts);
        for ((weight, planned), (&length, &count)) in weights.tensors.iter().zip(core.plan.tensors()).zip(units) {
            let (address, dtype, limited) = (weight.address, weight.dtype.code(), u32::from(length > 0));
            let (length, count) = match limited {
                0 if changes_all => (CHUNK as u64, planned.len.div_ceil(CHUNK as u64)),
                _ => (length, count),
            };
            table.push(TensorUnits { address, length, first, dtype, limited });
            first += count;
        }
        table.push(TensorUnits { first, ..TensorUnits::zeroed() });
        memory.table.set(&*core.device, table.into_iter())?;
        core.device.clear(memory.records.buffer())?;
        let pieces = u32::try_from(first).unwrap_or(u32::MAX);
        core.launch(
            pieces,
            &AdaptiveArguments {
                common: core.step.common,
                clipping: memory.units.clipping,
                epsilon: memory.units.epsilon,
                unit_count: first,
                units: memory.table.address(),
                adaptive_records: memory.records.address(),
                policy: core.step.policy,
                reserved: 0,
            },
        )?;
        if unscales {
            core.set_clipped(&tensors);
        }
        weights.finish()?;
        tensors.finish()
    }

    /// Gives the results of the last adaptive clip. Waits for it.
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
