//! A step of many ranks on a device: the sums of each, the sum over all, and the end of the step.

use super::{
    AbortHandle, Along, CheckSums, ContributeArguments, Differing, FingerprintArguments, RankCheck, Ranks, Reduction,
    ReplicaCheck, gather, join,
    join::Joined,
    replicas::{Factors, located, mixed, rank_factors},
    report::DifferingReplica,
    whole::{NOWHERE, TensorMaxima, TensorSums},
};
use crate::{
    Config, Error, Plan, Probe, Record, StepOutputs,
    device::{Buffer, Device, Kernel, Read},
    features::Feature,
    measure::StepSums,
    probe::{Core, ReadBack, Room, StepArguments, outside_capture, uploaded, values},
};
use bytemuck::{Pod, Zeroable};
use std::{collections::HashMap, sync::Arc};

/// The arguments of [`Kernel::Merge`].
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct MergeArguments {
    pub step: StepArguments,
    /// The number of each tensor of the plan among those of all ranks; 0 where records stay those of this rank.
    pub slots: u64,
    /// [`TensorSums`] of those, and behind them of their weights.
    pub model_sums: u64,
    /// [`TensorMaxima`] in the same way.
    pub model_maxima: u64,
    /// Number of tensors.
    pub model_count: u32,
    pub reserved: u32,
}
// The other side is in kernels/merge.cu.
const _: () = assert!(size_of::<MergeArguments>() == 280);

/// A probe among other ranks: [`Config::ranks`], [`Probe::ranks`].
pub struct RankMemory {
    pub(super) ranks: Ranks,
    pub(super) joined: Arc<Joined>,
    /// The [`StepSums`], and behind them the [`CheckSums`].
    sums: Buffer,
    /// Whether a step has failed between its launches: the sums may hold a part of it, to which the next would add.
    is_cut_short: bool,
    fingerprints: Option<Fingerprints>,
    model: Option<Model>,
    /// Whether the last step measured the weights.
    compared_weights: bool,
    /// Read last, so that all work before it is over.
    last: Box<dyn Read>,
}

struct Fingerprints {
    /// One word a chunk.
    of_chunks: ReadBack,
    factors: Buffer,
}

/// Memory for the tensors of all ranks.
struct Model {
    /// Tables of owners, places and slots.
    tables: [Buffer; 3],
    sums: ReadBack,
    maxima: ReadBack,
}

impl Ranks {
    /// Checks that the communicator reaches the device. Otherwise other ranks cannot be told.
    ///
    /// # Errors
    /// [`Error::Communication`], and the device's.
    pub(crate) fn reaches(&self, device: &dyn Device) -> Result<(), Error> {
        outside_capture(device, Error::UploadInCapture)?;
        self.communicator.check(&device.place())?;
        device.watch(&self.communicator);
        Ok(())
    }

    /// Checks that this rank can take part.
    ///
    /// # Errors
    /// [`Error::TensorCount`], [`Error::Placement`], [`Error::InvalidConfig`].
    pub(crate) fn check(&self, plan: &Plan, config: &Config) -> Result<(), Error> {
        let (ranks, of_mesh) = (self.communicator.ranks(), self.mesh.ranks());
        if ranks != of_mesh || ranks == 0 {
            let value = format!("{of_mesh} of {ranks} ranks");
            return Err(Error::InvalidConfig { option: "mesh", expected: "of all ranks of the communicator", value });
        }
        plan.check_count(self.layouts.count().unwrap_or(plan.tensors().len()))?;
        for (index, spec) in plan.tensors().iter().enumerate() {
            let Some(layout) = self.layouts.get(index) else { break };
            let refused = |what: String| Error::Placement { name: spec.name.clone(), what };
            if !layout.is_of(&self.mesh) {
                return Err(refused("of another mesh".to_owned()));
            }
            match &layout.part {
                Some((range, _)) if range.end.checked_sub(range.start) != Some(spec.len) => {
                    return Err(refused(format!("of elements {range:?}, where {} are planned", spec.len)));
                }
                _ => {}
            }
            if config.clip.is_by_tensor() && layout.along.contains(&Along::Sharded) && !self.whole_tensors {
                let expected =
                    "one that does not look at tensors that are parts here, or beside `Ranks::whole_tensors`";
                return Err(Error::InvalidConfig { option: "clip", expected, value: format!("{:?}", config.clip) });
            }
        }
        Ok(())
    }

    /// Lets these ranks meet. A collective call.
    ///
    /// # Errors
    /// [`Error::RankDiffers`] on every rank.
    pub(crate) fn join(&self, device: &dyn Device, plan: &Plan, config: &Config) -> Result<Self, Error> {
        let joined = join::join(device, plan, config, self)?;
        Ok(Self { joined: Some(Arc::new(joined)), ..self.clone() })
    }

    /// Gives the result of a rank, if all ranks have one. A collective call.
    ///
    /// # Errors
    /// This rank's, or [`Error::RankDiffers`].
    pub(crate) fn all_or_none<T>(&self, device: &dyn Device, made: Result<T, Error>) -> Result<T, Error> {
        join::all_or_none(&*self.communicator, device, made)
    }
}

impl Feature<Ranks> for RankMemory {
    fn new(core: &mut Core, ranks: Ranks) -> Result<Self, Error> {
        let device = &*core.device;
        let joined = ranks.joined.clone().unwrap_or_else(|| Arc::new(Joined::supposed(&core.plan, &ranks)));
        let sums = uploaded(device, &[0; size_of::<StepSums>() + size_of::<CheckSums>()])?;
        let is_compared = ranks.check != ReplicaCheck::Off && joined.has_replicas();
        let fingerprints = if is_compared { Some(Fingerprints::new(core, &joined)?) } else { None };
        let needs_model = ranks.whole_tensors && !joined.is_replicated;
        let model = if needs_model { Some(Model::new(core, &joined)?) } else { None };
        let is_alone = ranks.is_alone();
        if is_compared || !is_alone {
            core.step.check = sums.address() + size_of::<StepSums>() as u64;
        }
        if !is_alone {
            core.step.sums = sums.address();
            core.step.is_part = 1;
        }
        let all: Vec<u32> = (0..ranks.mesh.ranks()).collect();
        core.step.ranks = ranks.mesh.ranks();
        core.step.rank_factors = rank_factors(&all).nth(ranks.communicator.rank() as usize).unwrap_or_default();
        core.step.clip_words = core.config.clip.words_of_all_ranks();
        core.step.strict = u32::from(ranks.check == ReplicaCheck::Strict);
        let last = device.read(size_of::<u64>())?;
        Ok(Self { ranks, joined, sums, is_cut_short: false, fingerprints, model, compared_weights: false, last })
    }
}

/// Gives the factor of a tensor, or of its weight, from its name.
fn tensor_factor(name: &str, is_weight: bool) -> u64 {
    mixed(join::hash(name) ^ u64::from(is_weight)) | 1
}

impl Fingerprints {
    fn new(core: &Core, joined: &Joined) -> Result<Self, Error> {
        let lists = core.record_count() / core.plan.tensors().len().max(1);
        let mut factors = Vec::with_capacity(core.record_count());
        // Many tensors have the same holders.
        let mut known = HashMap::new();
        for is_weight in [false, true].into_iter().take(lists) {
            for (spec, (holders, own)) in core.plan.tensors().iter().zip(joined.places()) {
                let rank = *known
                    .entry(holders.as_ptr())
                    .or_insert_with(|| rank_factors(holders).nth(own).unwrap_or_default());
                factors.push(Factors { rank, tensor: tensor_factor(&spec.name, is_weight), reserved: 0 });
            }
        }
        let chunks = lists * core.plan.chunks();
        Ok(Self {
            of_chunks: ReadBack::zeroed(&*core.device, chunks * size_of::<u64>())?,
            factors: uploaded(&*core.device, bytemuck::cast_slice(&factors))?,
        })
    }
}

impl Model {
    fn new(core: &Core, joined: &Joined) -> Result<Self, Error> {
        let device = &*core.device;
        let mut owners = vec![NOWHERE; joined.model_count];
        for (index, &slot) in (0..).zip(&joined.slots) {
            owners[slot as usize] = index;
        }
        let lists = if core.plan.weights().is_some() { 2 } else { 1 };
        let tables = [
            uploaded(device, bytemuck::cast_slice(&owners))?,
            uploaded(device, bytemuck::cast_slice(&joined.firsts))?,
            uploaded(device, bytemuck::cast_slice(&joined.slots))?,
        ];
        let sums = ReadBack::zeroed(device, lists * joined.model_count * size_of::<TensorSums>())?;
        let maxima = ReadBack::zeroed(device, lists * joined.model_count * size_of::<TensorMaxima>())?;
        Ok(Self { tables, sums, maxima })
    }
}

impl RankMemory {
    /// Waits for queued work, as long as for a report, so that none of its memory is freed while other ranks use it.
    pub(crate) fn settle(&mut self, device: &dyn Device) {
        // In a capture there is nothing to wait for, and an error has nowhere to go.
        if device.is_capturing() == Ok(false) && self.last.start(&self.sums).is_ok() {
            let _ = self.last.wait();
        }
    }

    /// Launches the measurement of a step, and the launches that decide it with the other ranks.
    pub(crate) fn launch_measure(&mut self, core: &Core, chunks: u32, step: StepArguments) -> Result<(), Error> {
        self.compared_weights = step.weights != 0;
        if std::mem::replace(&mut self.is_cut_short, true) {
            core.device.clear(&self.sums)?;
        }
        self.launch_all(core, chunks, step)?;
        self.is_cut_short = false;
        Ok(())
    }

    fn launch_all(&self, core: &Core, chunks: u32, step: StepArguments) -> Result<(), Error> {
        if self.ranks.is_alone() {
            // The sums that the last step has left, and every rank has come to.
            if step.check != 0 {
                self.all_reduce(step.check, size_of::<CheckSums>(), Reduction::Sum)?;
            }
            core.launch(chunks, &step)?;
            return self.launch_fingerprint(core, chunks, &step);
        }
        core.launch(chunks, &step)?;
        self.launch_fingerprint(core, chunks, &step)?;
        self.all_reduce(step.sums, size_of::<StepSums>() + size_of::<CheckSums>(), Reduction::Sum)?;
        let mut merge = MergeArguments { step, ..MergeArguments::zeroed() };
        let mut pieces = 1;
        if let Some(model) = &self.model {
            let model_count = self.joined.model_count;
            let lists = 1 + step.weights as usize;
            let [owners, firsts, slots] = model.tables.each_ref().map(Buffer::address);
            let (sums, maxima) = (model.sums.address(), model.maxima.address());
            #[expect(clippy::cast_possible_truncation, reason = "slots are numbered in u32")]
            let (model_count, all) = (model_count as u32, (lists * model_count) as u32);
            let (common, weights) = (step.common, step.weights);
            core.launch(all, &ContributeArguments { common, owners, firsts, sums, maxima, model_count, weights })?;
            self.all_reduce(sums, all as usize * size_of::<TensorSums>(), Reduction::Sum)?;
            self.all_reduce(maxima, all as usize * size_of::<TensorMaxima>(), Reduction::Max)?;
            merge = MergeArguments { slots, model_sums: sums, model_maxima: maxima, model_count, ..merge };
            pieces = (step.common.tensor_count << step.weights).div_ceil(Kernel::Merge.threads());
        }
        core.launch(pieces, &merge)
    }

    /// Adds up the counts of a clip by a quantile over all ranks.
    pub(crate) fn add_histogram(&self, at: u64, bytes: usize) -> Result<(), Error> {
        if self.ranks.is_alone() { Ok(()) } else { self.all_reduce(at, bytes, Reduction::Sum) }
    }

    fn launch_fingerprint(&self, core: &Core, chunks: u32, step: &StepArguments) -> Result<(), Error> {
        let Some(Fingerprints { of_chunks, factors }) = &self.fingerprints else { return Ok(()) };
        let (common, check, weights) = (step.common, step.check, step.weights);
        let (fingerprints, factors) = (of_chunks.address(), factors.address());
        core.launch(chunks, &FingerprintArguments { common, fingerprints, factors, check, weights, reserved: 0 })
    }

    fn all_reduce(&self, at: u64, bytes: usize, reduction: Reduction) -> Result<(), Error> {
        // SAFETY: they are buffers of the probe's, which live as long as it.
        #[allow(unsafe_code, reason = "the addresses are the probe's own")]
        unsafe {
            self.ranks.communicator.all_reduce(at, bytes / size_of::<u64>(), reduction)
        }
    }

    /// Gives the comparison of a step from its sums, for its report.
    pub(crate) fn checked(
        &self,
        core: &Core,
        sums: &CheckSums,
        (outputs, measurement): (&StepOutputs, u64),
    ) -> RankCheck {
        let step = core.numbering.of(measurement - u64::from(self.ranks.is_alone() && measurement > 0));
        let differs = |bit: u32| outputs.flags & bit != 0;
        let state = differs(StepOutputs::FLAG_STATE).then(|| {
            let all: Vec<u32> = (0..self.ranks.mesh.ranks()).collect();
            // Incomplete sums name nobody.
            let ranks = if sums.state == [0; 2] { Vec::new() } else { located(sums.state, &all) };
            Differing { ranks, ..Differing::default() }
        });
        let replicas = differs(StepOutputs::FLAG_REPLICAS).then(|| self.located(&core.plan, sums.replicas));
        RankCheck { step, replicas, state }
    }

    fn located(&self, plan: &Plan, [first, second, third]: [u64; 3]) -> Differing {
        let mut groups: Vec<&Arc<[u32]>> = self.joined.holders.iter().filter(|holders| holders.len() > 1).collect();
        groups.dedup_by_key(|holders| holders.as_ptr());
        let found = groups.into_iter().find_map(|holders| {
            let ranks = located([first, second], holders);
            (!ranks.is_empty()).then_some((holders, ranks))
        });
        let Some((holders, ranks)) = found else { return Differing::default() };
        let tensors = plan.tensors().iter().zip(&self.joined.holders).filter(|(_, held)| *held == holders);
        let tensor = tensors
            .flat_map(|(spec, _)| [(spec, false), (spec, true)])
            .find(|(spec, is_weight)| first.wrapping_mul(tensor_factor(&spec.name, *is_weight)) == third);
        let is_weight = tensor.is_some_and(|(_, is_weight)| is_weight);
        Differing { ranks, tensor: tensor.map(|(spec, _)| spec.name.clone()), is_weight }
    }
}

impl Config {
    /// Declares that each step is decided together with other ranks, as [`ranks`](crate::ranks) describes. Takes 288
    /// bytes; for compared replicas, 8 bytes a chunk and 32 a tensor; for [whole tensors](Ranks::whole_tensors), 752
    /// bytes a tensor of the model, which [`Config::bytes`] takes to be the plan. All but those 288 double in a plan
    /// with weights.
    #[must_use]
    pub fn ranks(mut self, ranks: Ranks) -> Self {
        self.features.ranks = Some(ranks);
        self
    }
}

impl Probe {
    /// Gives the calls on all ranks.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Config::ranks`].
    pub fn ranks(&mut self) -> Result<Room<'_, RankMemory>, Error> {
        Room::new(&mut self.core, &mut self.rooms.ranks, "Config::ranks")
    }
}

impl Room<'_, RankMemory> {
    /// Gives a handle that ends all waiting for other ranks, from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.memory.ranks.abort_handle()
    }

    /// Gives the records of the tensors of all ranks in the last step, this rank's included, with their names up to 128
    /// bytes. Waits for it, without communication.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] without [`Ranks::whole_tensors`], or where every rank has all tensors; [`Error::NotMeasured`],
    /// [`Error::WaitInCapture`], or the device's.
    pub fn model(&mut self) -> Result<Vec<(String, Record)>, Error> {
        let Self { core, memory } = self;
        let model = memory.model.as_mut().ok_or(Error::NotDeclared { declare: "Ranks::whole_tensors" })?;
        if !core.measured {
            return Err(Error::NotMeasured);
        }
        let device = &*core.device;
        let sums: Vec<TensorSums> = values(model.sums.wait(device)?);
        let maxima: Vec<TensorMaxima> = values(model.maxima.wait(device)?);
        let records = sums.iter().zip(&maxima).map(|(sums, maxima)| sums.whole(maxima));
        Ok(memory.joined.names.iter().cloned().zip(records).collect())
    }

    /// Finds the tensors of this rank's plan, and weights where the last step measured them, whose replicas differed in
    /// that step, and the ranks. Every rank gets the fingerprints of all. A collective call, for when a report shows a
    /// difference. It is of the last launched step: where the result of a step comes with the next, a difference of one
    /// step alone is no longer seen. Waits.
    ///
    /// # Errors
    /// [`Error::NotDeclared`] where replicas are not compared, [`Error::NotMeasured`], [`Error::WaitInCapture`], those of the
    /// communicator, or the device's.
    pub fn differing_replicas(&mut self) -> Result<Vec<DifferingReplica>, Error> {
        let Self { core, memory } = self;
        let device = &*core.device;
        outside_capture(device, Error::WaitInCapture)?;
        if memory.ranks.check == ReplicaCheck::Off {
            return Err(Error::NotDeclared { declare: "Ranks::replica_check" });
        }
        if !core.measured {
            return Err(Error::NotMeasured);
        }
        let tensors = core.plan.tensors().len();
        let lists = 1 + usize::from(memory.compared_weights);
        let mut own = vec![0u64; lists * tensors];
        // A rank without replicas has none to show, and gets the others'.
        if let Some(fingerprints) = &mut memory.fingerprints {
            let words: Vec<u64> = values(fingerprints.of_chunks.wait(device)?);
            for (word, &tensor) in words.iter().zip(&core.chunk_tensors) {
                if let Some(own) = own.get_mut(tensor as usize) {
                    *own = own.wrapping_add(*word);
                }
            }
        }
        let told = |index: usize| {
            let (tensor, is_weight) = (index % tensors, index >= tensors);
            let name = tensor_factor(&core.plan.tensors()[tensor].name, is_weight);
            [name, memory.joined.holders[tensor].first().map_or(0, |&rank| rank.into()), own[index]]
        };
        let places: HashMap<[u64; 2], usize> =
            (0..own.len()).map(|index| ([told(index)[0], told(index)[1]], index)).collect();
        let mut seen = vec![Vec::new(); own.len()];
        let most = lists * memory.joined.most_tensors;
        for first in (0..most).step_by(join::AT_ONCE) {
            let mut words = vec![[0; 3]; join::AT_ONCE.min(most - first)];
            for (words, index) in words.iter_mut().zip(first..own.len()) {
                *words = told(index);
            }
            let all = gather(device, &*memory.ranks.communicator, words.as_flattened())?;
            for (rank, of_rank) in (0..).zip(all.chunks_exact(3 * words.len())) {
                for told in of_rank.as_chunks::<3>().0 {
                    if let Some(&index) = places.get(&[told[0], told[1]]) {
                        seen[index].push((told[2], rank));
                    }
                }
            }
        }
        let differing = seen.into_iter().enumerate().filter_map(|(index, seen)| {
            let ranks = minority(&seen);
            let (tensor, is_weight) = (index % tensors, index >= tensors);
            (!ranks.is_empty()).then_some(DifferingReplica { tensor, is_weight, ranks })
        });
        Ok(differing.collect())
    }
}

/// Gives the ranks that differ from the value of more than half; all of them without such a majority.
fn minority(seen: &[(u64, u32)]) -> Vec<u32> {
    let mut values: Vec<u64> = seen.iter().map(|&(value, _)| value).collect();
    values.sort_unstable();
    // A value of more than half is in the middle.
    let middle = values.get(values.len() / 2).copied();
    let is_most = |value: &u64| 2 * values.iter().filter(|&other| other == value).count() > values.len();
    let most = middle.filter(is_most);
    let mut ranks: Vec<u32> = seen.iter().filter(|&&(value, _)| Some(value) != most).map(|&(_, rank)| rank).collect();
    ranks.sort_unstable();
    ranks
}
