//! Adam's moments on a device: the launch that reduces them, and the read-out.

use super::{AdamMoments, AdamStep, GsnrReport, adam::Adam, room::Reduction};
use crate::{
    Config, DType, Error, Probe,
    device::Buffer,
    features::Feature,
    probe::{Common, Core, Located, Room, check_address, outside_capture},
};
use bytemuck::{Pod, Zeroable};

/// The arguments of [`Kernel::Adam`](crate::device::Kernel::Adam).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct AdamArguments {
    pub common: Common,
    pub step: Adam,
    /// Table of the addresses of each tensor's two moments; 0 for a tensor without.
    pub moments: u64,
    /// One [`GsnrRecord`](crate::gsnr::GsnrRecord) a tensor with moments: a result.
    pub gsnr_records: u64,
    /// Bins of each tensor: workspace.
    bins: u64,
}
// The other side is in kernels/adam.cu.
const _: () = assert!(size_of::<AdamArguments>() == 144);

/// Reduces Adam's moments: [`Config::moments`], [`Probe::moments`].
pub struct Moments {
    table: Buffer,
    reduction: Reduction,
}

impl Feature<()> for Moments {
    fn new(core: &mut Core, (): ()) -> Result<Self, Error> {
        let tensors = core.plan.tensors().len();
        let table = core.device.allocate((tensors * size_of::<[u64; 2]>()).max(1))?;
        Ok(Self { table, reduction: Reduction::new(core, tensors)? })
    }
}

impl Config {
    /// Declares the reduction of a trainer's Adam moments to signal and noise: 16 KiB and 120 bytes a tensor.
    #[must_use]
    pub fn moments(mut self) -> Self {
        self.features.moments = Some(());
        self
    }
}

impl Probe {
    /// Gives the reduction of the moments that Adam keeps to signal and noise of each tensor, without further state.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::moments`].
    pub fn moments(&mut self) -> Result<Room<'_, Moments>, Error> {
        Room::new(&mut self.core, &mut self.rooms.moments, "Config::moments")
    }
}

impl Room<'_, Moments> {
    /// Gives signal and noise of the tensors from their moments, as [`AdamStep`] describes. `moments` are those of the
    /// plan's tensors, in its order; a tensor without moments is left out. Waits for the result, and keeps nothing for
    /// the next call.
    ///
    /// # Errors
    /// Those of [`AdamStep`], [`Error::TensorCount`], [`Error::TensorMismatch`], [`Error::TooLargeToTrack`], those of a
    /// null or misaligned address, [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self, step: &AdamStep, moments: &[AdamMoments<'_>]) -> Result<GsnrReport, Error> {
        let (core, Moments { table, reduction }) = (&*self.core, &mut *self.memory);
        let adam = step.check()?;
        super::adam::check(&core.plan, moments)?;
        outside_capture(&*core.device, Error::WaitInCapture)?;
        let place = core.device.place();
        let (mut lent, mut addresses, mut memory) = (Vec::new(), Vec::new(), Vec::new());
        for (of, spec) in moments.iter().zip(core.plan.tensors()) {
            let len = of.exp_avg.shape().map_or(0, |(_, len)| len);
            for moment in [of.exp_avg, of.exp_avg_sq] {
                let moment = moment.lend(&place).map_err(|error| error.named(&spec.name))?;
                let located = Located { address: if len == 0 { 0 } else { moment.address }, dtype: DType::F32, len };
                check_address(|| spec.name.clone(), &located)?;
                addresses.push(located.address);
                memory.push((located.address, len * 4));
                lent.push(moment);
            }
        }
        let _checked = core.device.lend(&mut memory.into_iter(), false);
        core.device.upload(bytemuck::cast_slice(&addresses), table)?;
        core.launch_chunks(&AdamArguments {
            common: core.step.common,
            step: adam,
            moments: table.address(),
            gsnr_records: reduction.records.address(),
            bins: reduction.bins.address(),
        })?;
        reduction.records.start(&*core.device)?;
        let report = reduction.report(core, |index| addresses[2 * index] != 0);
        lent.into_iter().try_for_each(crate::tensor::Lent::finish)?;
        report
    }
}
