//! A step of many ranks on a device: records of its own, gathered, merged.

use super::{Communicator, Placement, RankReport, Ranks, agree, checked, table};
use crate::{
    Config, Error, Plan, Probe, Record,
    device::{Buffer, Device, Kernel},
    probe::{Arguments, Core, ReadBack, Room, outside_capture, uploaded, values},
};
use std::sync::Arc;

/// The records of all ranks: [`Config::ranks`](crate::Config::ranks), [`Probe::ranks`].
pub struct RankLists {
    placements: Vec<Placement>,
    /// The records of what this rank holds.
    own: Buffer,
    /// Those of all ranks.
    lists: ReadBack,
    _tables: [Buffer; 2],
    communicator: Arc<dyn Communicator>,
}

impl Ranks {
    /// Finds out whether all ranks mean the same. A collective call.
    ///
    /// # Errors
    /// [`Error::TensorCount`], [`Error::Placement`], [`Error::InvalidConfig`] for a clip at a quantile,
    /// [`Error::RankDiffers`] on every rank, those of the communicator, and the device's.
    pub(crate) fn agree(&self, device: &dyn Device, plan: &Plan, config: &Config) -> Result<(), Error> {
        outside_capture(device, Error::UploadInCapture)?;
        let communicator = &*self.communicator;
        communicator.check(&device.place())?;
        checked(plan, config, &self.placements, communicator.ranks())?;
        agree(plan, config, &self.placements, |own| gather(device, communicator, own))
    }
}

impl RankLists {
    pub(crate) fn new(core: &mut Core, ranks: Ranks) -> Result<Self, Error> {
        let Ranks { communicator, placements } = ranks;
        checked(&core.plan, &core.config, &placements, communicator.ranks())?;
        let device = &*core.device;
        let length = core.record_count();
        let own = uploaded(device, bytemuck::cast_slice(&vec![Record::EMPTY; length]))?;
        let lists = ReadBack::zeroed(device, length * size_of::<Record>() * communicator.ranks() as usize)?;
        let tables = [uploaded(device, &table(&placements))?, uploaded(device, &[0; size_of::<u32>()])?];
        #[expect(clippy::cast_possible_truncation, reason = "checked when the probe was made")]
        let list_length = length as u32;
        core.arguments = Arguments {
            lists: lists.address(),
            list_count: communicator.ranks(),
            list_length,
            placements: tables[0].address(),
            differing: tables[1].address(),
            ..core.arguments
        };
        Ok(Self { placements, own, lists, _tables: tables, communicator })
    }

    /// Launches the measurement of a step, and the merge with what the other ranks measure.
    pub(crate) fn launch_measure(&self, core: &Core, chunks: u32, arguments: &Arguments) -> Result<(), Error> {
        let own = self.own.address();
        let alone = Arguments { records: own, is_part: 1, ..*arguments };
        core.launch(Kernel::Measure, chunks, &alone)?;
        let bytes = core.record_count() * size_of::<Record>();
        // SAFETY: both are buffers of the probe's, which live as long as it, with room for one list and for one a rank.
        #[allow(unsafe_code, reason = "the addresses are the probe's own")]
        unsafe { self.communicator.all_gather(own, self.lists.address(), bytes) }?;
        let pieces = (arguments.tensor_count << arguments.weights).div_ceil(Kernel::THREADS);
        core.launch(Kernel::Merge, pieces, arguments)
    }
}

impl Probe {
    /// What the ranks have in the last step.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::ranks`](crate::Config::ranks).
    pub fn ranks(&mut self) -> Result<Room<'_, RankLists>, Error> {
        Room::new(&mut self.core, &mut self.ranks, "Config::ranks")
    }
}

impl Room<'_, RankLists> {
    /// What each rank measured in the last step, the same on all ranks. Waits for it; communicates with nobody.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], [`Error::WaitInCapture`], or the device's.
    pub fn report(&mut self) -> Result<RankReport, Error> {
        if !self.core.measured {
            return Err(Error::NotMeasured);
        }
        let records = values(self.memory.lists.wait(&*self.core.device)?);
        Ok(RankReport::new(self.core.plan.clone(), self.memory.placements.clone(), records))
    }
}

/// Gathers words of the hosts' through the devices' memory.
fn gather(device: &dyn Device, communicator: &dyn Communicator, own: &[u64]) -> Result<Vec<u64>, Error> {
    let bytes = size_of_val(own);
    let from = uploaded(device, bytemuck::cast_slice(own))?;
    let mut to = ReadBack::zeroed(device, bytes * communicator.ranks() as usize)?;
    // SAFETY: both are buffers of those sizes, and live until the copy has been read.
    #[allow(unsafe_code, reason = "the addresses are this function's own")]
    unsafe { communicator.all_gather(from.address(), to.address(), bytes) }?;
    Ok(values(to.wait(device)?))
}
