//! A step of many ranks on a device: records of its own, gathered, merged.

use super::{Communicator, Placement, RankReport, Ranks, agree, checked, table};
use crate::{
    Config, Error, Plan, Probe, Record,
    device::{Buffer, Device, Kernel},
    features::Feature,
    probe::{Common, Core, ReadBack, Room, StepArguments, outside_capture, uploaded, values},
};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// Of [`Kernel::Merge`].
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct MergeArguments {
    pub step: StepArguments,
    /// One list of [`Record`]s a rank, of `list_length` each.
    pub lists: u64,
    /// Where the elements of each tensor are, and behind that the ranks.
    pub placements: u64,
    /// Ranks.
    pub list_count: u32,
    /// Records of a rank.
    pub list_length: u32,
}
// The other side is in kernels/merge.cu.
const _: () = assert!(size_of::<MergeArguments>() == 240);

/// The records of all ranks: [`Config::ranks`], [`Probe::ranks`].
pub struct RankLists {
    placements: Vec<Placement>,
    /// The records of what this rank holds.
    own: Buffer,
    /// Those of all ranks.
    lists: ReadBack,
    /// Of the placements, and the counter of replicas that differ.
    tables: [Buffer; 2],
    communicator: Arc<dyn Communicator>,
    /// Records of a rank.
    length: u32,
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

impl Feature<Ranks> for RankLists {
    fn new(core: &mut Core, ranks: Ranks) -> Result<Self, Error> {
        let Ranks { communicator, placements } = ranks;
        checked(&core.plan, &core.config, &placements, communicator.ranks())?;
        let device = &*core.device;
        let length = core.record_count();
        let own = uploaded(device, bytemuck::cast_slice(&vec![Record::EMPTY; length]))?;
        let lists = ReadBack::zeroed(device, length * size_of::<Record>() * communicator.ranks() as usize)?;
        let tables = [uploaded(device, &table(&placements))?, uploaded(device, &[0; size_of::<u32>()])?];
        core.step.differing = tables[1].address();
        #[expect(clippy::cast_possible_truncation, reason = "checked when the probe was made")]
        Ok(Self { placements, own, lists, tables, communicator, length: length as u32 })
    }
}

impl RankLists {
    /// Launches the measurement of a step, and the merge with what the other ranks measure.
    pub(crate) fn launch_measure(&self, core: &Core, chunks: u32, step: StepArguments) -> Result<(), Error> {
        let own = self.own.address();
        let alone = Common { records: own, ..step.common };
        core.launch(chunks, &StepArguments { common: alone, is_part: 1, ..step })?;
        let bytes = core.record_count() * size_of::<Record>();
        // SAFETY: both are buffers of the probe's, which live as long as it, with room for one list and for one a rank.
        #[allow(unsafe_code, reason = "the addresses are the probe's own")]
        unsafe { self.communicator.all_gather(own, self.lists.address(), bytes) }?;
        let pieces = (step.common.tensor_count << step.weights).div_ceil(Kernel::Merge.threads());
        let (lists, placements) = (self.lists.address(), self.tables[0].address());
        let (list_count, list_length) = (self.communicator.ranks(), self.length);
        core.launch(pieces, &MergeArguments { step, lists, placements, list_count, list_length })
    }
}

impl Config {
    /// With every measurement gathered from all ranks and merged before the step is decided, as [`ranks`](crate::ranks)
    /// describes: a [`Record`] a tensor and rank, twice that in a plan with weights.
    #[must_use]
    pub fn ranks(mut self, ranks: Ranks) -> Self {
        self.features.ranks = Some(ranks);
        self
    }
}

impl Probe {
    /// What the ranks have in the last step.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::ranks`].
    pub fn ranks(&mut self) -> Result<Room<'_, RankLists>, Error> {
        Room::new(&mut self.core, &mut self.rooms.ranks, "Config::ranks")
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
