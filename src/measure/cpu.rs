//! The measurement on the CPU, and the end of a step.
#![allow(unsafe_code, reason = "finds what a launch names by its addresses")]

use super::{Record, StepOutputs, StepSums, chunk::Measure};
use crate::{
    Clip, Element, HostTensor, NonFinitePolicy,
    clip::{ClipHeader, ClipState, LossScaleState, divisor},
    device::cpu::{
        dispatch,
        memory::{Tables, tensors},
    },
    dtype::sealed::Bits,
    health::{self, RuleTable},
    history::Ring,
    probe::{Common, StepArguments, TensorEntry},
    ranks::{self, CheckSums},
    spec::{self, CHUNK},
    tensor::with_elements,
};
use rayon::prelude::*;

/// Gives the records of tensors, whose elements were scaled if there is a loss scale. `parts` has one a chunk, and
/// afterwards those of the tensors' chunks.
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
        // An absent tensor has chunks but no elements.
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

/// The dead threshold as a magnitude of the elements' type: from the table, or from the step's loss scale.
fn word<E: Element>(_: &[E], bits: u32, threshold: Option<f64>) -> <E as Bits>::Word {
    E::word(threshold.map_or(bits, |threshold| E::DTYPE.threshold_bits(threshold)))
}

/// Does as `gradprobe_measure`.
///
/// # Safety
/// As of [`Device::launch`](crate::device::Device::launch).
pub(crate) unsafe fn run(a: &StepArguments) {
    let common = &a.common;
    let (count, chunks) = (common.tensor_count as usize, common.chunk_count as usize);
    // SAFETY: the caller's promise.
    let (gradients, entries) = unsafe { tensors(common) };
    // SAFETY: the caller's promise.
    let (records, parts, scale, sums): (&mut [Record], &mut [Record], &[LossScaleState], &mut [StepSums]) =
        unsafe { Tables::at(((common.records, count), (common.chunk_parts, chunks), (a.loss_scale, 1), (a.sums, 1))) };
    measure(&gradients, entries, parts, scale.first(), records);
    if let [sums] = sums {
        let mut rest = &*parts;
        for (tensor, entry) in gradients.iter().zip(entries) {
            let of_tensor;
            (of_tensor, rest) = rest.split_at(entry.chunk_count as usize);
            sums.add(&of_tensor[..tensor.len().div_ceil(CHUNK)], entry.is_uncounted == 0);
        }
    }
    if a.weights != 0 {
        // Their tables and records are behind those of the gradients, and their chunks behind the gradients' chunks.
        let behind = |address: u64, bytes: usize| address + (count * bytes) as u64;
        let of_weights = Common {
            addresses: behind(common.addresses, size_of::<u64>()),
            tensors: behind(common.tensors, size_of::<TensorEntry>()),
            ..*common
        };
        // SAFETY: the caller's promise.
        let (weights, entries) = unsafe { tensors(&of_weights) };
        // SAFETY: the caller's promise.
        let records = unsafe { Tables::at((behind(common.records, size_of::<Record>()), count)) };
        measure(&weights, entries, parts, None, records);
    }
    if a.is_part == 0 {
        // SAFETY: the caller's promise; the references made above are no longer used.
        return unsafe { finish(a) };
    }
    // SAFETY: the caller's promise.
    let (check, sums): (&mut [CheckSums], &mut [StepSums]) = unsafe { Tables::at(((a.check, 1), (a.sums, 1))) };
    if let ([check], [sums]) = (check, sums) {
        // SAFETY: the caller's promise.
        unsafe { add_state(a, check) };
        sums.squares.carry();
    }
}

/// Adds the state that must be the same on all ranks before they decide a step.
///
/// # Safety
/// As of [`run`].
unsafe fn add_state(a: &StepArguments, check: &mut CheckSums) {
    let words = a.clip_words as usize;
    // SAFETY: the caller's promise.
    let (words, outputs, scale): (&[u64], &[StepOutputs], &[LossScaleState]) =
        unsafe { Tables::at(((a.clip_state, words), (a.common.outputs, 1), (a.loss_scale, 1))) };
    let (words, scale) = (words.iter().copied(), scale.first().map(LossScaleState::word));
    check.ranks = 1;
    check.state = a
        .rank_factors
        .map(|factor| ranks::mixed_sum(words.clone().chain([outputs[0].step]).chain(scale)).wrapping_mul(factor));
}

/// Finishes a step, once its records are there.
///
/// # Safety
/// As of [`run`].
pub(crate) unsafe fn finish(a: &StepArguments) {
    let (mut differs, mut refused) = (0, false);
    // SAFETY: the caller's promise.
    if let [check] = unsafe { <&mut [CheckSums]>::at((a.check, 1)) } {
        // SAFETY: the caller's promise.
        let of_host: &mut [CheckSums] = unsafe { Tables::at((a.checked, 1)) };
        let (checked, is_late) = (std::mem::take(check), a.is_part == 0);
        differs = checked.flags(a.ranks, is_late);
        refused = !checked.is_complete(a.ranks, is_late) || a.strict != 0 && differs != 0;
        of_host[0] = checked;
        if a.is_part == 0 {
            // SAFETY: the caller's promise.
            unsafe { add_state(a, check) };
        }
    }
    let tensors = a.common.tensor_count as usize;
    let rule = Clip::of_parameters(a.clip, (a.clip_threshold, a.clip_smoothing, a.clip_steps), a.max_norm);
    let words = rule.state_words(tensors) - size_of::<ClipHeader>() / size_of::<u64>();
    // SAFETY: the caller's promise.
    let (header, words, coefficients): (&mut [ClipHeader], &mut [u64], &mut [f32]) = unsafe {
        Tables::at((
            (a.clip_state, 1),
            (a.clip_state + size_of::<ClipHeader>() as u64, words),
            (a.coefficients, tensors),
        ))
    };
    // SAFETY: the caller's promise.
    let (records, last, scale, sums): (&[Record], &mut [StepOutputs], &mut [LossScaleState], &mut [StepSums]) = unsafe {
        Tables::at(((a.common.records, tensors << a.weights), (a.common.outputs, 1), (a.loss_scale, 1), (a.sums, 1)))
    };
    let (records, of_weights) = records.split_at(tensors);
    let weights = (a.weights != 0).then_some(of_weights);
    let mut clip = ClipState { rule, header: &mut header[0], words, coefficients };
    let (last, sums) = (&mut last[0], std::mem::take(&mut sums[0]));
    let mut outputs =
        StepOutputs::finish(&sums, records, NonFinitePolicy::of(a.policy), refused, &mut clip, scale.first_mut());
    outputs.step = last.step + 1;
    outputs.flags |= differs;
    outputs.weights = a.weights;
    // SAFETY: the caller's promise.
    if let [table] = unsafe { <&[RuleTable]>::at((a.health_rules, 1)) } {
        let behind = a.health_rules + size_of::<RuleTable>() as u64;
        // SAFETY: the caller's promise.
        let (exempt, norms, words) =
            unsafe { Tables::at(((behind, tensors), (a.last_norms, 1 + tensors), (a.health_words, tensors))) };
        let step = (outputs.finite_total_norm, outputs.found_inf == 0.0);
        let rules = (&table.rules[..table.count as usize], exempt);
        outputs.health = health::judge(rules, norms, words, (records, weights), step);
    }
    let steps = a.history_steps as usize;
    // SAFETY: the caller's promise.
    let (tag, of_steps, of_tensors): (&[u64], _, _) =
        unsafe { Tables::at(((a.tag, 1), (a.history, steps), (a.history_tensors, steps * tensors))) };
    if let [tag] = tag {
        Ring { steps: of_steps, tensors: of_tensors, tag: *tag }.keep(&outputs, records);
    }
    *last = outputs;
}
