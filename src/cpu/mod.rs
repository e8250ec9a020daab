//! The CPU backend: the default where there is no GPU, and the reference whose bits the kernels must equal.
//!
//! Chunks are spread over rayon's threads; within one, loops over fixed-size arrays are left to the compiler to
//! vectorise under the best instruction set of the machine (`dispatch`). Neither changes a bit.

mod chunk;
mod clip;
mod dispatch;
mod gsnr;
mod scan;
mod sums;

use crate::{
    AdamMoments, AdamStep, Backend, Config, Error, GsnrConfig, GsnrReport, HostTensor, HostTensorMut, Plan, Record,
    Report, StepOutputs, adam,
    backend::with_elements,
    dtype::sealed::Bits,
    spec::{self, CHUNK},
};
use chunk::Measure;
use gsnr::Tracking;
use rayon::prelude::*;
use std::sync::Arc;

/// Measures and clips gradients on the host. Owns its workspace: a step allocates only its report.
#[derive(Clone, Debug)]
pub struct CpuProbe {
    plan: Arc<Plan>,
    config: Config,
    /// One record a chunk.
    chunks: Vec<Record>,
    tracking: Option<Tracking>,
    outputs: Option<StepOutputs>,
    steps: u64,
}

impl CpuProbe {
    /// A probe for the tensors of `plan`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a setting outside its range.
    pub fn new(plan: Plan, config: Config) -> Result<Self, Error> {
        config.check()?;
        let mut chunks = Vec::new();
        let bytes = plan.chunks() * size_of::<Record>();
        chunks.try_reserve_exact(plan.chunks()).map_err(|_| Error::OutOfMemory { bytes })?;
        chunks.resize(plan.chunks(), Record::EMPTY);
        // Starts the thread pool now rather than in the first step (2 ms).
        rayon::join(|| (), || ());
        Ok(Self { plan: Arc::new(plan), config, chunks, tracking: None, outputs: None, steps: 0 })
    }

    /// Reads every tensor once. `tensors` are those of the plan, in its order.
    ///
    /// # Errors
    /// [`Error::TensorCount`] or [`Error::TensorMismatch`] when they are not.
    pub fn measure(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        self.plan.check(tensors.iter().map(|t| (t.dtype(), t.len() as u64)))?;
        let plan = &*self.plan;
        let threshold = self.config.dead_threshold;
        let mut rest = self.chunks.as_mut_slice();
        let mut work = Vec::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            let (records, after) = rest.split_at_mut(plan.chunks_of(index).len());
            rest = after;
            work.push((*tensor, records));
        }
        work.into_par_iter().for_each(|(tensor, records)| {
            records.par_iter_mut().enumerate().for_each(|(index, record)| {
                *record = with_elements!(HostTensor, tensor, elements => {
                    let elements = &elements[index * CHUNK..elements.len().min((index + 1) * CHUNK)];
                    dispatch::run(Measure { elements, dead_bits: dead_bits(elements, threshold) })
                });
            });
        });
        let records: Vec<Record> = (0..tensors.len())
            .map(|index| {
                let chunks = &self.chunks[plan.chunks_of(index)];
                spec::fold_spans(chunks.len(), |c| chunks[c], Record::merge).unwrap_or(Record::EMPTY)
            })
            .collect();
        self.steps += 1;
        if let Some(tracking) = &mut self.tracking {
            tracking.update(tensors, &records);
        }
        let outputs = StepOutputs::finish(&records, &self.config, self.steps);
        self.outputs = Some(outputs);
        Ok(Report::new(Arc::clone(&self.plan), outputs, records))
    }

    /// Clips every tensor in place by what the last measurement decided; writes only what must change.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], and those of [`measure`](Self::measure).
    pub fn clip(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
        self.plan.check(tensors.iter().map(|t| (t.as_ref().dtype(), t.as_ref().len() as u64)))?;
        let outputs = self.outputs.ok_or(Error::NotMeasured)?;
        if outputs.action == StepOutputs::ACTION_NONE {
            return Ok(());
        }
        let zero_nonfinite = outputs.action == StepOutputs::ACTION_ZERO_AND_SCALE;
        tensors.par_iter_mut().for_each(|tensor| {
            with_elements!(HostTensorMut, tensor, elements => {
                elements.par_chunks_mut(CHUNK).for_each(|chunk| clip::clip(chunk, outputs.coefficient, zero_nonfinite));
            });
        });
        Ok(())
    }

    /// Tracks tensors across the steps from now on; what was tracked before is forgotten.
    ///
    /// # Errors
    /// Those of [`GsnrConfig::bytes`], and [`Error::OutOfMemory`]. What was tracked before then stays.
    pub fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        self.tracking = Some(Tracking::new(&self.plan, config)?);
        Ok(())
    }

    /// Forgets all steps that were tracked.
    ///
    /// # Errors
    /// [`Error::NotTracked`].
    pub fn reset_tracking(&mut self) -> Result<(), Error> {
        self.tracking.as_mut().map(Tracking::reset).ok_or(Error::NotTracked)
    }

    /// Signal and noise of the tracked tensors, up to the last step.
    ///
    /// # Errors
    /// [`Error::NotTracked`], and [`Error::TooFewSteps`] before the second step.
    pub fn gsnr(&self) -> Result<GsnrReport, Error> {
        let tracking = self.tracking.as_ref().ok_or(Error::NotTracked)?;
        GsnrReport::new(Arc::clone(&self.plan), tracking.records(&self.plan))
    }

    /// Signal and noise of the tensors whose moments are given, as [`AdamStep`] describes; with no state of its own.
    /// `moments` are those of the plan's tensors, in its order; a tensor with empty ones is left out.
    ///
    /// # Errors
    /// Those of [`AdamStep`], [`Error::TensorCount`], [`Error::TensorMismatch`], [`Error::TooLargeToTrack`].
    pub fn adam_gsnr(&self, step: &AdamStep, moments: &[AdamMoments<'_>]) -> Result<GsnrReport, Error> {
        let adam = step.check()?;
        adam::check(&self.plan, moments.iter().map(|of| [of.exp_avg.len() as u64, of.exp_avg_sq.len() as u64]))?;
        GsnrReport::new(Arc::clone(&self.plan), gsnr::adam_records(&adam, moments))
    }

    /// The last step's scalars.
    pub fn outputs(&self) -> Option<&StepOutputs> {
        self.outputs.as_ref()
    }

    /// The plan this probe was made for.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }
}

fn dead_bits<E: crate::Element>(_: &[E], threshold: f32) -> <E as Bits>::Word {
    E::word(E::DTYPE.threshold_bits(threshold))
}

impl Backend for CpuProbe {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        self.measure(tensors)
    }

    fn clip_host(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
        self.clip(tensors)
    }

    fn track(&mut self, config: &GsnrConfig) -> Result<(), Error> {
        self.track(config)
    }

    fn reset_tracking(&mut self) -> Result<(), Error> {
        self.reset_tracking()
    }

    fn gsnr(&mut self) -> Result<GsnrReport, Error> {
        CpuProbe::gsnr(self)
    }
}
