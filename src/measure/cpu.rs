//! The measurement on the CPU, and the end of a step.

use super::{Record, StepOutputs, StepSums, chunk::Measure};
use crate::{
    Clip, Element, HostTensor, NonFinitePolicy,
    clip::{ClipHeader, ClipState, LossScaleState, divisor},
    device::cpu::{Memory, dispatch},
    dtype::sealed::Bits,
    health::{self, RuleTable},
    history::Ring,
    probe::{Common, StepArguments, TensorEntry},
    ranks::{self, CheckSums},
    spec::{self, CHUNK},
    tensor::with_elements,
};
use rayon::prelude::*;

/// The records of tensors, whose elements were scaled if there is a loss scale. `parts` has one a chunk, and afterwards
/// those that the tensors have.
fn measure(
    tensors: &[HostTensor<'_>],
    entries: &[TensorEntry],
    mut parts: &mut [Record],
    scale: Option<&LossScaleState>,
    records: &mut [Record],
) {
    let divisor = divisor(scale.map_or(1.0, |state| state.scale));
    let threshold = scale.map(|state| f64::from(state.dead_threshold) * divisor);
    let mut work = Vec::with_capacity(tensors.len());
    for ((tensor, entry), record) in tensors.iter().zip(entries).zip(records) {
        let of_tensor;
        (of_tensor, parts) = parts.split_at_mut(entry.chunk_count as usize);
        work.push((*tensor, entry.dead_bits, of_tensor, record));
    }
    work.into_par_iter().for_each(|(tensor, dead_bits, parts, record)| {
        // Absent, it has chunks but no elements.
        let count = tensor.len().div_ceil(CHUNK);
        let parts = &mut parts[..count];
        parts.par_iter_mut().enumerate().for_each(|(index, part)| {
            *part = with_elements!(HostTensor, tensor, elements => {
                let elements = &elements[index * CHUNK..elements.len().min((index + 1) * CHUNK)];
                dispatch::run(Measure { elements, dead_bits: word(elements, dead_bits, threshold) })
            });
        });
        let merged = spec::fold_spans(count, |chunk| parts[chunk], Record::merge);
        *record = merged.unwrap_or(Record::EMPTY).over(divisor);
    });
}

/// The dead threshold as a magnitude of the elements' type: the table's, or that of a step's scale.
fn word<E: Element>(_: &[E], bits: u32, threshold: Option<f64>) -> <E as Bits>::Word {
    E::word(threshold.map_or(bits, |threshold| E::DTYPE.threshold_bits(threshold)))
}

/// What `gradprobe_measure` does.
pub(crate) fn run(memory: &Memory, a: &StepArguments) {
    let common = &a.common;
    let (tensors, chunks) = (common.tensor_count as usize, common.chunk_count as usize);
    let records: &mut [Record] = memory.slice_mut(common.records, tensors);
    let parts: &mut [Record] = memory.slice_mut(common.chunk_parts, chunks);
    let scale = memory.slice(a.loss_scale, 1).first();
    let gradients = memory.tensors(common);
    measure(&gradients, memory.entries(common), parts, scale, records);
    if let [sums] = memory.slice_mut::<StepSums>(a.sums, 1) {
        let mut rest = &*parts;
        for (tensor, entry) in gradients.iter().zip(memory.entries(common)) {
            let of_tensor;
            (of_tensor, rest) = rest.split_at(entry.chunk_count as usize);
            sums.add(&of_tensor[..tensor.len().div_ceil(CHUNK)], entry.is_uncounted == 0);
        }
    }
    if a.weights != 0 {
        // Their tables and records are behind those of the gradients, and their chunks behind the gradients' chunks.
        let behind = |address: u64, bytes: usize| address + (tensors * bytes) as u64;
        let of_weights = Common {
            addresses: behind(common.addresses, size_of::<u64>()),
            tensors: behind(common.tensors, size_of::<TensorEntry>()),
            records: behind(common.records, size_of::<Record>()),
            ..*common
        };
        let records: &mut [Record] = memory.slice_mut(of_weights.records, tensors);
        measure(&memory.tensors(&of_weights), memory.entries(&of_weights), parts, None, records);
    }
    if a.is_part == 0 {
        finish(memory, a);
    } else if let ([check], [sums]) = (memory.slice_mut(a.check, 1), memory.slice_mut::<StepSums>(a.sums, 1)) {
        add_state(memory, a, check);
        sums.squares.carry();
    }
}

/// Adds what must be the same on all ranks before they decide a step.
fn add_state(memory: &Memory, a: &StepArguments, check: &mut CheckSums) {
    let words = memory.slice(a.clip_state, a.clip_words as usize).iter().copied();
    let step = memory.slice::<StepOutputs>(a.common.outputs, 1)[0].step;
    let scale = memory.slice::<LossScaleState>(a.loss_scale, 1).first().map(LossScaleState::word);
    check.ranks = 1;
    check.state =
        a.rank_factors.map(|factor| ranks::mixed_sum(words.clone().chain([step]).chain(scale)).wrapping_mul(factor));
}

/// The end of a step whose records are there.
pub(crate) fn finish(memory: &Memory, a: &StepArguments) {
    let (mut differs, mut refused) = (0, false);
    if let [check] = memory.slice_mut::<CheckSums>(a.check, 1) {
        let (checked, is_late) = (std::mem::take(check), a.is_part == 0);
        differs = checked.flags(a.ranks, is_late);
        refused = !checked.is_complete(a.ranks, is_late) || a.strict != 0 && differs != 0;
        memory.slice_mut(a.checked, 1)[0] = checked;
        if a.is_part == 0 {
            add_state(memory, a, check);
        }
    }
    let tensors = a.common.tensor_count as usize;
    let all: &[Record] = memory.slice(a.common.records, tensors << a.weights);
    let (records, of_weights) = all.split_at(tensors);
    let weights = (a.weights != 0).then_some(of_weights);
    let rule = Clip::of_parameters(a.clip, (a.clip_threshold, a.clip_smoothing, a.clip_steps), a.max_norm);
    let words = rule.state_words(tensors) - size_of::<ClipHeader>() / size_of::<u64>();
    let mut clip = ClipState {
        rule,
        header: &mut memory.slice_mut::<ClipHeader>(a.clip_state, 1)[0],
        words: memory.slice_mut(a.clip_state + size_of::<ClipHeader>() as u64, words),
        coefficients: memory.slice_mut(a.coefficients, tensors),
    };
    let last = &mut memory.slice_mut::<StepOutputs>(a.common.outputs, 1)[0];
    let loss_scale = memory.slice_mut(a.loss_scale, 1).first_mut();
    let sums = std::mem::take(&mut memory.slice_mut::<StepSums>(a.sums, 1)[0]);
    let mut outputs =
        StepOutputs::finish(&sums, records, NonFinitePolicy::of(a.policy), refused, &mut clip, loss_scale);
    outputs.step = last.step + 1;
    outputs.flags |= differs;
    outputs.weights = a.weights;
    if let [table] = memory.slice::<RuleTable>(a.health_rules, 1) {
        let exempt = memory.slice(a.health_rules + size_of::<RuleTable>() as u64, tensors);
        let (norms, words) = (memory.slice_mut(a.last_norms, 1 + tensors), memory.slice_mut(a.health_words, tensors));
        let step = (outputs.finite_total_norm, outputs.found_inf == 0.0);
        let rules = (&table.rules[..table.count as usize], exempt);
        outputs.health = health::judge(rules, norms, words, (records, weights), step);
    }
    if let [tag] = memory.slice(a.tag, 1) {
        let steps = a.history_steps as usize;
        let (of_steps, of_tensors) = (memory.slice_mut(a.history, steps), a.history_tensors);
        Ring { steps: of_steps, tensors: memory.slice_mut(of_tensors, steps * tensors), tag: *tag }
            .keep(&outputs, records);
    }
    *last = outputs;
}
