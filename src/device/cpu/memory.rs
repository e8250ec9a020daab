//! Where addresses become slices: what a launch's arguments name, for loops that know only slices.
#![allow(unsafe_code, reason = "makes slices of the addresses that the probe vouches for")]

use crate::{
    Dot, GsnrRecord, Histogram, HostTensor, HostTensorMut, NonFinitePolicy, Record, StepOutputs,
    clip::{AdaptiveRecord, Clip, ClipHeader, ClipState, LossScaleState, Rule, TensorUnits},
    dot::Other,
    gsnr::{Adam, Track},
    health::{RuleTable, ThresholdRule},
    history::{HistoryStep, HistoryTensor, Ring},
    probe::{Arguments, TensorEntry},
    ranks::Run,
    samples::{SamplePlace, SampleRing, SampleTable},
};
use bytemuck::Pod;

/// The word of whoever launches for all addresses in the arguments, which makes slices of them without more of it.
#[derive(Clone, Copy)]
struct Vouched(());

impl Vouched {
    /// So many values at an address; none at 0, where there is no such table.
    fn slice<'a, T: Pod>(self, address: u64, count: usize) -> &'a [T] {
        if address == 0 || count == 0 {
            return &[];
        }
        // SAFETY: vouched for, with counts that are those with which the tables were made.
        unsafe { std::slice::from_raw_parts(address as *const T, count) }
    }

    /// The same, to be changed.
    fn slice_mut<'a, T: Pod>(self, address: u64, count: usize) -> &'a mut [T] {
        if address == 0 || count == 0 {
            return &mut [];
        }
        // SAFETY: as above; no two tables overlap, and each is asked for once.
        unsafe { std::slice::from_raw_parts_mut(address as *mut T, count) }
    }

    /// The elements of a tensor; none where it is absent.
    fn tensor<'a>(self, address: u64, length: u64, dtype: u32) -> HostTensor<'a> {
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        match dtype {
            0 => HostTensor::F32(self.slice(address, count)),
            1 => HostTensor::F16(self.slice(address, count)),
            _ => HostTensor::BF16(self.slice(address, count)),
        }
    }

    /// The same, to be changed.
    fn tensor_mut<'a>(self, address: u64, length: u64, dtype: u32) -> HostTensorMut<'a> {
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        match dtype {
            0 => HostTensorMut::F32(self.slice_mut(address, count)),
            1 => HostTensorMut::F16(self.slice_mut(address, count)),
            _ => HostTensorMut::BF16(self.slice_mut(address, count)),
        }
    }
}

/// What [`Memory::of`] names that only one kernel uses.
pub(crate) enum Own<'a> {
    Nothing,
    /// Tensors to be changed; where there are adaptive units, these, their weights and what was done to them.
    Changed(Vec<HostTensorMut<'a>>, Option<Adaptive<'a>>),
    /// Means, deviations, records, for each tensor; and the window.
    Tracked {
        tracks: &'a mut [Track],
        means: &'a mut [f32],
        deviations: &'a mut [f32],
        window: u32,
    },
    /// Adam's step and the moments of each tensor.
    Moments(&'a Adam, Vec<[&'a [f32]; 2]>),
    Histograms(&'a mut [Histogram]),
    Dots(Vec<HostTensor<'a>>, &'a mut [Dot]),
    Sampled(SampleRing<'a>),
    /// The lists of all ranks, and where elements are.
    Ranks {
        lists: &'a [Record],
        length: usize,
        placements: &'a [Run],
        ranks: &'a [u32],
    },
}

/// The units of an adaptive clip.
pub(crate) struct Adaptive<'a> {
    pub rule: &'a Rule,
    pub units: &'a [TensorUnits],
    pub weights: Vec<HostTensor<'a>>,
    pub records: &'a mut [AdaptiveRecord],
}

/// Rules and exemptions, the norms of the last clean step, and the words of the tensors.
pub(crate) type Judged<'a> = ((&'a [ThresholdRule], &'a [u32]), &'a mut [f64], &'a mut [u32]);

/// What every kernel works with.
pub(crate) struct Memory<'a> {
    pub tensors: Vec<HostTensor<'a>>,
    /// Where this launch measures them.
    pub weights: Option<Vec<HostTensor<'a>>>,
    pub chunk_count: usize,
    pub is_part: bool,
    pub one_histogram: bool,
    pub non_finite: NonFinitePolicy,
    /// Of the tensors, and of the weights.
    pub entries: &'a [TensorEntry],
    pub chunk_parts: &'a mut [Record],
    /// Of the tensors, and of the weights where they are measured.
    pub records: &'a mut [Record],
    pub outputs: &'a mut StepOutputs,
    pub clip: ClipState<'a>,
    pub loss_scale: Option<&'a mut LossScaleState>,
    pub health: Option<Judged<'a>>,
    pub history: Option<Ring<'a>>,
    /// Of the tracked tensors, or of those with moments.
    pub gsnr_records: &'a mut [GsnrRecord],
    pub own: Own<'a>,
}

/// What the kernel of this launch uses besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Uses {
    Nothing,
    ChangedTensors,
    Units,
    Tracked,
    Moments,
    Histograms,
    Dots,
    Samples,
    Ranks,
}

impl<'a> Memory<'a> {
    /// What these arguments name.
    ///
    /// # Safety
    /// As of [`Device::launch`](crate::device::Device::launch), for all of `'a`, of host memory.
    #[expect(clippy::too_many_lines, reason = "one table after the other, as in arguments.cuh")]
    pub unsafe fn of(a: &Arguments, uses: Uses) -> Self {
        let at = Vouched(());
        let (tensors, chunks, lists) = (a.tensor_count as usize, a.chunk_count as usize, 1 + a.weights as usize);
        let entries: &[TensorEntry] = at.slice(a.tensors, lists * tensors);
        let addresses: &[u64] = at.slice(a.addresses, lists * tensors);
        let list = |first: usize| {
            let of = |i: usize| at.tensor(addresses[i], entries[i].length, entries[i].dtype);
            (first..first + tensors).map(of).collect::<Vec<_>>()
        };
        let changed = matches!(uses, Uses::ChangedTensors | Uses::Units);
        let own = match uses {
            Uses::Nothing => Own::Nothing,
            Uses::ChangedTensors | Uses::Units => {
                let of = |i: usize| at.tensor_mut(addresses[i], entries[i].length, entries[i].dtype);
                let adaptive = (uses == Uses::Units).then(|| {
                    let rule = &at.slice::<Rule>(a.adaptive, 1)[0];
                    let units: &[TensorUnits] = at.slice(rule.units, tensors + 1);
                    let weight = |(units, entry): (&TensorUnits, &TensorEntry)| {
                        at.tensor(units.address, entry.length, units.dtype)
                    };
                    let weights = units.iter().zip(entries).map(weight).collect();
                    Adaptive { rule, units, weights, records: at.slice_mut(a.adaptive_records, tensors) }
                });
                Own::Changed((0..tensors).map(of).collect(), adaptive)
            }
            Uses::Tracked => {
                let tracks: &mut [Track] = at.slice_mut(a.tracks, tensors);
                let end = tracks.iter().zip(entries).filter(|(track, _)| track.is_tracked());
                let end = end.map(|(track, entry)| track.offset + entry.length).max().unwrap_or(0);
                let count = usize::try_from(end).unwrap_or(usize::MAX);
                Own::Tracked {
                    tracks,
                    means: at.slice_mut(a.means, count),
                    deviations: at.slice_mut(a.deviations, count),
                    window: a.window,
                }
            }
            Uses::Moments => {
                let adam = &at.slice::<Adam>(a.adam, 1)[0];
                let moments: &[[u64; 2]] = at.slice(a.adam + size_of::<Adam>() as u64, tensors);
                let of = |(addresses, entry): (&[u64; 2], &TensorEntry)| {
                    let count = usize::try_from(entry.length).unwrap_or(usize::MAX);
                    addresses.map(|address| at.slice(address, count))
                };
                Own::Moments(adam, moments.iter().zip(entries).map(of).collect())
            }
            Uses::Histograms => {
                Own::Histograms(at.slice_mut(a.histograms, if a.one_histogram != 0 { 1 } else { tensors }))
            }
            Uses::Dots => {
                let others: &[Other] = at.slice(a.others, tensors);
                let other =
                    |(other, entry): (&Other, &TensorEntry)| at.tensor(other.address, entry.length, other.dtype);
                Own::Dots(others.iter().zip(entries).map(other).collect(), at.slice_mut(a.dots, tensors))
            }
            Uses::Samples => {
                let table = &at.slice::<SampleTable>(a.samples, 1)[0];
                let (count, steps) = (table.count as usize, table.steps as usize);
                Own::Sampled(SampleRing {
                    places: at.slice::<SamplePlace>(table.places, count),
                    numbers: at.slice_mut(table.numbers, steps),
                    values: at.slice_mut(table.ring, steps * count),
                })
            }
            Uses::Ranks => {
                let length = a.list_length as usize;
                let placements: &[Run] = at.slice(a.placements, tensors);
                let end = placements.iter().filter_map(Run::end).max().unwrap_or(0);
                Own::Ranks {
                    lists: at.slice(a.lists, length * a.list_count as usize),
                    length,
                    placements,
                    ranks: at.slice(a.placements + size_of_val(placements) as u64, end),
                }
            }
        };
        let rule = Clip::of_parameters(a.clip, (a.clip_threshold, a.clip_smoothing, a.clip_steps), a.max_norm);
        let words = rule.state_words(tensors) - size_of::<ClipHeader>() / size_of::<u64>();
        let health = (a.health_rules != 0).then(|| {
            let table = &at.slice::<RuleTable>(a.health_rules, 1)[0];
            let exempt: &[u32] = at.slice(a.health_rules + size_of::<RuleTable>() as u64, tensors);
            let last_norms: &mut [f64] = at.slice_mut(a.last_norms, 1 + tensors);
            let words: &mut [u32] = at.slice_mut(a.health_words, tensors);
            ((&table.rules[..table.count as usize], exempt), last_norms, words)
        });
        let history = (a.history != 0).then(|| Ring {
            steps: at.slice_mut::<HistoryStep>(a.history, a.history_steps as usize),
            tensors: at.slice_mut::<HistoryTensor>(a.history_tensors, a.history_steps as usize * tensors),
            tag: at.slice::<u64>(a.tag, 1)[0],
        });
        Self {
            tensors: if changed { Vec::new() } else { list(0) },
            weights: (a.weights != 0).then(|| list(tensors)),
            chunk_count: chunks,
            is_part: a.is_part != 0,
            one_histogram: a.one_histogram != 0,
            non_finite: match a.policy {
                0 => NonFinitePolicy::Skip,
                1 => NonFinitePolicy::Propagate,
                _ => NonFinitePolicy::ZeroNonFinite,
            },
            entries,
            chunk_parts: at.slice_mut(a.chunk_parts, lists * chunks),
            records: at.slice_mut(a.records, lists * tensors),
            outputs: &mut at.slice_mut::<StepOutputs>(a.outputs, 1)[0],
            clip: ClipState {
                rule,
                header: &mut at.slice_mut::<ClipHeader>(a.clip_state, 1)[0],
                words: at.slice_mut(a.clip_state + size_of::<ClipHeader>() as u64, words),
                coefficients: at.slice_mut(a.coefficients, tensors),
            },
            loss_scale: at.slice_mut::<LossScaleState>(a.loss_scale, 1).first_mut(),
            health,
            history,
            gsnr_records: at.slice_mut(a.gsnr_records, tensors),
            own,
        }
    }
}
