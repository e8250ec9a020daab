//! The meeting of the ranks before the first step: it checks that their settings agree, and finds the holders of each
//! tensor. A rank that cannot go on takes part to the end, so that all others get an error that names it.

use super::{Communicator, Layout, Mesh, Ranks, Reduction, communicator::reduce, gather};
use crate::{Config, Error, Plan, device::Device, features::Features};
use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Words of text in a message, and of a tensor's name.
const TEXT: usize = 32;
const NAME: usize = 16;
/// Tensors in one message: 3 KB a rank.
pub(super) const AT_ONCE: usize = 64;

/// The holders of the tensors.
#[derive(Debug)]
pub(crate) struct Joined {
    /// For each tensor of the plan, the ranks that hold the same as this one, itself included, in their order.
    pub holders: Vec<Arc<[u32]>>,
    /// The place of this rank's part in each tensor, where parts lie one behind the other.
    pub firsts: Vec<u64>,
    /// The number of each tensor of the plan among those of all ranks.
    pub slots: Vec<u32>,
    /// Tensors of all ranks.
    pub model_count: usize,
    /// Their names, where whole tensors are asked for.
    pub names: Vec<String>,
    /// The most tensors that a rank has.
    pub most_tensors: usize,
    /// Whether all tensors of all ranks are replicated.
    pub is_replicated: bool,
    rank: u32,
}

impl Joined {
    /// Gives the result for a rank that has asked nobody: as though the others had the same tensors and no more.
    pub fn supposed(plan: &Plan, ranks: &Ranks) -> Self {
        let (rank, is_replicated, tensors) = (ranks.communicator.rank(), ranks.is_replicated(), plan.tensors().len());
        let slots = (0..).take(tensors).collect();
        let mut known: HashMap<&Layout, Arc<[u32]>> = HashMap::new();
        let holders = (0..tensors).filter_map(|index| ranks.layouts.get(index)).map(|layout| {
            let holds_the_same = |other: &u32| {
                let on = |rank| (layout.counted_on(&ranks.mesh, rank), layout.owners_of(&ranks.mesh, rank));
                on(*other) == on(rank)
            };
            Arc::clone(known.entry(layout).or_insert_with(|| (0..ranks.mesh.ranks()).filter(holds_the_same).collect()))
        });
        let holders = holders.collect();
        Self {
            holders,
            firsts: vec![0; tensors],
            slots,
            model_count: tensors,
            names: Vec::new(),
            most_tensors: tensors,
            is_replicated,
            rank,
        }
    }

    /// For each tensor, the holders of the same, and this rank's place among them.
    pub fn places(&self) -> impl Iterator<Item = (&[u32], usize)> {
        let place = |holders: &[u32]| holders.iter().position(|&rank| rank == self.rank).unwrap_or(0);
        self.holders.iter().map(move |holders| (&**holders, place(holders)))
    }

    /// Whether this rank has any replicas.
    pub fn has_replicas(&self) -> bool {
        self.holders.iter().any(|holders| holders.len() > 1)
    }
}

/// FNV-1a: the same on every machine and in every version.
pub(super) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The message of a rank on a tensor.
#[derive(Clone, Copy)]
struct Told {
    name: u64,
    description: u64,
    length: u64,
    /// The place of the part in the whole, and the length of the whole; all ones where they are not given.
    first: u64,
    end: u64,
    whole: u64,
}

impl Told {
    const WORDS: usize = 6;

    fn of(plan: &Plan, ranks: &Ranks, index: usize) -> [u64; Self::WORDS] {
        let spec = &plan.tensors()[index];
        let nothing = (u64::MAX..u64::MAX, u64::MAX);
        let (range, whole) = ranks.layout(index).part.clone().unwrap_or(nothing);
        [hash(&spec.name), hash(&description(plan, ranks, index)), spec.len, range.start, range.end, whole]
    }

    /// Reads it; `None` in the place of a tensor that the rank does not have.
    fn read(words: &[u64]) -> Option<Self> {
        let &[name, description, length, first, end, whole] = words else { return None };
        (description != 0).then_some(Self { name, description, length, first, end, whole })
    }
}

/// Describes the properties that a tensor must share with those of the same name on other ranks.
fn description(plan: &Plan, ranks: &Ranks, index: usize) -> String {
    let weight = plan.weights().map_or(String::new(), |weights| format!(", weights of {}", weights[index]));
    format!("{:?}{weight}, {:?}", plan.tensors()[index].dtype, ranks.layout(index).along)
}

/// Gives every rank the first failing rank's error, if any failed.
///
/// # Errors
/// This rank's own, or [`Error::RankDiffers`].
pub(super) fn all_or_none<T>(
    communicator: &dyn Communicator,
    device: &dyn Device,
    own: Result<T, Error>,
) -> Result<T, Error> {
    let told = own.as_ref().err().map(|error| match error {
        Error::RankDiffers { rank, what } => (*rank, what.clone()),
        error => (communicator.rank(), error.to_string()),
    });
    let heard = tell(communicator, device, told);
    match (own, heard) {
        (Ok(value), Ok(None)) => Ok(value),
        // An error of this rank alone keeps its type.
        (Err(error), _) if !matches!(error, Error::RankDiffers { .. }) => Err(error),
        (_, Ok(Some((rank, what)))) => Err(Error::RankDiffers { rank, what }),
        (_, Err(error)) | (Err(error), Ok(None)) => Err(error),
    }
}

/// Tells all ranks the error of this one, if any, and gives the first rank's that failed.
fn tell(
    communicator: &dyn Communicator,
    device: &dyn Device,
    told: Option<(u32, String)>,
) -> Result<Option<(u32, String)>, Error> {
    let flags = gather(device, communicator, &[u64::from(told.is_some())])?;
    let Some(first) = flags.iter().position(|&flag| flag != 0) else { return Ok(None) };
    let (rank, what) = told.unwrap_or_default();
    let mut words = [0u64; TEXT];
    words[0] = rank.into();
    put_text(&mut words[1..], &what);
    let all = gather(device, communicator, &words)?;
    let heard = &all[first * TEXT..(first + 1) * TEXT];
    Ok(Some((u32::try_from(heard[0]).unwrap_or(u32::MAX), text_of(&heard[1..]))))
}

/// Checks that all ranks agree, and finds the holders of each tensor. A collective call.
///
/// # Errors
/// [`Error::RankDiffers`], the same on all ranks, and those of the communicator and the device.
pub(super) fn join(device: &dyn Device, plan: &Plan, config: &Config, ranks: &Ranks) -> Result<Joined, Error> {
    let communicator = &*ranks.communicator;
    let (most_tensors, is_replicated) = heads(device, plan, config, ranks)?;
    let (mut model, mut own) = (HashMap::new(), HashMap::new());
    let mut tensors: Vec<Seen> = plan.tensors().iter().map(|_| Seen::default()).collect();
    for (index, spec) in plan.tensors().iter().enumerate() {
        own.insert(hash(&spec.name), index);
    }
    for first in (0..most_tensors).step_by(AT_ONCE) {
        let count = AT_ONCE.min(most_tensors - first);
        let mut words = vec![0; count * Told::WORDS];
        for (words, index) in words.chunks_exact_mut(Told::WORDS).zip(first..plan.tensors().len()) {
            words.copy_from_slice(&Told::of(plan, ranks, index));
        }
        let all = gather(device, communicator, &words)?;
        for (rank, of_rank) in (0..).zip(all.chunks_exact(count * Told::WORDS)) {
            for told in of_rank.chunks_exact(Told::WORDS).filter_map(Told::read) {
                let slot = u32::try_from(model.len()).map_err(|_| Error::OutOfMemory { bytes: u64::MAX })?;
                model.entry(told.name).or_insert(slot);
                if let Some(&index) = own.get(&told.name) {
                    tensors[index].see(&ranks.mesh, ranks.layout(index), communicator.rank(), rank, &told);
                }
            }
        }
    }
    let wrong = tensors.iter_mut().enumerate().find_map(|(index, seen)| {
        let (rank, what) = seen.wrong(&ranks.mesh, ranks.layout(index))?;
        Some(Error::RankDiffers { rank, what: format!("tensor {:?} {what}", plan.tensors()[index].name) })
    });
    all_or_none(communicator, device, wrong.map_or(Ok(()), Err))?;
    let slots: Vec<u32> = plan.tensors().iter().map(|spec| model[&hash(&spec.name)]).collect();
    let said = |index: usize| ranks.layout(index).part.as_ref().map(|(elements, _)| elements.start);
    let firsts = tensors.iter().enumerate().map(|(index, seen)| said(index).unwrap_or(seen.before)).collect();
    // Most tensors are held by the same ranks.
    let mut known: HashMap<Vec<u32>, Arc<[u32]>> = HashMap::new();
    let holders = tensors.into_iter().map(|mut seen| {
        seen.holders.sort_unstable();
        let shared = known.entry(seen.holders).or_insert_with_key(|holders| holders.as_slice().into());
        Arc::clone(shared)
    });
    let holders = holders.collect();
    // This call also makes the network's connections, which must not happen in the first step: that may be captured.
    let names = names(device, plan, ranks, &slots, if ranks.whole_tensors { model.len() } else { 1 })?;
    Ok(Joined {
        holders,
        firsts,
        slots,
        names,
        model_count: model.len(),
        most_tensors,
        is_replicated,
        rank: communicator.rank(),
    })
}

/// Gives the names of the first tensors of the model, up to so many bytes: each from the first rank that counts some of
/// it.
fn names(device: &dyn Device, plan: &Plan, ranks: &Ranks, slots: &[u32], count: usize) -> Result<Vec<String>, Error> {
    let mut words = vec![[0u64; NAME]; count];
    for (index, (spec, &slot)) in plan.tensors().iter().zip(slots).enumerate() {
        if let Some(words) = words.get_mut(slot as usize)
            && ranks.layout(index).first(&ranks.mesh) == ranks.communicator.rank()
        {
            put_text(words, &spec.name);
        }
    }
    let all = reduce(device, &*ranks.communicator, words.as_flattened(), Reduction::Sum)?;
    Ok(all.as_chunks::<NAME>().0.iter().map(|words| text_of(words)).collect())
}

/// Writes as much of a text as so many words hold. The rest stay 0.
fn put_text(words: &mut [u64], text: &str) {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
    let end = (0..=text.len().min(bytes.len())).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
}

fn text_of(words: &[u64]) -> String {
    let bytes: &[u8] = bytemuck::cast_slice(words);
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Checks the settings that must be equal on all ranks. Gives the most tensors of one rank, and whether all tensors are
/// replicated.
fn heads(device: &dyn Device, plan: &Plan, config: &Config, ranks: &Ranks) -> Result<(usize, bool), Error> {
    let Config { dead_threshold, clip, non_finite, features: Features { loss_scale, .. }, .. } = config;
    let of_step = format!(
        "dead_threshold: {dead_threshold:?}, clip: {clip:?}, non_finite: {non_finite:?}, loss_scale: {loss_scale:?}, \
         weights: {}, mesh: {:?}, check: {:?}, whole_tensors: {}",
        plan.weights().is_some(),
        ranks.mesh,
        ranks.check,
        ranks.whole_tensors,
    );
    let is_cut = u64::from(!ranks.is_replicated());
    let own = [hash(env!("CARGO_PKG_VERSION")), hash(&of_step), plan.tensors().len() as u64, is_cut];
    let all = gather(device, &*ranks.communicator, &own)?;
    let what = ["has another version of gradprobe".to_owned(), "has other settings".to_owned()];
    for (column, what) in what.into_iter().enumerate() {
        let mut votes = Votes::new();
        (0..).zip(all.iter().skip(column).step_by(own.len())).for_each(|(rank, &value)| vote(&mut votes, value, rank));
        if let Some(rank) = outvoted(&votes) {
            let here = if column == 1 {
                format!("; on rank {} they are {of_step}", ranks.communicator.rank())
            } else {
                String::new()
            };
            return Err(Error::RankDiffers { rank, what: what + &here });
        }
    }
    let most = |column| all.iter().skip(column).step_by(own.len()).max().copied().unwrap_or(0);
    let most_tensors = usize::try_from(most(2)).map_err(|_| Error::OutOfMemory { bytes: u64::MAX })?;
    Ok((most_tensors, most(3) == 0))
}

/// The number of ranks with each value, and the first of them.
type Votes = HashMap<u64, (usize, u32)>;

fn vote(votes: &mut Votes, value: u64, rank: u32) {
    let (count, first) = votes.entry(value).or_insert((0, rank));
    *count += 1;
    *first = rank.min(*first);
}

/// Gives the first rank that differs from most, or, without a majority, from the first.
fn outvoted(votes: &Votes) -> Option<u32> {
    let most = votes.values().map(|&(count, _)| count).max()?;
    let elected = votes.iter().filter(|&(_, &(count, _))| count == most).min_by_key(|&(_, &(_, first))| first)?.0;
    votes.iter().filter(|&(value, _)| value != elected).map(|(_, &(_, first))| first).min()
}

/// The messages of all ranks on a tensor of this rank's plan.
#[derive(Default)]
struct Seen {
    descriptions: Votes,
    /// Lengths at the ranks that hold the same as this one.
    lengths: Votes,
    holders: Vec<u32>,
    /// Bits of the ranks that have it.
    planners: Vec<u64>,
    /// Elements of the parts before this rank's.
    before: u64,
    /// Parts of a known whole: first, end, whole, rank.
    parts: Vec<(u64, u64, u64, u32)>,
}

impl Seen {
    fn see(&mut self, mesh: &Mesh, layout: &Layout, own: u32, rank: u32, told: &Told) {
        vote(&mut self.descriptions, told.description, rank);
        self.planners.resize(mesh.ranks().div_ceil(u64::BITS) as usize, 0);
        self.planners[(rank / u64::BITS) as usize] |= 1 << (rank % u64::BITS);
        let (counts_on, own_on) = (layout.counted_on(mesh, rank), layout.counted_on(mesh, own));
        if counts_on == own_on {
            self.holders.push(rank);
            vote(&mut self.lengths, told.length, rank);
        }
        if counts_on == rank {
            self.before += if rank < own_on { told.length } else { 0 };
            if told.whole != u64::MAX {
                self.parts.push((told.first, told.end, told.whole, rank));
            }
        }
    }

    /// Gives the rank that is wrong, and the error.
    fn wrong(&mut self, mesh: &Mesh, layout: &Layout) -> Option<(u32, String)> {
        if let Some(rank) = outvoted(&self.descriptions) {
            return Some((rank, "is of another type or layout there".to_owned()));
        }
        // Ranks at the coordinate that owns it, and at each other where a rank has it.
        let group = |rank: &u32| layout.owners_of(mesh, *rank);
        let has_it = |rank: &u32| self.planners[(rank / u64::BITS) as usize] >> (rank % u64::BITS) & 1 == 1;
        let groups: HashSet<u32> =
            (0..mesh.ranks()).filter(has_it).map(|rank| group(&rank)).chain([layout.first(mesh)]).collect();
        let mut needed = (0..mesh.ranks()).filter(|rank| groups.contains(&group(rank)));
        if let Some(rank) = needed.find(|rank| !has_it(rank)) {
            return Some((rank, "is not in the plan there".to_owned()));
        }
        if let Some(rank) = outvoted(&self.lengths) {
            return Some((rank, "has another length there than its replicas".to_owned()));
        }
        self.parts.sort_unstable();
        let mut end = 0;
        for &(first, until, whole, rank) in &self.parts {
            let what = match (first.cmp(&end), until > whole) {
                (Ordering::Less, _) if until > first => {
                    format!("has elements from {first} there, which another rank has up to {end}")
                }
                (Ordering::Greater, _) => {
                    format!("has elements from {first} there, and those from {end} are on no rank")
                }
                (_, true) => format!("has elements up to {until} there, of {whole}"),
                _ => {
                    end = end.max(until);
                    continue;
                }
            };
            return Some((rank, what));
        }
        let &(_, _, whole, rank) = self.parts.last()?;
        (end != whole).then(|| (rank, format!("ends at {end} there, and should have {whole} elements")))
    }
}
