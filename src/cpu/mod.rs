//! The CPU backend: the default where there is no GPU, and the reference whose bits the kernels must equal.
//!
//! Chunks are spread over rayon's threads; within one, loops over fixed-size arrays are left to the compiler to
//! vectorise under the best instruction set of the machine (`dispatch`). Neither changes a bit.

mod adaptive;
mod chunk;
mod clip;
mod dispatch;
mod dot;
mod gsnr;
mod histogram;
mod history;
mod ranks;
mod samples;
mod scan;
mod sums;

use crate::{
    AdamMoments, AdamStep, AdaptiveClip, AdaptiveClipReport, AdaptiveRecord, Backend, Config, DType, DotReport, Error,
    GsnrConfig, GsnrReport, Histogram, HistogramReport, HistoryReport, HostTensor, HostTensorMut, MicroBatchReport,
    Plan, Record, Report, SampleConfig, SampleReport, StepOutputs, adam,
    adaptive::Units,
    backend::with_elements,
    dtype::sealed::Bits,
    health::{Health, Judge},
    loss_scale::{self, LossScaleState},
    micro_batches::Accumulation,
    policy::ClipState,
    spec::{self, CHUNK},
};
use chunk::Measure;
use clip::Clipping;
use gsnr::Tracking;
use history::History;
use ranks::{Merged, Ranks};
use rayon::prelude::*;
use samples::Samples;
use std::sync::Arc;

/// Measures and clips gradients on the host. Owns its workspace: a step allocates only its report.
#[derive(Clone, Debug)]
pub struct CpuProbe {
    plan: Arc<Plan>,
    config: Config,
    /// One record a chunk.
    chunks: Vec<Record>,
    tracking: Option<Tracking>,
    clip: ClipState,
    history: Option<History>,
    /// What was enabled. On the host a report is all the memory that either takes.
    histogram: bool,
    dot: bool,
    adaptive: Option<Units>,
    judge: Option<Judge>,
    samples: Option<Samples>,
    loss_scale: Option<LossScaleState>,
    ranks: Option<Ranks>,
    /// Of micro-batches, and the records of those that were measured.
    micro_batches: Option<(Accumulation, Vec<Vec<Record>>)>,
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
        let clip = ClipState::new(config.clip, config.max_norm, plan.tensors().len());
        Ok(Self {
            plan: Arc::new(plan),
            config,
            chunks,
            tracking: None,
            clip,
            history: None,
            histogram: false,
            dot: false,
            adaptive: None,
            judge: None,
            samples: None,
            loss_scale: config.loss_scale.map(|rule| LossScaleState::new(&rule, config.dead_threshold)),
            ranks: None,
            micro_batches: None,
            outputs: None,
            steps: 0,
        })
    }

    /// Reads every tensor once. `tensors` are those of the plan, in its order.
    ///
    /// # Errors
    /// [`Error::TensorCount`] or [`Error::TensorMismatch`] when they are not.
    pub fn measure(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        self.plan.check(shapes(tensors))?;
        self.step(tensors, None)
    }

    /// Reads every tensor and the weight whose gradient it is once, both in the plan's order.
    ///
    /// # Errors
    /// [`Error::NoWeights`] unless the plan was made with them, and those of [`measure`](Self::measure) for either list.
    pub fn measure_with_weights(
        &mut self,
        tensors: &[HostTensor<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<Report, Error> {
        self.plan.check(shapes(tensors))?;
        self.plan.check_weights(shapes(weights))?;
        self.step(tensors, Some(weights))
    }

    /// The records of these tensors, whose elements were scaled by `scale`.
    fn records(&mut self, tensors: &[HostTensor<'_>], scale: f32) -> Vec<Record> {
        let plan = &*self.plan;
        let divisor = loss_scale::divisor(scale);
        let threshold = f64::from(self.config.dead_threshold) * divisor;
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
        let merged = |index| {
            let chunks = &self.chunks[plan.chunks_of(index)];
            let merged = spec::fold_spans(chunks.len(), |c| chunks[c], Record::merge).unwrap_or(Record::EMPTY);
            merged.over(divisor)
        };
        (0..tensors.len()).map(merged).collect()
    }

    fn step(&mut self, tensors: &[HostTensor<'_>], weights: Option<&[HostTensor<'_>]>) -> Result<Report, Error> {
        let scale = self.loss_scale.as_ref().map_or(1.0, |state| state.scale);
        let weights = weights.map(|weights| self.records(weights, 1.0));
        let records = self.records(tensors, scale);
        let Merged { records, weights, differing_replicas } = match &mut self.ranks {
            Some(ranks) => ranks.merge(records, weights)?,
            None => Merged { records, weights, differing_replicas: 0 },
        };
        self.steps += 1;
        if let Some(tracking) = &mut self.tracking {
            tracking.update(tensors, &records, scale);
        }
        let histogram = self.config.clip.needs_histogram().then(|| {
            let each = tensors.par_iter().map(|&tensor| histogram::histogram(tensor));
            each.reduce(Histogram::default, |a, b| a.merge(&b))
        });
        let mut outputs = StepOutputs::finish(
            &records,
            histogram.as_ref(),
            self.config.non_finite,
            &mut self.clip,
            self.loss_scale.as_mut(),
        );
        outputs.step = self.steps;
        outputs.differing_replicas = differing_replicas;
        outputs.verdict |= if differing_replicas > 0 { StepOutputs::VERDICT_REPLICAS } else { 0 };
        outputs.weights = u32::from(weights.is_some());
        let words = self.judge.as_mut().map(|judge| {
            let finite = outputs.found_inf == 0.0;
            let (word, words) = judge.judge(&records, weights.as_deref(), outputs.finite_total_norm, finite);
            outputs.health = word;
            words
        });
        if let Some(history) = &mut self.history {
            history.keep(&outputs, &records);
        }
        self.outputs = Some(outputs);
        if let Some((accumulation, _)) = &mut self.micro_batches {
            accumulation.close();
        }
        Ok(Report::new(Arc::clone(&self.plan), outputs, records, weights, words))
    }

    /// Clips every tensor in place by what the last measurement decided; writes only what must change.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], and those of [`measure`](Self::measure).
    pub fn clip(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
        self.plan.check(tensors.iter().map(|t| (t.as_ref().dtype(), t.as_ref().len() as u64)))?;
        let outputs = self.outputs.ok_or(Error::NotMeasured)?;
        let does = |bit: u32| outputs.action & bit != 0;
        if outputs.action == 0 {
            return Ok(());
        }
        let limit = if does(StepOutputs::ACTION_CLAMP) { self.clip.limit() } else { f32::INFINITY };
        let zero_nonfinite = does(StepOutputs::ACTION_ZERO_NONFINITE);
        let by_tensor = does(StepOutputs::ACTION_SCALE_TENSORS).then_some(&self.clip.coefficients);
        tensors.par_iter_mut().enumerate().for_each(|(index, tensor)| {
            let coefficient = by_tensor.map_or(outputs.coefficient, |coefficients| coefficients[index]);
            let how = Clipping { coefficient, limit, zero_nonfinite };
            if by_tensor.is_some() && coefficient == 1.0 && !zero_nonfinite {
                return;
            }
            with_elements!(HostTensorMut, tensor, elements => {
                elements.par_chunks_mut(CHUNK).for_each(|chunk| clip::clip(chunk, how));
            });
        });
        Ok(())
    }

    /// Makes room for the records of this many micro-batches of an accumulation.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0.
    pub fn enable_micro_batches(&mut self, count: u32) -> Result<(), Error> {
        self.micro_batches = Some((Accumulation::new(count)?, Vec::new()));
        Ok(())
    }

    /// Measures the gradients of the next micro-batch, before they are added to the sum. A measurement on the side: no
    /// step, and what the clip does is unchanged. The measurement of a step, that of the sum, ends an accumulation.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::TooManyMicroBatches`], and those of [`measure`](Self::measure).
    pub fn measure_micro_batch(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error> {
        let (accumulation, _) = self.micro_batches.as_mut().ok_or(Error::NotEnabled { what: "micro_batches" })?;
        self.plan.check(shapes(tensors))?;
        let place = accumulation.next()?;
        let scale = self.loss_scale.as_ref().map_or(1.0, |state| state.scale);
        let records = self.records(tensors, scale);
        if let Some((_, lists)) = &mut self.micro_batches {
            lists.truncate(place);
            lists.push(records);
        }
        Ok(())
    }

    /// The micro-batches of the accumulation under way, or of the last one.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`] before the first.
    pub fn micro_batches(&self) -> Result<MicroBatchReport, Error> {
        let (accumulation, lists) = self.micro_batches.as_ref().ok_or(Error::NotEnabled { what: "micro_batches" })?;
        accumulation.taken()?;
        Ok(MicroBatchReport::new(Arc::clone(&self.plan), lists.clone()))
    }

    /// What the next loss is to be multiplied by, under [`Config::loss_scale`].
    pub fn loss_scale(&self) -> Option<f32> {
        self.loss_scale.as_ref().map(|state| state.scale)
    }

    /// Sets the loss scale of the next step, and of those after it until it adapts.
    ///
    /// # Errors
    /// [`Error::NoLossScale`] without [`Config::loss_scale`], [`Error::InvalidConfig`] unless finite and above 0.
    pub fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        loss_scale::check_scale(scale)?;
        let state = self.loss_scale.as_mut().ok_or(Error::NoLossScale)?;
        *state = state.with_scale(scale);
        Ok(())
    }

    /// Keeps samples from now on; those of before are forgotten.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::OutOfMemory`].
    pub fn enable_samples(&mut self, config: &SampleConfig) -> Result<(), Error> {
        self.samples = Some(Samples::new(&self.plan, config)?);
        Ok(())
    }

    /// Keeps the sampled elements of `tensors`, as those of the step that was measured last.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], and those of [`measure`](Self::measure).
    pub fn sample(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error> {
        let samples = self.samples.as_mut().ok_or(Error::NotEnabled { what: "samples" })?;
        let outputs = self.outputs.as_ref().ok_or(Error::NotMeasured)?;
        self.plan.check(shapes(tensors))?;
        samples.keep(tensors, outputs);
        Ok(())
    }

    /// The sampled elements of the last steps.
    ///
    /// # Errors
    /// [`Error::NotEnabled`].
    pub fn samples(&self) -> Result<SampleReport, Error> {
        self.samples.as_ref().map(Samples::report).ok_or(Error::NotEnabled { what: "samples" })
    }

    /// Has every measurement from now on judge its step by the threshold rules of `health`: one verdict word for the step,
    /// [`StepOutputs::health`], and one a tensor, [`Report::health_words`]. They are those of [`Health::diagnose`] for the
    /// same steps; what was judged before is forgotten.
    ///
    /// # Errors
    /// [`Error::ReportOfAnotherPlan`] for the health of other tensors, [`Error::InvalidConfig`] for more than 63 rules.
    pub fn judge_by(&mut self, health: &Health) -> Result<(), Error> {
        self.judge = Some(Judge::new(health, &self.plan)?);
        Ok(())
    }

    /// Allows [`clip_adaptively`](Self::clip_adaptively), by this rule.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::TensorCount`], [`Error::UnitLength`].
    pub fn enable_adaptive_clip(&mut self, clip: &AdaptiveClip) -> Result<(), Error> {
        self.adaptive = Some(clip.of(&self.plan)?);
        Ok(())
    }

    /// Clips tensors in place, unit by unit, by the norms of the weights whose gradients they are, which may be of any
    /// dtypes. Leaves all as it is when the last measurement said to skip the step.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], [`Error::NotMeasured`], and those of [`measure`](Self::measure) for either list.
    pub fn clip_adaptively(
        &mut self,
        tensors: &mut [HostTensorMut<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<AdaptiveClipReport, Error> {
        let units = self.adaptive.as_ref().ok_or(Error::NotEnabled { what: "adaptive_clip" })?;
        self.plan.check_lengths(shapes(weights))?;
        self.plan.check(tensors.iter().map(|t| (t.as_ref().dtype(), t.as_ref().len() as u64)))?;
        let outputs = self.outputs.ok_or(Error::NotMeasured)?;
        let (policy, divisor) = (self.config.non_finite, loss_scale::divisor(outputs.loss_scale));
        let records = if outputs.skip != 0 {
            vec![AdaptiveRecord::default(); tensors.len()]
        } else {
            let pairs = tensors.par_iter_mut().zip(weights).enumerate();
            pairs.map(|(index, (g, &w))| adaptive::clip_tensor(units, index, g, w, policy, divisor)).collect()
        };
        Ok(AdaptiveClipReport::new(Arc::clone(&self.plan), units, records))
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

    /// Keeps the last steps from now on, this many; what was kept before is forgotten. Takes 112 bytes a step and 24 a
    /// step and tensor.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0 steps, [`Error::OutOfMemory`]. What was kept before then stays.
    pub fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        self.history = Some(History::new(steps, self.plan.tensors().len())?);
        Ok(())
    }

    /// Names the batch of the measurements that follow, for the history.
    ///
    /// # Errors
    /// [`Error::NoHistory`].
    pub fn tag(&mut self, tag: u64) -> Result<(), Error> {
        self.history.as_mut().ok_or(Error::NoHistory)?.tag = tag;
        Ok(())
    }

    /// The last steps.
    ///
    /// # Errors
    /// [`Error::NoHistory`].
    pub fn history(&self) -> Result<HistoryReport, Error> {
        let history = self.history.as_ref().ok_or(Error::NoHistory)?;
        Ok(HistoryReport::new(Arc::clone(&self.plan), &history.steps, &history.tensors))
    }

    /// The coefficient of each tensor in the last step, under a policy that clips tensors on their own; else empty.
    pub fn coefficients(&self) -> &[f32] {
        &self.clip.coefficients
    }

    /// Allows [`histogram`](Self::histogram), as a device's probe needs to be told, which makes room for it.
    pub fn enable_histogram(&mut self) {
        self.histogram = true;
    }

    /// The histograms of the plan's tensors, in its order. A measurement on the side: no step, and what the clip does is
    /// unchanged.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], and those of [`measure`](Self::measure).
    pub fn histogram(&self, tensors: &[HostTensor<'_>]) -> Result<HistogramReport, Error> {
        if !self.histogram {
            return Err(Error::NotEnabled { what: "histogram" });
        }
        self.plan.check(shapes(tensors))?;
        let histograms = tensors.par_iter().map(|&tensor| histogram::histogram(tensor)).collect();
        Ok(HistogramReport::new(Arc::clone(&self.plan), histograms))
    }

    /// Allows [`dot`](Self::dot), as a device's probe needs to be told, which makes room for it.
    pub fn enable_dot(&mut self) {
        self.dot = true;
    }

    /// The dot products of the plan's tensors `a` and the tensors `b`, which have the same lengths and any dtypes: this
    /// step's gradients and the last one's, or gradients and weights.
    ///
    /// # Errors
    /// [`Error::NotEnabled`], and those of [`measure`](Self::measure) for either list.
    pub fn dot(&self, a: &[HostTensor<'_>], b: &[HostTensor<'_>]) -> Result<DotReport, Error> {
        if !self.dot {
            return Err(Error::NotEnabled { what: "dot" });
        }
        self.plan.check_lengths(shapes(b))?;
        self.plan.check(shapes(a))?;
        let records = a.par_iter().zip(b).map(|(&a, &b)| dot::dot(a, b)).collect();
        Ok(DotReport::new(Arc::clone(&self.plan), records))
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

/// Types and lengths, as plans check them.
fn shapes<'a>(tensors: &'a [HostTensor<'_>]) -> impl ExactSizeIterator<Item = (DType, u64)> + 'a {
    tensors.iter().map(|tensor| (tensor.dtype(), tensor.len() as u64))
}

fn dead_bits<E: crate::Element>(_: &[E], threshold: f64) -> <E as Bits>::Word {
    E::word(E::DTYPE.threshold_bits(threshold))
}

impl Backend for CpuProbe {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn measure_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<Report, Error> {
        self.measure(tensors)
    }

    fn measure_host_with_weights(
        &mut self,
        tensors: &[HostTensor<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<Report, Error> {
        self.measure_with_weights(tensors, weights)
    }

    fn clip_host(&mut self, tensors: &mut [HostTensorMut<'_>]) -> Result<(), Error> {
        self.clip(tensors)
    }

    fn set_loss_scale(&mut self, scale: f32) -> Result<(), Error> {
        self.set_loss_scale(scale)
    }

    fn enable_samples(&mut self, config: &SampleConfig) -> Result<(), Error> {
        self.enable_samples(config)
    }

    fn sample_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<(), Error> {
        self.sample(tensors)
    }

    fn samples(&mut self) -> Result<SampleReport, Error> {
        CpuProbe::samples(self)
    }

    fn judge_by(&mut self, health: &Health) -> Result<(), Error> {
        self.judge_by(health)
    }

    fn enable_adaptive_clip(&mut self, clip: &AdaptiveClip) -> Result<(), Error> {
        self.enable_adaptive_clip(clip)
    }

    fn clip_adaptively_host(
        &mut self,
        tensors: &mut [HostTensorMut<'_>],
        weights: &[HostTensor<'_>],
    ) -> Result<AdaptiveClipReport, Error> {
        self.clip_adaptively(tensors, weights)
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

    fn keep_history(&mut self, steps: u32) -> Result<(), Error> {
        self.keep_history(steps)
    }

    fn tag(&mut self, tag: u64) -> Result<(), Error> {
        self.tag(tag)
    }

    fn history(&mut self) -> Result<HistoryReport, Error> {
        CpuProbe::history(self)
    }

    fn enable_histogram(&mut self) -> Result<(), Error> {
        self.enable_histogram();
        Ok(())
    }

    fn histogram_host(&mut self, tensors: &[HostTensor<'_>]) -> Result<HistogramReport, Error> {
        self.histogram(tensors)
    }

    fn enable_dot(&mut self) -> Result<(), Error> {
        self.enable_dot();
        Ok(())
    }

    fn dot_host(&mut self, a: &[HostTensor<'_>], b: &[HostTensor<'_>]) -> Result<DotReport, Error> {
        self.dot(a, b)
    }
}
