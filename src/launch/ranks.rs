//! A step of many ranks on a device: records of its own, gathered, merged.

use super::{Arguments, Device, DeviceProbe, Kernel, outside_capture, uploaded, values};
use crate::{
    Error, RankReport, Record,
    ranks::{DeviceCommunicator, Placement, agree, checked, table},
};
use std::sync::Arc;

/// What a rank keeps in its device's memory.
pub(super) struct RankMemory<D: Device> {
    communicator: Box<dyn DeviceCommunicator>,
    placements: Vec<Placement>,
    /// The records of what it holds.
    own: D::Buffer,
    /// Those of all ranks.
    lists: D::Buffer,
    /// Bytes of one list.
    bytes: usize,
    read: D::Read,
    _tables: [D::Buffer; 2],
}

impl<D: Device> DeviceProbe<D> {
    /// Makes this probe one of many: from now on every measurement is gathered from all ranks of the `communicator` and
    /// merged, on the device, before the step is decided. `placements` says where each tensor's elements are. A collective
    /// call, as every measurement then is; it waits for the other ranks. Allocates 80 bytes a tensor and rank, twice that
    /// in a plan with weights. What is tracked or kept across steps goes on; a graph captured before goes on alone.
    ///
    /// # Errors
    /// [`Error::TensorCount`], [`Error::Placement`], [`Error::InvalidConfig`] for a clip at a quantile,
    /// [`Error::SetUpInCapture`]; [`Error::RankDiffers`] on every rank when plans, placements or settings differ; those of
    /// the communicator, and the device's. The probe then stays alone.
    pub fn join(
        &mut self,
        communicator: impl DeviceCommunicator + 'static,
        placements: impl IntoIterator<Item = Placement>,
    ) -> Result<(), Error> {
        outside_capture(&self.device, Error::SetUpInCapture)?;
        let ranks = communicator.ranks();
        let placements = checked(&self.plan, &self.config, placements, ranks)?;
        agree(&self.plan, &self.config, &placements, |own| gather(&self.device, &communicator, own))?;

        let length = self.current.len();
        let bytes = length * size_of::<Record>();
        let all = bytes * ranks as usize;
        let own = uploaded(&self.device, bytemuck::cast_slice(&vec![Record::EMPTY; length]))?;
        let lists = self.device.allocate(all.max(1))?;
        let tables = [uploaded(&self.device, &table(&placements))?, uploaded(&self.device, &[0; size_of::<u32>()])?];
        self.arguments = Arguments {
            lists: self.device.address(&lists),
            list_count: ranks,
            list_length: self.record_count(),
            placements: self.device.address(&tables[0]),
            differing: self.device.address(&tables[1]),
            ..self.arguments
        };
        let read = self.device.prepare_read(all.max(1))?;
        let communicator = Box::new(communicator);
        self.ranks = Some(RankMemory { communicator, placements, own, lists, bytes, read, _tables: tables });
        Ok(())
    }

    /// What each rank measured in the last step, the same on all ranks. Waits for it; communicates with nobody.
    ///
    /// # Errors
    /// [`Error::NotJoined`], [`Error::NotMeasured`], [`Error::WaitInCapture`], or the device's.
    pub fn rank_report(&mut self) -> Result<RankReport, Error> {
        let ranks = self.ranks.as_mut().ok_or(Error::NotJoined)?;
        if !self.measured {
            return Err(Error::NotMeasured);
        }
        outside_capture(&self.device, Error::WaitInCapture)?;
        let count = self.current.len() * ranks.communicator.ranks() as usize;
        self.device.start_read(&ranks.lists, &mut ranks.read)?;
        let records = values::<Record>(self.device.complete(&ranks.read)?).take(count).collect();
        Ok(RankReport::new(Arc::clone(&self.plan), ranks.placements.clone(), records))
    }

    /// Launches the measurement of a step: alone, or with what the other ranks measure.
    pub(super) fn launch_measure(&self, blocks: u32, arguments: &Arguments) -> Result<(), Error> {
        let Some(ranks) = &self.ranks else { return self.device.launch(Kernel::Measure, blocks, arguments) };
        let own = self.device.address(&ranks.own);
        let alone = Arguments { records: own, is_part: 1, ..*arguments };
        self.device.launch(Kernel::Measure, blocks, &alone)?;
        // SAFETY: both are buffers of the probe's, which live as long as it, with room for one list and for one a rank.
        #[allow(unsafe_code, reason = "the addresses are the probe's own")]
        unsafe { ranks.communicator.all_gather(own, self.arguments.lists, ranks.bytes) }?;
        let items = (arguments.tensor_count << arguments.weights).div_ceil(Kernel::THREADS);
        self.device.launch(Kernel::Merge, self.blocks(Kernel::Merge, items), arguments)
    }
}

/// Gathers words of the hosts' through the devices' memory.
fn gather<D: Device>(device: &D, communicator: &impl DeviceCommunicator, own: &[u64]) -> Result<Vec<u64>, Error> {
    let bytes = size_of_val(own);
    let all = bytes * communicator.ranks() as usize;
    let (from, to) = (uploaded(device, bytemuck::cast_slice(own))?, device.allocate(all)?);
    // SAFETY: both are buffers of those sizes, and live until the copy has been read.
    #[allow(unsafe_code, reason = "the addresses are this function's own")]
    unsafe { communicator.all_gather(device.address(&from), device.address(&to), bytes) }?;
    let mut read = device.prepare_read(all)?;
    device.start_read(&to, &mut read)?;
    Ok(values(device.complete(&read)?).collect())
}

/// Records of a list, as the kernels count them.
impl<D: Device> DeviceProbe<D> {
    #[expect(clippy::cast_possible_truncation, reason = "checked when the probe was made")]
    fn record_count(&self) -> u32 {
        self.current.len() as u32
    }
}
