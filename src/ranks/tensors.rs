//! Results over all ranks on request: histograms, and signal over noise.

use super::{RankMemory, Reduction, communicator::reduce};
use crate::{
    Error, Room,
    gsnr::{GsnrRecord, GsnrReport},
    histogram::HistogramReport,
    measure::ExactSum,
    probe::outside_capture,
};
use bytemuck::{Pod, Zeroable};

/// The sums of a [`GsnrRecord`].
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GsnrSums {
    counts: [u64; 4],
    ratio: ExactSum,
    variance: ExactSum,
    squared_mean: ExactSum,
}

impl Room<'_, RankMemory> {
    /// Gives the histograms of whole tensors, from those that every rank has measured of its parts. A collective call;
    /// 8 KiB a tensor of the model.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`], those of the communicator, or the device's.
    pub fn histograms(&mut self, own: &HistogramReport) -> Result<HistogramReport, Error> {
        self.core.plan.check_report(own.plan())?;
        Ok(HistogramReport::new(self.core.plan.clone(), self.add_up(own.histograms())?))
    }

    /// Gives signal over noise of whole tensors, from the parts that every rank tracks, of the same tensors: counts,
    /// means and sums, and so the noise scale. There is no median. The variation of the norm stays that of the part,
    /// unless [whole tensors](super::Ranks::whole_tensors) are measured. A collective call; 536 bytes a tensor of the
    /// model.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`], those of the communicator, or the device's.
    pub fn gsnr(&mut self, own: &GsnrReport) -> Result<GsnrReport, Error> {
        self.core.plan.check_report(own.plan())?;
        let mut of = vec![GsnrSums::zeroed(); self.core.plan.tensors().len()];
        for &(index, r) in own.records() {
            let exact = |value: f64| {
                let mut sum = ExactSum::default();
                sum.add(value);
                sum
            };
            of[index] = GsnrSums {
                counts: [r.defined, r.constant, r.below_one, r.nonfinite],
                ratio: exact(r.sum_ratio),
                variance: exact(r.sum_variance),
                squared_mean: exact(r.sum_squared_mean),
            };
        }
        let all = self.add_up(&of)?;
        let records = own.records().iter().map(|&(index, record)| {
            let GsnrSums { counts: [defined, constant, below_one, nonfinite], ratio, variance, squared_mean } =
                all[index];
            let whole = GsnrRecord {
                defined,
                constant,
                below_one,
                nonfinite,
                sum_ratio: ratio.rounded_signed(),
                sum_variance: variance.rounded_signed(),
                sum_squared_mean: squared_mean.rounded_signed(),
                median_or_nan: if defined == record.defined { record.median_or_nan } else { f64::NAN },
                ..record
            };
            (index, whole)
        });
        GsnrReport::new(self.core.plan.clone(), records.collect())
    }

    /// Adds up the values of each tensor over ranks, word by word, where it counts.
    fn add_up<T: Pod>(&mut self, own: &[T]) -> Result<Vec<T>, Error> {
        let Self { core, memory } = self;
        outside_capture(&*core.device, Error::WaitInCapture)?;
        if memory.ranks.is_alone() {
            return Ok(own.to_vec());
        }
        let words = size_of::<T>() / size_of::<u64>();
        let mut all = vec![0u64; memory.joined.model_count * words];
        let slots = || memory.joined.slots.iter().map(|&slot| slot as usize * words);
        for (index, (own, slot)) in own.iter().zip(slots()).enumerate() {
            if !memory.ranks.is_uncounted(index) {
                all[slot..slot + words].copy_from_slice(bytemuck::cast_slice(std::slice::from_ref(own)));
            }
        }
        let all = reduce(&*core.device, &*memory.ranks.communicator, &all, Reduction::Sum)?;
        Ok(slots().map(|slot| bytemuck::pod_read_unaligned(bytemuck::cast_slice(&all[slot..slot + words]))).collect())
    }
}
