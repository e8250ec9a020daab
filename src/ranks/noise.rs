//! The noise scale from two values that ranks have anyway: the gradient of each before the all-reduce, and the mean of
//! all after it.

use super::{Along, RankMemory, Reduction, communicator::reduce};
use crate::{
    Error, Room,
    measure::{ExactSum, to_f64},
    micro_batches::MicroBatchReport,
    probe::outside_capture,
};
use bytemuck::{Pod, Zeroable};

/// Holds the squared norms of the gradients of all samples of a step: of the batch of each rank, or of each of its
/// micro-batches. For [`SampleNoise`](crate::gsnr::SampleNoise).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SampleSquares {
    /// Number of samples.
    pub samples: u64,
    /// The mean of their squared norms; NaN where an element is NaN or infinite.
    pub mean: f64,
}

/// The sums over ranks.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct SampleSums {
    squares: ExactSum,
    samples: u64,
    nonfinite: u64,
}

impl Room<'_, RankMemory> {
    /// Gives the squared norms of the samples that each rank has measured as
    /// [micro-batches](crate::Probe::micro_batches), before they were averaged over the dimensions `data` of the mesh.
    /// Ranks have other samples along these. A collective call. 184 bytes.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for an unknown dimension, or one along which a tensor of the plan is a shard: the
    /// measured gradient has then been averaged already. Those of the communicator, or the device's.
    pub fn sample_squares(&mut self, samples: &MicroBatchReport, data: &[&str]) -> Result<SampleSquares, Error> {
        outside_capture(&*self.core.device, Error::WaitInCapture)?;
        // A rank that cannot take part tells the others.
        let own = self.own_samples(samples, data);
        let (device, ranks) = (&*self.core.device, &self.memory.ranks);
        let own = ranks.all_or_none(device, own)?;
        let all = reduce(device, &*ranks.communicator, bytemuck::cast_slice(&[own]), Reduction::Sum)?;
        let SampleSums { squares, samples, nonfinite } = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&all));
        let mean = squares.rounded() / to_f64(samples);
        Ok(SampleSquares { samples, mean: if nonfinite > 0 { f64::NAN } else { mean } })
    }

    fn own_samples(&self, samples: &MicroBatchReport, data: &[&str]) -> Result<SampleSums, Error> {
        let Self { core, memory } = self;
        let (mesh, rank) = (&memory.ranks.mesh, memory.ranks.communicator.rank());
        let names: Vec<&str> = mesh.dimensions().iter().map(|(name, _)| name.as_str()).collect();
        let refused = |value: String| {
            let expected = "dimensions of the mesh along which tensors are replicated";
            Error::InvalidConfig { option: "data", expected, value }
        };
        if let Some(unknown) = data.iter().find(|name| !names.contains(name)) {
            return Err(refused(format!("{unknown:?} of {names:?}")));
        }
        let coordinates = mesh.coordinates(rank);
        let mut sums = SampleSums::default();
        for (index, spec) in core.plan.tensors().iter().enumerate() {
            let mut counts = true;
            for ((name, how), &coordinate) in names.iter().zip(&memory.ranks.layout(index).along).zip(&coordinates) {
                match (how, data.contains(name)) {
                    (Along::Sharded | Along::At(_), true) => {
                        return Err(refused(format!("{name:?}, along which {:?} is not the same on all", spec.name)));
                    }
                    (Along::Replicated, false) => counts &= coordinate == 0,
                    (Along::At(at), false) => counts &= coordinate == *at,
                    (Along::Replicated, true) | (Along::Sharded, false) => {}
                }
            }
            for sample in (0..samples.len()).filter(|_| counts) {
                let record = &samples.records(sample)[index];
                sums.squares.add(record.finite_sum_squares());
                sums.nonfinite += u64::from(record.has_nonfinite());
            }
        }
        // Along the other dimensions ranks have the same samples.
        let is_first = names.iter().zip(&coordinates).all(|(name, &at)| data.contains(name) || at == 0);
        sums.samples = if is_first { samples.len() as u64 } else { 0 };
        sums.squares.carry();
        Ok(sums)
    }
}
