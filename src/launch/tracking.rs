//! Tensors tracked across steps on a device, and Adam's moments: state, launches and read-out.

use super::{Arguments, Device, DeviceProbe, Kernel, check_address, outside_capture, uploaded, values};
use crate::{
    AdamStep, DType, Error, GsnrConfig, GsnrRecord, GsnrReport, Plan, adam,
    gsnr::{BINS, Layout, Track},
};
use std::sync::Arc;

/// Adam's moments of one tensor in device memory, f32, by the names torch gives them. Of no elements they are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawMoments {
    /// Address of the first element of m.
    pub exp_avg: u64,
    /// Address of the first element of v.
    pub exp_avg_sq: u64,
    /// Number of elements of each.
    pub len: u64,
}

impl<D: Device> DeviceProbe<D> {
    /// Tracks tensors across the steps from now on; what was tracked before is forgotten. Allocates
    /// [`GsnrConfig::bytes`] of device memory; a graph captured before goes on without.
    ///
    /// # Errors
    /// Those of [`GsnrConfig::bytes`], and the device's when it has not enough memory. What was tracked before then
    /// stays.
    pub fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let tracking = Tracking::new(&self.device, &self.plan, config)?;
        let address = |buffer: &D::Buffer| self.device.address(buffer);
        self.arguments = Arguments {
            window: config.steps_of_window(),
            tracks: address(&tracking.tracks),
            means: address(&tracking.means),
            deviations: address(&tracking.deviations),
            ..tracking.reduction.place(&self.device, self.arguments)
        };
        self.tracking = Some(tracking);
        Ok(())
    }

    /// Forgets all steps that were tracked: one upload.
    ///
    /// # Errors
    /// [`Error::NotTracked`], or the device's.
    pub fn reset_tracking(&mut self) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let tracking = self.tracking.as_mut().ok_or(Error::NotTracked)?;
        self.device.upload(bytemuck::cast_slice(&tracking.fresh), &mut tracking.tracks)
    }

    /// Launches the reduction of what is tracked, which leaves one [`GsnrRecord`] a tensor at
    /// [`gsnr_records_address`](Self::gsnr_records_address). For those who read them on the device; does not wait.
    ///
    /// # Errors
    /// [`Error::NotTracked`], or the device's.
    pub fn launch_gsnr(&mut self) -> Result<(), Error> {
        if self.tracking.is_none() {
            return Err(Error::NotTracked);
        }
        self.launch(Kernel::Gsnr)
    }

    /// Device address of one [`GsnrRecord`] a tensor of the plan, set by [`launch_gsnr`](Self::launch_gsnr) for the
    /// tracked ones. `None` when none is tracked.
    pub fn gsnr_records_address(&self) -> Option<u64> {
        self.tracking.as_ref().map(|_| self.arguments.gsnr_records)
    }

    /// Signal and noise of the tracked tensors up to the last step. Waits for them.
    ///
    /// # Errors
    /// [`Error::NotTracked`], [`Error::TooFewSteps`] before the second step, [`Error::WaitInCapture`], or the device's.
    pub fn gsnr(&mut self) -> Result<GsnrReport, Error> {
        outside_capture(&self.device, Error::WaitInCapture)?;
        self.launch_gsnr()?;
        let Some(tracking) = &mut self.tracking else { return Err(Error::NotTracked) };
        let fresh = &tracking.fresh;
        let records = tracking.reduction.read(&self.device, |index| fresh[index].is_tracked())?;
        GsnrReport::new(Arc::clone(&self.plan), records)
    }

    /// Signal and noise of the tensors whose moments are given, as [`AdamStep`] describes. `moments` are those of the
    /// plan's tensors, in its order; a tensor with none is left out. Waits for the result. The first call allocates 16
    /// KiB and 120 bytes a tensor, and nothing is kept of one call for the next.
    ///
    /// # Safety
    /// Until the call returns:
    /// * each address is that of `len` initialised f32 elements, in memory this device can read from the probe's context;
    /// * nothing writes to them that is not ordered, by the probe's stream or by events, before the call.
    ///
    /// # Errors
    /// Those of [`AdamStep`], [`Error::TensorCount`], [`Error::TensorMismatch`], [`Error::TooLargeToTrack`], those of a
    /// null or misaligned address, [`Error::WaitInCapture`], or the device's.
    #[allow(unsafe_code, reason = "the addresses are the caller's word")]
    pub unsafe fn adam_gsnr_raw(&mut self, step: &AdamStep, moments: &[RawMoments]) -> Result<GsnrReport, Error> {
        let adam = step.check()?;
        adam::check(&self.plan, moments.iter().map(|of| [of.len; 2]))?;
        for (of, spec) in moments.iter().zip(self.plan.tensors()) {
            check_address(&spec.name, of.exp_avg, of.len, DType::F32)?;
            check_address(&spec.name, of.exp_avg_sq, of.len, DType::F32)?;
        }
        outside_capture(&self.device, Error::WaitInCapture)?;
        let mut table = bytemuck::bytes_of(&adam).to_vec();
        for of in moments {
            let none = of.len == 0;
            table.extend(bytemuck::bytes_of(&if none { [0; 2] } else { [of.exp_avg, of.exp_avg_sq] }));
        }
        let blocks = self.blocks(Kernel::Adam, self.arguments.chunk_count);
        let (reduction, buffer) = match &mut self.adam {
            Some(made) => made,
            none => {
                let reduction = Reduction::new(&self.device, &self.plan, moments.len() * BINS)?;
                none.insert((reduction, self.device.allocate(table.len())?))
            }
        };
        self.device.upload(&table, buffer)?;
        let arguments = reduction.place(&self.device, self.arguments);
        let arguments = Arguments { adam: self.device.address(buffer), ..arguments };
        self.device.launch(Kernel::Adam, blocks, &arguments)?;
        GsnrReport::new(Arc::clone(&self.plan), reduction.read(&self.device, |index| moments[index].len > 0)?)
    }
}

/// Where a kernel reduces elements to one [`GsnrRecord`] a tensor.
pub(super) struct Reduction<D: Device> {
    records: D::Buffer,
    bins: D::Buffer,
    read: D::Read,
}

impl<D: Device> Reduction<D> {
    fn new(device: &D, plan: &Plan, bins: usize) -> Result<Self, Error> {
        let records = plan.tensors().len() * size_of::<GsnrRecord>();
        Ok(Self {
            records: device.allocate(records.max(1))?,
            bins: uploaded(device, bytemuck::cast_slice(&vec![0u32; bins]))?,
            // CUDA refuses to allocate nothing.
            read: device.prepare_read(records.max(1))?,
        })
    }

    /// The arguments with this in them.
    fn place(&self, device: &D, arguments: Arguments) -> Arguments {
        Arguments { gsnr_records: device.address(&self.records), gsnr_bins: device.address(&self.bins), ..arguments }
    }

    /// Waits for the records of those tensors that have one, with their places in the plan.
    fn read(&mut self, device: &D, has_one: impl Fn(usize) -> bool) -> Result<Vec<(usize, GsnrRecord)>, Error> {
        device.start_read(&self.records, &mut self.read)?;
        let records = values::<GsnrRecord>(device.complete(&self.read)?);
        Ok(records.enumerate().filter(|(index, _)| has_one(*index)).collect())
    }
}

/// What is tracked across steps, in device memory.
pub(super) struct Tracking<D: Device> {
    /// The tracks of no step.
    fresh: Vec<Track>,
    tracks: D::Buffer,
    means: D::Buffer,
    deviations: D::Buffer,
    reduction: Reduction<D>,
}

impl<D: Device> Tracking<D> {
    fn new(device: &D, plan: &Plan, config: &GsnrConfig) -> Result<Self, Error> {
        let Layout { tracks: fresh, elements, bins } = config.layout(plan)?;
        let bytes = usize::try_from(elements * 4).map_err(|_| Error::OutOfMemory { bytes: usize::MAX })?;
        Ok(Self {
            // The first step writes the state before any reads it.
            means: device.allocate(bytes.max(1))?,
            deviations: device.allocate(bytes.max(1))?,
            tracks: uploaded(device, bytemuck::cast_slice(&fresh))?,
            reduction: Reduction::new(device, plan, bins)?,
            fresh,
        })
    }
}
