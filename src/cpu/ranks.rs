//! A step of many ranks on the host: records of its own, gathered, merged.

use super::CpuProbe;
use crate::{
    Error, RankReport, Record,
    ranks::{Communicator, Placement, agree, checked, merged},
};
use std::sync::Arc;

/// What a rank knows of the others.
#[derive(Clone, Debug)]
pub(super) struct Ranks {
    communicator: Arc<dyn Communicator>,
    placements: Vec<Placement>,
    /// The records of this rank's weights in the last step that measured them.
    own_weights: Vec<Record>,
    /// The lists of all ranks in the last step.
    lists: Vec<Record>,
}

/// What all ranks hold together.
pub(super) struct Merged {
    pub records: Vec<Record>,
    pub weights: Option<Vec<Record>>,
    pub differing_replicas: u32,
}

impl Ranks {
    /// What all ranks together hold of the tensors and weights of which this one has these records.
    pub(super) fn merge(&mut self, records: Vec<Record>, weights: Option<Vec<Record>>) -> Result<Merged, Error> {
        let tensors = records.len();
        let measured_weights = weights.is_some();
        if let Some(weights) = weights {
            self.own_weights = weights;
        }
        let own = [records, self.own_weights.clone()].concat();
        let bytes = self.communicator.all_gather(bytemuck::cast_slice(&own))?;
        self.lists = bytes.chunks_exact(size_of::<Record>()).map(bytemuck::pod_read_unaligned).collect();
        let (lists, length, ranks) = (&self.lists, own.len(), self.communicator.ranks() as usize);
        let mut differing = 0;
        let mut of_list = |first: usize| -> Vec<Record> {
            let placed = self.placements.iter().enumerate();
            let one = placed.map(|(index, placement)| {
                let (record, differs) = merged(placement, |rank| lists[rank * length + first + index], ranks);
                differing += u32::from(differs);
                record
            });
            one.collect()
        };
        let records = of_list(0);
        let weights = measured_weights.then(|| of_list(tensors));
        Ok(Merged { records, weights, differing_replicas: differing })
    }
}

impl CpuProbe {
    /// Makes this probe one of many: from now on every measurement is gathered from all ranks of the `communicator` and
    /// merged before the step is decided. `placements` says where each tensor's elements are. A collective call, as every
    /// measurement then is; it waits for the other ranks. What is tracked or kept across steps goes on.
    ///
    /// # Errors
    /// [`Error::TensorCount`], [`Error::Placement`], [`Error::InvalidConfig`] for a clip at a quantile;
    /// [`Error::RankDiffers`] on every rank when plans, placements or settings differ; those of the communicator. The
    /// probe then stays alone.
    pub fn join(
        &mut self,
        communicator: impl Communicator + 'static,
        placements: impl IntoIterator<Item = Placement>,
    ) -> Result<(), Error> {
        let placements = checked(&self.plan, &self.config, placements, communicator.ranks())?;
        agree(&self.plan, &self.config, &placements, |own| {
            let bytes = communicator.all_gather(bytemuck::cast_slice(own))?;
            Ok(bytes.chunks_exact(size_of::<u64>()).map(bytemuck::pod_read_unaligned).collect())
        })?;
        let own_weights = vec![Record::EMPTY; self.plan.weights().map_or(0, <[_]>::len)];
        let communicator = Arc::new(communicator);
        self.ranks = Some(Ranks { communicator, placements, own_weights, lists: Vec::new() });
        Ok(())
    }

    /// What each rank measured in the last step, the same on all ranks.
    ///
    /// # Errors
    /// [`Error::NotJoined`], [`Error::NotMeasured`].
    pub fn rank_report(&self) -> Result<RankReport, Error> {
        let ranks = self.ranks.as_ref().ok_or(Error::NotJoined)?;
        if self.outputs.is_none() {
            return Err(Error::NotMeasured);
        }
        Ok(RankReport::new(Arc::clone(&self.plan), ranks.placements.clone(), ranks.lists.clone()))
    }
}
