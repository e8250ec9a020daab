//! The measurement on the CPU, and the end of a step.

use super::{Record, StepOutputs, chunk::Measure};
use crate::{
    Element, HostTensor,
    clip::{LossScaleState, divisor},
    device::cpu::{Memory, dispatch},
    dtype::sealed::Bits,
    health,
    probe::TensorEntry,
    spec::{self, CHUNK},
    tensor::with_elements,
};
use rayon::prelude::*;

/// The records of tensors, whose elements were scaled if there is a loss scale. `parts` has one a chunk.
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
pub(crate) fn run(memory: &mut Memory<'_>) {
    let tensors = memory.tensors.len();
    let (own, of_weights) = memory.records.split_at_mut(tensors);
    let chunks = memory.chunk_count;
    if let Some(weights) = &memory.weights {
        let (entries, parts) = (&memory.entries[tensors..], &mut memory.chunk_parts[chunks..]);
        measure(weights, entries, parts, None, of_weights);
    }
    let (entries, parts) = (&memory.entries[..tensors], &mut memory.chunk_parts[..chunks]);
    measure(&memory.tensors, entries, parts, memory.loss_scale.as_deref(), own);
    if !memory.is_part {
        finish(memory, 0);
    }
}

/// The end of a step whose records are there.
pub(crate) fn finish(memory: &mut Memory<'_>, differing_replicas: u32) {
    let (records, of_weights) = memory.records.split_at(memory.tensors.len());
    let weights = memory.weights.as_ref().map(|_| of_weights);
    let mut outputs =
        StepOutputs::finish(records, memory.non_finite, &mut memory.clip, memory.loss_scale.as_deref_mut());
    outputs.step = memory.outputs.step + 1;
    outputs.differing_replicas = differing_replicas;
    outputs.verdict |= if differing_replicas > 0 { StepOutputs::VERDICT_REPLICAS } else { 0 };
    outputs.weights = u32::from(weights.is_some());
    if let Some((rules, last_norms, words)) = &mut memory.health {
        let step = (outputs.finite_total_norm, outputs.found_inf == 0.0);
        outputs.health = health::judge(*rules, last_norms, words, (records, weights), step);
    }
    if let Some(history) = &mut memory.history {
        history.keep(&outputs, records);
    }
    *memory.outputs = outputs;
}
